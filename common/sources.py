"""Pictures with captions as people have them: a folder, ImageNet's folder, WebDataset's .tar files.

Every source is read into items, and nothing is dropped in silence: what cannot be used is counted, with its reason and
an example.
"""

import collections
import contextlib
import copy
import csv
import functools
import glob
import hashlib
import json
import math
import os
import re
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import parallel
from common.checkpoint import save_atomically
from common.pictures import OTHER_ENDINGS, PICTURE_ENDINGS, open_picture
from common.seeds import rng

TEXT_ENDINGS, TEXT_KEYS = (".txt", ".caption"), ("caption", "text", "TEXT", "prompt")
NO_CAPTION, NO_TEXT, TWICE = "without a caption", "with a caption that is no text", "of a name that occurs twice"
UNREADABLE, MAC = "unreadable", "side files of a Mac"
CRANES = {"n02012849": "crane, the bird", "n03126707": "crane, the machine"}  # [A]


class Item(NamedTuple):
    """A picture and its captions, or why it is left out."""

    name: str
    picture: object = None  # a path, or the file's bytes
    captions: tuple = ()  # one or several texts; training takes one of several by chance
    reason: str | None = None


class LeftOut(collections.Counter):
    """{reason: how many pictures}, with an example of each."""

    def __init__(self, *args):
        super().__init__(*args)
        self.examples = {}

    def note(self, reason, name):
        self[reason] += 1
        self.examples.setdefault(reason, str(name))

    def __str__(self):
        def example(reason):
            return f" (such as {self.examples[reason]})" if reason in self.examples else ""

        return ", ".join(f"{count} {reason}{example(reason)}" for reason, count in sorted(self.items())) or "none"


# ------------------------------------------------------------------------------------------------------------
# Text


def read_text(path):
    """A text file as str. UTF-8, with or without a byte order mark. Raises SystemExit when it is something else."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def lines_of(text):
    """The lines of a text. Only line feeds end one: str.splitlines() would also cut at U+2028 and U+0085, which JSON
    and captions may hold."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def clean(text):
    """Without white space around, and without lone surrogates, halves of a character that no tokenizer takes."""
    return "".join(c for c in text if not "\ud800" <= c <= "\udfff").strip()


