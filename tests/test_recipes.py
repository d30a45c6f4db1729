"""The commands of the README and of the recipes are understood by the scripts they call."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_fm", "distill", "step_distill", "decoder", "sample", "evaluate", "export_coreml", "shards")


def commands(path):
    """(script, arguments) of every call in the page's code blocks, shell variables put in."""
    for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text(), flags=re.M | re.S):
        variables = {"side": "256"}
        for line in block.replace("\\\n", " ").splitlines():
            for name in sorted(variables, key=len, reverse=True):
                line = line.replace(f"${name}", variables[name])
            assigned = re.fullmatch(r"(\w+)=(.*)", line.strip())
            if assigned:
                variables[assigned[1]] = assigned[2].strip('"')
            if not re.match(r"\s*(OMP_NUM_THREADS=\d )?(\S*python|torchrun) ", line):
                continue
            words = shlex.split(line.split(" | ")[0], comments=True)
            called = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if called is None:
                continue
            script, arguments = words[called].removesuffix(".py"), words[called + 1 :]
            if script == "data" and arguments[:1] == ["encode"]:
                script, arguments = "shards", arguments[1:]
            yield script, arguments


@pytest.mark.parametrize("page", ["README.md", "recipes/imagenet.md", "recipes/t2i.md"])
def test_every_command_is_understood(page):
    understood = []
    for script, arguments in commands(ROOT / page):
        if script in SCRIPTS:
            module = importlib.import_module("common.shards" if script == "shards" else script)
            module.parse_arguments(arguments)  # SystemExit for a flag that it does not have
            understood.append(script)
    expected = {"README.md": SCRIPTS, "recipes/imagenet.md": ("shards", "train_fm", "sample")}
    assert set(understood) >= set(
        expected.get(page, ("shards", "train_fm", "distill", "step_distill", "decoder", "sample"))
    )
