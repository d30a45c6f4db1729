"""What in a Core ML program is slow, or not possible, on the neural engine, by what Apple and others have published about it.

    python -m coreml.advise build/                                # every package of export_coreml.py
    python -m coreml.advise build/unet.mlpackage --top 40         # more rows
    python -m coreml.advise build/unet.mlpackage --json advice.json    # every finding by itself

A package is read back from disk, and each operation is held against the rules below. A finding tells the rule, the operation, its
shapes and bytes, and the line of our Python that made it (coreml/package.py; packages of older exports have no lines). This is
reading, not measuring: Core ML decides by itself what runs where, by device, system and sizes, and nobody outside Apple knows
how. `latency.py` on a Mac asks it (coreml/phone.py). A rule tells where to look first.

The neural engine's buffers: the last axis of a tensor is padded to 64 bytes, the others are packed as the compiler likes. So a
last axis of 1 in float16 takes 32 times its bytes, and a reshape or transpose copies.
"""

import collections
import dataclasses
import math
from pathlib import Path

from common.arguments import Parser, integer, real
from common.checkpoint import save_json
from coreml import mil_interpreter as mil
from coreml.costs import peak_of, size
from coreml.package import UNKNOWN, beside, read_lines
from coreml.pipeline import PARTS

# Apple: Deploying Transformers on the Apple Neural Engine (2022), with its code; Hollemans: what is known about the engine
ARTICLE = "https://machinelearning.apple.com/research/neural-engine-transformers"
ANE = "https://github.com/apple/ml-ane-transformers"
HOLLANCE = "https://github.com/hollance/neural-engine docs/unsupported-layers.md"
# rule: (what is found, who says so)
RULES = {
    "rank": ("a tensor of more than five axes, which Core ML does not take",
             'https://github.com/apple/coremltools/issues/2536: "CoreML Framework doesn\'t support tensors with rank > 5"'),
    "extent": ("an axis longer than the neural engine's compiler takes: 65536 channels, 16384 rows or columns",
               "https://github.com/pytorch/executorch/issues/7907, where it says so itself: tensor dimensions are not within "
               "supported range, N[1-65536] D[1-16384] C[1-65536] H[1-16384] W[1-16384]"),
    "gather": ("a look-up by index, which runs on the CPU",
               f"{ANE} README: of 606 operations the four of the embedding look-up run on the CPU; {HOLLANCE}: gather"),
    "integer": ("whole numbers or booleans between floats: off the neural engine and back",
                f"{HOLLANCE}: every switch between devices costs; https://github.com/roboflow/rf-detr/pull/1495: by "
                "MLComputePlan, top-k and what reads its indices leave the neural engine"),
    "float32": ("float32, with the casts around it: the neural engine computes in float16",
                "https://apple.github.io/coremltools/docs-guides/source/typed-execution-example.html: a float 16 program can run "
                "on the Neural Engine, GPU and CPU, a float 32 one on GPU and CPU"),
    "norm": ("a mean over another axis than the channels, 1",
             f"{ARTICLE}, principle 1: (B, C, 1, S); {ANE} ane_transformers/reference/layer_norm.py: mean(dim=1)"),
    "linear": ("a linear layer on (B, S, C): Apple has 1x1 convolutions on (B, C, 1, S)",
               f'{ARTICLE}, principle 1: "we swap all nn.Linear layers with nn.Conv2d layers"'),
    "transpose": ("a large transpose: a copy",
                  f'{ARTICLE}, principle 3: "reshape and transpose operations are likely to trigger memory copies"; its '
                  "attention has one, of the key"),
    "reshapes": ("a reshape or transpose that puts back what an earlier one changed: two copies",
                 f'{ARTICLE}, principle 3: "we avoid all reshapes"'),
    "padding": ("a last axis that is no multiple of 64 bytes: what the padding takes",
                f'{ARTICLE}, principle 1: "the last axis of an ANE buffer is not packed; it must be contiguous and aligned to '
                '64 bytes"'),
    "attention": ("scores of many heads and queries in one large tensor",
                  f"{ARTICLE}, principle 2: one head at a time; https://github.com/apple/ml-stable-diffusion "
                  "python_coreml_stable_diffusion/attention.py, split_einsum_v2: 512 queries at a time"),
}  # fmt: skip

# What is large, nobody says. One head, 512 queries and 4096 keys in float16 are what apple/ml-stable-diffusion leaves of an
# attention at 64x64 latents; for a copy we take a quarter of that. Less than a tenth of padding is not worth a line.
SCORES, LARGE, WASTE = 4 << 20, 1 << 20, 0.1

RESHAPES = {"reshape", "expand_dims", "squeeze"}
PRODUCTS = {"matmul", "einsum"}
# What may stand between two reshapes that cancel: one tensor in (and constants), one of the same shape out.
KEEPING = {"add", "sub", "mul", "real_div", "square", "sqrt", "rsqrt", "exp", "sigmoid", "silu", "gelu", "relu", "clip", "cast",
           "identity", "layer_norm", "softmax"}  # fmt: skip


