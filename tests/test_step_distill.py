"""Stage 3: the few-step target, the judge and who learns from it, the training as a user meets it."""

import csv
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel

import flow
import step_distill
from checkpoint import load_student
from encoders import FrozenEncoders
from sample import draw_pictures

pytestmark = pytest.mark.usefixtures("at_home")
ROOT = Path(__file__).parent.parent
SMALL = [
    "--init",
    "assets/zoo/fm",
    "--pictures",
    "64",
    "--batch",
    "4",
    "--solver-steps",
    "4",
    "--watch",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def finished(home):
    before = os.getcwd()
    os.chdir(home)
    step_distill.main([*SMALL, "--steps", "4", "--save-every", "2", "--out", "runs/whole"])
    os.chdir(before)
    return home / "runs" / "whole"


def weights(folder, prefix):
    """The tensors of a run's train_state whose names begin so."""
    state = safetensors.torch.load_file(folder / "train_state" / "state.safetensors")
    return {name: value for name, value in state.items() if name.startswith(prefix)}


class OnePicture:
    """A teacher for whom the data is a single latent: v = (x_t - x_0) / t at every t, a perfect field."""

    def __init__(self, x0):
        self.x0, self.calls = x0, []

    def __call__(self, x_t, t, ids, guidance=1.0):
        self.calls.append((len(x_t), guidance))
        return (x_t - self.x0) / flow.expand(t, x_t), []


# ------------------------------------------------------------------------------------------------------------------
# The few-step target


def test_solve_of_a_perfect_field_lands_on_x0():
    x0 = torch.randn(1, 16, 8, 8)
    times = flow.sampling_timesteps(4, 3.0)[:-1]
    x_t = flow.interpolate(x0.expand(4, -1, -1, -1), torch.randn(4, 16, 8, 8), times)
    teacher = OnePicture(x0)
    landed = step_distill.solve(teacher, x_t, times, torch.zeros(4, dtype=torch.long), 3.0, 3.0, steps=8)
    assert (landed - x0).abs().max() < 1e-5
    assert sum(rows for rows, _ in teacher.calls) == 8 + 6 + 4 + 2  # the less noise, the fewer steps


def test_solve_from_noise_is_the_sampler():
    """From t = 1 it takes the very steps of flow.euler_sample, for a field that bends."""
    noise, ids = torch.randn(3, 2, 4, 4), torch.zeros(3, dtype=torch.long)

    def bent(x, t, *_):
        return torch.sin(3 * x) + flow.expand(t, x) ** 2

    solved = step_distill.solve(lambda x, t, ids, g: (bent(x, t), []), noise, torch.ones(3), ids, 1.0, 3.0, steps=8)
    sampled = flow.euler_sample(bent, noise, (ids,), (ids,), 8, 1, 3.0)
    assert torch.allclose(solved, sampled, atol=1e-5)


def test_target_velocity_points_to_where_the_teacher_lands():
    x0, args = torch.randn(1, 16, 8, 8), step_distill.parse_arguments(SMALL)
    t = torch.tensor([1.0, 0.9, 0.5])
    x_t = flow.interpolate(x0.expand(3, -1, -1, -1), torch.randn(3, 16, 8, 8), t)
    ids = torch.zeros(3, dtype=torch.long)
    v = step_distill.target_velocity(OnePicture(x0), None, x_t, t, ids, args, 3.0)
    assert (flow.x0_from_velocity(x_t, v, t) - x0).abs().max() < 1e-5
    turbo = OnePicture(x0 + 1)  # a few-step teacher is asked once, and without guidance: it has it inside
    v = step_distill.target_velocity(OnePicture(x0), turbo, x_t, t, ids, args, 3.0)
    assert (flow.x0_from_velocity(x_t, v, t) - x0 - 1).abs().max() < 1e-5 and turbo.calls == [(3, 1.0)]


# ------------------------------------------------------------------------------------------------------------------
# What the student is asked about


class Captions:
    """Latents of a constant, so that x_0 is easy to recognise."""

    def __init__(self, value):
        self.value = value

    def batch(self, seed, step, size):
        return torch.full((size, 16, 8, 8), self.value), torch.zeros(size, dtype=torch.long)


def test_starting_points(monkeypatch):
    """At t = 1 nothing of x_0 is left; real rows lie on the straight line; own rows were walked there by the student."""
    monkeypatch.setattr(step_distill, "predict", lambda model, cfg, data, x, t, ids, device: torch.ones_like(x))
    args = step_distill.parse_arguments([*SMALL, "--batch", "64"])
    model = type("Student", (), {"cfg": None})
    times = flow.sampling_timesteps(4, 3.0)[:-1]
    runs = [step_distill.starting_points(model, Captions(value), args, times, 5, "cpu") for value in (0.0, 7.0)]
    (x0, eps, x_t, t, _, own), (_, _, other, *_) = runs
    assert torch.equal(x_t[t == 1], eps[t == 1]) and torch.equal(x_t[t == 1], other[t == 1])
    assert torch.allclose(x_t[~own], flow.interpolate(x0, eps, t)[~own])
    assert torch.allclose(x_t[own], (eps + flow.expand(t - 1, eps))[own], atol=1e-6)  # v = 1 all the way from t = 1
    assert 16 < own.sum() < 48 and set(t.tolist()) == set(times.tolist())


def test_both_sides_of_the_judge_are_noised_alike():
    """Real and predicted latents of unit deviation have deviation sqrt((1 - t)^2 + t^2) at level t, one like the other."""
    g = torch.Generator().manual_seed(0)
    real, fake, noise = (torch.randn(256, 16, 8, 8, generator=g) for _ in range(3))
    for level in (0.1, 0.5, 0.9):
        t = torch.full((256,), level)
        for latents in (real, fake):
            noised = flow.interpolate(latents, noise, t)
            assert noised.std().item() == pytest.approx(((1 - level) ** 2 + level**2) ** 0.5, abs=0.01)
        same = flow.interpolate(real, noise, t) - flow.interpolate(fake, noise, t)
        assert torch.allclose(
            same, (1 - level) * (real - fake), atol=1e-5
        )  # the noise cancels: only the latents differ


# ------------------------------------------------------------------------------------------------------------------
# The judge


class Blocks:
    """Stands in for a Teacher: two features that are linear in the latents."""

    layers, feature_dim = (0, 1), 16

    def __call__(self, latents, t, ids):
        return latents, [latents, 2 * latents]


def test_judge_answers_for_every_head_and_token_and_trains_only_heads():
    judge = step_distill.Discriminator(Blocks())
    latents = torch.randn(3, 16, 4, 4, requires_grad=True)
    answers = judge(latents, torch.ones(3), torch.zeros(3, dtype=torch.long))
    assert answers.shape == (3, 2 * 16)
    assert all(name.startswith("heads.") for name in judge.state_dict())
    answers.mean().backward()
    assert latents.grad.abs().sum() > 0  # this is how the student learns


def test_gradient_penalty_is_the_squared_slope_on_real_features():
    judge = step_distill.Discriminator(Blocks())
    features = [torch.randn(2, 16, 4, 4) for _ in range(2)]
    penalty, answers = step_distill.gradient_penalty(judge, features)
    expected = 0.0
    for head, f in zip(judge.heads, features, strict=True):
        f = f.clone().requires_grad_()
        expected += torch.autograd.grad(head(f).sum(), f)[0].square().sum() / 2
    assert torch.allclose(penalty, expected) and torch.allclose(answers, judge.judge(features))
    penalty.backward()
    assert all(p.grad is not None for head in judge.heads for p in head[1].parameters() if p.dim() > 1)


def test_each_side_learns_for_itself(home):
    """With a rate of zero on one side its weights stay bit for bit, while the other side's move."""
    start = safetensors.torch.load_file(home / "assets/zoo/fm/model.safetensors")
    ends = {}
    for name, rates in (
        ("judge", ["--lr", "0"]),
        ("student", ["--heads-lr", "0"]),
        ("none", ["--lr", "0", "--heads-lr", "0"]),
    ):
        out = home / "runs" / name
        step_distill.main([*SMALL, "--steps", "2", *rates, "--out", str(out)])
        ends[name] = {network: weights(out, network) for network in ("model.", "heads.")}
    for name, moved in (("judge", False), ("student", True)):
        assert any(not torch.equal(v, start[k[6:]].float()) for k, v in ends[name]["model."].items()) == moved
        assert any(not torch.equal(v, ends["none"]["heads."][k]) for k, v in ends[name]["heads."].items()) == (
            not moved
        )


def test_teacher_stays_as_it_is(home, monkeypatch):
    made = []

    class Watched(step_distill.Teacher):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append((self, {name: value.clone() for name, value in self.net.state_dict().items()}))

    monkeypatch.setattr(step_distill, "Teacher", Watched)
    step_distill.main([*SMALL, "--steps", "2", "--out", "runs/watched"])
    ((teacher, before),) = made
    assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())
    assert all(p.grad is None for p in teacher.net.parameters())


