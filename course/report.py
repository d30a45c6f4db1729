"""A report of your runs: one page with the stages' numbers beside the paper's, curves, samples and the packages.

    python -m course.report                          # every run under runs/, or the zoo if there is none -> runs/report.html
    python -m course.report runs/lab --no-draw       # the runs in this folder; nothing is drawn anew, which takes seconds
    python -m course.report runs/fm assets/zoo/fm    # your student beside the zoo's

The page is one file that needs no network: mail it, print it, hand it in. It shows what the folders hold: a run that has not
finished is shown as far as it came, and one that cannot be read gets a line that says why. Read are config.json, log.csv and
samples/ of each run; minutes from lab.json or the zoo's log/, else counted from log.csv; mini-GenEval from what evaluate.py --out
or the lab saved; and what export_coreml.py and latency.py --out wrote under build/ or runs/. Only the pictures of the section "the
same noise" are drawn here: a few seconds a student of class scale on one CPU core.
"""

import csv
import json
import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import safetensors

import flow
from common.arguments import Parser, add_device
from common.checkpoint import check_encoders, load_student, save_atomically
from common.device import describe_machine, pick_device
from common.encoders import FrozenEncoders
from common.pictures import open_picture
from common.training import Log
from course.page import DASH, chart, document, evenly, folded, h, hint, image, number, path_name, problem, table
from data import PROMPTS
from sample import draw_pictures

STAGES = {  # in the order of the page: what it is called, and the command that makes such a run
    "fm": ("1 flow matching", "python train_fm.py"), "distill": ("2 distillation", "python distill.py"),
    "step_distill": ("3 step distillation", "python step_distill.py"), "decoder": ("tiny decoder", "python decoder.py"),
}  # fmt: skip
# The paper's numbers for the corresponding thing: (number, of what), and where they stand. [P] the paper's own words; [R] a
# secondary review, since Sec. 3.3 and later were not available in the original.
PAPER = {
    "fm": {"where": "abstract, Table 1 [P]", "parameters": ("379 M", "ImageNet: 372 M"),
           "validation": ("FID 2.06", "ImageNet, 256 px")},
    "distill": {"where": "Sec. 3.3, 4 [P, R]", "parameters": ("379 M",), "forwards": ("28 steps",),
                "score": ("GenEval 0.66", "28 steps")},
    "step_distill": {"where": "Sec. 3.4, 4 [P, R]", "parameters": ("379 M",), "forwards": ("4 or 8 steps",),
                     "score": ("GenEval 0.61", "8 steps: 0.63")},
    "decoder": {"where": "Table 2 [P]", "parameters": ("1.38 M",), "validation": ("27.85 dB", "COCO 2017")},
    "latency": {"where": "Sec. 3.2 [P]", "device": "iPhone 16 Pro Max, 1024 pixels", "unet": ("274", "a step"),
                "decoder": ("119",), "text_encoder": ("negligible",), "picture": ("1200 to 2300", "4 to 8 steps")},
}  # fmt: skip
CURVES = {  # title: {label: column of log.csv}, for each stage; a panel without values is left out
    "fm": {"loss": {"training": "loss", "validation, EMA": "val_loss"}},
    "distill": {
        "the three levels, unscaled": {"L_task": "loss_task", "L_out": "loss_out", "L_feat": "loss_feat"},
        "agreement with the teacher's velocity": {"cosine": "cosine"},
        "validation": {"L_task, EMA": "val_loss"},
    },
    "step_distill": {
        "the discriminator: real above predicted, a small gap": {"real": "d_real", "predicted": "d_fake"},
        "losses": {"L_kd": "loss_kd", "L_task": "loss_task", "L_D": "loss_d", "L_adv": "loss_adv"},
        "collapse alarm: ratios near 1, gap near 0":
            {"lowest ratio": "std_ratio_low", "highest ratio": "std_ratio_high", "gap": "mean_gap"},
        "mini-GenEval of few prompts": {f"{n} steps": f"score_{n}" for n in (1, 2, 4, 8)},
    },
    "decoder": {
        "losses": {"MSE": "mse", "perceptual": "perceptual"},
        "the discriminator": {"real": "d_real", "reconstructed": "d_fake"},
        "validation PSNR, dB": {"EMA": "val_psnr"},
    },
}  # fmt: skip
COMPARED = "original | teacher's decoder | tiny decoder | difference x 4"  # what decoder.py puts side by side
MOST_STEPS = 16  # sample grids of a run
SAMPLE_BYTES, DRAWN_BYTES = 3_000_000, 1_500_000  # of all such pictures together; as base64 they take a third more
LARGE = 50e6  # parameters above which a student is not drawn on a CPU
BROKEN = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)  # what a file of another format leads to

