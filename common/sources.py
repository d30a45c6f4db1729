"""Pictures with captions as people have them: a folder, ImageNet's folder, WebDataset's .tar files, a data
set of the hub.

Each becomes a table of rows (datasets.Dataset), one for each file that was found: its name, its captions,
where its bytes are, and the reason if it is left out. So whatever is not taken is counted and named. Hugging
Face's own builders for folders and .tar files are not enough here: see docs/own_pictures.md, "Why the reading
is ours".
"""

import collections
import copy
import csv
import glob
import hashlib
import io
import json
import math
import os
import posixpath
import re
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value

from common import tables, texts
from common.pictures import OTHER_ENDINGS, PICTURE_ENDINGS, cut_square, open_picture
from common.seeds import rng
from common.texts import TEXT_KEYS, clean

TEXT_ENDINGS, METADATA = (".txt", ".caption"), ("metadata.jsonl", "metadata.csv")
NO_CAPTION, TWICE, MISSING = "without a caption", "with a caption that belongs to another picture", "missing"
UNREADABLE, MAC, NO_PICTURE = "unreadable", "side files of a Mac", "no picture by its ending"
ALONE, SMALL, LONG = "captions without a picture", "too small", "too long or wide"
CUT, NO_TAR = "cut off with the end of a .tar (fetch it again)", "no .tar, or a compressed one (unpack it)"
ROWS = Features({"name": Value("string"), "captions": List(Value("string")), "reason": Value("string"),
                 "file": Value("binary"), **dict.fromkeys(("offset", "size", "changed"), Value("int64"))})


class Row(NamedTuple):
    """A file that was found. `file` is a path, as bytes: a name need not be UTF-8; of a file within a .tar
    the .tar's, with the offset and size of its bytes there. `changed`: time of last change, ns. `reason`: why
    it is left out."""

    name: str
    captions: list = []
    reason: str | None = None
    file: bytes = b""
    offset: int | None = None
    size: int = 0
    changed: int = 0

    def read(self):
        return read_bytes(self.file, self.offset, self.size)


def read_bytes(file, offset, size):
    with open(file, "rb") as opened:
        opened.seek(offset or 0)
        return opened.read(-1 if offset is None else size)


def table(rows):
    """[Row, ...] -> datasets.Dataset."""
    return Dataset.from_dict(as_columns(rows), features=ROWS)


def as_columns(rows):
    """[Row, ...] -> {column: list}."""
    return {name: [getattr(row, name) for row in rows] for name in Row._fields}


def fingerprint(rows):
    """Stands for what a table's files are, wherever they lie: another caption or a touched picture gives
    another."""
    content = rows.remove_columns(["file"]).to_dict()
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class LeftOut(collections.Counter):
    """{reason: how many}, with an example of each. names, reasons: columns, the reason None of what is
    taken."""

    def __init__(self, names, reasons):
        names, reasons = (column.filter(reasons.is_valid()).to_pylist() for column in (names, reasons))
        super().__init__(reasons)
        self.examples = dict(zip(reversed(reasons), reversed(names), strict=True))

    def __str__(self):
        found = [f"{n} {reason} (such as {self.examples[reason]})" for reason, n in sorted(self.items())]
        return ", ".join(found) or "nothing"


# ------------------------------------------------------------------------------------------------------------
# Which caption belongs to which picture


