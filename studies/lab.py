"""The lab hour: from random weights to verified packages, every stage from the run before, with one table and one grid.

    python -m studies.lab                    # half an hour to an hour on 2 cores, with assets/toy-sd3 as given
    python -m studies.lab --resume           # goes on where it was stopped, also in the middle of a stage
    python -m studies.lab --device cuda      # on a GPU
    python -m studies.lab --dry              # only prints the stages' commands, to be typed one by one

What runs are the stages' own commands, printed before each. Then mini-GenEval of 240 prompts and KID of each student, drawn as its
config says, and the same prompts from the same noise after every stage. Writes lab.png, lab.txt, lab.json beside the runs.
"""

import functools
import json
import shlex
import time
from pathlib import Path

import torch

import decoder
import distill
import export_coreml
import latency
import step_distill
import train_fm
from common.arguments import Parser, add_device, integer
from common.checkpoint import load_student, save_atomically, save_json
from common.device import describe_machine, pick_device
from common.distances import Perceptual, kid, picture_features
from common.encoders import FrozenEncoders
from common.figures import captioned_grid
from common.shapes import FAMILIES, ShapesWorld
from common.stopwatch import counting
from common.training import Log
from evaluate import prompts_of, score
from sample import draw_pictures, pick_decoder
from studies.students import draw_with_teacher, noise_for

STAGES = {  # name of the run: (what it is, the stage's main, its flags); every stage saves often, for --resume
    "fm": ("1  flow matching", train_fm.main, "--steps 1500 --save-every 250 --out {out}/fm"),
    "distill": ("2  distillation", distill.main, "--init {out}/fm --steps 1900 --save-every 200 --out {out}/distill"),
    "decoder": ("   tiny decoder", decoder.main, "--steps 3000 --save-every 500 --out {out}/decoder"),
    "step_distill": ("3  4 steps", step_distill.main,
                     "--init {out}/distill --steps 400 --save-every 100 --watch 0 --out {out}/step_distill"),
    "build": ("4  packages", export_coreml.main, "--model {out}/step_distill --decoder {out}/decoder --out {out}/build"),
}  # fmt: skip
SCRIPTS = {"build": "export_coreml.py", "fm": "train_fm.py"}
STUDENTS = {  # rows of the table: (run, steps, guidance), None as in its config
    "1  flow matching": ("fm", None, None),
    "2  distillation": ("distill", None, None),
    "   the same, 4 steps": ("distill", 4, 1.0),
    "3  4 steps": ("step_distill", None, None),
}


def commands(args):
    """{run: the stage's arguments, as a list}"""
    device = ["--device", args.device] if args.device else []
    found = {}
    for run, (_, _, flags) in STAGES.items():
        found[run] = shlex.split(flags.format(out=args.out.as_posix()))
        if run != "build":
            found[run] += [*device, "--seed", str(args.seed), "--vae" if run == "decoder" else "--teacher", args.teacher]
    return found


def run_stages(args, done):
    """Run what `done` ({run: seconds}, kept in lab.json) does not have yet, and note how long it took, over all sittings."""
    for run, argv in commands(args).items():
        script = SCRIPTS.get(run, f"{run}.py")
        print(f"\n$ python {script} {shlex.join(argv)}", flush=True)
        record = done.setdefault(run, {})
        if record.get("complete"):
            print("done before")
            continue
        with counting(record, functools.partial(save_json, done, args.out / "lab.json")):
            here = describe_machine(pick_device(args.device))
            record["machines"] = [*(m for m in record.get("machines", []) if m != here), here]
            STAGES[run][1]([*argv, *([] if run == "build" else ["--resume"])])
            record["complete"] = True


def measure(args, done):
    """{row: mini-GenEval, KID, forwards, parameters} of STUDENTS, and a picture grid."""
    encoders = FrozenEncoders(args.teacher, pick_device(args.device))
    perceptual = Perceptual("effnet").to(encoders.device)
    prompts, shown = prompts_of("val", args.per_family, 0), prompts_of("val", 2, 1)
    world = [ShapesWorld("val", 0, args.per_family, family)[i][0] for family in FAMILIES for i in range(args.per_family)]
    real = picture_features(world, perceptual.net, encoders.device)
    tiny, rows, columns = pick_decoder(args.out / "decoder", encoders), {}, {}
    for name, (run, steps, guidance) in STUDENTS.items():
        model, config = load_student(args.out / run, encoders.device)
        pictures = draw_pictures(model, config, encoders, prompts, range(len(prompts)), steps, guidance)
        scale = config["sampling"]["guidance"] if guidance is None else guidance
        rows[name] = {
            "run": run, "parameters": sum(p.numel() for p in model.parameters()),
            "forwards": (steps or config["sampling"]["steps"]) * (1 if scale == 1 else 2),
            "score": score(pictures, prompts), "kid": kid(picture_features(pictures, perceptual.net, encoders.device), real),
        }  # fmt: skip
        columns[name] = draw_pictures(model, config, encoders, shown, range(len(shown)), steps, guidance)
    model, config = load_student(args.out / "step_distill", encoders.device)
    columns["its pictures by the tiny decoder"] = draw_pictures(model, config, encoders, shown, range(len(shown)), decoder=tiny)
    noise = noise_for(shown, 0, config, encoders)
    columns = {"teacher": draw_with_teacher(args, encoders, shown, noise, config["sampling"]["shift"]), **columns}
    names = " | ".join(" ".join(name.split()) for name in columns)
    grid = [[column[i] for column in columns.values()] for i in range(len(shown))]
    save_atomically(captioned_grid(grid, [f"{prompt}: {names}" for prompt in shown], scale=2).save, args.out / "lab.png")
    return rows


