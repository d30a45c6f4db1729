"""What the stages' loops share: small functions with plain arguments. The loops themselves stand in the stages' files.

What is logged stays on the device as sums, and is read once a row: a number that is read makes the CPU wait for the GPU.
"""

import collections
import concurrent.futures
import csv
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

import flow
from common import parallel
from common.checkpoint import read_config, save_atomically
from common.device import autocast, move, take
from common.figures import stack
from common.muon import Muon
from common.seeds import noise_rows, rng

CAPTION_DROPOUT = 0.1  # [A]
AHEAD = 3  # batches that are made while the GPU works on one, each by a thread
BINS = 5  # of t: a loss is logged for each fifth of (0, 1), since the average alone goes flat early and says little
ROWS = 24  # of samples/progress.png: the first, the last, and others evenly between


class Batch(NamedTuple):
    """What one step of stages 1 and 2 sees; B pictures."""

    x_t: torch.Tensor  # (B, 16, h, w) noisy latents
    t: torch.Tensor  # (B,) in (0, 1)
    v: torch.Tensor  # (B, 16, h, w) the target eps - x_0
    ids: torch.Tensor  # (B,) which captions, 0 the empty one; (B, 3) with three text encoders: see Latents.text
    states: torch.Tensor  # (B, T, text_dim) float16, the captions' tokens
    mask: torch.Tensor  # (B, T) True for real tokens


def noisy_batch(data, seed, step, batch, shift, caption_dropout=CAPTION_DROPOUT, rows=slice(None)):
    """The Batch of a training step, from (seed, step) alone; with `rows`, those of one GPU: N GPUs see what one would have seen."""
    g = rng(seed, step)
    dropped = torch.rand(batch, generator=g) < caption_dropout
    t = flow.logit_normal_timesteps(batch, shift, generator=g)[rows]
    eps = noise_rows(data.shape, batch, seed, step, 0, rows=rows)
    x_0, ids = data.batch(seed, step, batch, rows)
    ids = torch.where(dropped[rows], 0, ids)  # caption 0 is the empty one
    if data.several_encoders:  # each encoder is also dropped independently [S]; ids becomes (B, 3)
        ids = ids[:, None] * (torch.rand((batch, 3), generator=g) >= caption_dropout)[rows]
    return Batch(flow.interpolate(x_0, eps, t), t, flow.velocity(x_0, eps), ids, *data.text(ids))


def predict(net, batch, feature=None):
    """v_theta(x_t, t, c), (B, 16, h, w) float32; with the name of a layer as `feature`, (v, that layer's output)."""
    with autocast(batch.x_t.device):
        out = net(batch.x_t, batch.t, batch.states.float(), batch.mask, feature)
    return tuple(x.float() for x in out) if feature else out.float()


