"""The detector of mini-GenEval: which things are in a picture of the class world, where, in which color, and
how purely.

A picture's ground is a plane in each color channel; what differs from it falls into pieces. Each piece is
compared with drawn examples of every thing in many poses. An example keeps how its pixels depend on the main
color c,

    pixel = alpha c + beta,

alpha (from 0 at a detail to 1) and beta (RGB) from drawing it once in black and once in white, since every
shade is affine in c. So the best c for a piece is a least-squares fit, and what then remains unexplained says
how well the example
fits: outline and inner pattern in one number. Purity is the share of the thing's pixels that agree with a
single c.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from common.arguments import Parser, integer
from common.things import THINGS
from common.world import (
    COLORS,
    NUMBERS,
    SIDE,
    Look,
    draw,
    fills_of,
    make_scene,
    parse_caption,
    sprite,
    write_caption,
)

GRID = 24  # pieces and examples are compared at this size
POSES = 40  # examples of each thing, each of them also mirrored
EDGE = 24.0  # RGB distance from the ground at which something begins
SPECK = 30  # pixels; less is not looked at
BLUR, ASPECT = 0.8, 0.1  # cells; how far the logarithm of width by height may be off
SAME = 0.8  # a piece is a thing when an example explains this share of how it differs from the ground
ALIKE = 10  # examples that must agree where the main color is
EDGES = 0.25  # share of the cells that may be edges
PURE = 0.90  # share of a thing's pixels that must have its main color
NAMES = tuple(THINGS)
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Detection:
    """A found thing: its name ("unknown" if it is like no example), the nearest of GenEval's colors, centre
    (x, y) of its box and the box's size in pixels; how well the best example explains it, and the purity of
    its color, both 0..1."""

    name: str
    color: str
    x: float
    y: float
    width: float
    height: float
    likeness: float
    purity: float


@dataclass(frozen=True)
class Examples:
    """T examples at GRID x GRID = G cells: cover (T, G), alpha (T, G), beta (T, G, 3); names (T,) as indices into
    NAMES; aspect (T,), the logarithm of width by height."""

    names: np.ndarray
    aspect: np.ndarray
    cover: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray


def square_of(mask):
    """The square (left, top, right, bottom) around a mask's box, in pixels, with the box (left, top, width,
    height)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return (x - half, y - half, x + half, y + half), (left, top, right - left, bottom - top)


def to_grid(channels, square):
    """(H, W, C) float -> (GRID, GRID, C): what lies in the square (left, top, right, bottom), averaged to the
    grid; outside, 0."""
    left, top, right, bottom = square
    pad = int(max(0, -left, -top, right - channels.shape[1], bottom - channels.shape[0])) + 1
    wide = np.pad(channels, ((pad, pad), (pad, pad), (0, 0)))
    box = (left + pad, top + pad, right + pad, bottom + pad)
    size, how = (GRID, GRID), Image.Resampling.BILINEAR
    layers = [
        Image.fromarray(np.ascontiguousarray(wide[..., k], dtype=np.float32)) for k in range(wide.shape[-1])
    ]
    return np.stack([np.asarray(layer.resize(size, how, box=box)) for layer in layers], axis=-1)


def soften(cells):
    """(GRID, GRID, C) -> the same, blurred by a cell: so a line that lies half a cell elsewhere is still like itself."""
    return ndimage.gaussian_filter(cells, (BLUR, BLUR, 0))


@functools.cache
def examples(soft=False):
    """The Examples that every piece is compared with, drawn once a process; `soft`: blurred."""
    rng, names, aspect, rows = np.random.default_rng(0), [], [], []
    for index, name in enumerate(NAMES):
        for pose in [*itertools.product((0.02, 0.98), repeat=3), *rng.random((POSES - 8, 3)).tolist()]:
            for flip in (False, True):
                look = Look(name, (0, 0, 0), (*pose, rng.random()), flip, 40.0)
                dark, covered = sprite(look)
                light, _ = sprite(replace(look, rgb=(255, 255, 255)))
                square, (_, _, width, height) = square_of(covered[..., 0] > 0.3)
                cells = to_grid(np.concatenate([covered, (light - dark)[..., :1] / 255, dark], axis=-1), square)
                rows.append((soften(cells) if soft else cells).reshape(-1, 5))
                names.append(index)
                aspect.append(math.log(width / height))
    cells = np.array(rows, dtype=np.float32)  # (T, G, 5)
    parts = (np.ascontiguousarray(part) for part in (cells[..., 0], cells[..., 1], cells[..., 2:]))
    return Examples(np.array(names), np.array(aspect), *parts)


