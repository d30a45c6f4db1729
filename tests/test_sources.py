"""Other people's files: folders, .tar shards, ImageNet's names, captions of every sort. What is left out is counted and named."""

import io
import json
import os
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from common import sources
from common.pictures import open_picture
from common.seeds import choose_one, pad_choices
from common.sources import CaptionedFolder, as_captions, class_names, lines_of, list_captions, read_tar


def png(color="red", kind="PNG", size=(40, 30), **options):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind, **options)
    return file.getvalue()


def write_tar(path, files):
    """files: [(name, bytes or the name that it links to)]"""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def taken(path):
    """({name: captions} of what is taken, {reason: [names]} of the rest)"""
    good, bad = {}, {}
    for item in read_tar(str(path)):
        if item.reason:
            bad.setdefault(item.reason, []).append(item.name)
        else:
            assert open_picture(io.BytesIO(item.picture)).size == (40, 30)
            good[item.name] = item.captions
    return good, bad


# ------------------------------------------------------------------------------------------------------------
# .tar


@pytest.mark.parametrize("files", [
    [("photo.v0.jpg", png(kind="JPEG")), ("photo.v0.txt", b"a cat")],  # webdataset cuts names at their first dot
    [("000.input.jpg", png(kind="JPEG")), ("000.txt", b"a cat")],
    [("0.gif", png(kind="GIF")), ("0.txt", b"a cat")],
    [("0.bmp", png(kind="BMP")), ("0.txt", b"a cat")],
    [("0.tif", png(kind="TIFF")), ("0.txt", b"a cat")],
    [("0.avif", png(kind="AVIF")), ("0.txt", b"a cat")],
    [("first/0.png", png()), ("0.png", "first/0.png"), ("0.txt", b"a cat")],  # a hard link
    [("0.txt", b"\xef\xbb\xbfa cat"), ("0.png", png())],  # a byte order mark is no part of the caption
    [("0.png", png()), ("0.json", json.dumps({"caption": "a cat"}).encode())],
    [("0.PNG", png()), ("0.TXT", b"a cat")],
])  # fmt: skip
def test_a_sample_is_taken(files, tmp_path):
    good, _ = taken(write_tar(tmp_path / "a.tar", files))
    assert list(good.values()) == [("a cat",)]


def test_pictures_first_and_captions_behind(tmp_path):
    files = [(f"{i}.png", png()) for i in range(5)] + [(f"{i}.txt", f"cat {i}".encode()) for i in range(5)]
    good, bad = taken(write_tar(tmp_path / "a.tar", files))
    assert good == {str(i): (f"cat {i}",) for i in range(5)} and not bad


def test_two_tars_joined_by_cat(tmp_path):
    whole = b"".join(
        write_tar(tmp_path / f"{k}.tar", [(f"{k}.png", png()), (f"{k}.txt", b"a cat")]).read_bytes() for k in range(3)
    )
    (tmp_path / "all.tar").write_bytes(whole)
    assert list(taken(tmp_path / "all.tar")[0]) == ["0", "1", "2"]