@torch.no_grad()
def validate(model, val, shift, device):
    """L_task of a UNet on fixed pictures, noise and times."""
    losses, size = [], min(64, len(val))
    at_once = max(1, 64 * 32**2 // math.prod(val.shape[1:]))  # pictures: of large latents only some fit
    for i in range(min(4, math.ceil(len(val) / 64))):
        batch = noisy_batch(val, 1, i, size, shift, caption_dropout=0.0)
        for rows in torch.arange(size).split(at_once):
            part = move(take(batch, rows), device)
            losses.append((predict(model, part) - part.v).square().mean((1, 2, 3)))
    return torch.cat(losses).mean().item()


# ------------------------------------------------------------------------------------------------------------
# Optimizers


def learning_rate(step, steps, warmup=200):
    """The share of the peak, 0 to 1: linear warm-up, a plateau, and a linear decay to zero over the last 40 % of the run."""
    return min(1, (step + 1) / warmup) * min(1, (steps - step) / (0.4 * steps))


@torch.no_grad()
def update_ema(ema, model, step, longest=0.999):
    """ema <- d ema + (1 - d) model, with a short memory at first, when the weights still run."""
    decay = min(longest, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def clip_gradients(parameters, length=1.0):
    """Shorten the gradient of all parameters together to `length`. Returns its norm, and whether it was NaN or infinite (a 0-d
    tensor on the device): such a gradient is replaced by zeros, since a rare overflow must not end a run."""
    weights = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(weights, length)
    bad = ~torch.isfinite(norm)  # stays on the device: no if
    for weight in weights:
        weight.grad.masked_fill_(bad, 0.0)
    return norm, bad


def make_optimizers(model, lr, kind):
    """AdamW for all weights; or, with kind "muon", Muon for the matrices of the transformer blocks and AdamW for the rest.

    Muon makes the step of a matrix orthogonal, so that no direction starves; AdamW scales each number by itself. At class
    scale it learns faster [A].
    """
    named = model.named_parameters()
    in_block = re.compile(r"(^|\.|transformer_)blocks\.")  # diffusers' name, too
    matrices = [w for name, w in named if w.dim() == 2 and in_block.search(name)] if kind == "muon" else []
    chosen = {id(w) for w in matrices}
    others = [w for w in model.parameters() if id(w) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, weight_decay=0.01))
    return optimizers


def timestep_shift(size, resolution):
    """s of the resolution shift [A]: 3 at class scale, where the layout is decided near t = 1; by the side in pixels otherwise."""
    return 3.0 if size == "tiny" else flow.resolution_shift(resolution)


def sampling_settings(size, resolution):
    """How config.json says that the student is to be drawn. At class scale 2 was best of 2, 3 and 5, early on [A]."""
    return {"steps": 28, "guidance": 2.0 if size == "tiny" else 3.0, "shift": timestep_shift(size, resolution)}


def ahead(make, numbers, device):
    """make(number) for each number, in order; for a GPU threads make the next ones, in memory that it can copy from by itself."""
    if device.type != "cuda":
        yield from map(make, numbers)
        return

    def pinned(number):
        batch = make(number)
        return batch and type(batch)(*(x if x.dtype == torch.int64 else x.pin_memory() for x in batch))

    with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        waiting = collections.deque()
        for number in numbers:
            waiting.append(pool.submit(pinned, number))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def stop_on_nan(out, step, rates):
    """End a run in one sentence; what was saved before stays as it is. rates: such as "--lr 0.005"."""
    saved = (Path(out) / "model.safetensors").is_file()
    advice = f"Go on from the last good weights with --init {out} and another --out." if saved else ""
    raise SystemExit(f"the loss or its gradient became NaN or infinite by step {step}: most often a learning rate "
                     f"is too high ({rates}); lower it. {advice}".rstrip())  # fmt: skip


def save_samples(folder, step, pictures):
    """samples/STEP.png, a row of pictures (PIL), and progress.png, at most ROWS of all such rows one above the other."""
    folder = Path(folder) / "samples"
    save_atomically(stack([pictures]).save, folder / f"{step:07d}.png")
    saved = [p for p in sorted(folder.glob("[0-9]*.png")) if int(p.stem) <= step]
    shown = [saved[i] for i in torch.linspace(0, len(saved) - 1, min(ROWS, len(saved))).round().int().tolist()]
    save_atomically(stack([[Image.open(p).convert("RGB")] for p in shown]).save, folder / "progress.png")


class Means:
    """Means of what is logged since the last row, over all ranks; of losses by fifths of t as well."""

    def __init__(self, device):
        self.device, self.sums = device, {}

    def add(self, t=None, weights=None, **values):
        """Numbers, tensors of any shape, and with t (B,) tensors (B,) by fifth of t as well. With weights (B,), weighted means.
        NaN and infinite values are left out."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().to(self.device, torch.float32).flatten()
            sums = self.sums.setdefault(name, torch.zeros(BINS + 1, 2, device=self.device))  # the last row: all t
            weight = torch.isfinite(value) * (1.0 if weights is None else weights)
            of_value = torch.stack([weight * value.nan_to_num(0.0, 0.0, 0.0), weight], dim=1)
            sums[-1] += of_value.sum(0)
            if t is not None and len(value) == len(t):
                sums[:-1].index_add_(0, (t.to(self.device) * BINS).long().clamp(max=BINS - 1), of_value)

    def take(self):
        """({name: mean}, {name_t0.2: mean of that fifth}) since the last call; nan for a fifth that no picture fell into."""
        names = list(self.sums)
        sums = parallel.total(torch.stack([self.sums[name] for name in names])).cpu()  # (names, BINS + 1, 2): read once
        self.sums, means, by_t = {}, sums[..., 0] / sums[..., 1], {}
        for name, fifths, n in zip(names, means[:, :-1].tolist(), sums[:, :-1, 1].sum(1), strict=True):
            by_t |= {f"{name}_t{i / BINS:.1f}": value for i, value in enumerate(fifths)} if n else {}
        return dict(zip(names, means[:, -1].tolist(), strict=True)), by_t


class Log:
    """log.csv: one row per call. On resume, rows after the saved step are dropped, so that no step appears twice.

    A column that a later row brings is nan in the rows before, and a column that a row lacks is nan there.
    """

    def __init__(self, path, resume_step=0):
        self.path, self.rows, self.header = Path(path), [], []
        if resume_step and self.path.is_file():
            with open(self.path, newline="") as file:
                whole = (row for row in csv.DictReader(file) if None not in row.values())
                self.rows = [row for row in whole if int(row["step"]) <= resume_step]

    def add(self, **row):
        self.rows.append({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        if self.header and row.keys() <= set(self.header):  # the file holds all but this one
            try:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.header, restval="nan").writerow(self.rows[-1])
            except OSError as error:
                raise SystemExit(f"cannot write {self.path}: {error.strerror}. What was saved before is intact.") from error
            return
        self.header = list(dict.fromkeys(name for row in self.rows for name in row))

        def write(path):
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, self.header, restval="nan")
                writer.writeheader()
                writer.writerows(self.rows)

        save_atomically(write, self.path)

    def column(self, name):
        return [float(row.get(name, "nan")) for row in self.rows]


def say_row(bar, step, steps, values, lr, rate, seconds):
    """A row of the log for people: on the progress bar; without a terminal as a line, such as

    step  500 of 2500   20 %   loss 0.412   val_loss 0.420   lr 5.0e-03   281 pictures/s   228 ms/step   7.6 minutes left
    """
    shown = {name: f"{value:.3f}" for name, value in values.items() if not math.isnan(value)}
    bar.set_postfix(dict(list(shown.items())[:3]), refresh=False)
    if bar.disable:
        numbers = "   ".join(f"{name} {value}" for name, value in shown.items())
        print(f"step {step:{len(str(steps))}} of {steps}  {100 * step // steps:3} %   {numbers}   lr {lr:.1e}   "
              f"{rate:.0f} pictures/s   {1000 * seconds:.0f} ms/step   {(steps - step) * seconds / 60:.1f} minutes left",
              flush=True)  # fmt: skip


def say_start(out, config, start, steps, model):
    """What is trained, where and from which step to which; and whether a resume multiplies otherwise than before."""
    if parallel.rank() > 0:
        return
    began, products = (c.get("machine", {}).get("products") for c in (read_config(out) if start else {}, config))
    if began and began != products:
        print(f"{out} multiplied in {began} until step {start}; here it goes on in {products}: alike, but not bit for bit as "
              "without a stop.")  # fmt: skip
    machine = config["machine"]
    print(f"{config['stage']}, --size {config['size']}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, seed "
          f"{config['settings']['seed']}, steps {start} to {steps}, on {machine['device']} ({machine['processor']}), torch "
          f"{machine['torch']}, products in {products}, commit {machine['commit']}")  # fmt: skip


def say_end(out):
    """Which files a run has left. All ranks meet here."""
    parallel.wait(patient=False)
    if parallel.rank() == 0:
        print(f"{out}: {', '.join(sorted(p.name for p in Path(out).iterdir() if not p.name.startswith('.')))}")
