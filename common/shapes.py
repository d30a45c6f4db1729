"""The shapes world: 64x64 pictures of one to four flat shapes, each with a caption of one of GenEval's six families.

Everything at class scale is trained and judged on it. Item `i` of a split with a seed is always the same picture, whatever
the process or the order, so nothing is stored and every process agrees on the data.

    python data.py --out sheet.png          # what it looks like
"""

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

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


def write_caption(phrases, relation=None):
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
    return Scene(family, write_caption(phrases, relation), tuple(things), tuple(int(v) for v in background))


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