# ------------------------------------------------------------------------------------------------------------------
# What the folders hold


@dataclass(eq=False)
class RunFolder:
    """What could be read of a run's folder. `config` and `columns` are {} where there is nothing to read; `problems` says why."""

    path: Path
    config: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)  # of log.csv: {name: [values]}, nan where nothing was measured
    parameters: int | None = None
    problems: list = field(default_factory=list)

    @property
    def name(self):
        return self.path.as_posix()

    @property
    def stage(self):
        return self.config.get("stage")

    def points(self, column):
        """[(step, value)] of a column of log.csv, without nan and infinity."""
        pairs = zip(self.columns.get("step", ()), self.columns.get(column, ()), strict=False)
        return [(int(step), value) for step, value in pairs if math.isfinite(value)]


def read_json(path):
    """The object in a JSON file. Raises ValueError or OSError."""
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value


def read_config(path):
    """A run's config.json. Raises one of BROKEN with a reason when it is not of this course's format."""
    config = read_json(path)
    if config.get("stage") not in STAGES:
        raise ValueError(f"it names no stage of this course ({', '.join(list(config)[:3]) or 'it is empty'})")
    kinds = {"step": int, "settings": dict, "machine": dict}
    kinds |= {"latent_size": list, "sampling": dict, "unet": dict} if config["stage"] != "decoder" else {}
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise ValueError(f"its {name} is missing or of another kind")
    if "sampling" in kinds:
        forwards(config)
    return config


def read_log(path):
    """({column: values} of log.csv, how many of its rows are not whole)."""
    log, names = Log(path, resume_step=10**12), {}  # Log keeps the rows up to a step
    for row in log.rows:
        names |= {name: None for name in row if name}
    written = sum(1 for line in path.read_text(encoding="utf-8-sig").splitlines()[1:] if line.strip())
    return {name: log.column(name) for name in names}, written - len(log.rows)


def read_run(folder):
    """The RunFolder of a folder, whatever state it is in."""
    run, weights = RunFolder(folder), folder / "model.safetensors"
    if (folder / "config.json").is_file():
        try:
            run.config = read_config(folder / "config.json")
        except BROKEN as error:
            run.problems.append(f"config.json is of another format: {error}.")
    else:
        run.problems.append("no config.json: the run has not saved anything yet.")
    if (folder / "log.csv").is_file():
        try:
            run.columns, broken = read_log(folder / "log.csv")
            run.problems += [f"log.csv: {broken} of its rows cannot be read, and are left out."] if broken else []
        except (*BROKEN, csv.Error) as error:
            run.problems.append(f"log.csv cannot be read ({type(error).__name__}: {error}).")
    if run.config and weights.is_file():
        try:
            with safetensors.safe_open(weights, "pt") as file:
                run.parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (*BROKEN, safetensors.SafetensorError) as error:
            run.problems.append(f"model.safetensors is damaged ({error}).")
    elif run.config:
        run.problems.append("no model.safetensors: nothing can be drawn.")
    return run