@dataclasses.dataclass
class Finding:
    """One operation that breaks one rule. `bytes`: what is copied, wasted or large, as the rule has it."""

    rule: str
    op: str
    type: str
    inputs: list
    outputs: list
    bytes: int
    note: str
    line: str = "?"
    module: str = "?"


# ------------------------------------------------------------------------------------------------------------------
# The program as a graph


class Graph:
    """Operations in order; who makes and who reads a value. Weights, also compressed ones, are no values here."""

    def __init__(self, program, function="main"):
        self.ops = [op for op in mil.operations(program, function) if not op.op_type.startswith("constexpr")]
        self.makers = {var.name: op for op in self.ops for var in op.outputs}
        self.values = self.makers.keys() | program.functions[function].inputs.keys()
        self.readers = collections.defaultdict(list)
        for op in self.ops:
            for var in self.inputs(op):
                self.readers[var.name].append(op)

    def inputs(self, op):
        """The variables that an operation reads and that are computed or given, in order."""
        flat = [v for value in op.inputs.values() for v in (value if isinstance(value, list | tuple) else [value])]
        return [var for var in flat if var.name in self.values]

    def before(self, op):
        return [self.makers[var.name] for var in self.inputs(op) if var.name in self.makers]

    def after(self, op):
        return [reader for var in op.outputs for reader in self.readers[var.name]]

    def islands(self, belongs):
        """Operations for which belongs(op), in groups that hang together."""
        left, groups = {op.outputs[0].name: op for op in self.ops if belongs(op)}, []
        while left:
            group, ahead = [], [left.pop(next(iter(left)))]
            while ahead:
                group.append(ahead.pop())
                for near in (*self.before(group[-1]), *self.after(group[-1])):
                    if left.pop(near.outputs[0].name, None) is not None:
                        ahead.append(near)
            groups.append(sorted(group, key=self.ops.index))
        return groups


def is_float(var):
    return mil.torch_type(var).is_floating_point


def is_float32(var):
    return mil.torch_type(var).itemsize == 4 and is_float(var)


def padded(var):
    """Bytes of a neural engine's buffer: the last axis padded to 64 bytes."""
    if not var.shape:
        return 64
    return math.prod(var.shape[:-1]) * math.ceil(var.shape[-1] * mil.torch_type(var).itemsize / 64) * 64


# ------------------------------------------------------------------------------------------------------------------
# The rules: each yields (operation, bytes, note)


def rank(graph, limits):
    for op in graph.ops:
        most = max(len(var.shape) for var in (*graph.inputs(op), *op.outputs))
        if most > 5:
            yield op, size(op.outputs[0]), f"{most} axes"


def extent(graph, limits):
    for op in graph.ops:
        for var in op.outputs:
            axes = (1, 1, 1, *var.shape)[-3:]  # channels, rows, columns
            if any(n > most for n, most in zip(axes, (65536, 16384, 16384), strict=True)):
                yield op, size(var), shape(var.shape)


def gather(graph, limits):
    for op in graph.ops:
        if op.op_type.startswith("gather"):
            yield op, size(op.outputs[0]), ""


def integer_islands(graph, limits):
    for group in graph.islands(lambda op: not any(map(is_float, op.outputs))):
        read = [var for op in group for var in graph.inputs(op) if is_float(var)]
        written = [op for member in group for op in graph.after(member) if is_float(op.outputs[0])]
        if read and written:
            for op in group:
                yield op, size(op.outputs[0]), f"island of {len(group)}, read by {written[0].op_type}"


def float32_islands(graph, limits):
    for group in graph.islands(lambda op: any(map(is_float32, (*graph.inputs(op), *op.outputs)))):
        casts = sum(op.op_type == "cast" for op in group)
        for op in group:
            yield op, size(op.outputs[0]), f"island of {len(group)}, {casts} of them casts"


def norm(graph, limits):
    for op in graph.ops:
        if op.op_type in ("layer_norm", "reduce_mean", "reduce_sum") and op.inputs["axes"].val is not None:
            var = op.inputs["x"]
            axes = sorted(int(axis) % len(var.shape) for axis in op.inputs["axes"].val)
            written = op.op_type != "layer_norm" and axes != [len(var.shape) - 1]  # not RMSNorm by hand, but pooling or a sum
            if axes != [1] and not written:
                yield op, size(var), f"over axes {axes} of {len(var.shape)}"


def linear(graph, limits):
    for op in graph.ops:
        if op.op_type == "linear" and len(op.outputs[0].shape) > 2:
            yield op, size(op.outputs[0]), ""


