"""Make assets/toy-sd3 and assets/zoo from nothing: autoencoder, text encoders, teacher, the students of all stages, the decoder.

    python -m assets.make_zoo                       # everything that is not made yet: hours on a CPU, minutes on a GPU
    python -m assets.make_zoo --only fm decoder     # these parts; a second process for them uses a second core
    python -m assets.make_zoo --list                # what is made, when, how long it took

Stop it at any moment and call it again: each part goes on from its last saved state under runs/zoo. assets/zoo/log/ tells of each
part its command, wall time, machine and commit. A part that is done is not made again; --force deletes what there is of it and
starts from nothing. Students and decoder are trained by the stages' own commands, printed here, and copied in half precision.

The order is vae, text, then the teacher, which takes longest; fm and decoder need no teacher and may be made beside it. With one
thread each (OMP_NUM_THREADS=1) two processes share two cores well.
"""

import contextlib
import json
import shlex
import shutil
import threading
import time
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

WORK = Path("runs/zoo")
TRAININGS = {  # part: (main, its command); {out} is --out
    "fm": (train_fm.main, "train_fm.py --teacher {out}/toy-sd3 --pictures 60000 --steps 9000 --compile"),
    "decoder": (decoder.main, "decoder.py --vae {out}/toy-sd3"),
    "distill": (distill.main,
                "distill.py --init {out}/zoo/fm --teacher {out}/toy-sd3 --pictures 60000 --steps 4000 --compile"),
    "step_distill": (step_distill.main, "step_distill.py --init {out}/zoo/distill --teacher {out}/toy-sd3 --pictures 60000 "
                                        "--steps 3000 --watch 0 --compile"),
}  # fmt: skip
NEEDS = {"vae": (), "text": (), "teacher": ("vae", "text"), "fm": ("vae", "text"), "decoder": ("vae",),
         "distill": ("teacher", "fm"), "step_distill": ("teacher", "distill")}  # fmt: skip


def command_of(part, args):
    return TRAININGS[part][1].format(out=args.out.as_posix()) if part in TRAININGS else f"-m assets.make_zoo --only {part}"


def make(part, args, device):
    """Make one part, or go on with it."""
    toy = args.out / "toy-sd3"
    if part in TRAININGS:
        main, command, run = TRAININGS[part][0], command_of(part, args), WORK / part
        flags = [*shlex.split(command)[1:], "--out", run.as_posix(), "--resume", "--device", str(device)]
        print(f"$ python {command} --out {run.as_posix()}", flush=True)
        main(flags)
        checkpoint.main([str(run), str(args.out / "zoo" / part)])
        return
    if part == "vae":
        make_autoencoder(toy, device)
    elif part == "text":
        make_text_encoders(toy, device)
        make_silent_t5(toy)
        make_index(toy)
    else:
        make_teacher(toy, device, state=WORK / "teacher")


class Record:
    """assets/zoo/log/PART.json: when a part was done, how long it took over all sittings, where and at which commits."""

    def __init__(self, part, args):
        self.path = args.out / "zoo" / "log" / f"{part}.json"
        self.values = json.loads(self.path.read_text()) if self.path.is_file() else {}

    @property
    def done(self):
        return self.values.get("done")

    @contextlib.contextmanager
    def counting(self, part, args, device):
        """Time what is inside; written every minute, so that a kill loses no more than that."""
        about, before, start, over = describe_machine(device), self.values.get("minutes", 0.0), time.time(), threading.Event()
        commits = list(dict.fromkeys([*self.values.get("commits", []), about["commit"]]))
        self.values |= {"command": f"python {command_of(part, args)}", "machine": about, "commits": commits}

        def write(**more):
            self.values |= {"minutes": round(before + (time.time() - start) / 60, 1), **more}
            save_json(self.values, self.path)

        def every_minute():
            while not over.wait(60):
                write()

        thread = threading.Thread(target=every_minute, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            write()
        write(done=f"{datetime.now():%Y-%m-%d}")


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m assets.make_zoo --only vae text")
    p.add_argument("--only", nargs="+", choices=NEEDS, default=list(NEEDS), help="these parts; default: all")
    p.add_argument("--force", action="store_true", help="make them again, from nothing, even if they are done")
    p.add_argument("--list", action="store_true", help="only print what is done")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("assets"), help="where toy-sd3 and zoo go")
    add_device(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    if args.force:
        for part in args.only:
            Record(part, args).path.unlink(missing_ok=True)
            shutil.rmtree(WORK / part, ignore_errors=True)
    for part in args.only if not args.list else ():
        record = Record(part, args)
        if record.done:
            print(f"{part}: made on {record.done} in {record.values['minutes']} minutes; --force makes it again")
            continue
        if missing := [need for need in NEEDS[part] if not Record(need, args).done]:
            raise SystemExit(f"{part} needs {' and '.join(missing)} first: python -m assets.make_zoo --only {' '.join(missing)}")
        print(f"\n{part}: {'going on' if record.values else 'from nothing'}", flush=True)
        with record.counting(part, args, device):
            make(part, args, device)
    print(f"\n{'part':14}{'done':14}{'minutes':>8}   {'commits':20}machine")
    for part in NEEDS:
        values = Record(part, args).values
        if values:
            print(f"{part:14}{values.get('done', 'not yet'):14}{values['minutes']:8.1f}   {', '.join(values['commits']):20}"
                  f"{values['machine']['device']}")  # fmt: skip


if __name__ == "__main__":
    main()
