"""Muon, with matrices of one shape made orthogonal together: 1.9 times as fast on a CPU as torch.optim.Muon, the same arithmetic.

The UNet of --size tiny has 120 small matrices, and torch's takes them one after the other: 1,800 products, most of them too
small to keep a core busy. On one core that was nearly a quarter of a training step of stage 1 (0.11 of 0.45 s, AdamW included).
"""

import collections

import torch

from common.device import matmul_dtype

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the Newton-Schulz iteration, Keller Jordan's


def orthogonalize(x, steps=5, eps=1e-7):
    """(N, rows, columns), rows <= columns: each matrix with its singular values brought near 1, in bfloat16 where that is fast."""
    a, b, c = COEFFICIENTS
    x = x.to(matmul_dtype(x.device))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with Nesterov momentum and adjust_lr_fn="match_rms_adamw", for matrices (rows, columns) and kernels of
    convolutions (rows, ...), which count as matrices of as many rows.

    The step of a matrix is its averaged gradient made orthogonal, so that no direction starves. It is as large as AdamW's would be,
    so both can have one learning rate.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            for w in weights:
                if not self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
            averages = [self.state[w]["momentum_buffer"] for w in weights]
            gradients = [w.grad for w in weights]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            same = collections.defaultdict(list)  # shape -> [(weight, update)], wide
            for w, update in zip(weights, ahead, strict=True):
                update = update.flatten(1)
                wide = update.shape[0] <= update.shape[1]
                same[tuple(sorted(update.shape))].append((w, update if wide else update.T, wide))
            for shape, rows in same.items():
                steps = orthogonalize(torch.stack([update for _, update, _ in rows]))
                length = group["lr"] * 0.2 * max(shape) ** 0.5
                for (w, _, wide), step in zip(rows, steps, strict=True):
                    w.add_((step if wide else step.T).view(w.shape), alpha=-length)
