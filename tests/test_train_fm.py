"""Stage 1 as a user meets it: it learns, it resumes bit for bit, and it fails in one clear sentence."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import flow
import train_fm
from common import checkpoint, muon, training
from common.muon import Muon
from model import PRESETS, UNet

pytestmark = pytest.mark.usefixtures("at_home")
ROOT = Path(__file__).parent.parent
SMALL = ["--pictures", "64", "--batch", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(home):
    """A run of eight steps that nobody disturbed."""
    before = os.getcwd()
    os.chdir(home)
    train_fm.main([*SMALL, "--steps", "8", "--save-every", "4", "--out", "runs/whole"])
    os.chdir(before)
    return home / "runs" / "whole"


def test_a_run_leaves_what_the_contract_says(finished):
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert names == {"model.safetensors", "config.json", "train_state/state.safetensors", "log.csv", "loss.png",
                     "samples/0000004.png", "samples/0000008.png", "samples/progress.png"}  # fmt: skip
    config = json.loads((finished / "config.json").read_text())
    assert config["stage"] == "fm" and config["encoders"] == "assets/toy-sd3" and config["pictures_seen"] == 64
    assert {"scaling_factor", "shift_factor", "unet", "sampling", "latent_size"} <= config.keys()
    rows = list(csv.DictReader(open(finished / "log.csv")))
    assert [row["step"] for row in rows] == ["4", "8"] and float(rows[-1]["val_loss"]) > 0
    assert Image.open(finished / "samples" / "progress.png").size == (8 * 64, 2 * 64)


def test_progress_shows_few_rows_of_many_saves(tmp_path, monkeypatch):
    """The first, the last and some between; each file is closed again."""
    monkeypatch.setattr(training, "ROWS", 3)
    opened = []
    monkeypatch.setattr(Image, "open", lambda path, open=Image.open: opened.append(open(path)) or opened[-1])
    for step in range(1, 6):
        training.save_samples(tmp_path, step, [Image.new("RGB", (4, 4), (50 * (step - 1), 0, 0))])
    assert len(opened) == 1 + 2 + 3 + 3 + 3 and all(picture.fp is None for picture in opened)
    progress = np.asarray(Image.open(tmp_path / "samples" / "progress.png"))
    assert progress.shape == (12, 4, 3) and progress[::4, 0, 0].tolist() == [0, 100, 200]


def test_a_run_that_goes_on_with_other_products_says_so(finished, tmp_path, capsys):
    elsewhere, flags = shutil.copytree(finished, tmp_path / "elsewhere"), [*SMALL, "--steps", "8", "--save-every", "4", "--resume"]
    train_fm.main([*flags, "--out", str(elsewhere)])
    assert "multiplied in" not in capsys.readouterr().out
    config = json.loads((elsewhere / "config.json").read_text())
    config["machine"]["products"] = "float8"
    (elsewhere / "config.json").write_text(json.dumps(config))
    train_fm.main([*flags, "--out", str(elsewhere)])
    assert f"{elsewhere} multiplied in float8 until step 8; here it goes on in" in capsys.readouterr().out
    (elsewhere / "config.json").write_text('{"machine": ')
    with pytest.raises(SystemExit, match="config.json is damaged"):
        train_fm.main([*flags, "--out", str(elsewhere)])


def test_killed_and_resumed_is_bit_for_bit_the_same(finished, home):
    command = [
        sys.executable,
        str(ROOT / "train_fm.py"),
        *SMALL,
        "--steps",
        "8",
        "--save-every",
        "4",
        "--out",
        "runs/killed",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=home, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    state = home / "runs" / "killed" / "train_state" / "state.safetensors"
    deadline = time.time() + 120
    while not state.is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with safetensors.safe_open(state, "pt") as file:
        assert file.metadata()["step"] == "4"
    result = subprocess.run([*command, "--resume"], cwd=home, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("model.safetensors", "train_state/state.safetensors"):
        whole, killed = (safetensors.torch.load_file(run / name) for run in (finished, home / "runs" / "killed"))
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[key], killed[key]) for key in whole), name
    rows = [list(csv.DictReader(open(run / "log.csv"))) for run in (finished, home / "runs" / "killed")]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def test_resume_refuses_other_settings(finished):
    with pytest.raises(SystemExit, match="--lr was 0.005, is 0.5"):
        train_fm.main([*SMALL, "--steps", "8", "--out", "runs/whole", "--lr", "0.5", "--resume"])


def test_resume_notices_another_teacher_and_other_pictures(finished, tmp_path):
    teacher = shutil.copytree(ROOT / "assets/toy-sd3", tmp_path / "toy-sd3")
    (teacher / "vae" / "config.json").write_text((teacher / "vae" / "config.json").read_text() + " ")
    again = [*SMALL, "--steps", "8", "--save-every", "4", "--out", "runs/whole", "--resume"]
    with pytest.raises(SystemExit, match="what --teacher holds is not what the run began with. Give what it began with"):
        train_fm.main([*again, "--teacher", str(teacher)])
    with pytest.raises(SystemExit, match="--pictures was 64, is 65. Give"):
        train_fm.main([*again, "--pictures", "65"])


def test_a_hash_is_told_as_the_folder_that_it_stands_for():
    old, new = {"teacher": "12", "contents": "34", "lr": 1}, {"teacher": "56", "contents": "78", "lr": 2}
    assert checkpoint.changes(old, new) == [
        "what --teacher holds is not what the run began with", "what --data holds is not what the run began with",
        "--lr was 1, is 2",
    ]  # fmt: skip
    assert checkpoint.changes(new, new) == []


def test_a_folder_may_be_written_otherwise_on_a_resume(tmp_path):
    """DIR/, ./DIR and its absolute path are one folder."""
    for i in range(3):
        Image.new("RGB", (70, 64), (40 * i, 90, 200)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    flags = ["--batch", "2", "--save-every", "1", "--out", "runs/ways", "--device", "cpu", "--steps", "1"]
    train_fm.main(["--data", str(tmp_path), *flags])
    for way in (f"{tmp_path}/", os.path.relpath(tmp_path), f"{os.path.dirname(tmp_path)}/./{tmp_path.name}"):
        train_fm.main(["--data", way, *flags, "--resume"])
    (tmp_path / "1.txt").write_text("another caption")
    with pytest.raises(SystemExit, match="what --data holds is not what the run began with"):
        train_fm.main(["--data", str(tmp_path), *flags, "--resume"])


def test_a_finished_run_is_not_overwritten_and_not_trained_again(finished):
    before = (finished / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already: go on with --resume"):
        train_fm.main([*SMALL, "--steps", "8", "--out", "runs/whole"])
    train_fm.main([*SMALL, "--steps", "8", "--out", "runs/whole", "--resume"])
    assert (finished / "model.safetensors").read_bytes() == before


def test_a_loss_that_explodes_stops_the_run_and_saves_nothing_bad():
    with pytest.raises(SystemExit, match="NaN or infinite by step .*--lr .*lower it"):
        train_fm.main([*SMALL, "--steps", "4", "--save-every", "1", "--out", "runs/nan", "--resume", "--lr", "1e30"])
    assert not Path("runs/nan/model.safetensors").exists()


def test_one_step_can_be_followed(monkeypatch):
    """What a warm step enters of the project, from one batch to the next: at most 8 files and 45 functions."""
    entered, noisy_batch = set(), train_fm.noisy_batch

    def enter(frame, event, argument):
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts  # an environment may lie in the folder
        if event == "call" and ours and not code.co_name.startswith("<"):
            entered.add((str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname))

    def watch(data, seed, step, *args, **kwargs):
        if seed == 0:  # validation has another
            sys.setprofile(enter if step == 1 else None)
        return noisy_batch(data, seed, step, *args, **kwargs)

    monkeypatch.setattr(train_fm, "noisy_batch", watch)
    train_fm.main([*SMALL, "--steps", "3", "--save-every", "3", "--out", "runs/followed"])
    entered -= {entry for entry in entered if entry[0].startswith("tests")}
    files = sorted({file for file, _ in entered})
    assert {"train_fm.py", "model.py", "flow.py"} <= set(files) and len(files) <= 8, files
    assert 20 < len(entered) <= 45, sorted(entered)


def test_a_step_that_overflows_counts_as_zero_and_is_reported(monkeypatch):
    noisy_batch = train_fm.noisy_batch

    def overflow(data, seed, step, *args, **kwargs):
        batch = noisy_batch(data, seed, step, *args, **kwargs)
        return batch._replace(v=batch.v / 0.0) if (seed, step) == (0, 2) else batch

    monkeypatch.setattr(train_fm, "noisy_batch", overflow)
    train_fm.main([*SMALL, "--steps", "4", "--save-every", "4", "--out", "runs/overflow"])
    last = list(csv.DictReader(open("runs/overflow/log.csv")))[-1]
    assert float(last["skipped"]) == 0.25 and 0 < float(last["loss"]) < 10 and 0 < float(last["val_loss"]) < 10
    weights = safetensors.torch.load_file("runs/overflow/train_state/state.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())


def test_on_a_gpu_threads_make_the_next_batches_in_order(monkeypatch):
    """Numbers of captions stay as they are; all else is pinned, so that a copy need not wait. An error arrives where it belongs."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1000)
    begun, seen = [], []

    def make(number):
        begun.append(number)
        time.sleep(0.02 * (number % 3 == 0))  # some take longer
        if number == 9:
            raise ValueError("the ninth")
        value = torch.full((2,), float(number))
        return training.Batch(value, value, value, value.long(), value, value)

    with pytest.raises(ValueError, match="the ninth"):
        for batch in training.ahead(make, range(12), torch.device("cuda")):
            assert batch.x_t[0] == batch.states[0] == 1000 + batch.ids[0] and batch.ids.dtype == torch.int64
            seen.append(int(batch.ids[0]))
            deadline = time.time() + 10
            while max(begun) <= seen[-1] and time.time() < deadline:  # the next ones begin without being asked for
                time.sleep(0.001)
            assert max(begun) > seen[-1]
    assert seen == list(range(9))


