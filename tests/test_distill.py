"""Stage 2: the scaling against its formula, the teacher against diffusers' pipeline, the training as a user meets it."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution
from transformers import T5Config, T5EncoderModel

import distill
import train_fm
from common import encoders
from common.checkpoint import load_student
from common.encoders import FrozenEncoders
from evaluate import prompts_of
from sample import draw_pictures
from studies import losses
from studies.students import encode_prompts
from teacher import Teacher

pytestmark = pytest.mark.usefixtures("at_home")
ROOT = Path(__file__).parent.parent
SMALL = ["--pictures", "64", "--batch", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(home):
    before = os.getcwd()
    os.chdir(home)
    distill.main([*SMALL, "--steps", "4", "--save-every", "2", "--out", "runs/whole"])
    os.chdir(before)
    return home / "runs" / "whole"


# ------------------------------------------------------------------------------------------------------------------
# Timestep-aware scaling


def test_a_t_is_the_logit_normal_density_divided_by_its_maximum():
    reference = TransformedDistribution(Normal(0.0, 1.0), SigmoidTransform())
    t = torch.linspace(0.01, 0.99, 99)
    density = reference.log_prob(t).exp()
    assert torch.allclose(distill.timestep_weight(t), density / density.max(), atol=1e-5)
    ends = distill.timestep_weight(torch.tensor([0.0, 0.5, 1.0]))
    assert torch.allclose(ends, torch.tensor([0.0, 1.0, 0.0]), atol=1e-4)


def test_scaling_gives_each_loss_its_gradient():
    """d S / d L_task = a_t and d S / d L_kd = (1 - a_t) |L_task| / |L_kd|: the ratio itself has no gradient."""
    task = torch.tensor([0.5, 2.0, 0.1], requires_grad=True)
    other = torch.tensor([0.25, 30.0, 0.2], requires_grad=True)
    t, ratio = torch.tensor([0.5, 0.9, 0.02]), distill.Ratio()
    ratio.add(task, other, t)
    ratio.step()
    value = distill.scaled(task, other, t, ratio(t))
    assert torch.allclose(value, task)  # in value the teacher's part is as large as the task's: a L + (1 - a) L
    value.sum().backward()
    a = distill.timestep_weight(t)
    assert torch.allclose(task.grad, a)
    assert torch.allclose(other.grad, (1 - a) * task.detach() / other.detach())


def test_ratio_is_a_running_mean_for_each_fifth_of_t():
    ratio, t = distill.Ratio(), torch.tensor([0.1, 0.15, 0.9, 1.0])
    assert torch.equal(ratio(t), torch.ones(4))  # nothing known
    ratio.add(torch.tensor([1.0, 3.0, 8.0, 8.0]), torch.tensor([1.0, 1.0, 2.0, 2.0]), t)
    assert torch.equal(ratio(t), torch.ones(4))  # not before the step is over
    ratio.step()
    assert torch.equal(ratio(t), torch.tensor([2.0, 2.0, 4.0, 4.0])) and ratio(torch.tensor([0.5])) == 1
    ratio.add(torch.tensor([4.0]), torch.tensor([1.0]), torch.tensor([0.1]))  # a picture that agrees less does not pull harder
    assert ratio(torch.tensor([0.1])) == 2
    ratio.step()
    assert torch.allclose(ratio(torch.tensor([0.1, 0.9])), torch.tensor([2 + 0.05 * 2, 4.0]))
    parts = [distill.Ratio() for _ in range(2)]  # whole, and in two parts of a batch
    task, kd, t = torch.rand(8), torch.rand(8), torch.rand(8)
    for k, pieces in enumerate((1, 2)):
        for piece in zip(task.chunk(pieces), kd.chunk(pieces), t.chunk(pieces), strict=True):
            parts[k].add(*piece)
        parts[k].step()
    assert torch.allclose(parts[0](t), parts[1](t))


def test_scaling_does_not_depend_on_the_features_unit():
    """Features ten times as large give the same step: d S / d f is the same for f in metres or in feet."""
    gradients, task, t = [], torch.tensor([0.4]), torch.tensor([0.8])
    for unit in (1.0, 10.0):
        f, ratio = torch.full((1, 8), 0.3, requires_grad=True), distill.Ratio()
        feat = ((unit * f - unit * 1.0) ** 2).mean(1)
        ratio.add(task, feat, t)
        ratio.step()
        distill.scaled(task, feat, t, ratio(t)).sum().backward()
        gradients.append(f.grad)
    assert torch.allclose(*gradients)


def test_total_loss_of_each_setting():
    losses = {"task": torch.tensor([0.5, 1.0]), "out": torch.tensor([0.1, 0.2]), "feat": torch.tensor([3.0, 5.0])}
    t, weights = torch.tensor([0.3, 0.6]), {"out": 2.0, "feat": 0.5}
    ratios = {"out": lambda t: 5.0, "feat": lambda t: 0.2}
    assert torch.equal(distill.combine({"task": losses["task"]}, t, {}, "scaled", weights), losses["task"])
    expected = torch.tensor([0.5 + 2 * 0.1 + 0.5 * 3, 1 + 2 * 0.2 + 0.5 * 5])
    assert torch.allclose(distill.combine(losses, t, {}, "linear", weights), expected)
    for most in (1.0, 0.5, 0.0):
        a = distill.timestep_weight(t).clamp(max=most)
        total = 2 * a * losses["task"] + (1 - a) * (5.0 * losses["out"] + 0.2 * losses["feat"])
        assert torch.allclose(distill.combine(losses, t, ratios, "scaled", weights, most), total)


def test_the_papers_sizes_are_weighted_as_in_the_paper():
    chosen = [distill.parse_arguments(["--size", size]).weighting for size in ("tiny", "imagenet", "t2i")]
    assert chosen == ["linear", "scaled", "scaled"]
    with pytest.raises(SystemExit, match="add --weighting scaled"):
        distill.parse_arguments(["--task-weight", "0.5"])


@pytest.mark.parametrize(("side", "teacher_side"), [(8, 4), (4, 4), (2, 8), (16, 4)])
def test_phi_matches_channels_and_grid(side, teacher_side):
    phi = distill.Projector(6, side, 10, teacher_side)
    assert phi(torch.randn(2, 6, side, side)).shape == (2, 10, teacher_side, teacher_side)


# ------------------------------------------------------------------------------------------------------------------
# The teacher


PROMPTS = ["a photo of a red circle", "a photo of two stars"]


def test_a_teachers_token_is_normalised_over_its_channels():
    feature = 100 * torch.randn(2, 48, 3, 4) + 7
    token = feature[1, :, 2, 3]
    expected = (token - token.mean()) / token.std(correction=0)
    assert torch.allclose(distill.normalized(feature)[1, :, 2, 3], expected, atol=1e-4)


def test_teacher_sees_what_diffusers_pipeline_gives_it(tmp_path):
    """Velocity with our collapsed text = the transformer with the pipeline's own 280 text tokens."""
    pipe = StableDiffusion3Pipeline.from_pretrained("assets/toy-sd3")
    states, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    encoders = FrozenEncoders("assets/toy-sd3")
    text = encode_prompts(PROMPTS, encoders)
    teacher = Teacher("assets/toy-sd3", text, cache=tmp_path)
    assert states.shape[1] == 24 + 256 and teacher.text(torch.tensor([1]))[0].shape[1] == 25
    x, t, ids = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = pipe.transformer(
            x, encoder_hidden_states=states, pooled_projections=pooled, timestep=1000 * t
        ).sample
        velocity, (feature,) = teacher(x, t, ids)
        guided, _ = teacher(x, t, ids, guidance=3.0)
        empty, _ = teacher(x, t, torch.zeros_like(ids))
    assert (velocity - expected).abs().max() < 5e-3  # text states in half precision
    assert torch.allclose(guided, empty + 3 * (velocity - empty), atol=1e-4)
    assert feature.shape == (2, 128, 8, 8)
    # the feature leads to the velocity: norm_out and proj_out are all that comes after it
    net = teacher.net
    temb = net.time_text_embed(1000 * t, teacher.text(ids)[1])
    p = teacher.patch
    patches = net.proj_out(net.norm_out(feature.flatten(2).transpose(1, 2), temb)).view(2, 8 // p, 8 // p, p, p, 16)
    assert torch.allclose(torch.einsum("nhwpqc->nchpwq", patches).reshape(2, 16, 8, 8), velocity, atol=1e-5)


def test_teacher_with_a_t5_that_speaks(tmp_path):
    """SD3.5's layout, with normed queries and keys and a T5 with something to say: nothing is collapsed."""
    folder = tmp_path / "sd35"
    folder.mkdir()
    for part in (ROOT / "assets" / "toy-sd3").iterdir():
        if part.name not in ("transformer", "text_encoder_3"):
            (folder / part.name).symlink_to(part)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=98, d_model=192, d_kv=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(
        folder / "text_encoder_3"
    )
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, qk_norm="rms_norm",
        joint_attention_dim=192, caption_projection_dim=32, pooled_projection_dim=160, pos_embed_max_size=16,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    states, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    encoders = FrozenEncoders(folder)
    text = encode_prompts(PROMPTS, encoders)
    teachers = [Teacher(folder, text, cache=tmp_path / "cache") for _ in range(2)]  # the second reads the cache
    x, t, ids = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = pipe.transformer(
            x, encoder_hidden_states=states, pooled_projections=pooled, timestep=1000 * t
        ).sample
        for teacher in teachers:
            assert teacher.text(torch.arange(3))[0].shape == (3, 280, 192)
            assert (teacher(x, t, ids)[0] - expected).abs().max() < 5e-3


class CountedT5:
    """A T5 that says the length of each caption, stops when it is asked for "stop", and remembers what it was asked."""

    asked, silent = [], False

    def __init__(self, *_):
        pass

    def __call__(self, captions):
        if "stop" in captions:
            raise KeyboardInterrupt
        self.asked.extend(captions)
        return torch.tensor([len(caption) for caption in captions]).half().view(-1, 1, 1).expand(-1, 256, 512).contiguous()


def test_t5s_states_are_written_as_they_come_and_go_on_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "T5", CountedT5)
    monkeypatch.setattr(CountedT5, "asked", [])
    captions, where = ["x" * i for i in range(11)], ("cpu", torch.float32, tmp_path)
    captions[9] = "stop"
    with pytest.raises(KeyboardInterrupt):
        encoders.StoredT5(tmp_path, captions, *where, part=4)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["00000.safetensors", "00001.safetensors"]  # nothing half written
    monkeypatch.setattr(CountedT5, "__call__", lambda self, some, ask=CountedT5.__call__: ask(self, ["x" * len(c) for c in some]))
    stored = encoders.StoredT5(tmp_path, captions, *where, part=4)
    assert [len(caption) for caption in CountedT5.asked] == [*range(9), 4, 10]  # each caption once
    ids = torch.tensor([10, 0, 3, 3])
    assert stored(ids).shape == (4, 256, 512) and stored(ids)[:, 0, 0].tolist() == [10, 0, 3, 3] and not stored.silent
    CountedT5.asked.clear()
    encoders.StoredT5(tmp_path, captions, *where, part=4)
    assert not CountedT5.asked
    (folder / "00001.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="00001.safetensors is damaged .* delete it and start again, which makes it alone"):
        encoders.StoredT5(tmp_path, captions, *where, part=4)(torch.tensor([5]))
    monkeypatch.setattr(CountedT5, "silent", True)
    assert encoders.StoredT5(tmp_path, ["a"], *where).silent and encoders.StoredT5(tmp_path, ["a"], *where).silent


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory of this process in /proc")
def test_t5s_states_do_not_stay_in_memory(tmp_path, monkeypatch):
    """75 MB of states, in files of 2 MB, written and then read again in any order: memory of our own does not grow with them."""
    monkeypatch.setattr(encoders, "T5", CountedT5)

    def own_memory():  # what lies in a mapped file is not ours: the system takes it away when others need it
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    before, captions = own_memory(), [f"{i:03d}" for i in range(288)]
    stored = encoders.StoredT5(tmp_path, captions, "cpu", torch.float32, tmp_path, part=8)
    for some in torch.randperm(288).split(16):
        stored(some)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) > 75e6 and own_memory() - before < 30e6


