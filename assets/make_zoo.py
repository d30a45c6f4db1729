"""Make toy-sd3 and the zoo from nothing: autoencoder, text encoders, teacher, the students of all stages, the decoder.

    python -m assets.make_zoo                       # everything that is not made yet, under runs/zoo: hours on a CPU
    python -m assets.make_zoo --only fm decoder     # these parts; a second process for them uses a second core
    python -m assets.make_zoo --list                # what is made, when, how long it took
    python -m assets.make_zoo --list --out assets   # the same of what is committed, which --out assets made

Stop it at any moment and call it again: teacher, students and decoder go on from their last saved state under --out/runs; vae and
text, some twenty minutes, begin anew. --out/zoo/log/ tells of each part its command, wall time, machine and commit. A part that
is done is not made again; --force deletes what there is of it and starts from nothing. Students and decoder are trained by the
stages' own commands, printed here, and copied in half precision.

The order is vae, text, then the teacher; fm and decoder need no teacher and may be made beside it. With one
thread each (OMP_NUM_THREADS=1) two processes share two cores well.
"""

import functools
import json
import shlex
import shutil
from datetime import datetime
from pathlib import Path

import decoder
import distill
import step_distill
import train_fm
from assets.make_toy_sd3 import make_autoencoder, make_index, make_silent_t5, make_teacher, make_text_encoders
from common import checkpoint
from common.arguments import Parser, add_device
from common.checkpoint import save_json
from common.device import describe_machine, pick_device
from common.stopwatch import counting

TRAININGS = {  # part: (main, its command); {out} is --out
    "fm": (train_fm.main, "train_fm.py --teacher {out}/toy-sd3 --pictures 60000 --steps 12000 --compile"),
    "decoder": (decoder.main, "decoder.py --vae {out}/toy-sd3"),
    "distill": (distill.main,
                "distill.py --init {out}/zoo/fm --teacher {out}/toy-sd3 --pictures 60000 --steps 4000 --compile"),
    "step_distill": (step_distill.main, "step_distill.py --init {out}/zoo/distill --teacher {out}/toy-sd3 --pictures 60000 "
                                        "--steps 2500 --watch 0 --compile"),
}  # fmt: skip
NEEDS = {"vae": (), "text": (), "teacher": ("vae", "text"), "fm": ("vae", "text"), "decoder": ("vae",),
         "distill": ("teacher", "fm"), "step_distill": ("teacher", "distill")}  # fmt: skip


def command_of(part, args):
    out = args.out.as_posix()
    return TRAININGS[part][1].format(out=out) if part in TRAININGS else f"-m assets.make_zoo --only {part} --out {out}"


def make(part, args, device):
    """Make one part, or go on with it."""
    toy = args.out / "toy-sd3"
    if part in TRAININGS:
        main, command, run = TRAININGS[part][0], command_of(part, args), args.out / "runs" / part
        flags = [*shlex.split(command)[1:], "--out", run.as_posix(), "--resume", "--device", str(device)]
        print(f"$ python {command} --out {run.as_posix()}", flush=True)
        main(flags)
        checkpoint.main([str(run), str(args.out / "zoo" / part)])
        shutil.copy(run / "log.csv", args.out / "zoo" / part)
        return
    if part == "vae":
        make_autoencoder(toy, device)
    elif part == "text":
        make_text_encoders(toy, device)
        make_silent_t5(toy)
        make_index(toy)
    else:
        make_teacher(toy, device, state=args.out / "runs" / "teacher")


def path_of(part, args):
    """Where the record of a part is: command, wall time over all sittings, machine, commits, the day on which it was done."""
    return args.out / "zoo" / "log" / f"{part}.json"


def record_of(part, args):
    path = path_of(part, args)
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m assets.make_zoo --only vae text")
    p.add_argument("--only", nargs="+", choices=NEEDS, default=list(NEEDS), help="these parts; default: all")
    p.add_argument("--force", action="store_true", help="make them again, from nothing, even if they are done")
    p.add_argument("--list", action="store_true", help="only print what is done")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/zoo"), help="where toy-sd3, zoo and the runs go")
    add_device(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    if args.force and args.list:
        raise SystemExit("--force deletes and --list only prints: give one of them.")
    stale = [part for part in NEEDS if {*NEEDS[part]} & {*args.only} and part not in args.only and record_of(part, args)]
    if args.force and stale:
        raise SystemExit(f"{' and '.join(stale)} would stay as they are, made from what --force deletes: name them too, or another "
                         "--out.")  # fmt: skip
    for part in args.only if args.force else ():
        path_of(part, args).unlink(missing_ok=True)
        shutil.rmtree(args.out / "runs" / part, ignore_errors=True)
    for part in [part for part in NEEDS if part in args.only] if not args.list else ():
        record = record_of(part, args)
        if "done" in record:
            print(f"{part}: made on {record['done']} in {record['seconds'] / 60:.1f} minutes; --force makes it again")
            continue
        if missing := [need for need in NEEDS[part] if "done" not in record_of(need, args)]:
            raise SystemExit(f"{part} needs {' and '.join(missing)} first: python -m assets.make_zoo --only {' '.join(missing)} "
                             f"--out {args.out.as_posix()}")  # fmt: skip
        print(f"\n{part}: {'going on' if record and part not in ('vae', 'text') else 'from nothing'}", flush=True)
        about, save = describe_machine(device), functools.partial(save_json, record, path_of(part, args))
        record |= {"command": f"python {command_of(part, args)}", "machine": about,
                   "commits": list(dict.fromkeys([*record.get("commits", []), about["commit"]]))}  # fmt: skip
        with counting(record, save):
            make(part, args, device)
            record["done"] = f"{datetime.now():%Y-%m-%d}"
    print(f"\n{'part':14}{'done':14}{'minutes':>8}   {'commits':20}machine")
    for part, record in ((part, record_of(part, args)) for part in NEEDS):
        if record:
            print(f"{part:14}{record.get('done', 'not yet'):14}{record['seconds'] / 60:8.1f}   {', '.join(record['commits']):20}"
                  f"{record['machine']['device']}")  # fmt: skip


if __name__ == "__main__":
    main()
