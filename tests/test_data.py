"""The shapes world, folders of pictures, and the cache of latents."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import latents, shapes, sources, tables
from common.encoders import hash_file, hash_folders
from common.latents import CAPTIONS
from common.pictures import to_pictures, to_tensor
from common.seeds import batch_indices
from common.shapes import FAMILIES, NOVEL_PAIRS, ShapesWorld, draw, family_of, make_scene, parse_caption
from common.sources import CaptionedFolder
from data import encode_dataset, encode_folder


def test_an_item_is_always_the_same_picture():
    here = [np.asarray(ShapesWorld("train", 3)[i][0]).sum() for i in (5, 0, 7)]
    code = "import numpy as np; from common import shapes; world = shapes.ShapesWorld('train', 3); "
    code += "print([int(np.asarray(world[i][0]).sum()) for i in (7, 5, 0)])"
    there = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert [here[2], here[0], here[1]] == there
    assert ShapesWorld("train", 3).caption(5) == ShapesWorld("train", 3)[5][1]
    different = {ShapesWorld(split, seed)[0][0].tobytes() for split in shapes.SPLITS for seed in (0, 1)}
    assert len(different) == 6


def test_novel_pairs_never_occur_in_training():
    for split in ("train", "val"):
        pairs = {(t.color, t.shape) for i in range(1500) for t in make_scene(split, 0, i).things}
        assert not pairs & NOVEL_PAIRS and len(pairs) == 24 - len(NOVEL_PAIRS)
    for i in range(200):
        scene = make_scene("novel", 0, i)
        assert any((p.color, p.shape) in NOVEL_PAIRS for p in parse_caption(scene.caption)[0])


def test_captions_read_back_and_pictures_agree_with_them():
    for family in FAMILIES:
        for i in range(150):
            scene = make_scene("val", 1, i, family)
            phrases, relation = parse_caption(scene.caption)
            assert family_of(scene.caption) == family == scene.family
            assert sum(p.count for p in phrases) == len(scene.things)
            for p in phrases:
                same = [t for t in scene.things if t.shape == p.shape and p.color in (None, t.color)]
                assert len(same) >= p.count
            if relation:
                a, b = scene.things
                assert {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[relation]
    for text in ("a cat", "", "a photo of", "a photo of a pink circle", "a photo of five stars"):
        with pytest.raises(ValueError, match="shapes world"):
            parse_caption(text)


def test_nothing_touches_and_nothing_is_cut_off():
    for i in range(400):
        things = make_scene("train", 2, i).things
        for a in things:
            assert min(a.x, a.y) - a.radius >= 1.9 and max(a.x, a.y) + a.radius <= 62.1
            for b in things:
                if a is not b:
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + shapes.GAP - 1e-9


def test_every_epoch_shows_every_picture_once():
    seen = torch.cat([batch_indices(0, step, 4, 10) for step in range(5)])  # two epochs in five batches of four
    assert sorted(seen[:10].tolist()) == list(range(10)) == sorted(seen[10:].tolist())
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(batch_indices(0, 3, 4, 10), seen[12:16])  # any step by itself
    assert len(batch_indices(0, 0, 25, 10)) == 25  # a batch larger than the data


@pytest.fixture
def folder(tmp_path):
    """Pictures of every kind that people have lying about, and two broken ones."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (50, 80, 3), dtype=np.uint8))
    alpha = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    frames = [Image.new("RGB", (70, 70), color) for color in ("red", "blue")]
    wide = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    kinds = {
        "rgb.png": rgb, "grey.png": rgb.convert("L"), "cmyk.jpg": rgb.convert("CMYK"), "palette.png": rgb.convert("P"),
        "alpha.png": alpha, "wide.png": wide, "one.bmp": rgb.convert("1"), "small.webp": rgb.resize((9, 9)),
    }  # fmt: skip
    for name, picture in kinds.items():
        picture.save(tmp_path / name)
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "noise.png").write_bytes(b"this is not a picture")
    (tmp_path / "half.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:400])
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text(f"the caption of {path.name}")
    Image.new("RGB", (9, 9)).save(tmp_path / "without_caption.png")
    return tmp_path


def test_folder_reads_every_kind_of_picture(folder):
    with pytest.warns(UserWarning, match="9 pictures; left out: 2 unreadable .*, 1 without a caption"):
        pictures = CaptionedFolder(folder, 64)
    items = {caption.split()[-1]: picture for picture, caption in (pictures[i] for i in range(len(pictures)))}
    assert len(items) == 9 and all(p.size == (64, 64) and p.mode == "RGB" for p in items.values())
    assert items["alpha.png"].getpixel((5, 5)) == (255, 255, 255)  # transparent, laid on white
    assert items["film.gif"].getpixel((5, 5))[0] > 200  # the first frame
    wide = np.asarray(items["wide.png"]).astype(int)
    assert (
        wide[0, 0, 0] < 5 and wide[-1, -1, 0] > 250 and abs(wide[32].mean() - 129) < 5
    )  # 16 bits, scaled, not clipped


def test_a_picture_is_checked_once(folder, tmp_path_factory, monkeypatch):
    """And again when one of the folder has changed."""
    cache, opened, open_picture = tmp_path_factory.mktemp("cache"), [], sources.open_picture
    monkeypatch.setattr(sources, "open_picture", lambda path, size=None: opened.append(path) or open_picture(path, size))
    for expected in (11, 0):
        opened.clear()
        with pytest.warns(UserWarning, match="9 pictures; left out: 2 unreadable"):
            found = CaptionedFolder(folder, 64, cache=cache)
        assert len(opened) == expected and len(found) == 9
    (folder / "noise.png").write_bytes((folder / "rgb.png").read_bytes())  # mended
    content = (folder / "alpha.png").read_bytes()
    (folder / "alpha.png").write_bytes(b"?" + content[1:])  # as many bytes as before
    os.utime(folder / "alpha.png", (0, 0))
    with pytest.warns(UserWarning, match="9 pictures; left out: 2 unreadable"):
        found = CaptionedFolder(folder, 64, cache=cache)
    assert {os.path.basename(path) for path, _ in found.items} >= {"noise.png"} and len(opened) == 11
    with pytest.warns(UserWarning, match="left out"):
        CaptionedFolder(folder, 64)  # without a cache nothing is remembered, and nothing is left behind
    assert len(opened) == 22 and len(list(cache.iterdir())) == 2


def test_folder_with_metadata(folder):
    rows = [{"file_name": "rgb.png", "text": "one"}, {"file_name": "grey.png", "text": "two"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    with pytest.warns(UserWarning, match="10 not named in the metadata"):
        pictures = CaptionedFolder(folder, 32)
    assert sorted(pictures.caption(i) for i in range(len(pictures))) == ["one", "two"]


def test_bad_folders_end_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no such folder"):
        CaptionedFolder(tmp_path / "nowhere")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="no captioned pictures"):
        CaptionedFolder(tmp_path)
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "a.png").write_bytes(b"nonsense")
    with pytest.raises(SystemExit, match="Left out: 1 unreadable"):
        CaptionedFolder(tmp_path)
    (tmp_path / "a.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(SystemExit, match="Left out: 1 with a caption that is no UTF-8"):
        CaptionedFolder(tmp_path)


def test_every_20th_picture_is_held_out(tmp_path):
    for i in range(45):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    whole = CaptionedFolder(tmp_path, 32)
    train, val = whole.split()
    assert [val.caption(i) for i in range(len(val))] == ["19", "39"] and len(train) == 43


class CountingEncoders:
    """Stands in for FrozenEncoders: counts how often it is asked."""

    asked = 0
    gemma, first_clip, parts, factor, latent_channels, max_tokens, text_dim = None, 2, ("vae", "text"), 8, 16, 3, 4

    def fingerprint(self, *parts):
        return " ".join(parts)

    def encode_pictures(self, pictures):
        self.asked += 1
        return torch.nn.functional.avg_pool2d(pictures, 8).repeat(1, 6, 1, 1)[:, :16]

    def encode_captions(self, captions, batch):
        lengths = torch.tensor([len(c) for c in captions]).half()
        states = lengths.view(-1, 1, 1).repeat(1, 3, 4)
        return states, torch.ones(len(captions), 3).bool(), torch.zeros(len(captions), 2).half()


def test_a_world_is_encoded_once_and_damage_is_noticed(tmp_path):
    encoders, world = CountingEncoders(), ShapesWorld("train", 0, 10)
    first = encode_dataset(world, encoders, tmp_path, batch=4)
    assert encoders.asked == 3 and len(first) == 10 and first.captions[0] == ""
    latents, ids = first.pictures(torch.arange(10))
    expected = encoders.encode_pictures(to_tensor([world[i][0] for i in range(10)])).half().float()
    assert torch.equal(latents, expected) and first.captions_of(ids) == [world.caption(i) for i in range(10)]
    assert first.rows(ids)["states"][:, 0, 0].tolist() == [len(world.caption(i)) for i in range(10)]
    encoders.asked = 0
    again = encode_dataset(world, encoders, tmp_path, batch=4)
    assert encoders.asked == 0 and torch.equal(again.pictures(torch.arange(10))[0], latents) and again.captions == first.captions
    encode_dataset(ShapesWorld("train", 1, 10), encoders, tmp_path, batch=4)
    assert encoders.asked == 3  # another seed is another data set
    for path in tmp_path.rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged; making it again"):
        repaired = encode_dataset(world, encoders, tmp_path, batch=4)
    assert torch.equal(repaired.pictures(torch.arange(10))[0], latents)


def test_more_captions_than_a_header_holds(tmp_path):
    """A safetensors header of over 100 MB cannot be read again: 100,000 captions of 150 Chinese
    characters."""
    captions = [f"{i:06d}" + "\u4e2d" * 150 for i in range(100_000)]
    tables.save_table({"caption": captions}, CAPTIONS, tmp_path / "captions.arrow")
    assert latents.take(tables.open_tables([tmp_path / "captions.arrow"]), [99_999])["caption"] == captions[-1:]


def test_of_several_captions_training_takes_one_by_chance(tmp_path):
    """By seed and step: the same on a resume, and on any number of ranks."""
    for i in range(10):
        Image.new("RGB", (64, 64), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": [f"{i}", f"another one of {i}"] if i % 2 else f"{i}"} for i in range(10)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    latents = encode_folder(tmp_path, 64, CountingEncoders(), tmp_path / "cache")
    seen = set()
    for step in range(40):
        x, ids = latents.batch(0, step, 10)
        again = latents.batch(0, step, 10, slice(3, 7))
        assert torch.equal(ids[3:7], again[1]) and torch.equal(x[3:7], again[0]) and len(ids) == 10
        seen |= set(latents.captions_of(ids))
    assert seen == set(latents.captions) - {""} and len(seen) == 15
    assert latents.caption_of(1) == "1"


def test_a_folder_is_the_same_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "mine" / "a.png")
    (tmp_path / "mine" / "a.txt").write_text("a caption")
    monkeypatch.chdir(tmp_path)
    encoders = CountingEncoders()
    names = {encode_folder(way, 64, encoders).name for way in ("mine", "mine/", "./mine", str(tmp_path / "mine"))}
    assert len(names) == 1 and encoders.asked == 1


def test_encoding_that_was_killed_goes_on(tmp_path, monkeypatch):
    """A process is killed after some parts; the same call makes the rest alone, and all ends as without a
    kill."""
    code = (
        "import os; from tests.test_data import CountingEncoders, ShapesWorld; import data\n"
        "class Slow(CountingEncoders):\n"
        "    def encode_pictures(self, x):\n"
        "        self.asked += 1\n"
        "        if self.asked == 13: os.kill(os.getpid(), 9)\n"
        "        return super().encode_pictures(x)\n"
        f"data.PER_PART = 8; data.encode_dataset(ShapesWorld('train', 0, 40), Slow(), {str(tmp_path)!r}, batch=4)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == -9
    made = {path.name for path in tmp_path.rglob("pictures-*")}
    assert made == {"pictures-00000.arrow", "pictures-00001.arrow", "pictures-00002.arrow"}
    encoders, world = CountingEncoders(), ShapesWorld("train", 0, 40)
    monkeypatch.setattr(data, "PER_PART", 8)
    latents = encode_dataset(world, encoders, tmp_path, batch=4)
    assert encoders.asked == 4
    whole = encode_dataset(world, encoders, tmp_path / "whole", batch=4)
    assert all(torch.equal(a, b) for a, b in zip(latents.batch(0, 1, 40), whole.batch(0, 1, 40), strict=True))
def test_every_byte_of_an_encoder_counts(tmp_path, monkeypatch):
    """Two teachers that differ behind the first megabyte are two; what was hashed once is remembered until it
    changes."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "vae" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(3_000_000))
    first = hash_folders([path.parent])
    path.write_bytes(bytes(2_999_999) + b"1")
    assert hash_folders([path.parent]) != first
    digest = hash_file(path, large=1000)
    (note,) = (tmp_path / "runs/cache/hashes").iterdir()
    note.write_text(64 * "0")
    assert hash_file(path, large=1000) == 64 * "0" != digest  # remembered
    os.utime(path, (0, 0))
    assert hash_file(path, large=1000) == digest  # touched: read again


def test_pictures_survive_the_way_to_tensors_and_back():
    picture = draw(make_scene("val", 0, 0))
    tensor = to_tensor([picture])
    assert tensor.shape == (1, 3, 64, 64) and tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(np.asarray(to_pictures(tensor)[0]), np.asarray(picture))