# ------------------------------------------------------------------------------------------------------------------
# Training


def test_a_run_leaves_a_student_without_phi(finished):
    model, config = load_student(finished)
    assert config["stage"] == "distill" and config["sampling"] == {"steps": 28, "guidance": 2.0, "shift": 3.0}
    assert not [name for name in safetensors.torch.load_file(finished / "model.safetensors") if "projector" in name]
    assert [
        n for n in safetensors.torch.load_file(finished / "train_state" / "state.safetensors") if n.startswith("projector.")
    ]
    rows = list(csv.DictReader(open(finished / "log.csv")))
    assert [row["step"] for row in rows] == ["2", "4"]
    losses_of_each_level = [f"{kind}_{level}" for level in ("out", "feat") for kind in ("loss", "ratio")]
    for name in ("loss_task", *losses_of_each_level, "cosine", "val_loss", "grad_norm", "grad_norm_phi"):
        assert float(rows[-1][name]) > 0, name
    assert {f"loss_{level}_t{t}" for level in ("task", "out", "feat") for t in ("0.0", "0.2", "0.4", "0.6", "0.8")} <= rows[
        0
    ].keys()
    pictures = draw_pictures(model, config, FrozenEncoders("assets/toy-sd3"), ["a photo of a star"], [0], steps=2)
    assert pictures[0].size == (64, 64)


