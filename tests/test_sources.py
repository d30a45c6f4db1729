"""Other people's files: folders, .tar shards, ImageNet's names, captions of every sort. What is left out is
counted and named."""

import gzip
import io
import json
import os
import struct
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from common import sources
from common.pictures import open_picture
from common.sources import CaptionedFolder, LeftOut, list_folder, list_tar, open_source, table
from common.texts import NO_TEXT, NO_UTF8, as_captions, check_text, class_names, lines_of


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


def sorted_out(rows):
    """({name: captions} of what is taken, {reason: [names]} of the rest)"""
    good, bad = {}, {}
    for row in rows:
        if row.reason:
            bad.setdefault(row.reason, []).append(row.name)
        else:
            assert open_picture(io.BytesIO(row.read())).size == (40, 30)
            good[row.name] = row.captions
    return good, bad


def taken(path):
    return sorted_out(list_tar(str(path)))


# ------------------------------------------------------------------------------------------------------------
# .tar


@pytest.mark.parametrize("files", [
    [("photo.v0.jpg", png(kind="JPEG")), ("photo.v0.txt", b"a cat")],  # webdataset cuts names at their first dot
    [("000.input.jpg", png(kind="JPEG")), ("000.txt", b"a cat")],
    [("0.gif", png(kind="GIF")), ("0.txt", b"a cat")],
    [("0.bmp", png(kind="BMP")), ("0.txt", b"a cat")],
    [("0.tif", png(kind="TIFF")), ("0.txt", b"a cat")],
    [("0.avif", png(kind="AVIF")), ("0.txt", b"a cat")],
    [("0.png", "first/0.bin"), ("0.txt", b"a cat"), ("first/0.bin", png())],  # a hard link
    [("0.txt", b"\xef\xbb\xbfa cat"), ("0.png", png())],  # a byte order mark is no part of the caption
    [("0.png", png()), ("0.json", json.dumps({"caption": "a cat"}).encode())],
    [("0.PNG", png()), ("0.TXT", b"a cat")],
])  # fmt: skip
def test_a_sample_is_taken(files, tmp_path):
    good, _ = taken(write_tar(tmp_path / "a.tar", files))
    assert list(good.values()) == [["a cat"]]


def test_pictures_first_and_captions_behind(tmp_path):
    files = [(f"{i}.png", png()) for i in range(5)] + [(f"{i}.txt", f"cat {i}".encode()) for i in range(5)]
    good, bad = taken(write_tar(tmp_path / "a.tar", files))
    assert good == {f"{i}.png": [f"cat {i}"] for i in range(5)} and not bad


def test_two_tars_joined_by_cat(tmp_path):
    """Their names may be the same."""
    one = write_tar(tmp_path / "one.tar", [("0.png", png()), ("0.txt", b"a cat")]).read_bytes()
    two = write_tar(tmp_path / "two.tar", [("0.png", png()), ("0.txt", b"a dog")]).read_bytes()
    (tmp_path / "all.tar").write_bytes(one + two)
    rows = list_tar(str(tmp_path / "all.tar"))
    assert [(row.name, row.captions, row.reason) for row in rows] == [("0.png", ["a cat"], None), ("0.png", ["a dog"], None)]
    assert all(row.read() == png() for row in rows)


def test_a_tar_that_was_cut_gives_what_is_whole_and_says_so(tmp_path):
    """Cut within a header, between two files, within a file; and what is no .tar at all."""
    pairs = [[(f"{i}.png", png()), (f"{i}.txt", b"a cat")] for i in range(3)]
    path = write_tar(tmp_path / "a.tar", sum(pairs, []))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4]
    for size, names in ((0, []), (300, []), (third.offset, ["0.png", "1.png"]), (third.offset + 300, ["0.png", "1.png"]),
                        (third.offset_data + 9, ["0.png", "1.png"])):  # fmt: skip
        path.write_bytes(whole[:size])
        good, bad = taken(path)
        assert list(good) == names and bad.pop(sources.CUT if size != 300 else sources.NO_TAR)[-1] == str(path) and not bad
    path.write_bytes(gzip.compress(whole))
    assert taken(path) == ({}, {sources.NO_TAR: [str(path)]})


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
        ("latin.png", png()), ("latin.txt", b"caf\xe9"), ("words.txt", b"a cat"), ("notes.pdf", b"?"),
    ]  # fmt: skip
    good, bad = taken(write_tar(tmp_path / "a.tar", files))
    assert set(good) == {"good.png", "000.jpg"}
    assert bad == {
        sources.TWICE: ["000.JPG"], "with a damaged .json": ["cut.png"], NO_UTF8: ["latin.png"],
        "with a .json that is no object": ["list.png", "string.png"], NO_TEXT: ["dict.png"],
        sources.NO_CAPTION: ["null.png", "nan.png", "alone.png"],
        ".heic files, which Pillow does not read": ["phone.heic"], sources.MAC: ["__MACOSX/._good.png"],
        "links to a file that is not there, or no plain files": ["gone.png"],
        sources.ALONE: ["phone.txt", "gone.txt", "words.txt"], sources.NO_PICTURE: ["notes.pdf"],
    }  # fmt: skip


