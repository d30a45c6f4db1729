"""Stage 3: the few-step target, the discriminator and who learns from it, the training as a user meets it."""

import csv
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel

import distill
import flow
import step_distill
import train_fm
from common import training
from common.checkpoint import load_student
from common.encoders import FrozenEncoders
from data import open_data
from evaluate import prompts_of
from model import UNet
from sample import draw_pictures
from studies import few_steps

pytestmark = pytest.mark.usefixtures("at_home")
ROOT = Path(__file__).parent.parent
SMALL = ["--init", "assets/zoo/fm", "--pictures", "64", "--batch", "4", "--solver-steps", "4", "--watch", "0", "--device", "cpu",
         "--ramp", "0"]  # fmt: skip


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

    solved = step_distill.solve(lambda x, t, ids, guidance: (bent(x, t), []), noise, torch.ones(3), ids, 1.0, 3.0, steps=8)
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

    shape = (16, 8, 8)

    def __init__(self, value):
        self.value = value

    def batch(self, seed, step, size, rows=slice(None)):
        return torch.full((size, 16, 8, 8), self.value)[rows], (torch.arange(size) % 3)[rows]

    def text(self, ids):
        return torch.zeros(len(ids), 2, 3), torch.ones(len(ids), 2, dtype=torch.bool)


def test_points(monkeypatch):
    """At t = 1 nothing of x_0 is left; real rows lie on the straight line; on-policy rows were walked there by the student."""
    monkeypatch.setattr(step_distill, "predict", lambda model, b: flow.expand(b.t**2 + b.ids, b.x_t) * torch.ones_like(b.x_t))
    args = step_distill.parse_arguments([*SMALL, "--batch", "64"])
    times, cpu = flow.sampling_timesteps(4, 3.0)[:-1], torch.device("cpu")
    p, other = (
        step_distill.walk_on_policy(None, step_distill.draw_points(Captions(value), args, times, 5), times, cpu, at_once=10)
        for value in (0.0, 7.0)
    )
    assert torch.equal(p.x_t[p.t == 1], p.eps[p.t == 1]) and torch.equal(p.x_t[p.t == 1], other.x_t[p.t == 1])
    assert torch.allclose(p.x_t[~p.on_policy], flow.interpolate(p.x_0, p.eps, p.t)[~p.on_policy])
    assert torch.equal(p.v, p.eps - p.x_0) and torch.equal(p.t, times[p.which])
    for i in p.on_policy.nonzero()[:, 0]:  # Euler steps from one time to the next, with the velocity of that time and caption
        walked, path = p.eps[i].clone(), [*times.tolist(), 0.0]
        for now, then in zip(path[:-1], path[1:], strict=True):
            if p.t[i] < now - 1e-6:
                walked += (then - now) * (now**2 + p.ids[i])
        assert torch.allclose(p.x_t[i], walked, atol=1e-5)
    assert 12 < p.on_policy.sum() < 36 and set(p.t.tolist()) == set(times.tolist()) and not p.on_policy[p.t == 1].any()


def test_the_discriminator_sees_both_sides_through_the_same_noise(home, monkeypatch):
    """Of the teacher's calls in one step: real and predicted latents at one level with one noise, which cancels."""
    calls = []

    class Watched(step_distill.Teacher):
        def __call__(self, x_t, t, ids, guidance=1.0):
            calls.append((x_t.detach().clone(), t.clone()))
            return super().__call__(x_t, t, ids, guidance)

    monkeypatch.setattr(step_distill, "Teacher", Watched)
    seen = []
    monkeypatch.setattr(
        step_distill.flow, "x0_from_velocity", lambda x, v, t: seen.append(x - flow.expand(t, x) * v) or seen[-1]
    )
    step_distill.main([*SMALL, "--steps", "1", "--losses", "adv", "--batch", "32", "--out", "runs/noised"])
    (real, level), (fake, same_level), (again, third_level) = calls[:3]
    assert torch.equal(level, same_level) and torch.equal(level, third_level) and torch.equal(fake, again)
    flags = step_distill.parse_arguments(SMALL)
    data, _ = open_data(flags.data, FrozenEncoders("assets/toy-sd3"), pictures=flags.pictures)
    x0 = data.batch(0, 0, 32)[0]
    assert torch.allclose(real - fake, flow.expand(1 - level, real) * (x0 - seen[0].detach()), atol=1e-5)
    noise = (real - flow.expand(1 - level, real) * x0) / flow.expand(level, real)
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)


