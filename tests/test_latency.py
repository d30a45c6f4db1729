"""latency.py: counts against torch's own, and the device's code paths on a benchmarker with coremltools' real signatures."""

import asyncio
import inspect
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from coremltools.models import compute_device, compute_plan
from coremltools.models.ml_program.experimental import async_wrapper, compute_plan_utils, perf_utils, remote_device

import export_coreml
import latency
from common.checkpoint import save_json
from coreml import mil_interpreter as mil
from coreml import phone
from coreml.costs import macs
from coreml.layers import PhoneUNet
from coreml.mil_interpreter import ct
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
    part = export_coreml.decoder_part(TinyDecoder(DECODER).eval(), 8, "standard")
    export_coreml.export("decoder", {8: part}, out)
    save_json({"latent_sizes": [8], "functions": {"8": "main"}, "nbits": 16, "steps": 4}, out / "pipeline.json")
    return out


@pytest.mark.parametrize("layout", ["standard", "ane"])
def test_macs_of_the_unet_are_torchs(layout, tmp_path):
    part = export_coreml.unet_part(UNet(SMALL), 8, torch.randn(1, 5, 48), torch.ones(1, 5), 1, layout)
    assert isinstance(part.module, PhoneUNet)
    save_package(export_coreml.convert(part, "float32"), tmp_path / "u.mlpackage")
    program = mil.read_package(tmp_path / "u.mlpackage")
    assert sum(map(macs, mil.operations(program))) == count(SMALL, 8, 5)[1]
    assert compare(part, program, "exact")[0] < 1e-4


def test_report_of_a_program(build, monkeypatch, capsys):
    monkeypatch.setattr(latency, "has_core_ml", lambda: False)
    latency.main([str(build)])
    assert capsys.readouterr().out.splitlines()[-1].startswith("How many milliseconds that is, only a device can say")
    latency.main([str(build), "--json"])
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
        self.unit, self.loads, self.predictions = model.compute_unit.name, [900.0, 20.0, 30.0, 10.0], 0

    async def benchmark_load(self, iterations=1):
        if self.unit == "CPU_AND_GPU":
            raise RuntimeError("the GPU is busy")
        return REAL.Measurement.from_samples([self.loads.pop(0) for _ in range(iterations)])

    async def benchmark_predict(self, inputs=None, iterations=1, warmup=False):
        assert warmup == (self.predictions == 0)
        self.predictions += iterations
        return REAL.Measurement.from_samples([4.0 + self.predictions] * iterations)


# What coremltools has on a Mac only is made up here: its borders to Core ML (the proxies, the compiler) and to Xcode (devicectl).


class Proxy:
    """Stands for each of coremltools' native classes."""


class PlanProxy(Proxy):
    """Core ML's plan: conv on the neural engine, the upsampling on the GPU, the rest on the CPU that could do better."""

    def __init__(self, structure):
        self.model_structure = structure

    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        kind = operation.operator_name.split(".")[-1]
        if kind == "const":
            return None
        engine, gpu, cpu = (kind(Proxy()) for kind in DEVICES)
        preferred = engine if kind == "conv" else gpu if kind == "upsample_nearest_neighbor" else cpu
        supported = [cpu, gpu] if kind == "upsample_nearest_neighbor" else [cpu, gpu, engine]
        return compute_plan.MLComputePlanDeviceUsage(preferred_compute_device=preferred, supported_compute_devices=supported)

    def get_estimated_cost_for_mlprogram_operation(self, operation):
        kind = operation.operator_name.split(".")[-1]
        return compute_plan.MLComputePlanCost(weight=0.01) if kind in ("conv", "upsample_nearest_neighbor") else None


DEVICES = (compute_device.MLNeuralEngineComputeDevice, compute_device.MLGPUComputeDevice, compute_device.MLCPUComputeDevice)


