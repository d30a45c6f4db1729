"""How long a phone takes for the packages of export_coreml.py, and what can be known of that without one.

    python latency.py build/ --out mac.json             # on a Mac: load and predict times; elsewhere: see below
    python latency.py build/ --device iphone --team ABCDE12345 --out iphone.json    # the iPhone plugged into this Mac
    python latency.py --compare mac.json iphone.json    # reports side by side, beside the paper's numbers
    python latency.py build/ --swift > Latency.swift    # the same measurement inside an app

On a Mac and on an iPhone coremltools times the packages on the device itself: the first load apart (it compiles for
the neural engine, which can take minutes), later loads, and the median of n predictions after a warm-up, for each
compute unit. Core ML also tells where it would run each operation, and what falls off the neural engine
(coreml/phone.py). The phone needs a Mac with Xcode, an iPhone with iOS 18 or newer (17.4 for packages of --target
iOS17) in developer mode, and a signing team (--team). When it goes in the middle, what was measured is kept.

Where there is no Core ML, nothing here pretends to be a phone: `latency_ms` is null, and the report tells what the
program itself says (multiply-accumulates, operations, bytes of weights, peak bytes of activations).

It ends in words; --out writes the report as JSON, --json prints it as the last line. A report of times, which
--compare reads whoever wrote it (the page in web/ does), has

    "device", "os"                 what was timed: "iPhone 16 Pro", "iOS 18.1"
    "coremltools"                  its version, or what ran in its place
    "precision", "nbits"           of the networks: "float16", 16
    "latent_sizes", "batch"        [8], 1
    "iterations"                   {"predict": predictions, "load": loads after the first}
    "packages"                     {part: hash of its file}; parts are text_encoder, unet, decoder
    "parts"                        {part: {unit: {"first_load", "load", "predict"}}} in milliseconds, or {"error": why}
    "stopped"                      null, or why the measurement ended early
"""

import asyncio
import collections
import json
import sys
from pathlib import Path

import torch

from common.arguments import Parser, integer, real
from common.checkpoint import save_json
from common.device import describe_machine
from common.encoders import hash_folders
from coreml import mil_interpreter as mil
from coreml import phone as phones
from coreml.costs import activation_bytes, macs
from coreml.mil_interpreter import ct
from coreml.package import weight_bytes
from coreml.pipeline import PARTS

SWIFT = Path(__file__).parent / "coreml" / "swift" / "Latency.swift"
# The paper's milliseconds: a step of the UNet and the decoder on iPhone 16 Pro Max; Table 2: the decoder on iPhone 15 Pro.
PAPER = {
    "unet": "274 (iPhone 16 Pro Max)",
    "decoder": "119 (iPhone 16 Pro Max), 174 (iPhone 15 Pro)",
    "text_encoder": "",
}
TIMES = {"first_load": 12, "load": 10, "predict": 10}  # and the width of their column


def has_core_ml():
    return sys.platform == "darwin"


def parts_in(folder):
    parts = [part for part in PARTS if (folder / f"{part}.mlpackage").is_dir()]
    if not parts or not (folder / "pipeline.json").is_file():
        raise SystemExit(f"{folder} holds no packages: export_coreml.py --out {folder} writes them.")
    return parts


def plan_in(folder):
    return json.loads((folder / "pipeline.json").read_text(encoding="utf-8-sig"))


def describe_packages(folder, n, loads):
    """What has to be equal for two reports to be about the same thing: packages, by their hash, and how they were timed."""
    plan = plan_in(folder)
    return {
        "packages": {part: hash_folders([folder / f"{part}.mlpackage" / "Data"]) for part in parts_in(folder)},
        "precision": "float16",
        "nbits": plan["nbits"],
        "latent_sizes": plan["latent_sizes"],
        "batch": plan.get("batch"),
        "steps": plan.get("steps"),
        "coremltools": ct.__version__,
        "iterations": {"predict": n, "load": loads},
    }