def as_captions(value):
    """What a caption's field holds as a tuple of texts: a text, a list of some, or none at all (null, NaN, blanks).

    Raises ValueError when it is something else, such as a dictionary.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, str):
        return (clean(value),) if clean(value) else ()
    if isinstance(value, list) and all(v is None or isinstance(v, str) for v in value):
        return tuple(dict.fromkeys(text for v in value for text in as_captions(v)))
    raise ValueError(NO_TEXT)


def captions_of_json(text):
    """The captions in a JSON object with one of TEXT_KEYS. Raises ValueError with the reason if it is none."""
    try:
        described = json.loads(text)
    except ValueError:
        raise ValueError("with a damaged .json") from None
    if not isinstance(described, dict):
        raise ValueError("with a .json that is no object")
    return next((found for key in TEXT_KEYS if (found := as_captions(described.get(key)))), ())


# ------------------------------------------------------------------------------------------------------------
# A folder


def walk(folder):
    """Every file below a folder, sorted; linked folders are entered, each folder once."""
    files, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(where) / name for name in names]
    return sorted(files)


def list_captions(folder, captioned=True):
    """([Item of a path, ...], LeftOut) of a folder: `metadata.jsonl` or `metadata.csv` (file_name, text) if it has one, else
    x.png beside x.txt (or x.caption).

    captioned=False takes every picture, and leaves out the captions: a decoder needs none.
    Raises SystemExit with one sentence when the folder does not exist or holds no captioned picture.
    """
    folder, left_out = Path(folder), LeftOut()
    if not folder.is_dir():
        raise SystemExit(f"no such folder: {folder}. Give --data a folder of pictures with captions.")
    pictures, texts = [], {}
    for path in walk(folder):
        ending = path.suffix.lower()
        if ending in PICTURE_ENDINGS + OTHER_ENDINGS and (path.name.startswith("._") or "__MACOSX" in path.parts):
            left_out.note(MAC, path)
        elif ending in PICTURE_ENDINGS:
            pictures.append(path)
        elif ending in OTHER_ENDINGS:
            left_out.note(f"{ending} files, which Pillow does not read", path)
        elif ending in TEXT_ENDINGS and not path.name.startswith("._"):
            texts.setdefault(path.with_suffix(""), path)
    named = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if not captioned:
        items = [Item(str(path), path) for path in pictures]
        if not items:
            raise SystemExit(f"no pictures in {folder}: it needs files that end in {', '.join(PICTURE_ENDINGS)}.")
        return items, left_out
    rows = read_metadata(named) if named else ((path, texts.get(path.with_suffix(""))) for path in pictures)
    items = []
    for path, value in rows:
        try:
            captions = as_captions(read_text(value) if isinstance(value, Path) else value)
        except ValueError as error:
            left_out.note(str(error), path)
            continue
        if captions:
            items.append(Item(str(path), path, captions))
        else:
            left_out.note(NO_CAPTION, path)
    if named:
        mentioned = {path for path, _ in read_metadata(named)}
        for path in pictures:
            if path not in mentioned:
                left_out.note(f"not named in {named.name}", path)
    if not items:
        raise SystemExit(
            f"no captioned pictures in {folder}: put x.txt beside each x.png, or a metadata.jsonl with one "
            f'{{"file_name": ..., "text": ...}} a line. Left out: {left_out}.'
        )
    return items, left_out


def read_metadata(path):
    """[(picture's path, caption's value), ...] of metadata.jsonl or metadata.csv. Raises SystemExit when a line is damaged."""
    text, rows = read_text(path), []
    if path.suffix == ".csv":
        numbered = enumerate(csv.DictReader(text.split("\n")), 2)
    else:
        numbered = ((n, line) for n, line in enumerate(lines_of(text), 1) if line.strip())
    for number, row in numbered:
        try:
            row = json.loads(row) if isinstance(row, str) else row
            rows.append((path.parent / row["file_name"], row["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {number}: expected an object with file_name and text ({error!r})."
            ) from error
    return rows


def check_pictures(paths, folder, cache=None, workers=8):
    """[whether each of these picture files can be read]: each is decoded once in its life, by one of `workers` threads.

    With a folder `cache`, checked-HASH.json in it remembers {path: [bytes, time of last change, readable]}, also when
    the check is stopped half-way. A file that has changed is checked again. With torchrun rank 0 checks, and the others
    read what it found.
    """

    def stamp(path):
        try:
            return [path.stat().st_size, path.stat().st_mtime_ns]
        except OSError:
            return None  # it is not there

    def can_be_read(path):
        try:
            return bool(open_picture(path))
        except OSError:
            return False

    key = hashlib.sha256(str(Path(folder).resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    note = Path(cache) / f"checked-{key}.json" if cache else None
    with parallel.first_alone() if cache else contextlib.nullcontext():
        try:
            known = json.loads(note.read_text(encoding="utf-8")) if note and note.is_file() else {}
        except ValueError:
            known = {}  # damaged: all are checked again
        names, stamps = [str(path.absolute()) for path in paths], [stamp(path) for path in paths]
        new = [i for i, name in enumerate(names) if stamps[i] and known.get(name, [])[:2] != stamps[i]]
        pool = ThreadPoolExecutor(workers)
        try:
            found = pool.map(can_be_read, [paths[i] for i in new])
            bar = tqdm(found, total=len(new), desc="checking pictures", disable=True if len(new) < 500 else None)
            for i, good in zip(new, bar, strict=True):
                known[names[i]] = [*stamps[i], good]
        finally:
            pool.shutdown(cancel_futures=True)
            if note and new:
                save_atomically(lambda p: p.write_text(json.dumps(known), encoding="utf-8"), note)
    return [stamps[i] is not None and known[name][2] for i, name in enumerate(names)]


class CaptionedFolder:
    """A sequence of (picture, caption) from a folder. What is left out is counted, with reasons and examples, in one warning.

    Args:
        folder: pictures and captions, see list_captions. size: pictures are scaled and cropped to (size, size); None: they
            stay as they are.
        captioned: False takes every picture, captions or not.
        cache: where to remember which pictures have been checked, see check_pictures; None: nowhere.

    Raises SystemExit when the folder, its captions, or every one of its pictures cannot be read.
    """

    def __init__(self, folder, size=None, captioned=True, cache=None):
        self.folder, self.size = Path(folder), size
        listed, self.left_out = list_captions(folder, captioned)
        readable = check_pictures([item.picture for item in listed], folder, cache)
        for item, good in zip(listed, readable, strict=True):
            if not good:
                self.left_out.note(UNREADABLE if item.picture.exists() else "missing", item.name)
        self.items = [item for item, good in zip(listed, readable, strict=True) if good]
        if not self.items:
            raise SystemExit(f"none of the {len(listed)} pictures in {folder} can be read, such as {listed[0].name}.")
        if count := self.left_out.total():
            warnings.warn(f"left out {count} of {count + len(self)} pictures in {folder}: {self.left_out}", stacklevel=2)

    @property
    def name(self):
        """Stands for the content, wherever the folder lies: another caption or a touched picture makes another cache."""
        content = [
            (os.path.relpath(item.picture, self.folder), item.picture.stat().st_size, item.picture.stat().st_mtime_ns,
             item.captions) for item in self.items
        ]  # fmt: skip
        return f"folder-{self.size}-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def split(self, every=20):
        """(training part, validation part): every 20th picture is held out; with fewer, both parts are everything."""
        if len(self) < every:
            return self, self
        parts = copy.copy(self), copy.copy(self)
        parts[0].items = [item for i, item in enumerate(self.items) if i % every != every - 1]
        parts[1].items = self.items[every - 1 :: every]
        return parts

    def __len__(self):
        return len(self.items)

    def captions(self, i):
        """All captions of a picture."""
        return self.items[i].captions

    def caption(self, i):
        """Its first one; "" if it has none."""
        return next(iter(self.items[i].captions), "")

    def __getitem__(self, i):
        return open_picture(self.items[i].picture, self.size), self.caption(i)


# ------------------------------------------------------------------------------------------------------------
# Large sources, as parts: each becomes one shard


def open_source(source, per_shard):
    """(kind, [part, ...], LeftOut): a part is a function without arguments that yields Items.

    Raises SystemExit with one sentence when there is nothing, or no class names beside ImageNet's folders.
    """
    folder = Path(source)
    tars = sorted(str(p) for p in folder.glob("*.tar")) if folder.is_dir() else expand_braces(source)
    if tars:
        missing = [path for path in tars if not Path(path).is_file()]
        if missing:
            raise SystemExit(f"{len(missing)} of {len(tars)} shards are not there, such as {missing[0]}.")
        return "webdataset", [functools.partial(read_tar, path) for path in tars], LeftOut()
    if not folder.is_dir():
        raise SystemExit(
            f"no such folder: {source}. Give ImageNet's folder, .tar files, or a folder of captioned pictures."
        )
    imagenet = list_imagenet(folder)
    items, left_out = list_captions(folder) if imagenet is None else imagenet
    # In an order drawn once, so that a shard holds a bit of everything, and every class is in the first ones already.
    order = torch.randperm(len(items), generator=rng(0, len(items))).tolist()
    parts = [[items[i] for i in order[start : start + per_shard]] for start in range(0, len(items), per_shard)]
    kind = "folder" if imagenet is None else "imagenet"
    return kind, [functools.partial(iter, part) for part in parts], left_out


def expand_braces(pattern):
    """ "a/{000..002}.tar" -> the three names; "a/*.tar" -> what is there; "a/1.tar" -> itself. [] for anything else."""
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*\.tar)", pattern)
    if match:
        head, first, last, tail = match.groups()
        return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]
    return sorted(glob.glob(pattern)) if "*" in pattern else [pattern] if pattern.endswith(".tar") else []


def is_raw(folder):
    """Whether a folder is ImageNet's or one of .tar files: too large to be encoded at the start of each run."""
    return any(folder.glob("*.tar")) or find_synsets(folder) is not None