# ------------------------------------------------------------------------------------------------------------------
# The discriminator


class Blocks:
    """Stands in for a Teacher: two features that are linear in the latents."""

    layers, feature_dim = (0, 1), 16

    def __call__(self, latents, t, ids):
        return latents, [latents, 2 * latents]


def test_it_has_logits_for_every_head_and_token_and_trains_only_heads():
    discriminator = step_distill.Discriminator(Blocks())
    latents = torch.randn(3, 16, 4, 4, requires_grad=True)
    logits = discriminator(latents, torch.ones(3), torch.zeros(3, dtype=torch.long))
    assert logits.shape == (3, 2 * 16)
    assert all(name.startswith("heads.") for name, _ in discriminator.named_parameters())
    assert all(name.startswith("heads.") for name in discriminator.state_dict())  # the teacher is not saved
    logits.mean().backward()
    assert latents.grad.abs().sum() > 0  # this is how the student learns


def test_gradient_penalty_is_the_squared_slope_on_real_features():
    discriminator = step_distill.Discriminator(Blocks())
    features = [torch.randn(2, 16, 4, 4) for _ in range(2)]
    penalty, logits = step_distill.gradient_penalty(discriminator, features)
    expected = 0.0
    for head, f in zip(discriminator.heads, features, strict=True):
        f = f.clone().requires_grad_()
        expected += torch.autograd.grad(head(f).sum(), f)[0].square().sum() / (2 * 4 * 4)
    assert torch.allclose(penalty, expected) and torch.allclose(logits, discriminator.logits(features))
    penalty.backward()
    assert all(p.grad is not None for head in discriminator.heads for p in head.parameters() if p.dim() > 1)


def test_ramp_lets_the_heads_begin_alone():
    args = SimpleNamespace(adv_weight=0.4, ramp=50)
    assert [step_distill.ramp(step, args) for step in (0, 50, 75, 100, 900)] == pytest.approx([0, 0, 0.2, 0.4, 0.4])
    args.ramp = 0
    assert step_distill.ramp(0, args) == 0.4


def test_wrong_captions_are_real_latents_that_the_heads_learn_to_refuse(home, monkeypatch):
    calls = []

    class Watched(step_distill.Teacher):
        def __call__(self, x_t, t, ids, guidance=1.0):
            calls.append((x_t.detach().clone(), ids.clone()))
            return super().__call__(x_t, t, ids, guidance)

    monkeypatch.setattr(step_distill, "Teacher", Watched)
    heads = {}
    for weight in ("0", "0.5"):
        out = home / "runs" / f"wrong-{weight}"
        step_distill.main([*SMALL, "--steps", "1", "--losses", "adv", "--wrong-captions", weight, "--out", str(out)])
        heads[weight] = weights(out, "discriminator.")
    (real, ids), _, (again, others) = calls[-4:-1]
    assert torch.equal(real, again) and torch.equal(others, ids.roll(1)) and not torch.equal(others, ids)
    assert not all(torch.equal(heads["0"][name], heads["0.5"][name]) for name in heads["0"])


