"""The class world: 128x128 pictures of one to four drawn things, each with a caption of one of GenEval's six
families.

Everything at class scale is trained and judged on it. Item `i` of a split with a seed is always the same
picture, whatever the process or the order, so nothing is stored and every process agrees on the data. The
things are in common/things.py.

    python data.py --out sheet.png                    # what it looks like
    python data.py --thing cat --out cat.png          # one thing in its poses and colors

Captions are GenEval's own ("a photo of a purple dog and a black chair"), so its prompts are read as they are
where they name only what is known here. What a caption does not tell apart looks alike in the picture: three
bananas are three of the same banana, so places far apart must agree.
"""

import functools
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.things import THINGS, Pen

COLORS = {  # GenEval's ten, RGB
    "red": (214, 48, 44), "orange": (240, 138, 30), "yellow": (246, 208, 52), "green": (58, 158, 76), "blue": (50, 104, 222),
    "purple": (146, 68, 192), "pink": (242, 132, 182), "brown": (136, 90, 54), "black": (46, 46, 52), "white": (246, 246, 242),
}  # fmt: skip
FAMILIES = ("single", "two", "counting", "colors", "position", "attribution")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4}
# These (color, thing) pairs never occur in the splits train and val, not even by chance: the split `novel` is
# made of them. A model that draws them has learned color and thing as separate ideas, which is what
# composition means.
NOVEL_PAIRS = {
    ("green", "cat"), ("pink", "car"), ("yellow", "umbrella"), ("red", "giraffe"), ("blue", "banana"), ("orange", "cup"),
    ("white", "apple"), ("black", "donut"), ("brown", "boat"), ("purple", "clock"), ("pink", "bear"), ("green", "bus"),
}  # fmt: skip
SPLITS = ("train", "val", "novel")
# How often training meets each family: the ones that name more are learned last, so they come more often.
FAMILY_WEIGHTS = {"single": 1, "two": 2, "counting": 3, "colors": 1, "position": 3, "attribution": 3}
SIDE, SUPERSAMPLING = 128, 4
RADII = {
    1: (32.0, 46.0),
    2: (24.0, 29.0),
    3: (19.0, 24.0),
    4: (17.0, 21.0),
}  # half the extent in pixels, by object count
GAP = 4.0  # pixels at least between the boxes of two things, and 2 to the border
CONTRAST = 100, 58  # RGB distance at least from the ground to a main color, and to any color of a thing
PLURALS = {kind.plural or name + "s": name for name, kind in THINGS.items()}


@dataclass(frozen=True)
class Look:
    """How a thing is drawn: main color RGB, pose as four numbers in [0, 1), mirrored or not, half extent in
    pixels."""

    name: str
    rgb: tuple
    pose: tuple
    flip: bool
    radius: float


@dataclass(frozen=True)
class Thing:
    """One thing of a picture: centre (x, y) in pixels, its look, the color that the caption names or None."""

    x: float
    y: float
    look: Look
    color: str | None


@dataclass(frozen=True)
class Phrase:
    """What a caption asks for: `count` things called `name`, in `color` (None: any)."""

    count: int
    color: str | None
    name: str


@dataclass(frozen=True)
class Scene:
    """A caption with the picture that goes with it. `ground`: RGB at the left or upper end, RGB at the other,
    vertical."""

    family: str
    caption: str
    things: tuple
    ground: tuple


# ------------------------------------------------------------------------------------------------------------
# Captions


def parse_caption(caption):
    """Read a caption of the class world back into (phrases, relation or None). Raises ValueError on any other
    text.

    >>> parse_caption("a photo of a red apple left of a potted plant")
    ([Phrase(count=1, color='red', name='apple'), Phrase(count=1, color=None, name='potted plant')], 'left
    of')
    """
    text = caption.strip().lower().removesuffix(".").removeprefix("a photo of ")
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    phrases = [_parse_phrase(part) for part in text.split(f" {relation or 'and'} ")]
    if None in phrases or len(phrases) > 2 or (len(phrases) == 2 and any(p.count > 1 for p in phrases)):
        raise ValueError(f"not a caption of the class world: {caption!r} (try 'a photo of a red apple')")
    return phrases, relation


