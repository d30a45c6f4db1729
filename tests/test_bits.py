"""Fewer bits, mixes of them, what is alive at the peak, and a student without its Gemma: each against PyTorch or a sum by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch import nn

import export_coreml
from common.checkpoint import save_json, save_network
from common.encoders import FrozenEncoders
from common.latents import in_memory
from coreml import compress as compression
from coreml import costs, layers
from coreml import mil_interpreter as mil
from coreml.compress import choose, compress, decompressed, price_of_each, relative_error
from coreml.layers import PhoneUNet
from coreml.package import save_package
from coreml.pipeline import PARTS, Packages, real_inputs
from coreml.verify import decibels
from decoder import DecoderConfig, TinyDecoder
from model import ResBlock, UNet, UNetConfig
from studies import bits

pytestmark = pytest.mark.usefixtures("at_home")
SMALL = UNetConfig(channels=(32, 64), depth=(1, 1), self_attention=(False, True), mid_depth=1, layers=1, head_dim=32, groups=16,
                   text_dim=176, time_dim=64)  # fmt: skip
ONE_STAGE = replace(SMALL, channels=(32,), depth=(1,), self_attention=(False,))  # coremltools takes its time for each operation
SCALES = {"scaling_factor": 1.4066, "shift_factor": 0.0059}


def shaken(net):
    for name, p in net.named_parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return net.eval()


def save_student(folder, home, cfg=SMALL, **more):
    torch.manual_seed(0)
    scales = json.loads((home / "assets/zoo/fm/config.json").read_text())
    config = {"encoders": str(home / "assets/toy-sd3"), "latent_size": [8, 8], **{name: scales[name] for name in SCALES},
              "sampling": {"steps": 2, "guidance": 1.0, "shift": 3.0, "times": [1.0, 0.75, 0.0]}}  # fmt: skip
    net = shaken(UNet(cfg))
    save_network(folder, net, config | more)
    return net, config | more


def export_without_checks(model, decoder, folder):
    """What export_coreml.py leaves, for the study to find: half the time, since nothing is interpreted."""
    student, report = export_coreml.trained_student(model, decoder), {"parts": {}}
    flags = {"latent": None, "nbits": 16, "layout": "ane", "target": "iOS18", "gemma": None}
    for name in PARTS:
        (part,) = export_coreml.make_parts(student, name, [8], 1, "ane").values()
        save_package(export_coreml.convert(part), folder / f"{name}.mlpackage")
        numbers = {"float32_error": 0.0, "decibels": 0.0, "operations": 0, "bytes": 0, "seconds": 0.0, "mac": None}
        settings = flags | {"weights": student.weights[name]}
        report["parts"][name] = {"settings": settings, "sizes": {"8": numbers}}
    save_json(report, folder / "verification.json")


@pytest.fixture(scope="module")
def study(home):
    """The study of a small student and a small decoder, with random weights: 16 bits and a mix."""
    _, config = save_student(home / "student", home, ONE_STAGE)
    decoder = shaken(TinyDecoder(DecoderConfig(channels=(32, 16, 16, 16), blocks=(1, 1, 1, 1), groups=8)))
    save_network(home / "decoder", decoder, config, kind="decoder")
    command = ["--model", str(home / "student"), "--decoder", str(home / "decoder")]
    export_without_checks(home / "student", home / "decoder", home / "bits" / "16")
    command += ["--bits", "16", "--mixed", "5", "--random", "--per-family", "1", "--out", str(home / "bits")]
    bits.main(command)
    return SimpleNamespace(folder=home / "bits", decoder=decoder, command=command)


def package_of(study, row, part):
    return bits.load(study.folder / row / f"{part}.mlpackage")


def test_many_at_once_are_one_after_the_other(study):
    program = mil.program_of(package_of(study, "16", "unet"))
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(3, *var.shape, generator=g) for name, var in program.functions["main"].inputs.items()}
    inputs |= {"t": torch.tensor([[1.0], [0.5], [0.1]]), "mask": torch.ones(3, 1, 24)}
    for precision, bar in (("exact", 100), ("declared", 50)):
        alone = [mil.run(program, {name: x[i] for name, x in inputs.items()}, precision)["velocity"] for i in range(3)]
        many = mil.run_many(program, inputs, precision)["velocity"]
        assert decibels(torch.stack(alone), many) > bar and decibels(torch.stack(alone).roll(1, 0), many) < 20


def test_a_mix_has_the_weights_of_its_bits(study):
    """In 4 bits a weight has 16 different numbers, in 8 it is within half a step, the channel's largest number / 127."""
    whole = package_of(study, "16", "unet")
    program, mixed = mil.program_of(whole), mil.program_of(package_of(study, "mixed-5", "unet"))
    prices = json.loads((study.folder / "prices.json").read_text())["unet"]
    chosen, found = choose(prices, 5.0), decompressed(program, mixed)
    assert found.keys() == chosen.keys() == set(compression.compressible(whole)) and len(found) > 20
    originals = {var.name: torch.from_numpy(var.val).float() for op in mil.operations(program) for var in op.inputs.values()
                 if not isinstance(var, list | tuple) and var.name in found}  # fmt: skip
    for name, weight in found.items():
        original, values = originals[name], weight.unique().numel()
        step = original.flatten(1).abs().amax(1).view(-1, *[1] * (original.dim() - 1)) / 127
        near = ((weight - original).abs() <= 0.51 * step + 1e-3 * original.abs()).all()
        assert (values <= 16 and not near) if chosen[name] == 4 else (values > 16 and near), name
    assert set(chosen.values()) == {8, 4} and 4.5 < compression.average_bits(prices, chosen) <= 5.0