def find_runs(folders):
    """The RunFolders in `folders`, or under runs/, or the zoo's; in the order of the stages. Raises SystemExit for no folder."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"no such folder: {folder}. Give runs, such as runs/fm, or leave them out for all under runs/.")
        inside = [] if (folder / "config.json").is_file() else runs_under(folder)
        found += inside or ([] if (folder / "verification.json").is_file() else [folder])
    if not folders:
        found = runs_under(Path("runs")) or runs_under(Path("assets/zoo"))
    runs, order = [read_run(folder) for folder in dict.fromkeys(found)], [*STAGES, None]
    return sorted(runs, key=lambda run: order.index(run.stage))


def runs_under(folder):
    """Folders with config.json or log.csv, sorted."""
    files = [path for name in ("config.json", "log.csv") for path in folder.rglob(name)]
    return sorted({path.parent for path in files if not any(part.startswith(".") for part in path.parts)})


def forwards(config):
    """Forwards of the UNet a picture, drawn as the config says: two for a step with guidance."""
    sampling = config["sampling"]
    times = sampling.get("times") or flow.sampling_timesteps(sampling["steps"], sampling["shift"]).tolist()
    low, high = sampling.get("guidance_interval", (0, 1))
    return sum(2 if sampling["guidance"] != 1 and low <= t <= high else 1 for t in times[:-1])


def minutes(run):
    """(minutes, file): of all sittings by the record beside the run, else of training alone by log.csv; None without either."""
    for path, key in ((run.path.parent / "lab.json", run.path.name), (run.path.parent / "log" / f"{run.path.name}.json", None)):
        try:
            record = read_json(path)
            return (record[key] if key else record)["seconds"] / 60, path.name
        except BROKEN:
            continue
    seen, rate = dict(run.points("pictures")), dict(run.points("pictures_per_second"))
    steps = [step for step in seen if rate.get(step, 0) > 0]
    seconds = sum((seen[step] - seen.get(before, 0)) / rate[step] for before, step in zip([0, *steps], steps, strict=False))
    return (seconds / 60, "log.csv") if steps else None


def evaluations(run):
    """Saved mini-GenEval of a run: [(pictures, overall, low, high, file)], the one of most pictures first."""
    inside = [*run.path.glob("*.json"), *run.path.glob("*/report.json")]
    found = []
    for path in sorted({*inside, *run.path.parent.glob("*/report.json"), *run.path.parent.glob("lab.json")}):
        try:
            value = read_json(path)
            if path.name == "lab.json":
                scores = [row["score"] for row in value.get("rows", {}).values() if row["run"] == run.path.name][:1]
            elif "target" in value and Path(value["target"]).resolve() != run.path.resolve():
                continue  # another run's
            else:
                scores = [value.get("val", value)] if "val" in value or path in inside else []
            found += [(s["pictures"], float(s["overall"]), *map(float, s["interval"]), path.name) for s in scores if "overall" in s]
        except BROKEN:
            continue
    return sorted(found, key=lambda one: -one[0])


# ------------------------------------------------------------------------------------------------------------------
# Sections


def stages(runs):
    """The table of all runs, each stage above the paper's row, and the settings of each run."""
    head, rows = ["run", "parameters", "steps", "minutes", "forwards", "validation", "mini-GenEval"], []
    for stage, (title, command) in STAGES.items():
        mine = [run for run in runs if run.stage == stage]
        rows += [row_of(run) for run in mine]
        rows += [] if mine else [[[f"no run yet: {title}", h("small", h("code", command))], *[DASH] * 6]]
        said = [PAPER[stage].get(name) for name in ("parameters", "steps", "minutes", "forwards", "validation", "score")]
        rows.append(("paper", [paper_cell(("the paper", PAPER[stage]["where"])), *map(paper_cell, said)]))
    yield table("Stages", head, rows, numeric=range(1, 7))
    yield [problem(f"{run.name}: {text}") for run in runs for text in run.problems]
    yield h("p", "Forwards: of the UNet, a picture; a guided step takes two. Minutes: wall time as the lab or the zoo noted it, "
            "or of training alone by log.csv. mini-GenEval counts objects in a world of four shapes and is not GenEval; it stands "
            "beside the paper's numbers, and is not to be compared with them. [P] the paper's own words, [R] a secondary review.",
            class_="note")  # fmt: skip
    for run in (run for run in runs if run.config):
        pairs = {**run.config["machine"], **run.config["settings"]}
        rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in pairs.items() if value is not None]
        settings = table(f"Settings of {run.name}", ["setting", "value"], rows)
        yield h("details", h("summary", f"How {run.name} was trained"), settings)


