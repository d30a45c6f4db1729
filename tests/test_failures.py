"""Failures on purpose: three a stage, each breaks one thing and mends it again; figures are made once for a zoo."""

import importlib
import re
import shlex
import types
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

import decoder
import flow
import step_distill
from common.encoders import FrozenEncoders
from studies import failures
from studies.failures import FAILURES
from teacher import Teacher

ROOT = Path(__file__).parent.parent
STAGES = {"fm": "2_flow_matching", "decoder": "3_decoder", "distill": "4_distillation", "step_distill": "5_few_steps",
          "phone": "6_phone"}  # fmt: skip


def stage_of(name):
    return max((stage for stage in STAGES if name.startswith(f"{stage}_")), key=len)


def test_three_a_stage():
    for stage in STAGES:
        assert sum(stage_of(name) == stage for name in FAILURES) >= 3, stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_shows_failures_of_its_stage_with_the_changed_line(stage):
    text = (ROOT / "course" / f"{STAGES[stage]}.md").read_text(encoding="utf-8")
    section = text.split("## Three ways in which it fails")[1].split("\n## ")[0]
    shown = re.findall(r"readme/failure_(\w+)\.png", text)
    assert shown == re.findall(r"readme/failure_(\w+)\.png", section)
    for name in shown:
        assert stage_of(name) == stage and (ROOT / "assets" / "readme" / f"failure_{name}.png").is_file()
        assert FAILURES[name].line.split(".py ")[-1] in " ".join(section.split()), f"the changed line of {name}"
    with_training = [name for name in FAILURES if stage_of(name) == stage and FAILURES[name].steps]
    assert {*shown, *with_training} == {name for name in FAILURES if stage_of(name) == stage}  # those that train may be yet to run
    assert all(f"python -m studies.failures {name}" in " ".join(section.split()) for name in [*shown, *with_training])


def test_the_commands_are_ones_that_the_stages_understand():
    for script, right, wrong in (("train_fm", failures.FM, failures.FM_LR), ("distill", failures.DISTILL, failures.WEIGHTS),
                                 ("decoder", failures.DECODER, failures.GAN), ("step_distill", failures.STEPS, failures.WINS),
                                 ("step_distill", failures.STEPS, failures.ALONE)):  # fmt: skip
        module = importlib.import_module(script)
        healthy, broken = (vars(module.parse_arguments(shlex.split(flags))) for flags in (right, f"{right} {wrong}"))
        changed = {f"--{name.replace('_', '-')}" for name in healthy if healthy[name] != broken[name]}
        assert changed == {word for word in shlex.split(wrong) if word.startswith("--")}


# ------------------------------------------------------------------------------------------------------------------
# What is replaced is wrong in the way that the line says, and right again afterwards


def test_a_shift_in_the_wrong_direction():
    right = flow.sampling_timesteps(4, 3.0)
    with failures.wrong_way():
        wrong = flow.sampling_timesteps(4, 3.0)
        assert torch.allclose(flow.shift_timesteps(right, 3.0), torch.linspace(1, 0, 5))  # the inverse
    assert torch.allclose(wrong, torch.tensor([1, 0.5, 0.25, 0.1, 0])) and torch.equal(flow.sampling_timesteps(4, 3.0), right)


def test_a_missing_mask(monkeypatch):
    monkeypatch.chdir(ROOT)
    encoders = FrozenEncoders(failures.TOY)
    states, mask = encoders.student_text(["a photo of a star"], 160)
    with failures.without_mask():
        same, everything = encoders.student_text(["a photo of a star"], 160)
    assert torch.equal(same, states) and everything.all() and not mask.all()
    assert torch.equal(encoders.student_text(["a photo of a star"], 160)[1], mask)


def test_a_teacher_that_is_asked_wrongly(monkeypatch):
    seen = []
    monkeypatch.setattr(SD3Transformer2DModel, "forward", lambda self, x, timestep, **others: seen.append(timestep))
    monkeypatch.setattr(Teacher, "text", lambda self, ids: seen.append(ids))
    with failures.time_from_0_to_1():
        SD3Transformer2DModel.forward(None, None, timestep=torch.tensor([750.0]))
    SD3Transformer2DModel.forward(None, None, timestep=torch.tensor([750.0]))
    with failures.others_captions():
        Teacher.text(None, torch.tensor([1, 2]))
    Teacher.text(None, torch.tensor([1, 2]))
    assert [x.tolist() for x in seen] == [[0.75], [750.0], [0, 1], [1, 2]]