def pair(files, captioned=True, named=None):
    """Found files -> rows with captions, or with the reason why a file is left out; captions that are taken
    vanish.

    A picture's caption is the .txt (or .caption) or the .json of the same name up to the last dot, or else up
    to the first, webdataset's rule: 000.input.jpg may stand beside 000.txt. It belongs to one picture, the
    first.

    Args:
        files: Rows without captions; those with a reason stay as they are. captioned: False: pictures need
        none. named: {name: ([caption, ...], reason)} of a metadata file, in whose place no other captions
        count.
    """
    rows, pictures, notes, of_stem, used = [], [], [], {}, set()
    for file in files:
        place = PurePosixPath(file.name)
        ending = place.suffix.lower()
        stems = place.with_suffix(""), place.with_name(place.name.split(".")[0] or place.name)
        if file.reason:
            rows.append(file)
        elif place.name.startswith("._") or "__MACOSX" in place.parts:
            rows.append(file._replace(reason=MAC))
        elif ending in PICTURE_ENDINGS:
            pictures.append((file, stems))
        elif ending in OTHER_ENDINGS:
            rows.append(file._replace(reason=f"{ending} files, which Pillow does not read"))
        elif ending in (*TEXT_ENDINGS, ".json"):
            of_stem.setdefault((stems[0], ending == ".json"), len(notes))
            notes.append(file)
        elif place.name not in METADATA:
            rows.append(file._replace(reason=NO_PICTURE))

    def beside(stems):
        """([caption, ...], reason) of the .txt and the .json beside a picture."""
        numbers = [next((of_stem[stem, is_json] for stem in stems if (stem, is_json) in of_stem), None)
                   for is_json in (False, True)]  # fmt: skip
        if used.intersection(numbers) - {None}:
            return [], TWICE
        used.update(numbers)
        for number, read in zip(numbers, (texts.as_captions, texts.captions_of_json), strict=True):
            try:
                captions = [] if number is None else read(texts.decode(notes[number].read()))
            except ValueError as error:
                return [], texts.NO_UTF8 if isinstance(error, UnicodeDecodeError) else str(error)
            if captions:
                return captions, None
        return [], NO_CAPTION

    for file, stems in pictures:
        if not captioned:
            captions, reason = [], None
        elif named:
            captions, reason = named.get(file.name, ([], "not named in the metadata"))
        else:
            captions, reason = beside(stems)
        rows.append(file._replace(captions=captions, reason=reason))
    for number, text in enumerate(notes):
        if captioned and not named and number not in used:
            rows.append(text._replace(reason=NO_PICTURE if text.name.endswith(".json") else ALONE))
    return rows


# ------------------------------------------------------------------------------------------------------------
# A folder


def walk(folder):
    """A Row for every file below a folder, sorted; linked folders are entered, each folder once."""
    files, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        files += [os.path.join(where, name) for name in names]
    return [found(path, folder) for path in sorted(files)]


def found(path, folder):
    """The Row of a file, named as seen from the folder."""
    name = clean(os.path.relpath(path, folder).replace(os.sep, "/"))
    try:
        stat = os.stat(path)
    except OSError:
        return Row(name, reason=MISSING)
    return Row(name, [], None, os.fsencode(os.path.abspath(path)), None, stat.st_size, stat.st_mtime_ns)


def list_folder(folder, captioned=True):
    """The rows of a folder: x.png beside x.txt (x.caption, x.json), or named in a metadata.jsonl or
    metadata.csv.

    captioned=False takes every picture, and leaves out the captions: a decoder needs none.
    """
    files, named, lines = walk(folder), {}, []
    for file in files if captioned else []:
        if posixpath.basename(file.name) in METADATA:
            for number, name, captions, reason in read_metadata(os.fsdecode(file.file)):
                if name is None:
                    lines.append(Row(f"{file.name}, line {number}", reason=reason))
                else:
                    path = posixpath.join(posixpath.dirname(file.name), name)
                    named[posixpath.normpath(path)] = captions, reason
    there = {file.name for file in files}  # a metadata file may name what lies elsewhere, or nowhere
    files += [found(os.path.join(folder, name), folder) for name in named if name not in there]
    return lines + pair(files, captioned, named)


def read_metadata(path):
    """(line, file name, [caption, ...], reason) of every line of a metadata.jsonl or metadata.csv (file_name,
    text)."""
    text = texts.read_text(path)
    if path.endswith(".csv"):
        numbered = enumerate(csv.DictReader(io.StringIO(text, newline="")), 2)
    else:
        numbered = ((number, line) for number, line in enumerate(texts.lines_of(text), 1) if line.strip())
    for number, row in numbered:
        try:
            row = json.loads(row) if isinstance(row, str) else row
            name, value = row["file_name"], next(row[key] for key in ("text", *TEXT_KEYS) if key in row)
            name = os.fspath(name)
        except (ValueError, KeyError, TypeError, StopIteration):
            yield number, None, [], "lines of metadata that are no object with file_name and text"
            continue
        try:
            captions, reason = texts.as_captions(value), None
        except ValueError as error:
            captions, reason = [], str(error)
        yield number, name, captions, reason or (None if captions else NO_CAPTION)


