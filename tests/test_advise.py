"""coreml/advise.py: small modules, converted here, each with exactly one known sin, on a line that is marked; and one without."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch import nn

import export_coreml
from coreml import advise
from coreml import mil_interpreter as mil
from coreml.package import beside, lines_of, save_package


class Clean(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 32, 1)

    def forward(self, x):  # (1, 64, 1, 64)
        h = F.silu(self.conv(x))
        h = h - h.mean(1, keepdim=True)
        return h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5)


class Gather(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 32)

    def forward(self, x):
        return self.table(x)  # sin: gather


class Integer(nn.Module):
    def forward(self, x):
        positive = x > 0.5  # sin: integer
        return torch.where(positive, x, 2.0 * x)


class Float32(nn.Module):
    def forward(self, x):
        return torch.sin(1000 * x)  # sin: float32


class Norm(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, (64,))  # sin: norm


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 32))

    def forward(self, x):
        return self.inner(x)  # sin: linear


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 3)  # sin: transpose


class Reshapes(nn.Module):
    def forward(self, x):
        h = F.gelu(x.reshape(1, 64, 128))
        return h.reshape(1, 64, 2, 64)  # sin: reshapes


class Padding(nn.Module):
    def forward(self, x):
        return F.silu(x)  # sin: padding


class Fused(nn.Module):
    def forward(self, q, k):
        return F.scaled_dot_product_attention(q, k, k)  # sin: attention


class Written(nn.Module):
    def forward(self, q, k):
        scores = torch.einsum("bchq,bkhc->bkhq", q, k) * 0.125 + 1.0
        return scores.softmax(1)  # sin: attention


def convert(module, inputs, path, nbits=16):
    """The module as a saved package with its lines, read back from disk."""
    inputs = dict(zip("xyz", inputs, strict=False))
    names = {name: name for name in (*inputs, "out")}
    part = export_coreml.Part(module.eval, module, inputs, ("out",), names, "a test")
    package = export_coreml.convert(part)
    found = lines_of(package)
    save_package(package, path)
    return mil.read_package(path), found


X = torch.randn(1, 64, 1, 64)


@pytest.mark.parametrize(("module", "inputs", "types", "count"), [
    (Gather, [torch.ones(1, 64, dtype=torch.int32)], {"gather"}, 64 * 32 * 2),
    (Integer, [X], {"greater"}, 64 * 64),
    (Float32, [X], {"cast", "mul", "sin"}, None),
    (Norm, [X[:, :, 0]], {"layer_norm"}, 64 * 64 * 2),
    (Linear, [X[:, :, 0]], {"linear"}, 64 * 32 * 2),
    (Transpose, [torch.randn(1, 1024, 1, 512)], {"transpose"}, 1024 * 512 * 2),
    (Reshapes, [X.expand(-1, -1, 2, -1)], {"reshape"}, 2 * 64 * 128 * 2),
    (Padding, [X[..., :20]], {"silu"}, 64 * (64 - 40)),
    (Fused, [torch.randn(1, 2, 2048, 32)] * 2, {"scaled_dot_product_attention"}, 2 * 2048 * 2048 * 2),
    (Written, [torch.randn(1, 64, 1, 1024), torch.randn(1, 4096, 1, 64)], {"softmax"}, 1024 * 4096 * 2),
])  # fmt: skip
def test_one_sin_is_found_with_its_line_and_nothing_else(module, inputs, types, count, tmp_path):
    program, where = convert(module(), inputs, tmp_path / "one.mlpackage")
    found, totals = advise.advise(program, where=where)
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    name = module.__name__
    start = text.index(f"class {name}(nn.Module):")
    number, sin = next((i, line.split("# sin: ")[1]) for i, line in enumerate(text[start:], start + 1) if "# sin: " in line)
    assert {f.rule for f in found} == {sin}
    assert {f.type for f in found} == types
    assert {f.line for f in found} - {"input"} == {f"tests/test_advise.py:{number}"}  # input: the cast of x
    assert module is Float32 or len(found) == 1
    assert count in (None, found[0].bytes)
    if module in (Fused, Written, Transpose):  # what is large, the caller decides
        assert advise.advise(program, scores=count, large=count + 1)[0] == []
    assert totals["operations"] == len(mil.operations(program))


def test_a_clean_module_has_no_findings(tmp_path, capsys):
    program, where = convert(Clean(), [X], tmp_path / "clean.mlpackage")
    found, totals = advise.advise(program, where=where)
    assert found == [] and totals["transposes"] == totals["reshapes"] == 0
    assert totals["value_bytes"] == totals["padded_bytes"]
    advise.main([str(tmp_path / "clean.mlpackage")])
    assert "nothing here breaks a rule" in capsys.readouterr().out


def test_islands_of_float32_count_their_casts(tmp_path):
    program, where = convert(Float32(), [X], tmp_path / "f.mlpackage")
    notes = {f.note for f in advise.advise(program, where=where)[0]}
    casts = sum(op.op_type == "cast" for op in mil.operations(program))
    assert notes == {f"island of {casts + 2}, {casts} of them casts"} and casts >= 1


def test_sins_that_coremltools_removes_or_refuses_are_found_in_programs_of_others():
    @mb.program(input_specs=[mb.TensorSpec((1, 2, 2, 2, 2, 64), dtype=types.fp16)])
    def six(x):
        return mb.silu(x=x)

    @mb.program(input_specs=[mb.TensorSpec((1, 64, 2, 64), dtype=types.fp16)])
    def twice(x):
        h = mb.silu(x=mb.transpose(x=x, perm=[0, 3, 2, 1]))
        return mb.transpose(x=h, perm=[0, 3, 2, 1])

    @mb.program(input_specs=[mb.TensorSpec((1, 64, 64, 64), dtype=types.fp16)])
    def turned(x):  # another way: not an inverse
        h = mb.silu(x=mb.transpose(x=x, perm=[0, 2, 3, 1]))
        return mb.transpose(x=h, perm=[0, 2, 3, 1])

    @mb.program(input_specs=[mb.TensorSpec((1, 64, 64), dtype=types.fp16)])
    def rms(x):  # over the last axis, and leaves one number there
        return mb.reduce_mean(x=x, axes=[-1], keep_dims=True)

    @mb.program(input_specs=[mb.TensorSpec((1, 16384, 1, 64), dtype=types.fp16)])
    def idle(x):
        return mb.transpose(x=x, perm=[0, 2, 1, 3])

    @mb.program(input_specs=[mb.TensorSpec((1, 16, 1, 16416), dtype=types.fp16)])
    def wide(x):
        return mb.silu(x=x)

    (found,) = advise.advise(wide)[0]
    assert (found.rule, found.note) == ("extent", "1x16x1x16416")
    (found,) = advise.advise(idle)[0]
    assert found.rule == "transpose" and "only axes of 1 move" in found.note
    assert [f.rule for f in advise.advise(rms)[0]] == ["norm", "padding"]
    assert [(f.rule, f.note) for f in advise.advise(six)[0]] == [("rank", "6 axes")]
    assert [f.rule for f in advise.advise(twice)[0]] == ["reshapes"]
    assert advise.advise(twice)[0][0].note.endswith("around silu")
    assert advise.advise(turned)[0] == []


def test_a_last_axis_of_one_takes_32_times_its_bytes():
    """By the article: 32 times in 16 bits."""

    @mb.program(input_specs=[mb.TensorSpec((1, 64, 64, 1), dtype=types.fp16)])
    def column(x):
        return mb.silu(x=x)

    (found,), totals = advise.advise(column)
    assert totals["padded_bytes"] == 32 * totals["value_bytes"] and found.note == "97% of the buffer"


def test_a_build_tells_lines_modules_and_every_finding(tmp_path, capsys):
    inputs = {"x": X[:, :, 0]}
    net = Linear().eval()
    part = export_coreml.Part(lambda: net, net, inputs, ("out",), {"x": "x", "out": "out"}, "a test")
    export_coreml.export("decoder", {8: part}, tmp_path)
    advise.main([str(tmp_path), "--json", str(tmp_path / "advice.json")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "advice.json").read_text(encoding="utf-8"))
    (finding,) = report["packages"]["decoder"]["findings"]
    assert finding["module"] == "inner.0" and finding["line"] in printed and finding["line"].startswith("tests/test_advise.py:")
    assert finding["inputs"] == [[1, 64, 64]] and finding["outputs"] == [[1, 64, 32]]
    assert set(report["rules"]) == set(advise.CHECKS) == set(advise.RULES)
    assert all("https://" in rule["source"] for rule in report["rules"].values())

    beside(tmp_path / "decoder.mlpackage").unlink()
    advise.main([str(tmp_path)])
    assert "no lines: there is no decoder.lines.json" in capsys.readouterr().out


def test_bad_input_ends_in_one_sentence(tmp_path):
    (tmp_path / "decoder.mlpackage").mkdir()
    for command, words in (
        ([], "required: PACKAGE_OR_BUILD_DIR"),
        ([str(tmp_path / "none")], "is no package and holds none"),
        ([str(tmp_path)], "not a Core ML package that can be read"),
    ):
        with pytest.raises(SystemExit, match=words):
            advise.main(command)