def test_a_target_that_is_not_divided_by_t(monkeypatch):
    """(x_t - x0_T) / t becomes x_t - x0_T."""
    monkeypatch.setattr(step_distill, "solve", lambda teacher, x_t, *others: 0.25 * x_t)
    x, t = torch.randn(2, 16, 4, 4), torch.tensor([0.5, 1.0])
    args = types.SimpleNamespace(teacher_guidance=3.0, solver_steps=8)
    right = step_distill.target_velocity(None, None, x, t, None, args, 3.0)
    with failures.target_not_divided():
        wrong = step_distill.target_velocity(None, None, x, t, None, args, 3.0)
    assert torch.allclose(wrong, 0.75 * x) and torch.allclose(right, 0.75 * x / t[:, None, None, None])


def test_large_numbers_inside_change_no_picture():
    """GroupNorm divides them away: what fails in float16 is the form of the arithmetic, not the network."""
    torch.manual_seed(0)
    network, z = decoder.TinyDecoder(decoder.PRESETS["tiny"]).eval(), torch.randn(1, 16, 4, 4)
    largest = []
    for block in network.modules():
        if isinstance(block, decoder.Block):
            assert isinstance(block.body[3], torch.nn.GroupNorm)
            block.body[3].register_forward_pre_hook(lambda norm, inputs: largest.append(inputs[0].abs().max().item()))
    with torch.no_grad():
        before = network(z)
        small = max(largest)
        after = failures.large_inside(network)(z)
    assert max(largest) == pytest.approx(300 * small, rel=0.2) and torch.allclose(before, after, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.usefixtures("at_home")
def test_a_training_breaks_and_a_figure_is_made_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(failures, "FM", "--pictures 64 --batch 4")
    monkeypatch.setattr(failures, "PROMPTS", failures.PROMPTS[:1])
    flags = ["fm_lr", "--steps", "1", "--out", str(tmp_path), "--device", "cpu"]
    failures.main(flags)
    printed = capsys.readouterr().out
    assert "$ python train_fm.py --pictures 64 --batch 4 --steps 1" in printed and "--lr 0.1 --steps 1" in printed
    with Image.open(tmp_path / "failure_fm_lr.png") as picture:
        assert picture.text["Steps"] == "1" and picture.text["Title"] == "python -m studies.failures fm_lr"
        assert picture.width > 1000
    failures.main(flags)
    assert capsys.readouterr().out.endswith("failure_fm_lr.png: up to date\n")
    failures.main(["--list", "--steps", "3", "--out", str(tmp_path), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FAILURES) and all("to be made" in line for line in lines)
    failures.main(["fm_lr", "--steps", "3", "--only-drawing", "--out", str(tmp_path), "--device", "cpu"])
    assert capsys.readouterr().out == ""


def test_only_a_nan_is_what_is_wanted(monkeypatch, tmp_path):
    args = failures.parse_arguments(["--device", "cpu"])
    args.work = tmp_path
    for message, raised in (("the loss or its gradient became NaN or infinite by step 7", False), ("the disk is full", True)):

        def main(flags, message=message):
            raise SystemExit(message)

        monkeypatch.setattr(failures.train_fm, "main", main)
        if raised:
            with pytest.raises(SystemExit, match="the disk is full"):
                failures.train(args, "fm", failures.FM, "x", 2)
        else:
            folder, log, ended = failures.train(args, "fm", failures.FM, "x", 2)
            assert folder is None and log.rows == [] and ended == ", then NaN"
            assert failures.look(args, "fm", folder)[0].getextrema() == ((187, 187),) * 3


def test_a_name_that_is_none_ends_in_one_sentence():
    with pytest.raises(SystemExit, match="there is no failure 'fm_mesk'; there are fm_mask"):
        failures.main(["fm_mesk"])
