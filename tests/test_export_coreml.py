"""Stage 4: the phone's forms against the originals, packages read back and interpreted, broken ones caught."""

import errno
import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import export_coreml
from common.checkpoint import load_student, save_network
from common.encoders import FrozenEncoders
from coreml import layers, package, pipeline
from coreml import mil_interpreter as mil
from coreml.costs import macs
from coreml.layers import AneTransformer, LayerNormGroups, PhoneDecoder, PhoneText, PhoneUNet, UpsampleLast
from coreml.verify import check
from decoder import DecoderConfig, TinyDecoder, Upsample, load_decoder
from export_coreml import Part, convert, export
from model import Transformer2D, UNet, UNetConfig
from sample import draw_pictures

pytestmark = pytest.mark.usefixtures("at_home")
SMALL = UNetConfig(
    channels=(32, 64), depth=(1, 1), self_attention=(False, True), mid_depth=1, layers=1, head_dim=32, groups=16, text_dim=160,
    time_dim=64,
)  # fmt: skip
ONE_STAGE = replace(SMALL, channels=(32,), depth=(1,), self_attention=(True,))  # coremltools takes its time for each operation
PROMPTS = ["a photo of a red circle left of a blue star", "a photo of a star", ""]
ABOUT = {"commit": "test"}


def shaken(net):
    """Random gains and offsets too: a norm that forgets them must not pass."""
    for name, p in net.named_parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return net.eval()


@pytest.fixture(scope="module")
def students(home):
    """Folders of a small student that was distilled for two steps, and of a small decoder, with random weights."""
    torch.manual_seed(0)
    config = {"encoders": str(home / "assets/toy-sd3"), "latent_size": [8, 8],
              "sampling": {"steps": 2, "guidance": 1.0, "shift": 3.0, "times": [1.0, 0.75, 0.0]}}  # fmt: skip
    scales = json.loads((home / "assets/zoo/fm/config.json").read_text())
    config |= {name: scales[name] for name in ("scaling_factor", "shift_factor")}
    save_network(home / "student", shaken(UNet(SMALL)), config)
    decoder = shaken(TinyDecoder(DecoderConfig(channels=(32, 16, 16, 16), blocks=(1, 1, 1, 1), groups=8)))
    save_network(home / "decoder", decoder, config, kind="decoder")
    return home / "student", home / "decoder"


@pytest.fixture(scope="module")
def build(home, students):
    """All three parts, exported once."""
    student, decoder = students
    export_coreml.main(
        ["--model", str(student), "--decoder", str(decoder), "--score", "1", "--out", str(home / "build")]
    )
    return home / "build"


# ------------------------------------------------------------------------------------------------------------------
# The forms


@pytest.mark.parametrize("layout", ["standard", "ane"])
def test_unet_of_the_phone_is_the_unet(layout):
    torch.manual_seed(0)
    unet = shaken(UNet(SMALL))
    x, t, text = torch.randn(3, 16, 8, 12), torch.tensor([0.1, 0.6, 1.0]), torch.randn(3, 24, 160)
    mask = torch.arange(24)[None] < torch.tensor([[24], [7], [2]])
    with torch.no_grad():
        expected, found = unet(x, t, text, mask), PhoneUNet(unet, layout)(x, t, text, mask.float())
    assert (expected - found).abs().max() < 2e-5 * expected.abs().max()


def test_transformer_with_many_keys_in_both_layouts():
    """--layout ane for heads with keys of their own as well (ladder steps before d2)."""
    cfg = UNetConfig(channels=(64,), head_dim=32, groups=16, text_dim=48, multi_query=False)
    net = shaken(Transformer2D(cfg, 64, 2, self_attention=True))
    x, text, mask = torch.randn(2, 64, 4, 6), torch.randn(2, 5, 48), torch.zeros(2, 1, 1, 5)
    with torch.no_grad():
        assert (net(x, text, mask) - AneTransformer(net)(x, text, mask)).abs().max() < 1e-5