# ------------------------------------------------------------------------------------------------------------
# WebDataset's .tar files


def list_tar(path):
    """The rows of a .tar; where its files lie in it does not matter. Of several joined by `cat` each is
    looked through by itself, since names may come again."""
    archives, reason = archives_in(path)
    size, rows = os.path.getsize(path), []
    for members in archives:
        of_name = {member.name: member for member in members}
        rows += pair([inside(path, member, of_name, size) for member in members if not member.isdir()])
    return rows + ([Row(clean(path), reason=reason)] if reason else [])


def archives_in(path):
    """([[member, ...] of each archive in a .tar], why its rest is lost or None)."""
    archives, start, size = [], 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while start < size:
            file.seek(start)
            archives.append(members := [])
            try:
                archive = tarfile.open(fileobj=file, mode="r:")
                members.extend(iter(archive.next, None))
            except (OSError, EOFError, tarfile.TarError):
                return archives, CUT if any(archives) else NO_TAR
            start = file.seek(archive.offset)
            while (block := file.read(512)) and not any(block):
                start += 512
            if start == archive.offset:  # no block of zeros: tarfile takes what is left for the whole
                return archives, CUT
    return archives, None if archives else CUT


def inside(path, member, of_name, size):
    """The Row of a member of a .tar, or of what it links to."""
    name = clean(member.name)
    for _ in range(8):  # a link to a link
        if member and (member.islnk() or member.issym()):
            beside = posixpath.dirname(member.name) if member.issym() else ""
            member = of_name.get(posixpath.normpath(posixpath.join(beside, member.linkname)))
    if member is None or not member.isreg() or member.sparse:
        return Row(name, reason="links to a file that is not there, or no plain files")
    if member.offset_data + member.size > size:
        return Row(name, reason=CUT)
    return Row(name, [], None, os.fsencode(os.path.abspath(path)), member.offset_data, member.size)


# ------------------------------------------------------------------------------------------------------------
# ImageNet, and the hub


def find_synsets(folder):
    """The class folders n01440764, ... of ILSVRC's training pictures; None if there are none."""
    for inner in ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "train", "."):
        synsets = [p for p in sorted((folder / inner).glob("n*")) if re.fullmatch(r"n\d{8}", p.name)]
        if synsets and all(p.is_dir() for p in synsets):
            return synsets
    return None


def list_imagenet(folder):
    """The rows of ILSVRC's training pictures, "a photo of <class>". Raises SystemExit where classes have no
    names."""
    synsets = find_synsets(folder)
    lists = [folder / name for name in ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        problem = f"{folder} holds ImageNet's classes but not their names: put LOC_synset_mapping.txt there."
        raise SystemExit(problem)
    names = texts.class_names(line for line in texts.lines_of(texts.read_text(found)) if line.strip())
    unnamed = [p.name for p in synsets if p.name not in names]
    if unnamed:
        raise SystemExit(f"{found} has no name for {len(unnamed)} classes, such as {unnamed[0]}.")
    rows = []
    for synset in synsets:
        captions = [f"a photo of {names[synset.name]}"]
        rows += [row._replace(name=f"{synset.name}/{row.name}", captions=[] if row.reason else captions)
                 for row in pair(walk(synset), captioned=False)]  # fmt: skip
    return rows


def open_hub(source):
    """A data set of the hub ("owner/name", or a folder of its .parquet files): (datasets.Dataset, columns of
    the pictures and of the captions). Raises SystemExit with one sentence."""
    where = glob.escape(os.path.abspath(source))
    files = sorted(glob.glob(f"{where}/**/*.parquet", recursive=True))
    how = {"path": "parquet", "data_files": files} if files else {"path": source}
    try:
        data = datasets.load_dataset(**how, split="train")
    except Exception as error:  # no network, no such data set, damaged files: each library below has its own
        problem = f"{source} is no folder, no .tar, and cannot be read as a data set of the hub"
        raise SystemExit(f"{problem}: {texts.lines_of(str(error))[0]}") from error
    pictures = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    captions = [name for name in TEXT_KEYS if name in data.features]
    if not pictures or not captions:
        raise SystemExit(f"{source} has the columns {', '.join(data.features)}: it needs one of pictures, "
                         f"and one of captions that is called {', '.join(TEXT_KEYS)}.")  # fmt: skip
    return data.cast_column(pictures[0], datasets.Image(decode=False)), pictures[0], captions[0]


# ------------------------------------------------------------------------------------------------------------
# Any of them


def expand_braces(pattern):
    """ "a/{000..002}.tar" -> the three names; "a/*.tar" -> what is there; "a/1.tar" -> itself. [] for
    anything else."""
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*\.tar)", pattern)
    if match:
        head, first, last, tail = match.groups()
        return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]
    return sorted(glob.glob(pattern)) if "*" in pattern else [pattern] if pattern.endswith(".tar") else []