def print_times(report):
    print(f"\n{title(report)}; milliseconds")
    print(f"{'part':14}{'unit':15}{'first load':>12}{'load':>10}{'predict':>10}   the paper, a prediction")
    for part, units in report["parts"].items():
        for unit, times in units.items():
            numbers = "".join(milliseconds(times, name, width) for name, width in TIMES.items())
            print(f"{part:14}{unit:15}{numbers}   {times.get('error', PAPER[part])}")
    for part, plan in report["plans"].items():
        if "error" in plan:
            print(f"\n{part}: Core ML tells no plan: {plan['error']}")
        elif plan:
            phones.print_plan(part, plan)
    print()
    fastest = {}  # {part: (milliseconds, unit)}
    for part, units in report["parts"].items():
        found = [(times["predict"], unit) for unit, times in units.items() if "predict" in times and "error" not in times]
        if found:
            fastest[part] = min(found)
            print(f"{part} is fastest on the {fastest[part][1]}: {fastest[part][0]:.2f} ms a prediction.")
    if len(fastest) == len(PARTS) and report["steps"]:
        text, unet, decoder = (fastest[part][0] for part in PARTS)
        report["picture_ms"] = text + report["steps"] * unet + decoder
        print(f"One picture in {report['steps']} steps, each part on its fastest unit: {report['picture_ms']:.0f} ms "
              "(the paper: 1200 in 4 steps, 2300 in 8).")  # fmt: skip


def milliseconds(times, name, width):
    return f"{times[name]:{width}.{2 if name == 'predict' else 1}f}" if name in times else f"{'-':>{width}}"


def title(report):
    sides = " and ".join(f"{side}x{side}" for side in report["latent_sizes"])
    counts = report["iterations"]
    return (f"{report['device']}, {report['os']}: {sides} latents, {report['precision']}, weights of {report['nbits']} "
            f"bits, coremltools {report['coremltools']}, {counts['predict']} predictions, {counts['load']} loads")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# Reports side by side


def read_report(file):
    """A report of times, see the top of this file. Raises SystemExit if it is none."""
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        title(report), report["parts"].items(), report["packages"].items()
        return report
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = {OSError: "it cannot be read", ValueError: "it is not JSON"}
        why = next((words for kind, words in why.items() if isinstance(error, kind)), "it has no times")
        raise SystemExit(f"{file} is no report of times, such as latency.py --out writes on a Mac ({why}).") from error


def compare(files):
    """Reports side by side, beside the paper's numbers; what makes them hard to compare is said."""
    reports = [read_report(file) for file in files]
    letters = [chr(ord("A") + i) for i in range(len(reports))]
    for letter, file, report in zip(letters, files, reports, strict=True):
        stopped = f"; not whole: {report['stopped']}" if report.get("stopped") else ""
        print(f"{letter}  {file}: {title(report)}{stopped}")
    columns = "".join(f"{letter:>12}" for letter in letters)
    print(f"\n{'milliseconds':14}{'unit':15}{'':12}{columns}   the paper, a prediction")
    rows = dict.fromkeys((part, unit) for r in reports for part, units in r["parts"].items() for unit in units)
    for part, unit in rows:
        found = [report["parts"].get(part, {}).get(unit, {}) for report in reports]
        for name in TIMES:
            if any(name in times for times in found):
                numbers = "".join(milliseconds(times, name, 12) for times in found)
                paper = PAPER.get(part, "") if name == "predict" else ""
                print(f"{part:14}{unit:15}{name.replace('_', ' '):12}{numbers}   {paper}".rstrip())
    print()
    for part in dict.fromkeys(part for report in reports for part in report["packages"]):
        hashes = [str(report["packages"].get(part)) for report in reports]
        if len(set(hashes)) > 1:
            print(f"{part}: not the same package ({', '.join(hashes)})")
    for what in ("latent_sizes", "precision", "nbits", "batch", "coremltools", "iterations"):
        values = [json.dumps(report.get(what)) for report in reports]
        if len(set(values)) > 1:
            print(f"{what.replace('_', ' ')}: {', '.join(values)}")
    if any(report["latent_sizes"] != [128] for report in reports):
        print("the paper's numbers are for 128x128 latents, a UNet of 379 M parameters and a decoder of 1.38 M")


# --------------------------------------------------------------------------------------------------------------
# Anywhere: what the program itself says