class ModelProxy:
    package = None  # the last that was compiled

    @classmethod
    def get_compute_plan(cls, path, compute_units):
        assert Path(path).is_dir() and compute_units == "CPU_AND_NE"
        ops = [compute_plan.MLModelStructureProgramOperation(
            inputs={}, operator_name=f"ios18.{op.op_type}", blocks=[], __proxy__=Proxy(),
            outputs=[compute_plan.MLModelStructureProgramNamedValueType(
                name=var.name, type=compute_plan.MLModelStructureProgramValueType()) for var in op.outputs])
            for op in mil.read_package(cls.package).functions["main"].operations]  # fmt: skip
        block = compute_plan.MLModelStructureProgramBlock(inputs=[], operations=ops, output_names=[])
        program = compute_plan.MLModelStructureProgram(
            functions={"main": compute_plan.MLModelStructureProgramFunction(inputs=[], block=block)}
        )
        structure = compute_plan.MLModelStructure(neuralnetwork=None, program=program, pipeline=None)
        return compute_plan.MLComputePlan(proxy=PlanProxy(structure))


def compile_model(model, destination_path=None):
    assert Path(model).is_dir()
    ModelProxy.package = model
    Path(destination_path).mkdir()
    return destination_path


def names(function):
    return list(inspect.signature(function).parameters)


def test_the_fakes_have_coremltools_signatures():
    for method in ("__init__", "benchmark_load", "benchmark_predict"):
        theirs, ours = getattr(REAL, method), getattr(FakeBenchmarker, method)
        assert names(theirs) == names(ours), method
        assert inspect.iscoroutinefunction(theirs) == inspect.iscoroutinefunction(ours)
    assert names(ct.models.utils.compile_model) == names(compile_model)
    for method in ("get_compute_device_usage_for_mlprogram_operation", "get_estimated_cost_for_mlprogram_operation"):
        assert names(getattr(compute_plan.MLComputePlan, method)) == names(getattr(PlanProxy, method))
        assert f"self.__proxy__.{method}(operation)" in inspect.getsource(getattr(compute_plan.MLComputePlan, method))
    source = inspect.getsource(compute_plan.MLComputePlan.load_from_path)
    assert "_MLModelProxy.get_compute_plan(path, compute_units.name)" in source
    assert names(compute_plan_utils.load_compute_plan_from_path_on_device) == ["path", "compute_units", "device"]
    assert {kind.__name__ for kind in DEVICES} == set(phone.DEVICES)
    for name in ("_run_command", "_run_command_async"):
        assert names(getattr(remote_device._DeviceCtl, name)) == ["command"]
    assert names(remote_device._ModelRunnerAppBuilder.build) == names(FakeXcode.build)
    assert names(remote_device.Device.prepare_for_model_debugging) == ["self", "credentials", "working_directory", "clean"]
    assert {"development_team", "bundle_identifier"} <= set(names(remote_device.AppSigningCredentials))
    service = inspect.signature(remote_device._DeviceCtlRemoteService.__init__).parameters
    assert [(p.name, p.default) for p in service.values()][2:] == [("poll_time", 0.5), ("max_attempts", 20)]
    assert {"name", "os_version", "os_build_number", "developer_mode_state", "identifier", "udid", "state", "session"} <= set(
        remote_device.Device.__annotations__
    )


@pytest.fixture
def core_ml(monkeypatch):
    """This machine as a Mac: coremltools with made-up proxies, and a compiler that compiles nothing."""
    monkeypatch.setattr(latency, "has_core_ml", lambda: True)
    monkeypatch.setattr(ct.models.utils, "compile_model", compile_model)
    monkeypatch.setattr(compute_plan, "_MLModelProxy", ModelProxy)
    monkeypatch.setattr(compute_plan, "_MLComputePlanProxy", PlanProxy)
    for kind in ("NeuralEngine", "GPU", "CPU"):
        monkeypatch.setattr(compute_device, f"_ML{kind}ComputeDeviceProxy", Proxy)


