"""How long a phone takes for the packages of export_coreml.py, and what can be known of that without one.

    python latency.py build/                                        # on a Mac: load and predict times; elsewhere: see below
    python latency.py build/ --device iphone --team ABCDE12345      # on the iPhone that is plugged into this Mac
    python latency.py --ladder                                      # any machine: ladder a to f, our decoder beside SD3's
    python latency.py build/ --swift > Latency.swift                # the same measurement inside an app

On a Mac and on an iPhone coremltools times the packages on the device itself: the first load apart (it compiles for the neural
engine, which can take minutes), later loads, and the median of n predictions after a warm-up, for each compute unit. The phone
needs a Mac with Xcode, an iPhone with iOS 17.4 or newer in developer mode, and a signing team (--team).

Where there is no Core ML, nothing here pretends to be a phone: `latency_ms` is null, and the report tells what the program itself
says (multiply-accumulates, operations, bytes of weights, peak bytes of activations).
"""

import argparse
import asyncio
import collections
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import HelpFormatter, describe_machine, save_json
from coreml import mil_interpreter as mil
from coreml.mil_interpreter import ct
from decoder_studies import run_alone
from model import LADDER, UNet, ladder

PARTS = ("text_encoder", "unet", "decoder")
UNITS = {"neural engine": "CPU_AND_NE", "GPU": "CPU_AND_GPU", "CPU": "CPU_ONLY"}
# The paper's milliseconds: a step of the UNet and the decoder on iPhone 16 Pro Max; Table 2 has the decoder on iPhone 15 Pro.
PAPER = {
    "unet": "274 (iPhone 16 Pro Max)",
    "decoder": "119 (iPhone 16 Pro Max), 174 (iPhone 15 Pro)",
    "text_encoder": "",
}
PAPER_LADDER = {"b": "-24 %", "c1": "-62 %", "c2": "2.4x faster than b", "d2": "-9 %"}  # Sec. 3.1, Fig. 3


# ------------------------------------------------------------------------------------------------------------------
# On a Mac, or from a Mac on an iPhone


def has_core_ml():
    return sys.platform == "darwin"


async def find_iphone(args):
    """The connected iPhone, with coremltools' model runner installed on it."""
    from coremltools.models.ml_program.experimental import remote_device
    from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials, Device, DeviceType

    # coremltools asks the phone 20 times, twice a second, and gives up; a first load for the neural engine takes minutes.
    remote_device._DeviceCtlRemoteService.__init__.__defaults__ = (0.5, math.ceil(args.patience / 0.5))
    try:
        phones = Device.get_connected_devices(DeviceType.IPHONE)
    except Exception as error:  # no Xcode, or one too old
        raise SystemExit(f"cannot look for an iPhone: {error}. Xcode and its command line tools are needed.") from error
    if not phones:
        raise SystemExit("no iPhone is connected: plug one in, unlock it, trust this Mac, and turn developer mode on.")
    if not args.team:
        raise SystemExit(
            "give --team, the ten letters of your Apple development team: the runner on the phone must be signed."
        )
    credentials = AppSigningCredentials(development_team=args.team, bundle_identifier=args.bundle)
    try:
        return await phones[0].prepare_for_model_debugging(credentials=credentials)
    except Exception as error:
        raise SystemExit(f"the runner could not be put on {phones[0].name}: {error}") from error


async def time_package(path, unit, device, args):
    """Milliseconds of one package on one compute unit: {"first_load", "load", "predict", "predict_samples"}."""
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[unit], skip_model_load=True)
    benchmarker = MLModelBenchmarker(model, device=device)
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


def macs(op):
    """Multiply-accumulates of one MIL operation; 0 for those without products of two tensors."""
    shape = op.outputs[0].shape
    if op.op_type == "conv":
        return int(np.prod(shape)) * int(np.prod(op.inputs["weight"].shape[1:]))
    if op.op_type == "linear":
        return int(np.prod(shape)) * op.inputs["weight"].shape[1]
    if op.op_type == "matmul":
        inner = op.inputs["x"].shape[-2 if op.inputs["transpose_x"].val else -1]
        return int(np.prod(shape)) * inner
    if op.op_type == "einsum":  # "bchq,bkhc->bkhq": every letter of both inputs once
        equation = op.inputs["equation"].val
        letters = {}
        for term, var in zip(equation.split("->")[0].split(","), op.inputs["values"], strict=True):
            letters |= dict(zip(term, var.shape, strict=True))
        return int(np.prod(list(letters.values())))
    if op.op_type == "scaled_dot_product_attention":
        query, key = op.inputs["query"].shape, op.inputs["key"].shape
        return 2 * int(np.prod(query)) * key[-2]
    return 0


