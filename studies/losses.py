"""Stage 2 under the lens: which losses help, who teaches when, and what the students draw.

    python -m studies.losses --ablate --steps 1000 --seeds 2            # which losses, which layers, scaled or not
    python -m studies.losses --compare runs/task runs/distill           # teacher | students, from the same noise
    python -m studies.losses --plot-scaling assets/zoo/distill          # Fig. 6 in small: who teaches when, and how strongly
"""

import numpy as np
import torch
from tqdm import tqdm

import distill
import flow
from common import arguments, parallel
from common.arguments import integer
from common.checkpoint import latest, save_atomically, save_json
from common.device import half, pick_device
from common.encoders import FrozenEncoders
from common.figures import captioned_grid, pyplot, save_figure
from common.seeds import rng
from common.training import Batch, Log, predict
from data import open_data
from evaluate import prompts_of
from sample import draw_pictures
from studies.students import (
    describe_rows,
    draw_with_teacher,
    load_students,
    mini_geneval,
    noise_for,
    same_start,
    train_rows,
)
from teacher import Teacher

NONE, FULL, LONGER = "no teacher", "teacher, fixed weights 100 and 25", "no teacher, for as long"
ALL, LAST = {"losses": "task+out+feat"}, {"teacher_layer": -1, "student_layer": "up.2.layers.2"}
ROWS = {
    NONE: {"losses": "task"},
    FULL: {**ALL, "weighting": "linear", "out_weight": 100.0, "feat_weight": 25.0},
    "the same, 1 and 0.25": {**ALL, "weighting": "linear", "out_weight": 1.0, "feat_weight": 0.25},
    "the same, without features": {"losses": "task+out", "weighting": "linear", "out_weight": 100.0},
    "the same, without velocity": {**ALL, "weighting": "linear", "out_weight": 0.0, "feat_weight": 25.0},
    "timestep-aware": {**ALL, "weighting": "scaled"},
    "timestep-aware, last layers (the paper's)": {**ALL, "weighting": "scaled", **LAST},
    "timestep-aware, the teacher alone": {**ALL, "weighting": "scaled", "task_weight": 0.0},
}
OWN = ("ablate", "compare", "plot_scaling", "rows", "seeds", "per_family")  # flags that are no part of a training


@torch.no_grad()
def plot_scaling(args):
    """scaling.png: a_t, and a student's L_task and L_kd over t, raw and as S weighs them (the paper's Fig. 6 in small)."""
    ((model, _),), encoders = load_students([args.plot_scaling], args)
    device = encoders.device
    _, val = open_data(args.data, encoders, args.resolution, args.pictures, model.cfg.text_dim)
    teacher = Teacher(args.teacher, val, device, half(device))
    times, rows = torch.linspace(0.025, 0.975, 20), []
    for i, t in enumerate(tqdm(times, desc="measuring", disable=None)):
        x0, ids = val.pictures(torch.arange(min(args.batch, len(val))))
        t, eps = t.expand(len(x0)), torch.randn(x0.shape, generator=rng(args.seed, i))
        x_t, v, text = flow.interpolate(x0, eps, t).to(device), flow.velocity(x0, eps).to(device), val.text(ids)
        predicted = predict(model, Batch(x_t, t.to(device), v, ids, *(x.to(device) for x in text)))
        task = (predicted - v).square().mean((1, 2, 3))
        out = (predicted - teacher(x_t, t, ids)[0]).square().mean((1, 2, 3))
        task, out, a = task.mean().item(), out.mean().item(), distill.timestep_weight(t[:1]).item()
        ratio = task / out  # of the means, as distill.Ratio's
        rows.append([task, out, a * task, (1 - a) * ratio * out, (1 - a) * ratio])
    task, out, scaled_task, scaled_out, pull = zip(*rows, strict=True)
    figure, axes = pyplot().subplots(1, 4, figsize=(17, 3.8))
    fine = torch.linspace(0, 1, 201)
    axes[0].plot(fine, distill.timestep_weight(fine), label="a_t: the data's part")
    axes[0].plot(fine, 1 - distill.timestep_weight(fine), label="1 - a_t: the teacher's part")
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


@torch.no_grad()
def compare(args):
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


def ablate(args):
    """The table: mini-GenEval, validation loss and milliseconds a step of every row.

    A step with a teacher takes longer. So the first row is trained once more, for as many steps as take the full loss's wall time.
    """
    same_start(args)
    encoders, results = FrozenEncoders(args.teacher, pick_device(args.device)), {}

    def train(rows):
        for name, out in train_rows(args, rows, distill.train, OWN):
            report = mini_geneval(out, encoders, args.per_family)
            table = Log(out / "log.csv", resume_step=10**9)
            results.setdefault(name, []).append({
                "steps": int(table.column("step")[-1]), "overall": report["overall"], "val_loss": table.column("val_loss")[-1],
                "ms_per_step": 1000 * args.batch / np.median(table.column("pictures_per_second"))})  # fmt: skip

    train({name: ROWS[name] for name in args.rows or ROWS})
    if {NONE, FULL} <= results.keys():
        slower = np.median([r["ms_per_step"] for r in results[FULL]]) / np.median([r["ms_per_step"] for r in results[NONE]])
        train({LONGER: {**ROWS[NONE], "steps": max(args.steps, round(args.steps * slower))}})
    print(f"\n{describe_rows(args)}")
    print(f"{'':43}{'steps':>7}{'mini-GenEval':>13}{'range':>17}{'val loss':>10}{'ms a step':>11}")
    for name, runs in results.items():
        scores, milliseconds = [run["overall"] for run in runs], [run["ms_per_step"] for run in runs]
        print(f"{name:43}{runs[0]['steps']:7}{np.mean(scores):13.3f}{f'{min(scores):.3f} to {max(scores):.3f}':>17}"
              f"{np.mean([run['val_loss'] for run in runs]):10.4f}{np.mean(milliseconds):11.0f}")  # fmt: skip
    save_json(results, args.out / "ablation.json")
    print(f"wrote {args.out}/ablation.json")


def parse_arguments(argv=None):
    p = distill.make_parser(__doc__, "python -m studies.losses --compare assets/zoo/fm assets/zoo/distill")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--ablate", action="store_true", help="train the rows of the ablation and print the table")
    what.add_argument("--compare", metavar="DIR", nargs="+", help="draw the teacher and these students from the same noise")
    what.add_argument("--plot-scaling", metavar="DIR", help="draw a_t and this student's losses over t")
    p.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help="these rows of --ablate alone, by the names it prints")
    p.add_argument("--seeds", type=integer(1), default=3, help="runs a row, for --ablate: seeds --seed, --seed + 1, ...")
    p.add_argument("--per-family", type=integer(1), default=100, help="mini-GenEval prompts a family, for --ablate")
    p.set_defaults(out=arguments.Path("runs/studies/losses"))
    args = arguments.by_size(p.parse_args(argv), lr=distill.LR, weighting=distill.WEIGHTING)
    args.init = args.init or (latest("fm") if args.ablate else None)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    (ablate if args.ablate else compare if args.compare else plot_scaling)(args)


if __name__ == "__main__":
    parallel.launch(main)