def test_one_bad_sample_does_not_condemn_its_shard(tmp_path):
    files = [
        ("good.png", png()), ("good.txt", b"a cat"),
        ("000.jpg", png(kind="JPEG")), ("000.JPG", png("blue", "JPEG")), ("000.txt", b"a cat"),
        ("cut.png", png()), ("cut.json", b'{"caption": "a ca'),
        ("list.png", png()), ("list.json", b'["a cat"]'),
        ("string.png", png()), ("string.json", b'"a cat"'),
        ("dict.png", png()), ("dict.json", b'{"caption": {"text": "a cat"}}'),
        ("null.png", png()), ("null.json", b'{"caption": null}'),
        ("nan.png", png()), ("nan.json", b'{"caption": NaN}'),
        ("alone.png", png()),
        ("phone.heic", b"?"), ("phone.txt", b"a cat"),
        ("__MACOSX/._good.png", b"?"),
        ("gone.png", "nowhere.png"), ("gone.txt", b"a cat"),
    ]  # fmt: skip
    good, bad = taken(write_tar(tmp_path / "a.tar", files))
    assert set(good) == {"good", "000"}
    assert bad == {
        sources.TWICE: ["000.JPG"], "with a damaged .json": ["cut.png"],
        "with a .json that is no object": ["list.png", "string.png"], sources.NO_TEXT: ["dict.png"],
        sources.NO_CAPTION: ["null.png", "nan.png", "alone.png"],
        ".heic files, which Pillow does not read": ["phone.heic"], sources.MAC: ["__MACOSX/._good.png"],
        "links to a file that is not there": ["gone.png"],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Captions


def test_captions_that_are_no_text():
    assert as_captions("  a cat\n") == ("a cat",) and as_captions("nice \ud83d") == ("nice",)
    assert as_captions(["a cat", None, "a pet", "a cat"]) == ("a cat", "a pet")
    assert as_captions(None) == as_captions(float("nan")) == as_captions(" ") == as_captions([]) == ()
    for wrong in ({"text": "a cat"}, 3, [["a cat"]]):
        with pytest.raises(ValueError, match="no text"):
            as_captions(wrong)


def test_only_a_line_feed_ends_a_line():
    assert lines_of("one\u2028two\u0085three\r\nfour") == ["one\u2028two\u0085three", "four"]


def test_one_of_several_captions_by_chance():
    import torch

    numbers = pad_choices([[1], [2, 3, 4], [5, 6]])
    assert choose_one(numbers).tolist() == [1, 2, 5]
    assert choose_one(numbers, torch.tensor([0.99, 0.5, 0.99])).tolist() == [1, 3, 6]
    assert pad_choices([[1], [2]]).tolist() == [1, 2] and pad_choices([]).tolist() == []


# ------------------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def album(tmp_path):
    """A folder as people have it."""
    folder, elsewhere = tmp_path / "album", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    kinds = {"a.png": "PNG", "b.jpg": "JPEG", "c.avif": "AVIF", "d.jfif": "JPEG", "alone.png": "PNG"}
    for name, kind in kinds.items():
        (folder / name).write_bytes(png(kind=kind))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa cat")
    (folder / "b.TXT").write_text("a dog")
    (folder / "c.caption").write_text("a cup")
    (folder / "d.txt").write_text("a bus")
    (folder / "e.heic").write_bytes(b"?"), (folder / "e.txt").write_text("a phone's own")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._a.png").write_bytes(b"?"), (folder / "__MACOSX" / "._a.txt").write_bytes(b"\xff\xfe")
    (elsewhere / "f.png").write_bytes(png()), (elsewhere / "f.txt").write_text("a boat")
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)  # round and round
    return folder


def test_a_folder_is_read_whole_and_the_rest_is_named(album):
    items, left_out = list_captions(album)
    assert {item.picture.name: item.captions for item in items} == {
        "a.png": ("a cat",), "b.jpg": ("a dog",), "c.avif": ("a cup",), "d.jfif": ("a bus",), "f.png": ("a boat",),
    }  # fmt: skip
    assert left_out == {sources.NO_CAPTION: 1, ".heic files, which Pillow does not read": 1, sources.MAC: 1}
    with pytest.warns(UserWarning, match=r"left out 3 of 8 pictures in .*: .*1 without a caption \(such as .*alone.png\)"):
        CaptionedFolder(album, 32)