def test_ema_follows_the_model_and_keeps_no_graph():
    model, ema = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False)
    start = ema.weight.clone()
    training.update_ema(ema, model, step=10_000, longest=0.9)
    assert torch.allclose(ema.weight, 0.9 * start + 0.1 * model.weight)
    assert not ema.weight.requires_grad and ema.weight.grad_fn is None


def test_init_takes_over_the_weights_and_another_size_is_refused(finished, tmp_path):
    train_fm.main([*SMALL, "--steps", "1", "--lr", "0", "--init", "runs/whole", "--out", "runs/second"])
    first, second = (
        safetensors.torch.load_file(Path(run) / "model.safetensors") for run in ("runs/whole", "runs/second")
    )
    assert all(torch.allclose(first[k], second[k], atol=1e-6) for k in first)
    weights = {**first, "conv_out.bias": torch.zeros(3)}
    (tmp_path / "config.json").write_text(Path("runs/whole/config.json").read_text())
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="model of another size: conv_out.bias is"):
        checkpoint.load_student(tmp_path)
    with pytest.raises(SystemExit, match="is not a student: it has no config.json"):
        checkpoint.load_student(tmp_path / "nowhere")


def test_training_learns_one_batch_by_heart():
    cfg = PRESETS["tiny"]
    torch.manual_seed(0)
    model = UNet(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x0, eps, t, text = (
        torch.randn(4, 16, 8, 8),
        torch.randn(4, 16, 8, 8),
        torch.rand(4),
        torch.randn(4, 6, cfg.text_dim),
    )
    x_t, v = flow.interpolate(x0, eps, t), flow.velocity(x0, eps)
    losses = []
    for _ in range(60):
        loss = (model(x_t, t, text) - v).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_noise_depends_on_seed_and_step_alone_and_captions_are_dropped():
    class Ones:
        shape, several_encoders = (1, 1, 1), False

        def batch(self, seed, step, size, rows=slice(None)):
            return torch.zeros(size, 1, 1, 1), torch.ones(size, dtype=torch.long)

        def text(self, ids):
            return torch.zeros(len(ids), 2, 3), torch.ones(len(ids), 2, dtype=torch.bool)

    a, b = (training.noisy_batch(Ones(), 0, 7, 4000, 3.0, 0.1) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[1], training.noisy_batch(Ones(), 0, 8, 4000, 3.0, 0.1)[1])
    assert (a[3] == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    x_t, t, v = a[:3]
    assert torch.allclose(x_t, t.view(-1, 1, 1, 1) * v, atol=1e-6)  # with x_0 = 0: x_t = t eps, v = eps


def test_the_resolution_is_the_pictures():
    """The shapes world has 64 pixels at any --size, and the shift follows the pictures; --data brings the size's own."""
    args = train_fm.parse_arguments(["--size", "t2i"])
    assert args.resolution == 64 and training.timestep_shift(args.size, args.resolution) == 1
    args = train_fm.parse_arguments(["--size", "t2i", "--data", "photos"])
    assert args.resolution == 1024 and training.timestep_shift(args.size, args.resolution) == 3


def test_muon_is_torchs(monkeypatch):
    """Matrices together, or one after the other as torch.optim.Muon does: the same weights, also after a reload of the state."""
    monkeypatch.setattr(muon, "matmul_dtype", lambda device: torch.bfloat16)  # as torch's, also on a CPU that is slow in it
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (1, 5)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    a = Muon(ours, lr=0.1, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x) if step != 2 else torch.zeros_like(x)
            y.grad = x.grad.clone()
        a.step(), b.step()
        state, a = a.state_dict(), Muon(ours, lr=0.1, weight_decay=0.1)
        a.load_state_dict(state)
    assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(ours, theirs, strict=True))


def test_muon_multiplies_in_float32_where_the_cpu_has_no_bfloat16(monkeypatch):
    x = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    for fast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        steps = muon.orthogonalize(x)
        assert steps.dtype == dtype and ((torch.linalg.svdvals(steps.float()) - 1).abs() < 0.4).all()


def test_muon_takes_the_matrices_of_the_transformers_and_adamw_all_else(home):
    model = UNet(PRESETS["tiny"])
    adamw, muon = training.make_optimizers(model, 1e-3, "muon")
    groups = [{id(w) for group in optimizer.param_groups for w in group["params"]} for optimizer in (adamw, muon)]
    assert not groups[0] & groups[1] and groups[0] | groups[1] == {id(w) for w in model.parameters()}
    names = [name for name, w in model.named_parameters() if id(w) in groups[1]]
    assert all(".blocks." in name and name.endswith("weight") for name in names) and len(names) > 100
    assert len(training.make_optimizers(model, 1e-3, "adamw")) == 1
    arguments = [*SMALL, "--optimizer", "muon", "--steps", "2", "--save-every", "1", "--out"]
    train_fm.main([*arguments, "runs/muon"])
    save = train_fm.save_state
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_fm, "save_state", lambda *a, **k: (save(*a, **k), (_ for _ in ()).throw(KeyboardInterrupt)))
        train_fm.main([*arguments, "runs/muon-resumed"])
    train_fm.main([*arguments, "runs/muon-resumed", "--resume"])
    files = [(home / "runs" / name / "model.safetensors").read_bytes() for name in ("muon", "muon-resumed")]
    assert files[0] == files[1]