def test_times_and_plan_on_a_mac(build, core_ml, monkeypatch, capsys):
    monkeypatch.setattr(perf_utils, "MLModelBenchmarker", FakeBenchmarker)
    latency.main([str(build), "--n", "5", "--loads", "3"])
    assert capsys.readouterr().out.splitlines()[-1] == "decoder is fastest on the CPU: 7.00 ms a prediction."
    latency.main([str(build), "--n", "5", "--loads", "3", "--json"])
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    units = report["parts"]["decoder"]
    assert units["neural engine"]["first_load"] == 900 and units["neural engine"]["load"] == 20
    assert units["CPU"]["predict"] == 7.0 and units["CPU"]["predict_samples"] == [5.0, 6.0, 7.0, 8.0, 9.0]
    assert units["GPU"] == {"error": "the GPU is busy"} and "the GPU is busy" in printed  # told, and the others go on

    ops = mil.operations(mil.read_package(build / "decoder.mlpackage"))
    convs, ups = ([op for op in ops if op.op_type == kind] for kind in ("conv", "upsample_nearest_neighbor"))
    decoder = report["plans"]["decoder"]
    assert decoder["devices"]["neural engine"] == {"operations": len(convs), "share": pytest.approx(0.01 * len(convs))}
    assert decoder["devices"]["GPU"]["operations"] == len(ups) == 3
    assert len(decoder["off"]) == len(ops) - len(convs)
    up = next(row for row in decoder["off"] if row["type"] == "upsample_nearest_neighbor")
    assert up["could"] == ["CPU", "GPU"] and up["line"].startswith("decoder.py:") and up["module"].startswith("decoder.layers.")
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert re.search(r" 3 +3\.0% +GPU +cannot +decoder\.py:\d+ ", rows["upsample_nearest_neighbor"])
    assert "CPU      could, does not" in rows["silu"]


class Clock(asyncio.SelectorEventLoop):
    """An event loop that does not wait: where it would, its time jumps. Threads' work is done at once."""

    def __init__(self):
        super().__init__()
        self.now, look = 0.0, self._selector.select

        def select(timeout=None):
            self.now += timeout or 0.0
            return look(0)

        self._selector.select = select

    def time(self):
        return self.now

    def run_in_executor(self, executor, work, *args):
        future = self.create_future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class FakeXcode:
    """devicectl with iPhones at its cables, one of which runs the model runner. Above it everything is coremltools' own."""

    def __init__(self, *phones, **habits):
        self.phones = phones or ("Ada",)
        self.states = dict.fromkeys(self.phones, "connected")
        self.developer, self.launch_says, self.install_says, self.load_seconds, self.fails = "enabled", None, None, 3.0, None
        self.lost_after, self.notices, self.answers, self.predictions, self.clock = None, True, {}, 0, None
        self.__dict__.update(habits)

    def new_event_loop(self):
        self.clock = Clock()
        return self.clock

    @staticmethod
    def build(device, build_directory, credentials, clean=False):
        assert credentials.development_team == "TEAM"
        return Path(build_directory)

    def poll(self):  # the process that holds the runner's console
        return 1 if self.launch_says or self.notices and "disconnected" in self.states.values() else None

    def run_async(self, command):
        assert "process launch --console -d id-" in command
        return SimpleNamespace(poll=self.poll, stderr=io.BytesIO(self.launch_says or b""), terminate=lambda: None)

    def run(self, command):
        word = dict(zip(command.split(), command.split()[1:], strict=False))
        if "list devices" in command:
            return {"result": {"devices": [
                {"identifier": f"id-{name}", "connectionProperties": {"tunnelState": self.states[name]},
                 "deviceProperties": {"name": name, "osVersionNumber": "27.1", "osBuildUpdate": "24A1",
                                      "developerModeStatus": self.developer},
                 "hardwareProperties": {"deviceType": "iPhone", "udid": f"udid-{name}", "marketingName": "iPhone 99 Pro"}}
                for name in self.phones]}}  # fmt: skip
        if "install app" in command:
            if self.install_says:
                raise remote_device._DeviceCtlError(error_code=1, message=self.install_says)
            return {"result": {"installedApplications": [{"bundleID": "org.example.modelrunner", "databaseUUID": "1"}]}}
        if "disconnected" in self.states.values():
            raise remote_device._DeviceCtlError(error_code=1, message=b"ERROR: The device is not connected.")
        if "copy to" in command:
            if "/requests/messages/" in word["--destination"]:
                self.ask(json.loads(Path(word["--source"]).read_text()))
        elif word["--source"].endswith(".bin"):
            Path(word["--destination"]).write_bytes(b"")
        else:
            ready, answer = self.answers[Path(word["--source"]).parent.name]
            if self.clock.now < ready:
                raise remote_device._DeviceCtlError(error_code=1, message=b"ERROR: no such file")
            Path(word["--destination"]).write_text(json.dumps(answer))
        return {"result": {"sourceURL": "a", "destinationURL": "b", "source": "a", "destination": "b"}}

    def ask(self, request):
        """What the runner on the phone makes of a request, and when."""
        method, params = request["method"].split(".")[-1], request["params"]
        seconds, answer = 0.01, {"id": request["id"], "result": {"modelID": params["modelID"]}}
        if self.fails == params.get("computeUnits"):
            answer = {"id": request["id"], "error": {"code": -1, "message": "Failed to build the model execution plan"}}
        elif method == "Load":
            seconds = self.load_seconds
            answer["result"]["duration"] = int(seconds * 1e9)
        elif method == "Prediction":
            self.predictions += 1
            answer["result"] |= {"duration": 7_000_000 + self.predictions * 1000, "outputs": {}}
            answer["resource"] = "data.bin"
            if self.predictions == self.lost_after:
                self.states = dict.fromkeys(self.phones, "disconnected")
        self.answers[request["id"]] = (self.clock.now + seconds, answer)


