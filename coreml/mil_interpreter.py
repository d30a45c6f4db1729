"""Run a Core ML package op by op in torch: what a phone is told to compute, on a machine that is not one.

A .mlpackage is a folder: a description of inputs and outputs, a file of weights, and a MIL program ("model intermediate
language"). The program is a list of operations in single assignment, each with named inputs and a declared type for each output;
the phone's compiler takes it from there. Here it is read back from disk and computed one line after the other:

    conv2d_1: fp16 (1, 32, 8, 8) = conv(x=conv2d, weight=weights(32, 16, 1, 1), strides=[1, 1], pad_type=valid, ...)
    linear_0: fp16 (1, 256) = linear(x=cat, weight=weights(256, 32), bias=weights(256,))

Compressed weights are operations too, whose names begin with constexpr: integers with a scale, or a palette, a short list of
numbers of which each weight names one.

    python -m coreml.mil_interpreter build/unet.mlpackage              # print the program
    python -m coreml.mil_interpreter build/unet.mlpackage --count      # how many of each operation

precision "declared": every output is rounded to the type that the program declares, so float16 shows its overflows and its
lost digits. precision "exact": float32 throughout. Sums inside one operation are float32 in both. This is not the neural
engine, which may order and round otherwise: say "interpreted", never "measured on device".
"""

import collections
import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.arguments import Parser

for name in ("coremltools", "coremltools.libcoremlpython"):
    logging.getLogger(name).setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load as load_program
    from coremltools.converters.mil.mil import types


@contextlib.contextmanager
def without_bars():
    """coremltools' progress bars and warnings only where somebody watches: a log file would have a line for each step of a bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield


def read_package(path):
    """The MIL program in a .mlpackage. Raises SystemExit with one sentence if there is none."""
    try:
        return program_of(ct.models.MLModel(str(path), skip_model_load=True))
    except Exception as error:  # coremltools raises whatever it meets
        raise SystemExit(f"{path} is not a Core ML package that can be read ({error}): export it again.") from error


def program_of(package):
    """The MIL program of a package in memory."""
    return load_program(package.get_spec(), package.get_spec().specificationVersion, package.weights_dir)


def operations(program, function="main"):
    """The operations of a function that compute something: constants are values of their inputs."""
    if function not in program.functions:
        raise SystemExit(f"the program has no function {function!r}; it has {', '.join(program.functions)}.")
    return [op for op in program.functions[function].operations if op.op_type != "const"]


def torch_type(var):
    """The declared type of a MIL variable, as torch's."""
    return TYPES[types.builtin_to_string(var.dtype)]


# Numbers that are only moved are rounded already.
MOVING = {"reshape", "transpose", "squeeze", "expand_dims", "split", "slice_by_index", "concat", "stack", "pixel_shuffle",
          "upsample_nearest_neighbor", "identity", "tile"}  # fmt: skip
TYPES = {"fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool, "int8": torch.int8, "uint8": torch.uint8,
         "int16": torch.int16, "uint16": torch.int32, "int32": torch.int32}  # fmt: skip


@torch.no_grad()
def step_by_step(program, inputs, precision="declared", function="main", weights=None):
    """Compute the program; yields (operation, output's name, tensor) for one output after the other. See run()."""
    ops, main = operations(program, function), program.functions[function]
    missing = set(main.inputs) - set(inputs)
    if missing:
        raise ValueError(f"the program wants the inputs {', '.join(main.inputs)}; {', '.join(missing)} is missing")

    def rounded(tensor, var):
        kind = torch_type(var)
        if not kind.is_floating_point:
            return tensor.to(kind)
        return tensor.float() if precision == "exact" else tensor.to(kind).float()

    last_reader = {}  # a value is dropped after it, as a phone would
    for i, op in enumerate(ops):
        for value in op.inputs.values():
            last_reader |= {var.name: i for var in (value if isinstance(value, list | tuple) else [value])}
    values = {name: rounded(inputs[name], var) for name, var in main.inputs.items()} | (weights or {})
    for i, op in enumerate(ops):
        if op.op_type.startswith("constexpr"):  # compressed weights
            results = [torch.from_numpy(np.ascontiguousarray(op.materialized_val_inference()))]
        elif op.op_type in OPERATIONS:
            arguments = {name: argument(value, values) for name, value in op.inputs.items()}
            results = OPERATIONS[op.op_type](**arguments)
            results = list(results) if isinstance(results, list | tuple) else [results]
        else:
            raise ValueError(f"the operation {op.op_type!r} is not known here: add it to OPERATIONS")
        for var, result in zip(op.outputs, results, strict=True):
            if tuple(result.shape) != tuple(var.shape):
                raise ValueError(f"{op.op_type} {var.name} is declared as {var.shape} and is {tuple(result.shape)}")
            values[var.name] = result if op.op_type in MOVING else rounded(result, var)
            yield op, var.name, values[var.name]
        for name in [name for name in values if last_reader.get(name, i) <= i]:
            del values[name]