def _parse_phrase(text):
    article, _, rest = text.partition(" ")
    count = 1 if article in ("a", "an") else NUMBERS.get(article)
    names = PLURALS if count and count > 1 else {name: name for name in THINGS}
    if count and rest in names:  # before colors: "an orange" is a thing
        return Phrase(count, None, names[rest])
    color, _, rest = rest.partition(" ")
    return Phrase(count, color, names[rest]) if count and color in COLORS and rest in names else None


def write_caption(phrases, relation=None):
    """The inverse of parse_caption."""
    words = {count: word for word, count in NUMBERS.items()}
    parts = []
    for p in phrases:
        name = (THINGS[p.name].plural or p.name + "s") if p.count > 1 else p.name
        said = f"{p.color} {name}" if p.color else name
        parts.append(f"{words[p.count] if p.count > 1 else 'an' if said[0] in 'aeiou' else 'a'} {said}")
    return "a photo of " + f" {relation or 'and'} ".join(parts)


def family_of(caption):
    """The GenEval family that a caption of the class world belongs to."""
    phrases, relation = parse_caption(caption)
    if relation:
        return "position"
    if phrases[0].count > 1:
        return "counting"
    if len(phrases) == 2:
        return "attribution" if any(p.color for p in phrases) else "two"
    return "colors" if phrases[0].color else "single"