def least_error(weight, colors):
    """The least squared error of `colors` numbers for a weight's: every cut of the sorted numbers, one color more at a time."""
    x = np.sort(weight.ravel().astype(np.float64))
    sums, squares = (np.concatenate([[0], np.cumsum(y)]) for y in (x, x * x))

    def alone(first, last):  # the error of x[first:last] around its mean
        return squares[last] - squares[first] - (sums[last] - sums[first]) ** 2 / (last - first)

    best = np.array([0.0, *(alone(0, last) for last in range(1, len(x) + 1))])
    for _ in range(colors - 1):
        best = np.array([0.0, *(min(best[:last] + alone(np.arange(last), last)) for last in range(1, len(x) + 1))])
    return best[-1]


@pytest.mark.parametrize("size", [600, 1500])
def test_a_palette_is_the_best_there_is(size):
    """Of a weight below 10,000 numbers too, in a package."""
    torch.manual_seed(size)
    net = nn.Conv2d(1, size // 25, 5).eval()
    nn.init.normal_(net.weight)
    words = dict.fromkeys(("x", "out"), "-")
    part = export_coreml.Part(lambda: net, net, {"x": torch.randn(1, 1, 9, 9)}, ("out",), words, "a test")
    package = export_coreml.convert(part)
    whole, few = mil.program_of(package), mil.program_of(compress(package, 4))
    (name, found), = decompressed(whole, few).items()
    original = net.weight.detach().half().numpy()
    error = np.square(original.astype(np.float64) - found.numpy()).sum()
    assert found.unique().numel() == 16 and error < 1.001 * least_error(original, 16)


def test_the_price_of_a_weight_is_that_of_pytorch(study):
    """The interpreted program with one weight in 4 bits, beside the decoder in PyTorch with the same numbers in that weight."""
    package = package_of(study, "16", "decoder")
    z = torch.randn(4, 1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    prices = price_of_each(package, {"latent": z})
    program = mil.program_of(package)
    fewer = decompressed(program, mil.program_of(compress(package, 4)))
    module = export_coreml.decoder_part(study.decoder, 8).module
    own = {f"p_{name.replace('.', '_')}_to_fp16": weight for name, weight in module.named_parameters()}
    with torch.no_grad():
        expected, seen = module(z[:, 0]), 0
        for name in fewer.keys() & own.keys():
            kept = own[name].data
            own[name].data = fewer[name]
            error = relative_error({"x": expected}, {"x": module(z[:, 0])})
            own[name].data = kept
            assert prices[name]["error"] == pytest.approx(error, rel=0.05, abs=1e-9) and prices[name]["numbers"] == kept.numel()
            seen += 1
    assert seen >= 0.8 * len(prices) and max(price["error"] for price in prices.values()) > 1e-6


def test_choose_spends_the_budget_where_an_error_is_largest_for_its_size():
    weights = ("a", 100, 1.0), ("b", 200, 4.0), ("c", 600, 3.0), ("d", 100, 0.1)
    prices = {name: {"numbers": n, "error": e} for name, n, e in weights}
    assert choose(prices, 4.0) == dict.fromkeys("abcd", 4) and choose(prices, 8.0) == dict.fromkeys("abcd", 8)
    assert choose(prices, 4.8) == {"a": 4, "b": 8, "c": 4, "d": 4}  # 200 of 1000 numbers: b alone
    assert choose(prices, 5.2) == {"a": 8, "b": 8, "c": 4, "d": 4}  # 300
    assert choose(prices, 7.2) == {"a": 8, "b": 8, "c": 4, "d": 8}  # 800: not b and c, whose errors are the largest
    assert choose(prices, 5.7) == {"a": 8, "b": 8, "c": 4, "d": 8}  # 425: c does not fit, d does


def test_the_study_is_resumed_row_by_row_and_reports_what_it_did(study, capsys):
    report = json.loads((study.folder / "bits.json").read_text())
    rows = report["rows"]
    assert list(rows) == ["16", "mixed 5"] and (study.folder / "bits.png").is_file()
    for part in ("unet", "decoder", "text_encoder"):
        assert rows["16"]["bytes"][part] > rows["mixed 5"]["bytes"][part]
        assert rows["16"]["decibels"][part] > 50 and rows["16"]["decibels"][part] - 10 > rows["mixed 5"]["decibels"][part] > 10
    plan = json.loads((study.folder / "mixed-5" / "pipeline.json").read_text())
    assert plan["nbits"] == "mixed 5" and Packages(study.folder / "mixed-5").draw(["a photo of a star"], [0])[0].size == (64, 64)
    (study.folder / "16" / "row.json").unlink()
    bits.main(study.command)
    printed = capsys.readouterr().out
    assert "-- 16 bits" in printed and "-- mixed" not in printed and "unet: kept" in printed
    assert json.loads((study.folder / "bits.json").read_text())["rows"] == rows
    with pytest.raises(SystemExit, match="other settings"):
        bits.main([*study.command, "--seed", "1"])


def test_the_pareto_front():
    rows = {name: {"bytes": {"unet": size}, "score": value} for name, size, value in
            (("16", 16, 0.8), ("8", 8, 0.81), ("6", 6, 0.7), ("5", 5, 0.75), ("4", 4, 0.2))}  # fmt: skip
    assert bits.front(rows) == ["4", "5", "8"]


def test_what_is_alive_at_the_peak():
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 8), dtype=types.fp16)], opset_version=None)
    def program(x):
        wide = mb.tile(x=x, reps=(1, 4), name="wide")  # 64 bytes, beside x with 16
        half = mb.slice_by_index(x=wide, begin=[0, 0], end=[1, 16], name="half")  # 32; wide and x still wait
        both = mb.concat(values=[half, x], axis=1, name="both")  # 48
        return mb.concat(values=[both, wide], axis=1, name="out")  # 112, beside both and wide

    peak, op, alive = costs.peak_of(program)
    assert (peak, op.name, [var.name for var in alive]) == (64 + 48 + 112, "out", ["out", "wide", "both"])
    assert costs.activation_bytes(program) == peak