def run(program, inputs, precision="declared", function="main", weights=None):
    """Compute the program.

    Args:
        program: from read_package.
        inputs: {name: tensor} for every input of the function.
        precision: "declared" rounds every output to its declared type, "exact" keeps float32 for all that is a float.
        weights: {name of a constant: tensor} to compute with, in place of the program's own.

    Returns {name: tensor}, the outputs in float32. Raises ValueError for missing inputs or an operation that is not known here.
    """
    operations(program, function)  # says it if there is no such function
    wanted = {var.name for var in program.functions[function].outputs}
    steps = step_by_step(program, inputs, precision, function, weights)
    return {name: value for _, name, value in steps if name in wanted}


def run_many(program, inputs, precision="declared", function="main", weights=None):
    """run() for N examples at once: every input has one axis more in front, (N, *its shape), and so has every output.

    The same operations on the same numbers, in another order of summation: a value may round to the other side in float16.
    """
    with warnings.catch_warnings():  # attention in one operation is computed one after the other all the same
        warnings.simplefilter("ignore")
        return torch.vmap(lambda some: run(program, some, precision, function, weights))(inputs)


def argument(value, values):
    """An operation's input: a tensor for what is computed and for arrays of constants, a Python value for a scalar."""
    if isinstance(value, list | tuple):
        return [argument(var, values) for var in value]
    if value.name in values:
        return values[value.name]
    constant = value.val
    if isinstance(constant, np.ndarray) and constant.ndim:
        tensor = torch.from_numpy(np.ascontiguousarray(constant))
        return tensor.float() if tensor.is_floating_point() else tensor
    return constant.item() if isinstance(constant, np.generic | np.ndarray) else constant


# ------------------------------------------------------------------------------------------------------------------
# The operations of our programs, by the definitions in coremltools' documentation


def conv(x, weight, bias=None, strides=(1, 1), pad_type="valid", pad=(0, 0, 0, 0), dilations=(1, 1), groups=1):
    strides, dilations = [int(s) for s in strides], [int(d) for d in dilations]
    only(pad_type in ("valid", "custom"), f"conv with pad_type {pad_type}")  # PyTorch's models have no other
    pad = (0, 0, 0, 0) if pad_type == "valid" else pad
    top, bottom, left, right = (int(p) for p in pad)
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, strides, (top, left), dilations, int(groups))


def only(true, what):
    """Better an error than a wrong number: not every option of every operation is written here."""
    if not true:
        raise ValueError(f"{what} is not known here: write it in coreml/mil_interpreter.py")