def activation_bytes(program, function="main"):
    """The largest sum of bytes of all values that are alive at once, if each is dropped after its last reader."""
    ops = mil.operations(program, function)
    size = lambda var: int(np.prod(var.shape)) * mil.torch_type(var).itemsize  # noqa: E731
    last = {}
    for i, op in enumerate(ops):
        for value in op.inputs.values():
            last |= {var.name: i for var in (value if isinstance(value, list | tuple) else [value])}
    outputs = {var.name for var in program.functions[function].outputs}
    alive = {name: size(var) for name, var in program.functions[function].inputs.items()}
    peak = sum(alive.values())
    for i, op in enumerate(ops):
        if op.op_type.startswith("constexpr"):
            continue  # weights
        alive |= {var.name: size(var) for var in op.outputs}
        peak = max(peak, sum(alive.values()))
        for name in [name for name in alive if last.get(name, i) <= i and name not in outputs]:
            del alive[name]
    return peak


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


# ------------------------------------------------------------------------------------------------------------------
# Anywhere: the ladder and the decoders in PyTorch, as ratios beside the paper's


@torch.inference_mode()
def ladder_times(side, rounds):
    """{step: seconds of one forward of one latent (16, side, side)}, median of `rounds`; random weights, float32."""
    samples = {step: [] for step in LADDER}
    for _ in range(rounds):  # the steps take turns, so that a slow moment of the machine hits all alike
        for step, taken in samples.items():
            torch.manual_seed(0)
            net = UNet(ladder(step)).eval().to(memory_format=torch.channels_last)
            inputs = torch.randn(1, 16, side, side), torch.tensor([0.5]), torch.randn(1, 77, net.cfg.text_dim)
            for _ in range(2):  # the first forward warms up
                start = time.perf_counter()
                net(*inputs)
                seconds = time.perf_counter() - start
            taken.append(seconds)
            del net
    return {step: statistics.median(taken) for step, taken in samples.items()}


def report_ladder(args):
    """Print the ladder's and the decoders' times as ratios, and return them."""
    print(
        f"{describe_machine(torch.device('cpu'))}, float32, one latent of {args.latent} x {args.latent}, random weights"
    )
    seconds, before = ladder_times(args.latent, args.rounds), None
    print(f"{'step':6}{'ms':>9}{'change':>10}{'against a':>11}   the paper, on the phone")
    for step, value in seconds.items():
        change = "" if before is None else f"{100 * (value / before - 1):+.1f} %"
        print(f"{step:6}{1000 * value:9.1f}{change:>10}{value / seconds['a']:10.2f}x   {PAPER_LADDER.get(step, '')}")
        before = value
    print(f"c2 beside b: {seconds['b'] / seconds['c2']:.2f} times as fast (the paper: 2.4)")
    theirs, ours = (run_alone(name, args.latent)[0] for name in ("SD3", "SnapGen"))
    print(
        f"decoder: SD3's {theirs:.2f} s, ours {ours:.2f} s, {theirs / ours:.1f} times as fast (the paper's phone cannot hold SD3's)"
    )
    return {"ladder_seconds": seconds, "decoder_seconds": {"SD3": theirs, "SnapGen": ours}}


