"""What Core ML can be asked on a Mac, about itself or the iPhone at the end of the cable: times and plans. For `latency.py`.

A plan (MLComputePlan) says on which device Core ML would run each operation: for every device its operations and its share of the
estimated cost, and the operations that fall off the neural engine, with the line of our Python that made them.

coremltools (models/ml_program/experimental/remote_device.py) builds a small app, the model runner, starts it on the phone with
Xcode's devicectl, and exchanges files with it. Two things in its version 9.0 have to be helped:

* it asks for an answer 20 times, twice a second, and gives up; a first load for the neural engine takes minutes. Here it asks on.
* it looks whether the runner lives (`session.is_alive`) without calling the method, so that a phone that is gone would be asked
  on and on. watched() looks by itself.
"""

import asyncio
import collections
import contextlib
import math
import platform
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

from coreml.mil_interpreter import ct
from coreml.package import UNKNOWN, read_lines

PULSE, LOOK = 2.0, 30.0  # seconds between two looks at the runner, and at the list of devices
NEURAL_ENGINE = "neural engine"
UNITS = {NEURAL_ENGINE: "CPU_AND_NE", "GPU": "CPU_AND_GPU", "CPU": "CPU_ONLY"}
DEVICES = {"MLNeuralEngineComputeDevice": NEURAL_ENGINE, "MLGPUComputeDevice": "GPU", "MLCPUComputeDevice": "CPU"}
LOCKED = "is locked: unlock it, keep its screen on (Settings, Display, Auto-Lock: Never), and start again."


class LostPhone(Exception):
    """The phone or its runner is gone in the middle: nothing more can be measured, what was measured counts."""


# --------------------------------------------------------------------------------------------------------------
# Times


async def time_package(path, unit, phone, n, loads, patience, times):
    """Fill `times` with milliseconds of one package on one compute unit, one by one: they outlive a lost phone.

    times: {"first_load", "load" and "load_samples", "predict" and "predict_samples"}.
    """
    from coremltools.models.ml_program.experimental import perf_utils

    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[unit], skip_model_load=True)
    benchmarker = perf_utils.MLModelBenchmarker(model, device=phone)

    def keep(name, measurement):
        times.setdefault(f"{name}_samples", []).extend(measurement.samples)
        times[name] = statistics.median(times[f"{name}_samples"])

    first = await watched(benchmarker.benchmark_load(iterations=1), phone, patience)
    times["first_load"] = first.samples[0]
    for _ in range(loads):
        keep("load", await watched(benchmarker.benchmark_load(iterations=1), phone, patience))
    for i in range(n):
        work = benchmarker.benchmark_predict(iterations=1, warmup=i == 0)
        keep("predict", await watched(work, phone, patience))


async def measure(packages, phone, n, loads, patience, report, save):
    """Every part on every compute unit, into report["parts"][part][unit], and Core ML's plans into report["plans"].

    packages: {part: path}. phone: coroutine that finds it, or None for this Mac. A unit that fails is told, not hidden,
    and the others go on. A phone that is gone ends it: report["stopped"] says so. save() is called after every unit.
    """
    phone = await phone if phone else None
    report |= describe_device(phone) | {"parts": {}, "plans": {}, "stopped": None}
    try:
        for part, path in packages.items():
            report["parts"][part] = {}
            for name, unit in UNITS.items():
                print(f"{part} on the {name} (the first load may take minutes)", flush=True)
                times = report["parts"][part][name] = {}
                with told(times, patience):
                    await time_package(path, unit, phone, n, loads, patience, times)
                save()
            report["plans"][part] = {}
            with told(report["plans"][part], patience):
                rows = await watched(ask_plan(path, UNITS[NEURAL_ENGINE], phone), phone, patience)
                report["plans"][part] = summary_of(rows)
    except LostPhone as error:
        report["stopped"] = str(error)


@contextlib.contextmanager
def told(entry, patience):
    """What goes wrong with one unit, as entry["error"]: it says nothing about the others. A lost phone does."""
    try:
        yield
    except LostPhone as error:
        entry["error"] = str(error)
        raise
    except TimeoutError:
        entry["error"] = f"nothing came back within {patience:.0f} s: try --patience"
    except Exception as error:
        entry["error"] = words(error)


def describe_device(phone):
    """{"device", "os"} of the phone, or of this Mac."""
    if phone is not None:
        return {"device": model_of(phone), "os": f"iOS {phone.os_version} ({phone.os_build_number})"}
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10)
        chip = asked.stdout.strip() if asked.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        chip = ""
    return {"device": f"this Mac, {chip or platform.machine()}", "os": f"macOS {platform.mac_ver()[0]}"}


