"""The course: every solution is right, every known mistake gets its own hint, every hole is one."""

import ast
import json
import re
import shutil
import types

import pytest
import torch

from course import check, exercise
from course.check import EXERCISES, exercise_file
from course.exercise import Hint, load_answer

TRAININGS = [number for number, one in EXERCISES.items() if one.runs]
CODE = [number for number in EXERCISES if number not in TRAININGS]


def test_every_page_has_its_exercises_and_every_exercise_its_files():
    for page in "123456":
        mine = [number for number in EXERCISES if number.startswith(page)]
        assert 3 <= len(mine) <= 5 and any(EXERCISES[number].tests for number in mine)
    for folder in ("exercises", "solutions"):
        assert sorted(path.stem for path in (exercise.ROOT / "course" / folder).glob("*.py")) == sorted(EXERCISES)
    for number in EXERCISES:
        title = EXERCISES[number].title.split(" (")[0]  # without the minutes
        assert exercise_file(number).read_text(encoding="utf-8").startswith(f'"""{number}  {title}')


@pytest.mark.parametrize("number", CODE)
def test_the_solution_is_right(number):
    path = exercise_file(number, "solutions")
    exercise.check(EXERCISES[number], load_answer(path), path)


@pytest.mark.parametrize("number", CODE)
def test_every_mistake_gets_its_own_hint(number):
    one = EXERCISES[number]
    assert len(one.mistakes) >= 3
    for hint, changes in one.mistakes.items():
        with pytest.raises(Hint) as raised:
            exercise.check(one, types.SimpleNamespace(**{**one.right, **changes}))
        assert str(raised.value) == hint, number


@pytest.mark.parametrize("number", CODE)
def test_an_exercise_as_it_is_handed_out_is_not_right(number):
    path = exercise_file(number)
    with pytest.raises(Hint, match="hole|empty"):
        exercise.check(EXERCISES[number], load_answer(path), path)


def test_the_projects_own_tests_see_the_answer(monkeypatch):
    """With a wrong function in place the reference test fails, and afterwards the project is as it was."""
    import flow

    one, original = EXERCISES["2c"], flow.logit_normal_timesteps
    wrong = types.SimpleNamespace(logit_normal_timesteps=lambda n, *_, generator=None: torch.rand(n, generator=generator))
    with pytest.raises(Hint, match="test_logit_normal_timesteps_have_the_right_distribution"):
        exercise.run_tests(one, wrong, "answer")
    assert flow.logit_normal_timesteps is original


@pytest.mark.parametrize(("number", "text"), [
    ("2a", "import numpy as np\nSHIFTED, BEFORE, SHARE = np.float32(0.75), np.float64(0.75), np.float32(0.864)"),
    ("2b", "from flow import expand, velocity, x0_from_velocity\n"
           "def interpolate(x0, eps, t):\n    return x0 + expand(t, x0) * (eps - x0)"),
    ("2d", "import flow\ndef euler_sample(model, noise, text, empty, steps=28, guidance=3.0, shift=1.0):\n"
           "    times, x = flow.sampling_timesteps(steps, shift), noise\n"
           "    for now, then in zip(times[:-1], times[1:]):\n"
           "        v = model(x, now.expand(len(x)), *text)\n"
           "        if guidance != 1:\n"
           "            v = flow.guide(v, model(x, now.expand(len(x)), *empty), guidance)\n"
           "        x += (then - now) * v\n"
           "    return x"),
    ("4a", "import numpy as np, torch\nfrom distill import timestep_weight\n"
           "A = [timestep_weight(torch.tensor([t])) for t in (0.5, 0.75, 0.9)]\nPULL = (1 - A[-1]) * 30"),
    ("5a", "import numpy as np\nfrom course.checks.few_steps import EXERCISES\nright = EXERCISES['5a'].right\n"
           "TIMES, A, FORWARDS_BEFORE, FORWARDS_AFTER = np.array(right['TIMES']), np.array(right['A']), np.int64(56), 4"),
])  # fmt: skip
def test_other_forms_of_a_right_answer_are_right(number, text, tmp_path):
    path = tmp_path / f"{number}.py"
    path.write_text(text, encoding="utf-8")
    exercise.check(EXERCISES[number], exercise.load_answer(path), path)


