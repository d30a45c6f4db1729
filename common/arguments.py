"""The flags that stages share, declared once, with one help text and one check each.

    p = Parser(__doc__, "python train_fm.py --steps 600 --out runs/mine")   # --help begins with this example
    add_training(p, steps=2500, batch=64, lr=1e-3)
    p.add_argument("--heads-lr", type=real(above=0), default=1e-4, help="the heads' learning rate")

Numbers are checked where they are read: `type=integer(1)` takes 1 and more, `type=real(0, 1)` a share, and neither takes nan.
What is wrong ends in one sentence.
"""

import argparse
import math
import os
import re
import sys
from pathlib import Path

from model import PRESETS

RESOLUTIONS = {"tiny": 64, "imagenet": 256, "t2i": 1024}  # pixels, by --size


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """--help with defaults, where there is one to tell."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's, whose --help begins with an example, and whose errors are one sentence.

    Args: doc, a script's docstring, of which the first paragraph is shown; example, a command.
    """

    def __init__(self, doc, example, **kwargs):
        kwargs.setdefault("prog", re.match(r"python (-m \S+|\S+)", example)[0])  # under -m argparse would say __main__.py
        super().__init__(description=doc.split("\n\n")[0], formatter_class=HelpFormatter, **kwargs)
        self.example = example

    def format_help(self):
        return f"example: {self.example}\n\n{super().format_help()}"

    def parse_known_args(self, args=None, namespace=None):
        for text in sys.argv[1:] if args is None else args:
            try:
                text.encode()
            except UnicodeEncodeError:  # bytes that are no UTF-8 arrive as lone surrogates, which no tokenizer takes
                self.error(f"{ascii(text)} is no UTF-8 text: type or save it as UTF-8, under a UTF-8 locale")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        sentence = re.sub(r"^argument (--\S+): must be", r"\1 must be", message).rstrip(".")
        raise SystemExit(f"{sentence}. See {self.prog} --help.")


def integer(low=None, high=None, multiple=1):
    """A type for add_argument: whole numbers from low to high that are multiples of `multiple`."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text}") from None
        if low is not None and value < low or high is not None and value > high:
            raise argparse.ArgumentTypeError(f"must be {_range(low, high)}, not {text}")
        if value % multiple:
            raise argparse.ArgumentTypeError(f"must be a multiple of {multiple}, not {text}")
        return value

    return read


def real(low=None, high=None, above=None):
    """A type for add_argument: finite numbers from low (or above `above`) to high."""

    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a number, not {text}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"must be above {above}, not {text}")
        if low is not None and value < low or high is not None and value > high:
            raise argparse.ArgumentTypeError(f"must be {_range(low, high)}, not {text}")
        return value

    return read


def _range(low, high):
    return f"at most {high}" if low is None else f"at least {low}" if high is None else f"from {low} to {high}"


# ------------------------------------------------------------------------------------------------------------------
# Groups of flags


def add_model(p, init, teacher):
    """--size --init --teacher. `init` and `teacher` are help texts: what a stage starts from, what it takes from the teacher."""
    p.add_argument("--size", choices=PRESETS, default="tiny", help="the UNet: class scale, or one of the paper's two")
    p.add_argument("--init", metavar="DIR", help=init)
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help=teacher)


def add_data(p):
    """--data --pictures --resolution"""
    p.add_argument("--data", metavar="DIR", help="pictures with captions, or what data.py encode wrote; default: the class world")
    p.add_argument("--pictures", type=integer(1), default=20_000, help="different pictures of the shapes world to train on")
    p.add_argument("--resolution", type=integer(32, multiple=32), help="side in pixels for --data; default: 64 to 1024 by --size")


def add_training(p, steps, batch, lr, seed="seed of weights, noise, timesteps and the data's order", ema=0.999):
    """--steps --batch --accumulate --checkpointing --lr --optimizer --ema --seed; the arguments are the defaults, `lr` two of them:
    for --size tiny, which learns by Muon, and for the paper's sizes."""
    p.add_argument("--steps", type=integer(1), default=steps, help="training steps")
    p.add_argument("--batch", type=integer(1), default=batch, help="pictures a step, of all GPUs together")
    p.add_argument("--accumulate", type=integer(1), default=1, help="parts in which each GPU takes its share, to save memory")
    p.add_argument("--checkpointing", action="store_true", help="compute activations twice, to save memory")
    p.add_argument("--lr", type=real(0), help=f"learning rate after the warm-up; default: {lr[0]:g}; the paper's sizes: {lr[1]:g}")
    p.add_argument("--optimizer", choices=("adamw", "muon"), help="default: muon for --size tiny, adamw for the paper's")
    p.add_argument("--ema", type=real(0, 1), default=ema, help="decay of the averaged weights; 0.9999 for a million steps")
    p.add_argument("--seed", type=integer(0), default=0, help=seed)