def test_learning_rate_rises_stays_and_falls():
    rate = [training.learning_rate(step, 1000) for step in range(1000)]
    assert rate[0] < 0.01 and rate[300] == 1.0 and 0 < rate[-1] < 0.01 and max(rate) == 1.0


def test_real_pictures_with_free_text_train_too(tmp_path):
    for i, caption in enumerate(["a pear on a table", "Zwölf Boxkämpfer — 日本語!", "x " * 60]):
        Image.new("RGB", (90, 50), (40 * i, 90, 200)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption, encoding="utf-8")
    with pytest.warns(UserWarning, match="captions cut to 24 tokens"):
        train_fm.main(
            ["--data", str(tmp_path), "--batch", "4", "--steps", "2", "--out", "runs/real", "--device", "cpu"]
        )
    assert Path("runs/real/model.safetensors").is_file()


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--batch", "0"], "--batch must be at least 1"),
    (["--save-every", "0"], "--save-every must be at least 1"),
    (["--resolution", "60"], "--resolution must be a multiple of 32"),
    (["--data", "nowhere"], "no such folder: nowhere"),
    (["--teacher", "nowhere"], "not a Stable Diffusion 3 folder: it lacks vae"),
    (["--init", "nowhere"], "is not a student"),
    (["--device", "abacus"], "no device 'abacus' here"),
])  # fmt: skip
def test_bad_input_ends_in_one_sentence(arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        train_fm.main([*SMALL, "--steps", "1", *arguments, "--out", "runs/bad"])


def test_a_full_disk_keeps_the_last_state(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_atomically(lambda p: p.write_text("good"), path)

    def full(p):
        p.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit, match="the disk is full"):
        checkpoint.save_atomically(full, path)
    assert path.read_text() == "good" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a file size limit, which this system does not have")
def test_a_disk_that_fills_while_weights_are_written(tmp_path):
    """A real limit, through safetensors itself: the process may write 10 kB a file, the weights need 400 kB."""
    code = f"""
import resource, signal, torch, safetensors.torch
from pathlib import Path
from common.checkpoint import save_atomically
path = Path({str(tmp_path)!r}) / "model.safetensors"
save_atomically(lambda p: safetensors.torch.save_file({{"w": torch.zeros(10)}}, p), path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
save_atomically(lambda p: safetensors.torch.save_file({{"w": torch.zeros(100_000)}}, p), path)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "model.safetensors" in result.stderr and "Traceback" not in result.stderr
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["w"].shape == (10,)
    assert len(list(tmp_path.iterdir())) == 1
