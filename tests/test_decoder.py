"""The tiny decoder: its size against the paper, its losses against hand-made cases, its training as a user meets it."""

import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

import decoder
import sample
from common import training
from common.distances import Perceptual, psnr
from common.encoders import FrozenAutoencoder
from common.pictures import to_tensor
from common.seeds import rng
from studies import decoder as study

pytestmark = pytest.mark.usefixtures("at_home")
ROOT = Path(__file__).parent.parent
SMALL = ["--batch", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(home):
    """Six steps, the last three with the discriminator."""
    before = os.getcwd()
    os.chdir(home)
    decoder.main([*SMALL, "--steps", "6", "--save-every", "4", "--out", "runs/whole"])
    os.chdir(before)
    return home / "runs" / "whole"


def test_the_sd3_preset_has_the_papers_size():
    params, macs = study.count_decoder(decoder.PRESETS["sd3"], 128)
    assert abs(params / 1.38e6 - 1) < 0.02 and abs(macs / 224e9 - 1) < 0.02


def test_the_paper_compares_with_these_decoders():
    for name in ("SDXL", "SD3"):
        with torch.device("meta"):
            params, macs = study.count(
                study.build(name), torch.empty(1, 4 if name == "SDXL" else 16, 128, 128)
            )
        _, paper_params, paper_macs, _ = study.TABLE_2[name]
        attention = 2 * (128 * 128) ** 2 * 512  # queries with keys, and weights with values: the paper leaves them out
        assert abs(params / 1e6 / paper_params - 1) < 0.01 and abs((macs - attention) / 1e9 / paper_macs - 1) < 0.01


def test_none_of_the_five_things_is_in_it():
    net = decoder.TinyDecoder(decoder.PRESETS["sd3"])
    kinds = [type(m).__name__ for m in net.modules()]
    blocks = sum(net.cfg.blocks)
    assert "SelfAttention" not in kinds and kinds.count("GroupNorm") == blocks
    for block in (m for m in net.modules() if isinstance(m, decoder.Block)):
        assert isinstance(block.shortcut, torch.nn.Identity)
        full = [
            m for m in block.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) and m.groups == 1
        ]
        assert not full


@pytest.mark.parametrize("name", study.ABLATIONS)
def test_every_variant_decodes_and_learns(name):
    cfg = replace(decoder.PRESETS["tiny"], **study.ABLATIONS[name])
    net = decoder.TinyDecoder(cfg)
    pictures = net(torch.randn(2, 16, 4, 6))
    assert pictures.shape == (2, 3, 32, 48)
    pictures.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_each_switch_costs_what_it_should():
    side, tiny = 8, decoder.PRESETS["tiny"]
    ours = study.count_decoder(tiny, side)
    for name, switch in study.ABLATIONS.items():
        params, macs = study.count_decoder(replace(tiny, **switch), side)
        assert params > ours[0] or name == "ours"
        assert macs > ours[1] or name in ("ours", "GroupNorm everywhere")  # norms are no multiply-accumulates


def test_block_against_loops():
    """A separable block by its definition, one output pixel at a time."""
    torch.manual_seed(0)
    cfg = replace(decoder.PRESETS["tiny"], groups=2)
    block, x = decoder.Block(cfg, 4, 4).double().eval(), torch.randn(1, 4, 5, 5, dtype=torch.double)
    depthwise1, pointwise1, depthwise2, norm, _, pointwise2 = block.body

    def depthwise(conv, h):
        padded, out = F.pad(h, (1, 1, 1, 1)), torch.zeros_like(h)
        for c in range(4):
            for i in range(5):
                for j in range(5):
                    out[0, c, i, j] = (padded[0, c, i : i + 3, j : j + 3] * conv.weight[c, 0]).sum()
        return out

    def pointwise(conv, h):
        return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], h) + conv.bias[:, None, None]

    h = depthwise(depthwise2, pointwise(pointwise1, depthwise(depthwise1, x)))
    groups = h.view(2, -1)
    h = (
        (groups - groups.mean(1, keepdim=True)) / (groups.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    ).view(h.shape)
    h = h * norm.weight[:, None, None] + norm.bias[:, None, None]
    expected = x + pointwise(pointwise2, h * h.sigmoid())
    assert (block(x) - expected).abs().max() < 1e-10


def test_psnr_is_the_definition():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.02), torch.full((3, 4, 4), 0.2)])  # 1 and 10 percent of the range
    assert torch.allclose(psnr(a, b), torch.tensor([40.0, 20.0]), atol=1e-4)


def test_perceptual_distance_orders_damage():
    perceptual = Perceptual()
    photo = study.out_of_domain(64)[0][0]
    x = to_tensor([photo])
    assert perceptual(x, x).item() == 0
    blurred = [F.avg_pool2d(F.pad(x, (r, r, r, r), "reflect"), 2 * r + 1, 1) for r in (1, 2, 4)]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noisy = [x + s * noise for s in (0.05, 0.1, 0.3)]
    for series in (blurred, noisy):
        distances = [perceptual(x, y).item() for y in series]
        assert 0 < distances[0] < distances[1] < distances[2]
    # The point of a perceptual distance: of two pictures with the same squared error, the shifted one looks nearer.
    darker = x - (x - blurred[1]).square().mean().sqrt()
    assert perceptual(x, darker) < perceptual(x, blurred[1])