def transpose(graph, limits):
    for op in graph.ops:
        if op.op_type == "transpose" and size(op.outputs[0]) >= limits["large"]:
            perm, axes = [int(axis) for axis in op.inputs["perm"].val], op.inputs["x"].shape
            moved = [axis % len(perm) for axis in perm if axes[axis] > 1]
            idle = ", only axes of 1 move: a reshape would do" if moved == sorted(moved) else ""
            yield op, size(op.outputs[0]), f"to {perm}{idle}"


def reshapes(graph, limits):
    for op in graph.ops:
        kind, between = op.op_type if op.op_type == "transpose" else "reshape", []
        if op.op_type not in RESHAPES | {"transpose"} or not graph.before(op):
            continue
        at = graph.before(op)[0]
        while at.op_type in KEEPING and len(graph.inputs(at)) == 1 and graph.inputs(at)[0].shape == at.outputs[0].shape:
            between.append(at.op_type)
            if not graph.before(at):
                break
            at = graph.before(at)[0]
        same_kind = at.op_type == "transpose" if kind == "transpose" else at.op_type in RESHAPES
        if not same_kind or tuple(graph.inputs(at)[0].shape) != tuple(op.outputs[0].shape):
            continue
        if kind == "transpose":
            first, second = ([int(axis) % len(o.inputs["perm"].val) for axis in o.inputs["perm"].val] for o in (at, op))
            if [first[axis] for axis in second] != sorted(first):
                continue
        yield op, 2 * size(op.outputs[0]), f"undoes {at.name}" + (f", around {', '.join(reversed(between))}" if between else "")


def padding(graph, limits):
    for op in graph.ops:
        for var in op.outputs:
            waste = padded(var) - size(var)
            if len(var.shape) > 1 and waste > WASTE * padded(var):
                yield op, waste, f"{waste / padded(var):.0%} of the buffer"


def attention(graph, limits):
    told = set()  # products whose scores a softmax reads: one finding for both
    for op in reversed(graph.ops):
        if op.op_type == "scaled_dot_product_attention":
            query = op.inputs["query"]
            axes = (*query.shape[:-1], op.inputs["key"].shape[-2])
            scores = math.prod(axes) * mil.torch_type(query).itemsize
        elif op.op_type == "softmax" or op.op_type in PRODUCTS and len(graph.inputs(op)) == 2 and op.name not in told:
            axes, scores = op.outputs[0].shape, size(op.outputs[0])
            at = op
            while at.op_type not in PRODUCTS and graph.before(at):  # past scale and mask
                at = max(graph.before(at), key=lambda o: size(o.outputs[0]))
                told.add(at.name)
        else:
            continue
        if scores > limits["scores"]:
            yield op, scores, f"scores {shape(axes)}"


CHECKS = {"rank": rank, "extent": extent, "gather": gather, "integer": integer_islands, "float32": float32_islands, "norm": norm,
          "linear": linear, "transpose": transpose, "reshapes": reshapes, "padding": padding, "attention": attention}  # fmt: skip


