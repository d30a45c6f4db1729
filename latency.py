"""How long a phone takes for the packages of export_coreml.py, and what can be known of that without one.

    python latency.py build/                                        # on a Mac: load and predict times; elsewhere: see below
    python latency.py build/ --device iphone --team ABCDE12345      # on the iPhone that is plugged into this Mac
    python latency.py build/ --swift > Latency.swift                # the same measurement inside an app

On a Mac and on an iPhone coremltools times the packages on the device itself: the first load apart (it compiles for the neural
engine, which can take minutes), later loads, and the median of n predictions after a warm-up, for each compute unit. The phone
needs a Mac with Xcode, an iPhone with iOS 17.4 or newer in developer mode, and a signing team (--team).

Where there is no Core ML, nothing here pretends to be a phone: `latency_ms` is null, and the report tells what the program itself
says (multiply-accumulates, operations, bytes of weights, peak bytes of activations).
"""

import asyncio
import collections
import json
import math
import platform
import statistics
import sys
from pathlib import Path

import torch

from common.arguments import Parser, integer, real
from common.checkpoint import save_json
from common.device import describe_machine
from coreml import mil_interpreter as mil
from coreml.costs import activation_bytes, macs
from coreml.mil_interpreter import ct
from coreml.pipeline import PARTS

SWIFT = Path(__file__).parent / "coreml" / "swift" / "Latency.swift"
UNITS = {"neural engine": "CPU_AND_NE", "GPU": "CPU_AND_GPU", "CPU": "CPU_ONLY"}
# The paper's milliseconds: a step of the UNet and the decoder on iPhone 16 Pro Max; Table 2 has the decoder on iPhone 15 Pro.
PAPER = {
    "unet": "274 (iPhone 16 Pro Max)",
    "decoder": "119 (iPhone 16 Pro Max), 174 (iPhone 15 Pro)",
    "text_encoder": "",
}


# ------------------------------------------------------------------------------------------------------------------
# On a Mac, or from a Mac on an iPhone


def has_core_ml():
    return sys.platform == "darwin"


async def find_iphone(args):
    """The connected iPhone, with coremltools' model runner installed on it."""
    from coremltools.models.ml_program.experimental import remote_device  # complains where there is no Core ML

    # coremltools asks the phone 20 times, twice a second, and gives up; a first load for the neural engine takes minutes.
    remote_device._DeviceCtlRemoteService.__init__.__defaults__ = (0.5, math.ceil(args.patience / 0.5))
    try:
        phones = remote_device.Device.get_connected_devices(remote_device.DeviceType.IPHONE)
    except Exception as error:  # no Xcode, or one too old
        raise SystemExit(f"cannot look for an iPhone: {error}. Xcode and its command line tools are needed.") from error
    if not phones:
        raise SystemExit("no iPhone is connected: plug one in, unlock it, trust this Mac, and turn developer mode on.")
    if not args.team:
        raise SystemExit(
            "give --team, the ten letters of your Apple development team: the runner on the phone must be signed."
        )
    credentials = remote_device.AppSigningCredentials(development_team=args.team, bundle_identifier=args.bundle)
    try:
        return await phones[0].prepare_for_model_debugging(credentials=credentials)
    except Exception as error:
        raise SystemExit(f"the runner could not be put on {phones[0].name}: {error}") from error


async def time_package(path, unit, device, args):
    """Milliseconds of one package on one compute unit: {"first_load", "load", "predict", "predict_samples"}."""
    from coremltools.models.ml_program.experimental import perf_utils

    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[unit], skip_model_load=True)
    benchmarker = perf_utils.MLModelBenchmarker(model, device=device)
    loads = await asyncio.wait_for(benchmarker.benchmark_load(iterations=1 + args.loads), args.patience)
    predictions = await asyncio.wait_for(benchmarker.benchmark_predict(iterations=args.n, warmup=True), args.patience)
    return {"first_load": loads.samples[0], "load": statistics.median(loads.samples[1:]),
            "predict": predictions.statistics.median, "predict_samples": predictions.samples}  # fmt: skip