SWIFT = """\
// Latency.swift: times the packages of build/ inside an app. Add the three .mlpackage folders to an Xcode project with this
// file, run it in Release on the phone, and call `await printLatency()`. Printed by `python latency.py build/ --swift`.
import CoreML
import Foundation

func example(of description: MLModelDescription) throws -> MLFeatureProvider {
    var values: [String: MLFeatureValue] = [:]
    for (name, input) in description.inputDescriptionsByName {
        guard let constraint = input.multiArrayConstraint else { continue }
        let array = try MLMultiArray(shape: constraint.shape, dataType: constraint.dataType)
        for i in 0..<array.count { array[i] = constraint.dataType == .int32 ? 1 : NSNumber(value: Double.random(in: 0...1)) }
        values[name] = MLFeatureValue(multiArray: array)
    }
    return try MLDictionaryFeatureProvider(dictionary: values)
}

func median(_ values: [Double]) -> Double { values.sorted()[values.count / 2] }

func printLatency(rounds: Int = 20) async {
    let units: [(String, MLComputeUnits)] = [
        ("neural engine", .cpuAndNeuralEngine), ("GPU", .cpuAndGPU), ("CPU", .cpuOnly),
    ]
    let clock = ContinuousClock()
    func milliseconds(_ duration: Duration) -> Double {
        Double(duration.components.seconds) * 1e3 + Double(duration.components.attoseconds) / 1e15
    }
    for name in [PARTS] {
        guard let url = Bundle.main.url(forResource: name, withExtension: "mlmodelc") else {
            print("\\(name): not in the app"); continue
        }
        for (unitName, unit) in units {
            do {
                let configuration = MLModelConfiguration()
                configuration.computeUnits = unit
                var start = clock.now  // the first load compiles for the device
                var model = try await MLModel.load(contentsOf: url, configuration: configuration)
                let first = milliseconds(clock.now - start)
                start = clock.now
                model = try await MLModel.load(contentsOf: url, configuration: configuration)
                let load = milliseconds(clock.now - start)
                let input = try example(of: model.modelDescription)
                _ = try await model.prediction(from: input)  // warm-up
                var times: [Double] = []
                for _ in 0..<rounds {
                    start = clock.now
                    _ = try await model.prediction(from: input)
                    times.append(milliseconds(clock.now - start))
                }
                print("\\(name) \\(unitName): first load \\(first) ms, load \\(load) ms, predict \\(median(times)) ms")
            } catch {
                print("\\(name) \\(unitName): \\(error)")
            }
        }
    }
}
"""


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    p.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="packages of export_coreml.py, such as build/")
    p.add_argument("--device", choices=("mac", "iphone"), default="mac", help="where to time, from a Mac")
    p.add_argument("--team", help="Apple development team that signs the runner, for --device iphone")
    p.add_argument(
        "--bundle", default="org.example.modelrunner", help="bundle identifier of the runner, for --device iphone"
    )
    p.add_argument("--n", type=int, default=20, help="predictions whose median is reported")
    p.add_argument("--loads", type=int, default=3, help="loads after the first whose median is reported")
    p.add_argument(
        "--patience", type=float, default=1800, metavar="S", help="seconds to wait for an answer of the phone"
    )
    p.add_argument(
        "--ladder", action="store_true", help="time ladder a to f and both decoders in PyTorch on this machine"
    )
    p.add_argument("--latent", type=int, default=32, help="side of the latent for --ladder")
    p.add_argument("--rounds", type=int, default=5, help="forwards whose median is reported, for --ladder")
    p.add_argument("--swift", action="store_true", help="print a Swift file that measures inside an app")
    p.add_argument("--out", metavar="FILE", help="also write the JSON object here")
    args = p.parse_args(argv)
    for name in ("n", "loads", "rounds", "latent"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, not {getattr(args, name)}.")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.folder is None and (args.swift or not args.ladder):
        raise SystemExit("nothing to time: give the folder of export_coreml.py, such as build/, or --ladder.")
    if args.swift:
        names = [f'"{part}"' for part in parts_in(args.folder)]
        print(SWIFT.replace("[PARTS]", f"[{', '.join(names)}]"), end="")
        return
    report = {"machine": describe_machine(torch.device("cpu"))}
    if args.folder is not None:
        parts_in(args.folder)
        plan = json.loads((args.folder / "pipeline.json").read_text())
        if has_core_ml():
            report |= asyncio.run(measure(args.folder, args))
            print_times(report, plan)
        elif args.device == "iphone":
            raise SystemExit(
                "an iPhone can be timed from a Mac only; without --device iphone this machine tells what it can."
            )
        else:
            print("A phone cannot be timed on this machine: no Core ML. What the programs themselves say:")
            report["programs"] = report_programs(args.folder)
    if args.ladder:
        report |= report_ladder(args)
    if args.out:
        save_json(report, args.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