def paper_cell(said):
    """A cell with a number of PAPER, and of what it is."""
    return [said[0], [h("small", of) for of in said[1:]]] if said else DASH


def row_of(run):
    """A run's cells of the table of stages."""
    config, took, scores = run.config, minutes(run), evaluations(run)
    step, of = config["step"], config["settings"].get("steps")
    logged = max([0, *(step for step, _ in run.points("step"))])
    steps = [f"{step:,}" + (f" of {of:,}" if isinstance(of, int) and of != step else "")]
    steps += [h("small", f"log to {logged:,}")] if logged not in (0, step) else []
    kind = "val_psnr" if run.stage == "decoder" else "val_loss"
    validation = [(f"{value:.2f} dB" if kind == "val_psnr" else number(value), h("small", f"step {at:,}"))
                  for at, value in run.points(kind)[-1:]]  # fmt: skip
    score = [(f"{overall:.3f}", h("small", f"{low:.3f} to {high:.3f}, {n} pictures")) for n, overall, low, high, _ in scores[:1]]
    return [
        [path_name(run.name), h("small", STAGES[run.stage][0])], f"{run.parameters / 1e6:.2f} M" if run.parameters else DASH, steps,
        [f"{took[0]:.1f}", h("small", took[1])] if took else DASH, DASH if run.stage == "decoder" else forwards(config),
        validation or DASH, score or DASH,
    ]  # fmt: skip


def curves(runs):
    """For each run the panels of its stage, and every loss that log.csv has by fifths of t."""
    silent = []
    for run in runs:
        panels = [chart(title, {label: run.points(column) for label, column in columns.items()})
                  for title, columns in CURVES.get(run.stage, CURVES["fm"]).items()]  # fmt: skip
        for loss in dict.fromkeys(re.sub(r"_t0\.\d$", "", name) for name in run.columns if re.search(r"_t0\.\d$", name)):
            fifths = {f"t {i / 5:.1f}–{(i + 1) / 5:.1f}": run.points(f"{loss}_t{i / 5:.1f}") for i in range(5)}
            panels.append(chart(f"{loss} by fifths of t; t = 1 is noise", fifths, ramp=True))
        panels = [panel for panel in panels if panel is not None]
        if panels:
            yield h("h3", run.name), h("div", panels, class_="panels")
        else:
            silent.append(run)
    if silent or not runs:
        yield hint(f"No curves of {', '.join(run.name for run in silent)}: " if silent else "No curves yet: ",
                   "training writes log.csv, such as `python train_fm.py`.")  # fmt: skip


def samples(runs):
    """For each run what it drew while training, thinned and folded; of a decoder its comparison."""
    kept, silent, blocks = {}, [], []
    for run in runs:
        files = [path for path in run.path.glob("samples/*.png") if path.stem.isdigit()]
        kept[run] = evenly(sorted(files, key=lambda path: int(path.stem)), MOST_STEPS) if files else []
        kept[run] += [run.path / "compare.png"] if (run.path / "compare.png").is_file() else []
    most = SAMPLE_BYTES // max(1, sum(map(len, kept.values())))
    for run, files in kept.items():
        frames = []
        for path in files:
            text = f"step {int(path.stem):,}" if path.stem.isdigit() else COMPARED
            try:
                picture = image(folded(open_picture(path)), f"{run.name}, {text}", most)
                frames.append(h("figure", picture, h("figcaption", text)))
            except OSError as error:
                frames.append(problem(f"{error}."))
        if frames:
            blocks.append(h("div", h("h3", run.name), h("div", frames, class_="film" if len(frames) > 1 else "film single")))
        else:
            silent.append(run)
    yield h("div", blocks, class_="blocks") if blocks else None
    if any(run.stage in list(STAGES)[:3] and run not in silent for run in runs):
        yield h("p", f"Always the same captions and noise; in the shapes world, row by row: {'; '.join(PROMPTS)}.", class_="note")
    if silent or not runs:
        yield hint(f"No samples of {', '.join(run.name for run in silent)}: " if silent else "No samples yet: ",
                   "training draws them every --save-every steps, such as `python train_fm.py --save-every 100`.")  # fmt: skip