def test_group_norm_as_layer_norm():
    norm = shaken(nn.GroupNorm(4, 12))
    x = 3 * torch.randn(2, 12, 5, 7) + 1
    assert torch.allclose(norm(x), LayerNormGroups(norm)(x), atol=1e-5)


@pytest.mark.parametrize("size", [(3, 4), (1, 1), (6, 5)])
def test_a_doubled_picture_need_not_be_made(size):
    """Corners, edges and middle, and no tensor as large as the doubled picture with the channels that come in."""
    torch.manual_seed(0)
    before, x = Upsample(10, 7), torch.randn(2, 10, *size)
    after = UpsampleLast(before)
    with torch.no_grad():
        assert (before(x) - after(x)).abs().max() < 1e-5 and after(x).shape == (2, 7, 2 * size[0], 2 * size[1])
    assert after.weight.numel() == 16 * 7 * 10  # for four pixels, which took 4 x 9 x 7 x 10 products


def test_the_decoder_of_the_phone_saves_products():
    """16 in place of 36 for every pixel before an upsampler, and one row and column more; everything else is as it was."""
    decoder, found = TinyDecoder(DecoderConfig(channels=(32, 24), blocks=(1, 1), groups=8)).eval(), {}
    for layout in ("standard", "ane"):
        program = mil.program_of(convert(export_coreml.decoder_part(decoder, 6, layout), "float32", about=ABOUT))
        found[layout] = sum(map(macs, mil.operations(program)))
    assert found["standard"] - found["ane"] == 32 * 24 * (36 * 6 * 6 - 16 * 7 * 7)


def test_decoder_and_text_of_the_phone():
    decoder, _ = load_decoder("assets/zoo/decoder")
    encoders, z = FrozenEncoders("assets/toy-sd3"), torch.randn(1, 16, 6, 8)
    text, mask = encoders.student_text(PROMPTS, 176)
    with torch.no_grad():
        for upsample in (None, Upsample):
            assert (PhoneDecoder(decoder, upsample)(z) - ((decoder(z) + 1) * 127.5).clamp(0, 255)).abs().max() < 1e-2
        phone = PhoneText(encoders.text_encoders, 176, encoders.tokenizers[0].eos_token_id)
        for i, prompt in enumerate(PROMPTS):
            states, real = phone(*export_coreml.tokens_of(encoders, [prompt]))
            assert torch.allclose(states[0], text[i], atol=1e-5) and torch.equal(real[0].bool(), mask[i])


# ------------------------------------------------------------------------------------------------------------------
# Packages


def test_every_part_is_verified_and_described(build):
    report = json.loads((build / "verification.json").read_text())
    assert set(report["parts"]) == {"text_encoder", "unet", "decoder"}
    for part in report["parts"].values():
        for numbers in part["sizes"].values():
            assert numbers["float32_error"] < 1e-4 and 50 < numbers["decibels"] < 120
    assert not list(build.rglob("executorch_debug_handle_mapping.json")), "for debuggers: no phone needs it"
    spec = mil.ct.models.MLModel(str(build / "unet.mlpackage"), skip_model_load=True).get_spec()
    kinds = {
        f.name: (list(f.type.multiArrayType.shape), f.type.multiArrayType.dataType) for f in spec.description.input
    }
    half, full = 65552, 65568  # FLOAT16 and FLOAT32 of Core ML's feature types
    assert kinds == {
        "latent": ([1, 16, 8, 8], full),
        "t": ([1], full),
        "text": ([1, 24, 160], half),
        "mask": ([1, 24], half),
    }
    assert [f.name for f in spec.description.output] == ["velocity"]
    assert all(f.shortDescription for f in [*spec.description.input, *spec.description.output])
    metadata = spec.description.metadata
    assert metadata.license == "MIT" and "UNet" in metadata.shortDescription and metadata.versionString
    plan = json.loads((build / "pipeline.json").read_text())
    assert plan["times"] == [1.0, 0.75, 0.0] and plan["guidance"] == 1.0 and plan["tokens"] == 24 and plan["batch"] == 1
    assert report["mini_geneval"]["pictures"] == 6 and (build / "pictures.png").is_file()


