"""latency.py: counts against torch's own, and the device's code paths on a benchmarker with coremltools' real signatures."""

import inspect
import json
import shutil
import subprocess

import pytest
import torch
from coremltools.models.ml_program.experimental import perf_utils, remote_device

import export_coreml
import latency
from common.checkpoint import save_json
from coreml import mil_interpreter as mil
from coreml.costs import macs
from coreml.layers import PhoneUNet
from coreml.package import save_package
from coreml.verify import compare
from decoder import DecoderConfig, TinyDecoder
from model import UNet, UNetConfig
from studies.decoder import count as count_decoder
from studies.sizes import count

SMALL = UNetConfig(
    channels=(32, 64), depth=(1, 1), self_attention=(False, True), mid_depth=1, layers=1, head_dim=32, groups=16, text_dim=48,
    time_dim=64,
)  # fmt: skip
DECODER = DecoderConfig(channels=(32, 16, 16, 16), blocks=(1, 1, 1, 1), groups=8)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A small decoder's package with the plan that a whole export would leave."""
    out = tmp_path_factory.mktemp("build")
    torch.manual_seed(0)
    part = export_coreml.decoder_part(TinyDecoder(DECODER).eval(), 8)
    export_coreml.export("decoder", {8: part}, export_coreml.parse_arguments(["--out", str(out)]), {"commit": "test"})
    save_json({"latent_sizes": [8], "functions": {"8": "main"}, "nbits": 16, "steps": 4}, out / "pipeline.json")
    return out


@pytest.mark.parametrize("layout", ["standard", "ane"])
def test_macs_of_the_unet_are_torchs(layout, tmp_path):
    part = export_coreml.unet_part(UNet(SMALL), 8, torch.randn(1, 5, 48), torch.ones(1, 5), 1, layout)
    assert isinstance(part.module, PhoneUNet)
    args = export_coreml.parse_arguments([])
    save_package(
        export_coreml.convert(part, "float32", args, {"commit": "test"}), tmp_path / "u.mlpackage"
    )
    program = mil.read_package(tmp_path / "u.mlpackage")
    assert sum(map(macs, mil.operations(program))) == count(SMALL, 8, 5)[1]
    assert compare(part, program, "exact")[0] < 1e-4


def test_report_of_a_program(build, monkeypatch, capsys):
    monkeypatch.setattr(latency, "has_core_ml", lambda: False)
    latency.main([str(build)])
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])["programs"]["decoder"]
    assert "cannot be timed on this machine" in printed and report["latency_ms"] is None
    with torch.device("meta"):
        params, macs = count_decoder(TinyDecoder(DECODER), torch.empty(1, 16, 8, 8))
    assert report["macs"] == macs
    assert (
        2 * params <= report["weight_bytes"] < 2.5 * params + 20_000
    )  # two bytes each, and each array on a border of 64
    # the largest moment: the input and the output of the last block's first operation, 16 channels of 64 x 64 in float16, and more
    assert 2 * 2 * 16 * 64 * 64 <= report["peak_activation_bytes"] <= 5 * 2 * 16 * 64 * 64


REAL = perf_utils.MLModelBenchmarker


class FakeBenchmarker:
    """Answers as coremltools' MLModelBenchmarker does; a test below compares the signatures."""

    Measurement, Statistics = REAL.Measurement, REAL.Statistics

    def __init__(self, model, device=None):
        self.unit = model.compute_unit.name

    async def benchmark_load(self, iterations=1):
        if self.unit == "CPU_AND_GPU":
            raise RuntimeError("the GPU is busy")
        return REAL.Measurement.from_samples([900.0, 20.0, 30.0, 10.0][:iterations])

    async def benchmark_predict(self, inputs=None, iterations=1, warmup=False):
        assert warmup
        return REAL.Measurement.from_samples([5.0 + i for i in range(iterations)])


