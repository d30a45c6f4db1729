"""Pictures with captions: the shapes world, folders of your own, and the latents that training reads.

Three things live here, in the order in which a picture travels:

1. The *shapes world*: 64x64 pictures of one to four flat shapes, drawn on the fly, each with a caption of one of
   GenEval's six families (single object, two objects, counting, colors, position, color attribution). Item `i` of a
   split with a seed is always the same picture, so nothing is stored and every process agrees on the data.
2. *Folders*: any folder of pictures with captions (`x.png` beside `x.txt`, or Hugging Face's `metadata.jsonl`).
3. *Latents*: both kinds pass once through the frozen encoders (`encoders.py`); training reads the cached result. The
   paper trains in the latent space of SD3's autoencoder (Sec. 3.2), so no stage but the decoder's ever sees a pixel.

    python data.py --out shapes.png         # a captioned contact sheet of the shapes world
    python data.py --data DIR --out my.png  # the same for your own folder: does it load as you think?
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from checkpoint import save_atomically

# ------------------------------------------------------------------------------------------------------------------
# 1. The shapes world

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (222, 45, 38), "green": (42, 157, 68), "blue": (43, 96, 222),
    "yellow": (244, 196, 48), "purple": (148, 62, 190), "black": (28, 28, 32),
}  # fmt: skip
FAMILIES = ("single", "two", "counting", "colors", "position", "attribution")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4}
# These (color, shape) pairs never occur in the splits train and val, not even by chance: split `novel` is made of them.
# A model that draws them has learned color and shape as separate things, which is what composition means.
NOVEL_PAIRS = {("blue", "circle"), ("purple", "square"), ("yellow", "triangle"), ("green", "star")}
SPLITS = ("train", "val", "novel")
# How often training meets each family: the ones that name more are learned last, so they come more often.
FAMILY_WEIGHTS = {"single": 1, "two": 2, "counting": 3, "colors": 1, "position": 3, "attribution": 3}
SIDE, SUPERSAMPLING = 64, 4
RADII = {1: (9.0, 14.0), 2: (8.0, 12.0), 3: (7.0, 10.0), 4: (7.0, 9.0)}  # half the extent in pixels, by object count
GAP = 3.0  # pixels at least between the boxes of two objects, and 2 to the border


@dataclass(frozen=True)
class Thing:
    """One drawn object: centre (x, y) and half extent `radius`, in pixels of the 64x64 picture."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Phrase:
    """What a caption asks for: `count` objects of `shape`, in `color` (None: any)."""

    count: int
    color: str | None
    shape: str


@dataclass(frozen=True)
class Scene:
    """A caption with the picture that goes with it. `background` is an RGB triple, 0..255."""

    family: str
    caption: str
    things: tuple
    background: tuple


def parse_caption(caption):
    """Read a caption of the shapes world back into (phrases, relation or None). Raises ValueError on any other text.

    >>> parse_caption("a photo of a red circle left of a star")
    ([Phrase(count=1, color='red', shape='circle'), Phrase(count=1, color=None, shape='star')], 'left of')
    """
    text = caption.strip().lower().removeprefix("a photo of ")
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    phrases = []
    for part in text.split(f" {relation or 'and'} "):
        words = part.split()
        count = NUMBERS.get(words[0], 1 if words[0] in ("a", "an") else 0) if words else 0
        color = words[1] if len(words) == 3 else None
        shape = words[-1].removesuffix("s") if count > 1 else words[-1] if words else ""
        if not 2 <= len(words) <= 3 or count == 0 or shape not in SHAPES or (color and color not in COLORS):
            raise ValueError(f"not a caption of the shapes world: {caption!r} (try 'a photo of a red circle')")
        phrases.append(Phrase(count, color, shape))
    return phrases, relation


def family_of(caption):
    """The GenEval family that a shapes-world caption belongs to."""
    phrases, relation = parse_caption(caption)
    if relation:
        return "position"
    if phrases[0].count > 1:
        return "counting"
    if len(phrases) == 2:
        return "attribution" if phrases[0].color else "two"
    return "colors" if phrases[0].color else "single"


