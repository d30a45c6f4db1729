"""Studies: speed times the stages' own steps, which learn and whose FLOPs are the networks'; ladder times and counts each step."""

import argparse
import json

import pytest
import torch

from model import LADDER, PRESETS, UNet, UNetConfig, count
from studies import ladder, speed

SMALL = ["--size", "tiny", "--batch", "2", "--tokens", "13", "--device", "cpu", "--rounds", "1"]


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_timed_step_is_a_training_step(stage):
    """Every weight of the student moves, none of the teacher's."""
    torch.manual_seed(0)
    device, args = torch.device("cpu"), argparse.Namespace(batch=2)
    data = speed.RandomLatents(PRESETS["tiny"], 8, speed.TEACHERS["toy"], 13)
    teacher = speed.RandomTeacher("toy", data, device, torch.float32, speed.spread("toy"))
    model = UNet(PRESETS["tiny"])
    before = {name: w.clone() for name, w in model.state_dict().items()}
    frozen = {name: w.clone() for name, w in teacher.net.state_dict().items()}
    speed.make_stage(stage, model, model, data, teacher, device, args)(0)
    assert all(not torch.equal(before[name], w) for name, w in model.state_dict().items())
    assert all(torch.equal(frozen[name], w) for name, w in teacher.net.state_dict().items())
    assert torch.isfinite(torch.cat([w.flatten() for w in model.parameters()])).all()


def test_flops_are_twice_the_macs_forward_and_three_times_that_with_backward():
    model, data = UNet(PRESETS["tiny"]), speed.RandomLatents(PRESETS["tiny"], 8, speed.TEACHERS["toy"], 13)
    macs = count(PRESETS["tiny"], 8, 13)[1]
    with speed.CountFlops() as counter, torch.no_grad():
        states, mask = data.text(torch.arange(2))
        model(torch.randn(2, 16, 8, 8), torch.rand(2), states.float(), mask)
    assert counter.total == pytest.approx(2 * 2 * macs, rel=0.02)
    step = speed.make_stage(1, model, model, data, None, torch.device("cpu"), argparse.Namespace(batch=2))
    with speed.CountFlops() as counter:
        step(0)
    assert counter.total == pytest.approx(3 * 2 * 2 * macs, rel=0.05)


def test_the_table(capsys):
    speed.main([*SMALL, "--stages", "1", "2", "3", "--modes", "channels_last", "--json"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert [row["stage"] for row in report["stages"]] == [1, 2, 3]
    assert all(row["pictures_per_second"] > 0 and 0 < row["share_of_peak"] < 1 for row in report["stages"])
    assert sum("% of the peak" in line for line in lines) == 3


def test_sdxl_has_the_public_models_size():
    with torch.device("meta"):
        n = sum(p.numel() for p in ladder.sdxl().parameters())
    assert n == pytest.approx(2.56e9, rel=0.02)


SMALL_UNET = UNetConfig(channels=(32, 64), depth=(1, 1), self_attention=(False, True), mid_depth=1, layers=1, head_dim=32,
                        groups=16, text_dim=48, time_dim=64)  # fmt: skip


def test_ladder_is_timed_in_one_run(monkeypatch, capsys):
    monkeypatch.setattr(ladder, "ladder", lambda step: SMALL_UNET)
    ladder.main(["--forward", "--latent", "8", "--rounds", "1", "--device", "cpu", "--json"])
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    assert list(report["forward_seconds"]) == list(LADDER)
    assert min(report["forward_seconds"].values()) > 0 and "c2 beside b" in printed


def test_training_of_the_ladder_is_timed(capsys):
    ladder.main(["--training", "--only", "a", "f", "--batch", "2", "--rounds", "1", "--device", "cpu", "--json"])
    lines = capsys.readouterr().out.splitlines()
    speeds = json.loads(lines[-1])["training_pictures_per_second"]
    assert set(speeds) == {"a", "f"} and min(speeds.values()) > 0 and "1.00 x a" in lines[1]


def test_parts_of_the_unet(capsys):
    ladder.main(["--json"])
    parts = json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]
    assert sum(macs for _, macs in parts["imagenet"].values()) == count(PRESETS["imagenet"], 32)[1]
