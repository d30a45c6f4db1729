"""bench.py times the stages' own steps: they learn, and their FLOPs are those of the networks."""

import argparse
import json

import pytest
import torch

import bench
from model import PRESETS, UNet, count

SMALL = ["--size", "tiny", "--batch", "2", "--tokens", "13", "--device", "cpu", "--rounds", "1"]


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_timed_step_is_a_training_step(stage):
    """Every weight of the student moves, none of the teacher's."""
    torch.manual_seed(0)
    device, args = torch.device("cpu"), argparse.Namespace(batch=2)
    data = bench.RandomLatents(PRESETS["tiny"], 8, bench.TEACHERS["toy"], 13)
    teacher = bench.RandomTeacher("toy", data, device, torch.float32, bench.spread("toy"))
    model = UNet(PRESETS["tiny"])
    before = {name: w.clone() for name, w in model.state_dict().items()}
    frozen = {name: w.clone() for name, w in teacher.net.state_dict().items()}
    bench.make_stage(stage, model, model, data, teacher, device, args)(0)
    assert all(not torch.equal(before[name], w) for name, w in model.state_dict().items())
    assert all(torch.equal(frozen[name], w) for name, w in teacher.net.state_dict().items())
    assert torch.isfinite(torch.cat([w.flatten() for w in model.parameters()])).all()


def test_flops_are_twice_the_macs_forward_and_three_times_that_with_backward():
    model, data = UNet(PRESETS["tiny"]), bench.RandomLatents(PRESETS["tiny"], 8, bench.TEACHERS["toy"], 13)
    macs = count(PRESETS["tiny"], 8, 13)[1]
    with bench.CountFlops() as counter, torch.no_grad():
        states, mask = data.text(torch.arange(2))
        model(torch.randn(2, 16, 8, 8), torch.rand(2), states.float(), mask)
    assert counter.total == pytest.approx(2 * 2 * macs, rel=0.02)
    step = bench.make_stage(1, model, model, data, None, torch.device("cpu"), argparse.Namespace(batch=2))
    with bench.CountFlops() as counter:
        step(0)
    assert counter.total == pytest.approx(3 * 2 * 2 * macs, rel=0.05)


def test_the_table(capsys):
    bench.main([*SMALL, "--stages", "1", "2", "3", "--modes", "channels_last", "--no-ladder", "--json"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert [row["stage"] for row in report["stages"]] == [1, 2, 3]
    assert all(row["pictures_per_second"] > 0 and 0 < row["share_of_peak"] < 1 for row in report["stages"])
    assert sum("% of the peak" in line for line in lines) == 3


def test_sdxl_has_the_public_models_size():
    with torch.device("meta"):
        n = sum(p.numel() for p in bench.sdxl().parameters())
    assert n == pytest.approx(2.56e9, rel=0.02)