def test_both_losses_reach_the_student(home):
    """Adversarial, distillation and both give three different first gradients, also at the UNet's first layer."""
    gradients = []
    for losses in step_distill.ROWS.values():
        out = home / "runs" / losses
        step_distill.main([*SMALL, "--steps", "1", "--losses", losses, "--out", str(out)])
        gradients.append(weights(out, "optimizer.")["optimizer.0.0.exp_avg"].flatten())
    directions = [F.normalize(gradient, dim=0) for gradient in gradients]
    assert all((a - b).norm() > 1e-3 for i, a in enumerate(directions) for b in directions[:i])


# ------------------------------------------------------------------------------------------------------------------
# Training


def test_a_run_knows_how_it_wants_to_be_sampled(finished):
    model, config = load_student(finished)
    assert config["sampling"] == {"steps": 4, "guidance": 1.0, "shift": 3.0, "times": [1.0, 0.9, 0.75, 0.5, 0.0]}
    calls = []
    model.register_forward_pre_hook(lambda net, inputs: calls.append((len(inputs[0]), round(inputs[1][0].item(), 3))))
    encoders = FrozenEncoders("assets/toy-sd3")
    assert draw_pictures(model, config, encoders, ["a photo of a star"], [0])[0].size == (64, 64)
    assert calls == [(1, 1.0), (1, 0.9), (1, 0.75), (1, 0.5)]  # one forward a step: no guidance
    calls.clear()
    draw_pictures(model, config, encoders, ["a photo of a star"], [0], steps=2)
    assert calls == [(1, 1.0), (1, 0.75)]
    rows = list(csv.DictReader(open(finished / "log.csv")))
    assert [row["step"] for row in rows] == ["2", "4"]
    for name in ("loss_kd", "loss_d", "grad_norm", "grad_norm_d", "std_ratio_low", "std_ratio_high", "mean_gap"):
        assert float(rows[-1][name]) > 0, name
    assert {"d_real", "d_fake", "score_1", "score_8"} <= rows[0].keys()
    assert (finished / "gan.png").is_file() and (finished / "samples/progress.png").is_file()


