"""How long a phone takes for the packages of export_coreml.py, and what can be known of that without one.

    python latency.py build/ --out mac.json                         # on a Mac: load and predict times; elsewhere: see below
    python latency.py build/ --device iphone --team ABCDE12345 --out iphone.json     # on the iPhone that is plugged into this Mac
    python latency.py --compare mac.json iphone.json                # reports side by side, beside the paper's numbers
    python latency.py build/ --swift > Latency.swift                # the same measurement inside an app

On a Mac and on an iPhone coremltools times the packages on the device itself: the first load apart (it compiles for the neural
engine, which can take minutes), later loads, and the median of n predictions after a warm-up, for each compute unit. Core ML also
tells where it would run each operation, and what falls off the neural engine (coreml/plan.py). The phone needs a Mac with Xcode,
an iPhone with iOS 18 or newer (17.4 for packages of --target iOS17) in developer mode, and a signing team (--team). When it goes in
the middle, what was measured is kept and reported.

Where there is no Core ML, nothing here pretends to be a phone: `latency_ms` is null, and the report tells what the program itself
says (multiply-accumulates, operations, bytes of weights, peak bytes of activations).
"""

import asyncio
import collections
import contextlib
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from common.arguments import Parser, integer, real
from common.checkpoint import save_json
from common.device import describe_machine
from common.encoders import hash_folders
from coreml import mil_interpreter as mil
from coreml import phone as phones
from coreml import plan as plans
from coreml.costs import activation_bytes, macs
from coreml.mil_interpreter import ct
from coreml.phone import LostPhone, watched
from coreml.pipeline import PARTS

SWIFT = Path(__file__).parent / "coreml" / "swift" / "Latency.swift"
UNITS = {"neural engine": "CPU_AND_NE", "GPU": "CPU_AND_GPU", "CPU": "CPU_ONLY"}
# The paper's milliseconds: a step of the UNet and the decoder on iPhone 16 Pro Max; Table 2 has the decoder on iPhone 15 Pro.
PAPER = {
    "unet": "274 (iPhone 16 Pro Max)",
    "decoder": "119 (iPhone 16 Pro Max), 174 (iPhone 15 Pro)",
    "text_encoder": "",
}
TIMES = ("first_load", "load", "predict")


# ------------------------------------------------------------------------------------------------------------------
# On a Mac, or from a Mac on an iPhone


def has_core_ml():
    return sys.platform == "darwin"


async def time_package(path, unit, phone, args, times):
    """Fill `times` with milliseconds of one package on one compute unit, one by one, so that they outlive a lost phone.

    times: {"first_load", "load" and "load_samples", "predict" and "predict_samples"}.
    """
    from coremltools.models.ml_program.experimental import perf_utils

    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[unit], skip_model_load=True)
    benchmarker = perf_utils.MLModelBenchmarker(model, device=phone)

    def keep(name, measurement):
        times.setdefault(f"{name}_samples", []).extend(measurement.samples)
        times[name] = statistics.median(times[f"{name}_samples"])

    times["first_load"] = (await watched(benchmarker.benchmark_load(iterations=1), phone, args.patience)).samples[0]
    for _ in range(args.loads):
        keep("load", await watched(benchmarker.benchmark_load(iterations=1), phone, args.patience))
    for i in range(args.n):
        work = benchmarker.benchmark_predict(iterations=1, warmup=i == 0)
        keep("predict", await watched(work, phone, args.patience))


async def measure(folder, args, report):
    """Every part on every compute unit, into report["parts"][part][unit], and Core ML's plans into report["plans"].

    A unit that fails is told, not hidden, and the others go on. A phone that is gone ends it: report["stopped"] says so.
    The report is written to --out after every unit.
    """
    phone = await phones.find(args) if args.device == "iphone" else None
    report |= describe_device(phone) | {"parts": {}, "plans": {}, "stopped": None}
    try:
        for part in parts_in(folder):
            report["parts"][part], path = {}, folder / f"{part}.mlpackage"
            for name, unit in UNITS.items():
                print(f"{part} on the {name} (the first load may take minutes)", flush=True)
                times = report["parts"][part][name] = {}
                with told(times, args):
                    await time_package(path, unit, phone, args, times)
                save(report, args)
            report["plans"][part] = {}
            with told(report["plans"][part], args):
                rows = await watched(plans.ask(path, UNITS["neural engine"], phone), phone, args.patience)
                report["plans"][part] = plans.summary(rows)
    except LostPhone as error:
        report["stopped"] = str(error)


@contextlib.contextmanager
def told(entry, args):
    """What goes wrong with one unit, as entry["error"]: it says nothing about the others. A lost phone does."""
    try:
        yield
    except LostPhone as error:
        entry["error"] = str(error)
        raise
    except TimeoutError:
        entry["error"] = f"nothing came back within {args.patience:.0f} s: try --patience"
    except Exception as error:
        entry["error"] = phones.words(error)


