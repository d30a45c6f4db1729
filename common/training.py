"""What the stages' loops share: small functions with plain arguments. The loops themselves stand in the stages' files.

What is logged stays on the device as sums, and is read once a row: a number that is read makes the CPU wait for the GPU.
"""

import collections
import concurrent.futures
import csv
import math
from pathlib import Path

import torch
from PIL import Image

from common import parallel
from common.checkpoint import read_config, save_atomically
from common.figures import stack

AHEAD = 3  # batches that are made while the GPU works on one, each by a thread
BINS = 5  # of t: a loss is logged for each fifth of (0, 1), since the average alone goes flat early and says little
ROWS = 24  # of samples/progress.png: the first, the last, and others evenly between


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
