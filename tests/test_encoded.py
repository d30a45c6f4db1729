"""Large data sets: ImageNet and WebDataset through `data.py encode`, what its tables hold, and training that
reads them."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from transformers import T5Config, T5EncoderModel

import data
import distill
import sample
import step_distill
import train_fm
from common import latents, tables, training
from common.encoders import FrozenEncoders, pad_text
from common.latents import in_memory, open_latents
from common.pictures import open_picture, to_tensor
from common.shapes import ShapesWorld
from studies import speed
from studies.students import encode_prompts
from teacher import Teacher

pytestmark = pytest.mark.usefixtures("at_home")
ROOT = Path(__file__).parent.parent


def picture(i, size=(80, 70), kind="PNG"):
    file = io.BytesIO()
    ShapesWorld("train", 0, 1000)[i][0].resize(size).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ILSVRC's folders with two classes, and one file that is no picture."""
    folder = tmp_path_factory.mktemp("imagenet")
    for k, synset in enumerate(("n01440764", "n01443537")):
        train = folder / "ILSVRC" / "Data" / "CLS-LOC" / "train" / synset
        train.mkdir(parents=True)
        for i in range(12):
            size = (70, 30) if i == 3 else (300, 70) if i == 4 else (80, 70)  # too small; too wide
            (train / f"{synset}_{i}.JPEG").write_bytes(picture(12 * k + i, size, "JPEG"))
    (train / "n01443537_99.JPEG").write_bytes(b"no picture")
    (folder / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"
    )
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two WebDataset shards: jpg + txt, and png + json; one sample without a caption."""
    folder = tmp_path_factory.mktemp("tars")
    world = ShapesWorld("train", 0, 1000)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for i in range(12):
                text = "" if i == 5 else world.caption(100 + 12 * shard + i)
                pair = (("jpg", picture(100 + 12 * shard + i, kind="JPEG")), ("txt", text.encode()))
                if shard:
                    pair = (
                        ("png", picture(100 + 12 * shard + i)),
                        ("json", json.dumps({"caption": text, "id": i}).encode()),
                    )
                for ending, content in pair:
                    info = tarfile.TarInfo(f"{shard:03d}{i:05d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


ARGUMENTS = ["--resolution", "64", "--min-side", "40", "--device", "cpu", "--batch", "4"]


@pytest.fixture(scope="module")
def encoded(home, imagenet):
    """ImageNet's two classes, 64 pixels, in three parts."""
    before = os.getcwd()
    os.chdir(home)
    data.main(["encode", str(imagenet), "--out", "runs/imagenet", "--per-part", "9", *ARGUMENTS])
    os.chdir(before)
    return home / "runs" / "imagenet"


def test_imagenet(encoded, imagenet):
    index = json.loads((encoded / "index.json").read_text())
    assert index["left_out"] == {"too small": 2, "too long or wide": 2, "unreadable": 1}
    assert index["pictures"] == 20 and len(list(encoded.glob("pictures-*"))) == 3 and index["latent"] == [16, 8, 8]
    encoders = FrozenEncoders()
    training, validation = open_latents(encoded, encoders).split()
    assert len(training) == 19 and len(validation) == 1
    names = tables.open_folder(encoded, "pictures").with_format(None)["name"]
    captions = {"n01440764": "a photo of tench", "n01443537": "a photo of goldfish"}
    for i in (0, 7, 18):  # the picture's own latent and caption, from its file
        latent, ids = training.pictures(torch.tensor([i]))
        path = imagenet / "ILSVRC/Data/CLS-LOC/train" / names[training.numbers[i]]
        expected = encoders.encode_pictures(to_tensor([open_picture(path, 64)]))
        assert (latent - expected).abs().max() < 0.02  # half precision
        assert training.caption_of(i) == captions[path.parent.name] == training.captions_of(ids)[0]