def describe_device(phone):
    """{"device", "os"} of the phone, or of this Mac."""
    if phone is not None:
        return {"device": phones.model_of(phone), "os": f"iOS {phone.os_version} ({phone.os_build_number})"}
    try:
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=10)
        chip = asked.stdout.strip() if asked.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        chip = ""
    return {"device": f"this Mac, {chip or platform.machine()}", "os": f"macOS {platform.mac_ver()[0]}"}


def describe_packages(folder, args):
    """What has to be equal for two reports to be about the same thing: packages, by their hash, and how they were timed."""
    plan = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    return {
        "packages": {part: hash_folders([folder / f"{part}.mlpackage" / "Data"]) for part in parts_in(folder)},
        "precision": "float16", "nbits": plan["nbits"], "latent_sizes": plan["latent_sizes"], "batch": plan.get("batch"),
        "steps": plan.get("steps"), "coremltools": ct.__version__, "iterations": {"predict": args.n, "load": args.loads},
    }  # fmt: skip


def save(report, args):
    if args.out:
        save_json(report, args.out)


def parts_in(folder):
    parts = [part for part in PARTS if (folder / f"{part}.mlpackage").is_dir()]
    if not parts or not (folder / "pipeline.json").is_file():
        raise SystemExit(f"{folder} holds no packages: export_coreml.py --out {folder} writes them.")
    return parts


def function_of(plan, part):
    """The function that is looked at: of a package for several latent sizes that of the first."""
    return "main" if part == "text_encoder" else plan["functions"][str(plan["latent_sizes"][0])]


def print_times(report):
    print(f"\n{title(report)}; milliseconds")
    print(f"{'part':14}{'unit':15}{'first load':>12}{'load':>10}{'predict':>10}   the paper, a prediction")
    for part, units in report["parts"].items():
        for unit, times in units.items():
            numbers = "".join(milliseconds(times, name, width) for name, width in zip(TIMES, (12, 10, 10), strict=True))
            print(f"{part:14}{unit:15}{numbers}   {times.get('error', PAPER[part])}")
    fastest = {part: min((t["predict"] for t in units.values() if "predict" in t and "error" not in t), default=None)
               for part, units in report["parts"].items()}  # fmt: skip
    if len(fastest) == len(PARTS) and None not in fastest.values() and report["steps"]:
        report["picture_ms"] = fastest["text_encoder"] + report["steps"] * fastest["unet"] + fastest["decoder"]
        print(f"one picture in {report['steps']} steps, each part on its fastest unit: {report['picture_ms']:.0f} ms "
              "(the paper: 1200 in 4 steps, 2300 in 8)")  # fmt: skip
    for part, plan in report["plans"].items():
        if "error" in plan:
            print(f"\n{part}: Core ML tells no plan: {plan['error']}")
        elif plan:
            plans.print_plan(part, plan)


def milliseconds(times, name, width):
    return f"{times[name]:{width}.{2 if name == 'predict' else 1}f}" if name in times else f"{'-':>{width}}"


def title(report):
    sides = " and ".join(f"{side}x{side}" for side in report["latent_sizes"])
    counts = report["iterations"]
    return (f"{report['device']}, {report['os']}: {sides} latents, {report['precision']}, weights of {report['nbits']} bits, "
            f"coremltools {report['coremltools']}, {counts['predict']} predictions, {counts['load']} loads")  # fmt: skip


def compare(files):
    """Reports of `--out`, side by side, beside the paper's numbers; what makes them hard to compare is said."""
    reports = []
    for file in files:
        try:
            report = json.loads(Path(file).read_text(encoding="utf-8"))
            title(report), report["parts"].items(), report["packages"].items()
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = {OSError: "it cannot be read", ValueError: "it is not JSON"}
            why = next((words for kind, words in why.items() if isinstance(error, kind)), "it has no times")
            raise SystemExit(f"{file} is no report of times that latency.py --out wrote on a Mac ({why}).") from error
        reports.append(report)
    letters = [chr(ord("A") + i) for i in range(len(reports))]
    for letter, file, report in zip(letters, files, reports, strict=True):
        print(f"{letter}  {file}: {title(report)}" + (f"; not whole: {report['stopped']}" if report.get("stopped") else ""))
    columns = "".join(f"{letter:>12}" for letter in letters)
    print(f"\n{'milliseconds':14}{'unit':15}{'':12}{columns}   the paper, a prediction")
    rows = dict.fromkeys((part, unit) for report in reports for part, units in report["parts"].items() for unit in units)
    for part, unit in rows:
        found = [report["parts"].get(part, {}).get(unit, {}) for report in reports]
        for name in TIMES:
            if any(name in times for times in found):
                numbers = "".join(milliseconds(times, name, 12) for times in found)
                paper = PAPER[part] if name == "predict" else ""
                print(f"{part:14}{unit:15}{name.replace('_', ' '):12}{numbers}   {paper}".rstrip())
    print()
    for part in dict.fromkeys(part for report in reports for part in report["packages"]):
        if len({report["packages"].get(part) for report in reports}) > 1:
            print(f"{part}: not the same package ({', '.join(str(report['packages'].get(part)) for report in reports)})")
    for what in ("latent_sizes", "precision", "nbits", "batch", "coremltools", "iterations"):
        if len({json.dumps(report.get(what)) for report in reports}) > 1:
            print(f"{what.replace('_', ' ')}: {', '.join(json.dumps(report.get(what)) for report in reports)}")
    if any(report["latent_sizes"] != [128] for report in reports):
        print("the paper's numbers are for 128x128 latents, a UNet of 379 M parameters and a decoder of 1.38 M")


