"""Which device Core ML would run each operation on, by its own plan (MLComputePlan): on a Mac, or from a Mac on an iPhone.

`latency.py` asks for it and prints it: for every device its operations and its share of the estimated cost, and the operations
that fall off the neural engine, with the line of our Python that made them. The shares are Core ML's estimates, not measured.
"""

import collections
import tempfile
from pathlib import Path

from coreml import lines
from coreml.mil_interpreter import ct

NEURAL_ENGINE = "neural engine"
DEVICES = {"MLNeuralEngineComputeDevice": NEURAL_ENGINE, "MLGPUComputeDevice": "GPU", "MLCPUComputeDevice": "CPU"}


async def ask(package, unit, device=None):
    """Core ML's plan for a package on a compute unit ("CPU_AND_NE", "ALL", ...), here or on a prepared phone.

    Returns [{"op", "type", "device", "could" (all devices that support it), "share" of the cost or None, "line", "module"}].
    """
    from coremltools.models.ml_program.experimental import compute_plan_utils  # complains where there is no Core ML

    with tempfile.TemporaryDirectory() as scratch:
        compiled = ct.models.utils.compile_model(str(package), str(Path(scratch) / "model.mlmodelc"))
        plan = await compute_plan_utils.load_compute_plan_from_path_on_device(
            path=compiled, compute_units=ct.ComputeUnit[unit], device=device
        )
        return read(plan, lines.read(package))


def name_of(device):
    return DEVICES.get(type(device).__name__, type(device).__name__)


def read(plan, where):
    """The rows of ask(), from an MLComputePlan. Constants run nowhere and have no row."""
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
        line, module = where.get(name, lines.UNKNOWN).split(" ", 1)
        rows.append({
            "op": name, "type": op.operator_name.split(".")[-1], "device": name_of(usage.preferred_compute_device),
            "could": [name_of(device) for device in usage.supported_compute_devices],
            "share": None if cost is None else cost.weight, "line": line, "module": module,
        })  # fmt: skip
    return rows


def summary(rows):
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