def test_resumed_is_bit_for_bit_the_same(finished, home):
    arguments = [*SMALL, "--steps", "4", "--save-every", "2", "--out", str(home / "runs" / "resumed")]
    save = step_distill.save_state

    def save_and_stop(*args, **networks):
        save(*args, **networks)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step_distill, "save_state", save_and_stop)
        step_distill.main(arguments)
    with pytest.raises(SystemExit, match="--losses was adv"):
        step_distill.main([*arguments, "--resume", "--losses", "adv"])
    step_distill.main([*arguments, "--resume"])
    ours, theirs = weights(home / "runs/resumed", ""), weights(finished, "")
    assert (home / "runs/resumed/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert {name.split(".")[0] for name in theirs} == {
        "model",
        "ema",
        "heads",
        "optimizer",
    } and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # heads and optimizers as well


def test_turbo_folder_of_another_shape(tmp_path, home):
    """SD3.5-Large-Turbo's layout, with normed queries and keys: it gives the targets and it looks for the judge."""
    folder = tmp_path / "turbo"
    folder.mkdir()
    for part in (ROOT / "assets" / "toy-sd3").iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    torch.manual_seed(0)
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, qk_norm="rms_norm",
        joint_attention_dim=192, caption_projection_dim=32, pooled_projection_dim=160, pos_embed_max_size=16,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    out = home / "runs" / "turbo"
    step_distill.main([*SMALL, "--steps", "2", "--turbo", str(folder), "--layers", "0", "1", "--out", str(out)])
    assert weights(out, "heads.")["heads.heads.0.1.weight"].shape[1] == 32  # the turbo's width, not the toy's 128
    assert load_student(out)[1]["settings"]["turbo"] == str(folder)


def test_figures_and_ablation(home, finished, capsys):
    step_distill.main([*SMALL, "--compare", str(finished), "--before", "assets/zoo/fm", "--out", "runs/figures"])
    assert (home / "runs/figures/compare.png").is_file() and "times as fast" in capsys.readouterr().out
    arguments = [*SMALL, "--ablate", "--steps", "1", "--seeds", "1", "--per-family", "1", "--out", "runs/ablation"]
    step_distill.main(arguments)
    first = capsys.readouterr().out
    assert all(name in first for name in step_distill.ROWS)
    step_distill.main(arguments)  # everything is there: the same table, at once
    assert capsys.readouterr().out.split("8 steps")[1] == first.split("8 steps")[1]
    results = json.loads((home / "runs/ablation/ablation.json").read_text())
    assert set(results) == set(step_distill.ROWS)


def test_bad_input_ends_in_one_sentence(tmp_path):
    for arguments, words in (
        (["--init", "nowhere"], "is not a student"),
        (["--turbo", "nowhere"], "has no transformer"),
        (["--layers", "9"], "6 blocks"),
        (["--size", "imagenet"], "is not of --size imagenet"),
        (["--for-steps", "0"], "at least 1"),
        (["--own", "2"], "--own must be"),
        (["--lr", "1e30"], "learning rate"),
    ):
        with pytest.raises(SystemExit, match=words):
            step_distill.main([*SMALL, "--steps", "3", "--out", str(tmp_path / "out"), *arguments])