@pytest.mark.parametrize("most", [2**22, 4096, 1])
def test_a_resblock_in_pieces_is_the_resblock(most, monkeypatch):
    """Whole, in some pieces, and a group at a time; no tensor but the input of the first piece is wider than allowed."""
    monkeypatch.setattr(layers, "HIDDEN", most)
    torch.manual_seed(0)
    block = shaken(ResBlock(SMALL, 96, 64))
    pieces = layers.replace_modules(nn.Sequential(layers.ResBlockInPieces(block)), nn.GroupNorm, layers.LayerNormGroups)[0]
    x, time, widths = torch.randn(1, 96, 8, 6), torch.randn(1, 64), set()
    with torch.no_grad():
        assert (block(x, time) - pieces(x, time)).abs().max() < 1e-5
    for node in torch.export.export(pieces, (x, time)).graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.shape[2:] == x.shape[2:]:
            widths.add(value.shape[1])
    assert max(widths) == {2**22: 192, 4096: 96, 1: 96}[most] and (12 in widths) == (most == 1)  # 192 channels in 16 groups of 12


def test_a_unet_in_small_pieces_is_the_unet(monkeypatch):
    """Positions and hidden channels some at a time, as at 128x128 latents; the pieces of 5 do not divide 96 positions."""
    torch.manual_seed(0)
    unet, x, text, mask = shaken(UNet(SMALL)), torch.randn(2, 16, 8, 12), torch.randn(2, 7, 176), torch.ones(2, 7)
    monkeypatch.setattr(layers, "HIDDEN", 2048)
    monkeypatch.setattr(layers, "PIECE", 5 * 32)
    with torch.no_grad():
        expected = unet(x, torch.tensor([0.2, 0.9]), text, mask.bool())
        found = PhoneUNet(unet)(x, torch.tensor([0.2, 0.9]), text, mask)
    assert (expected - found).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", ["ane", "standard"])