def test_the_chain_draws_what_pytorch_draws(build, students):
    """Packages and pipeline.json alone give the picture that sample.py gives, but for float16."""
    model, config = load_student(students[0])
    expected = draw_pictures(
        model, config, FrozenEncoders("assets/toy-sd3"), PROMPTS[:2], [3, 4], decoder=load_decoder(students[1])[0]
    )
    for a, b in zip(expected, pipeline.Packages(build).draw(PROMPTS[:2], [3, 4]), strict=True):
        assert a.size == b.size == (64, 64)
        assert np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean() < 1.0  # of 255


def test_finished_parts_are_kept(build, students, capsys):
    command = ["--model", str(students[0]), "--decoder", str(students[1]), "--out", str(build), "--parts", "decoder"]
    weights = build / "decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    before = weights.stat().st_mtime_ns
    export_coreml.main(command)
    assert "decoder: kept" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="other settings"):
        export_coreml.main([*command, "--target", "iOS17"])
    with pytest.raises(SystemExit, match="another --latent"):
        export_coreml.main([*command, "--latent", "16", "--force"])
    with pytest.raises(SystemExit, match="another --latent, --gemma or --nbits"):
        export_coreml.main([*command, "--nbits", "8", "--force"])
    with pytest.raises(SystemExit, match="the UNet of another student than assets/zoo/fm"):
        export_coreml.main([*command[2:], "--model", "assets/zoo/fm", "--force"])


def test_time_embedding_stays_in_float32(build):
    ops = mil.operations(mil.read_package(build / "unet.mlpackage"))
    for op in ops:
        if op.op_type in ("sin", "cos"):
            assert mil.torch_type(op.outputs[0]) == torch.float32 and mil.torch_type(op.inputs["x"]) == torch.float32
    halves = [op for op in ops if op.outputs and mil.torch_type(op.outputs[0]) == torch.float16]
    assert len(halves) > 0.9 * len(ops)
    assert not {"tile", "reduce_sum_square"} & {
        op.op_type for op in ops
    }  # MQA's one key serves all heads without copies


def decoder_part(latent=8):
    torch.manual_seed(1)
    net = shaken(TinyDecoder(DecoderConfig(channels=(64, 32), blocks=(1, 1), groups=8)))
    return export_coreml.decoder_part(net, latent)


def test_several_sizes_share_one_package(tmp_path):
    reports = export("decoder", {8: decoder_part(8), 16: decoder_part(16)}, tmp_path, about=ABOUT)
    program = mil.read_package(tmp_path / "decoder.mlpackage")
    assert set(program.functions) == {"latent8", "latent16"}
    assert all(report["decibels"] > 50 for report in reports.values())
    (tmp_path / "one").mkdir()
    export("decoder", {8: decoder_part(8)}, tmp_path / "one", about=ABOUT)
    description = (
        mil.ct.models.MLModel(str(tmp_path / "decoder.mlpackage"), skip_model_load=True).get_spec().description
    )
    assert description.metadata.license == "MIT" and description.defaultFunctionName == "latent8"
    assert reports[8]["bytes"] < 1.5 * package.weight_bytes(
        tmp_path / "one/decoder.mlpackage"
    )  # weights are there once


def test_fewer_bits_are_fewer_bytes_and_more_error(tmp_path):
    size, quality = {}, {}
    for nbits in (16, 8, 4):
        out = tmp_path / str(nbits)
        out.mkdir()
        bar = 50.0 if nbits == 16 else None
        report = export("decoder", {8: decoder_part()}, out, nbits, about=ABOUT, bar=bar)[8]
        size[nbits] = report["bytes"]
        quality[nbits] = report["decibels"]
    assert size[8] < 0.65 * size[16] and size[4] < 0.45 * size[16]
    assert quality[16] > quality[8] > quality[4]