def read_tar(path):
    """The samples of one WebDataset shard: every picture in it as an Item, in the order of the file.

    A picture's caption is the .txt (or .caption) or .json of the same name up to the last dot, or else up to the first dot
    of the file's name, webdataset's rule: 000.input.jpg may stand beside 000.txt. Where they lie in the file does not matter.
    """
    try:
        with open(path, "rb") as file:
            files, pictures = {}, []
            for tar, member in members_of(file):
                place = PurePosixPath(member.name)
                ending = place.suffix.lower()
                if ending in PICTURE_ENDINGS + OTHER_ENDINGS:
                    pictures.append((tar, member, str(place.with_suffix("")), ending))
                elif ending in (*TEXT_ENDINGS, ".json"):
                    for stem in (str(place.with_suffix("")), key_of(place)):
                        files.setdefault((stem, ".json" if ending == ".json" else ".txt"), (tar, member))
            taken = set()
            for tar, member, stem, ending in pictures:
                yield tar_item(tar, member, stem, ending, files, taken)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise SystemExit(
            f"{path} is damaged ({error}): fetch it again, or put an empty .tar in its place (tar cf {path} -T /dev/null). "
            "Finished shards stay."
        ) from error


def members_of(file):
    """(archive, member) of every file in a .tar, and of the .tars behind it that `cat` has joined; links are followed."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 1024))
    if file.read() != bytes(1024):  # cut between two files, tarfile takes what is left for the whole
        raise tarfile.ReadError("its end, two blocks of zeros, is missing, or it is compressed")
    start = 0
    while start < size:
        file.seek(start)
        with_end = tarfile.open(fileobj=file, mode="r:")
        for member in with_end:
            if member.isfile() or member.islnk() or member.issym():
                yield with_end, member
        start = with_end.offset
        file.seek(start)
        while (block := file.read(512)) and not any(block):
            start += 512
        if not block:
            return


def key_of(place):
    """webdataset's key: the path up to the first dot of the file's name."""
    return str(place.with_name(place.name.split(".")[0] or place.name))


def tar_item(tar, member, stem, ending, files, taken):
    """The Item of a picture in a .tar. files: {(stem, ending): (archive, member)} of the texts; taken: stems so far."""
    place = PurePosixPath(member.name)
    if place.name.startswith("._") or "__MACOSX" in place.parts:
        return Item(member.name, reason=MAC)
    if ending in OTHER_ENDINGS:
        return Item(member.name, reason=f"{ending} files, which Pillow does not read")
    if stem in taken:
        return Item(member.name, reason=TWICE)
    taken.add(stem)

    def content(ending):
        for name in (stem, key_of(place)):
            if (name, ending) in files:
                archive, text = files[name, ending]
                return archive.extractfile(text).read().decode("utf-8-sig", errors="replace")
        return None

    try:
        captions = as_captions(content(".txt"))
        if not captions and (described := content(".json")) is not None:
            captions = captions_of_json(described)
    except (ValueError, KeyError) as error:  # KeyError: a link to what is not there
        return Item(member.name, reason=str(error) if isinstance(error, ValueError) else NO_CAPTION)
    if not captions:
        return Item(member.name, reason=NO_CAPTION)
    try:
        return Item(stem, tar.extractfile(member).read(), captions)
    except KeyError:
        return Item(member.name, reason="links to a file that is not there")


def find_synsets(folder):
    """The class folders n01440764, ... of ILSVRC's training pictures; None if there are none."""
    for inner in ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "train", "."):
        synsets = sorted(p for p in (folder / inner).glob("n*") if re.fullmatch(r"n\d{8}", p.name) and p.is_dir())
        if synsets:
            return synsets
    return None


