"""Studies: speed times the stages' own steps, which learn and whose FLOPs are the networks'; ladder times and counts each step;
peers are comparable; the lab and the zoo go on where they were stopped."""

import argparse
import importlib
import json
import shlex
import time
from pathlib import Path

import pytest
import torch

import model
from assets import make_zoo
from common import training
from common.latents import in_memory
from common.stopwatch import counting
from model import LADDER, PRESETS, UNet, UNetConfig
from studies import costs, lab, ladder, peers, silence, speed
from studies.sizes import count
from studies.students import same_start

SMALL = ["--size", "tiny", "--batch", "2", "--tokens", "13", "--device", "cpu", "--rounds", "1"]


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_timed_step_is_a_training_step(stage):
    """Every weight of the student moves, none of the teacher's."""
    torch.manual_seed(0)
    device, args = torch.device("cpu"), argparse.Namespace(batch=2)
    data = speed.RandomLatents(PRESETS["tiny"], 8, speed.TEACHERS["toy"], 13)
    teacher = speed.RandomTeacher("toy", data, device, torch.float32, speed.spread("toy"), captions=3)
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


# ------------------------------------------------------------------------------------------------------------------
# Peers, the lab, the zoo


def test_peers_are_of_one_size_and_take_the_same_inputs():
    cfg = PRESETS["tiny"]
    inputs = torch.randn(2, 16, 8, 8), torch.rand(2), torch.randn(2, 13, cfg.text_dim), torch.ones(2, 13, dtype=torch.bool)
    sizes = {}
    for name in ("ours", "diffusers", "dit"):
        net = peers.build(name, cfg, 8)
        out = net(*inputs)
        out.square().mean().backward()
        assert out.shape == (2, 16, 8, 8)
        sizes[name] = sum(p.numel() for p in net.parameters())
        assert len(training.make_optimizers(net, 1e-3, "muon")[1].param_groups[0]["params"]) > 40  # blocks of all three
    assert sizes["dit"] == pytest.approx(sizes["ours"], rel=0.06) and sizes["diffusers"] > sizes["ours"]


def test_a_peer_does_not_see_padding():
    cfg = PRESETS["tiny"]
    x, t, text = torch.randn(1, 16, 8, 8), torch.rand(1), torch.randn(1, 13, cfg.text_dim)
    mask = torch.arange(13)[None] < 7
    for name in ("ours", "diffusers", "dit"):
        net = peers.build(name, cfg, 8).eval()
        for w in net.parameters():  # gates and last layers start at zero
            torch.nn.init.normal_(w, 0, 0.05)
        with torch.no_grad():
            one, other = (net(x, t, text + noise * ~mask[..., None], mask) for noise in (0.0, 3.0))
            seen = net(x, t, text + 3.0 * mask[..., None], mask)
        assert torch.allclose(one, other, atol=1e-4) and not torch.allclose(one, seen, atol=1e-3), name


@pytest.mark.usefixtures("at_home")
def test_peers_train_and_are_drawn(capsys):
    flags = ["--minutes", "0.03", "--only", "dit", "--points", "1", "--per-family", "1", "--pictures", "64", "--device", "cpu",
             "--batch"]  # fmt: skip
    peers.main([*flags, "4"])
    report = json.loads(Path("runs/studies/peers/peers.json").read_text())["dit, 0.005"]
    assert Path("runs/studies/peers/peers.png").is_file() and report["parameters"] > 6e6
    assert report["rows"][-1]["step"] > 2 and 0 < report["rows"][-1]["val_loss"] < 3
    assert "dit, 0.005 " in capsys.readouterr().out
    peers.main([*flags, "4"])  # the table and the figure once more
    assert json.loads(Path("runs/studies/peers/peers.json").read_text())["dit, 0.005"] == report
    with pytest.raises(SystemExit, match="other settings"):
        peers.main([*flags, "8"])


