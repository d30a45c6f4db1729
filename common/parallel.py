"""Several GPUs and several machines: what torchrun adds to a stage, in one place.

torchrun starts the same script several times; each copy is a rank, with a GPU of its own. Every rank holds the whole model,
works on its rows of each batch, and before a step all ranks average their gradients: so all take the same step, and their
weights stay equal. Without torchrun there is one rank, and nothing in this file does anything.

    torchrun --nproc_per_node 8 train_fm.py --size t2i ...                                  # one machine with 8 GPUs
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train_fm.py ...  # on each of four

--batch is the whole batch, whatever the number of ranks. Data, noise and timesteps come from (seed, step) for the whole batch,
of which a rank takes its rows: N ranks take the steps of one, up to the order in which floats are added, and a run may be
resumed on another number of ranks. Rank 0 alone writes a run; pictures and parts of a table are written by the rank that made
them. --out, --data and runs/cache must lie on a file system that all machines share.
"""

import contextlib
import datetime
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PATIENT = {"group": None}  # the ranks once more, with days to wait for each other


def rank():
    """This copy's number, 0 ... world() - 1; torchrun tells it."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many copies there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rows(batch, accumulate=1):
    """This rank's rows of a batch, as a slice. Raises SystemExit when ranks (times --accumulate) do not divide it."""
    if batch % (world() * accumulate):
        raise SystemExit(
            f"--batch {batch} is the whole batch: it must be a multiple of {world()} processes times --accumulate {accumulate}."
        )
    mine = batch // world()
    return slice(rank() * mine, (rank() + 1) * mine)


def wrap(model, device):
    """The model whose backward also averages the gradients of all ranks, while it runs (DistributedDataParallel)."""
    if world() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def averaging(model, now):
    """Around forward and backward: with gradient accumulation only the last part of a batch needs to average (now=True)."""
    return model.no_sync() if world() > 1 and not now else contextlib.nullcontext()


def average_gradients(module):
    """The same for a small network that has no wrapper: after its backward, before its step."""
    if world() > 1:
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()


def total(tensor):
    """The sum over all ranks of a tensor that each of them has; itself without torchrun."""
    if world() > 1:
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def first_alone():
    """All ranks run what is inside, rank 0 before the others: what it computed and saved, they find."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def agree(step):
    """`step`, which all ranks must have found. Raises SystemExit when one sees another folder than the rest."""
    if total(torch.tensor(step)).item() != step * world():
        raise SystemExit(
            f"rank {rank()} would start at step {step}, others elsewhere: --out must be one folder that all machines see."
        )
    return step


def wait(patient=True):
    """All ranks meet here; patient ones wait for days, since one of them may have data to encode, the others for half an hour."""
    if world() > 1:
        dist.barrier(PATIENT["group"]) if patient else total(torch.zeros(1))


def launch(main):
    """Run a stage's main(), as one of torchrun's ranks if there are several; the one `if __name__ == "__main__"` line.

    When a rank ends early, the others end too, with one sentence: they would wait for it for ever. Memory that does not suffice
    is one sentence as well.
    """
    try:
        return main() if world() == 1 else run_as_rank(main)
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            "out of memory on the GPU: lower --batch; or keep it, and give --accumulate 2 (or more) and --checkpointing where the "
            "script has them. What was saved before is intact; --resume goes on."
        ) from error


def run_as_rank(main):
    """main() among other ranks."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Within a step nobody waits long: rank 0 alone validates and draws now and then. A rank that hangs ends the run after this.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=30))
    PATIENT["group"] = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    lost = (
        f"rank {rank()}: another process of this run has ended (its own message stands above or on its machine). "
        "Start all of them again with --resume, on any number of GPUs: what was saved is intact."
    )

    # torchrun ends the others by SIGTERM. Python would call a signal handler only when this thread is back in Python, and inside
    # a collective operation it waits for the lost one for ever; so a second thread listens, on a pipe into which the signal writes.
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def listen():
        while os.read(heard, 1) != bytes([signal.SIGTERM]):
            pass  # another signal, such as Ctrl-C
        os.write(2, (lost + "\n").encode())
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        main()
    except SystemExit as error:
        if rank() > 0 and isinstance(error.code, str):
            time.sleep(3)  # if rank 0 has the same to say, it has said it, and torchrun has ended this one
        raise
    except RuntimeError as error:  # of torch.distributed, in several words
        if any(words in str(error) for words in ("onnection", "NCCL", "peer", "Socket", "Timed out")):
            print(f"{error}\n{lost}", file=sys.stderr, flush=True)
            os._exit(1)  # destroying the group would wait for the lost one
        raise
    dist.destroy_process_group()
