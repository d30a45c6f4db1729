"""Is a package what PyTorch computes? Its program, read back from disk and interpreted op by op, beside the original network.

A part, here, is anything with inputs {name: tensor}, outputs (names), expected {name: tensor}, captured() (torch's exported
program), unit (the size of the outputs' numbers) and summary: see export_coreml.Part.
"""

import math
import sys

import numpy as np
import torch

from coreml import mil_interpreter as mil
from coreml.mil_interpreter import ct

FLOAT32_BAR, FLOAT16_BAR = 1e-4, 50.0  # largest error of the program in float32; decibels of the one in float16


def decibels(expected, found):
    """Signal to error, 10 log10(mean expected^2 / mean error^2): infinity without error, minus infinity for NaN or overflow."""
    error = (expected - found).double().square().mean()
    if error == 0:
        return math.inf
    return (10 * torch.log10(expected.double().square().mean() / error)).item() if torch.isfinite(error) else -math.inf


def compare(part, program, precision, function="main"):
    """(largest error in units of the part, smallest decibels) over all outputs of the interpreted program. NaN stays NaN."""
    found, expected = mil.run(program, part.inputs, precision, function), part.expected
    errors = torch.stack([(expected[name] - found[name]).abs().max() / part.unit for name in part.outputs])
    return errors.max().item(), min(decibels(expected[name], found[name]) for name in part.outputs)


def bisect(part, program, precision, bar, function="main"):
    """The first operation whose value is worse than `bar` decibels, and the one before it, as text.

    In float16, each value beside that of the same program in float32. In float32, beside PyTorch: coremltools names an operation
    after the node of the exported program that it came from; where both have the name, their values are compared.
    """
    steps, seen = mil.step_by_step(program, part.inputs, precision, function), []
    if precision == "exact":
        values = dict(part.expected)

        class Recorder(torch.fx.Interpreter):
            def run_node(self, node):
                values[node.name] = result = super().run_node(node)
                return result

        with torch.no_grad():
            Recorder(part.captured().module()).run(*part.inputs.values())
        pairs = ((op, values.get(name), found) for op, name, found in steps)
    else:
        exact = mil.step_by_step(program, part.inputs, "exact", function)
        pairs = ((op, reference, found) for (op, _, found), (_, _, reference) in zip(steps, exact, strict=True))
    for op, reference, found in pairs:
        if isinstance(reference, torch.Tensor) and reference.shape == found.shape and reference.is_floating_point():
            seen.append((decibels(reference, found), mil.describe(op)))
            if seen[-1][0] < bar:
                before = f"the last good one, {seen[-2][0]:.1f} dB: {seen[-2][1]}\n    " if len(seen) > 1 else ""
                return f"{before}the first bad one, {seen[-1][0]:.1f} dB: {seen[-1][1]}"
    return f"all {len(seen)} operations that can be compared are above {bar:.0f} dB"


def check(part, program, precision, function="main", bar=None, show=False):
    """compare(), and a SystemExit when a bar is missed; with `show` it names the first bad operation."""
    error, value = compare(part, program, precision, function)
    failed = not error <= FLOAT32_BAR if precision == "exact" else not value >= (-300.0 if bar is None else bar)
    if failed:
        off, loud = f"{error:.1e} off PyTorch (at most {FLOAT32_BAR})", f"{value:.1f} dB (at least {bar or 'a number'})"
        said = off if precision == "exact" else loud
        hint = f"\n    {bisect(part, program, precision, bar or 80.0, function)}" if show else " --bisect shows where."
        raise SystemExit(f"{part.summary}: the package is {said}, and not kept.{hint}")
    return error, value


def on_this_mac(part, path, function, bar):
    """On macOS {compute unit: decibels of Core ML's own prediction}, and an error if its CPU misses the bar; None elsewhere."""
    if sys.platform != "darwin":
        return None  # no Core ML there
    found = {}
    for unit in ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"):
        model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[unit], function_name=function)
        out = model.predict({name: x.numpy() for name, x in part.inputs.items()})
        values = {name: torch.from_numpy(np.asarray(out[name])).float() for name in part.outputs}
        found[unit] = min(decibels(value, values[name]) for name, value in part.expected.items())
    if bar is not None and not found["CPU_ONLY"] >= bar:
        raise SystemExit(f"{part.summary}: {found['CPU_ONLY']:.1f} dB on this Mac's CPU (at least {bar}), and not kept.")
    return found
