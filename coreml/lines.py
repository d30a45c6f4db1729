"""Which line of our Python made which operation of a package: build/unet.lines.json beside build/unet.mlpackage.

torch.export writes into every node the stack of Python calls that led to it, and the module it stood in. coremltools hands the
stack on, from pass to pass, as long as the program is in memory (ScopeSource.EXIR_STACK_TRACE), and drops it when it saves. An
operation's name survives on the disk: so names and lines are written down at export.

    {"main": {"linear_5_cast_fp16": "model.py:206 unet.mid.1.blocks.0.attn2.to_out", ...}}
"""

import json
import re
from pathlib import Path

from coreml.mil_interpreter import ScopeSource  # of coremltools, with its warnings about this machine silenced

ROOT = Path(__file__).parent.parent
UNKNOWN = "? ?"  # of an operation that nobody wrote down


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
        trace = (op.scopes.get(ScopeSource.EXIR_STACK_TRACE) or [None])[0]
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


def read(package, function="main"):
    """{operation's first output: "file:line module"} of a package on the disk; {} if nobody wrote them down."""
    path = beside(Path(package))
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))[function]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} does not belong to its package ({error!r}): export it again with --force.") from error