def plainly(part):
    """A Part's package by coremltools' own passes in one conversion, as its documentation has it."""

    def kind(name, x=None):
        whole = x is not None and not x.is_floating_point()
        return np.int32 if whole else np.float32 if name in part.float32 else np.float16

    return mil.ct.convert(
        part.captured(), minimum_deployment_target=mil.ct.target.iOS18, skip_model_load=True,
        compute_precision=mil.ct.transform.FP16ComputePrecision(lambda op: not export_coreml.feeds_sine(op)),
        inputs=[mil.ct.TensorType(name, x.shape, dtype=kind(name, x)) for name, x in part.inputs.items()],
        outputs=[mil.ct.TensorType(name, dtype=kind(name)) for name in part.outputs],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["text_encoder", "unet ane", "unet standard", "decoder"])
def test_packages_are_those_of_one_plain_conversion(name):
    """Weights bit for bit, operations byte for byte: also after the program was used for the package in float32."""
    torch.manual_seed(0)
    if name == "text_encoder":
        part = export_coreml.text_part(FrozenEncoders("assets/toy-sd3"), 176)
    elif name == "decoder":
        part = decoder_part()
    else:
        part = export_coreml.unet_part(shaken(UNet(ONE_STAGE)), 8, torch.randn(1, 5, 160), torch.ones(1, 5), 2, name.split()[1])
    program = export_coreml.program_of(part)
    export_coreml.package_of(program, part, "float32")
    ours, plain = export_coreml.package_of(program, part, "float16"), plainly(part)
    a, b = (package.get_spec().mlProgram.functions["main"] for package in (ours, plain))
    assert a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True)
    a, b = (Path(package.weights_dir, "weight.bin").read_bytes() for package in (ours, plain))
    assert a == b and len(a) > 10_000


def test_what_float16_cannot_hold_stays_in_float32():
    for numbers, beyond in (([65504.0, -65504.0], False), ([0.0, 65505.0], True), ([-7e4], True), ([1e38, -np.inf], False),
                            ([np.inf, -7e4], True), ([], False)):  # fmt: skip
        assert package.beyond_float16(np.array(numbers, np.float32)) == beyond


def test_a_network_is_let_go_before_its_phones_form_is_converted(tmp_path, monkeypatch):
    """Two of 379 M parameters are 3 GB."""

    class Reached(Exception):
        pass

    def program_of(part, target):
        gc.collect()
        raise Reached(alive())

    monkeypatch.setattr(export_coreml, "program_of", program_of)
    net = UNet(ONE_STAGE).eval()
    alive = weakref.ref(net)
    student = export_coreml.Student({"unet": net}, {}, torch.randn(1, 5, 160), torch.ones(1, 5), 8, {"guidance": 1.0}, {})
    del net
    with pytest.raises(Reached, match="None"):
        export("unet", export_coreml.make_parts(student, "unet", [8], 1, "ane"), tmp_path)


def test_the_phones_form_shares_the_parameters_that_it_does_not_change():
    unet = UNet(ONE_STAGE)
    own = {id(p) for p in unet.parameters()}
    shared = [p for p in PhoneUNet(unet).parameters() if id(p) in own]
    assert len(shared) > 0.3 * len(own) and unet.down[0].layers[0].transformer.__class__ is Transformer2D


def test_a_size_that_is_named_twice_is_one_function(home, students):
    student, decoder = students
    command = ["--model", str(student), "--decoder", str(decoder), "--parts", "decoder", "--out", str(home / "twice")]
    export_coreml.main([*command, "--latent", "8", "8"])
    plan = json.loads((home / "twice/pipeline.json").read_text())
    assert plan["latent_sizes"] == [8]
    assert set(plan["functions"].values()) == set(mil.read_package(home / "twice/decoder.mlpackage").functions)