def kind_of(source):
    """("webdataset", its .tar files), ("imagenet", None), ("hub", None) or ("folder", None). Raises
    SystemExit if nothing is there."""
    folder = Path(source)
    tars = sorted(str(p) for p in folder.glob("*.tar")) if folder.is_dir() else expand_braces(source)
    if tars:
        missing = [path for path in tars if not os.path.isfile(path)]
        if missing:
            raise SystemExit(f"{len(missing)} of {len(tars)} .tar files are not there, such as {missing[0]}.")
        return "webdataset", tars
    if folder.is_dir():
        kind = "hub" if any(folder.rglob("*.parquet")) else "folder"
        return ("imagenet" if find_synsets(folder) else kind), None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not folder.parent.is_dir():
        return "hub", None
    raise SystemExit(f"no such folder: {source}. Give a folder of captioned pictures, ImageNet's, "
                     ".tar files, or a data set of the hub, owner/name.")  # fmt: skip


class Source(NamedTuple):
    """Pictures with captions. rows: a table of Row; name: stands for the content; kind: see kind_of; hub: see
    open_hub."""

    kind: str
    rows: Dataset
    name: str
    hub: tuple | None = None

    def load(self, row, number, crop):
        """(name, [caption, ...], picture cut by `crop` or why it is left out) of a row, {column: value}."""
        return row["name"], row["captions"], row["reason"] or self.open(row, number, crop)

    def open(self, row, number, crop):
        try:
            if self.hub:
                stored = self.hub[0][row["offset"]][self.hub[1]] or {}
                file = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored.get("path") or ""
            elif row["offset"] is None:
                file = os.fsdecode(row["file"])
            else:
                file = io.BytesIO(read_bytes(row["file"], row["offset"], row["size"]))
            return crop.cut(open_picture(file), number)
        except OSError:
            return UNREADABLE


class Crop(NamedTuple):
    """How a square is cut out of a picture: the largest one, from the middle or (how="random") anywhere,
    scaled to (side, side). A picture with a side of fewer than min_side pixels, or longer than max_aspect
    times its width, is left out."""

    side: int
    how: str = "center"
    min_side: int = 0
    max_aspect: float = math.inf
    seed: int = 0

    def cut(self, picture, number):
        """The square (PIL), or why there is none. Random places follow from the row's `number`."""
        short, long = sorted(picture.size)
        if short < self.min_side:
            return SMALL
        if long > self.max_aspect * short:
            return LONG
        if self.how == "center":
            return cut_square(picture, self.side)
        return cut_square(picture, self.side, *torch.rand(2, generator=rng(self.seed, number)).tolist())