# ------------------------------------------------------------------------------------------------------------------
# Anywhere: what the program itself says


def report_programs(folder):
    """{part: {"macs", "operations", "weight_bytes", "peak_activation_bytes", "latency_ms": None}}, printed as a table."""
    plan, report = json.loads((folder / "pipeline.json").read_text(encoding="utf-8")), {}
    print(f"{'part':14}{'GMACs':>9}{'ops':>7}{'weights MB':>12}{'peak activations MB':>21}{'latency ms':>12}")
    for part in parts_in(folder):
        path, function = folder / f"{part}.mlpackage", function_of(plan, part)
        program = mil.read_package(path)
        ops = mil.operations(program, function)
        weights = sum(p.stat().st_size for p in path.rglob("weight.bin"))
        report[part] = {"macs": sum(map(macs, ops)), "operations": len(ops), "weight_bytes": weights,
                        "peak_activation_bytes": activation_bytes(program, function), "latency_ms": None}  # fmt: skip
        common = ", ".join(f"{n} {kind}" for kind, n in collections.Counter(op.op_type for op in ops).most_common(4))
        print(f"{part:14}{report[part]['macs'] / 1e9:9.3f}{len(ops):7}{weights / 1e6:12.2f}"
              f"{report[part]['peak_activation_bytes'] / 1e6:21.2f}{'null':>12}   {common}")  # fmt: skip
    return report


def parse_arguments(argv=None):
    p = Parser(__doc__, "python latency.py build/")
    p.add_argument("folder", metavar="DIR", type=Path, nargs="?", help="packages of export_coreml.py, such as build/")
    p.add_argument("--device", choices=("mac", "iphone"), default="mac", help="where to time, from a Mac")
    p.add_argument("--phone", metavar="NAME", help="which iPhone, if several are connected: its name, as Xcode shows it")
    p.add_argument("--team", help="Apple development team that signs the runner, for --device iphone")
    p.add_argument("--bundle", default="org.example.modelrunner", help="bundle identifier of the runner, for --device iphone")
    p.add_argument("--n", type=integer(1), default=20, help="predictions whose median is reported")
    p.add_argument("--loads", type=integer(1), default=3, help="loads after the first whose median is reported")
    p.add_argument("--patience", type=real(above=0), default=1800, metavar="S", help="seconds to wait for an answer of the phone")
    p.add_argument("--swift", action="store_true", help="print a Swift file that measures inside an app")
    p.add_argument("--compare", nargs="+", metavar="FILE", help="print reports of --out side by side, and measure nothing")
    p.add_argument("--out", metavar="FILE", help="also write the JSON object here")
    args = p.parse_args(argv)
    if args.folder is None and not args.compare:
        p.error("the following arguments are required: DIR, or --compare with reports")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.compare:
        compare(args.compare)
        return
    parts = parts_in(args.folder)
    if args.swift:
        print(SWIFT.read_text(encoding="utf-8").replace('["text_encoder", "unet", "decoder"]', json.dumps(parts)), end="")
        return
    report = {"machine": describe_machine(torch.device("cpu")), **describe_packages(args.folder, args)}
    if has_core_ml():
        if len(report["latent_sizes"]) > 1:
            raise SystemExit(f"{args.folder} has a function for each of several latent sizes, and coremltools times only packages "
                             "for one: export one size for this.")  # fmt: skip
        asyncio.run(measure(args.folder, args, report))
        print_times(report)
    elif args.device == "iphone":
        raise SystemExit("an iPhone can be timed from a Mac only; without --device iphone this machine tells what it can.")
    else:
        print("A phone cannot be timed on this machine: no Core ML. What the programs themselves say:")
        report["programs"] = report_programs(args.folder)
    save(report, args)
    print(json.dumps(report))
    if report.get("stopped"):
        kept = f"; {args.out} has what was measured before." if args.out else ": what was measured before stands above."
        raise SystemExit(f"{report['stopped']}{kept}")


if __name__ == "__main__":
    main()