@pytest.fixture
def plug(core_ml, monkeypatch):
    """plug(FakeXcode(...)) -> Xcode and its phones are there, and nobody waits."""
    monkeypatch.setattr(remote_device._DeviceCtlRemoteService.__init__, "__defaults__", (0.5, 20))  # and set back afterwards

    def plug(xcode):
        monkeypatch.setattr(remote_device._DeviceCtl, "_run_command", staticmethod(xcode.run))
        monkeypatch.setattr(remote_device._DeviceCtl, "_run_command_async", staticmethod(xcode.run_async))
        monkeypatch.setattr(remote_device._ModelRunnerAppBuilder, "build", staticmethod(FakeXcode.build))
        monkeypatch.setattr(remote_device._shutil, "which", lambda command: f"/usr/bin/{command}")
        monkeypatch.setattr(async_wrapper, "compile_model", compile_model)
        monkeypatch.setattr(asyncio.events, "new_event_loop", xcode.new_event_loop)
        return xcode

    return plug


def iphone(build, *more):
    latency.main([str(build), "--device", "iphone", "--team", "TEAM", "--n", "3", "--loads", "2", "--json", *more])


@pytest.mark.parametrize(("xcode", "more", "words"), [
    (dict(phones=()), [], "no iPhone is connected: plug one in"),
    (dict(states={"Ada": "disconnected"}), [], "Ada: known, but not connected (disconnected)"),
    (dict(phones=("Ada", "Bob"), states={"Ada": "connected", "Bob": "connected"}), [], "2 iPhones are connected, Ada, Bob: choose"),
    (dict(phones=("Ada", "Bob"), states={"Ada": "connected", "Bob": "connected"}), ["--phone", "Eve"], "no iPhone is called 'Eve'"),
    (dict(developer="disabled"), [], "Ada is not in developer mode"),
    (dict(launch_says=b"ERROR: the device was not, or could not be, unlocked."), [], "Ada is locked: unlock"),
    (dict(install_says=b"ERROR: The device is locked."), [], "Ada is locked: unlock"),
    (dict(install_says=b"ERROR: No provisioning profile\n was found."), [], "started on Ada: ERROR: No provisioning profile was"),
])  # fmt: skip
def test_a_phone_that_cannot_be_timed_is_said_in_one_sentence(build, plug, xcode, more, words, tmp_path):
    plug(FakeXcode(**xcode))
    with pytest.raises(SystemExit, match=re.escape(words)) as ended:
        iphone(build, *more, "--out", str(tmp_path / "r.json"))
    assert "\n" not in str(ended.value) and not list(tmp_path.iterdir())


def test_two_phones_one_is_chosen_by_name_and_its_report_has_all_to_compare(build, plug, tmp_path, capsys):
    plug(FakeXcode("Ada", "Bob"))
    iphone(build, "--phone", "Bob", "--out", str(tmp_path / "r.json"))
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == json.loads(printed.splitlines()[-1])
    assert report["device"] == "iPhone 99 Pro" and report["os"] == "iOS 27.1 (24A1)" and "Bob" not in json.dumps(report)
    assert report["precision"] == "float16" and report["nbits"] == 16 and report["latent_sizes"] == [8]
    assert report["coremltools"] == ct.__version__ and report["iterations"] == {"predict": 3, "load": 2}
    assert report["packages"].keys() == {"decoder"} and len(report["packages"]["decoder"]) == 16
    for unit in ("neural engine", "GPU", "CPU"):
        times = report["parts"]["decoder"][unit]
        assert times["first_load"] == 3000 and times["load_samples"] == [3000.0, 3000.0] and len(times["predict_samples"]) == 3
    # the warm-up is the first prediction of each unit, and not counted
    assert report["parts"]["decoder"]["GPU"]["predict_samples"] == pytest.approx([7.006, 7.007, 7.008])
    assert report["stopped"] is None


