"""The house: few files at the top, who may import whom, one set of flags, loops that fit on a screen."""

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest

from common import arguments

ROOT = Path(__file__).parent.parent
FOLDERS = ("common", "coreml", "studies", "assets", "course", "web")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
                                     if not {"exercises", "solutions", "node_modules"} & set(path.parts))])  # fmt: skip
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
# Everything else at the top: 2, a stage.
LEVELS = {"flow": 0, "model": 0, "common": 1, "coreml": 1, "studies": 3, "assets": 3, "course": 3, "web": 3}
SCRIPTS = [name for path, name in NAMES.items()
           if re.search("^if __name__", path.read_text(encoding="utf-8"), flags=re.M)]  # fmt: skip


def level(name):
    return LEVELS.get(name.split(".")[0], 2)


def imports(path):
    """Names of our own modules that a file imports, at its top or inside a function."""
    found, ours = set(), set(NAMES.values())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in ours}
    return found - {*FOLDERS, "course.checks"}  # the packages themselves hold nothing


GRAPH = {NAMES[path]: imports(path) for path in FILES}


def test_at_most_twelve_files_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_nobody_imports_from_a_floor_above():
    """studies, assets and course -> stages -> common, coreml -> flow, model."""
    wrong = [f"{name} imports {other}" for name, others in GRAPH.items() for other in others if level(other) > level(name)]
    wrong += [f"{name} imports {other}" for name in GRAPH if name.startswith("common") for other in GRAPH[name]
              if other.startswith("coreml")]  # fmt: skip
    wrong += [f"{name} imports {other}" for name in ("flow", "model") for other in GRAPH[name]]
    assert not wrong


def test_no_circle():
    done = set()

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in GRAPH[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])


def test_no_stage_builds_on_a_hidden_loop():
    """Each stage has its own: optimizers step, gradients flow and states are saved in view."""
    for stage in ("train_fm", "distill", "step_distill", "decoder"):
        tree = ast.parse((ROOT / f"{stage}.py").read_text(encoding="utf-8"))
        (train,) = (node for node in tree.body if getattr(node, "name", "") == "train")
        calls = {ast.unparse(n.func).split(".")[-1] for n in ast.walk(train) if isinstance(n, ast.Call)}
        assert {"backward", "step", "clip_gradients", "update_ema", "save_state", "load_state", "learning_rate"} <= calls, stage


def parser_of(name, monkeypatch):
    """The parser that a script makes."""

    class Made(Exception):
        pass

    def stop(self, *args, **kwargs):
        raise Made(self)

    module = importlib.import_module(name)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Made) as made:
            getattr(module, "parse_arguments", module.main)([])
    return made.value.args[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_begins_with_an_example_and_every_number_is_checked(name, monkeypatch):
    parser = parser_of(name, monkeypatch)
    assert isinstance(parser, arguments.Parser), "flags are read by common.arguments.Parser"
    example = parser.format_help().splitlines()[0]
    assert example.startswith("example: python ") and (name.split(".")[-1] in example or "data.py encode" in example)
    for action in parser._actions:
        assert action.help, f"{name} {action.option_strings} has no help"
        assert action.type not in (int, float), f"{name} {action.option_strings}: type=integer() or real() checks its range"
        if action.type not in (None, Path):
            for wrong in ("nan", "x", "-inf"):
                with pytest.raises(argparse.ArgumentTypeError):
                    action.type(wrong)


@pytest.mark.parametrize("name", ["train_fm", "distill", "step_distill"])
def test_the_optimizer_and_its_rate_go_with_the_size(name):
    """A rate for Muon at class scale would wreck AdamW at 379 M parameters."""
    stage = importlib.import_module(name)
    small, large, own = (stage.parse_arguments(flags) for flags in ([], ["--size", "t2i", "--data", "x"], ["--lr", "0"]))
    assert (small.optimizer, large.optimizer) == ("muon", "adamw") and (small.lr, large.lr) == stage.LR
    assert large.lr <= 1e-4 and own.lr == 0


def test_what_is_wrong_ends_in_one_sentence(monkeypatch):
    for name, flags, sentence in (
        ("train_fm", ["--lr", "nan"], "--lr must be a number, not nan"),
        ("train_fm", ["--batch", "0"], "--batch must be at least 1, not 0"),
        ("step_distill", ["--on-policy", "1.5"], "--on-policy must be from 0 to 1, not 1.5"),
        ("distill", ["--teacher-layer", "first"], "--teacher-layer must be a whole number, not first"),
        ("sample", ["a star", "--shift", "0"], "--shift must be above 0, not 0"),
        ("decoder", ["--patch", "20"], "--patch must be a multiple of 8, not 20"),
        ("train_fm", ["--size", "huge"], "--size: invalid choice: 'huge'"),
    ):
        with pytest.raises(SystemExit, match=re.escape(sentence)):
            importlib.import_module(name).main(flags)


def test_text_is_read_with_or_without_a_byte_order_mark():
    """Editors put one first; and str.splitlines() would cut at U+2028 and U+0085, which captions hold: see common/texts.py."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "read_text":
                read = ast.unparse(node)
                assert "utf-8-sig" in read or read.startswith("texts."), f"{path}: {read}"