def test_metadata_of_every_sort(album):
    rows = [
        {"file_name": "a.png", "text": "one\u2028line"}, {"file_name": "b.jpg", "text": ["a dog", "a pet"]},
        {"file_name": "c.avif", "text": None}, {"file_name": "d.jfif", "text": {"en": "a bus"}},
        {"file_name": "gone.png", "text": "not there"},
    ]  # fmt: skip
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (album / "metadata.jsonl").write_text("\ufeff" + text, "utf-8")
    with pytest.warns(UserWarning, match="left out"):
        folder = CaptionedFolder(album, 32)
    assert [folder.captions(i) for i in range(len(folder))] == [("one\u2028line",), ("a dog", "a pet")]
    assert folder.left_out == {
        sources.NO_CAPTION: 1, sources.NO_TEXT: 1, "missing": 1, "not named in metadata.jsonl": 2, sources.MAC: 1,
        ".heic files, which Pillow does not read": 1,
    }  # fmt: skip
    (album / "metadata.jsonl").unlink()
    (album / "metadata.csv").write_text('file_name,text\na.png,"a cat, asleep"\n')
    assert [item.captions for item in list_captions(album)[0]] == [("a cat, asleep",)]


def test_a_folder_has_one_name_however_it_is_written(album, monkeypatch):
    monkeypatch.chdir(album.parent)
    with pytest.warns(UserWarning, match="left out"):
        names = {CaptionedFolder(way, 32).name for way in ("album", "album/", "./album", str(album))}
    assert len(names) == 1


# ------------------------------------------------------------------------------------------------------------
# Pictures


def display_p3():
    """An ICC profile of Display P3: its primaries, and sRGB's curve."""

    def s15(*values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"para\0\0\0\0\0\3\0\0" + b"".join(
        struct.pack(">i", round(v * 65536)) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    )
    name = b"Display P3\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78), b"wtpt": s15(0.9642, 1, 0.8249),
        b"rXYZ": s15(0.5151, 0.2412, -0.0011), b"gXYZ": s15(0.292, 0.6922, 0.0419), b"bXYZ": s15(0.1571, 0.0666, 0.7841),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"cprt": b"text\0\0\0\0none\0",
    }  # fmt: skip
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I", start + len(body)) + b"\0\0\0\0\2\x40\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1, 0.8249)) + bytes(48)
    return head + table + body


def test_colors_are_converted_from_the_files_profile():
    picture = open_picture(io.BytesIO(png((90, 200, 80), icc_profile=display_p3())))
    np.testing.assert_allclose(np.asarray(picture)[5, 5], (0, 203, 57), atol=2)
    plain = open_picture(io.BytesIO(png((90, 200, 80), icc_profile=b"damaged")))
    assert plain.getpixel((5, 5)) == (90, 200, 80)


def test_a_picture_of_one_column_takes_no_memory():
    import tracemalloc

    tracemalloc.start()
    assert open_picture(io.BytesIO(png(size=(1, 20_000))), 512).size == (512, 512)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_imagenets_classes_have_names_of_their_own():
    lines = [
        "n02012849 crane", "n03126707 crane", "n03710637 maillot", "n03710721 maillot, tank suit",
        "n02113186 Cardigan, Cardigan Welsh corgi", "n02963159 cardigan", "n01440764 tench, Tinca tinca",
    ]  # fmt: skip
    names = class_names(lines)
    assert len({name.lower() for name in names.values()}) == len(lines)
    assert names["n01440764"] == "tench" and names["n03710721"] == "tank suit"
    assert names["n02113186"] == "Cardigan Welsh corgi" and names["n02012849"] == "crane, the bird"


def test_a_byte_order_mark_before_the_class_names(tmp_path):
    folder = tmp_path / "train" / "n01440764"
    folder.mkdir(parents=True)
    (folder / "a.JPEG").write_bytes(png(kind="JPEG"))
    (tmp_path / "LOC_synset_mapping.txt").write_bytes(b"\xef\xbb\xbfn01440764 tench, Tinca tinca\r\n")
    (items, left_out) = sources.list_imagenet(tmp_path)
    assert [item.captions for item in items] == [("a photo of tench",)] and not left_out


def test_files_of_other_sorts_do_not_disturb(tmp_path):
    (tmp_path / "a.png").write_bytes(png()), (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / ".DS_Store").write_bytes(b"?"), (tmp_path / "notes.pdf").write_bytes(b"?")
    items, left_out = list_captions(tmp_path)
    assert len(items) == 1 and not left_out and os.path.basename(items[0].name) == "a.png"