def test_every_command_of_the_lab_is_one_that_its_stage_understands(tmp_path, capsys):
    lab.main(["--dry", "--out", str(tmp_path), "--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(lab.STAGES) == 5
    for line in lines:
        _, script, *flags = shlex.split(line)
        args = importlib.import_module(script.removesuffix(".py")).parse_arguments(flags)
        assert Path(args.out).parent == tmp_path and getattr(args, "seed", 3) == 3
    assert f"--init {tmp_path}/fm" in lines[1] and f"--init {tmp_path}/distill" in lines[3]


def test_the_lab_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    ran = []

    def stage(name, fails=False):
        def main(flags):
            ran.append((name, "--resume" in flags))
            if fails and len(ran) == 2:
                raise KeyboardInterrupt

        return name, main, "--out {out}/" + name

    monkeypatch.setattr(lab, "STAGES", {"fm": stage("fm"), "distill": stage("distill", fails=True), "build": stage("build")})
    args, done = lab.parse_arguments(["--out", str(tmp_path)]), {}
    with pytest.raises(KeyboardInterrupt):
        lab.run_stages(args, done)
    done = json.loads((tmp_path / "lab.json").read_text())
    assert done["fm"]["complete"] and "complete" not in done["distill"] and done["distill"]["seconds"] >= 0
    lab.run_stages(args, done)
    assert ran == [("fm", True), ("distill", True), ("distill", True), ("build", False)] and done["distill"]["complete"]
    assert len(done["distill"]["machines"]) == 1 and done["fm"]["machines"][0]["commit"]
    with pytest.raises(SystemExit, match="go on with --resume"):
        lab.main(["--out", str(tmp_path)])
    (tmp_path / "lab.json").write_text(json.dumps(done | {"settings": {"seed": 0, "teacher": "assets/toy-sd3"}}))
    with pytest.raises(SystemExit, match="holds a lab of .*'seed': 0.*not of .*'seed': 1"):
        lab.main(["--out", str(tmp_path), "--resume", "--seed", "1"])


def test_the_zoo_is_made_in_order_and_each_part_once(tmp_path, monkeypatch, capsys):
    made = []

    def make(part, args, device):
        made.append(part)
        if made == ["vae", "text"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(make_zoo, "make", make)
    flags = ["--out", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit, match="fm needs vae and text first"):
        make_zoo.main([*flags, "--only", "fm"])
    with pytest.raises(KeyboardInterrupt):
        make_zoo.main(flags)
    log = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "zoo" / "log").iterdir()}
    assert log["vae"]["done"] and "done" not in log["text"] and log["text"]["seconds"] >= 0 and log["vae"]["commits"]
    make_zoo.main(flags)
    assert made == ["vae", "text", "text", "teacher", "fm", "decoder", "distill", "step_distill"]
    with pytest.raises(SystemExit, match="distill would stay as they are, made from what --force deletes"):
        make_zoo.main([*flags, "--only", "fm", "--force"])
    with pytest.raises(SystemExit, match="give one of them"):
        make_zoo.main([*flags, "--list", "--force"])
    make_zoo.main([*flags, "--only", "step_distill", "--force"])
    assert made[-1] == "step_distill" and len(made) == 9
    make_zoo.main([*flags, "--list"])
    assert len(made) == 9 and "step_distill" in capsys.readouterr().out


def test_rows_of_one_table_begin_from_the_same_weights(tmp_path):
    init, args = tmp_path / "student", argparse.Namespace(out=tmp_path / "study", init=tmp_path / "student")
    same_start(args)  # no student there: who loads it says so
    init.mkdir()
    (init / "model.safetensors").write_bytes(b"some weights")
    same_start(args)
    (args.out / "task-seed0").mkdir()
    init.rename(tmp_path / "renamed")
    same_start(argparse.Namespace(out=args.out, init=tmp_path / "renamed"))
    (tmp_path / "renamed" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(SystemExit, match="began from other weights"):
        same_start(argparse.Namespace(out=args.out, init=tmp_path / "renamed"))
    (args.out / "init.json").unlink()
    with pytest.raises(SystemExit, match="are not told what they began from"):
        same_start(argparse.Namespace(out=args.out, init=tmp_path / "renamed"))


def test_wall_time_adds_up_over_sittings_and_survives_an_error():
    record, saved = {"seconds": 100.0}, []
    with pytest.raises(KeyboardInterrupt), counting(record, lambda: saved.append(record["seconds"])):
        raise KeyboardInterrupt
    with counting(record, lambda: saved.append(record["seconds"])):
        time.sleep(0.2)
    assert saved[0] == pytest.approx(100, abs=0.1) and saved[-1] == record["seconds"] == pytest.approx(100.2, abs=0.15)


def test_the_zoos_commands_are_ones_that_the_stages_understand():
    for part in make_zoo.TRAININGS:
        script, *flags = shlex.split(make_zoo.command_of(part, argparse.Namespace(out=Path("assets"))))
        importlib.import_module(script.removesuffix(".py")).parse_arguments(flags)


@pytest.mark.usefixtures("at_home")
def test_the_ladder_is_trained_step_by_step(capsys):
    flags = ["--train", "--only", "a", "--steps", "2", "--pictures", "64", "--batch", "2", "--seeds", "1", "--per-family", "1",
             "--device", "cpu"]  # fmt: skip
    ladder.main(flags)
    run = Path("runs/studies/ladder/a-seed0")
    shape = UNetConfig(**json.loads((run / "config.json").read_text())["unet"])
    assert shape == model.ladder("a", PRESETS["tiny"]) and not shape.separable
    assert (run.parent / "ladder.png").is_file() and json.loads((run.parent / "ladder.json").read_text())["a"][0]["val_loss"] > 0
    weights = (run / "model.safetensors").stat().st_mtime_ns
    ladder.main(flags)  # what is finished is kept
    assert weights == (run / "model.safetensors").stat().st_mtime_ns
    assert "FID 3.76" in capsys.readouterr().out


def test_the_recipes_costs_are_what_the_command_prints(capsys):
    """Line for line; T5's FLOPs against the sum of its matrices, disk against the sizes of what shards hold."""
    costs.main([])
    printed = capsys.readouterr().out.strip()
    assert printed in (Path(__file__).parent.parent / "recipes" / "t2i.md").read_text(encoding="utf-8")
    # T5 v1.1 XXL's encoder: 24 blocks of four 4096 x 4096 and three 4096 x 10240 matrices; queries by keys, weights by values
    matrices = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    params, flops = costs.count(costs.t5, 256)
    assert flops == 2 * 256 * matrices + 24 * 2 * 2 * 256 * 256 * 4096
    assert params == matrices + 32128 * 4096 + 24 * 2 * 4096 + 4096 + 32 * 64  # embeddings, norms, relative positions
    hours = 256 * 50_000 * flops / (0.35 * 989e12) / 3600
    (row,) = [line for line in printed.splitlines() if line.startswith("stage 2, T5")]
    assert float(row.split()[-1]) == pytest.approx(hours, abs=0.05)
    sizes = costs.disk(1, 128)
    assert sizes["latents of 1024 pixels"] == 1e6 * torch.zeros(16, 128, 128).half().nbytes
    assert sizes["CLIP's states"] == 1e6 * torch.zeros(77, 2048).half().nbytes
    assert sizes["Gemma's states"] == 1e6 * torch.zeros(128, 2304).half().nbytes


def test_a_silenced_part_is_missed_if_it_says_something():
    """A part whose last weights are 0 changes nothing, the others do; afterwards the network is what it was."""
    torch.manual_seed(0)
    cfg = UNetConfig((32, 64), (1, 1), mid_depth=1, layers=1, head_dim=32, groups=16, text_dim=48, self_attention=(False, True))
    net = UNet(cfg).eval()
    val = in_memory(torch.randn(8, 16, 8, 8), torch.arange(8) % 3, ["", "a", "b"], torch.randn(3, 5, 48), torch.ones(3, 5).bool(),
                  torch.randn(3, 8))  # fmt: skip
    device = torch.device("cpu")
    found = silence.parts(net)
    kinds = {"ResBlock", "feed-forward", "self-attention", "cross-attention", "what comes up"}
    assert {kind for kind, _ in found.values()} == kinds
    dead = ("mid.1.blocks.0.attn1", "mid.2")
    for module in (found[dead[0]][1].to_out, found[dead[1]][1][-1]):
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    before = silence.loss_without(net, None, val, 1.0, device)
    changed = {name: abs(silence.loss_without(net, module, val, 1.0, device) - before) for name, (_, module) in found.items()}
    assert all((change == 0) == (name in dead) for name, change in changed.items())
    assert silence.loss_without(net, None, val, 1.0, device) == before