def test_the_caption_of_the_whole_name_comes_first(tmp_path):
    files = [("0.a.txt", b"a cat"), ("0.txt", b"a dog"), ("0.png", png()), ("0.a.png", png()), ("0.a.json", b"{}")]
    assert taken(write_tar(tmp_path / "a.tar", files)) == ({"0.png": ["a dog"], "0.a.png": ["a cat"]}, {})


# ------------------------------------------------------------------------------------------------------------
# Captions


def test_captions_that_are_no_text():
    assert as_captions("  a cat\n") == ["a cat"] and as_captions("nice \ud83d") == ["nice"]
    assert as_captions(["a cat", None, "a pet", "a cat"]) == ["a cat", "a pet"]
    assert as_captions(None) == as_captions(float("nan")) == as_captions(" ") == as_captions([]) == []
    for wrong in ({"text": "a cat"}, 3, [["a cat"]]):
        with pytest.raises(ValueError, match="no text"):
            as_captions(wrong)


def test_only_a_line_feed_ends_a_line():
    assert lines_of("one\u2028two\u0085three\r\nfour") == ["one\u2028two\u0085three", "four"]


def test_half_a_character_ends_in_one_sentence():
    check_text(["a caf\u00e9", "\U0001f408"])
    with pytest.raises(SystemExit, match=r"'a caf\\udce9' holds a byte or half a character"):
        check_text(["a cat", os.fsdecode(b"a caf\xe9")])


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
    good, bad = sorted_out(list_folder(album))
    assert good == {"a.png": ["a cat"], "b.jpg": ["a dog"], "c.avif": ["a cup"], "d.jfif": ["a bus"], "linked/f.png": ["a boat"]}
    assert bad == {
        sources.NO_CAPTION: ["alone.png"], ".heic files, which Pillow does not read": ["e.heic"],
        sources.MAC: ["__MACOSX/._a.png", "__MACOSX/._a.txt"], sources.ALONE: ["e.txt"],
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"5 pictures; left out: .*1 without a caption \(such as alone.png\)"):
        CaptionedFolder(album, 32)


def test_metadata_of_every_sort(album):
    rows = [
        {"file_name": "a.png", "text": "one\u2028line"}, {"file_name": "./b.jpg", "text": ["a dog", "a pet"]},
        {"file_name": "c.avif", "text": None}, {"file_name": "d.jfif", "text": {"en": "a bus"}},
        {"file_name": "gone.png", "text": "not there"},
    ]  # fmt: skip
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\nnot json\n[1]\n"
    (album / "metadata.jsonl").write_text("\ufeff" + text, "utf-8")
    good, bad = sorted_out(list_folder(album))
    assert good == {"a.png": ["one\u2028line"], "b.jpg": ["a dog", "a pet"]}
    assert bad.pop("lines of metadata that are no object with file_name and text") == [f"metadata.jsonl, line {n}" for n in (6, 7)]
    assert bad.pop("not named in the metadata") == ["alone.png", "linked/f.png"]
    assert bad.pop(sources.MISSING) == ["gone.png"] and bad.pop(NO_TEXT) == ["d.jfif"] and bad.pop(sources.NO_CAPTION) == ["c.avif"]
    assert bad.keys() == {sources.MAC, ".heic files, which Pillow does not read"}
    (album / "metadata.jsonl").unlink()
    (album / "metadata.csv").write_text('\ufefffile_name,text\r\na.png,"a cat, asleep"\r\nb.jpg,\r\n', newline="")
    good, bad = sorted_out(list_folder(album))
    assert good == {"a.png": ["a cat, asleep"]} and bad[sources.NO_CAPTION] == ["b.jpg"]