def open_source(source, keep=None):
    """The Source of what a person names. What is in .tar files is listed once, into the folder `keep`."""
    kind, tars = kind_of(source)
    if kind == "webdataset":
        stamps = [[os.path.basename(tar), os.path.getsize(tar), os.stat(tar).st_mtime_ns] for tar in tars]

        def list_one(columns, numbers):
            return as_columns([row for tar in columns["tar"] for row in list_tar(tar)])

        files = Dataset.from_dict({"tar": tars})
        stamp = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
        rows = tables.map_in_parts(files, list_one, ROWS, keep, f"source-{stamp}", per_part=1, batch=1)
        return Source(kind, rows.with_format(None), stamp)
    if kind == "hub":
        data, pictures, captions = open_hub(source)
        rows = []
        for number, value in enumerate(data[captions]):
            try:
                found, reason = texts.as_captions(value), None
            except ValueError as error:
                found, reason = [], str(error)
            rows.append(Row(f"row {number}", found, reason or (None if found else NO_CAPTION), offset=number))
        return Source(kind, table(rows), data._fingerprint, (data, pictures))
    rows = table(list_imagenet(Path(source)) if kind == "imagenet" else list_folder(source))
    return Source(kind, rows, fingerprint(rows))


class CaptionedFolder:
    """A sequence of (picture, caption) from a folder. What is left out is counted, with reasons and examples,
    in one warning: each picture is decoded once to see whether it can be read.

    Args:
        folder: pictures and captions, see list_folder. captioned: False takes every picture, captions or not.
        size: pictures are scaled and cropped to (size, size); None: they stay as they are.
        cache: where to remember what can be read; None: nowhere.

    Raises SystemExit when there is no such folder, or nothing in it that can be used.
    """

    def __init__(self, folder, size=None, captioned=True, cache=None, workers=8):
        if not os.path.isdir(folder):
            raise SystemExit(f"no such folder: {folder}. Give --data a folder of pictures with captions.")
        self.size, rows = size, table(list_folder(folder, captioned))
        self.name = f"folder-{size}-{fingerprint(rows)}"

        def check(columns, numbers):
            with ThreadPoolExecutor(workers) as pool:
                return {"reason": list(pool.map(why_not, columns["file"], columns["reason"]))}

        if cache and len(rows):
            kept = Path(cache) / f"checked-{fingerprint(rows)}"
            features = Features({"reason": Value("string")})
            checked = tables.map_in_parts(rows, check, features, kept, "checked", batch=256)
            reasons = tables.column(checked, "reason")
        else:
            reasons = pa.array(check(rows.to_dict(), None)["reason"], pa.string())
        self.left_out = LeftOut(tables.column(rows, "name"), reasons)
        found = zip(rows["file"], rows["captions"], reasons.to_pylist(), strict=True)
        self.items = [(os.fsdecode(file), captions) for file, captions, reason in found if reason is None]
        if not self.items:
            raise SystemExit(nothing_left(folder, self.left_out, captioned))
        if self.left_out.keys() - {NO_PICTURE}:
            warnings.warn(f"{folder}: {len(self)} pictures; left out: {self.left_out}", stacklevel=2)

    def split(self, every=20):
        """(training part, validation part): every 20th picture is held out; with fewer, both parts are
        everything."""
        if len(self) < every:
            return self, self
        parts = copy.copy(self), copy.copy(self)
        parts[0].items = [item for i, item in enumerate(self.items) if i % every != every - 1]
        parts[1].items = self.items[every - 1 :: every]
        return parts

    def __len__(self):
        return len(self.items)

    def caption(self, i):
        """The first of a picture's captions; "" if it has none."""
        return next(iter(self.items[i][1]), "")

    def __getitem__(self, i):
        return open_picture(self.items[i][0], self.size), self.caption(i)


def why_not(file, reason):
    """Why a picture file is left out, or None: `reason`, if that is known, or because it cannot be read."""
    try:
        return reason or (None if open_picture(os.fsdecode(file)) else None)
    except OSError:
        return UNREADABLE


def nothing_left(source, left_out, captioned=True):
    """The sentence when no picture can be used."""
    if not captioned:
        endings = ", ".join(PICTURE_ENDINGS)
        return f"no pictures in {source}: it needs files that end in {endings}. Left out: {left_out}."
    if SMALL in left_out or LONG in left_out:
        return f"no picture of {source} is left: look at --min-side and --max-aspect. Left out: {left_out}."
    return (f"no captioned pictures in {source}: put x.txt beside each x.png, or a metadata.jsonl with one "
            f'{{"file_name": ..., "text": ...}} a line. Left out: {left_out}.')  # fmt: skip