class FakePhone:
    name, os_version = "iPhone 99", "27.1"

    async def prepare_for_model_debugging(self, credentials=None, working_directory=None, clean=False):
        assert credentials.development_team == "TEAM"
        return self


def names(function):
    return list(inspect.signature(function).parameters)


def test_the_fakes_have_coremltools_signatures():
    for method in ("__init__", "benchmark_load", "benchmark_predict"):
        theirs, ours = getattr(REAL, method), getattr(FakeBenchmarker, method)
        assert names(theirs) == names(ours), method
        assert inspect.iscoroutinefunction(theirs) == inspect.iscoroutinefunction(ours)
    prepare = remote_device.Device.prepare_for_model_debugging
    assert names(prepare) == names(FakePhone.prepare_for_model_debugging) and inspect.iscoroutinefunction(prepare)
    assert names(remote_device.Device.get_connected_devices) == ["device_type"]
    assert {"development_team", "bundle_identifier"} <= set(names(remote_device.AppSigningCredentials))
    service = inspect.signature(remote_device._DeviceCtlRemoteService.__init__).parameters
    assert [(p.name, p.default is not p.empty) for p in service.values()][2:] == [
        ("poll_time", True),
        ("max_attempts", True),
    ]
    assert {"name", "os_version"} <= set(remote_device.Device.__annotations__)


@pytest.fixture
def core_ml(monkeypatch):
    monkeypatch.setattr(latency, "has_core_ml", lambda: True)
    monkeypatch.setattr(perf_utils, "MLModelBenchmarker", FakeBenchmarker)


def test_times_on_a_mac(build, core_ml, capsys):
    latency.main([str(build), "--n", "5", "--loads", "3"])
    printed = capsys.readouterr().out
    units = json.loads(printed.splitlines()[-1])["parts"]["decoder"]
    assert units["neural engine"]["first_load"] == 900 and units["neural engine"]["load"] == 20
    assert units["CPU"]["predict"] == 7.0 and len(units["CPU"]["predict_samples"]) == 5
    assert units["GPU"] == {"error": "the GPU is busy"} and "the GPU is busy" in printed  # told, and the others go on


def test_times_on_an_iphone(build, core_ml, monkeypatch, capsys):
    monkeypatch.setattr(remote_device.Device, "get_connected_devices", staticmethod(lambda device_type: []))
    with pytest.raises(SystemExit, match="no iPhone is connected"):
        latency.main([str(build), "--device", "iphone", "--team", "TEAM"])
    monkeypatch.setattr(remote_device.Device, "get_connected_devices", staticmethod(lambda device_type: [FakePhone()]))
    with pytest.raises(SystemExit, match="give --team"):
        latency.main([str(build), "--device", "iphone"])
    latency.main([str(build), "--device", "iphone", "--team", "TEAM", "--n", "3"])
    attempts = inspect.signature(remote_device._DeviceCtlRemoteService.__init__).parameters["max_attempts"].default
    assert attempts == 3600  # half a second each: half an hour, not ten seconds, for a first load
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["device"] == "iPhone 99" and report["os"] == "27.1"


def test_swift_file_names_the_packages_and_parses(build, tmp_path, capsys):
    latency.main([str(build), "--swift"])
    swift = capsys.readouterr().out
    assert (
        'for name in ["decoder"]' in swift
        and swift.count("{") == swift.count("}")
        and swift.count("(") == swift.count(")")
    )
    if shutil.which("swiftc") is None:
        pytest.skip("no Swift compiler on this machine: the file was only checked for balance")
    (tmp_path / "Latency.swift").write_text(swift)
    subprocess.run(["swiftc", "-parse", str(tmp_path / "Latency.swift")], check=True)


def test_bad_input_ends_in_one_sentence(build, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "has_core_ml", lambda: False)
    for command, words in (
        ([], "required: DIR"),
        ([str(tmp_path)], "holds no packages"),
        ([str(build), "--device", "iphone"], "from a Mac only"),
        ([str(build), "--n", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit, match=words):
            latency.main(command)