def test_hinge_and_who_wants_what():
    """Sure and right costs nothing, not knowing costs 2, sure and wrong more; the student's step raises the logits."""
    logits = torch.full((2, 5), 2.0)
    assert step_distill.hinge(logits, -logits) == 0 and step_distill.hinge(0 * logits, 0 * logits) == 2
    assert step_distill.hinge(-logits, logits) == 6
    torch.manual_seed(0)
    discriminator, real, fake = step_distill.Discriminator(Blocks()), torch.randn(8, 16, 4, 4) + 1, torch.randn(8, 16, 4, 4) - 1
    optimizer, of = torch.optim.AdamW(discriminator.parameters(), lr=1e-3), (torch.ones(8), torch.zeros(8, dtype=torch.long))
    for _ in range(40):
        loss = step_distill.hinge(discriminator(real, *of), discriminator(fake, *of))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert discriminator(real, *of).mean() > 0.5 and discriminator(fake, *of).mean() < -0.5


def test_distillation_loss():
    """Real points have S, on-policy points the target alone, at the size that the ratio gives it."""
    task, kd = torch.tensor([0.4, 0.8, 5.0], requires_grad=True), torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    t, on_policy = torch.tensor([0.9, 0.6, 0.75]), torch.tensor([False, False, True])
    ratio = torch.tensor([2.0, 3.0, 4.0])
    value = step_distill.distillation_loss(task, kd, t, on_policy, ratio)
    assert torch.allclose(value[:2], step_distill.scaled(task, kd, t, ratio)[:2])
    assert torch.allclose(value[2], 4 * kd[2])
    value.sum().backward()
    assert task.grad[2] == 0 and torch.allclose(kd.grad[2], torch.tensor(4.0)) and (kd.grad[:2] > 0).all()
    half, capped = torch.full((3,), 0.5), step_distill.distillation_loss(task, kd, torch.full((3,), 0.5), on_policy, ratio, 0.5)
    assert torch.allclose(step_distill.distillation_loss(task, kd, half, on_policy, ratio)[:2], task[:2])
    assert torch.allclose(capped, torch.stack([0.5 * task[0] + kd[0], 0.5 * task[1] + 1.5 * kd[1], 4 * kd[2]]))