# --------------------------------------------------------------------------------------------------------------
# The iPhone


async def find(name, team, bundle, patience):
    """The connected iPhone (`name` chooses among several), with the model runner, signed by `team`, started on it.

    Raises SystemExit with one sentence when there is none, or it cannot be prepared.
    """
    from coremltools.models.ml_program.experimental import remote_device  # complains where there is no Core ML

    remote_device._DeviceCtlRemoteService.__init__.__defaults__ = (0.5, math.ceil(patience / 0.5) + 20)  # watched() stops it
    phone = choose(remote_device, name)
    if phone.developer_mode_state == "disabled":
        raise SystemExit(f"{phone.name} is not in developer mode: Settings, Privacy & Security, Developer Mode; then start again.")
    if not team:
        raise SystemExit("give --team, the ten letters of your Apple development team: the runner on the phone must be signed.")
    credentials = remote_device.AppSigningCredentials(development_team=team, bundle_identifier=bundle)
    try:
        ready = await phone.prepare_for_model_debugging(credentials=credentials)
    except Exception as error:
        raise refusal(phone, words(error)) from error
    await asyncio.sleep(PULSE)  # devicectl tells at the end of a launch, not at its beginning, that the phone would not have it
    if not ready.session.is_alive():
        raise refusal(phone, last_words(ready) or "it ended without a word")
    return ready


def choose(remote_device, name):
    """One connected iPhone among the devices that this Mac knows."""
    try:
        devices = remote_device.Device.get_devices()
    except Exception as error:  # no Xcode, or one too old
        raise SystemExit(f"cannot look for an iPhone: {words(error)}. Xcode and its command line tools are needed.") from error
    phones = [device for device in devices if device.type == remote_device.DeviceType.IPHONE]
    named = [phone for phone in phones if name in (None, phone.name, phone.udid, phone.identifier)]
    connected = [phone for phone in named if phone.state == remote_device.DeviceState.CONNECTED]
    if phones and not named:
        raise SystemExit(f"no iPhone is called {name!r}: this Mac knows {listed(phones)}.")
    if named and not connected:
        raise SystemExit(f"{listed(named)}: known, but not connected ({named[0].state.value}). Plug the phone in, unlock it, and "
                         "wait until Xcode's window of devices shows it.")  # fmt: skip
    if not connected:
        raise SystemExit("no iPhone is connected: plug one in, unlock it, trust this Mac, and turn developer mode on.")
    if len(connected) > 1:
        raise SystemExit(f"{len(connected)} iPhones are connected, {listed(connected)}: choose one by --phone NAME.")
    return connected[0]


def refusal(phone, said):
    locked = re.search(r"\b(un)?locked\b|passcode", said, re.IGNORECASE)
    return SystemExit(f"{phone.name} {LOCKED}" if locked else f"the runner could not be started on {phone.name}: {said}")


def listed(phones):
    return ", ".join(phone.name for phone in phones)


def words(error):
    """What an error says, in one line. devicectl's comes as bytes."""
    said = getattr(error, "message", None) or str(error)
    said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return " ".join(said.split()).rstrip(".") or type(error).__name__


def last_words(phone):
    """What devicectl printed before the runner ended."""
    pipe = getattr(phone.session._process, "stderr", None)
    said = (pipe.read() or b"") if pipe is not None else b""
    return " ".join((said.decode(errors="replace") if isinstance(said, bytes) else said).split())


def model_of(phone):
    """ "iPhone 16 Pro Max": coremltools keeps the owner's name for the phone, which no report needs, and drops the model's."""
    from coremltools.models.ml_program.experimental import remote_device

    try:
        listing = remote_device._DeviceCtl._run_command("xcrun devicectl list devices")["result"]["devices"]
        hardware = next(d["hardwareProperties"] for d in listing if d.get("identifier") == phone.identifier)
        return hardware.get("marketingName") or hardware["productType"]
    except Exception:  # an Xcode that tells it otherwise
        return "iPhone, model unknown"


def is_there(phone):
    """Whether the list of devices still has the phone as connected. A list that cannot be had says nothing."""
    from coremltools.models.ml_program.experimental import remote_device

    try:
        devices = remote_device.Device.get_devices()
    except Exception:
        return True
    return any(d.identifier == phone.identifier and d.state == remote_device.DeviceState.CONNECTED for d in devices)


