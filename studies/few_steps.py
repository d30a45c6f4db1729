"""Stage 3 under the lens: how many steps are enough, what each loss gives, and what it saves.

    python -m studies.few_steps --compare assets/zoo/step_distill  # teacher | before: 28, 4 | after: 8, 4, 2, 1
    python -m studies.few_steps --ablate --steps 300 --seeds 2     # either loss alone, both, D taught otherwise
"""

import time

import numpy as np
import torch

import flow
import step_distill
from common import arguments, parallel
from common.arguments import integer
from common.checkpoint import latest, save_atomically, save_json
from common.device import autocast, describe_machine, pick_device
from common.encoders import FrozenEncoders
from common.figures import captioned_grid
from evaluate import prompts_of, score
from sample import decode
from studies.students import (
    describe_rows,
    draw_with_teacher,
    load_students,
    noise_for,
    same_start,
    score_once,
    train_rows,
)

ROWS = {
    "adversarial only": {"losses": "adv"},
    "distillation only": {"losses": "kd"},
    "both": {"losses": "adv+kd"},
    "both, at once": {"losses": "adv+kd", "ramp": 0},
    "both, weight 0.3": {"losses": "adv+kd", "adv_weight": 0.3},
    "both, a_t at most 0.5": {"losses": "adv+kd", "task_weight": 0.5},
    "teacher's as real": {"losses": "adv+kd", "adv_weight": 0.3, "real": "teacher"},
    "and wrong captions": {"losses": "adv+kd", "adv_weight": 0.3, "wrong_captions": 0.5},
    "and shifted levels": {"losses": "adv+kd", "adv_weight": 0.3, "level_shift": 3.0},
    "heads on six blocks": {"losses": "adv+kd", "adv_weight": 0.3, "layers": [0, 1, 2, 3, 4, 5]},  # all that toy-sd3 has
}
BATCH = 60  # pictures at once, when they are timed
OWN = ("ablate", "compare", "before", "rows", "seeds", "per_family")  # flags that are no part of a training


@torch.no_grad()
def compare(args):
    """Teacher with 28 steps | the student before with 28 and with 4 | ours with 8, 4, 2, 1: compare.png of some
    prompts, mini-GenEval of --per-family prompts a family, and what a picture takes in the UNet: the best of the
    batches, each of which every column draws in turn.
    """
    ((ours, config),), encoders = load_students([args.compare], args)
    folder = args.before or config["settings"].get("init") or "assets/zoo/distill"
    ((before, before_config),), _ = load_students([folder], args)
    shift, kinds = config["sampling"]["shift"], {
        "before 28": (before, 28, before_config["sampling"]["guidance"]),
        "before 4": (before, 4, 1.0),
        **{f"ours {n}": (ours, n, 1.0) for n in (8, 4, 2, 1)},
    }  # fmt: skip
    prompts = prompts_of("val", args.per_family, args.seed)
    noise = noise_for(prompts, args.seed, config, encoders)
    columns, seconds = {"teacher 28": draw_with_teacher(args, encoders, prompts, noise, shift)}, {}
    for some in torch.arange(len(prompts)).split(BATCH):
        captions = [prompts[i] for i in some]
        for kind, (model, steps, guidance) in kinds.items():
            text = encoders.student_text(captions, model.cfg.text_dim)
            empty = encoders.student_text([""] * len(captions), model.cfg.text_dim)
            start = time.perf_counter()
            with autocast(noise.device):
                latents = flow.euler_sample(model, noise[some], text, empty, steps, guidance, shift)
            latents.sum().item()  # waits for a GPU
            took = (time.perf_counter() - start) / len(captions)
            seconds[kind] = min(seconds.get(kind, took), took)
            columns.setdefault(kind, []).extend(decode(encoders, latents))

    shown = [i for i in range(len(prompts)) if i % args.per_family in (0, args.per_family // 2)]  # two a family
    rows = [[column[i] for column in columns.values()] for i in shown]
    grid = captioned_grid(rows, [f"{prompts[i]}: {' | '.join(columns)}" for i in shown], scale=2)
    save_atomically(grid.save, args.out / "compare.png")
    scores = {kind: score(pictures, prompts) for kind, pictures in columns.items()}
    print(f"mini-GenEval of {len(prompts)} pictures, chance {scores['ours 4']['chance']:.3f}; seconds a picture in "
          f"the UNet, {min(BATCH, len(prompts))} at once")
    print(", ".join(describe_machine(noise.device).values()))
    print(f"{'steps':14}{'score':>7}   {'95 % interval':16}{'seconds':>8}")
    for kind, result in scores.items():
        low, high = result["interval"]
        speed = ""  # the teacher's is another network, and it is not timed
        if kind in seconds:
            speed = f"{seconds[kind]:8.3f}, {seconds['before 28'] / seconds[kind]:.1f} times as fast as before"
        print(f"{kind:14}{result['overall']:7.3f}   {f'{low:.3f} to {high:.3f}':16}{speed}")
    save_json({"scores": scores, "seconds": seconds}, args.out / "compare.json")
    print(f"wrote {args.out}/compare.png, compare.json")


def ablate(args):
    """The table: mini-GenEval with 1, 2, 4 and 8 steps of every row; above them the student before."""
    same_start(args)
    encoders, results = FrozenEncoders(args.teacher, pick_device(args.device)), {}

    def measure(model, config, encoders):
        return step_distill.few_step_scores(model, config, encoders, args.per_family, seed=0)

    before = score_once(args.init, args.out / f"before-{args.per_family}.json", measure, encoders)
    for name, out in train_rows(args, {name: ROWS[name] for name in args.rows or ROWS}, step_distill.train, OWN):
        results.setdefault(name, []).append(score_once(out, out / f"mini-geneval-{args.per_family}.json", measure, encoders))
    print(f"\n{describe_rows(args)}, for {args.for_steps} steps, no guidance")
    print(f"{'':24}" + "".join(f"{f'{n} steps':>24}" for n in (1, 2, 4, 8)))
    for name, runs in {f"before: {args.init}"[:23]: [before], **results}.items():
        cells = [[run[f"score_{n}"] for run in runs] for n in (1, 2, 4, 8)]
        print(f"{name:24}" + "".join(f"{f'{np.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})':>24}" for c in cells))
    save_json(results, args.out / "ablation.json")
    print(f"wrote {args.out}/ablation.json")


def parse_arguments(argv=None):
    p = step_distill.make_parser(__doc__, "python -m studies.few_steps --compare assets/zoo/step_distill")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--ablate", action="store_true", help="train with either loss, both, and in other ways; print the table")
    what.add_argument("--compare", metavar="DIR", help="draw this student with 8, 4, 2, 1 steps beside --before and the teacher")
    p.add_argument("--before", metavar="DIR", help="the student of stage 2, for --compare; default: the one it began as")
    p.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help="these rows of --ablate alone, by the names it prints")
    p.add_argument("--seeds", type=integer(1), default=3, help="runs a row, for --ablate")
    p.add_argument("--per-family", type=integer(1),
                   help="mini-GenEval prompts a family; default: 100 for --ablate, 20 for --compare")  # fmt: skip
    p.set_defaults(out=arguments.Path("runs/studies/few_steps"))
    args = arguments.by_size(p.parse_args(argv), lr=step_distill.LR)
    if args.ablate and args.data:
        raise SystemExit("--ablate counts shapes, and needs the shapes world: leave --data out.")
    args.per_family = args.per_family or (100 if args.ablate else 20)
    args.init = args.init or (latest("distill") if args.ablate else None)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    (ablate if args.ablate else compare)(args)


if __name__ == "__main__":
    parallel.launch(main)
