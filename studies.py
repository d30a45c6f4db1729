"""Pictures and tables about trained students of stages 2 and 3: what the README shows, and no stage needs to run.

The stages call it by flags of their own:

    python distill.py --plot-scaling [DIR]           # Fig. 6 in small: who teaches when, and how strongly
    python distill.py --compare DIR [DIR ...]        # teacher | students, from the same noise
    python distill.py --ablate                       # no teacher, one level, two levels; fixed and timestep-aware weights
    python step_distill.py --compare DIR             # teacher | before: 28, 4 | after: 8, 4, 2, 1 steps, and their times
    python step_distill.py --ablate                  # adversarial only, distillation only, both
"""

import copy
import json
import time

import numpy as np
import torch
from tqdm import tqdm

import flow
from common.checkpoint import (
    Log,
    check_encoders,
    describe_machine,
    load_student,
    pick_device,
    save_atomically,
    save_json,
)
from common.encoders import FrozenEncoders
from common.figures import captioned_grid, pyplot, save_figure
from common.pictures import to_pictures
from common.seeds import rng
from data import Latents
from distill import timestep_weight
from evaluate import prompts_of, score
from sample import draw_pictures
from step_distill import few_step_scores, solve
from teacher import Teacher
from train_fm import open_data, predict


@torch.no_grad()
def plot_scaling(args):
    """scaling.png: a_t, and a student's L_task and L_kd over t, raw and as S weighs them (the paper's Fig. 6 in small)."""
    ((model, _),), encoders = load_students([args.plot_scaling], args)
    device = encoders.device
    _, val, _ = open_data(args, encoders)
    teacher = Teacher(args.teacher, val, device)
    times, rows = torch.linspace(0.025, 0.975, 20), []
    for i, t in enumerate(tqdm(times, desc="measuring")):
        g = rng(args.seed, i)
        x0, ids = val.pictures(torch.arange(min(64, len(val))))
        t = t.expand(len(x0))
        eps = torch.randn(x0.shape, generator=g)
        x_t, v = flow.interpolate(x0, eps, t), flow.velocity(x0, eps).to(device)
        predicted = predict(model, model.cfg, val, x_t, t, ids, device)
        task = (predicted - v).square().mean((1, 2, 3))
        out = (predicted - teacher(x_t, t, ids)[0]).square().mean((1, 2, 3))
        ratio, a = task / out, timestep_weight(t[:1]).item()
        rows.append([task.mean().item(), out.mean().item(), a * task.mean().item(), (1 - a) * (ratio * out).mean().item(),
                     (1 - a) * ratio.mean().item()])  # fmt: skip
    task, out, scaled_task, scaled_out, pull = zip(*rows, strict=True)
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8))
    fine = torch.linspace(0, 1, 201)
    axes[0].plot(fine, timestep_weight(fine), label="a_t: the data's part")
    axes[0].plot(fine, 1 - timestep_weight(fine), label="1 - a_t: the teacher's part")
    axes[0].set(title="who teaches when")
    axes[1].plot(times, task, label="L_task"), axes[1].plot(times, out, label="L_kd")
    axes[1].set(yscale="log", title="raw")
    axes[2].plot(times, scaled_task, label="a_t L_task"), axes[2].plot(times, scaled_out, label="(1 - a_t) ratio L_kd")
    axes[2].set(title="as S counts them")
    axes[3].plot(times, pull, label="(1 - a_t) |L_task| / |L_kd|")
    axes[3].set(yscale="log", title="what multiplies the gradient of L_kd")
    for axis in axes:
        axis.set_xlabel("t (0 = data, 1 = noise)")
    save_figure(figure, args.out / "scaling.png")
    print(f"wrote {args.out}/scaling.png")


# ------------------------------------------------------------------------------------------------------------------
# Side by side, from the same noise


def load_students(folders, args):
    """([(model, config)], encoders) of student folders that were trained with the encoders of --teacher."""
    device = pick_device(args.device)
    students = [load_student(folder, device) for folder in folders]
    encoders = FrozenEncoders(args.teacher, device, gemma=students[0][1].get("gemma"))
    for _, config in students:
        check_encoders(config, encoders)
    return students, encoders


