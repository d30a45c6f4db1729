"""A run: what training remembers. The stage owns the loop, calls the networks and writes the losses; a Run keeps the rest.

    run = Run(args, "fm")                                  # device, seed, folder, ranks
    model, ema, encoders = run.student(args.init)
    run.keep(optimizers, settings, model=model, ema=ema)   # what --resume restores, bit for bit
    for step, batch in run.steps(make):                    # progress bar, learning rate, where a resume begins
        for part in run.parts(batch):                      # --accumulate; on the device
            ...
            run.backward(loss)
            run.log(t=part.t, loss=losses)                 # means since the last row of log.csv, over ranks, by fifths of t
        run.step(optimizers, model)                        # average over ranks, clip, step
        if run.due():
            run.save(ema, ...)                             # validation, samples, curves, weights, and the state last

What is logged stays on the device as sums, and is read once a row: a number that is read makes the CPU wait for the GPU.
"""

import collections
import concurrent.futures
import copy
import csv
import math
import os
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from common import parallel
from common.checkpoint import (
    check_encoders,
    latest,
    load_state,
    load_student,
    read_config,
    save_atomically,
    save_network,
    save_state,
    state_settings,
)
from common.device import describe_machine, half, move, multiply_in_bfloat16, pick_device, student_dtype, take
from common.encoders import FrozenEncoders
from common.figures import stack
from model import PRESETS, UNet, ladder, zero_branches

AHEAD = 3  # batches that are made while the GPU works on one, each by a thread
ROWS = 24  # of samples/progress.png: the first, the last, and others evenly between
BINS = 5  # of t: a loss is logged for each fifth of (0, 1), since the average alone goes flat early and says little
# flags that may change on a resume:
FREE = {"out", "resume", "device", "compile", "save_every", "accumulate", "checkpointing", "watch", "workers"}
PATHS = {"data", "gemma", "turbo"}  # may be written otherwise on a resume (DIR/, ./DIR): what they hold is hashed