@functools.cache
def _products():
    """Sums over cells that any comparison needs, (T,) or (T, 3)."""
    e = examples(soft=True)
    return {
        "bb": (e.beta**2).sum((1, 2)), "bm": (e.beta * e.cover[..., None]).sum(1), "mm": (e.cover**2).sum(1),
        "ab": (e.beta * e.alpha[..., None]).sum(1), "am": (e.alpha * e.cover).sum(1), "aa": (e.alpha**2).sum(1),
    }  # fmt: skip


def compare(piece, ground):
    """How well each example explains a piece: (likeness (T,), best main color of each (T, 3)).

    piece: (GRID, GRID, 3), how the pixels differ from the ground; ground: RGB (3,).
    An example predicts alpha c + beta - cover ground. Likeness is 1 - |piece - prediction|^2 / |piece|^2.
    """
    e, s, d = examples(soft=True), _products(), soften(piece).reshape(-1, 3)
    dm, da = e.cover @ d, e.alpha @ d  # (T, 3)
    db = e.beta.reshape(len(e.beta), -1) @ d.ravel()
    energy = (d**2).sum()
    rest = (
        energy - 2 * (db - dm @ ground) + s["bb"] - 2 * s["bm"] @ ground + s["mm"] * (ground**2).sum()
    )  # |d - b + m g|^2
    toward = da - s["ab"] + s["am"][:, None] * ground  # sum of alpha (d - b + m g)
    color = np.clip(toward / s["aa"][:, None], 0, 255)
    error = rest - 2 * (color * toward).sum(1) + s["aa"] * (color**2).sum(1)
    return 1 - error / max(energy, 1e-6), color


def purity_of(piece, ground, likeness, k):
    """(main color RGB, share of the pixels that have it): of a piece that is most like example k. The color
    is the median.

    Looked at are those cells which the best examples of the thing all paint in the main color: no sprinkle of
    a donut, wherever it lies, counts as another color. A cell on the way from the main color to the ground or
    to a detail is an edge that lies a
    little elsewhere than in the examples: it counts neither way, if such cells are few.
    """
    e = examples()
    same = np.flatnonzero(e.names == e.names[k])
    best = same[np.argsort(-likeness[same])[:ALIKE]]
    inside = (e.alpha[best] > 0.5).all(0) & (e.cover[best] > 0.97).all(0)
    if inside.sum() < 6:
        inside = e.alpha[k] > 0.4
    seen = piece.reshape(-1, 3)[inside] + ground - e.beta[k][inside]
    colors = seen / np.maximum(e.alpha[k][inside], 0.3)[:, None]
    main = np.median(colors, axis=0)
    pure = np.linalg.norm(colors - main, axis=1) < 60
    rgb = tuple(int(v) for v in np.clip(main, 0, 255))
    details = {
        fill
        for corner in (0.0, 0.99)
        for fill in fills_of(Look(NAMES[e.names[k]], rgb, 4 * (corner,), False, 1.0))
    }
    ways = np.array([ground, *sorted(details - {rgb})]) - main  # (K, 3)
    along = np.clip((colors - main) @ ways.T / np.maximum((ways**2).sum(1), 1), 0, 1)  # (N, K)
    edge = ~pure & (np.linalg.norm(colors[:, None] - main - along[..., None] * ways, axis=-1).min(1) < 40)
    counted = ~edge if edge.mean() <= EDGES else np.ones_like(edge)
    return main, float(pure[counted].mean())