def encode_prompts(prompts, encoders):
    """Captions without pictures, as data.Latents: what a Teacher needs to know of them."""
    captions = ["", *dict.fromkeys(prompts)]
    return Latents(torch.zeros(0), torch.zeros(0), captions, *encoders.encode_captions(captions))


def draw_with_teacher(args, encoders, prompts, noise, shift):
    """What the teacher draws in 28 guided steps from the noise (B, C, H, W): B pictures."""
    text = encode_prompts(prompts, encoders)
    teacher = Teacher(args.teacher, text, noise.device)
    ids = torch.tensor([text.captions.index(prompt) for prompt in prompts])
    latents = solve(teacher, noise, torch.ones(len(ids)), ids, 3.0, shift, 28)
    return to_pictures(encoders.decode_latents(latents))


def noise_for(prompts, seed, config, encoders):
    """Noise (B, C, H, W) from the seeds seed, seed + 1, ...: sample.py begins with the same."""
    shape = (encoders.latent_channels, *config["latent_size"])
    return torch.stack([torch.randn(shape, generator=rng(seed + i)) for i in range(len(prompts))]).to(encoders.device)


@torch.no_grad()
def compare_students(args):
    """compare.png: the teacher and the students of --compare, each column from the same noise and prompt."""
    students, encoders = load_students(args.compare, args)
    prompts = [prompt for prompt in prompts_of("val", 2, args.seed) for _ in range(2)]
    config, seeds = students[0][1], [args.seed + i for i in range(len(prompts))]
    noise = noise_for(prompts, args.seed, config, encoders)
    columns = [draw_with_teacher(args, encoders, prompts, noise, config["sampling"]["shift"])]
    columns += [draw_pictures(model, config, encoders, prompts, seeds) for model, config in students]
    names = " | ".join(["teacher", *(str(folder) for folder in args.compare)])
    rows = [[column[i] for i in (k, k + 1) for column in columns] for k in range(0, len(prompts), 2)]
    grid = captioned_grid(rows, [f"{prompt}: {names}" for prompt in prompts[::2]], scale=2)
    save_atomically(grid.save, args.out / "compare.png")
    print(f"wrote {args.out}/compare.png")


@torch.no_grad()
def compare_steps(args):
    """compare.png: rows of prompts; columns teacher 28, the student before with 28 and with 4 steps, ours with 8, 4, 2, 1.

    Prints what a picture takes in the UNet, in a full batch: the best of two turns, taken one after the other.
    """
    ((before, before_config), (ours, config)), encoders = load_students([args.before, args.compare], args)
    prompts = prompts_of("val", 2, args.seed)
    noise = noise_for(prompts, args.seed, config, encoders)
    columns = {"teacher 28": draw_with_teacher(args, encoders, prompts, noise, config["sampling"]["shift"])}
    kinds = {
        "before 28": (before, before_config, 28, before_config["sampling"]["guidance"]),
        "before 4": (before, before_config, 4, 1.0),
        **{f"ours {n}": (ours, config, n, 1.0) for n in (8, 4, 2, 1)},
    }

    def draw(kind, copies):
        model, habits, steps, guidance = kinds[kind]
        captions = prompts * copies
        text, empty = (encoders.student_text(c, model.cfg.text_dim) for c in (captions, [""] * len(captions)))
        start, x = time.perf_counter(), noise.repeat(copies, 1, 1, 1)
        latents = flow.euler_sample(model, x, text, empty, steps, guidance, habits["sampling"]["shift"])
        latents.sum().item()  # waits for a GPU
        return latents, (time.perf_counter() - start) / len(captions)

    for kind in kinds:
        columns[kind] = to_pictures(encoders.decode_latents(draw(kind, 1)[0]))
    rows = [[column[k] for column in columns.values()] for k in range(len(prompts))]
    grid = captioned_grid(rows, [f"{prompt}: {' | '.join(columns)}" for prompt in prompts], scale=2)
    save_atomically(grid.save, args.out / "compare.png")

    turns = [{kind: draw(kind, 5)[1] for kind in kinds} for _ in range(2)]
    seconds = {kind: min(turn[kind] for turn in turns) for kind in kinds}
    print(f"seconds a picture in the UNet, {5 * len(prompts)} at once, {describe_machine(noise.device)}:")
    for kind, value in seconds.items():
        print(f"    {kind:10}{value:8.3f}{seconds['before 28'] / value:8.1f} times as fast as before")
    print(f"wrote {args.out}/compare.png")