def draw(runs, device):
    """({run name: pictures of PROMPTS}, {run name: why it was not drawn}), from seeds 0, 1, ...: the same noise for each."""
    runs, drawn, reasons, encoders = [run for run in runs if run.stage not in (None, "decoder")], {}, {}, {}
    for i, run in enumerate(runs, 1):
        print(f"drawing {i} of {len(runs)}: {run.name}", flush=True)
        try:
            if (run.parameters or 0) > LARGE and device.type == "cpu":
                raise SystemExit(f"{run.parameters / 1e6:.0f} M parameters take too long on a CPU")
            model, config = load_student(run.path, device)
            key = config["encoders"], config.get("gemma")
            if key not in encoders:
                encoders[key] = FrozenEncoders.of(config, device)
            check_encoders(config, encoders[key])
            drawn[run.name] = draw_pictures(model, config, encoders[key], PROMPTS, range(len(PROMPTS)))
        except (SystemExit, RuntimeError, *BROKEN) as error:
            reasons[run.name] = str(error)
    return drawn, reasons


def same_noise(drawn, reasons):
    """Each prompt with what every student draws from the same noise."""
    most = DRAWN_BYTES // max(1, len(drawn) * len(PROMPTS))
    figures = []
    for i, prompt in enumerate(PROMPTS):
        row = [h("div", image(drawn[name][i], f"{name}: {prompt}", most, side=256), h("small", path_name(name))) for name in drawn]
        figures.append(h("figure", h("figcaption", prompt), h("div", row, class_="row")))
    if drawn:
        yield h("p", "Drawn by each student as its config says, picture for picture from the same noise.", class_="note")
        yield h("div", figures, class_="prompts")
    yield [problem(f"{name} was not drawn: {reason}") for name, reason in reasons.items()]
    if not drawn:
        yield hint("Nothing was drawn. `python -m course.report` without --no-draw draws what `python train_fm.py` and the stages "
                   "after it have trained.")  # fmt: skip


def packages(folders):
    """What export_coreml.py and latency.py found, of every folder of packages."""
    verified, timed, problems = [], [], []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        try:
            value = read_json(path)
            if path.name == "verification.json":
                verified += [verification(path.parent, name, *one) for name, part in value["parts"].items()
                             for one in part["sizes"].items()]  # fmt: skip
            elif "programs" in value:
                timed += [program(path, name, one) for name, one in value["programs"].items()]
            elif "device" in value and "parts" in value:
                timed += [timing(path, value, name, *one) for name, units in value["parts"].items() for one in units.items()]
        except BROKEN as error:
            problems.append(problem(f"{path.as_posix()} is of another format: {error!r}."))
    yield problems
    yield h("h3", "Verification")
    head = ["package", "part", "latent", "float32 error", "float16 dB", "operations", "MB", "Core ML, dB"]
    yield table("Verification", head, verified, numeric=range(2, 8)) if verified else hint(
        "No packages yet: `python export_coreml.py` writes and verifies them.")  # fmt: skip
    yield h("p", "The package beside PyTorch, interpreted operation by operation: the largest error of the program in float32, the "
            "signal to error of the one in float16.", class_="note") if verified else None  # fmt: skip
    yield h("h3", "Latency")
    paper = PAPER["latency"]
    head = ["report", "part", "where", "GMACs", "weights, MB", "activations, MB", "load, ms", "predict, ms", "the paper, ms"]
    rows = [[*row, paper_cell(paper.get(row[1]))] for row in timed]
    whole = [paper_cell(("the paper", paper["where"], paper["device"])), "a picture", *[DASH] * 6, paper_cell(paper["picture"])]
    yield table("Latency", head, [*rows, ("paper", whole)], numeric=range(3, 9)) if rows else hint(
        "No latency yet: `python latency.py build/ --out build/latency.json` writes it.")  # fmt: skip
    yield h("p", "Where there is no Core ML nothing is timed, and the program's own counts stand alone. The paper's numbers "
            f"are of an {paper['device']}.", class_="note") if rows else None  # fmt: skip


