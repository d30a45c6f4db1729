"""Sampling and evaluation from the command line, with the committed student."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

import common.encoders
import evaluate
import sample
import step_distill
from common.checkpoint import load_student
from common.encoders import FrozenEncoders
from common.figures import captioned_grid, font_for
from common.sources import CaptionedFolder
from model import UNet
from studies.students import encode_prompts
from teacher import Teacher

ROOT = Path(__file__).parent.parent
TOY = "assets/toy-sd3"
FEW = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_one_prompt_makes_one_picture(tmp_path):
    sample.main(["a photo of a red circle", "--out", str(tmp_path / "one.png"), *FEW])
    assert Image.open(tmp_path / "one.png").size == (256, 256)


def test_small_pictures_are_scaled_up_to_be_looked_at_and_nothing_is_lost(tmp_path):
    """Each pixel a square: reduced by the same factor it is the picture of --true-size, as --prompts writes it."""
    (tmp_path / "prompts.txt").write_text("a photo of a star")
    for what in (["a photo of a star", "--out", "large.png"], ["a photo of a star", "--true-size", "--out", "true.png"],
                 ["--prompts", str(tmp_path / "prompts.txt"), "--out", "drawn"]):  # fmt: skip
        sample.main([*what[:-1], str(tmp_path / what[-1]), *FEW])
    large, true, drawn = (Image.open(tmp_path / name) for name in ("large.png", "true.png", "drawn/00000.png"))
    assert large.size == (256, 256) and true.size == drawn.size == (64, 64)
    assert large.reduce(4).tobytes() == true.tobytes() == drawn.tobytes()


def test_several_prompts_make_a_captioned_grid(tmp_path):
    sample.main(
        ["a photo of a star", "a photo of two blue squares", "--n", "3", "--out", str(tmp_path / "grid.png"), *FEW]
    )
    width, height = Image.open(tmp_path / "grid.png").size
    assert width >= 3 * 256 and height >= 2 * 256


def test_a_prompt_of_any_length_leaves_the_grid_as_wide_as_it_is():
    picture, sizes = Image.new("RGB", (128, 128)), {}
    for name, prompt in {"short": "a star", "words": "a photo of a star " * 100, "one": "a" * 3000, "cjk": "星" * 999}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there may be no Chinese font
            sizes[name] = captioned_grid([[picture, picture]], [prompt]).size
    assert {width for width, _ in sizes.values()} == {2 * 132 + 8}
    assert 128 < sizes["short"][1] < sizes["words"][1] == sizes["one"][1] == sizes["cjk"][1] < 200  # three lines, "..."


def test_letters_that_no_font_has_are_named():
    picture, private = Image.new("RGB", (64, 64)), "\U00010ffd"  # in no font: for private use, in the last plane
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captioned_grid([[picture]], ["Ein Stern, eine Übung, звезда, αστέρι"])  # in the usual one
    with pytest.warns(UserWarning, match="no font of this system has all letters"):
        captioned_grid([[picture]], [f"日{chr(0x10A61)}"])  # no font has Chinese and South Arabian
    assert private not in font_for(f"a {private}")[1]  # not printable: nothing to see
    font, lacks = font_for("a script ℊ")  # not in DejaVu Sans, but in STIX, which matplotlib brings along
    assert not lacks and font.getname()[0] != "DejaVu Sans" == font_for("a star")[0].getname()[0]


def test_a_picture_depends_on_its_prompt_and_seed_alone():
    model, config = load_student("assets/zoo/fm")
    encoders = FrozenEncoders(config["encoders"])
    prompts = ["a photo of a star", "a photo of a red circle", "a photo of three squares"]
    together = sample.draw_pictures(model, config, encoders, prompts, [4, 5, 6], steps=2)
    alone = sample.draw_pictures(model, config, encoders, prompts[1:2], [5], steps=2)[0]
    assert np.abs(np.asarray(together[1]).astype(int) - np.asarray(alone)).max() <= 1
    other = sample.draw_pictures(model, config, encoders, prompts[1:2], [6], steps=2)[0]
    assert np.abs(np.asarray(other).astype(int) - np.asarray(alone)).max() > 10


@pytest.mark.parametrize(("side", "sizes"), [(8, [64, 6]), (32, [4, 4, 1]), (128, [1, 1, 1])])
def test_latents_are_decoded_in_parts(side, sizes):
    """64 pictures of 64 pixels at once, one of 1024; all of them, and in order."""
    latents, seen = torch.arange(sum(sizes)).view(-1, 1, 1, 1).expand(-1, 16, side, side), []

    def decode_latents(part):
        seen.append(len(part))
        return (part[:, :3, :2, :2] / 127.5 - 1).float()

    pictures = sample.decode(SimpleNamespace(decode_latents=decode_latents), latents)
    assert seen == sizes and [picture.getpixel((0, 0))[0] for picture in pictures] == list(range(sum(sizes)))


def test_the_unet_is_asked_in_half_precision_where_training_was(monkeypatch):
    model, config = load_student("assets/zoo/fm")
    monkeypatch.setattr(sample, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    kinds = []
    model.conv_in.register_forward_hook(lambda net, inputs, out: kinds.append(out.dtype))
    sample.draw_pictures(model, config, FrozenEncoders.of(config, "cpu"), ["a photo of a star"], [0], steps=2)
    assert kinds == [torch.bfloat16] * 2


def test_encoders_of_the_real_sizes_are_in_half_precision_on_a_gpu(monkeypatch):
    monkeypatch.setattr(common.encoders, "half", lambda device: torch.bfloat16)
    config = {"encoders": "assets/toy-sd3"}
    assert FrozenEncoders.of({**config, "size": "tiny"}, "cpu").dtype == torch.float32
    assert FrozenEncoders.of({**config, "size": "t2i"}, "cpu").dtype == torch.bfloat16


def test_a_file_of_prompts_makes_a_folder_that_reads_back(tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a star\n\na photo of a red circle\na photo of a star\n")
    sample.main(["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "drawn"), *FEW])
    folder = CaptionedFolder(tmp_path / "drawn")
    assert [folder.caption(i) for i in range(3)] == [
        "a photo of a star",
        "a photo of a red circle",
        "a photo of a star",
    ]
    assert folder[0][0].tobytes() != folder[2][0].tobytes()  # the same line twice is two drawings
    evaluate.main([str(tmp_path / "drawn")])


def test_trajectories(tmp_path):
    out = ["--out", str(tmp_path / "out.png"), *FEW]
    sample.main(["a photo of a star", "--trajectory", str(tmp_path / "path.gif"), *out])
    assert Image.open(tmp_path / "path.gif").n_frames == 3  # before each step, and the picture
    sample.main(["a photo of a star", "--trajectory", str(tmp_path / "path.png"), *out])
    strip = np.asarray(Image.open(tmp_path / "path.png").convert("RGB")).astype(float)
    assert strip.shape[1] >= 3 * 128
    # At t = 1 stands noise: as many greys between black and white as a normal has, and neighbours that do not agree.
    cells = strip[24 + 8 : 24 + 128 : 16, 6 + 8 : 6 + 128 : 16]  # (8, 8, 3): below the label, the middles of 16 pixels
    assert 25 < cells.std() < 60 and abs(cells.mean() - 127.5) < 25
    cells = cells - cells.mean((0, 1))
    for a, b in ((cells[1:], cells[:-1]), (cells[:, 1:], cells[:, :-1])):
        assert abs((a * b).mean()) < 0.3 * cells.var()


def test_a_larger_side_than_trained_on(tmp_path):
    sample.main(["a photo of a star", "--resolution", "96", "--out", str(tmp_path / "large.png"), *FEW])
    assert Image.open(tmp_path / "large.png").size == (192, 192)  # twice


@pytest.mark.parametrize(("arguments", "sentence"), [
    ([], "nothing to draw"),
    (["a star", "--prompts", "file.txt"], "leave other prompts"),
    (["a star", "--npz", "all.npz"], "--npz is for --prompts"),
    (["a star", "--model", "nowhere"], "nowhere is not a student"),
    (["a star", "--steps", "0"], "--steps must be at least 1"),
    (["a star", "--n", "0"], "--n must be at least 1"),
    (["a star", "--resolution", "50"], "--resolution must be a multiple of 32"),
    (["--prompts", "nowhere.txt"], "cannot read prompts"),
    (["a star", "--out", "grid"], "end it in .png"),
    (["a star", "--trajectory", "path.mp4"], "end it in .png"),
    (["a star", "--teacher", "tests"], "not a Stable Diffusion 3 folder"),
    (["un caf\udce9"], "'un caf.udce9' is no UTF-8 text"),  # what Python makes of a Latin-1 byte
    (["a star", "--model", "mod\udce8le"], "is no UTF-8 text"),
])  # fmt: skip
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        sample.main([*arguments] if "--out" in arguments else [*arguments, "--out", str(tmp_path / "out.png")])
    assert not list(tmp_path.iterdir())


def test_empty_prompt_warns(tmp_path):
    with pytest.warns(UserWarning, match="empty prompt"):
        sample.main(["", "--out", str(tmp_path / "out.png"), *FEW])


def test_evaluation_of_a_student(capsys, tmp_path):
    evaluate.main(["assets/zoo/fm", "--per-family", "2", "--steps", "2", "--json", "--out", str(tmp_path / "kept")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["val"]["pictures"] == 12 and report["novel"]["pictures"] == 8
    assert set(report["val"]["families"]) == set(evaluate.FAMILIES)
    assert 0 <= report["val"]["interval"][0] <= report["val"]["overall"] <= report["val"]["interval"][1] <= 1
    assert len(CaptionedFolder(tmp_path / "kept" / "val")) == 12
    assert json.loads((tmp_path / "kept" / "report.json").read_text()) == report
    assert "attribution" in (tmp_path / "kept" / "table.txt").read_text()


def test_evaluation_of_a_diffusers_pipeline(capsys):
    evaluate.main(["assets/toy-sd3", "--per-family", "1", "--steps", "2", "--no-novel", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["val"]["pictures"] == 6 and "novel" not in report


def teachers_own_way(prompts, guidance, steps, shift):
    """The same pictures by our Teacher, on flow.py's times, from the noise that draw_with_diffusers() starts with."""
    encoders = FrozenEncoders(TOY)
    text = encode_prompts(prompts, encoders)
    teacher, ids = Teacher(TOY, text), torch.tensor([text.captions.index(prompt) for prompt in prompts])
    noise = torch.cat([torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(len(prompts))])
    latents = step_distill.solve(teacher, noise, torch.ones(len(prompts)), ids, guidance, shift, steps)
    return np.stack([np.asarray(picture) for picture in sample.decode(encoders, latents)]).astype(int)


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 3])
def test_guidance_and_times_mean_the_same_when_diffusers_draws(guidance):
    """v_empty + guidance * (v_text - v_empty) below 1 as well, at the times of flow.sampling_timesteps."""
    prompts = ["a photo of a red circle", "a photo of two blue squares"]
    theirs = evaluate.draw_with_diffusers(TOY, torch.device("cpu"), steps=5, guidance=guidance)(prompts, 0)
    theirs = np.stack([np.asarray(picture) for picture in theirs]).astype(int)
    assert np.abs(theirs - teachers_own_way(prompts, guidance, 5, 3.0)).max() <= 1
    assert np.abs(theirs - teachers_own_way(prompts, guidance + 0.5, 5, 3.0)).max() > 10