# ------------------------------------------------------------------------------------------------------------------
# Ablations: the same training, a switch changed, every seed. What is finished is kept: call again to go on.


def train_rows(args, rows, train):
    """Train every row ({name: settings}) with seeds --seed, --seed + 1, ... and yield (name, folder) as each is done."""
    for seed in range(args.seed, args.seed + args.seeds):
        for name, settings in rows.items():
            run = copy.copy(args)
            vars(run).update(settings, seed=seed, resume=True)
            out = args.out / "-".join([*settings.values(), f"seed{seed}"])
            print(f"-- {name}, seed {seed}")
            train(run, out)  # goes on where it was, or returns at once when it is done
            yield name, out


def score_once(folder, path, measure, encoders):
    """measure(model, config, encoders) of a student folder, kept in the JSON file `path`."""
    if not path.is_file():
        save_json(measure(*load_student(folder, encoders.device), encoders), path)
    return json.loads(path.read_text())


def describe_rows(args):
    return (f"{args.steps} steps of {args.batch} from {args.init}, seeds {args.seed} to {args.seed + args.seeds - 1}, "
            f"{args.per_family} prompts a family, {describe_machine(pick_device(args.device))}")  # fmt: skip


def ablate_losses(args, rows, train):
    """The table of stage 2: mini-GenEval, validation loss and milliseconds a step of every row."""
    encoders, results = FrozenEncoders(args.teacher, pick_device(args.device)), {name: [] for name in rows}
    prompts = prompts_of("val", args.per_family, 0)

    def measure(model, config, encoders):
        return score(draw_pictures(model, config, encoders, prompts, range(len(prompts))), prompts)

    for name, out in train_rows(args, rows, train):
        report = score_once(out, out / f"mini-geneval-{args.per_family}.json", measure, encoders)
        log = Log(out / "log.csv", args.steps)
        results[name].append({"overall": report["overall"], "val_loss": log.column("val_loss")[-1],
                              "ms_per_step": 1000 * args.batch / log.column("pictures_per_second")[-1]})  # fmt: skip
    print(f"\n{describe_rows(args)}")
    print(f"{'':36}{'mini-GenEval':>13}{'range':>17}{'val loss':>10}{'ms a step':>11}")
    for name, runs in results.items():
        scores, milliseconds = [run["overall"] for run in runs], [run["ms_per_step"] for run in runs]
        print(f"{name:36}{np.mean(scores):13.3f}{f'{min(scores):.3f} to {max(scores):.3f}':>17}"
              f"{np.mean([run['val_loss'] for run in runs]):10.4f}{np.mean(milliseconds):11.0f}")  # fmt: skip
    save_json(results, args.out / "ablation.json")
    print(f"wrote {args.out}/ablation.json")


def ablate_few_steps(args, rows, train):
    """The table of stage 3: mini-GenEval with 1, 2, 4 and 8 steps of every row; above them the student before."""
    if args.data:
        raise SystemExit("--ablate counts shapes, and needs the shapes world: leave --data out.")
    encoders, results = FrozenEncoders(args.teacher, pick_device(args.device)), {name: [] for name in rows}

    def measure(model, config, encoders):
        return few_step_scores(model, config, encoders, args.per_family, seed=0)

    before = score_once(args.init, args.out / f"before-{args.per_family}.json", measure, encoders)
    for name, out in train_rows(args, rows, train):
        results[name].append(score_once(out, out / f"mini-geneval-{args.per_family}.json", measure, encoders))
    print(f"\n{describe_rows(args)}, for {args.for_steps} steps, no guidance")
    print(f"{'':20}" + "".join(f"{f'{n} steps':>24}" for n in (1, 2, 4, 8)))
    for name, runs in {f"before: {args.init}"[:19]: [before], **results}.items():
        cells = [[run[f"score_{n}"] for run in runs] for n in (1, 2, 4, 8)]
        print(f"{name:20}" + "".join(f"{f'{np.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})':>24}" for c in cells))
    save_json(results, args.out / "ablation.json")
    print(f"wrote {args.out}/ablation.json")