def report_programs(folder):
    """{part: {"macs", "operations", "weight_bytes", "peak_activation_bytes", "latency_ms": None}}, printed."""
    plan, report = plan_in(folder), {}
    print(f"{'part':14}{'GMACs':>9}{'ops':>7}{'weights MB':>12}{'peak activations MB':>21}{'latency ms':>12}")
    for part in parts_in(folder):
        path = folder / f"{part}.mlpackage"
        # of a package for several latent sizes the first is looked at
        function = "main" if part == "text_encoder" else plan["functions"][str(plan["latent_sizes"][0])]
        program = mil.read_package(path)
        ops = mil.operations(program, function)
        report[part] = found = {
            "macs": sum(map(macs, ops)), "operations": len(ops), "weight_bytes": weight_bytes(path),
            "peak_activation_bytes": activation_bytes(program, function), "latency_ms": None,
        }  # fmt: skip
        common = ", ".join(f"{n} {kind}" for kind, n in collections.Counter(op.op_type for op in ops).most_common(4))
        print(f"{part:14}{found['macs'] / 1e9:9.3f}{len(ops):7}{found['weight_bytes'] / 1e6:12.2f}"
              f"{found['peak_activation_bytes'] / 1e6:21.2f}{'null':>12}   {common}")  # fmt: skip
    if len(report) == len(PARTS) and plan.get("steps"):
        times = {"text_encoder": 1, "unet": plan["steps"], "decoder": 1}
        total = sum(times[part] * found["macs"] for part, found in report.items())
        weights = sum(found["weight_bytes"] for found in report.values())
        print(f"\nA picture in {plan['steps']} steps takes {total / 1e9:.2f} billion multiplications, "
              f"with {weights / 1e6:.1f} MB of weights.")  # fmt: skip
    print("How many milliseconds that is, only a device can say: on a Mac the same command times it.")
    return report


def parse_arguments(argv=None):
    p = Parser(__doc__, "python latency.py build/")
    p.add_argument("folder", metavar="DIR", type=Path, nargs="?", help="packages of export_coreml.py, such as build/")
    # on a Mac
    p.add_argument("--device", choices=("mac", "iphone"), default="mac", help="where to time, from a Mac")
    p.add_argument("--phone", metavar="NAME", help="which iPhone, if several are connected: its name in Xcode")
    p.add_argument("--team", help="Apple development team that signs the runner, for --device iphone")
    p.add_argument("--bundle", default="org.example.modelrunner", help="bundle identifier of the runner on the iPhone")
    p.add_argument("--n", type=integer(1), default=20, help="predictions whose median is reported")
    p.add_argument("--loads", type=integer(1), default=3, help="loads after the first whose median is reported")
    p.add_argument("--patience", type=real(above=0), default=1800, metavar="S", help="seconds to wait for an answer")
    # something else instead
    p.add_argument("--swift", action="store_true", help="print a Swift file that measures inside an app")
    p.add_argument("--compare", nargs="+", metavar="FILE", help="print reports of --out side by side, measure nothing")
    # writing
    p.add_argument("--out", metavar="FILE", help="write the report here, as JSON")
    p.add_argument("--json", action="store_true", help="print the report as the last line, as JSON")
    args = p.parse_args(argv)
    if args.folder is None and not args.compare:
        p.error("the following arguments are required: DIR, or --compare with reports")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.compare:
        return compare(args.compare)
    parts = parts_in(args.folder)
    if args.swift:
        swift = SWIFT.read_text(encoding="utf-8-sig")
        print(swift.replace('["text_encoder", "unet", "decoder"]', json.dumps(parts)), end="")
        return None
    about = describe_packages(args.folder, args.n, args.loads)
    report = {"machine": describe_machine(torch.device("cpu")), **about}

    def save():
        if args.out:
            save_json(report, args.out)

    if has_core_ml():
        if len(report["latent_sizes"]) > 1:
            raise SystemExit(f"{args.folder} has a function for each of several latent sizes, and coremltools times only "
                             "packages for one: export one size for this.")  # fmt: skip
        packages = {part: args.folder / f"{part}.mlpackage" for part in parts}
        iphone = args.device == "iphone"
        phone = phones.find(args.phone, args.team, args.bundle, args.patience) if iphone else None
        asyncio.run(phones.measure(packages, phone, args.n, args.loads, args.patience, report, save))
        print_times(report)
    elif args.device == "iphone":
        raise SystemExit("an iPhone can be timed from a Mac only; without --device iphone this machine tells what it can.")
    else:
        print("A phone cannot be timed on this machine: no Core ML. What the programs themselves say:")
        report["programs"] = report_programs(args.folder)
    save()
    if args.out:
        print(f"wrote {args.out}")
    if args.json:
        print(json.dumps(report))
    if report.get("stopped"):
        kept = f"; {args.out} has what was measured before." if args.out else ": what was measured before stands above."
        raise SystemExit(f"{report['stopped']}{kept}")


if __name__ == "__main__":
    main()
