"""Two processes do what one does; one that loses the other says so."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from common import parallel

ROOT = Path(__file__).parent.parent
STAGES = """
import functools, sys
sys.path.insert(0, {root!r})
import torch
from common import device

device.matmul_dtype = lambda device: torch.float32  # bfloat16 rounds by batch size
import decoder, distill, step_distill, train_fm
from common import parallel

for stage in (train_fm, distill):
    stage.draw_pictures = functools.partial(stage.draw_pictures, steps=2)
for stage in (train_fm, distill, step_distill, decoder):
    stage.curves = lambda *args, **kwargs: None

SMALL = "--pictures 64 --batch 8 --device cpu --lr 1e-2 --save-every 4 --resume --steps {steps} --accumulate {parts}".split()
DECODER = "--init assets/zoo/decoder --batch 8 --device cpu --gan-start 1 --save-every 4 --resume --steps {steps}".split()

def main():
    train_fm.main([*SMALL, "--init", "assets/zoo/fm", "--out", "{out}/fm"])
    distill.main([*SMALL, "--out", "{out}/distill"])
    step_distill.main([*SMALL, "--init", "assets/zoo/fm", "--watch", "0", "--out", "{out}/step_distill"])
    decoder.main([*DECODER, "--out", "{out}/decoder"])

parallel.launch(main)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_stages(home, out, steps, two):
    script = home / f"{out}.py"
    script.write_text(STAGES.format(root=str(ROOT), out=f"runs/{out}", steps=steps, parts=2 if two else 1))
    command = [*TORCHRUN, str(script)] if two else [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


def weights(home, out, stage):
    state = safetensors.torch.load_file(home / "runs" / out / stage / "train_state" / "state.safetensors")
    return {name: value.float() for name, value in state.items()}


def test_two_processes_take_the_steps_of_one(home):
    """All stages, four steps of one process; and of two, in two parts each where a stage has --accumulate."""
    run_stages(home, "one", 4, two=False)
    run_stages(home, "two", 4, two=True)
    for stage, init in (("fm", "fm"), ("distill", "fm"), ("step_distill", "fm"), ("decoder", "decoder")):
        one, two = weights(home, "one", stage), weights(home, "two", stage)
        start = safetensors.torch.load_file(ROOT / "assets" / "zoo" / init / "model.safetensors")
        assert one.keys() == two.keys()
        moved = torch.cat([(one[f"model.{name}"] - w.float()).flatten() for name, w in start.items()]).norm()
        apart = torch.cat([(one[f"model.{name}"] - two[f"model.{name}"]).flatten() for name in start]).norm()
        close = 0.002 if stage == "decoder" else 0.02
        assert moved > (0.01 if stage == "decoder" else 0.1) and apart < close * moved, f"{stage}: moved {moved}, apart {apart}"
        for name in one:  # AdamW's mean of the gradients
            if name.endswith("exp_avg") and one[name].norm() > 1e-6:
                limit = 0.01 if stage == "decoder" else max(0.05, 2 * close)
                assert (one[name] - two[name]).norm() < limit * one[name].norm(), f"{stage} {name}"
    log = (
        (home / "runs/two/fm/log.csv").read_text().splitlines(),
        (home / "runs/one/fm/log.csv").read_text().splitlines(),
    )
    losses = [float(rows[-1].split(",")[2]) for rows in log]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # the adaptive weight is a ratio of the whole batch's gradients: averaged over the ranks' own ratios it is 19 % off here
    logs = [csv.DictReader((home / f"runs/{out}/decoder/log.csv").read_text().splitlines()) for out in ("one", "two")]
    ours, theirs = (float(list(rows)[-1]["gan_weight"]) for rows in logs)
    assert ours > 0 and theirs == pytest.approx(ours, rel=1e-3)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process to kill in /proc")
def test_a_lost_process_ends_the_other_with_one_sentence(home):
    script = home / "long.py"
    script.write_text(STAGES.format(root=str(ROOT), out="runs/lost", steps=100_000, parts=1))
    log = open(home / "lost.log", "w+")
    process = subprocess.Popen([*TORCHRUN, str(script)], cwd=home, stdout=log, stderr=log,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        state, deadline = home / "runs/lost/fm/train_state/state.safetensors", time.time() + 180
        while not state.is_file() and process.poll() is None and time.time() < deadline:
            time.sleep(0.1)
        assert state.is_file()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                mine = f"PPid:\t{process.pid}\n" in (folder / "status").read_text()
                if mine and b"\0RANK=1\0" in b"\0" + (folder / "environ").read_bytes():
                    os.kill(int(folder.name), 9)
            except OSError:  # ended meanwhile
                continue
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    log.seek(0)
    assert "rank 0: another process of this run has ended" in log.read()
    safetensors.torch.load_file(state)  # whole


def test_ranks_that_see_different_folders_do_not_go_on(home):
    script = home / "apart.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common import parallel
parallel.launch(lambda: parallel.agree(parallel.rank()))
""")
    result = subprocess.run([*TORCHRUN, str(script)], cwd=home, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "one folder that all machines see" in result.stderr


def test_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    seen = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        seen += range(32)[parallel.rows(32)]
    assert seen == list(range(32))
    with pytest.raises(SystemExit, match="multiple of 4 processes times --accumulate 3"):
        parallel.rows(32, 3)


def test_too_little_memory_is_one_sentence():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit, match="lower --batch; or keep it, and give --accumulate 2"):
        parallel.launch(main)
