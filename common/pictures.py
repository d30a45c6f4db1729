"""Picture files: whatever people have lying about, as RGB; folders of them with captions; pictures as tensors and back."""

import contextlib
import copy
import hashlib
import json
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common import parallel
from common.checkpoint import save_atomically
from common.shapes import SIDE

CACHE = "runs/cache"  # what was found out or encoded once, and is read again by the next run
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_picture(path, size=None):
    """A picture file as RGB (PIL), whatever it holds; with `size`, scaled and centre-cropped to (size, size).

    Transparency is laid on white, the first frame of an animation is taken, 16-bit greyscale is scaled to 8 bits, CMYK,
    palettes and greyscale are converted. Raises OSError (or one of its kind) when the file is corrupt or truncated.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            picture = ImageOps.exif_transpose(picture)  # phones write the pixels lying down and say so
            if picture.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel: Pillow's own conversion would clip
                values = np.asarray(picture, dtype=np.float32)
                wide = picture.mode.startswith("I;16") or values.max() > 255
                top = 65535.0 if wide else 255.0 if values.max() > 1 else 1.0
                picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise OSError(f"{path} is not a readable picture: {error}") from error
    if size is None:
        return picture
    scale = size / min(picture.size)
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def list_captions(folder, captioned=True):
    """[(picture path, caption)] of a folder: `metadata.jsonl` (file_name, text) if it has one, else x.png + x.txt.

    captioned=False takes every picture, and leaves out the captions: a decoder needs none.
    Raises SystemExit with one sentence when the folder does not exist or holds no captioned picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SystemExit(f"no such folder: {folder}. Give --data a folder of pictures with captions.")
    pairs, metadata = [], folder / "metadata.jsonl"
    if not captioned:
        pairs = [(path, "") for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURE_ENDINGS]
        if not pairs:
            raise SystemExit(f"no pictures in {folder}: it needs files that end in {', '.join(PICTURE_ENDINGS)}.")
    elif metadata.is_file():
        for number, line in enumerate(_read_text(metadata).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                pairs.append((folder / row["file_name"], str(row["text"])))
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"{metadata}, line {number}: expected an object with file_name and text ({error!r})."
                ) from error
    else:
        for path in sorted(folder.rglob("*")):
            text = path.with_suffix(".txt")
            if path.suffix.lower() in PICTURE_ENDINGS and text.is_file():
                pairs.append((path, _read_text(text).strip()))
    if not pairs:
        raise SystemExit(
            f"no captioned pictures in {folder}: put x.txt beside each x.png, or a metadata.jsonl with one "
            '{"file_name": ..., "text": ...} a line.'
        )
    return pairs


def check_pictures(paths, folder, cache=None, workers=8):
    """[whether each of these picture files can be read]: each is decoded once in its life, by one of `workers` threads.

    With a folder `cache`, checked-HASH.json in it remembers {path: [bytes, time of last change, readable]}, also when the check is
    stopped half-way. A file that has changed is checked again. With torchrun rank 0 checks, and the others read what it found.
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

    note = Path(cache) / f"checked-{hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]}.json" if cache else None
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
    """A sequence of (picture, caption) from a folder. Unreadable pictures are left out, counted, and named once.

    Args:
        folder: pictures and captions, see list_captions. size: pictures are scaled and cropped to (size, size).
        captioned: False takes every picture, captions or not.
        cache: where to remember which pictures have been checked, see check_pictures; None: nowhere.

    Raises SystemExit when the folder, its captions, or every one of its pictures cannot be read.
    """

    def __init__(self, folder, size=SIDE, captioned=True, cache=None):
        self.size, pairs = size, list_captions(folder, captioned)
        readable = check_pictures([path for path, _ in pairs], folder, cache)
        self.pairs = [pair for pair, good in zip(pairs, readable, strict=True) if good]
        self.skipped = [path for (path, _), good in zip(pairs, readable, strict=True) if not good]
        if self.skipped:
            warnings.warn(
                f"left out {len(self.skipped)} of {len(pairs)} pictures that cannot be read, such as {self.skipped[0]}",
                stacklevel=2,
            )
        if not self.pairs:
            raise SystemExit(f"none of the {len(pairs)} pictures in {folder} can be read, such as {self.skipped[0]}.")

    @property
    def name(self):
        """Stands for the content: another caption or a touched picture makes another cache."""
        content = [(str(path), path.stat().st_size, path.stat().st_mtime_ns, text) for path, text in self.pairs]
        return f"folder-{self.size}-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def split(self, every=20):
        """(training part, validation part): every 20th picture is held out; with fewer, both parts are everything."""
        if len(self) < every:
            return self, self
        parts = copy.copy(self), copy.copy(self)
        parts[0].pairs = [pair for i, pair in enumerate(self.pairs) if i % every != every - 1]
        parts[1].pairs = self.pairs[every - 1 :: every]
        return parts

    def __len__(self):
        return len(self.pairs)

    def caption(self, i):
        return self.pairs[i][1]

    def __getitem__(self, i):
        path, caption = self.pairs[i]
        return open_picture(path, self.size), caption


def to_tensor(pictures):
    """A list of equally large RGB pictures (PIL) -> (B, 3, H, W) float32 in [-1, 1]."""
    x = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # (B, H, W, 3) uint8
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x):
    """(B, 3, H, W) in [-1, 1] -> a list of B RGB pictures (PIL)."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(picture) for picture in x]