class Run:
    """One training run.

    Args:
        args: the stage's flags, with those of arguments.add_training and add_run.
        stage: "fm", "distill", "step_distill" or "decoder".
        warmup: steps until the learning rates are at their peak.
        every: steps between two rows of log.csv.

    Raises:
        SystemExit: with one sentence, when the folder holds a run already, or the device is not there.
    """

    def __init__(self, args, stage, warmup=200, every=50):
        self.args, self.stage, self.warmup, self.every = args, stage, warmup, every
        self.out, self.device, self.main = Path(args.out), pick_device(args.device), parallel.rank() == 0
        if (self.out / "train_state").is_dir() and not args.resume:
            raise SystemExit(f"{self.out} holds a run already: go on with --resume, choose another --out, or delete it.")
        torch.manual_seed(args.seed)
        self.half, self.parts_of_a_batch = half(self.device), getattr(args, "accumulate", 1)
        self.rows = parallel.rows(args.batch, self.parts_of_a_batch)  # this rank's, of each batch
        self.sums, self.wrapped, self.averaged, self.bad_steps = {}, None, set(), 0
        self.config = {"stage": stage, "size": args.size, "machine": describe_machine(self.device)}

    # ---- networks

    def before(self, stage):
        """The student to start from: --init, else that which a resumed run began with, else the latest of `stage`."""
        if not self.args.init:
            began = state_settings(self.out).get("init") if self.args.resume else None
            self.args.init = began or latest(stage)
        return self.args.init

    def student(self, init=None):
        """(UNet of --size, its EMA, the frozen encoders of --teacher): random weights, or those of the student folder `init`.

        Raises SystemExit when `init` is of another size, or lives in another latent space than the encoders'.
        """
        args, cfg, trained = self.args, PRESETS[self.args.size], {}
        if getattr(args, "ladder", None):
            cfg = ladder(args.ladder, cfg)
        model = zero_branches(UNet(cfg))
        if init:
            start, trained = load_student(init)
            if start.cfg != cfg:
                raise SystemExit(f"{init} is not of --size {args.size}: give the size it was trained with. (A student of another "
                                 "--ladder step than f goes no further than stage 1.)")  # fmt: skip
            model.load_state_dict(start.state_dict())
        gemma = getattr(args, "gemma", None) or trained.get("gemma")
        encoders = FrozenEncoders(args.teacher, self.device, torch.float32 if args.size == "tiny" else self.half, gemma)
        if trained:
            check_encoders(trained, encoders)
        if encoders.latent_channels != model.cfg.latent_channels:
            raise SystemExit(f"the autoencoder of {args.teacher} has {encoders.latent_channels} latent channels, the UNet "
                             f"{model.cfg.latent_channels}: give --teacher an SD3 folder.")  # fmt: skip
        model.to(self.device, memory_format=torch.channels_last)  # depthwise convolutions like it
        multiply_in_bfloat16(model, self.device)  # and so does its average
        self.config["machine"]["products"] = str(student_dtype(self.device)).removeprefix("torch.")
        model.checkpointing = args.checkpointing
        self.config |= {"encoders": args.teacher, "gemma": gemma, "scaling_factor": encoders.scaling_factor,
                        "shift_factor": encoders.shift_factor}  # fmt: skip
        return model, copy.deepcopy(model).requires_grad_(False).eval(), encoders

    def wrap(self, model):
        """The model as the loop calls it: compiled with --compile; on several ranks its backward averages gradients."""
        self.averaged.add(model)
        self.wrapped = parallel.wrap(torch.compile(model) if getattr(self.args, "compile", False) else model, self.device)
        return self.wrapped

    def keep(self, optimizers, settings, **networks):
        """What the state holds. With --resume it is restored here; `settings` and the flags must then be those of before."""
        flags = {name: value for name, value in vars(self.args).items() if name not in FREE}
        self.optimizers, self.networks = optimizers, networks
        if flags.get("init"):
            flags["init"] = os.path.relpath(flags["init"])
        self.config["settings"] = {**flags, **settings}
        self.settings = {name: value for name, value in self.config["settings"].items() if name in settings or name not in PATHS}
        for group in self.groups():
            group["peak"] = group["lr"]
        flag_of = {"teacher": "teacher", "vae": "vae", "turbo_weights": "turbo", "pictures": "data"}  # hashes of folders
        folders = {name: (flag, getattr(self.args, flag, None)) for name, flag in flag_of.items()}
        self.start = load_state(self.out, self.settings, optimizers, folders, **networks) if self.args.resume else 0
        self.table = Log(self.out / "log.csv", self.start)
        before = read_config(self.out) if self.start else {}
        began, products = (config.get("machine", {}).get("products") for config in (before, self.config))
        if self.main and began and began != products:
            print(f"{self.out} multiplied in {began} until step {self.start}; here it goes on in {products}: alike, but not bit "
                  "for bit as without a stop.")  # fmt: skip
        if self.main:
            millions = sum(p.numel() for p in networks["model"].parameters()) / 1e6
            print(f"{self.stage}, --size {self.args.size}: {millions:.2f} M parameters, {self.config['machine']}, seed "
                  f"{self.args.seed}, steps {self.start} to {self.args.steps}")  # fmt: skip

    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    # ---- the loop

    def steps(self, make=None):
        """(step, make(step)) for every step that is left. On a GPU threads make the next batches while one is worked on."""
        numbers = range(self.start, self.args.steps)
        self.bar = tqdm(total=self.args.steps, initial=self.start, desc=self.stage, mininterval=1,
                        disable=None if self.main else True)  # fmt: skip
        self.clock, self.last_row = time.perf_counter(), self.start
        for step, batch in zip(numbers, ahead(make or (lambda step: None), numbers, self.device), strict=True):
            self.now = step
            for group in self.groups():
                group["lr"] = group["peak"] * learning_rate(step, self.args.steps, self.warmup)
            yield step, batch
            self.bar.update()
            if (step + 1) % self.every == 0 and self.last_row <= step:
                self.row()
        self.bar.close()
        parallel.wait(patient=False)
        if self.main:
            files = sorted(p.name for p in self.out.iterdir() if not p.name.startswith("."))
            print(f"{self.out}: {', '.join(files)}")

    def parts(self, batch):
        """The batch (a NamedTuple of tensors) in --accumulate parts, one after the other on the device."""
        n = self.parts_of_a_batch
        for k in range(n):
            size = len(batch[0]) // n
            with parallel.averaging(self.wrapped, now=k == n - 1):
                yield move(take(batch, slice(k * size, (k + 1) * size)), self.device)

    def backward(self, loss):
        """loss.backward(), as a part of its batch."""
        (loss / self.parts_of_a_batch).backward()

    def step(self, optimizers, *networks, clip=1.0, name="grad_norm"):
        """One step of the optimizers: gradients of the networks averaged over ranks, clipped to length `clip`, logged as `name`.

        A rare overflow must not end the run: a gradient that is NaN or infinite is replaced by zero, and `skipped` is the share of
        such steps. When they are most of the steps since the last row of log.csv, the run ends.
        """
        for network in networks:
            if network not in self.averaged:
                parallel.average_gradients(network)
        weights = [p for network in networks for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(weights, clip)
        bad = ~torch.isfinite(norm)  # stays on the device: no if
        for weight in weights:
            weight.grad.masked_fill_(bad, 0.0)
        self.log(**{name: norm, name.replace("grad_norm", "skipped"): bad})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def log(self, t=None, weights=None, **values):
        """Add to the means of the next row: numbers, tensors of any shape, and with t (B,) tensors (B,) by fifth of t as well.
        With weights (B,), weighted means. NaN and infinite values are left out."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().to(self.device, torch.float32).flatten()
            sums = self.sums.setdefault(name, torch.zeros(BINS + 1, 2, device=self.device))  # the last row: all t
            weight = torch.isfinite(value) * (1.0 if weights is None else weights)
            of_value = torch.stack([weight * value.nan_to_num(0.0, 0.0, 0.0), weight], dim=1)
            sums[-1] += of_value.sum(0)
            if t is not None and len(value) == len(t):
                sums[:-1].index_add_(0, (t.to(self.device) * BINS).long().clamp(max=BINS - 1), of_value)

    def row(self, measure=None):
        """A row of log.csv: the means since the last one, and what measure() finds. Ends the run when most steps were skipped."""
        names = list(self.sums)
        sums = parallel.total(torch.stack([self.sums[name] for name in names])).cpu()  # (names, BINS + 1, 2): read once
        covered, seen = self.now + 1 - self.last_row, (self.now + 1) * self.args.batch
        rate = covered * self.args.batch / (time.perf_counter() - self.clock)  # of training, without what measure() and save() take
        self.sums, self.last_row = {}, self.now + 1
        means = sums[..., 0] / sums[..., 1]  # nan for a fifth of t that no picture fell into
        row = dict(zip(names, means[:, -1].tolist(), strict=True))
        most = max(row[name] for name in names if name.startswith("skipped")) > 0.5
        self.bad_steps = self.bad_steps + covered if most else 0
        if self.bad_steps > 1:  # a row may cover a single step
            self.stop_on_nan()
        for name, by_t, n in zip(names, means[:, :-1].tolist(), sums[:, :-1, 1].sum(1), strict=True):
            row |= {f"{name}_t{i / BINS:.1f}": value for i, value in enumerate(by_t)} if n else {}
        if not self.main:
            return
        measured = measure() if measure else {}
        if not all(math.isfinite(value) for value in measured.values()):
            self.stop_on_nan()
        lr = self.groups()[0]["lr"]
        self.table.add(step=self.now + 1, pictures=seen, **row, **measured, lr=lr, pictures_per_second=rate)
        shown = {name: f"{value:.3f}" for name, value in (row | measured).items() if "_t0" not in name}
        self.bar.set_postfix({name: shown[name] for name in list(shown)[:3]}, refresh=False)
        if measure and self.bar.disable:  # no terminal: a line for the log file
            print(f"step {self.now + 1} of {self.args.steps}: {shown}, {rate:.1f} pictures/s", flush=True)
        self.clock = time.perf_counter()

    def stop_on_nan(self):
        """End the run in one sentence; what was saved before stays as it is."""
        saved = (self.out / "model.safetensors").is_file()
        rates = " or ".join(f"{flag} {getattr(self.args, name)}" for flag, name in (("--lr", "lr"), ("--heads-lr", "heads_lr"))
                            if hasattr(self.args, name))  # fmt: skip
        advice = f"Go on from the last good weights with --init {self.out} and another --out." if saved else ""
        raise SystemExit(f"the loss or its gradient became NaN or infinite by step {self.now}: most often a learning rate "
                         f"is too high ({rates}); lower it. {advice}".rstrip())  # fmt: skip

    def due(self):
        """Whether this step ends with a save: every --save-every steps, and after the last."""
        return (self.now + 1) % self.args.save_every == 0 or self.now + 1 == self.args.steps

    def save(self, ema, measure=None, samples=None, plot=None, kind="unet"):
        """Validate, draw, save. The state comes last: whatever a kill leaves undone before it is done again by --resume.

        Args:
            ema: the network that goes into model.safetensors.
            measure: called for {column: value} of this row, such as the validation loss.
            samples: called for a list of pictures (PIL), the same prompts and noise every time: a row of samples/progress.png,
                which shows at most ROWS of them.
            plot: called as plot(table, folder); draws the curves of log.csv.
        """
        self.row(measure)
        if self.main:
            self.write(ema, samples, plot, kind)
        parallel.wait(patient=False)
        self.clock = time.perf_counter()

    def write(self, ema, samples, plot, kind):
        """Rank 0's part of save(), while the others wait."""
        if samples:
            folder = self.out / "samples"
            save_atomically(stack([samples()]).save, folder / f"{self.now + 1:07d}.png")
            saved = [p for p in sorted(folder.glob("[0-9]*.png")) if int(p.stem) <= self.now + 1]
            shown = [saved[i] for i in torch.linspace(0, len(saved) - 1, min(ROWS, len(saved))).round().int().tolist()]
            save_atomically(stack([[Image.open(p).convert("RGB")] for p in shown]).save, folder / "progress.png")
        if plot:
            plot(self.table, self.out)
        done = {"step": self.now + 1, "pictures_seen": (self.now + 1) * self.args.batch}
        save_network(self.out, ema, {**self.config, **done}, kind=kind)
        save_state(self.out, self.now + 1, self.settings, self.optimizers, **self.networks)


def learning_rate(step, steps, warmup=200):
    """The share of the peak, 0 to 1: linear warm-up, a plateau, and a linear decay to zero over the last 40 % of the run."""
    return min(1, (step + 1) / warmup) * min(1, (steps - step) / (0.4 * steps))


@torch.no_grad()
def update_ema(ema, model, step, longest=0.999):
    """ema <- d ema + (1 - d) model, with a short memory at first, when the weights still run."""
    decay = min(longest, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


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
