"""Where things run: picked by itself, or named; described, so that numbers can be compared; batches on their way there."""

import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def pick_device(name=None):
    """cuda, else mps, else cpu; or the one that is named. Raises SystemExit when that one is not there."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # ranks cannot talk through an Apple GPU, and would share one
    found = "cuda" if torch.cuda.is_available() else "mps" if alone and torch.backends.mps.is_available() else "cpu"
    if found == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each rank
        found = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name or found)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SystemExit(f"no device {name!r} here; leave --device out to use {found}.") from error
    if device.type == "cpu":
        np.finfo(np.float32), np.finfo(np.float64)  # numpy looks once, and would warn after the next line
        torch.set_flush_denormal(True)  # denormal numbers are a hundred times slower
    # What torch.compile makes is kept for the next run; its own place is /tmp, which a reboot empties.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path("runs/cache/inductor").absolute()))
    return device


def git(*words):
    """What git says in the project's folder; nothing where there is no git."""
    try:
        where = Path(__file__).parent
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=where, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def processor():
    """The CPU's name; on Linux with family and model, since a virtual machine's name often says no more than the maker's."""
    try:
        pairs = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text(encoding="utf-8-sig").split("\n\n")[0].splitlines()]
        facts = {name.strip(): value.strip() for name, value in pairs}
        return f"{facts['model name']}, family {facts['cpu family']}, model {facts['model']}"
    except (OSError, ValueError, KeyError):
        return platform.processor() or platform.machine()


def describe_machine(device):
    """What a reader needs to compare numbers: device, cores, CPU, versions, git commit ("-dirty" when code has changed since)."""
    cpu = f"{device.type}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    commit = git("describe", "--always") or "unknown"
    commit += "-dirty" if git("diff", "--name-only", "HEAD", "--", ":/*.py") else ""  # weights under assets/ are what runs make
    versions = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}
    return {"device": name, "processor": processor(), **versions}


def autocast(device):
    """Inside it a GPU multiplies and convolves in bfloat16, with weights and sums in float32 (SNAPGEN_FLOAT32=1: in float32 too);
    elsewhere nothing changes: for a CPU there is multiply_in_bfloat16()."""
    enabled = device.type == "cuda" and student_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def half(device):
    """The dtype of frozen networks: bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def matmul_dtype(device):
    """The dtype of matrix products, and of frozen transformers, which consist of them: bfloat16 on a GPU, and on a CPU that has it.

    A CPU without those instructions multiplies in bfloat16 too, many times slower than in float32, and does not say so.
    """
    fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else half(device)


def student_dtype(device):
    """The dtype in which a student multiplies while it trains: matmul_dtype; float32 with SNAPGEN_FLOAT32=1 in the environment."""
    return torch.float32 if os.environ.get("SNAPGEN_FLOAT32") == "1" else matmul_dtype(device)


def multiply_in_bfloat16(net, device):
    """The network (changed in place), its linear layers and 1x1 convolutions multiplying in bfloat16 on a CPU that has it.

    For training. Weights and all other layers stay in float32. What a product gives, the gradients of its weights included, is
    rounded to bfloat16 and kept in float32. torch.autocast on a CPU also takes depthwise convolutions and attention, whose
    backward passes are 2 and 8 times slower in bfloat16 than in float32.
    """
    if device.type == "cpu" and student_dtype(device) == torch.bfloat16:
        for layer in net.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Bfloat16Linear
            if type(layer) is nn.Conv2d and (layer.kernel_size, layer.stride, layer.groups) == ((1, 1), (1, 1), 1):
                layer.__class__ = Bfloat16Pointwise
    return net


def multiply(x, weight, bias):
    """F.linear in bfloat16, of and into float32: x (..., C_in), weight (C_out, C_in) -> (..., C_out)."""
    return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()).float()


class Bfloat16Linear(nn.Linear):
    """(..., C_in) -> (..., C_out), float32 on both sides; nn.Linear with its weights under the same names."""

    def forward(self, x):
        return multiply(x, self.weight, self.bias)


class Bfloat16Pointwise(nn.Conv2d):
    """(B, C_in, H, W) -> (B, C_out, H, W), float32 on both sides: a 1x1 convolution is a linear layer over the channels."""

    def forward(self, x):
        return multiply(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


def move(batch, device):
    """A NamedTuple of tensors on the device. Whole numbers stay: they count captions, and those lie in the CPU's memory."""
    # See common.training.ahead; from other memory a copy must not go on beside the program.
    pinned = torch.device(device).type == "cuda"
    return type(batch)(*(x if x.dtype == torch.int64 else x.to(device, non_blocking=pinned) for x in batch))


def take(batch, rows):
    """Some rows (a slice or indices) of a NamedTuple of tensors."""
    return type(batch)(*(x[rows] for x in batch))