def test_a_timed_step_reads_from_the_disk(encoded, capsys):
    flags = ["--size", "tiny", "--batch", "2", "--rounds", "1", "--device", "cpu", "--modes", "channels_last"]
    flags += ["--data", str(encoded)]
    speed.main([*flags, "--stages", "1", "2"])
    assert capsys.readouterr().out.count("pictures/s") == 2
    with pytest.raises(SystemExit, match="holds latents of 16x8x8, not of --latent 16"):
        speed.main([*flags, "--latent", "16"])


def test_the_disk_says_what_memory_says(home, tars):
    """The same pictures through a folder and through WebDataset: equal batches, text states and teacher's
    text."""
    encoders, world = FrozenEncoders(), ShapesWorld("train", 0, 1000)
    data.main(["encode", str(tars / "{000..001}.tar"), "--out", "runs/tars", *ARGUMENTS])
    index = json.loads(Path("runs/tars/index.json").read_text())
    assert index["left_out"] == {"without a caption": 2} and index["pictures"] == 22
    streamed, validation = open_latents("runs/tars", encoders).split()
    whole = [i for i in range(100, 124) if i not in (105, 117)]  # these two have no caption
    whole.pop(19)  # the validation set
    captions = ["", *dict.fromkeys(world.caption(i) for i in whole)]
    states, mask, pooled = encoders.encode_text(captions)
    ids = torch.tensor([captions.index(world.caption(i)) for i in whole])
    latents = torch.cat([streamed.pictures(torch.tensor([i]))[0] for i in range(len(streamed))]).half()
    memory = in_memory(latents, ids, captions, states, mask, pooled, first_clip=encoders.first_clip)
    assert len(memory) == len(streamed) == 21 and memory.shape == streamed.shape
    for step in range(3):
        (a, ids_a), (b, ids_b) = memory.batch(0, step, 8), streamed.batch(0, step, 8)
        assert torch.equal(a, b)
        assert [captions[i] for i in ids_a] == streamed.captions_of(ids_b)
        ids_a[2] = ids_b[2] = 0  # a dropped caption
        length = min(memory.index["longest"], streamed.index["longest"])
        for x, y in zip(memory.text(ids_a), streamed.text(ids_b), strict=True):
            assert torch.allclose(x[:, :length].float(), y[:, :length].float(), atol=2e-3)
        for x, y in zip(memory.clip(ids_a), streamed.clip(ids_b), strict=True):
            assert torch.allclose(x.float(), y.float(), atol=2e-3)
        rows = slice(2, 5)
        assert torch.equal(streamed.batch(0, step, 8, rows)[0], b[rows])