def test_the_real_side_can_be_where_the_target_leads(home, monkeypatch):
    """Here to latents of 7: noised they lie far above the data's, and the predicted side is what it was."""
    features, seen = step_distill.Discriminator.features, []

    def watched(self, latents, t, ids):
        seen.append(latents.detach().clone())
        return features(self, latents, t, ids)

    monkeypatch.setattr(step_distill.Discriminator, "features", watched)
    monkeypatch.setattr(step_distill, "target_velocity", lambda teacher, turbo, x_t, t, *_: (x_t - 7) / t.view(-1, 1, 1, 1))
    for real in ("data", "teacher"):
        out = home / "runs" / f"real-{real}"
        step_distill.main([*SMALL, "--steps", "1", "--losses", "adv", "--real", real, "--out", str(out)])
    (data, fake), (teacher, same) = seen[:2], seen[len(seen) // 2 :][:2]
    assert torch.equal(fake, same)
    gap = (teacher - data).mean((1, 2, 3))  # (1 - level) (7 - x_0)
    assert (gap > 0).all() and gap.mean() > 1


def test_neither_side_learns_from_the_others_loss(home):
    """The student's weights are the same bit for bit whether a discriminator of weight 0 learns beside it or not; the
    heads', whatever weight the student gives it. With a rate of 0 a side stays as it was."""
    start, ends = safetensors.torch.load_file(home / "assets/zoo/fm/model.safetensors"), {}
    for name, flags in {
        "kd": ["--losses", "kd"], "kd, idle discriminator": ["--adv-weight", "0"], "both": ["--adv-weight", "0.05"],
        "still": ["--lr", "0", "--adv-weight", "0"], "still, pushed": ["--lr", "0", "--adv-weight", "0.05"],
    }.items():  # fmt: skip
        out = home / "runs" / f"sides-{name.replace(', ', '-')}"
        step_distill.main([*SMALL, "--steps", "2", *flags, "--out", str(out)])
        ends[name] = {network: weights(out, network) for network in ("model.", "discriminator.")}

    def same(a, b, network):
        return all(torch.equal(ends[a][network][k], ends[b][network][k]) for k in ends[a][network])

    assert same("kd", "kd, idle discriminator", "model.") and not same("kd", "both", "model.")
    assert same("still", "still, pushed", "discriminator.") and not same("kd", "both", "discriminator.")
    assert all(torch.equal(value, start[name[6:]].float()) for name, value in ends["still"]["model."].items())


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
    for losses in ("adv", "kd", "adv+kd"):
        out = home / "runs" / losses
        step_distill.main([*SMALL, "--steps", "1", "--losses", losses, "--adv-weight", "5", "--out", str(out)])
        gradients.append(weights(out, "optimizer.")["optimizer.0.0.exp_avg"].flatten())
    directions = [F.normalize(gradient, dim=0) for gradient in gradients]
    assert all((a - b).norm() > 1e-3 for i, a in enumerate(directions) for b in directions[:i])


def test_a_step_that_overflows_leaves_the_ratio_and_the_weights_alone(monkeypatch):
    ratio, t, real = step_distill.Ratio(), torch.tensor([0.5, 0.5]), torch.tensor([True, False])
    ratio.add(torch.tensor([4.0, 9.0]), torch.tensor([2.0, 9.0]), t, real)
    ratio.step()
    assert (ratio(t) == 2).all()
    ratio.add(torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, torch.nan]), t, real)
    ratio.step()
    assert (ratio(t) == 2).all()

    draw_points = step_distill.draw_points

    def overflow(data, args, times, step, rows):
        points = draw_points(data, args, times, step, rows)
        return points._replace(x_0=points.x_0 / 0.0, v=points.v / 0.0) if step == 1 else points

    monkeypatch.setattr(step_distill, "draw_points", overflow)
    step_distill.main([*SMALL, "--steps", "3", "--save-every", "2", "--out", "runs/overflow"])
    assert [float(row["skipped"]) for row in csv.DictReader(open("runs/overflow/log.csv"))] == [0.5, 0.0]
    assert all(torch.isfinite(value).all() for value in weights(Path("runs/overflow"), "").values() if value.is_floating_point())


@pytest.mark.parametrize(("stage", "parts", "how"), [
    ("train_fm", "2", []), ("distill", "1", ["--checkpointing"]), ("step_distill", "2", ["--checkpointing"]),
])  # fmt: skip
def test_compiled_or_computed_twice_a_step_is_the_same(stage, parts, how, monkeypatch):
    """One graph of the student, also where a feature is asked for or only parts of a batch are seen, and the same weights."""
    compile, own = torch.compile, {"step_distill": SMALL, "distill": [*SMALL[:6], "--device", "cpu"]}
    flags, runs = [*own.get(stage, SMALL[2:6]), "--steps", "2", "--accumulate", parts], f"runs/{stage}"
    main = importlib.import_module(stage).main
    main([*flags, "--out", f"{runs}/eager"])
    graphs = []

    def traced(module, example_inputs):
        graphs.append(module)
        return module

    monkeypatch.setattr(torch, "compile", lambda net, **how: compile(net, backend=traced, fullgraph=isinstance(net, UNet), **how))
    torch.compiler.reset()
    main([*flags, "--compile", *how, "--out", f"{runs}/compiled"])
    assert graphs, "nothing was compiled"
    one, other = (safetensors.torch.load_file(f"{runs}/{name}/model.safetensors") for name in ("eager", "compiled"))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_every_stage_trains_in_the_half_precision_of_a_gpu(home, monkeypatch):
    """bfloat16 autocast, --accumulate and --checkpointing together, here on the CPU."""
    for module in (training, distill):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    for module in (train_fm, distill, step_distill):
        out = f"runs/half-{module.__name__}"
        small = [
            "--pictures",
            "64",
            "--batch",
            "8",
            "--steps",
            "1",
            "--accumulate",
            "2",
            "--checkpointing",
            "--device",
            "cpu",
        ]
        module.main(
            [*small, "--init", "assets/zoo/fm", "--out", out, *(["--watch", "0"] if module is step_distill else [])]
        )
        assert (home / out / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------------------
# Training


def test_a_run_knows_how_it_wants_to_be_sampled(finished):
    model, config = load_student(finished)
    assert config["latent_size"] == [8, 8] and config["settings"]["layers"] == [1, 3, 5]
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
    assert {"d_real", "d_fake"} <= rows[0].keys()
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
        "discriminator",
        "ratio",
        "optimizer",
    } and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # heads and optimizers as well


