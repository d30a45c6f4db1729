"""A package: coremltools' passes that make it, written beside its place and renamed, several latent sizes in one, its lines.

Which line of our Python made which operation of build/unet.mlpackage stands beside it in build/unet.lines.json:

    {"main": {"linear_5_cast_fp16": "model.py:206 unet.mid.1.blocks.0.attn2.to_out", ...}}

torch.export writes into every node the stack of Python calls that led to it, and the module it stood in. coremltools
hands the stack on, from pass to pass, as long as the program is in memory (ScopeSource.EXIR_STACK_TRACE), and drops it
when it saves. An operation's name survives on the disk: so names and lines are written down at export.
"""

import contextlib
import ctypes
import errno
import gc
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from coreml.mil_interpreter import ct  # before anything else of coremltools: its warnings are silenced there

ROOT = Path(__file__).parent.parent
UNKNOWN = "? ?"  # of an operation that nobody wrote down

# ------------------------------------------------------------------------------------------------------------------
# coremltools' passes: the same ones in the same order, in less time


mil = ct.converters.mil.mil
PASS_REGISTRY, register_pass = mil.passes.pass_registry.PASS_REGISTRY, mil.passes.pass_registry.register_pass


class Several(mil.passes.graph_pass.AbstractGraphPass):
    """Passes in a row. coremltools checks the whole program after each of its 96, a quarter of a conversion: so, after the row."""

    names = ()

    def apply(self, prog):
        for name in self.names:
            PASS_REGISTRY[name](prog)


EVERY = ct.PassPipeline.DEFAULT.passes
HALF = EVERY.index("common::add_fp16_cast")


@register_pass(namespace="snapgen")
class before_float16(Several):
    names = (*EVERY[:HALF], "common::dead_code_elimination")

    def apply(self, prog):
        super().apply(prog)
        prog.counts = dict(mil.Builder.name_count)


@register_pass(namespace="snapgen")
class after_float16(Several):
    names = EVERY[HALF + 1 :]


@register_pass(namespace="snapgen")
class to_float16(mil.passes.defs.quantization.add_fp16_cast):
    """coremltools' pass, which goes on counting the names that it makes up where the program in float32 was left.

    Its own question, whether a weight fits into float16, makes five tables of indices for every weight.
    """

    def apply(self, prog):
        mil.Builder.name_count.update(prog.counts)
        super().apply(prog)

    @staticmethod
    def fp16_overflow(op):
        inputs = [var for value in op.inputs.values() for var in (value if isinstance(value, list | tuple) else [value])]
        return any(beyond_float16(var.val) for var in inputs
                   if var.op is not None and var.op.op_type == "const" and var.is_tensor_or_scalar_of(dtype="fp32"))  # fmt: skip


def beyond_float16(value):
    """Whether a number is too large for float16; 1e38 and more stand for infinity, which float16 has."""
    largest = max(np.max(value, initial=0.0), -np.min(value, initial=0.0))
    return bool(largest > 65504) and (largest < 1e38 or bool(np.any((np.abs(value) > 65504) & (np.abs(value) < 1e38))))


# coremltools runs a few passes more before and behind these, and leaves out of them what is not named here.
AROUND = [f"common::{name}" for name in ("dead_code_elimination", "loop_invariant_elimination", "const_elimination",
                                         "const_deduplication", "cast_optimization", "dedup_op_and_var_names")]  # fmt: skip


def passes_to_float32():
    """From torch's program to one in float32."""
    return ct.PassPipeline(["snapgen::before_float16", *AROUND])


def passes_to_float16(selected):
    """From there to one with the operations for which selected(op) in float16; selected=None: only what saving needs."""
    if selected is None:
        return ct.PassPipeline(AROUND)
    pipeline = ct.PassPipeline(["snapgen::to_float16", "snapgen::after_float16", *AROUND])
    pipeline.set_options("snapgen::to_float16", {"op_selector": selected})
    return pipeline


def give_back_memory():
    """Free what nobody holds: programs are full of circles, and glibc keeps the space of weights that are gone."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# ------------------------------------------------------------------------------------------------------------------
# On the disk


def function_name(size, sizes):
    """Of a package's function for a latent of this side: a package for one size has only one."""
    return "main" if len(sizes) == 1 or not size else f"latent{size}"