async def watched(work, phone, patience):
    """Await `work` on the phone (None: this Mac). Raises LostPhone when the phone goes, TimeoutError after `patience` seconds."""
    loop = asyncio.get_running_loop()
    task, begun, looked = asyncio.ensure_future(work), loop.time(), loop.time()
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=min(PULSE, patience))
            if task.done() or phone is None and loop.time() - begun < patience:
                continue
            if loop.time() - begun >= patience:
                raise TimeoutError
            gone = not phone.session.is_alive()
            if not gone and loop.time() - looked >= LOOK:
                gone, looked = not await loop.run_in_executor(None, is_there, phone), loop.time()
            if gone:
                raise LostPhone("the phone is gone: its cable, its lock, or the runner on it")
        return task.result()
    except (LostPhone, TimeoutError):
        raise
    except Exception as error:  # one operation failed; or everything has, since the phone is not there
        if phone is not None and not (phone.session.is_alive() and is_there(phone)):
            raise LostPhone(f"the phone is gone: {words(error)}") from error
        raise
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


# ------------------------------------------------------------------------------------------------------------------
# Which device runs what


async def ask_plan(package, unit, device=None):
    """Core ML's plan for a package on a compute unit ("CPU_AND_NE", "ALL", ...), here or on a prepared phone.

    Returns [{"op", "type", "device", "could" (all devices that support it), "share" of the cost or None, "line", "module"}].
    """
    from coremltools.models.ml_program.experimental import compute_plan_utils  # complains where there is no Core ML

    with tempfile.TemporaryDirectory() as scratch:
        compiled = ct.models.utils.compile_model(str(package), str(Path(scratch) / "model.mlmodelc"))
        plan = await compute_plan_utils.load_compute_plan_from_path_on_device(
            path=compiled, compute_units=ct.ComputeUnit[unit], device=device
        )
        return read_plan(plan, read_lines(package))


def name_of(device):
    return DEVICES.get(type(device).__name__, type(device).__name__)


def read_plan(plan, where):
    """The rows of ask_plan(), from an MLComputePlan. Constants run nowhere and have no row."""
    program, rows = plan.model_structure.program, []
    if program is None:
        raise ValueError("the plan is of no ML program")
    function = program.functions.get("main") or next(iter(program.functions.values()))
    for op in function.block.operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
        cost = plan.get_estimated_cost_for_mlprogram_operation(op)
        if usage is None:
            continue
        name = op.outputs[0].name
        line, module = where.get(name, UNKNOWN).split(" ", 1)
        rows.append({
            "op": name, "type": op.operator_name.split(".")[-1], "device": name_of(usage.preferred_compute_device),
            "could": [name_of(device) for device in usage.supported_compute_devices],
            "share": None if cost is None else cost.weight, "line": line, "module": module,
        })  # fmt: skip
    return rows


def summary_of(rows):
    """{device: {"operations", "share"}}, and under "off" the rows that are not on the neural engine."""
    devices = {}
    for device in sorted({row["device"] for row in rows}):
        some = [row for row in rows if row["device"] == device]
        devices[device] = {"operations": len(some), "share": sum(row["share"] or 0 for row in some)}
    return {"devices": devices, "off": [row for row in rows if row["device"] != NEURAL_ENGINE]}


def print_plan(part, plan, top=12):
    """The summary of one part as a table."""
    devices = ", ".join(f"{name}: {d['operations']} operations, {d['share']:.1%}" for name, d in plan["devices"].items())
    print(f"\n{part}, where Core ML would run it (shares of its estimated cost): {devices}")
    rows = collections.defaultdict(list)
    for row in plan["off"]:
        rows[row["type"], row["line"], row["device"], NEURAL_ENGINE in row["could"]].append(row)
    if not rows:
        print("nothing falls off the neural engine")
        return
    print(f"{'off it':26}{'times':>6}{'share':>8}  {'runs on':9}{'neural engine':15}{'line':26}the first")
    shares = {key: sum(row["share"] or 0 for row in some) for key, some in rows.items()}
    for key in sorted(rows, key=lambda key: (-shares[key], -len(rows[key])))[:top]:
        kind, line, device, could = key
        first = f"{rows[key][0]['op']}; {rows[key][0]['module']}"
        says = "could, does not" if could else "cannot"
        print(f"{kind:26}{len(rows[key]):6}{shares[key]:8.1%}  {device:9}{says:15} {line:26}{first}")
    if len(rows) > top:
        print(f"and {len(rows) - top} rows more in the report")
