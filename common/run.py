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

import copy
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import parallel
from common.arguments import all_of, settings_of
from common.checkpoint import (
    check_encoders,
    latest,
    load_state,
    load_student,
    save_network,
    save_state,
    state_settings,
)
from common.device import describe_machine, half, move, multiply_in_bfloat16, pick_device, student_dtype, take
from common.encoders import FrozenEncoders
from common.training import (
    Log,
    Means,
    ahead,
    clip_gradients,
    learning_rate,
    save_samples,
    say_end,
    say_row,
    say_start,
    stop_on_nan,
)
from model import PRESETS, UNet, ladder, zero_branches


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
        self.means, self.wrapped, self.averaged, self.bad_steps = Means(self.device), None, set(), 0
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
        self.optimizers, self.networks = optimizers, networks
        self.config["settings"], self.settings = all_of(self.args) | settings, settings_of(self.args) | settings
        for group in self.groups():
            group["peak"] = group["lr"]
        self.start = load_state(self.out, self.settings, optimizers, **networks) if self.args.resume else 0
        self.table = Log(self.out / "log.csv", self.start)
        say_start(self.out, self.config, self.start, self.args.steps, networks["model"])

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
        say_end(self.out)

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
        norm, bad = clip_gradients([p for network in networks for p in network.parameters()], clip)
        self.log(**{name: norm, name.replace("grad_norm", "skipped"): bad})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def log(self, t=None, weights=None, **values):
        """Add to the means of the next row: see Means.add."""
        self.means.add(t, weights, **values)

    def row(self, measure=None):
        """A row of log.csv: the means since the last one, and what measure() finds. Ends the run when most steps were skipped."""
        covered, seen = self.now + 1 - self.last_row, (self.now + 1) * self.args.batch
        rate = covered * self.args.batch / (time.perf_counter() - self.clock)  # of training, without what measure() and save() take
        row, by_t = self.means.take()
        self.last_row = self.now + 1
        most = max(value for name, value in row.items() if name.startswith("skipped")) > 0.5
        self.bad_steps = self.bad_steps + covered if most else 0
        if self.bad_steps > 1:  # a row may cover a single step
            self.stop_on_nan()
        if not self.main:
            return
        measured = measure() if measure else {}
        if not all(math.isfinite(value) for value in measured.values()):
            self.stop_on_nan()
        lr = self.groups()[0]["lr"]
        self.table.add(step=self.now + 1, pictures=seen, **row, **by_t, **measured, lr=lr, pictures_per_second=rate)
        say_row(self.bar, self.now + 1, self.args.steps, row | measured, lr, rate, self.args.batch / rate)
        self.clock = time.perf_counter()

    def stop_on_nan(self):
        """End the run in one sentence; what was saved before stays as it is."""
        rates = " or ".join(f"{flag} {getattr(self.args, name)}" for flag, name in (("--lr", "lr"), ("--heads-lr", "heads_lr"))
                            if hasattr(self.args, name))  # fmt: skip
        stop_on_nan(self.out, self.now, rates)

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
            save_samples(self.out, self.now + 1, samples())
        if plot:
            plot(self.table, self.out)
        done = {"step": self.now + 1, "pictures_seen": (self.now + 1) * self.args.batch}
        save_network(self.out, ema, {**self.config, **done}, kind=kind)
        save_state(self.out, self.now + 1, self.settings, self.optimizers, **self.networks)