def test_megabytes_are_those_of_weights(build):
    """coremltools writes a map for debuggers into packages of 16 bits, none into compressed ones."""
    report = json.loads((build / "verification.json").read_text())
    for name, part in report["parts"].items():
        files = {p.name: p.stat().st_size for p in (build / f"{name}.mlpackage").rglob("*") if p.is_file()}
        assert files.keys() == {"Manifest.json", "model.mlmodel", "weight.bin"}
        assert [numbers["bytes"] for numbers in part["sizes"].values()] == [files["weight.bin"]]


# ------------------------------------------------------------------------------------------------------------------
# What must be caught


def program_of(part, tmp_path, precision):
    package.save_package(convert(part, precision, about=ABOUT), tmp_path / "x.mlpackage")
    return mil.read_package(tmp_path / "x.mlpackage")


def part_of(module, **inputs):
    return Part(module.eval, module, inputs, ("out",), dict.fromkeys([*inputs, "out"], "-"), "a test")


class Alone(nn.Module):
    """A transformer as the UNet calls it."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, x):
        return self.transformer(x, self.text, None)


def test_rope_of_another_size_is_caught(tmp_path, monkeypatch):
    torch.manual_seed(0)
    cfg = UNetConfig(channels=(64,), head_dim=32, groups=16, text_dim=48)
    module = Alone(shaken(Transformer2D(cfg, 64, 1, self_attention=True)))
    module.register_buffer("text", torch.randn(1, 5, 48))
    part = part_of(module, x=torch.randn(1, 64, 4, 4))
    good = program_of(part, tmp_path, "float32")
    assert check(part, good, "exact")[0] < 1e-4
    import model

    table = model.rope_table
    with monkeypatch.context() as patch:  # the table of a grid of 8 x 2, which has as many rows
        patch.setattr(model, "rope_table", lambda h, w, d, device=None: table(2 * h, w // 2, d, device))
        bad = program_of(part, tmp_path, "float32")
    with pytest.raises(SystemExit, match="off PyTorch"):
        check(part, bad, "exact")
    with pytest.raises(SystemExit, match="the first bad one, .* dB: (mul|sub|cat|add|concat)"):
        check(part, bad, "exact", show=True)


class NotANumber(nn.Module):
    def forward(self, x):
        return x / (x - x)


def test_nan_is_caught_whatever_the_bar(tmp_path):
    part = part_of(NotANumber(), x=torch.randn(1, 4))
    program = program_of(part, tmp_path, "float32")
    for precision in ("exact", "declared"):
        with pytest.raises(SystemExit, match="not kept"):
            check(part, program, precision, bar=None)


class Normalize(nn.Module):
    def forward(self, x):
        return layers.normalize(x, 1e-5)


def test_layer_norm_of_the_ane_layout_survives_large_numbers(tmp_path):
    """Squares of 500 do not fit into float16."""
    torch.manual_seed(0)
    part = part_of(Normalize(), x=500 * torch.randn(1, 48, 1, 9))
    part.reference = lambda x: F.layer_norm(x.transpose(1, 3), (48,)).transpose(1, 3)
    assert check(part, program_of(part, tmp_path, "float16"), "declared", bar=50.0)[1] > 50


class Loud(nn.Module):
    """A group norm of large numbers, in nn.GroupNorm's form or in the phone's."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x * 2000.0)


def test_group_norm_overflow_is_caught_and_its_other_form_survives(tmp_path):
    torch.manual_seed(0)
    norm, x = shaken(nn.GroupNorm(4, 16)), torch.randn(1, 16, 8, 8)
    bad, good = part_of(Loud(norm), x=x), part_of(Loud(LayerNormGroups(norm)), x=x)
    assert check(good, program_of(good, tmp_path, "float16"), "declared", bar=50.0)[1] > 50
    program = program_of(bad, tmp_path, "float16")
    with pytest.raises(SystemExit, match="at least 50.0.* --bisect shows where"):
        check(bad, program, "declared", bar=50.0)
    with pytest.raises(SystemExit, match="the first bad one, -inf dB: .*square"):
        check(bad, program, "declared", bar=50.0, show=True)