def test_encoding_goes_on_where_it_was_and_over_several_processes(home, encoded, imagenet):
    again = shutil.copytree(encoded, home / "runs" / "again")
    for name in ("index.json", "pictures-00001.arrow", "text-00000.arrow"):
        (again / name).unlink()
    kept = (again / "pictures-00000.arrow").stat().st_mtime_ns
    with pytest.raises(SystemExit, match=r"has no index.json: data.py encode has not finished"):
        open_latents("runs/again", FrozenEncoders())
    with pytest.raises(SystemExit, match="begun otherwise: how was center, is random"):
        data.main(["encode", str(imagenet), "--out", "runs/again", "--per-part", "9", "--crop", "random", *ARGUMENTS])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "data.py"),
               "encode", f"{imagenet}/", "--out", "runs/again", "--per-part", "9", *ARGUMENTS]  # fmt: skip
    result = subprocess.run(
        command, cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("20 pictures; left out: 2 too long or wide (such as n01440764/n01440764_4.JPEG)") == 1
    assert (again / "pictures-00000.arrow").stat().st_mtime_ns == kept
    first, second = (open_latents(folder, FrozenEncoders()) for folder in (encoded, again))
    everything = torch.arange(20)
    assert torch.allclose(first.pictures(everything)[0], second.pictures(everything)[0], atol=1e-2)
    assert first.captions == second.captions and torch.equal(first.pictures(everything)[1], second.pictures(everything)[1])
    for a, b in zip(first.clip(torch.arange(3)), second.clip(torch.arange(3)), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-2)


def test_a_run_reads_on_where_it_was_killed_and_on_two_ranks(home, encoded):
    """Weights of a run that is stopped and resumed are those of one that never stopped; two ranks see the
    same pictures."""
    common = ["--data", "runs/imagenet", "--batch", "4", "--save-every", "2", "--steps", "4", "--device", "cpu"]
    train_fm.main([*common, "--out", "runs/whole"])
    with pytest.MonkeyPatch.context() as patch:
        save_state = train_fm.save_state

        def save_and_die(*args, **kwargs):
            save_state(*args, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(train_fm, "save_state", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_fm.main([*common, "--out", "runs/stopped"])
    train_fm.main([*common, "--out", "runs/stopped", "--resume"])
    whole, stopped = (safetensors.torch.load_file(home / "runs" / name / "train_state/state.safetensors")
                      for name in ("whole", "stopped"))  # fmt: skip
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    training = open_latents(encoded).split()[0]
    x, ids = training.batch(0, 3, 8)
    for rows in (slice(0, 4), slice(4, 8)):
        mine = training.batch(0, 3, 8, rows)
        assert torch.equal(mine[0], x[rows]) and torch.equal(mine[1], ids[rows])


def test_many_rows_open_at_once_and_take_no_memory(tmp_path):
    """20,000 latents of 8 kB: what is read of 160 MB are the rows that are asked for. docs/real_sizes.md has
    a million."""
    features = Features({"latent": Value("large_binary"), "reason": Value("string")})
    rows, blob = Dataset.from_dict({"i": range(20_000)}), os.urandom(1 << 20)

    def make(columns, numbers):
        return {"latent": [blob[i : i + 8192] for i in columns["i"]], "reason": [None] * len(numbers)}

    tables.map_in_parts(rows, make, features, tmp_path, "pictures", batch=500, row_bytes=8192)

    def resident():
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    before, start = resident(), time.process_time()
    opened = tables.open_folder(tmp_path, "pictures")
    assert time.process_time() - start < 1 and len(opened) == 20_000
    numbers = torch.randint(20_000, (50, 64), generator=torch.Generator().manual_seed(0)).tolist()
    for some in numbers:
        assert latents.take(opened, some)["latent"] == [blob[i : i + 8192] for i in some]
    assert resident() - before < 30e6


def test_gemma_is_a_third_encoder_behind_the_clips(gemma):
    """Order, widths and masks of the tokens, and each encoder dropped by itself."""
    encoders, captions = FrozenEncoders(gemma=gemma), ["", "a photo of a red circle", "a photo"]
    states, mask = encoders.student_text(captions, 256)
    assert states.shape == (3, 24 + 128, 256) and mask.shape == (3, 24 + 128)
    clip, clip_mask, pooled = encoders.encode_text(captions)
    assert torch.equal(states[:, :24, :160], clip) and not states[:, :24, 160:].any()
    assert torch.equal(mask[:, :24], clip_mask)
    assert mask[:, 24:].sum(1).tolist() == [1, 7, 3] and not states[:, 24:, 144:].any()  # <bos> and the words
    own = encoders.gemma.net(input_ids=torch.tensor([[1, 4, 5, 6, 4, 7, 8]])).last_hidden_state
    assert torch.allclose(states[1, 24:31, :144], own[0], rtol=2e-3, atol=2e-3)  # padding behind changes nothing

    gemma_states, gemma_mask = encoders.gemma.encode(captions)
    memory = in_memory(torch.zeros(3, 16, 8, 8), torch.arange(3), captions, clip, clip_mask, pooled,
                       gemma_states, gemma_mask, encoders.first_clip)  # fmt: skip
    full, none = memory.text(torch.tensor([1]))[0], memory.text(torch.tensor([0]))[0]
    longest, first = memory.index["longest"], encoders.first_clip
    for dropped, part in ((0, (slice(None, longest), slice(None, first))), (1, (slice(None, longest), slice(first, 160))),
                          (2, (slice(longest, None), slice(None)))):  # fmt: skip
        ids = torch.ones(1, 3, dtype=torch.long)
        ids[0, dropped] = 0
        expected = full.clone()
        expected[0][part] = none[0][part]
        assert torch.equal(memory.text(ids)[0], expected) and not torch.equal(expected, full)
        assert torch.equal(
            memory.clip(ids)[0], memory.clip(torch.tensor([1]))[0]
        )  # the teacher still reads the caption
    ids = training.noisy_batch(memory, 0, 3, 6000, 1.0, 0.1).ids.view(-1, 3)
    kept = ids[memory.batch(0, 3, 6000)[1] > 0] > 0
    assert (~kept).float().mean(0).tolist() == pytest.approx([0.19] * 3, abs=0.03)  # 0.1 all of them, then 0.1 each
    assert (~kept).all(1).float().mean().item() == pytest.approx(0.1, abs=0.02)


@pytest.fixture(scope="module")
def twice(home, gemma, tmp_path_factory):
    """A folder of six pictures, two of them small, as latents of 64 and of 96 pixels that share their text:
    (source, 64, 96)."""
    source, world = tmp_path_factory.mktemp("six"), ShapesWorld("train", 0, 1000)
    for i in range(6):
        (source / f"{i}.png").write_bytes(picture(i, (50, 50) if i < 2 else (100, 120)))
        (source / f"{i}.txt").write_text(world.caption(i))
    before, folders = os.getcwd(), (home / "runs/six-64", home / "runs/six-96")
    os.chdir(home)
    common = [str(source), "--per-part", "3", "--gemma", str(gemma), "--device", "cpu", "--batch", "2"]
    data.main(["encode", *common, "--resolution", "64", "--out", str(folders[0])])
    with pytest.MonkeyPatch.context() as patch:  # the second time nobody asks a text encoder
        patch.setattr(FrozenEncoders, "encode_captions", None)
        flags = ["--resolution", "96", "--min-side", "10", "--out", str(folders[1]), "--text", str(folders[0])]
        data.main(["encode", *common, *flags])
    os.chdir(before)
    return source, *folders


def text_in_memory(captions, encoders):
    """The same text, for captions whose pictures nobody asks for."""
    return in_memory(torch.zeros(0, 16, 8, 8), torch.zeros(0), captions, *encoders.encode_captions(captions),
                     *encoders.gemma.encode(captions), encoders.first_clip)  # fmt: skip


def assert_same_text(streamed, captions, encoders):
    """Of these captions, with each encoder dropped for one of them: tokens, masks, the teacher's text."""
    numbers = {caption: n for n, caption in enumerate(streamed.captions)}
    memory = text_in_memory(["", *captions], encoders)
    a = torch.arange(1, len(captions) + 1)[:, None].expand(-1, 3).clone()
    b = torch.tensor([numbers[caption] for caption in captions])[:, None].expand(-1, 3).clone()
    for i in range(3):
        a[i, i] = b[i, i] = 0
    for x, y in zip(memory.clip(a), streamed.clip(b), strict=True):
        assert torch.allclose(x.float(), y.float(), atol=2e-3)
    (x, mask_x), (y, mask_y) = memory.text(a), streamed.text(b)
    for i in range(len(captions)):  # what is padded may be another length; what is read is the same
        assert torch.allclose(x[i][mask_x[i]].float(), y[i][mask_y[i]].float(), atol=2e-3)
        assert mask_x[i].sum() == mask_y[i].sum()


def test_text_is_encoded_and_stored_once_for_all_resolutions(twice, gemma, home):
    source, small, large = twice
    encoders, captions = FrozenEncoders(gemma=gemma), [(source / f"{i}.txt").read_text() for i in range(6)]
    assert len(list(small.glob("text-0*"))) == 3 and not list(large.glob("text-*"))
    indexes = [json.loads((folder / "index.json").read_text()) for folder in (small, large)]
    assert [index["pictures"] for index in indexes] == [4, 6] and indexes[1]["text"] == "../six-64"
    for folder, side in ((small, 8), (large, 12)):
        streamed = open_latents(folder, encoders)
        assert streamed.shape == (16, side, side)
        assert_same_text(streamed, captions, encoders)
    latents, ids = streamed.pictures(torch.arange(6))  # of the small pictures, too, which the first folder left out
    for latent, caption in zip(latents, streamed.captions_of(ids), strict=True):
        expected = encoders.encode_pictures(to_tensor([open_picture(source / f"{captions.index(caption)}.png", 96)]))[0]
        assert (latent - expected).abs().max() < 0.02
    text = tables.open_folder(small, "text").with_format(None)
    _, real = encoders.gemma.encode(streamed.captions)
    assert sum(len(x) for x in text["gemma"]) == int(real.sum()) * 144 * 2  # no padding of Gemma's is stored
    # text of another source, or text that is gone, is no text
    common = ["encode", str(source), "--per-part", "3", "--gemma", str(gemma), "--device", "cpu", "--resolution", "64"]
    (source / "3.txt").write_text("another caption")
    with pytest.raises(SystemExit, match="captions.arrow has other captions than the source has now, such as 'another caption'"):
        data.main([*common, "--out", "runs/other", "--text", str(small)])
    shutil.copytree(small, home / "runs" / "textless")
    (home / "runs" / "textless" / "text-00001.arrow").unlink()
    with pytest.raises(SystemExit, match="text-00001.arrow is damaged .it is missing"):
        open_latents("runs/textless", encoders)


def test_all_stages_train_on_the_disk_with_gemma(home, tars, gemma, monkeypatch):
    """Encoded, trained, distilled, step-distilled and drawn with all three encoders; a T5 that speaks is
    asked as it goes."""
    folder = home / "sd35"
    folder.mkdir()
    for part in (ROOT / "assets" / "toy-sd3").iterdir():
        if part.name != "text_encoder_3":
            (folder / part.name).symlink_to(part)
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=98, d_model=192, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_3")
    data.main(["encode", str(tars), "--out", "runs/all", "--teacher", str(folder), "--gemma", str(gemma), *ARGUMENTS])
    common = ["--data", "runs/all", "--teacher", str(folder), "--batch", "4", "--steps", "2", "--device", "cpu"]
    train_fm.main([*common, "--gemma", str(gemma), "--out", "runs/g1", "--checkpointing", "--accumulate", "2"])
    distill.main([*common, "--init", "runs/g1", "--out", "runs/g2", "--checkpointing", "--accumulate", "2"])
    step_distill.main([*common, "--init", "runs/g2", "--out", "runs/g3", "--checkpointing", "--accumulate", "2"])
    sample.main(["a photo of a red circle", "--model", "runs/g3", "--true-size", "--out", "runs/g3.png", "--device", "cpu"])
    assert Image.open("runs/g3.png").size == (64, 64)
    # T5's states for a batch are those that Teacher computes once and for all when the captions fit in memory
    encoders = FrozenEncoders(folder, gemma=gemma)
    streamed = open_latents("runs/all", encoders)
    x_t, t, _, ids, *_ = training.noisy_batch(streamed, 0, 0, 4, 1.0, 0.1)
    captions = streamed.captions_of(ids.amax(1))
    text = encode_prompts(captions, encoders)
    known = torch.tensor([text.captions.index(caption) for caption in captions])
    with torch.no_grad():
        a = Teacher(folder, streamed)(x_t, t, ids)[0]
        b = Teacher(folder, text)(x_t, t, known)[0]
    assert torch.allclose(a, b, atol=1e-2) and not torch.allclose(a[:1], a[1:2], atol=0.1)


def test_accumulation_and_checkpointing_change_nothing(home, monkeypatch):
    """Four parts with recomputed activations give the weights of one part."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # products in float32: bfloat16 rounds by batch size
    common = ["--pictures", "64", "--batch", "8", "--steps", "2", "--device", "cpu", "--lr", "1e-2"]
    for stage in (train_fm, distill):
        stage.main([*common, "--init", "assets/zoo/fm", "--out", "runs/plain"])
        stage.main([*common, "--init", "assets/zoo/fm", "--out", "runs/parts", "--accumulate", "4", "--checkpointing"])
        plain, parts = (
            safetensors.torch.load_file(home / "runs" / n / "train_state/state.safetensors") for n in ("plain", "parts")
        )
        means = [name for name in plain if name.endswith("exp_avg") and plain[name].norm() > 1e-6]
        assert len(means) > 100
        assert all((plain[n] - parts[n]).norm() < 0.01 * plain[n].norm() for n in means)
        shutil.rmtree(home / "runs/plain"), shutil.rmtree(home / "runs/parts")


def test_bad_input_ends_in_one_sentence(home, encoded, imagenet, tars, tmp_path, gemma):
    encoders = FrozenEncoders()
    nameless = shutil.copytree(imagenet, tmp_path / "nameless")
    (nameless / "LOC_synset_mapping.txt").unlink()
    shutil.copytree(imagenet, tmp_path / "unknown")
    (tmp_path / "unknown" / "LOC_synset_mapping.txt").write_text("n01440764 tench\n")
    for source, words in (
        ("nowhere", "no such folder"),
        ("nowhere/{00..03}.tar", "4 of 4 .tar files are not there"),
        (str(nameless), "not their names: put LOC_synset_mapping.txt"),
        (str(tmp_path / "unknown"), "no name for 1 classes, such as n01443537"),
        (str(imagenet), "no picture of .* is left: look at --min-side and --max-aspect. Left out: 24 too small"),
    ):
        with pytest.raises(SystemExit, match=words):
            data.main(
                [
                    "encode",
                    source,
                    "--out",
                    str(tmp_path / "out"),
                    *ARGUMENTS,
                    *(["--min-side", "500"] if "small" in words else []),
                ]
            )
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    common = ["--batch", "4", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    short, lost = (shutil.copytree(encoded, tmp_path / name) for name in ("short", "lost"))
    (short / "pictures-00002.arrow").write_bytes((short / "pictures-00002.arrow").read_bytes()[:-9])
    (lost / "pictures-00002.arrow").unlink()
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "00000.safetensors").write_bytes(b"")
    for arguments, words in (
        (["--data", str(short)], "pictures-00002.arrow is damaged"),
        (["--data", str(lost)], "a file of .* is missing: run data.py encode again"),
        (["--data", str(earlier)], "was encoded by an earlier version: encode it again"),
        (["--data", str(encoded), "--resolution", "128"], "are of 64 pixels: give --resolution 64"),
        (["--data", str(encoded), "--gemma", str(gemma)], "was encoded without Gemma"),
        (["--data", str(encoded), "--gemma", "nowhere"], "is no Gemma folder"),
        (["--data", str(imagenet)], "data.py encode"),
        (["--data", str(tars)], "data.py encode"),
    ):
        with pytest.raises(SystemExit, match=words):
            train_fm.main([*common, *arguments])
    other = shutil.copytree(ROOT / "assets/toy-sd3", tmp_path / "toy-sd3")
    (other / "text_encoder" / "config.json").write_text((other / "text_encoder" / "config.json").read_text() + " ")
    with pytest.raises(SystemExit, match="encoded by other encoders"):
        train_fm.main([*common, "--data", str(encoded), "--teacher", str(other)])
    assert encoders.gemma is None


def test_a_narrow_unet_reads_the_first_clip_alone():
    """--size imagenet takes 768 channels: of SD3.5's 2048 those of CLIP-L (Sec. 4); the wide preset takes
    both and zeros."""
    states = torch.randn(2, 77, 2048)
    assert torch.equal(pad_text(states, 768, 768), states[..., :768])
    wide = pad_text(states, 2304, 768)
    assert torch.equal(wide[..., :2048], states) and not wide[..., 2048:].any()
    with pytest.raises(SystemExit, match="768 wide, this UNet takes 160|2048 wide, this UNet takes 160"):
        pad_text(states, 160, 768)
    encoders = FrozenEncoders()
    both, _ = encoders.student_text(["a photo of a star"], 160)
    alone, _ = encoders.student_text(["a photo of a star"], encoders.first_clip)
    assert torch.equal(alone, both[..., : encoders.first_clip])
