"""What the studies of stages 2 and 3 share: trained students side by side, and rows of trainings that differ in a switch."""

import argparse
import hashlib
import json
from pathlib import Path

import torch

from common.checkpoint import check_encoders, load_student, save_json
from common.device import describe_machine, half, pick_device
from common.encoders import FrozenEncoders
from common.latents import in_memory
from common.seeds import rng
from evaluate import prompts_of, score
from sample import decode, draw_pictures
from step_distill import solve
from teacher import Teacher


def load_students(folders, args):
    """([(model, config)], encoders) of student folders that were trained with the encoders of --teacher."""
    device = pick_device(args.device)
    students = [load_student(folder, device) for folder in folders]
    encoders = FrozenEncoders.of(students[0][1], device, args.teacher)
    for _, config in students:
        check_encoders(config, encoders)
    return students, encoders


def encode_prompts(prompts, encoders):
    """Captions without pictures, as Latents: what a Teacher needs to know of them."""
    captions = ["", *dict.fromkeys(prompts)]
    return in_memory(torch.zeros(0), torch.zeros(0), captions, *encoders.encode_captions(captions))


def draw_with_teacher(args, encoders, prompts, noise, shift):
    """What the teacher draws in 28 guided steps from the noise (B, C, H, W): B pictures."""
    text = encode_prompts(prompts, encoders)
    teacher = Teacher(args.teacher, text, noise.device, half(noise.device))
    ids = torch.tensor([text.captions.index(prompt) for prompt in prompts])
    latents = solve(teacher, noise, torch.ones(len(ids)), ids, 3.0, shift, 28)
    return decode(encoders, latents)


def noise_for(prompts, seed, config, encoders):
    """Noise (B, C, H, W) from the seeds seed, seed + 1, ...: sample.py begins with the same."""
    shape = (encoders.latent_channels, *config["latent_size"])
    return torch.stack([torch.randn(shape, generator=rng(seed + i)) for i in range(len(prompts))]).to(encoders.device)


def train_rows(args, rows, train, study, folder=None):
    """Train every row ({name: flags}) with seeds --seed, --seed + 1, ... and yield (name, folder) as each is done. What is finished
    is kept: call again to go on. `study`: names of flags that are the study's own, and no part of a training. Runs lie in `folder`,
    or --out."""
    flags = {name: value for name, value in vars(args).items() if name not in study}
    for seed in range(args.seed, args.seed + args.seeds):
        for name, changes in rows.items():
            out = (folder or args.out) / "-".join([*map(str, changes.values()), f"seed{seed}"])
            print(f"-- {name}, seed {seed}")
            train(argparse.Namespace(**{**flags, **changes, "seed": seed, "resume": True, "out": out}))
            yield name, out


def same_start(args):
    """Raises SystemExit when the runs in --out began from other weights than --init holds now: one table, one student."""
    path, weights = args.out / "init.json", Path(args.init) / "model.safetensors"
    if not weights.is_file():
        return  # who loads it will say so
    now = {"init": str(args.init), "weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}
    if not path.is_file() and any(args.out.glob("*seed*")):
        raise SystemExit(f"the runs in {args.out} are not told what they began from: give another --out, or delete it.")
    if not path.is_file():
        save_json(now, path)
    elif (began := json.loads(path.read_text(encoding="utf-8-sig")))["weights"] != now["weights"]:
        raise SystemExit(f"the runs in {args.out} began from other weights (of {began['init']}) than --init {args.init} has: give "
                         "another --out, or delete it.")  # fmt: skip


def score_once(folder, path, measure, encoders):
    """measure(model, config, encoders) of a student folder, kept in the JSON file `path`."""
    if not path.is_file():
        save_json(measure(*load_student(folder, encoders.device), encoders), path)
    return json.loads(path.read_text(encoding="utf-8-sig"))


def mini_geneval(folder, encoders, per_family):
    """evaluate.score() of a student folder, drawn as its config says, seed 0; kept beside it."""
    prompts = prompts_of("val", per_family, 0)

    def measure(model, config, encoders):
        return score(draw_pictures(model, config, encoders, prompts, range(len(prompts))), prompts)

    return score_once(folder, folder / f"mini-geneval-{per_family}.json", measure, encoders)


def describe_rows(args):
    return (f"{args.steps} steps of {args.batch} from {args.init}, seeds {args.seed} to {args.seed + args.seeds - 1}, "
            f"{args.per_family} prompts a family, {describe_machine(pick_device(args.device))}")  # fmt: skip