def _write_caption(phrases, relation=None):
    """The inverse of parse_caption."""
    words = {count: word for word, count in NUMBERS.items()}
    parts = []
    for p in phrases:
        color = f"{p.color} " if p.color else ""
        parts.append(f"{words[p.count]} {color}{p.shape}s" if p.count > 1 else f"a {color}{p.shape}")
    return "a photo of " + f" {relation or 'and'} ".join(parts)


def _draw_phrases(rng, family, novel):
    """Draw what the caption of `family` says. With `novel`, one phrase names a pair that training never saw."""

    def pick(options):
        return options[rng.integers(len(options))]

    def color_for(shape, other_than=None):
        return pick([c for c in COLORS if (c, shape) not in NOVEL_PAIRS and c != other_than])

    if novel:
        first_color, first = pick(sorted(NOVEL_PAIRS))
    else:
        first = pick(SHAPES)
        first_color = color_for(first)
    second = pick([s for s in SHAPES if s != first])
    second_color = color_for(second, other_than=first_color)
    named = novel or rng.random() < 0.5  # counting and position name the colors half of the time
    if family == "single":
        return [Phrase(1, None, first)], None
    if family == "two":
        return [Phrase(1, None, first), Phrase(1, None, second)], None
    if family == "counting":
        return [Phrase(int(rng.integers(2, 5)), first_color if named else None, first)], None
    if family == "colors":
        return [Phrase(1, first_color, first)], None
    pair = [Phrase(1, first_color, first), Phrase(1, second_color, second)]
    if rng.random() < 0.5:
        pair.reverse()
    if family == "attribution":
        return pair, None
    return [p if named else Phrase(1, None, p.shape) for p in pair], pick(RELATIONS)


def _place(rng, count, relation):
    """Centres and half extents (count, 3) such that nothing touches or is cut off, and `relation` holds clearly."""
    low, high = RADII[count]
    while True:
        radius = rng.uniform(low, high, count)
        margin = radius + 2
        xy = margin[:, None] + rng.random((count, 2)) * (SIDE - 2 * margin)[:, None]
        if relation:
            # The second object sits within 25 degrees of the named direction, seen from the first: no caption is
            # true of a picture by a hair's breadth, and none of the other three directions is true as well.
            dx, dy = xy[0] - xy[1]
            along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[
                relation
            ]
            if along <= 0 or abs(across) > math.tan(math.radians(25)) * along:
                continue
        apart = np.abs(xy[:, None] - xy[None]).max(-1) - (radius[:, None] + radius[None]) + 1e9 * np.eye(count)
        if apart.min() >= GAP:
            return np.concatenate([xy, radius[:, None]], axis=1)