@pytest.mark.parametrize(("steps", "shift"), [(6, 3.0), (3, 1.5)])
def test_student_and_teacher_visit_the_same_times(steps, shift, monkeypatch):
    """The student's t in [0, 1], and what diffusers counts to 1000."""
    seen = {"student": [], "teacher": []}
    monkeypatch.setattr(SD3Transformer2DModel, "forward", watch(SD3Transformer2DModel.forward, seen["teacher"]))
    monkeypatch.setattr(UNet, "forward", watch(UNet.forward, seen["student"]))
    for folder, who in (("assets/zoo/fm", evaluate.draw_with_student), (TOY, evaluate.draw_with_diffusers)):
        who(folder, torch.device("cpu"), steps, 1.0, shift)(["a photo of a star"], 0)
    assert len(seen["student"]) == steps and seen["student"] == pytest.approx([t / 1000 for t in seen["teacher"]])


def watch(forward, times):
    """forward(), which also notes the time that it is asked about."""

    def watched(net, *inputs, **named):
        times.append(float((named["timestep"] if "timestep" in named else inputs[1])[0]))
        return forward(net, *inputs, **named)

    return watched


def test_the_committed_student_draws_what_it_is_told(capsys):
    """A floor far below its score (README): this catches a broken sampler or decoder, not a bad day."""
    evaluate.main(["assets/zoo/fm", "--per-family", "6", "--steps", "12", "--no-novel", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["val"]["overall"] > report["val"]["chance"] + 0.15


def test_a_student_refuses_the_latents_of_another_autoencoder(tmp_path):
    config = json.loads((ROOT / "assets/zoo/fm/config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(ROOT / "assets/zoo/fm/model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "scaling_factor": 9.0}))
    with pytest.raises(SystemExit, match="trained with latents scaled by 9.0"):
        sample.main(["a photo of a star", "--model", str(tmp_path), "--out", str(tmp_path / "out.png")])
    (tmp_path / "config.json").write_text(json.dumps({**config, "unet": {"channels": [1]}}))
    with pytest.raises(SystemExit, match="cannot be read as a student"):
        load_student(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes((ROOT / "assets/zoo/fm/model.safetensors").read_bytes()[:1000])
    with pytest.raises(SystemExit, match="cannot be read as a student"):
        load_student(tmp_path)


def test_guidance_interval_wants_the_lower_number_first():
    assert sample.parse_arguments(["x", "--guidance-interval", "0.1", "0.9"]).guidance_interval == [0.1, 0.9]
    with pytest.raises(SystemExit, match="the lower number first, not 0.9 0.1"):
        sample.parse_arguments(["x", "--guidance-interval", "0.9", "0.1"])