def test_bad_input_ends_in_one_sentence(tmp_path, students, monkeypatch):
    toy = tmp_path / "gemma"
    toy.mkdir()
    for part in Path("assets/toy-sd3").resolve().iterdir():
        if part.name != "text_encoder_2":
            (toy / part.name).symlink_to(part)
    (toy / "text_encoder_2").mkdir()
    (toy / "text_encoder_2/config.json").write_text('{"model_type": "gemma2"}')
    small = ["--model", str(students[0]), "--decoder", str(students[1])]
    for command, words in (
        (["--model", "nowhere"], "is not a student"),
        ([*small, "--teacher", str(toy)], "is a gemma2, and only CLIP"),
        ([*small, "--parts", "unet", "--score", "1"], "all three packages"),
        ([*small, "--latent", "8", "16", "--target", "iOS17"], "needs iOS 18"),
        ([*small, "--latent", "7"], "multiples of 2"),
        (["--random", "tiny"], "no text encoder"),
    ):
        with pytest.raises(SystemExit, match=words):
            export_coreml.main([*command, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no such package"):
        mil.main([str(tmp_path / "nothing.mlpackage")])
    (tmp_path / "empty.mlpackage").mkdir()
    with pytest.raises(SystemExit, match="is not a Core ML package"):
        mil.main([str(tmp_path / "empty.mlpackage")])

    def full(path):
        Path(path).mkdir()
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])  # as copytree says it

    (tmp_path / "old.mlpackage").mkdir()
    (tmp_path / "old.mlpackage/weights").write_text("old")
    with pytest.raises(SystemExit, match="disk is full.*intact"):
        package.save_package(full, tmp_path / "old.mlpackage")
    replace, calls = package.os.replace, []

    def fail_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="broken"):
        patch.setattr(package.os, "replace", fail_second)
        package.save_package(lambda path: Path(path).mkdir(), tmp_path / "old.mlpackage")
    assert [p.name for p in tmp_path.glob("*old*")] == ["old.mlpackage"]  # and nothing half-written beside it
    assert (tmp_path / "old.mlpackage/weights").read_text() == "old"
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot write"):
        export_coreml.main([*small, "--parts", "decoder", "--out", str(tmp_path / "file")])


# ------------------------------------------------------------------------------------------------------------------
# The interpreter


def test_interpreter_refuses_what_it_does_not_know(build, capsys):
    program = mil.read_package(build / "decoder.mlpackage")
    with pytest.raises(ValueError, match="latent is missing"):
        mil.run(program, {})
    with pytest.raises(SystemExit, match="has no function 'other'"):
        mil.run(program, {}, function="other")
    x = torch.randn(2, 3)
    for call in (
        lambda: mil.gelu(x, "SIGMOID_APPROXIMATION"),
        lambda: mil.cumsum(x, 1, reverse=True),
        lambda: mil.concat([x, x], 0, interleave=True),
        lambda: mil.gather(x, torch.tensor([0]), axis=1),
        lambda: mil.conv(x[None, None], x[None, None], pad_type="same"),
    ):
        with pytest.raises(ValueError, match="is not known here"):
            call()
    known = mil.OPERATIONS.pop("conv")
    try:
        with pytest.raises(ValueError, match="'conv' is not known here"):
            mil.run(program, {"latent": torch.zeros(1, 16, 8, 8)})
    finally:
        mil.OPERATIONS["conv"] = known
    mil.main([str(build / "decoder.mlpackage")])
    assert "conv(" in capsys.readouterr().out
    mil.main([str(build / "decoder.mlpackage"), "--count"])
    assert " conv" in capsys.readouterr().out