def test_a_first_load_of_three_minutes_is_waited_for_and_one_beyond_patience_is_told(build, plug, capsys):
    xcode = plug(FakeXcode(load_seconds=180.0))
    iphone(build, "--loads", "1", "--n", "1")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["parts"]["decoder"]["neural engine"]["first_load"] == 180_000 and xcode.clock.now > 3 * 2 * 180
    xcode = plug(FakeXcode(load_seconds=180.0))
    iphone(build, "--patience", "60")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "within 60 s: try --patience" in report["parts"]["decoder"]["neural engine"]["error"] and xcode.clock.now < 200


def test_a_unit_that_fails_on_the_phone_is_told_and_the_others_are_timed(build, plug, capsys):
    plug(FakeXcode(fails="CPU_AND_GPU"))
    iphone(build)
    printed = capsys.readouterr().out
    units = json.loads(printed.splitlines()[-1])["parts"]["decoder"]
    assert units["GPU"] == {"error": "Failed to build the model execution plan"} and "execution plan" in printed
    assert units["neural engine"]["predict"] > 7 and units["CPU"]["predict"] > 7


@pytest.mark.parametrize("notices", [True, False])  # whether the runner's console ends with the cable, or only the list tells
def test_a_cable_lost_in_the_middle_keeps_what_was_measured(build, plug, notices, tmp_path, capsys):
    xcode = plug(FakeXcode(lost_after=7, notices=notices))  # the third of four of the GPU: a warm-up and three
    with pytest.raises(SystemExit, match="the phone is gone.*r.json has what was measured before"):
        iphone(build, "--out", str(tmp_path / "r.json"))
    report, printed = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    units = report["parts"]["decoder"]
    assert len(units["neural engine"]["predict_samples"]) == 3 and "error" not in units["neural engine"]
    assert len(units["GPU"]["predict_samples"]) == 1 and "the phone is gone" in units["GPU"]["error"]
    assert "CPU" not in units and "the phone is gone" in report["stopped"]
    assert "7.00" in printed and xcode.clock.now < 120  # not after the half hour of --patience


def test_reports_side_by_side(build, plug, tmp_path, capsys):
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    plug(FakeXcode())
    iphone(build, "--out", a)
    plug(FakeXcode(fails="CPU_ONLY", load_seconds=5.0))
    iphone(build, "--out", b)
    capsys.readouterr()
    latency.main(["--compare", a, b])
    printed = capsys.readouterr().out
    assert f"A  {a}: iPhone 99 Pro, iOS 27.1 (24A1): 8x8 latents, float16" in printed
    rows = {tuple(line[:41].split()): line[41:] for line in printed.splitlines() if line.startswith("decoder")}
    assert rows["decoder", "GPU", "first", "load"].split() == ["3000.0", "5000.0"]
    assert rows["decoder", "CPU", "first", "load"].split() == ["3000.0", "-"]
    assert latency.PAPER["decoder"] in rows["decoder", "neural", "engine", "predict"]
    assert "not the same package" not in printed and "paper's numbers are for 128x128" in printed

    other = json.loads(Path(b).read_text()) | {"nbits": 6, "packages": {"decoder": "f00"}}
    save_json(other, b)
    latency.main(["--compare", a, b])
    printed = capsys.readouterr().out
    assert "decoder: not the same package" in printed and "nbits: 16, 6" in printed
    save_json({"programs": {}}, a)
    with pytest.raises(SystemExit, match="a.json is no report of times"):
        latency.main(["--compare", a, b])


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
        (["--compare", str(build / "pipeline.json")], "is no report of times"),
    ):
        with pytest.raises(SystemExit, match=words):
            latency.main(command)