def test_resumed_is_bit_for_bit_the_same(finished, home):
    arguments = [*SMALL, "--steps", "4", "--save-every", "2", "--out", str(home / "runs" / "resumed")]
    save = distill.save_state

    def save_and_stop(*args, **networks):
        save(*args, **networks)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "save_state", save_and_stop)
        distill.main(arguments)
    with pytest.raises(SystemExit, match="--losses was task"):
        distill.main([*arguments, "--resume", "--losses", "task"])
    distill.main([*arguments, "--resume"])
    assert (home / "runs/resumed/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_without_a_teacher_it_is_stage_one(home):
    """--losses task takes the same step as train_fm.py from the same weights."""
    same = [*SMALL, "--steps", "2", "--lr", "1e-3"]
    distill.main([*same, "--losses", "task", "--out", "runs/task"])
    train_fm.main([*same, "--init", "assets/zoo/fm", "--out", "runs/stage1"])
    weights = [safetensors.torch.load_file(home / "runs" / name / "model.safetensors") for name in ("task", "stage1")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_every_level_moves_the_student(home):
    """Each row of the ablation has another gradient, also at the UNet's first layer (AdamW keeps it)."""
    gradients = []
    for row in losses.ROWS.values():
        out = home / "runs/rows" / "-".join(map(str, row.values()))
        flags = [text for name, value in row.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        distill.main([*SMALL, "--steps", "1", *flags, "--out", str(out)])
        gradients.append(
            safetensors.torch.load_file(out / "train_state" / "state.safetensors")["optimizer.0.0.exp_avg"]
        )
    directions = [F.normalize(gradient.flatten(), dim=0) for gradient in gradients]
    # With fixed weights a new projection head hands little of the features' gradient down to the first layer.
    assert all((a - b).norm() > 1e-4 for i, a in enumerate(directions) for b in directions[:i])


def test_figures_and_ablation(home, finished, capsys, monkeypatch):
    monkeypatch.setattr(losses, "prompts_of", lambda split, n, seed: prompts_of(split, 1, seed)[:2])  # fewer pictures
    losses.main([*SMALL, "--plot-scaling", str(finished), "--out", "runs/figures"])
    losses.main([*SMALL, "--compare", "assets/zoo/fm", str(finished), "--out", "runs/figures"])
    assert {p.name for p in (home / "runs/figures").iterdir()} == {"scaling.png", "compare.png"}
    arguments = [*SMALL, "--ablate", "--steps", "1", "--seeds", "1", "--per-family", "1", "--out", "runs/ablation"]
    arguments += ["--rows", losses.NONE, losses.FULL]  # the others were trained above
    rows = {losses.NONE, losses.FULL, losses.LONGER}
    capsys.readouterr()
    losses.main(arguments)
    first = capsys.readouterr().out
    assert all(name in first for name in rows)
    losses.main(arguments)  # everything is there: the same table, at once
    assert capsys.readouterr().out.split("mini-GenEval")[1] == first.split("mini-GenEval")[1]
    results = json.loads((home / "runs/ablation/ablation.json").read_text())
    assert set(results) == rows and all(0 <= run["overall"] <= 1 for runs in results.values() for run in runs)
    assert results[losses.LONGER][0]["steps"] >= 1


def test_bad_input_ends_in_one_sentence(tmp_path, home):
    folder = tmp_path / "no-transformer"
    folder.mkdir()
    for part in (ROOT / "assets" / "toy-sd3").iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    shutil.copytree(ROOT / "assets" / "zoo" / "fm", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["scaling_factor"] = 9.0
    (tmp_path / "large").mkdir()
    Image.new("RGB", (160, 160), "red").save(tmp_path / "large" / "a.png")
    (tmp_path / "large" / "a.txt").write_text("a photo of a star")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for arguments, words in (
        (["--teacher", str(folder)], "has no transformer"),
        (["--init", "nowhere"], "is not a student"),
        (["--init", str(tmp_path / "other")], "scaled by 9.0"),
        (["--size", "imagenet"], "is not of --size imagenet"),
        (["--student-layer", "down.9"], "no layer 'down.9'"),
        (["--teacher-layer", "6"], "6 blocks"),
        (["--data", str(tmp_path / "large"), "--resolution", "160"], "at most 16 a side, not 20: give a --resolution"),
        (["--data", "nowhere"], "no such folder"),
        (["--steps", "0"], "at least 1"),
        (["--lr", "1e30"], "learning rate"),
    ):
        with pytest.raises(SystemExit, match=words):
            distill.main([*SMALL, "--steps", "3", "--out", str(tmp_path / "out"), *arguments])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