@pytest.mark.parametrize(("number", "text", "hint"), [
    ("2a", "import numpy as np\nSHIFTED = BEFORE = SHARE = np.array([0.75, 0.75])", "not right yet"),
    ("2a", "import sys\nsys.exit()", "stops with SystemExit"),
    ("1b", "from model import Attention", "by F.scaled_dot_product_attention"),
    ("6b", "import torch\nfrom coreml import layers\nclass LayerNormGroups(layers.LayerNormGroups):\n    def forward(self, x):\n"
           "        return torch.group_norm(x, self.groups, self.weight, self.bias, self.eps)", "GroupNorm as it was"),
])  # fmt: skip
def test_what_the_text_forbids_is_not_right(number, text, hint, tmp_path):
    path = tmp_path / f"{number}.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Hint, match=hint):
        exercise.check(EXERCISES[number], exercise.load_answer(path), path)


@pytest.mark.parametrize(("text", "sentence"), [
    ("def velocity(", "line 1, is not Python"),
    ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ("interpolate = x0_from_velocity = None", "defines no velocity"),
    ("from flow import *\ndef velocity(x0, eps):\n    return x0 @ 3", "line 3 of answers"),
    ("from flow import *\ndef velocity(x0, eps):\n    return 2 * (eps - x0)", "velocity is not right yet: it is off by up to"),
    ("from flow import *\ndef velocity(x0, eps):\n    return (eps - x0)[:1]", "must have the shape (4, 3, 2, 2), not (1, 3, 2, 2)"),
    ("from flow import *\ndef velocity(x0, eps):\n    return x0 - eps", "and with which sign?"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_one_sentence(text, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check.main(["2b"])
    assert "wrote answers" in capsys.readouterr().out
    (tmp_path / "answers" / "2b.py").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        check.main(["2b"])
    message = str(stopped.value)
    assert message.startswith("2b: not yet. ") and sentence in message and "\n" not in message


def test_a_right_answer_and_the_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers").mkdir()
    shutil.copy(exercise_file("2a", "solutions"), tmp_path / "answers" / "2a.py")
    shutil.copy(exercise_file("3a"), tmp_path / "answers" / "3a.py")
    check.main(["2a"])
    assert capsys.readouterr().out == "2a: right.\n"
    check.main([])
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == EXERCISES.keys()
    assert lines["2a"].endswith(" right") and lines["3a"].endswith(" not yet") and lines["4a"] == EXERCISES["4a"].title
    with pytest.raises(SystemExit, match="there is no exercise '9z'"):
        check.main(["9z"])


# ------------------------------------------------------------------------------------------------------------------
# Questions about trainings: runs of the right form, made by hand

COLUMNS = {  # of the last row: {exercise: {run: (settings that differ, columns)}}
    "1e": {"1e-a": ({"ladder": "a"}, {"val_loss": 0.8, "pictures_per_second": 200}),
           "1e-f": ({"ladder": None}, {"val_loss": 0.9, "pictures_per_second": 250})},
    "2e": {"2e-few": ({"pictures": "shapes-train-0-64-None-1"}, {"loss": 0.5, "val_loss": 0.9}),
           "2e-many": ({"pictures": "shapes-train-0-20000-None-1"}, {"loss": 0.7, "val_loss": 0.7})},
    "3e": {"3e-without": ({"gan_weight": 0.0}, {"val_psnr": 33.0}), "3e-much": ({"gan_weight": 0.5}, {"val_psnr": 32.0})},
    "4e": {"4e-alone": ({"losses": "task"}, {"val_loss": 0.5, "pictures_per_second": 100}),
           "4e-taught": ({"losses": "task+out+feat"}, {"val_loss": 0.45, "pictures_per_second": 80})},
    "5e": {"5e-calm": ({"heads_lr": 1e-4, "penalty": 0.1}, {"d_real": 0.1, "d_fake": -0.1, "loss_d": 1.8}),
           "5e-wins": ({"heads_lr": 3e-3, "penalty": 0.0}, {"d_real": 2.0, "d_fake": -2.0, "loss_d": 0.1})},
}  # fmt: skip


def make_run(folder, settings, columns, step=300):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"settings": {"steps": 300, "lr": 1e-3, **settings}, "step": step}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [["step", *columns], [50, *(2 * value for value in columns.values())], [step, *columns.values()]]
    (folder / "log.csv").write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize("number", COLUMNS)
def test_questions_about_trainings(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, path = EXERCISES[number], exercise_file(number, "solutions")
    solution = load_answer(path)
    with pytest.raises(Hint, match="holds no run with a log yet"):
        exercise.check(one, solution, path)
    for name, (settings, columns) in COLUMNS[number].items():
        make_run(tmp_path / "runs" / name, settings, columns)
    exercise.check(one, solution, path)
    with pytest.raises(Hint, match="must be one of"):  # as it is handed out
        exercise.check(one, load_answer(exercise_file(number)), path)
    claims = [name for name in one.right if not name.startswith("RUN")]
    runs = [name for name in one.right if name.startswith("RUN")]
    for name in claims:  # the other answer
        (other,) = {run.split("-")[1] for run in COLUMNS[number]} - {getattr(solution, name)}
        with pytest.raises(Hint, match="your own logs say"):
            exercise.check(one, types.SimpleNamespace(**{**vars(solution), name: other}))
    swapped = dict(zip(runs, reversed([getattr(solution, run) for run in runs]), strict=True))
    with pytest.raises(Hint):
        exercise.check(one, types.SimpleNamespace(**{**vars(solution), **swapped}))
    name, (settings, columns) = next(iter(COLUMNS[number].items()))
    make_run(tmp_path / "runs" / name, {**settings, "lr": 5.0}, columns)
    with pytest.raises(Hint, match="also differ in --lr"):
        exercise.check(one, solution, path)
    make_run(tmp_path / "runs" / name, settings, columns, step=250)
    with pytest.raises(Hint, match="is at step 250 of 300"):
        exercise.check(one, solution, path)


def test_the_question_about_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, path = EXERCISES["6e"], exercise_file("6e", "solutions")
    with pytest.raises(Hint, match="FileNotFoundError"):
        load_answer(path)
    for bits, decibels in ((6, 24.5), (4, 12.1)):
        (tmp_path / f"build{bits}").mkdir()
        (tmp_path / f"build{bits}" / "pipeline.json").write_text(json.dumps({"nbits": bits}))
        report = {"parts": {"unet": {"sizes": {"8x8": {"decibels": decibels}}}}}
        (tmp_path / f"build{bits}" / "verification.json").write_text(json.dumps(report))
    solution = load_answer(path)
    exercise.check(one, solution, path)
    for changes, sentence in (
        ({"BUILD_4": "build6"}, "has weights of 6 bits, not 4"),
        ({"BUILD_6": "nowhere"}, "holds no verified UNet"),
        ({"MORE_DECIBELS": 4}, "your own logs say"),
        ({"LOST_PER_BIT": 12.4}, "loses 12.4 dB"),
    ):
        with pytest.raises(Hint, match=sentence):
            exercise.check(one, types.SimpleNamespace(**{**vars(solution), **changes}))


# ------------------------------------------------------------------------------------------------------------------
# The pages


@pytest.mark.parametrize("page", sorted((exercise.ROOT / "course").glob("[1-6]_*.md")), ids=lambda page: page.stem)
def test_every_equation_stands_beside_the_line_that_computes_it(page):
    """| equation | `file.py`, `function` | `line` |: the line is in that function today, whitespace apart."""
    section = page.read_text(encoding="utf-8").split("## The equations and their lines")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .+ \| `(\S+\.py)`, `(\w+)` \| `(.+)` \|$", section, flags=re.M)
    assert len(rows) >= 5 and len(rows) == section.count("\n| ") - 1
    for file, name, line in rows:
        source = (exercise.ROOT / file).read_text(encoding="utf-8")
        (found,) = (ast.get_source_segment(source, node) for node in ast.parse(source).body if getattr(node, "name", "") == name)
        assert "".join(line.replace("\\|", "|").split()) in "".join(found.split()), f"{file}, {name} has no line {line}"


def test_every_page_lists_its_exercises():
    for page in (exercise.ROOT / "course").glob("[1-6]_*.md"):
        listed = re.findall(r"^\* \*\*(\d\w)\*\* (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
        assert listed == [(number, one.title) for number, one in EXERCISES.items() if number[0] == page.stem[0]]
