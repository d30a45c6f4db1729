"""How an answer is checked: against our solution, against known mistakes, and by the project's own tests.

An answer is a Python file that defines what the exercise asks for. A probe looks at it: it calls the answer
with known inputs. What it sees is compared with what it sees of our solution in course/solutions. If they
differ, it looks at our solution with one known mistake after the other: an answer that computes what a
mistake computes has made it, and gets its hint. At last the answer takes the place of the project's function,
and the project's tests run with it; our solution passes them too.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent


class Hint(Exception):
    """What to tell a student whose answer is not right yet."""


class Exercise(NamedTuple):
    """What an exercise asks, and how wrong answers are told apart.

    title asks      the names that an answer must define mistakes  {hint: changes}: what makes this mistake
    out of our solution. Changes are {text of the solution: other text} or
              {name: wrong value}; a list has several ways to make the same mistake
    probe     probe(answer) -> {what: value}: what is compared, by default the names that were asked for
    own       the project's functions for what is to be written, "module.function" or "module.Class.method":
              not to be called
    replaces  {"module.name": name}: where the answer stands while the project's tests run
    tests     {file in tests/: names of its test functions}
    runs      runs(answer), for questions about trainings: raises Hint itself
    """

    title: str
    asks: tuple
    mistakes: dict = {}
    probe: Callable | None = None
    own: tuple = ()
    replaces: dict = {}
    tests: dict = {}
    runs: Callable | None = None


def exercise_file(number, folder="exercises"):
    return ROOT / "course" / folder / f"{number}.py"


def load_answer(path, changes=None):
    """The answer's names, as a module; changes put other text or values into it (see Exercise.mistakes).

    Raises Hint if it cannot be read.
    """
    module = ModuleType(f"answer_{path.stem}")
    module.__file__ = str(path)
    try:
        text, values = path.read_text(encoding="utf-8-sig"), {}
        for old, new in (changes or {}).items():
            if isinstance(new, str):
                assert old in text, f"{path} does not contain {old!r}"
                text = text.replace(old, new)
            else:
                values[old] = new
        exec(compile(text, str(path), "exec"), vars(module))
    except SyntaxError as error:
        raise Hint(f"{path}, line {error.lineno}, is not Python: {error.msg}.") from None
    except (Exception, SystemExit) as error:
        raise Hint(in_words(error, path)) from None
    vars(module).update(values)
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


class Called:
    """`with Called() as called:` notes what is called: called.code of Python, called.names of torch."""

    def __enter__(self):
        self.code, self.names, self.outer = set(), set(), sys.getprofile()
        sys.setprofile(self.note)
        return self

    def note(self, frame, event, function):
        if event == "call":
            self.code.add(frame.f_code)
        elif event == "c_call":
            self.names.add(function.__name__)
        if self.outer:
            self.outer(frame, event, function)

    def __exit__(self, *error):
        sys.setprofile(self.outer)


def code_of(name):
    """The code of "module.function" or "module.Class.method"."""
    parts = name.split(".")
    modules = sum(part.islower() for part in parts[:-1])  # classes begin with a capital letter
    function = reduce(getattr, parts[modules:], importlib.import_module(".".join(parts[:modules])))
    return inspect.unwrap(function).__code__  # without decorators


def plain(value):
    """An answer without numpy: its numbers and arrays, also inside lists, as Python's own."""
    if hasattr(value, "tolist") and not isinstance(value, torch.Tensor):
        value = value.tolist()
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def same(a, b):
    """Whether two values are equal: tensors within 1e-3 relative or 1e-5, fractions within three digits."""
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
        most = right.abs().max().item()
        return f"{what} is not right yet: it is off by up to {gap:.2g}; the right values go up to {most:.2g}."
    numbers = isinstance(right, int | float) and isinstance(got, int | float)
    if numbers and right and not isinstance(right, bool):
        return f"{what} is too {'large' if got > right else 'small'}."
    return f"{what} is not right yet."


@contextlib.contextmanager
def in_place(replaces, answer):
    """{"module.name": name}: the answer's names stand in all modules of the project that have them."""
    changed = []
    for target, name in replaces.items():
        module, attribute = target.rsplit(".", 1)
        original = getattr(importlib.import_module(module), attribute)
        for other in list(sys.modules.values()):
            ours = getattr(other, "__file__", None) and ROOT in Path(other.__file__).parents
            if ours:
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
            name = f"reference_{Path(file).stem}"
            spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            for name in names:
                try:
                    getattr(module, name)()
                except AssertionError:
                    raise Hint(f"with your code in place, the project's test {name} (tests/{file}) does not "
                               f"pass yet.") from None
                except Exception as error:
                    raise Hint(f"the project's test {name} (tests/{file}) cannot use your code: "
                               f"{in_words(error, path)}") from None


def outcome(exercise, answer):
    """What the probe sees of an answer: {what: value}, or the error that it stops with."""
    probe = exercise.probe or (lambda answer: {name: getattr(answer, name) for name in exercise.asks})
    try:
        return probe(answer)
    except (Exception, SystemExit) as error:
        return error


def explained(got, mistaken, right):
    """How well a mistake explains an answer: (how many wrong values, minus how many that are right).

    A yes or a no alone is weak evidence, (0, 0), unless all that is wrong agrees.
    """
    if isinstance(got, BaseException) or isinstance(mistaken, BaseException):
        return int(repr(got) == repr(mistaken)), 0
    wrong, made = ([what for what in right if not same(seen[what], right[what])] for seen in (got, mistaken))
    found = [what for what in wrong if what in made and same(got[what], mistaken[what])]
    telling = [what for what in found if not isinstance(got[what], bool | str)]
    return (len(found), -len(set(made) - set(wrong))) if telling or found == wrong else (0, 0)


def check(number, exercise, answer, path=Path("answer")):
    """Raises Hint unless the answer (an object with the names of exercise.asks) is right."""
    if missing := [name for name in exercise.asks if not hasattr(answer, name)]:
        raise Hint(f"{path} defines no {' and no '.join(missing)}.")
    if exercise.runs:
        exercise.runs(answer)
        return
    solution = exercise_file(number, "solutions")
    right = outcome(exercise, load_answer(solution))
    with Called() as called:
        got = outcome(exercise, answer)
    stopped = isinstance(got, BaseException)
    if isinstance(got, NotImplementedError):
        raise Hint(in_words(got, path))
    if wrong := [what for what in right if stopped or not same(got[what], right[what])]:
        best, first = (1, -len(right)), wrong[0]
        told = in_words(got, path) if stopped else difference(first, got[first], right[first])
        for hint, ways in exercise.mistakes.items():
            for changes in ways if isinstance(ways, list) else [ways]:
                mistaken = outcome(exercise, load_answer(solution, changes))
                if (fit := explained(got, mistaken, right)) > best:
                    best, told = fit, hint
        raise Hint(told)
    for name in exercise.own:
        if code_of(name) in called.code:
            raise Hint(f"it gives the right numbers, but by calling the project's own {name}: write out what "
                       f"that computes.")
    run_tests(exercise, answer, path)