def add_run(p, out, save_every, compiled=True):
    """--out --resume --save-every --device [--compile]; `out` and `save_every` are the defaults."""
    p.add_argument("--out", metavar="DIR", type=Path, default=Path(out), help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on from the last saved state in --out, if there is one")
    p.add_argument("--save-every", type=integer(1), default=save_every, metavar="STEPS", help="save, validate and draw this often")
    add_device(p)
    if compiled:
        p.add_argument("--compile", action="store_true", help="torch.compile the networks: minutes to start, then faster")


def add_device(p):
    """--device"""
    p.add_argument("--device", help="cuda, mps or cpu; chosen by itself if not given")


class Interval(argparse.Action):
    """Two numbers, the lower one first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values[0] > values[1]:
            parser.error(f"{option_string} wants the lower number first, not {values[0]:g} {values[1]:g}")
        setattr(namespace, self.dest, values)


def add_sampling(p):
    """--steps --guidance --guidance-interval --shift --decoder: how a model draws, if not as its own config says."""
    p.add_argument("--steps", type=integer(1), help="Euler steps; default: what the student was made for")
    p.add_argument("--guidance", type=real(0), help="classifier-free guidance: 1 none, 0 as without a text; default: the student's")
    p.add_argument("--guidance-interval", type=real(0, 1), nargs=2, metavar=("LOW", "HIGH"), action=Interval,
                   help="guide only while t, 1 = noise, is within it; default: the student's, or always")  # fmt: skip
    p.add_argument("--shift", type=real(above=0), help="timestep shift; default: the student's")
    p.add_argument("--decoder", metavar="DIR", help="tiny decoder, such as assets/zoo/decoder; default: the teacher's own")


# flags that may change on a resume:
FREE = {"out", "resume", "device", "compile", "save_every", "accumulate", "checkpointing", "watch", "workers"}
PATHS = {"data", "gemma", "turbo"}  # may be written otherwise on a resume (DIR/, ./DIR): what they hold is hashed


def all_of(args):
    """The flags that a run is described by, for config.json."""
    flags = {name: value for name, value in vars(args).items() if name not in FREE}
    if flags.get("init"):
        flags["init"] = os.path.relpath(flags["init"])
    return flags


def settings_of(args):
    """The flags that must be the same on a resume."""
    return {name: value for name, value in all_of(args).items() if name not in PATHS}


def by_size(args, **pairs):
    """Fill in what depends on --size and was not given: optimizer, resolution, and what has a pair of defaults, one for class scale
    and one for the paper's sizes, such as lr=(5e-3, 1e-4)."""
    args.optimizer = args.optimizer or ("muon" if args.size == "tiny" else "adamw")
    for name, pair in pairs.items():
        if getattr(args, name) is None:
            setattr(args, name, pair[args.size != "tiny"])
    if args.resolution not in (None, 64) and not args.data:
        raise SystemExit(f"the shapes world has pictures of 64 pixels, not {args.resolution}: give --data a folder.")
    args.resolution = args.resolution or RESOLUTIONS[args.size if args.data else "tiny"]
    return args
