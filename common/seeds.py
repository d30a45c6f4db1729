"""Random numbers from integers: a run may stop at any step, and N ranks draw what one would have drawn.

No generator is carried from step to step. Whoever needs random numbers asks for those of (seed, step, ...), and gets the same ones
each time, on every machine, in any order.
"""

import functools
import hashlib

import torch


def rng(*key):
    """A torch.Generator seeded by integers such as (seed, step, row): the same key, the same random numbers."""
    digest = hashlib.sha256(repr(tuple(int(k) for k in key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def noise_rows(shape, batch, *key, rows=slice(None)):
    """Standard normal noise (B, *shape) of a batch; with `rows`, of a part of it. Every row has a generator of its own, so that
    one GPU among many draws its rows alone, and they are those that a single GPU would have drawn."""
    return torch.stack([torch.randn(*shape, generator=rng(*key, i)) for i in range(batch)[rows]])


def batch_indices(seed, step, size, n):
    """Which of n pictures a step sees, (size,): a new random order every epoch, and a pure function of (seed, step)."""
    index, start = [], step * size
    for epoch in range(start // n, (start + size - 1) // n + 1):
        order = epoch_order(seed, epoch, n)
        index.append(order[max(0, start - epoch * n) : start + size - epoch * n])
    return torch.cat(index)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, n):
    """A random order of n pictures, (n,)."""
    return torch.randperm(n, generator=rng(seed, epoch, 0))