def make_scene(split, seed, index, family=None):
    """Item `index` of `split` (train, val or novel) under `seed`: always the same Scene, in any process and order.

    `family` fixes the caption's family; otherwise it is drawn with FAMILY_WEIGHTS. The split `novel` knows only the
    four families that can name a color with a shape (counting, colors, position, attribution).
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    weights = {f: w for f, w in FAMILY_WEIGHTS.items() if split != "novel" or f not in ("single", "two")}
    if family is None:
        family = list(weights)[np.searchsorted(np.cumsum(list(weights.values())), rng.random() * sum(weights.values()))]
    elif family not in weights:
        raise ValueError(f"split {split!r} has no family {family!r}; it has {', '.join(weights)}")
    phrases, relation = _draw_phrases(rng, family, novel=split == "novel")
    wanted = [(p.color, p.shape) for p in phrases for _ in range(p.count)]
    things = []
    for (color, shape), (x, y, radius) in zip(wanted, _place(rng, len(wanted), relation), strict=True):
        if color is None:  # left open by the caption: the picture varies it
            free = [c for c in COLORS if (c, shape) not in NOVEL_PAIRS]
            color = free[rng.integers(len(free))]
        things.append(Thing(shape, color, float(x), float(y), float(radius)))
    background = np.clip(rng.integers(228, 250) + rng.integers(-4, 5, 3), 0, 255)
    return Scene(family, _write_caption(phrases, relation), tuple(things), tuple(int(v) for v in background))


def shape_outline(shape, x, y, radius):
    """Corner points [(x, y), ...] of a shape that fits the box of half extent `radius`; a circle has 64 of them."""
    if shape == "square":
        r = 0.88 * radius
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - 0.95 * radius), (x + radius, y + 0.85 * radius), (x - radius, y + 0.85 * radius)]
    if shape == "star":
        turns = [(math.pi * k / 5, radius * (1.05 if k % 2 == 0 else 0.45)) for k in range(10)]
    else:
        turns = [(2 * math.pi * k / 64, radius) for k in range(64)]
    return [(x + r * math.sin(a), y - r * math.cos(a)) for a, r in turns]


def draw(scene):
    """The scene as a 64x64 RGB picture (PIL), drawn at four times the size and averaged down."""
    k = SUPERSAMPLING
    big = Image.new("RGB", (SIDE * k, SIDE * k), scene.background)
    pen = ImageDraw.Draw(big)
    for thing in scene.things:
        pen.polygon([(px * k, py * k) for px, py in shape_outline(thing.shape, thing.x, thing.y, thing.radius)],
                    fill=COLORS[thing.color])  # fmt: skip
    return big.reduce(k)


@functools.lru_cache
def _fingerprint_of_drawing():
    """A hash of what sample pictures look like: whoever changes the drawing or the captions gets a new cache."""
    scenes = [make_scene("train", 0, i) for i in range(32)]
    return hashlib.sha256(b"".join(draw(s).tobytes() + s.caption.encode() for s in scenes)).hexdigest()[:8]


class ShapesWorld:
    """A sequence of (picture, caption): `len` items of one split. Nothing is stored, every item is drawn when asked."""

    def __init__(self, split="train", seed=0, length=1000, family=None):
        self.split, self.seed, self.length, self.family = split, seed, length, family
        self.name = f"shapes-{split}-{seed}-{length}-{family}-{_fingerprint_of_drawing()}"

    def __len__(self):
        return self.length

    def scene(self, i):
        return make_scene(self.split, self.seed, i, self.family)

    def caption(self, i):
        return self.scene(i).caption

    def __getitem__(self, i):
        scene = self.scene(i)
        return draw(scene), scene.caption


# ------------------------------------------------------------------------------------------------------------------
# 2. Folders of your own

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
                top = (
                    65535.0
                    if picture.mode.startswith("I;16") or values.max() > 255
                    else 255.0
                    if values.max() > 1
                    else 1.0
                )
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


def list_captions(folder):
    """[(picture path, caption)] of a folder: `metadata.jsonl` (file_name, text) if it has one, else x.png + x.txt.

    Raises SystemExit with one sentence when the folder does not exist or holds no captioned picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SystemExit(f"no such folder: {folder}. Give --data a folder of pictures with captions.")
    pairs, metadata = [], folder / "metadata.jsonl"
    if metadata.is_file():
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


class CaptionedFolder:
    """A sequence of (picture, caption) from a folder. Unreadable pictures are left out, counted, and named once.

    Raises SystemExit when the folder, its captions, or every one of its pictures cannot be read.
    """

    def __init__(self, folder, size=SIDE):
        self.size = size
        pairs, self.pairs, self.skipped = list_captions(folder), [], []
        for path, caption in tqdm(pairs, desc="checking pictures", disable=len(pairs) < 500):
            try:
                open_picture(path)
                self.pairs.append((path, caption))
            except OSError:
                self.skipped.append(path)
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


# ------------------------------------------------------------------------------------------------------------------
# 3. Latents and text states, computed once by the frozen encoders


@dataclass
class Latents:
    """What training reads. N pictures, K distinct captions; caption 0 is the empty one (dropped captions use it).

    latents (N, 16, h, w) float16, model latents; caption_ids (N,) int64 into `captions`;
    states (K, T, D) float16, mask (K, T) bool, pooled (K, P) float16: see FrozenEncoders.encode_text.
    """

    latents: torch.Tensor
    caption_ids: torch.Tensor
    captions: list
    states: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor

    def __len__(self):
        return len(self.latents)

    def batch(self, seed, step, size):
        """(latents (B, 16, h, w) float32, caption_ids (B,)) of one training step."""
        index = self.indices(seed, step, size)
        return self.latents[index].float(), self.caption_ids[index]

    def indices(self, seed, step, size):
        """Which pictures a step sees, (B,): a pure function of (seed, step), so a resume needs no saved order.

        The pictures come in a new random order every epoch.
        """
        index, start, n = [], step * size, len(self)
        for epoch in range(start // n, (start + size - 1) // n + 1):
            order = _epoch_order(seed, epoch, n)
            index.append(order[max(0, start - epoch * n) : start + size - epoch * n])
        return torch.cat(index)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=rng(seed, epoch, 0))