def list_imagenet(folder):
    """([Item, ...], LeftOut) of ILSVRC's training pictures; None if the folder holds none of its class folders."""
    synsets = find_synsets(folder)
    if synsets is None:
        return None
    lists = [folder / name for name in ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise SystemExit(f"{folder} holds ImageNet's classes but not their names: put LOC_synset_mapping.txt there.")
    names = class_names(line for line in lines_of(read_text(found)) if line.strip())
    unnamed = [p.name for p in synsets if p.name not in names]
    if unnamed:
        raise SystemExit(f"{found} has no name for {len(unnamed)} classes, such as {unnamed[0]}.")
    items, left_out = [], LeftOut()
    for synset in synsets:
        for path in sorted(synset.iterdir()):
            name = f"{synset.name}/{path.name}"
            if path.suffix.lower() in PICTURE_ENDINGS:
                items.append(Item(name, path, (f"a photo of {names[synset.name]}",)))
            else:
                left_out.note("no picture by its ending", name)
    return items, left_out


def class_names(lines):
    """{synset: name} of lines such as "n01440764 tench, Tinca tinca": the first name; the second one where several classes
    share the first, whatever the case. ImageNet's two cranes have no second: they are told apart by CRANES."""
    words = {synset: [w.strip() for w in rest.split(",")] for synset, rest in (line.split(None, 1) for line in lines)}
    shared = collections.Counter(names[0].lower() for names in words.values())
    told = {}
    for synset, names in words.items():
        told[synset] = names[1] if shared[names[0].lower()] > 1 and len(names) > 1 else names[0]
    shared = collections.Counter(name.lower() for name in told.values())
    for synset, name in told.items():
        if shared[name.lower()] > 1:
            told[synset] = CRANES.get(synset, f"{name} ({synset})")
    return told