def test_adaptive_weight_makes_gradients_equally_long():
    torch.manual_seed(0)
    last = torch.nn.Conv2d(4, 3, 3)
    y = last(torch.randn(2, 4, 8, 8))
    restoring, fooling = y.square().mean(), 50 * y.abs().mean()
    weight = decoder.adaptive_weight(restoring, fooling, last.weight)
    (g1,) = torch.autograd.grad(restoring, last.weight, retain_graph=True)
    (g2,) = torch.autograd.grad(weight * fooling, last.weight)
    assert abs(g1.norm() / g2.norm() - 1) < 1e-4 and not weight.requires_grad


def test_crops_are_a_function_of_seed_and_step():
    args = decoder.parse_arguments(["--steps", "4", "--batch", "3"])
    pictures, _ = decoder.open_pictures(args)
    with ThreadPoolExecutor(2) as pool:
        a, b, other = (decoder.random_crops(pictures, args, step, pool).x for step in (2, 2, 3))
    assert a.shape == (3, 3, 48, 48) and torch.equal(a, b)
    assert not torch.equal(a, other)


@pytest.mark.parametrize("workers", [1, 5])
def test_crops_of_a_folder_do_not_depend_on_the_workers(workers, tmp_path):
    """Against one picture after the other, as the first version of the decoder's training drew them; and ranks take their rows."""
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 255, (90 + 7 * i, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    args = decoder.parse_arguments(["--data", str(tmp_path), "--batch", "8", "--patch", "24"])
    pictures, _ = decoder.open_pictures(args)
    with ThreadPoolExecutor(workers) as pool:
        found = [decoder.random_crops(pictures, args, 3, pool, rows).x for rows in (slice(0, 8), slice(4, 8))]
    g, crops = rng(args.seed, 3, 1), []
    for _ in range(8):
        picture = pictures[int(torch.randint(len(pictures), (), generator=g))][0]
        left, top = (int(torch.randint(side - 24 + 1, (), generator=g)) for side in picture.size)
        crops.append(picture.crop((left, top, left + 24, top + 24)))
    assert torch.equal(found[0], to_tensor(crops)) and torch.equal(found[1], found[0][4:])


def test_the_encoder_runs_in_the_precision_of_the_device(tmp_path, monkeypatch):
    """bfloat16 on a GPU: the latents that a run encodes then are those of the frozen encoder in that precision."""
    asked = []

    class Spy(FrozenAutoencoder):
        def __init__(self, folder, device, dtype):
            asked.append(dtype)
            super().__init__(folder, device, dtype)

    monkeypatch.setattr(decoder, "FrozenAutoencoder", Spy)
    monkeypatch.setattr(decoder, "half", lambda device: torch.bfloat16)
    decoder.main([*SMALL, "--steps", "1", "--gan-start", "0", "--out", str(tmp_path)])
    assert asked == [torch.bfloat16] and "nan" not in (tmp_path / "log.csv").read_text()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z, rounded = (FrozenAutoencoder(dtype=dtype).encode_pictures(x) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32 and 0 < (rounded - z).norm() < 0.03 * z.norm()


def test_a_run_leaves_a_decoder_that_sample_uses(finished, tmp_path):
    names = {p.name for p in finished.rglob("*") if p.is_file()}
    assert names == {"model.safetensors", "config.json", "state.safetensors", "log.csv", "loss.png", "compare.png"}
    config = json.loads((finished / "config.json").read_text())
    assert config["stage"] == "decoder" and {"scaling_factor", "shift_factor", "decoder", "settings"} <= config.keys()
    rows = (finished / "log.csv").read_text().splitlines()
    assert {"mse", "perceptual", "gan_weight", "d_real", "d_fake", "val_psnr"} <= set(rows[0].split(","))
    assert "nan" not in rows[2].split(",")
    sample.main(["a photo of a star", "--steps", "2", "--decoder", str(finished), "--true-size", "--out", str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").size == (64, 64)


def test_resumed_is_bit_for_bit_the_same(finished, home):
    """The state of step 4, with the discriminator half trained, leads to the same weights."""
    other = home / "runs" / "resumed"
    arguments = [*SMALL, "--steps", "6", "--save-every", "4", "--out", str(other)]
    stop = decoder.save_state

    def save_and_stop(folder, step, *args, **networks):
        stop(folder, step, *args, **networks)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder, "save_state", save_and_stop)
        decoder.main(arguments)
    with pytest.raises(SystemExit, match="--resume"):
        decoder.main(arguments)
    decoder.main([*arguments, "--resume"])
    assert (other / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_folder_of_pictures_needs_no_captions(tmp_path):
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (90, 70, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    decoder.main(
        [*SMALL, "--steps", "1", "--data", str(tmp_path), "--vae", "assets/toy-sd3/vae", "--out", str(tmp_path / "out")]
    )
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "score"), "--device", "cpu"]
    study.main(["--evaluate", str(tmp_path / "out"), *flags])
    assert {p.name for p in (tmp_path / "score").iterdir()} == {"compare.png", "out_of_domain.png", "report.json"}


def test_the_sd3_preset_trains_on_sd3s_folder_layout(tmp_path):
    """A folder with SD3's autoencoder layout and scales; the weights are random and small, the preset is the real one."""
    vae = AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=1.5305,
        shift_factor=0.0609, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "sd3" / "vae")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    decoder.main(["--size", "sd3", "--vae", str(tmp_path / "sd3"), "--data", str(tmp_path), "--resolution", "64", "--patch", "32",
                  "--batch", "1", "--steps", "1", "--out", str(tmp_path / "out"), "--device", "cpu"])  # fmt: skip
    net, config = decoder.load_decoder(tmp_path / "out")
    assert (config["scaling_factor"], config["shift_factor"]) == (1.5305, 0.0609) and net.cfg == decoder.PRESETS["sd3"]
    z = FrozenAutoencoder(tmp_path / "sd3" / "vae")
    x = torch.randn(1, 3, 32, 32).clamp(-1, 1)
    assert torch.allclose(z.encode_pictures(x), (z.vae.encode(x).latent_dist.mode() - 0.0609) * 1.5305)
    with pytest.raises(SystemExit, match="scaled by 1.5305"):  # a decoder of another latent space
        sample.main(["a photo of a star", "--decoder", str(tmp_path / "out"), "--out", str(tmp_path / "x.png")])


def test_the_zoos_decoder_is_as_good_as_the_teachers(tmp_path, capsys):
    study.main(["--evaluate", "assets/zoo/decoder", "--out", str(tmp_path), "--device", "cpu", "--json"])
    teacher, ours = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert ours["psnr"] > teacher["psnr"] - 0.5
    assert 5 * ours["params"] < teacher["params"] and 5 * ours["macs"] < teacher["macs"]


def test_time_and_memory_are_measured(tmp_path, capsys, monkeypatch):
    alone = study.run_alone

    def in_this_process(name, *size):
        """For the class scale: a process of its own takes seconds to start, and two show what there is to show."""
        sent, threads = [], torch.get_num_threads()
        study.measure(name, *size, type("Pipe", (), {"send": sent.append}))
        torch.set_num_threads(threads)
        return sent[0]

    monkeypatch.setattr(study, "run_alone", lambda name, *size: (alone if name in study.TABLE_2 else in_this_process)(name, *size))
    study.main(["--latent", "16", "--out", str(tmp_path), "--json"])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["costs"]
    assert [(row["pixels"], row["batch"]) for row in rows] == [(64, 1), (64, 16), (128, 1)]
    for row in rows:
        assert row["theirs"]["seconds"] > row["ours"]["seconds"] > 0, row["names"]
    assert rows[-1]["theirs"]["peak_bytes"] > rows[-1]["ours"]["peak_bytes"] > 0
    assert any(line.startswith("SnapGen") for line in lines) and (tmp_path / "costs.json").is_file()


def test_the_ablation_keeps_what_is_finished(home, monkeypatch, capsys):
    monkeypatch.setattr(study, "ABLATIONS", dict(list(study.ABLATIONS.items())[:2]))
    flags = [*SMALL, "--ablate", "--steps", "1", "--out", str(home / "runs/decoder-ablation"), "--json"]
    tables = []
    for _ in range(2):
        study.main(flags)
        tables.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert list(tables[0]) == ["ours", "with attention"]
    assert all(tables[0][name]["psnr"] == tables[1][name]["psnr"] for name in tables[0])


def test_bad_input_ends_in_one_sentence(finished, tmp_path, home):
    shutil.copytree(finished, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (["--vae", "nowhere"], "holds no autoencoder"),
        (["--data", "nowhere"], "no such folder"),
        (["--data", str(tmp_path / "empty")], "no pictures in"),
        (["--patch", "20"], "multiple of 8"),
        (["--steps", "0"], "at least 1"),
        (["--size", "sd3"], "give --data"),
        (["--init", "assets/zoo/fm"], "cannot be read as a decoder"),
        (["--lr", "1e9", "--steps", "60"], "learning rate"),
    ):
        with pytest.raises(SystemExit, match=words):
            decoder.main([*SMALL, "--out", str(tmp_path / "out"), *arguments])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for folder, words in (("empty", "is not a decoder"), ("broken", "cannot be read as a decoder")):
        with pytest.raises(SystemExit, match=words):
            study.main(["--evaluate", str(tmp_path / folder), "--device", "cpu"])


def test_learning_rate_is_linear_at_the_end():
    assert math.isclose(training.learning_rate(900, 1000), 0.25)