def test_names_that_are_no_utf8(tmp_path):
    """Linux allows any bytes; so does a folder's table."""
    place = os.fsencode(tmp_path) + b"/caf\xe9."
    for ending, content in ((b"png", png()), (b"txt", b"a cat")):
        with open(place + ending, "wb") as file:
            file.write(content)
    assert table(list_folder(tmp_path))["captions"][:] == [["a cat"]]
    assert CaptionedFolder(tmp_path, 32)[0][0].size == (32, 32)


def test_parquet_files_as_the_hub_has_them(tmp_path, monkeypatch):
    """Without network: what a download of such a data set holds. Numbers of rows stand for their names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"image": [{"bytes": png(), "path": None}] * 3, "text": ["a cat", None, "a dog"], "url": ["", "", ""]}
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "url": datasets.Value("string")})
    (tmp_path / "pets" / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "pets" / "data" / "train-00000-of-00001.parquet")
    source = open_source(str(tmp_path / "pets"))
    loaded = [source.load(row, n, sources.Crop(16)) for n, row in enumerate(source.rows)]
    assert [(name, captions) for name, captions, _ in loaded] == [("row 0", ["a cat"]), ("row 1", []), ("row 2", ["a dog"])]
    assert loaded[0][2].size == (16, 16) and loaded[1][2] == sources.NO_CAPTION
    datasets.Dataset.from_dict({"url": ["x"]}).to_parquet(tmp_path / "pets" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(SystemExit, match="has the columns url: it needs one of pictures"):
        open_source(str(tmp_path / "pets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="nobody/nothing is no folder, no .tar, and cannot be read as a data set of the hub"):
        open_source("nobody/nothing")


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
    assert names["n02113186"] == "Cardigan Welsh corgi" and names["n02012849"] == "crane bird"


def test_a_byte_order_mark_before_the_class_names(tmp_path):
    folder = tmp_path / "train" / "n01440764"
    folder.mkdir(parents=True)
    (folder / "a.JPEG").write_bytes(png(kind="JPEG"))
    (tmp_path / "LOC_synset_mapping.txt").write_bytes(b"\xef\xbb\xbfn01440764 tench, Tinca tinca\r\n")
    assert [(row.name, row.captions) for row in sources.list_imagenet(tmp_path)] == [("n01440764/a.JPEG", ["a photo of tench"])]


def test_files_of_other_sorts_are_no_reason_to_warn(tmp_path, recwarn):
    (tmp_path / "a.png").write_bytes(png()), (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / ".DS_Store").write_bytes(b"?"), (tmp_path / "settings.json").write_bytes(b"{}")
    folder = CaptionedFolder(tmp_path, 32)
    assert len(folder) == 1 and folder.left_out == {sources.NO_PICTURE: 2} and not recwarn.list
    assert str(folder.left_out) == "2 no picture by its ending (such as .DS_Store)"


def test_what_is_left_out_is_counted_with_an_example():
    left_out = LeftOut(pa.array(["a", "b", "c", "d"]), pa.array(["bad", None, "bad", "worse"]))
    assert left_out == {"bad": 2, "worse": 1} and str(left_out) == "2 bad (such as a), 1 worse (such as d)"


def test_a_tar_without_a_picture_is_no_reason_to_stop(tmp_path):
    write_tar(tmp_path / "a.tar", []), write_tar(tmp_path / "b.tar", [("0.png", png()), ("0.txt", b"a cat")])
    source = open_source(str(tmp_path), tmp_path / "out")
    assert source.rows["name"][:] == ["0.png"] and len(list((tmp_path / "out").glob("source-*"))) == 2
    (row,) = source.rows
    assert source.load(row, 0, sources.Crop(16))[2].getpixel((5, 5)) == (255, 0, 0)
    assert source.load(row, 0, sources.Crop(16, min_side=40))[2] == "too small"
    assert source.load(row, 0, sources.Crop(16, max_aspect=1.2))[2] == "too long or wide"