def attention(query, key, value, attn_mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def layer_norm(x, axes, gamma=None, beta=None, epsilon=1e-5):
    axes = [int(axis) % x.dim() for axis in axes]
    last = list(range(x.dim() - len(axes), x.dim()))
    normed = F.layer_norm(x.movedim(axes, last), [x.shape[axis] for axis in axes], gamma, beta, float(epsilon))
    return normed.movedim(last, axes)


def batch_norm(x, mean, variance, gamma=None, beta=None, epsilon=1e-5):
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def matmul(x, y, transpose_x=False, transpose_y=False):
    return (x.transpose(-1, -2) if transpose_x else x) @ (y.transpose(-1, -2) if transpose_y else y)


def split(x, axis, num_splits=None, split_sizes=None):
    axis = int(axis)
    return x.chunk(num_splits, axis) if split_sizes is None else x.split([int(n) for n in split_sizes], axis)


def slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    index = []
    for i in range(x.dim()):
        first = None if begin_mask is not None and begin_mask[i] else int(begin[i])
        last = None if end_mask is not None and end_mask[i] else int(end[i])
        if squeeze_mask is not None and squeeze_mask[i]:
            index.append(first or 0)
        else:
            index.append(slice(first, last, 1 if stride is None else int(stride[i])))
    return x[tuple(index)]


def pad(x, pad, mode="constant", constant_val=0.0):
    pairs = [int(p) for p in pad]  # first axis first; torch wants the last axis first
    pairs = [p for i in reversed(range(0, len(pairs), 2)) for p in pairs[i : i + 2]]
    return F.pad(x, pairs, mode, float(constant_val))


def gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    only(int(axis) == 0 and x.dim() == 2 and not int(batch_dims), "gather other than rows of a table")
    return F.embedding(torch.as_tensor(indices).long(), x)


def upsample(x, scale_factor_height, scale_factor_width):
    return F.interpolate(x, scale_factor=(float(scale_factor_height), float(scale_factor_width)), mode="nearest")


def einsum(values, equation):
    return torch.einsum(equation, *values)


def ints(shape):
    return [int(n) for n in shape]


def squeeze(x, axes):
    for axis in sorted((int(a) % x.dim() for a in axes), reverse=True):
        x = x.squeeze(axis)
    return x


def expand_dims(x, axes):
    rank = x.dim() + len(axes)
    for axis in sorted(int(a) % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def cast(x, dtype):
    kind = TYPES[dtype]
    return (
        x.float() if kind.is_floating_point else x.to(kind)
    )  # how far floats are rounded is told by the declared type


def gelu(x, mode="EXACT"):
    only(mode in ("EXACT", "TANH_APPROXIMATION"), f"gelu with mode {mode}")
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def cumsum(x, axis=0, exclusive=False, reverse=False):
    only(not exclusive and not reverse, "cumsum that is exclusive or in reverse")
    return x.cumsum(int(axis))


def concat(values, axis, interleave=False):
    only(not interleave, "concat with interleave")
    return torch.cat(values, int(axis))


OPERATIONS = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "real_div": lambda x, y: x / y,
    "square": lambda x: x.square(), "sqrt": lambda x: x.sqrt(), "rsqrt": lambda x, epsilon=1e-12: (x + epsilon).rsqrt(),
    "sin": lambda x: x.sin(), "cos": lambda x: x.cos(), "exp": lambda x: x.exp(), "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: F.silu(x), "gelu": gelu, "softmax": lambda x, axis=-1: x.softmax(int(axis)),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)), "identity": lambda x: x, "cast": cast,
    "reduce_mean": lambda x, axes, keep_dims=False: x.mean(ints(axes), bool(keep_dims)),
    "reduce_sum": lambda x, axes, keep_dims=False: x.sum(ints(axes), bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(ints(shape)), "transpose": lambda x, perm: x.permute(ints(perm)),
    "squeeze": squeeze, "expand_dims": expand_dims, "split": split, "slice_by_index": slice_by_index, "pad": pad,
    "concat": concat, "cumsum": cumsum, "tile": lambda x, reps: x.tile(ints(reps)),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias), "matmul": matmul, "einsum": einsum, "conv": conv,
    "layer_norm": layer_norm, "batch_norm": batch_norm, "scaled_dot_product_attention": attention, "gather": gather,
    "upsample_nearest_neighbor": upsample, "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, int(upscale_factor)),
    "stack": lambda values, axis: torch.stack(values, int(axis)), "equal": lambda x, y: x == y, "less": lambda x, y: x < y,
    "greater_equal": lambda x, y: x >= y, "select": lambda cond, a, b: torch.where(cond, a, b), "logical_not": lambda x: ~x,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# Reading a program


def describe(op):
    """One operation as a line of text."""

    def short(value):
        if isinstance(value, list | tuple):
            return "(" + ", ".join(short(var) for var in value) + ")"
        constant = value.val
        if constant is None:
            return value.name
        if np.ndim(constant) == 0:
            return str(constant)
        return str(np.asarray(constant).tolist()) if np.size(constant) <= 8 else f"weights{tuple(constant.shape)}"

    inputs = ", ".join(f"{name}={short(value)}" for name, value in op.inputs.items())
    outputs = ", ".join(f"{var.name}: {types.builtin_to_string(var.dtype)} {tuple(var.shape)}" for var in op.outputs)
    return f"{outputs} = {op.op_type}({inputs})"


def main(argv=None):
    p = Parser(__doc__, "python -m coreml.mil_interpreter build/decoder.mlpackage")
    p.add_argument("package", metavar="PACKAGE", help="an .mlpackage of export_coreml.py, or any with such operations")
    p.add_argument("--function", default="main", help="of a multifunction package")
    p.add_argument("--count", action="store_true", help="only count the operations")
    args = p.parse_args(argv)
    if not Path(args.package).is_dir():
        raise SystemExit(f"no such package: {args.package}. export_coreml.py writes them.")
    ops = operations(read_package(args.package), args.function)
    if args.count:
        for kind, n in collections.Counter(op.op_type for op in ops).most_common():
            print(f"{n:6} {kind}")
    else:
        for op in ops:
            print(describe(op))


if __name__ == "__main__":
    main()
