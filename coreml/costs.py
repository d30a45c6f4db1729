"""What a MIL program says of its own cost: multiply-accumulates, and bytes of activations."""

import numpy as np

from coreml import mil_interpreter as mil


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


def size(var):
    """Bytes of a MIL variable, packed."""
    return int(np.prod(var.shape)) * mil.torch_type(var).itemsize


def activation_bytes(program, function="main"):
    """The largest sum of bytes of all values that are alive at once, if each is dropped after its last reader."""
    ops = mil.operations(program, function)
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