def test_turbo_folder_of_another_shape(tmp_path, home):
    """SD3.5-Large-Turbo's layout, with normed queries and keys: it gives the targets and it looks for the discriminator."""
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
    step_distill.main([*SMALL, "--steps", "2", "--turbo", str(folder), "--out", str(out), "--watch", "1"])
    assert {f"score_{n}" for n in (1, 2, 4, 8)} <= next(csv.DictReader(open(out / "log.csv"))).keys()
    assert weights(out, "discriminator.")["discriminator.heads.0.0.weight"].shape[1] == 32  # the turbo's width, not the toy's 128
    assert load_student(out)[1]["settings"]["turbo"] == str(folder)


def test_figures_and_ablation(home, finished, capsys, monkeypatch):
    monkeypatch.setattr(few_steps, "prompts_of", lambda split, n, seed: prompts_of(split, 1, seed)[:2])  # fewer pictures
    seen, load = [], few_steps.load_students
    monkeypatch.setattr(few_steps, "load_students", lambda folders, args: seen.extend(folders) or load(folders, args))
    few_steps.main([*SMALL, "--compare", str(finished), "--out", "runs/figures"])
    assert seen == [str(finished), load_student(finished)[1]["settings"]["init"]]  # beside what it began as
    said = capsys.readouterr().out
    assert (home / "runs/figures/compare.png").is_file() and "times as fast" in said and "{" not in said
    scores = json.loads((home / "runs/figures/compare.json").read_text())["scores"]
    assert [*scores] == ["teacher 28", "before 28", "before 4", "ours 8", "ours 4", "ours 2", "ours 1"]
    for kind, result in scores.items():
        assert result["pictures"] == 2 and f"{kind:14}{result['overall']:7.3f}" in said
    rows = ["distillation only", "and wrong captions"]
    arguments = [*SMALL, "--ablate", "--rows", *rows, "--steps", "1", "--seeds", "1", "--per-family", "1", "--out", "runs/ablation"]
    few_steps.main(arguments)
    first = capsys.readouterr().out
    assert all(name in first for name in rows) and "before: " in first and "both" not in first
    few_steps.main(arguments)  # everything is there: the same table, at once
    assert capsys.readouterr().out.split("8 steps")[1] == first.split("8 steps")[1]
    results = json.loads((home / "runs/ablation/ablation.json").read_text())
    assert set(results) == set(rows)


def test_bad_input_ends_in_one_sentence(tmp_path):
    for arguments, words in (
        (["--init", "nowhere"], "is not a student"),
        (["--turbo", "nowhere"], "nowhere has no transformer.* for --turbo"),
        (["--layers", "9"], "6 blocks"),
        (["--size", "imagenet"], "is not of --size imagenet"),
        (["--for-steps", "0"], "at least 1"),
        (["--on-policy", "2"], "--on-policy must be from 0 to 1"),
        (["--lr", "1e30"], "NaN or infinite by step .*--lr 1e.30 or --heads-lr"),
    ):
        with pytest.raises(SystemExit, match=words):
            step_distill.main([*SMALL, "--steps", "3", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match="leave --data out"):
        few_steps.main([*SMALL, "--ablate", "--data", "."])