@functools.cache
def vocabulary():
    """Every word that a caption of the class world may hold, as a sorted tuple."""
    phrases = [*THINGS, *PLURALS, *COLORS, *RELATIONS, *NUMBERS, "a photo of an and"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def unknown_words(prompt):
    """Those words of a prompt that no caption of the class world holds, in order."""
    return [
        word
        for word in prompt.lower().replace(",", " ").replace(".", " ").split()
        if word not in vocabulary()
    ]


def read_geneval(path):
    """GenEval's own prompt file (evaluation_metadata.jsonl), as far as this world knows its things.

    Returns ([(tag, prompt), ...], Counter of the words because of which the other prompts are left out).
    Raises SystemExit with one sentence when it cannot be read, or nothing in it is known here.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        pairs = [(row["tag"], row["prompt"]) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path} is not GenEval's evaluation_metadata.jsonl, a JSON object with a tag and a prompt a line: "
                         f"{error!r}.") from error  # fmt: skip
    known, left_out = [], Counter()
    for tag, prompt in pairs:
        try:
            parse_caption(prompt)
            known.append((tag, prompt))
        except ValueError:
            left_out[" ".join(unknown_words(prompt)) or prompt] += 1
    if not known:
        raise SystemExit(f"no prompt of {path} names only things of the class world: {', '.join(THINGS)}.")
    return known, left_out


# ------------------------------------------------------------------------------------------------------------
# Scenes


def _draw_phrases(rng, family, novel):
    """Draw what the caption of `family` says. With `novel`, one phrase names a pair that training never
    saw."""

    def pick(options):
        return options[rng.integers(len(options))]

    def color_for(name, other_than=None):
        return pick([c for c in COLORS if (c, name) not in NOVEL_PAIRS and c != other_than])

    if novel:
        first_color, first = pick(sorted(NOVEL_PAIRS))
    else:
        first = pick(list(THINGS))
        first_color = color_for(first)
    second = pick([name for name in THINGS if name != first])
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
    return [p if named else Phrase(1, None, p.name) for p in pair], pick(RELATIONS)


def _place(rng, radii, relation):
    """Centres (count, 2) such that the boxes of half extents `radii` (count,) do not touch, and `relation`
    holds clearly."""
    margin, count, tries = radii + 2, len(radii), 32
    touching = radii[:, None] + radii[None] + GAP - 1e9 * np.eye(count)
    while True:
        xy = margin[:, None] + rng.random((tries, count, 2)) * (SIDE - 2 * margin)[:, None]
        good = (np.abs(xy[:, :, None] - xy[:, None]).max(-1) >= touching).all((1, 2))
        if relation:
            # The second thing sits within 25 degrees of the named direction, seen from the first: no caption
            # is true of a picture by a hair's breadth, and none of the other three directions is true as
            # well.
            dx, dy = (xy[:, 0] - xy[:, 1]).T
            directions = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}
            along, across = directions[relation]
            good &= np.abs(across) <= math.tan(math.radians(25)) * along
        if good.any():
            return xy[good.argmax()]


def _pick_ground(rng, looks):
    """A pale or dark shade, a third of the time with a gradient, on which every thing stands out: see
    CONTRAST."""
    looks = dict.fromkeys(looks)  # each once
    fills = np.array([rgb for look in looks for rgb in sorted(fills_of(look))], dtype=float)
    mains = np.array([look.rgb for look in looks], dtype=float)
    to_main, to_any = CONTRAST
    for attempt in range(200):
        light = rng.uniform(186, 232) if rng.random() < 0.65 else rng.uniform(56, 180)
        first = light + rng.uniform(-16, 16, 3)
        second = first + (rng.uniform(-22, 22, 3) if rng.random() < 1 / 3 else 0)
        ends = np.clip([first, second], 0, 255)
        near_main = np.linalg.norm(ends[:, None] - mains, axis=-1).min()
        near_any = np.linalg.norm(ends[:, None] - fills, axis=-1).min()
        if near_main >= to_main and near_any >= to_any:
            break
        if attempt % 40 == 39:  # rare: two things whose colors leave little room
            to_main, to_any = 0.8 * to_main, 0.7 * to_any
    return (*(tuple(int(v) for v in end) for end in ends), bool(rng.random() < 0.5))


def make_scene(split, seed, index, family=None):
    """Item `index` of `split` (train, val or novel) under `seed`: always the same Scene, in any process and
    order.

    `family` fixes the caption's family; otherwise it is drawn with FAMILY_WEIGHTS. The split `novel` knows
    only the four families that can name a color with a thing (counting, colors, position, attribution).
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    weights = {f: w for f, w in FAMILY_WEIGHTS.items() if split != "novel" or f not in ("single", "two")}
    if family is None:
        edges = np.cumsum(list(weights.values()))
        family = list(weights)[np.searchsorted(edges, rng.random() * edges[-1])]
    elif family not in weights:
        raise ValueError(f"split {split!r} has no family {family!r}; it has {', '.join(weights)}")
    phrases, relation = _draw_phrases(rng, family, novel=split == "novel")
    return scene_of(phrases, relation, rng)


def scene_of(phrases, relation, rng):
    """A Scene that shows what a caption says; what it leaves open is drawn from `rng`, a numpy Generator."""
    low, high = RADII[sum(p.count for p in phrases)]
    looks = []
    for p in phrases:  # one look for all things of a phrase
        free = THINGS[p.name].colors
        rgb = COLORS[p.color] if p.color else free[rng.integers(len(free))]
        pose = tuple(rng.random(4).tolist())
        looks += p.count * [
            (Look(p.name, rgb, pose, bool(rng.random() < 0.5), float(rng.uniform(low, high))), p.color)
        ]
    places = _place(rng, np.array([look.radius for look, _ in looks]), relation)
    things = tuple(Thing(float(x), float(y), *look) for (x, y), look in zip(places, looks, strict=True))
    caption = write_caption(phrases, relation)
    return Scene(family_of(caption), caption, things, _pick_ground(rng, [look for look, _ in looks]))


# ------------------------------------------------------------------------------------------------------------
# Drawing


class _FillsOf:
    """In place of ImageDraw: notes the colors and draws nothing."""

    def __init__(self):
        self.colors = set()

    def polygon(self, points, fill, **_):
        self.colors.add(fill)

    ellipse = line = polygon


@functools.lru_cache(10_000)
def fills_of(look):
    """All colors that a look is drawn in."""
    notes = _FillsOf()
    THINGS[look.name].draw(Pen(notes, 0, 0, 1), look.rgb, look.pose)
    return notes.colors


@functools.lru_cache(1000)
def sprite(look, x=0.5, y=0.5):
    """A look drawn alone: (colors (S, S, 3) times coverage, coverage (S, S, 1)), float32, 0..255 and 0..1; S
    = 2 radius + 4 px.

    (x, y) in [0, 1) is where within a pixel the centre lies.
    """
    k, half = SUPERSAMPLING, math.ceil(look.radius) + 2
    big = Image.new("RGBA", (2 * half * k, 2 * half * k))
    pen = Pen(ImageDraw.Draw(big), (half + x) * k, (half + y) * k, look.radius * k, look.flip)
    THINGS[look.name].draw(pen, look.rgb, look.pose)
    small = np.asarray(
        big.convert("RGBa").reduce(k), dtype=np.float32
    )  # RGBa: colors times coverage, so edges stay clean
    return small[..., :3], small[..., 3:] / 255


def draw(scene):
    """The scene as a 128x128 RGB picture (PIL), things drawn at four times the size and averaged down."""
    first, second, vertical = scene.ground
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None]
    ground = (1 - ramp) * np.array(first, np.float32) + ramp * np.array(second, np.float32)  # (128, 3)
    picture = np.broadcast_to(ground[:, None] if vertical else ground[None], (SIDE, SIDE, 3)).copy()
    for thing in scene.things:
        color, cover = sprite(thing.look)
        half, x, y = len(cover) // 2, int(thing.x), int(thing.y)
        top, left = max(0, y - half), max(0, x - half)
        there = picture[top : y + half, left : x + half]
        here = np.s_[
            top - y + half : top - y + half + there.shape[0],
            left - x + half : left - x + half + there.shape[1],
        ]
        there *= 1 - cover[here]
        there += color[here]
    return Image.fromarray(np.rint(picture).astype(np.uint8))