async def measure(folder, args):
    """Every part on every compute unit: {"device", "os", "parts": {part: {unit: times}}}. A unit that fails is told, not hidden."""
    plan = json.loads((folder / "pipeline.json").read_text())
    if len(plan["latent_sizes"]) > 1:
        raise SystemExit(
            f"{folder} has a function for each of several latent sizes, and coremltools times only packages for one: "
            "export one size for this."
        )
    device = await find_iphone(args) if args.device == "iphone" else None
    mac = {"device": f"this Mac, {platform.machine()}", "os": f"macOS {platform.mac_ver()[0]}"}
    report = {
        **(mac if device is None else {"device": device.name, "os": device.os_version}),
        "nbits": plan["nbits"],
        "parts": {},
    }
    for part in parts_in(folder):
        report["parts"][part] = {}
        for name, unit in UNITS.items():
            print(f"{part} on the {name} (the first load may take minutes)", flush=True)
            try:
                times = await time_package(folder / f"{part}.mlpackage", unit, device, args)
            except TimeoutError:
                times = {"error": f"nothing came back within {args.patience} s: try --patience"}
            except Exception as error:  # one unit that cannot run a part says nothing about the others
                times = {"error": str(error)}
            report["parts"][part][name] = times
    return report


def parts_in(folder):
    parts = [part for part in PARTS if (folder / f"{part}.mlpackage").is_dir()]
    if not parts or not (folder / "pipeline.json").is_file():
        raise SystemExit(f"{folder} holds no packages: export_coreml.py --out {folder} writes them.")
    return parts


def function_of(plan, part):
    """The function that is looked at: of a package for several latent sizes that of the first."""
    return "main" if part == "text_encoder" else plan["functions"][str(plan["latent_sizes"][0])]


def print_times(report, plan):
    print(f"\n{report['device']}, {report['os']}, float16, weights of {report['nbits']} bits; milliseconds")
    print(f"{'part':14}{'unit':15}{'first load':>12}{'load':>9}{'predict':>9}   the paper, a prediction")
    for part, units in report["parts"].items():
        for unit, times in units.items():
            if "error" in times:
                print(f"{part:14}{unit:15}{times['error']}")
            else:
                print(
                    f"{part:14}{unit:15}{times['first_load']:12.1f}{times['load']:9.1f}{times['predict']:9.2f}   {PAPER[part]}"
                )
    fastest = {part: min((t["predict"] for t in units.values() if "predict" in t), default=None)
               for part, units in report["parts"].items()}  # fmt: skip
    if len(fastest) == len(PARTS) and None not in fastest.values() and "steps" in plan:
        whole = fastest["text_encoder"] + plan["steps"] * fastest["unet"] + fastest["decoder"]
        report["picture_ms"] = whole
        print(f"one picture in {plan['steps']} steps, each part on its fastest unit: {whole:.0f} ms "
              "(the paper: 1200 in 4 steps, 2300 in 8)")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# Anywhere: what the program itself says


def report_programs(folder):
    """{part: {"macs", "operations", "weight_bytes", "peak_activation_bytes", "latency_ms": None}}, printed as a table."""
    plan, report = json.loads((folder / "pipeline.json").read_text()), {}
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
    p.add_argument("folder", metavar="DIR", type=Path, help="packages of export_coreml.py, such as build/")
    p.add_argument("--device", choices=("mac", "iphone"), default="mac", help="where to time, from a Mac")
    p.add_argument("--team", help="Apple development team that signs the runner, for --device iphone")
    p.add_argument("--bundle", default="org.example.modelrunner", help="bundle identifier of the runner, for --device iphone")
    p.add_argument("--n", type=integer(1), default=20, help="predictions whose median is reported")
    p.add_argument("--loads", type=integer(1), default=3, help="loads after the first whose median is reported")
    p.add_argument("--patience", type=real(above=0), default=1800, metavar="S", help="seconds to wait for an answer of the phone")
    p.add_argument("--swift", action="store_true", help="print a Swift file that measures inside an app")
    p.add_argument("--out", metavar="FILE", help="also write the JSON object here")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    parts = parts_in(args.folder)
    if args.swift:
        print(SWIFT.read_text().replace('["text_encoder", "unet", "decoder"]', json.dumps(parts)), end="")
        return
    report = {"machine": describe_machine(torch.device("cpu"))}
    plan = json.loads((args.folder / "pipeline.json").read_text())
    if has_core_ml():
        report |= asyncio.run(measure(args.folder, args))
        print_times(report, plan)
    elif args.device == "iphone":
        raise SystemExit("an iPhone can be timed from a Mac only; without --device iphone this machine tells what it can.")
    else:
        print("A phone cannot be timed on this machine: no Core ML. What the programs themselves say:")
        report["programs"] = report_programs(args.folder)
    if args.out:
        save_json(report, args.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