def advise(program, function="main", where=None, scores=SCORES, large=LARGE):
    """Hold a MIL program against the rules.

    Args:
        program: from mil_interpreter.read_package.
        where: {operation's first output: "file:line module"}, from coreml.package.
        scores, large: bytes above which an attention's scores, and from which a transpose, is worth a line.

    Returns ([Finding], totals): totals has operations, transposes, reshapes, largest and its bytes, activation_bytes (the peak
    of what is alive at once), peak (the operation there, its line, and [name, shape, bytes, line] of what is alive), value_bytes
    and padded_bytes (of all values, packed and as the neural engine keeps them).
    """
    graph, limits, where = Graph(program, function), {"scores": scores, "large": large}, where or {}
    found = []
    for rule, check in CHECKS.items():
        for op, count, note in check(graph, limits):
            line, module = where.get(op.outputs[0].name, UNKNOWN).split(" ", 1)
            shapes = [[list(var.shape) for var in some] for some in (graph.inputs(op), op.outputs)]
            found.append(Finding(rule, op.name, op.op_type, *shapes, count, note, line, module))
    values = [var for op in graph.ops for var in op.outputs]
    largest = max(values, key=size)
    kinds, (peak, at, alive) = collections.Counter(op.op_type for op in graph.ops), peak_of(program, function)
    alive = [[var.name, list(var.shape), size(var), where.get(var.name, UNKNOWN)] for var in alive]
    return found, {
        "operations": len(graph.ops), "transposes": kinds["transpose"], "reshapes": sum(kinds[kind] for kind in RESHAPES),
        "largest": f"{largest.name} {tuple(largest.shape)}", "largest_bytes": size(largest),
        "activation_bytes": peak, "peak": {"op": at and f"{at.op_type} {at.outputs[0].name}",
                                           "line": where.get(at and at.outputs[0].name, UNKNOWN), "alive": alive},
        "value_bytes": sum(map(size, values)), "padded_bytes": sum(map(padded, values)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# Printing


def print_advice(title, found, totals, top):
    mb = {name: count / 1e6 for name, count in totals.items() if name.endswith("bytes")}
    print(f"\n{title}: {totals['operations']:,} operations, {totals['transposes']} transposes, {totals['reshapes']} reshapes")
    print(f"largest value {mb['largest_bytes']:.2f} MB, {totals['largest']}; at most {mb['activation_bytes']:.2f} MB alive at "
          f"once; all values {mb['value_bytes']:.1f} MB, padded {mb['padded_bytes']:.1f} MB")  # fmt: skip
    print_peak(totals["peak"], totals["activation_bytes"])
    if not found:
        print("nothing here breaks a rule")
        return
    print(f"\n{'rule':11}{'times':>6}{'MB':>10}   what it is")
    for rule, (what, _) in RULES.items():
        some = [f for f in found if f.rule == rule]
        if some:
            print(f"{rule:11}{len(some):6}{sum(f.bytes for f in some) / 1e6:10.2f}   {what}")
    rows = collections.defaultdict(list)
    for f in found:
        rows[f.rule, f.line, f.type].append(f)
    rows = sorted(rows.values(), key=lambda some: -sum(f.bytes for f in some))
    print(f"\n{'rule':11}{'times':>6}{'MB':>10}   {'line':24}operation, shapes and module of the largest")
    for some in rows[:top]:
        f = max(some, key=lambda f: f.bytes)
        shapes = f"{' '.join(map(shape, f.inputs[:2]))} -> {' '.join(map(shape, f.outputs[:2]))}"
        about = "; ".join(filter(None, (f"{f.type} {f.op} {shapes}", f.note, f.module)))
        print(f"{f.rule:11}{len(some):6}{sum(g.bytes for g in some) / 1e6:10.2f}   {f.line:24}{about}")
    if len(rows) > top:
        print(f"and {len(rows) - top} rows more: --top, or --json for every finding")


def print_peak(peak, total):
    """The values that are alive at the peak: those of 5 % of it or more, and the rest as one."""
    print(f"the peak is at {peak['op'] or 'the inputs'}, {peak['line']}; alive are")
    large = [value for value in peak["alive"] if value[2] >= total / 20]
    for name, axes, count, line in large:
        print(f"{'':17}{count / 1e6:10.2f}   {shape(axes)} {name}; {line}")
    if len(large) < len(peak["alive"]):
        rest = peak["alive"][len(large) :]
        print(f"{'':17}{sum(count for _, _, count, _ in rest) / 1e6:10.2f}   {len(rest)} smaller values")


def shape(axes):
    return "x".join(map(str, axes)) or "1"


def packages_in(path):
    """The packages at a path: itself, or the parts of a build. Raises SystemExit if there is none."""
    found = [path] if path.suffix == ".mlpackage" else [path / f"{part}.mlpackage" for part in PARTS]
    found = [package for package in found if package.is_dir()]
    if not found:
        raise SystemExit(f"{path} is no package and holds none: export_coreml.py writes them.")
    return found


def main(argv=None):
    p = Parser(__doc__, "python -m coreml.advise build/")
    p.add_argument("path", metavar="PACKAGE_OR_BUILD_DIR", type=Path, help="an .mlpackage, or a folder of export_coreml.py")
    p.add_argument("--function", help="of a package for several latent sizes; default: its first")
    p.add_argument("--scores", type=real(0), default=SCORES / 2**20, metavar="MIB", help="tell scores of an attention above this")
    p.add_argument("--large", type=real(0), default=LARGE / 2**20, metavar="MIB", help="tell transposes from this size on")
    p.add_argument("--top", type=integer(1), default=15, help="rows to print, the most bytes first")
    p.add_argument("--json", metavar="FILE", help="write totals and every finding here")
    args = p.parse_args(argv)
    report = {}
    for package in packages_in(args.path):
        program = mil.read_package(package)
        function = args.function if args.function in program.functions else next(iter(program.functions))
        if args.function not in (None, function) and len(program.functions) > 1:
            raise SystemExit(f"{package} has no function {args.function}; it has {', '.join(program.functions)}.")
        where = read_lines(package, function)
        found, totals = advise(program, function, where, args.scores * 2**20, args.large * 2**20)
        print_advice(f"{package}, {function}", found, totals, args.top)
        if not where:
            print(f"no lines: there is no {beside(package).name}, which export_coreml.py --force would write")
        report[package.stem] = {"function": function, "totals": totals, "findings": [dataclasses.asdict(f) for f in found]}
    if args.json:
        rules = {name: {"what": what, "source": source} for name, (what, source) in RULES.items()}
        save_json({"rules": rules, "packages": report}, args.json)
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    main()