def fit_ground(pixels):
    """The ground of a picture (H, W, 3): in each channel a plane through what lies near the border and
    whatever agrees with it."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    plane = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3)
    flat = pixels.reshape(-1, 3)
    border = (np.maximum(abs(x), abs(y)) > 0.9).ravel()
    ground, near = np.broadcast_to(np.median(flat[border], axis=0), flat.shape), border
    for limit in (60, 40, 30, 20):
        near = (np.linalg.norm(flat - ground, axis=1) < limit) & (border if limit == 60 else True)
        if near.sum() < 100:
            break
        ground = plane @ np.linalg.lstsq(plane[near], flat[near], rcond=None)[0]
    return ground.reshape(pixels.shape).astype(np.float32)


def detect(picture):
    """All things in an RGB picture (PIL) of the class world, largest first."""
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = fit_ground(pixels)
    difference = pixels - ground
    # Where black meets white, a line of pixels may have the very grey of the ground: closing mends the cut.
    something = np.pad(np.linalg.norm(difference, axis=-1) > EDGE, 2)
    something = ndimage.binary_closing(something, np.ones((3, 3)))[2:-2, 2:-2]
    labels, _ = ndimage.label(something, np.ones((3, 3)))
    found = []
    for index in range(1, labels.max() + 1):
        mask = labels == index
        if mask.sum() < SPECK:
            continue
        square, (left, top, width, height) = square_of(mask)
        halo = ndimage.binary_dilation(mask, iterations=1)[..., None]
        piece = to_grid(difference * halo, square)
        color_below = ground[mask].mean(0)
        likeness, _ = compare(piece, color_below)
        off = ASPECT + 2 / min(width, height)  # a narrow piece is soon a pixel too wide
        likeness[np.abs(examples().aspect - math.log(width / height)) > off] = -1.0
        k = int(likeness.argmax())
        main, purity = purity_of(piece, color_below, likeness, k)
        color = list(COLORS)[int(np.linalg.norm(PALETTE - main, axis=1).argmin())]
        name = NAMES[examples().names[k]] if likeness[k] >= SAME else "unknown"
        found.append(Detection(name, color, left + width / 2, top + height / 2, float(width), float(height),
                               float(likeness[k]), purity))  # fmt: skip
    return sorted(found, key=lambda d: -d.width * d.height)


# ------------------------------------------------------------------------------------------------------------
# Does a caption hold?


def holds(caption, detections):
    """True if the detections are exactly what the caption says, nothing else is there, and each thing is of
    one color."""
    phrases, relation = parse_caption(caption)
    wanted = [phrase for phrase in phrases for _ in range(phrase.count)]
    if len(detections) != len(wanted) or any(d.purity < PURE for d in detections):
        return False
    return any(  # some way to tell which thing is which
        all(d.name == p.name and p.color in (None, d.color) for d, p in zip(order, wanted, strict=True))
        and (relation is None or is_on_side(order[0], order[1], relation))
        for order in itertools.permutations(detections)
    )


def is_on_side(first, second, relation):
    """GenEval's rule: a small overlap along an axis does not count, and 60 degrees to either side of an axis
    do."""
    offset = np.array([first.x - second.x, first.y - second.y])
    slack = 0.1 * np.array([first.width + second.width, first.height + second.height])
    offset = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0)
    if not offset.any():
        return False
    x, y = offset / np.linalg.norm(offset)
    return bool({"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}[relation])


def falsify(caption, rng):
    """The caption with one idea exchanged so that it is false of its picture: a thing, color, number or
    side."""
    phrases, relation = parse_caption(caption)
    choices = [("relation", 0)] if relation else []
    for i, phrase in enumerate(phrases):
        choices += (
            [("name", i)]
            + ([("color", i)] if phrase.color else [])
            + ([("count", i)] if phrase.count > 1 else [])
        )
    what, i = choices[rng.integers(len(choices))]

    def other(options, than):
        options = [option for option in options if option != than]
        return options[rng.integers(len(options))]

    if what == "relation":
        pairs = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return write_caption(phrases, pairs[relation])
    if what == "name":
        used = {phrase.name for phrase in phrases}
        phrases[i] = replace(phrases[i], name=other([n for n in NAMES if n not in used], None))
    elif what == "color":
        phrases[i] = replace(phrases[i], color=other(list(COLORS), phrases[i].color))
    else:
        phrases[i] = replace(phrases[i], count=other(list(NUMBERS.values()), phrases[i].count))
    return write_caption(phrases, relation)


@functools.cache
def most_alike():
    """{name: the thing that is most easily taken for it}, by the best likeness between their examples, in one
    color each."""
    e, alike = examples(), {}
    ground = np.full(3, 205.0, np.float32)
    for index, name in enumerate(NAMES):
        best = {}
        for k in np.flatnonzero(e.names == index)[::8]:
            piece = e.alpha[k][:, None] * PALETTE[4] + e.beta[k] - e.cover[k][:, None] * ground
            likeness, _ = compare(piece.reshape(GRID, GRID, 3), ground)
            for other in range(len(NAMES)):
                if other != index:
                    best[other] = max(best.get(other, -1), likeness[e.names == other].max())
        alike[name] = NAMES[max(best, key=best.get)]
    return alike


# ------------------------------------------------------------------------------------------------------------
# The detector itself, on pictures whose truth is known


def spoil(scene, how, rng):
    """A picture of the scene in which one thing is wrong: "alike" the thing most like it stands in its place;
    "mixed" half of it has a second color; "cut" half of it is missing; "doubled" it stands there twice, one
    over the other."""
    i = int(rng.integers(len(scene.things)))
    thing, others = scene.things[i], scene.things[:i] + scene.things[i + 1 :]
    look = thing.look
    if how == "alike":
        return draw(
            replace(scene, things=(*others, replace(thing, look=replace(look, name=most_alike()[look.name]))))
        )
    if how == "doubled":
        shift = look.radius * rng.uniform(0.5, 0.9) * (1 if thing.x < SIDE / 2 else -1)
        return draw(replace(scene, things=(*others, thing, replace(thing, x=thing.x + shift))))
    whole, without = draw(scene), draw(replace(scene, things=others))
    if how == "mixed":
        far = [rgb for rgb in COLORS.values() if np.linalg.norm(np.subtract(rgb, look.rgb)) > 110]
        other = replace(thing, look=replace(look, rgb=far[rng.integers(len(far))]))
        without = draw(replace(scene, things=(*others, other)))
    # The cut goes through the middle of what has the main color, so that both halves have some of it.
    light, dark = (sprite(replace(look, rgb=rgb))[0][..., 0] for rgb in ((255, 255, 255), (0, 0, 0)))
    there = np.argwhere(light - dark > 128) - len(light) // 2
    y, x = (int(v) for v in np.median(there, axis=0) + (int(thing.y), int(thing.x)))
    half = 2 * math.ceil(look.radius)
    box = [(x, y - half, x + half, y + half), (x - half, y, x + half, y + half)][
        rng.integers(2)
    ]  # right or lower half
    box = tuple(min(max(v, 0), SIDE) for v in box)
    whole.paste(without.crop(box), box[:2])
    return whole


def check_detector(n=1000, seed=1):
    """{what: share of n pictures (a fifth of them novel) that are accepted}: "true" pictures; then false
    ones, which should be near 0, a "word" of the caption exchanged, and each way of spoil()."""
    rng, accepted = (
        np.random.default_rng(0),
        dict.fromkeys(("true", "word", "mixed", "alike", "cut", "doubled"), 0),
    )
    for i in range(n):
        scene = make_scene("novel" if i % 5 == 0 else "val", seed, i)
        found = detect(draw(scene))
        accepted["true"] += holds(scene.caption, found)
        accepted["word"] += holds(falsify(scene.caption, rng), found)
        for how in ("mixed", "alike", "cut", "doubled"):
            accepted[how] += holds(scene.caption, detect(spoil(scene, how, rng)))
    return {what: count / n for what, count in accepted.items()}


def main(argv=None):
    p = Parser("Which share of pictures does the detector accept, true ones and false ones?", "python -m common.detector --n 200")
    p.add_argument("--n", type=integer(1), default=1000, help="pictures")
    args = p.parse_args(argv)
    for what, share in check_detector(args.n).items():
        print(f"{what:8} {share:.3f}")


if __name__ == "__main__":
    main()