def rng(*key):
    """A torch.Generator seeded by integers such as (seed, step, rank): the same key, the same random numbers."""
    digest = hashlib.sha256(repr(tuple(int(k) for k in key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def _cached(path, compute):
    """The tensors and captions in a safetensors file, or what `compute()` returns, saved there for the next run."""
    if path.is_file():
        try:
            with safetensors.safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["captions"])  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, TypeError):
            warnings.warn(f"{path} is damaged; computing it again", stacklevel=3)
    tensors, captions = compute()
    save_atomically(lambda p: safetensors.torch.save_file(tensors, p, {"captions": json.dumps(captions)}), path)
    return tensors, captions


def encode_dataset(dataset, encoders, cache="runs/cache", batch=None):
    """Pass a dataset through the frozen encoders once: Latents, cached as two safetensors files under `cache`.

    The files' names are hashes of the dataset's content and of the encoders' weights, so another picture, caption or
    encoder never meets an old cache. `batch` defaults to as many pictures as make 64 of 128x128 pixels.
    """
    batch = batch or max(1, 64 * 128**2 // math.prod(dataset[0][0].size))

    def key(*parts):
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def encode_pictures():
        captions, ids, latents = {"": 0}, [], []
        bar = tqdm(total=len(dataset), desc="encoding pictures", unit=" pictures", mininterval=1)
        for start in range(0, len(dataset), batch):
            items = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
            latents.append(
                encoders.encode_pictures(to_tensor([picture for picture, _ in items])).half().cpu().contiguous()
            )
            ids += [captions.setdefault(caption, len(captions)) for _, caption in items]
            bar.update(len(items))
        bar.close()
        return {"latents": torch.cat(latents), "caption_ids": torch.tensor(ids)}, list(captions)

    def encode_captions():
        text = [encoders.encode_text(captions[start : start + batch]) for start in range(0, len(captions), batch)]
        states, mask, pooled = (torch.cat(column).cpu() for column in zip(*text, strict=True))
        return {"states": states.half(), "mask": mask, "pooled": pooled.half()}, captions

    name = key(dataset.name, encoders.fingerprint("vae"))
    pictures, captions = _cached(Path(cache) / f"latents-{name}.safetensors", encode_pictures)
    name = key(*captions, encoders.fingerprint("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    text, _ = _cached(Path(cache) / f"text-{name}.safetensors", encode_captions)
    return Latents(captions=captions, **pictures, **text)


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw a captioned contact sheet of a data set.")
    p.add_argument("--data", metavar="DIR", help="folder of pictures with captions; without it, the shapes world")
    p.add_argument("--split", choices=SPLITS, default="train", help="of the shapes world (default: train)")
    p.add_argument("--seed", type=int, default=0, help="of the shapes world (default: 0)")
    p.add_argument("--n", type=int, default=24, help="pictures (default: 24)")
    p.add_argument("--out", metavar="FILE", default="data.png", help="where to write the sheet (default: data.png)")
    args = p.parse_args(argv)
    if args.n < 1 or args.seed < 0:
        raise SystemExit("--n must be at least 1, and --seed at least 0.")
    pictures = CaptionedFolder(args.data, 128) if args.data else ShapesWorld(args.split, args.seed, args.n)
    items = [pictures[i] for i in range(min(args.n, len(pictures)))]
    side, columns, font = 128, 4, ImageFont.load_default(11)
    sheet = Image.new("RGB", (columns * 310, math.ceil(len(items) / columns) * (side + 24)), "white")
    for i, (picture, caption) in enumerate(items):
        x, y = i % columns * 310 + 4, i // columns * (side + 24)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y + 18))
        ImageDraw.Draw(sheet).text((x, y + 3), caption[:52], fill="black", font=font)
    save_atomically(sheet.save, args.out)
    print(f"wrote {args.out}: {len(items)} of {len(pictures)} pictures")


if __name__ == "__main__":
    main()
