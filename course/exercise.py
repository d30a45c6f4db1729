"""How an answer is checked: against the project's own code, against known mistakes, and by the project's own tests.

An answer is a Python file that defines what the exercise asks for. `check` compares what it computes with what the reference
computes. If they differ, it looks whether a known mistake computes the same: then it can say what went wrong. At last the answer
takes the place of the project's function, and the project's tests run with it.
"""

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parent.parent


class Hint(Exception):
    """What to tell a student whose answer is not right yet."""


class Exercise(NamedTuple):
    """title; right: {name: value or function} that an answer must define, as the project has it; mistakes: {hint: the names
    that are wrong}; probe(answer) -> {what: value}: what is compared, by default the names themselves; tests: names of test
    functions, {file in tests/: (functions)}, run with the answer in place of `replaces`, {"module.name": name}; runs(answer):
    for questions about trainings, raises Hint itself."""

    title: str
    right: dict
    mistakes: dict
    probe: Callable | None = None
    replaces: dict = {}
    tests: dict = {}
    runs: Callable | None = None


def load_answer(path):
    """The answer's names, as an object. Raises Hint if the file cannot be read."""
    spec = importlib.util.spec_from_file_location(f"answer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Hint(f"{path}, line {error.lineno}, is not Python: {error.msg}.") from None
    except (Exception, SystemExit) as error:
        raise Hint(in_words(error, path)) from None
    return module


def in_words(error, path):
    """One sentence about an error in an answer, with the line of the answer where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
    where = f"line {lines[-1]} of {path}" if lines else f"{path}"
    if isinstance(error, NotImplementedError):
        return f"{where} is still a hole: write your code there."
    message = " ".join(str(error).split())
    return f"{where} stops with {type(error).__name__}{': ' + message if message else ''}."


class Called(TorchFunctionMode):
    """`with Called() as called:` collects the names of torch's functions that an answer calls, in `called.names`."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def plain(value):
    """An answer without numpy: its numbers and arrays, also inside lists, as Python's own."""
    if hasattr(value, "tolist") and not isinstance(value, torch.Tensor):
        value = value.tolist()
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def same(a, b):
    """Whether two values are equal: tensors within 1e-3 relative or 1e-5, fractions within three digits, the rest exactly."""
    a, b = plain(a), plain(b)
    if isinstance(a, torch.Tensor) and a.numel() == 1 and isinstance(b, int | float):
        a = a.item()
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        try:
            a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
        except (TypeError, ValueError, RuntimeError):
            return False
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) or isinstance(b, bool) or isinstance(a, str) or isinstance(b, str):
        return a == b
    if isinstance(a, int | float) and isinstance(b, float):
        return abs(a - b) <= max(1e-5, 3e-3 * abs(b))
    return a == b


def difference(what, got, right):
    """A general hint, which does not give the answer away."""
    got = plain(got)
    if got is None or got is ... or isinstance(got, list) and any(x is None for x in got):
        return f"{what} is still empty: write your answer there."
    if isinstance(right, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            return f"{what} must be a tensor, not {type(got).__name__}."
        if got.shape != right.shape:
            return f"{what} must have the shape {tuple(right.shape)}, not {tuple(got.shape)}."
        if got.isnan().any() and not right.isnan().any():
            return f"{what} holds NaN."
        gap = (got.double() - right.double()).abs().max().item()
        return f"{what} is not right yet: it is off by up to {gap:.2g}, where the right values go up to {right.abs().max():.2g}."
    if isinstance(right, int | float) and not isinstance(right, bool) and isinstance(got, int | float) and right:
        return f"{what} is too {'large' if got > right else 'small'}."
    return f"{what} is not right yet."


@contextlib.contextmanager
def in_place(replaces, answer):
    """{"module.name": name}: the answer's names stand in the project's modules, wherever they were imported."""
    changed = []
    for target, name in replaces.items():
        module, attribute = target.rsplit(".", 1)
        original = getattr(importlib.import_module(module), attribute)
        for other in list(sys.modules.values()):
            ours = getattr(other, "__file__", None) and ROOT in Path(other.__file__).parents
            if ours and not other.__name__.startswith("answer_"):
                for key in [key for key, value in vars(other).items() if value is original]:
                    changed.append((other, key, original))
                    setattr(other, key, getattr(answer, name))
    try:
        yield
    finally:
        for module, key, original in changed:
            setattr(module, key, original)


def run_tests(exercise, answer, path):
    """The project's own tests with the answer in place. Raises Hint at the first that fails."""
    with in_place(exercise.replaces, answer):
        for file, names in exercise.tests.items():
            spec = importlib.util.spec_from_file_location(f"reference_{Path(file).stem}", ROOT / "tests" / file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            for name in names:
                try:
                    getattr(module, name)()
                except AssertionError:
                    raise Hint(f"with your code in place, the project's test {name} (tests/{file}) does not pass yet.") from None
                except Exception as error:
                    raise Hint(f"the project's test {name} (tests/{file}) cannot use your code: {in_words(error, path)}") from None


def check(exercise, answer, path=Path("answer")):
    """Raises Hint unless the answer (an object with the names of exercise.right) is right."""
    if missing := [name for name in exercise.right if not hasattr(answer, name)]:
        raise Hint(f"{path} defines no {' and no '.join(missing)}.")
    if exercise.runs:
        exercise.runs(answer)
        return
    probe = exercise.probe or (lambda answer: {name: getattr(answer, name) for name in exercise.right})
    right = probe(SimpleNamespace(**exercise.right))
    try:
        got = probe(answer)
    except (Exception, SystemExit) as error:
        raise Hint(in_words(error, path)) from None
    wrong = [what for what in right if not same(got[what], right[what])]
    for hint, changes in exercise.mistakes.items() if wrong else ():
        mistaken = probe(SimpleNamespace(**{**exercise.right, **changes}))
        if all(same(got[what], mistaken[what]) for what in wrong) and any(not same(mistaken[what], right[what]) for what in wrong):
            raise Hint(hint)
    if wrong:
        raise Hint(difference(wrong[0], got[wrong[0]], right[wrong[0]]))
    run_tests(exercise, answer, path)
