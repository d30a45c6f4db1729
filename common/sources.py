"""Large data sets as people have them: ImageNet's folder, WebDataset's .tar files, a folder of captioned pictures.

A source is a list of parts, each of which becomes one shard (common/shards.py). A part yields (name, bytes or path of a picture,
caption).
"""

import functools
import glob
import json
import re
import tarfile
from pathlib import Path

import torch

from common.pictures import list_captions
from common.seeds import rng

IMAGE_KEYS, TEXT_KEYS = ("jpg", "jpeg", "png", "webp"), ("caption", "text", "TEXT", "prompt")


def open_source(source, per_shard):
    """(kind, [part, ...]): a part is a function without arguments that yields (name, path or bytes of a picture, caption).

    Raises SystemExit with one sentence when there is nothing, or no class names beside ImageNet's folders.
    """
    folder = Path(source)
    tars = sorted(str(p) for p in folder.glob("*.tar")) if folder.is_dir() else expand_braces(source)
    if tars:
        missing = [path for path in tars if not Path(path).is_file()]
        if missing:
            raise SystemExit(f"{len(missing)} of {len(tars)} shards are not there, such as {missing[0]}.")
        return "webdataset", [functools.partial(read_tar, path) for path in tars]
    if not folder.is_dir():
        raise SystemExit(
            f"no such folder: {source}. Give ImageNet's folder, .tar files, or a folder of captioned pictures."
        )
    imagenet = list_imagenet(folder)
    items = (
        imagenet if imagenet is not None else [(str(path), path, caption) for path, caption in list_captions(folder)]
    )
    # In an order drawn once, so that a shard holds a bit of everything, and every class is in the first ones already.
    order = torch.randperm(len(items), generator=rng(0, len(items))).tolist()
    parts = [[items[i] for i in order[start : start + per_shard]] for start in range(0, len(items), per_shard)]
    return "folder" if imagenet is None else "imagenet", [functools.partial(iter, part) for part in parts]


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
    """The samples of one WebDataset shard."""
    import webdataset

    try:
        with open(path, "rb") as file:  # cut between two files or inside a header, tarfile takes what is left for the whole
            file.seek(max(0, file.seek(0, 2) - 1024))
            if file.read() != bytes(1024):
                raise tarfile.ReadError("its end, two blocks of zeros, is missing, or it is compressed")
        files = webdataset.WebDataset(path, shardshuffle=False, empty_check=False, nodesplitter=lambda urls: urls)
        for sample in files:  # every sample of this one file: encode() gives each rank its own
            picture = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
            caption = sample["txt"].decode(errors="replace").strip() if "txt" in sample else ""
            if not caption and "json" in sample:
                described = json.loads(sample["json"])
                caption = next((str(described[key]).strip() for key in TEXT_KEYS if described.get(key)), "")
            if picture is not None:
                yield sample["__key__"], picture, caption
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise SystemExit(
            f"{path} is damaged ({error}): fetch it again, or put an empty .tar in its place (tar cf {path} -T /dev/null). "
            "Finished shards stay."
        ) from error


def find_synsets(folder):
    """The class folders n01440764, ... of ILSVRC's training pictures; None if there are none."""
    for inner in ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "train", "."):
        synsets = sorted(p for p in (folder / inner).glob("n*") if re.fullmatch(r"n\d{8}", p.name) and p.is_dir())
        if synsets:
            return synsets
    return None


def list_imagenet(folder):
    """[(name, path, caption), ...] of ILSVRC's training pictures; None if the folder holds none of its class folders."""
    synsets = find_synsets(folder)
    if synsets is None:
        return None
    lists = [folder / name for name in ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise SystemExit(f"{folder} holds ImageNet's classes but not their names: put LOC_synset_mapping.txt there.")
    lines = (line.split(None, 1) for line in found.read_text(encoding="utf-8").splitlines() if line.strip())
    names = {synset: rest.split(",")[0].strip() for synset, rest in lines}
    unnamed = [p.name for p in synsets if p.name not in names]
    if unnamed:
        raise SystemExit(f"{found} has no name for {len(unnamed)} classes, such as {unnamed[0]}.")
    return [(f"{p.name}/{picture.name}", picture, f"a photo of {names[p.name]}") for p in synsets
            for picture in sorted(p.iterdir()) if picture.suffix.lower() in (".jpeg", ".jpg", ".png")]  # fmt: skip
