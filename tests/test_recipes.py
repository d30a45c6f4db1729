"""The commands of README, docs, course and recipes are understood by the scripts they call, and the files they name are there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "course", "recipes")
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [str(p.relative_to(ROOT)) for folder in FOLDERS for p in sorted(ROOT.glob(f"{folder}/*.md"))]


def calls(text):
    """Every line of a page that calls a script: those of code blocks, shell variables put in, and those between backticks."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S):
        variables = {"side": "256"}
        for line in block.replace("\\\n", " ").splitlines():
            for name in sorted(variables, key=len, reverse=True):
                line = line.replace(f"${name}", variables[name])
            if assigned := re.fullmatch(r"(\w+)=(.*)", line.strip()):
                variables[assigned[1]] = assigned[2].strip('"')
            yield line
    for line in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        yield " ".join(line.split())


def commands(page):
    """(module, arguments) of every call on a page of a script of ours."""
    for line in calls((ROOT / page).read_text(encoding="utf-8")):
        if not re.match(r"\s*(OMP_NUM_THREADS=\d )?(\S*python|torchrun) ", line) or "..." in line or "NAME" in line:
            continue
        words = shlex.split(line.split(" | ")[0], comments=True)
        if "-m" in words and "torchrun" not in words[0]:
            module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        else:
            called = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if called is None:
                continue
            module, arguments = words[called].removesuffix(".py"), words[called + 1 :]
        if module in ("pytest", "ruff", "venv", "pip"):
            continue
        yield module, arguments


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page):
    for name, arguments in commands(page):
        module = importlib.import_module(name)
        if name == "data" and arguments[:1] == ["encode"]:
            module.parse_encode(arguments[1:])
        elif hasattr(module, "parse_arguments"):
            module.parse_arguments(arguments)  # SystemExit for a flag that it does not have
        else:  # its flags are read in main()
            source = (ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
            assert all(f'"{word.split("=")[0]}"' in source for word in arguments if word.startswith("--")), (name, arguments)


def test_the_pages_call_every_script():
    called = {name for page in PAGES for name, _ in commands(page)}
    stages = {path.stem for path in ROOT.glob("*.py")} - {"flow", "model", "teacher"}
    studies = {f"studies.{path.stem}" for path in ROOT.glob("studies/*.py")} - {"studies.__init__", "studies.students"}
    assert called >= stages | studies


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", re.sub(r"`[^`\n]*`", "", text)) if not link.startswith("http")]
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links), links
    for name in re.findall(r"`((?:common|coreml|studies|assets|docs|course|recipes)/[\w./-]*|\w+\.py)`", text):
        assert (ROOT / name).exists(), f"{page} names {name}"
