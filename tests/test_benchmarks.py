"""Many pictures in the layouts of GenEval, DPG-Bench and ADM: resumable, over several processes, and read back."""

import builtins
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
from common import benchmarks
from common.shapes import ShapesWorld
from common.texts import class_names

pytestmark = pytest.mark.usefixtures("at_home")
ROOT = Path(__file__).parent.parent
FEW = ["--model", "assets/zoo/fm", "--steps", "1", "--guidance", "1", "--device", "cpu"]
CAPTIONS = [ShapesWorld("val", 0, 3).caption(i) for i in range(3)]


def pixels(path):
    return np.asarray(Image.open(path))


def test_geneval(tmp_path):
    """The folders that its evaluate_images.py walks through: a number, metadata.jsonl as it came, samples/."""
    lines = [
        json.dumps({"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": c})
        for c in CAPTIONS
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    sample.main(["--prompts", str(tmp_path / "evaluation_metadata.jsonl"), "--n", "4", "--out", str(out), *FEW])
    for i, line in enumerate(lines):
        assert (out / f"{i:05d}" / "metadata.jsonl").read_text() == line + "\n"
        files = sorted(p.name for p in (out / f"{i:05d}" / "samples").iterdir())
        assert files == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert not np.array_equal(pixels(out / "00001/samples/0000.png"), pixels(out / "00001/samples/0001.png"))


def test_dpg_bench(tmp_path):
    """One grid of four pictures a prompt, named as its text file."""
    (tmp_path / "prompts").mkdir()
    for name, caption in zip("abc", CAPTIONS, strict=True):
        (tmp_path / "prompts" / f"{name}.txt").write_text(caption + "\n")
    sample.main(["--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "out"), *FEW])
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["a.png", "b.png", "c.png"]
    grid = pixels(tmp_path / "out" / "b.png")
    assert grid.shape == (128, 128, 3)
    for k, corner in enumerate((grid[:64, :64], grid[:64, 64:], grid[64:, :64], grid[64:, 64:])):
        assert np.array_equal(corner, pixels(tmp_path / "out" / "single" / f"b_{k}.png"))


def test_adm_and_two_processes_and_resume(home, tmp_path):
    """ImageNet's class names, drawn by two processes, packed as arr_0; what was there stays; other settings are refused."""
    (tmp_path / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn01484850 shark\n"
    )
    out, arguments = tmp_path / "out", ["--prompts", str(tmp_path / "LOC_synset_mapping.txt"), "--n", "2", *FEW]
    out.mkdir()
    Image.new("RGB", (64, 64), "red").save(out / "00003.png")
    torchrun = [sys.executable, *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]]  # fmt: skip
    command = [*torchrun, str(ROOT / "sample.py")]
    result = subprocess.run([*command, *arguments, "--out", str(out), "--npz", str(tmp_path / "s.npz")], cwd=home, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [
        f"a photo of {c}" for c in ("tench", "goldfish", "shark") for _ in range(2)
    ]
    arr = np.load(tmp_path / "s.npz")["arr_0"]
    assert arr.shape == (6, 64, 64, 3) and arr.dtype == np.uint8
    drawn = np.stack([pixels(out / f"{i:05d}.png") for i in range(6)])
    assert sorted(picture.tobytes() for picture in arr) == sorted(picture.tobytes() for picture in drawn)
    assert (drawn[3] == (255, 0, 0)).all()  # it was there
    sample.main([*arguments, "--out", str(tmp_path / "alone")])  # one process draws the same pictures
    for i in (0, 1, 2, 4, 5):
        difference = np.abs(pixels(tmp_path / "alone" / f"{i:05d}.png").astype(int) - drawn[i])
        assert difference.max() <= 2
    with pytest.raises(SystemExit, match="holds other pictures: seed was 0, is 1"):
        sample.main([*arguments, "--out", str(out), "--seed", "1"])
    with open(tmp_path / "LOC_synset_mapping.txt", "a") as file:  # numbers would stand beside other captions
        file.write("n01491361 tiger shark\n")
    with pytest.raises(SystemExit, match="holds other pictures: captions was"):
        sample.main([*arguments, "--out", str(out)])


def test_the_pictures_for_adm_are_in_a_random_order_and_always_in_the_same(tmp_path):
    """Its Inception Score is a mean over blocks, of 5,000 pictures, in each of which all classes should occur."""
    pictures = [(f"{i}.png", "", i) for i in range(400)]  # 20 of each of 20 classes, one class after the other
    for i, (name, _, _) in enumerate(pictures):
        Image.new("RGB", (2, 2), (i // 20, i % 20, 0)).save(tmp_path / name)
    for name in ("a.npz", "b.npz"):
        benchmarks.write_npz(tmp_path, pictures, tmp_path / name)
    a, b = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert np.array_equal(a, b) and len({tuple(picture[0, 0]) for picture in a}) == 400
    for block in a.reshape(4, 100, 2, 2, 3):
        assert len({picture[0, 0, 0] for picture in block}) >= 18  # of 20; in their own order 5


def test_lines_of_a_prompt_file(tmp_path):
    """A byte order mark is no letter, and only "\\n" and "\\r\\n" end a line."""
    path, prompts = tmp_path / "prompts.txt", ["a photo of a star", "a\u2028photo\x85of\x0ca\x1dcircle", "Äpfel"]
    path.write_bytes("\r\n".join(["\ufeff" + prompts[0], "", *prompts[1:]]).encode())
    assert benchmarks.read_what(path) == ("folder", prompts, None)
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert benchmarks.read_what(tmp_path / "evaluation_metadata.jsonl") == ("geneval", prompts, lines)
    classes = "\ufeffn01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(classes, encoding="utf-8")
    names = [text.removeprefix("a photo of ") for text in benchmarks.read_what(tmp_path / "LOC_synset_mapping.txt")[1]]
    assert names == [*class_names(classes.removeprefix("\ufeff").splitlines()).values()]  # as training has them
    assert names[0] == "tench" and "crane" in names[1] and names[1] != names[2]


def test_bad_prompts_end_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "no prompt"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "nice \\ud83d"}\n')  # half of an emoji
    (tmp_path / "list.jsonl").write_text('{"prompt": ["a star"]}\n')
    for what, words in (
        ("empty", "holds no .txt files"),
        *((f"{name}.jsonl", "each line needs a prompt") for name in ("bad", "half", "list")),
        ("none", "cannot read prompts"),
    ):
        with pytest.raises(SystemExit, match=words):
            sample.main(["--prompts", str(tmp_path / what), "--out", str(tmp_path / "out"), *FEW])


def test_fid_goes_through_torch_fidelity(tmp_path, monkeypatch, capsys):
    """With the library's own signature; without it, or without its weights, one sentence that says how to get them."""
    for name in ("drawn", "real"):
        (tmp_path / name).mkdir()
        for i in range(3):
            ShapesWorld("val", 0, 9)[i][0].save(tmp_path / name / f"{i}.png")
    folders = [str(tmp_path / "drawn"), "--fid", str(tmp_path / "real")]
    importing = builtins.__import__
    with monkeypatch.context() as patch:
        patch.setattr(
            builtins,
            "__import__",
            lambda name, *rest: importing(name if name != "torch_fidelity" else "no_such", *rest),
        )
        with pytest.raises(SystemExit, match="pip install torch-fidelity"):
            evaluate.main(folders)

    def calculate_metrics(
        input1, input2, fid, kid, kid_subset_size, cuda, samples_find_deep, feature_extractor_weights_path, verbose
    ):
        if feature_extractor_weights_path is None:
            raise OSError("no network")
        assert (input1, input2, fid, kid, kid_subset_size) == (
            str(tmp_path / "drawn"),
            str(tmp_path / "real"),
            True,
            True,
            3,
        )
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        return {"frechet_inception_distance": 2.06, "kernel_inception_distance_mean": 0.01}

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    with pytest.raises(SystemExit, match="no network.*--inception FILE"):
        evaluate.main(folders)
    evaluate.main([*folders, "--inception", "weights.pth"])
    assert "FID 2.060, KID 0.01000" in capsys.readouterr().out