def poses_of(name, columns=8, seed=0):
    """Rows of pictures (PIL) of one thing: a row for each color that it has in life, then for each of GenEval's ten.

    Raises SystemExit with one sentence when there is no such thing.
    """
    if name not in THINGS:
        raise SystemExit(f"the class world has no thing {name!r}; it has {', '.join(THINGS)}.")
    rng, rows = np.random.default_rng(seed), []
    for rgb in (*THINGS[name].colors, *COLORS.values()):
        looks = [Look(name, rgb, tuple(rng.random(4).tolist()), bool(i % 2), 54.0) for i in range(columns)]
        ground = _pick_ground(rng, looks)
        middle = SIDE / 2
        rows.append([draw(Scene("single", "", (Thing(middle, middle, look, None),), ground)) for look in looks])
    return rows


@functools.cache
def check_things():
    """Raises SystemExit with one sentence when a thing of common/things.py draws nothing or leaves its box,
    in some pose."""
    for name, kind in THINGS.items():
        for pose in (4 * (0.0,), 4 * (0.5,), 4 * (0.99,)):
            _, cover = sprite(Look(name, kind.colors[0], pose, False, 20.0))
            share, edge = (
                float(cover.mean()),
                float(max(cover[0].max(), cover[-1].max(), cover[:, 0].max(), cover[:, -1].max())),
            )
            if share < 0.03:
                raise SystemExit(
                    f"the thing {name!r} draws nothing in pose {pose}: its shapes belong into the box [-1, 1]."
                )
            if share > 0.95 or edge > 0:
                raise SystemExit(
                    f"the thing {name!r} fills the picture in pose {pose}: keep its shapes within [-1, 1]."
                )


@functools.lru_cache
def _fingerprint_of_drawing():
    """A hash of what sample pictures look like: whoever changes the drawing or the captions gets a new
    cache."""
    scenes = [make_scene("train", 0, i) for i in range(64)]
    return hashlib.sha256(b"".join(draw(s).tobytes() + s.caption.encode() for s in scenes)).hexdigest()[:8]


class ThingsWorld:
    """A sequence of (picture, caption): `len` items of one split. Nothing is stored, every item is drawn when
    asked."""

    def __init__(self, split="train", seed=0, length=1000, family=None):
        check_things()
        self.split, self.seed, self.length, self.family = split, seed, length, family
        self.name = f"things-{split}-{seed}-{length}-{family}-{_fingerprint_of_drawing()}"

    def __len__(self):
        return self.length

    def scene(self, i):
        return make_scene(self.split, self.seed, i, self.family)

    def caption(self, i):
        return self.scene(i).caption

    def __getitem__(self, i):
        scene = self.scene(i)
        return draw(scene), scene.caption