def check_company(out, name, recorded, settings, model=None, unet=None):
    """pipeline.json speaks for all parts in a folder: they must have been exported for the same sizes, bits and student.

    recorded: {part: {"settings"}} of those that stay; settings: those of part `name`; model, unet: folder of its student, and
    its hash (None: random weights).
    """
    for other, part in recorded.items():
        if other != name and any(part["settings"].get(flag) != settings[flag] for flag in ("latent", "gemma", "nbits")):
            raise SystemExit(f"{out} holds a {other} for another --latent, --gemma or --nbits: give the same, another --out, or "
                             "all parts and --force.")  # fmt: skip
    theirs = recorded.get("unet", {}).get("settings", {}).get("weights")
    if name != "unet" and unet is not None and theirs not in (None, unet):
        raise SystemExit(f"{out} holds the UNet of another student than {model}: give its --model, or another --out.")


def save_package(package, path):
    """Write a package beside its place and rename it, so that a kill or a full disk leaves the last good one."""
    beside, old = (path.with_name(f".{os.getpid()}{what}.{path.name}") for what in ("", ".old"))
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            (package.save if hasattr(package, "save") else package)(str(beside))
            (beside / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # of coremltools, for debuggers: 5 %
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(beside, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def clear_errors(path):
    """A full disk or a place that cannot be written to, in one sentence. shutil and coremltools hide the number in the text."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "Errno 28" in str(error):
            raise SystemExit(f"the disk is full: could not write {path}. What was exported before is intact.") from error
        if isinstance(error, OSError):
            raise SystemExit(f"cannot write {path}: {error}.") from error
        raise


def weight_bytes(path):
    """Bytes of a package's weights: all but 2 to 5 % of it, and what fewer bits make smaller."""
    return sum(p.stat().st_size for p in path.rglob("weight.bin"))


def join(halves, sizes, path):
    """One package with a function for each latent size, which share their weights, and the description that each had."""
    descriptor = ct.utils.MultiFunctionDescriptor()
    for size, half in halves.items():
        descriptor.add_function(str(half), src_function_name="main", target_function_name=function_name(size, sizes))
    descriptor.default_function_name = function_name(sizes[0], sizes)
    raw = path.with_name(f"raw-{path.name}")
    ct.utils.save_multifunction(descriptor, str(raw))
    joined, first = (ct.models.MLModel(str(p), skip_model_load=True) for p in (raw, halves[sizes[0]]))
    spec = joined.get_spec()  # coremltools leaves licence, version and author behind
    spec.description.metadata.CopyFrom(first.get_spec().description.metadata)
    ct.models.utils.save_spec(spec, str(path), weights_dir=joined.weights_dir)


# ------------------------------------------------------------------------------------------------------------------
# Its lines

def mark(exported):
    """Put the path of its module before the stack of every node of torch's exported program, for coremltools to hand on."""
    for node in exported.graph.nodes:
        modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if node.meta.get("stack_trace"):
            node.meta["stack_trace"] = f"{modules[-1] if modules else ''}\n{node.meta['stack_trace']}"
    return exported


def lines_of(package):
    """{operation's first output: "file:line module"} of a converted model that is still in memory."""
    found = {}
    for op in package._mil_program.functions["main"].operations:
        trace = (op.scopes.get(mil.scope.ScopeSource.EXIR_STACK_TRACE) or [None])[0]
        if op.op_type == "const" or not trace:
            continue
        if "File" in trace:
            found[op.outputs[0].name] = f"{innermost(trace)} {trace.splitlines()[0] or '(top)'}"
        else:
            found[op.outputs[0].name] = f"input {trace}"  # what coremltools does to an input, such as a cast, has its name
    return found


def innermost(trace):
    """ "file:line" of the last call in a stack that is in our code, or outside of installed packages at least."""
    calls = [(Path(file), line) for file, line in re.findall(r'File "(.+)", line (\d+)', trace)]
    ours = [(file.relative_to(ROOT), line) for file, line in calls if file.is_relative_to(ROOT) and ".venv" not in file.parts]
    others = [(file, line) for file, line in calls if "site-packages" not in file.parts]
    file, line = (ours or others or calls)[-1]
    return f"{file.as_posix()}:{line}"


def beside(package):
    """Where the lines of a package are kept."""
    return package.with_suffix(".lines.json")


def read_lines(package, function="main"):
    """{operation's first output: "file:line module"} of a package on the disk; {} if nobody wrote them down."""
    path = beside(Path(package))
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))[function]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} does not belong to its package ({error!r}): export it again with --force.") from error