def verification(folder, part, size, found):
    """A row of verification.json."""
    mac = ", ".join(f"{unit} {value:.1f}" for unit, value in (found["mac"] or {}).items())
    errors = [f"{found['float32_error']:.1e}", f"{found['decibels']:.1f}"]
    return [path_name(folder.as_posix()), part, size if int(size) else DASH, *errors, f"{found['operations']:,}",
            f"{found['bytes'] / 1e6:.2f}", mac or "not run"]  # fmt: skip


def program(path, part, found):
    """A row of what latency.py counts where there is no Core ML."""
    return [path_name(path.as_posix()), part, "program", f"{found['macs'] / 1e9:.3f}", f"{found['weight_bytes'] / 1e6:.2f}",
            f"{found['peak_activation_bytes'] / 1e6:.2f}", DASH, "not timed"]  # fmt: skip


def timing(path, report, part, unit, found):
    """A row of what latency.py timed on a Mac or an iPhone."""
    times = [found["error"], DASH] if "error" in found else [f"{found['load']:.1f}", f"{found['predict']:.2f}"]
    return [path_name(path.as_posix()), part, f"{report['device']}, {report['os']}, {unit}", DASH, DASH, DASH, *times]


def page(args):
    """The whole page as text."""
    runs = find_runs(args.runs)
    places = [path.parent for root in [*args.runs, Path("runs")] for path in sorted(root.rglob("verification.json"))]
    drawn, reasons = ({}, {}) if args.no_draw else draw(runs, args.device)
    machine = describe_machine(args.device)
    about = f"{datetime.now():%Y-%m-%d %H:%M}, commit {machine['commit']}, {machine['device']}, torch {machine['torch']}"
    sections = {"Stages": stages(runs), "Curves": curves(runs), "Samples": samples(runs),
                "The same noise": same_noise(drawn, reasons),
                "Packages": packages(dict.fromkeys([Path("build"), *places]))}  # fmt: skip
    ids = {title: title.lower().replace(" ", "-") for title in sections}
    return document(
        "Your runs",
        h("header", h("p", "SnapGen, from the first convolution to the phone", class_="over"), h("h1", "Your runs"),
          h("p", f"{len(runs)} run{'s' * (len(runs) != 1)}. {about}", class_="note"),
          h("nav", [h("a", title, href=f"#{ids[title]}") for title in sections])),
        [h("section", h("h2", title), list(content), id=ids[title]) for title, content in sections.items()],
    )  # fmt: skip


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m course.report runs/lab --no-draw")
    p.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="runs or folders of runs; default: all of runs/, or the zoo")
    p.add_argument("--no-draw", action="store_true", help="leave out the section of pictures that are drawn anew")
    p.add_argument("--out", metavar="FILE", type=Path, default=Path("runs/report.html"), help="where the page goes")
    add_device(p)
    args = p.parse_args(argv)
    args.device = pick_device(args.device)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    text = page(args)
    save_atomically(lambda path: path.write_text(text, encoding="utf-8", errors="replace"), args.out)
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