def table(rows, done, args):
    machines = {json.dumps(machine) for run in STAGES for machine in done[run]["machines"]}  # several, if it went on elsewhere
    lines = [f"the lab, seed {args.seed}, {6 * args.per_family} prompts, {' and '.join(sorted(machines))}"]
    lines.append(f"{'stage':24}{'minutes':>8}{'params M':>9}{'forwards':>9}{'mini-GenEval':>13}   {'95 % interval':16}{'KID':>7}")
    minutes, counted = {run: done[run]["seconds"] / 60 for run in STAGES}, set()
    for name, row in rows.items():
        took = "" if row["run"] in counted else f"{minutes[row['run']]:.1f}"
        counted.add(row["run"])
        low, high = row["score"]["interval"]
        lines.append(f"{name:24}{took:>8}{row['parameters'] / 1e6:9.2f}{row['forwards']:9}{row['score']['overall']:13.3f}   "
                     f"{f'{low:.3f} to {high:.3f}':16}{row['kid']:7.4f}")  # fmt: skip
    psnr = Log(args.out / "decoder" / "log.csv", resume_step=10**9).column("val_psnr")[-1]
    lines.append(f"{'   tiny decoder':24}{minutes['decoder']:8.1f}   {psnr:.2f} dB on validation pictures")
    report = json.loads((args.out / "build" / "verification.json").read_text(encoding="utf-8-sig"))["parts"]
    decibels = {part: min(size["decibels"] for size in r["sizes"].values()) for part, r in report.items()}
    lines.append(f"{'4  packages':24}{minutes['build']:8.1f}   float16: "
                 + ", ".join(f"{part} {value:.1f} dB" for part, value in decibels.items()))  # fmt: skip
    lines.append(f"{'all stages':24}{sum(minutes.values()):8.1f}")
    return "\n".join(lines)


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m studies.lab")
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder: encoders and transformer")
    p.add_argument("--seed", type=integer(0), default=0, help="of every stage")
    p.add_argument("--per-family", type=integer(1), default=40, help="mini-GenEval prompts a family")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/lab"), help="where the runs go")
    p.add_argument("--resume", action="store_true", help="go on with the lab that is in --out")
    p.add_argument("--dry", action="store_true", help="print the commands and run nothing")
    add_device(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.dry:
        for run, flags in commands(args).items():
            print(f"python {SCRIPTS.get(run, f'{run}.py')} {shlex.join(flags)}")
        return
    record = args.out / "lab.json"
    if args.out.is_dir() and any(args.out.iterdir()) and not args.resume:
        raise SystemExit(f"{args.out} holds a lab already: go on with --resume, choose another --out, or delete it.")
    done = json.loads(record.read_text(encoding="utf-8-sig")) if record.is_file() else {}
    settings = {"seed": args.seed, "teacher": args.teacher}
    done = done or {"settings": settings}
    if done.get("settings") != settings:
        raise SystemExit(f"{args.out} holds a lab of {done.get('settings', 'an earlier version')}, not of {settings}: give what it "
                         "began with, or another --out.")  # fmt: skip
    run_stages(args, done)
    print()
    latency.main([str(args.out / "build")])
    torch.set_flush_denormal(True)  # the export had switched it off
    start = time.time()
    rows = measure(args, done)
    text = table(rows, done, args)
    print(f"\n{text}\nmeasuring and drawing: {(time.time() - start) / 60:.1f} minutes")
    save_atomically(lambda p: p.write_text(text + "\n"), args.out / "lab.txt")
    save_json(done | {"rows": rows}, record)
    print(f"wrote {args.out}/lab.png, lab.txt, lab.json")


if __name__ == "__main__":
    main()