def test_no_tensor_holds_a_skip_beside_what_it_joins(layout):
    """In stage 1, where they are largest, and only in the layout of the neural engine."""
    net = PhoneUNet(shaken(UNet(SMALL)), layout)
    inputs = torch.randn(1, 16, 12, 8), torch.tensor([0.3]), torch.randn(1, 5, 176), torch.ones(1, 5)
    nodes = torch.export.export(net, inputs).graph.nodes
    shapes = {tuple(node.meta["val"].shape) for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    assert ((1, 64 + 32, 12, 8) in shapes) == (layout == "standard") and (1, 64, 12, 8) in shapes


def test_a_student_without_its_gemma_is_what_training_saw_when_it_dropped_it(home, gemma, tmp_path):
    """The text package and the UNet beside the student on data.Latents.text of ids (k, k, 0)."""
    net, config = save_student(home / "speaker", home, gemma=str(gemma))
    captions = ["", "a photo of a red circle", "a photo"]
    encoders = FrozenEncoders(home / "assets/toy-sd3", gemma=gemma)
    memory = in_memory(torch.zeros(3, 16, 8, 8), torch.arange(3), captions, *encoders.encode_captions(captions),
                     *encoders.gemma.encode(captions), encoders.first_clip, SMALL.text_dim)  # fmt: skip
    student = export_coreml.trained_student(home / "speaker", "assets/zoo/decoder", gemma="none")
    plan, phone = export_coreml.plan_of(student, [8], 16), student.encoders
    assert plan["tokens"] == 24 and plan["gemma"] == "none"
    seen = real_inputs(student.networks["unet"], plan, phone, captions, student.text, student.mask)
    (text,) = export_coreml.make_parts(student, "text_encoder", [8], 1, "ane").values()
    (unet,) = export_coreml.make_parts(student, "unet", [8], 1, "ane").values()
    export_coreml.convert(text, "float32").save(str(tmp_path / "text.mlpackage"))
    program = mil.read_package(tmp_path / "text.mlpackage")
    x, t, unet = torch.randn(1, 16, 8, 8), torch.tensor([0.6]), unet.module
    for k in (1, 2, 0):
        tokens, expected = dict(zip(text.inputs, export_coreml.tokens_of(phone, [captions[k]]), strict=True)), []
        states, mask = mil.run(program, tokens, "exact").values()
        assert states.shape == (1, 24 + 1, 176) and mask[0, -1] == 1
        with torch.no_grad():
            for ids in ([k, k, 0], [k, k, k]):
                text_of_ids, real = memory.text(torch.tensor([ids]))
                expected.append(net(x, t, text_of_ids.float(), real))
            found, (dropped, whole) = unet(x, t, states, mask), expected
        assert decibels(dropped, found) > 60  # the cache of captions is in float16
        assert k == 0 or decibels(whole, found) < 45
    assert seen["unet"]["text"].shape[1:] == (1, 25, 176) and seen["unet"]["mask"][..., -1].all()


def test_gemma_none_is_for_students_of_gemma(home, gemma, tmp_path):
    save_student(home / "mute", home)
    save_student(home / "speaker", home, gemma=str(gemma))
    save_student(home / "lost", home, gemma=str(tmp_path / "nowhere"))
    for command, words in (
        (["--model", "speaker"], "drop Gemma, as training did now and then, by --gemma none"),
        (["--model", "mute", "--gemma", "none"], "was trained without Gemma"),
        (["--model", "lost", "--gemma", "none"], "nowhere is not there"),
        (["--random", "tiny", "--gemma", "none"], "leave --gemma out"),
        (["--nbits", "4", "--mixed", "5"], "not allowed with argument --nbits"),
    ):
        with pytest.raises(SystemExit, match=words):
            export_coreml.main([*command, "--decoder", "assets/zoo/decoder", "--out", str(tmp_path / "out")])
