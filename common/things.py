"""The things of the class world: each a function of some ten lines that draws flat clip-art with a pen.

    def apple(p, c, u):      # p the pen, c the main color, u four free numbers in [0, 1): pose, proportions, a detail

Coordinates: a thing fills the box [-1, 1] x [-1, 1], x to the right, y down; numbers for sizes are in the
same unit. Whatever is drawn in `c` or a shade of it takes another color when a caption asks for it; the
details (an eye, a wheel, a leaf) keep theirs. To add a thing: write a function, name it in THINGS with the
colors that it has in life, and look at it:

    python data.py --thing apple --out apple.png

A thing is one connected piece, with lines at least 0.1 thick: at 128 pixels nothing thinner survives the
autoencoder.
"""

import math
from typing import NamedTuple

# Colors of details, RGB, 0..255.
INK, STEEL, SNOW, GLASS = (38, 38, 44), (182, 186, 194), (250, 250, 246), (196, 226, 244)
WOOD, LEAF, DOUGH, LAMP = (110, 74, 48), (66, 156, 72), (226, 178, 110), (250, 232, 140)


def shade(color, k):
    """A darker (k < 1) or lighter (1 < k < 2) shade of an RGB color. Affine in the color, which the detector
    relies on."""
    return tuple(round(v * k if k < 1 else v + (255 - v) * (k - 1)) for v in color)


def arc(cx, cy, rx, ry, start, end, n=16):
    """n points of an ellipse's arc, angles in degrees from the x axis, clockwise on the screen."""
    first, step = math.radians(start), math.radians(end - start) / max(1, n - 1)
    return [(cx + rx * math.cos(first + i * step), cy + ry * math.sin(first + i * step)) for i in range(n)]


CIRCLE = arc(0, 0, 1, 1, 0, 350, 36)


class Pen:
    """Draws in a thing's own coordinates: the box [-1, 1]^2 lies at (x, y) with half extent r, in pixels of
    `draw`.

    `flip` mirrors left and right, so that a cat may look either way.
    """

    def __init__(self, draw, x, y, r, flip=False):
        self.draw, self.x, self.y, self.r, self.side = draw, x, y, r, -1 if flip else 1

    def pixels(self, points):
        return [(self.x + self.side * self.r * a, self.y + self.r * b) for a, b in points]

    def poly(self, points, color):
        self.draw.polygon(self.pixels(points), fill=color)

    def oval(self, cx, cy, rx, ry, color, turn=0.0):
        """An ellipse; `turn` in radians, clockwise."""
        cos, sin = math.cos(turn), math.sin(turn)
        self.poly(
            [(cx + rx * a * cos - ry * b * sin, cy + rx * a * sin + ry * b * cos) for a, b in CIRCLE], color
        )

    def box(self, x0, y0, x1, y1, color, corner=0.0):
        """A rectangle, its corners rounded with the radius `corner`."""
        k = corner
        corners = [(x1 - k, y1 - k, 0), (x0 + k, y1 - k, 90), (x0 + k, y0 + k, 180), (x1 - k, y0 + k, 270)]
        self.poly(
            [point for x, y, a in corners for point in arc(x, y, k, k, a, a + 90, 6 if k else 1)], color
        )

    def line(self, points, width, color):
        """A line with round ends and joints."""
        at, w = self.pixels(points), width * self.r
        self.draw.line(at, fill=color, width=max(1, round(w)), joint="curve")
        for x, y in (at[0], at[-1]):
            self.draw.ellipse([x - w / 2, y - w / 2, x + w / 2, y + w / 2], fill=color)


# ------------------------------------------------------------------------------------------------------------
# Animals


def cat(p, c, u):
    p.line([(-0.4, 0.8), (-0.86, 0.7), (-0.84, 0.45 - 0.6 * u[0])], 0.18, shade(c, 0.85))  # tail, down or up
    p.oval(0.0, 0.5, 0.5, 0.48, c)
    for x in (-0.3, 0.06):
        p.box(x, 0.55, x + 0.24, 0.98, shade(c, 0.88), 0.1)
    h = 0.3 * u[1]  # the head's side
    for ear in (-1, 1):
        p.poly([(h + 0.46 * ear, -0.3), (h + 0.44 * ear, -0.98), (h + 0.02 * ear, -0.6)], c)
        p.poly([(h + 0.36 * ear, -0.5), (h + 0.38 * ear, -0.8), (h + 0.16 * ear, -0.6)], (238, 160, 168))
    p.oval(h, -0.3, 0.5, 0.42, c)
    for eye in (-1, 1):
        p.oval(h + 0.2 * eye, -0.36, 0.08, 0.1 + 0.04 * u[2], INK)
    p.oval(h, -0.1, 0.2, 0.13, SNOW)
    p.oval(h, -0.16, 0.08, 0.06, (220, 96, 110))


def dog(p, c, u):
    p.line([(-0.66, 0.1), (-0.92, -0.1 - 0.5 * u[0])], 0.16, c)  # tail
    for x in (-0.72, -0.5, 0.16, 0.38):
        p.box(x, 0.3, x + 0.2, 0.92, shade(c, 0.85), 0.08)
    p.box(-0.76, -0.08, 0.6, 0.5, c, 0.26)
    n = 0.1 * u[1]  # the head's height
    p.oval(0.5, -0.36 - n, 0.36, 0.36, c)
    p.box(0.55, -0.44 - n, 0.98, -0.12 - n, shade(c, 1.3), 0.14)  # snout
    p.oval(0.92, -0.38 - n, 0.09, 0.08, INK)
    p.oval(0.6, -0.52 - n, 0.07, 0.08, INK)
    p.oval(0.24, -0.26 - n, 0.15, 0.34 + 0.06 * u[2], shade(c, 0.62), 0.15)  # a hanging ear
    p.line([(0.26, 0.02), (0.64, 0.06)], 0.12, (206, 52, 52) if u[3] < 0.5 else (60, 110, 200))  # collar


def bird(p, c, u):
    p.poly(
        [(-0.4, 0.0), (-0.98, -0.3 - 0.2 * u[0]), (-0.98, 0.05 - 0.2 * u[0]), (-0.5, 0.35)], shade(c, 0.75)
    )  # tail
    for x in (-0.12, 0.18):
        p.line([(x, 0.4), (x, 0.88), (x + 0.16, 0.88)], 0.1, (226, 140, 40))
    p.oval(-0.02, 0.12, 0.62, 0.46, c, 0.15)
    p.oval(0.16, 0.26, 0.36, 0.28, shade(c, 1.55))  # breast
    p.oval(0.42, -0.38, 0.38, 0.38, c)
    p.poly([(0.72, -0.5), (0.99, -0.32), (0.72, -0.22)], (240, 150, 40))
    p.oval(0.54, -0.46, 0.09, 0.1, SNOW)
    p.oval(0.56, -0.46, 0.06, 0.07, INK)
    p.oval(-0.2, 0.02 - 0.1 * u[1], 0.42, 0.2, shade(c, 0.62), -0.5 + 0.9 * u[2])  # wing


def elephant(p, c, u):
    p.line([(-0.84, 0.0), (-0.94, 0.4)], 0.1, shade(c, 0.7))
    for x in (-0.76, -0.44, -0.08, 0.18):
        p.box(x, 0.3, x + 0.26, 0.94, shade(c, 0.85), 0.06)
    p.oval(-0.24, 0.1, 0.66, 0.52, c)
    p.oval(0.46, -0.22, 0.42, 0.42, c)
    p.line([(0.76, -0.2), (0.88, 0.15 - 0.35 * u[0]), (0.86, 0.7 - 1.35 * u[0])], 0.2, c)  # trunk, down or up
    p.poly([(0.6, 0.0), (0.98, 0.22), (0.72, -0.06)], SNOW)
    p.oval(0.2, -0.2, 0.26, 0.38 + 0.08 * u[1], shade(c, 0.72))
    p.oval(0.6, -0.34, 0.07, 0.08, INK)


def giraffe(p, c, u):
    spots = (134, 84, 44)
    for x in (-0.56, -0.36, 0.06, 0.24):
        p.box(x, 0.4, x + 0.15, 0.98, shade(c, 0.88), 0.05)
    p.line([(-0.56, 0.2), (-0.72, 0.55)], 0.1, spots)
    p.oval(-0.12, 0.26, 0.5, 0.28, c)
    top = 0.34 + 0.2 * u[0]  # how far the neck leans
    p.poly([(0.0, 0.2), (top - 0.14, -0.7), (top + 0.12, -0.7), (0.36, 0.3)], c)
    for k, x in ((0.15, -0.02), (0.45, 0.02), (0.78, 0.0)):
        p.oval(0.18 + (top - 0.18) * k + x, 0.15 - 0.85 * k, 0.11, 0.1, spots)
    for x, y in ((-0.42, 0.2), (-0.16, 0.12), (-0.14, 0.38), (0.12, 0.34)):
        p.oval(x, y, 0.12, 0.1, spots)
    for x in (-0.04, 0.1):
        p.line([(top + x, -0.8), (top + x, -0.96)], 0.08, spots)
    p.oval(top + 0.12, -0.74, 0.3, 0.15, c, 0.3 + 0.2 * u[1])
    p.oval(top + 0.06, -0.78, 0.06, 0.06, INK)


def zebra(p, c, u):
    for x in (-0.66, -0.44, 0.1, 0.32):
        p.box(x, 0.25, x + 0.18, 0.94, c, 0.05)
        p.box(x, 0.55, x + 0.18, 0.66, INK)
        p.box(x, 0.84, x + 0.18, 0.96, INK)
    p.line([(-0.66, 0.0), (-0.88, 0.4)], 0.12, INK)
    p.box(-0.74, -0.18, 0.54, 0.42, c, 0.24)
    n = 0.12 * u[0]
    p.poly([(0.1, 0.0), (0.34, -0.72 - n), (0.66, -0.56 - n), (0.54, 0.2)], c)
    p.line([(0.12, -0.15), (0.34, -0.76 - n)], 0.16, INK)  # mane
    for x in (-0.52, -0.24, 0.04):
        p.poly([(x - 0.06, -0.18), (x + 0.07, -0.18), (x + 0.03, 0.3), (x - 0.06, 0.3)], INK)
    p.line([(0.32, -0.18), (0.52, -0.08)], 0.1, INK)
    p.line([(0.38, -0.42 - n), (0.6, -0.32 - n)], 0.1, INK)
    p.oval(0.66, -0.58 - n, 0.3, 0.17, c, 0.4)
    p.oval(0.86, -0.48 - n, 0.12, 0.12, INK)
    p.poly([(0.4, -0.7 - n), (0.42, -0.98), (0.56, -0.74 - n)], c)
    p.oval(0.6, -0.64 - n, 0.06, 0.06, INK)


def bear(p, c, u):
    for side in (-1, 1):
        p.oval(0.36 * side, 0.8, 0.26, 0.19, shade(c, 0.8))
        p.oval(
            0.56 * side, 0.2 - 0.25 * u[0], 0.2, 0.34, shade(c, 0.8), (-0.5 - 1.2 * u[0]) * side
        )  # arms, down or up
        p.oval(0.36 * side, -0.76, 0.2, 0.2, c)
        p.oval(0.36 * side, -0.76, 0.1, 0.1, shade(c, 0.6))
    p.oval(0, 0.38, 0.5, 0.52, c)
    p.oval(0, 0.44, 0.3, 0.34, shade(c, 1.5))
    p.oval(0, -0.42, 0.52, 0.44, c)
    p.oval(0, -0.26, 0.26, 0.2, shade(c, 1.5))
    p.oval(0, -0.34, 0.12, 0.08, INK)
    for side in (-1, 1):
        p.oval((0.22 + 0.04 * u[1]) * side, -0.52, 0.07, 0.08, INK)


# ------------------------------------------------------------------------------------------------------------
# Vehicles


def wheel(p, x, y, r):
    p.oval(x, y, r, r, INK)
    p.oval(x, y, 0.45 * r, 0.45 * r, STEEL)


def car(p, c, u):
    roof = -0.5 - 0.2 * u[0]
    p.poly([(-0.66, 0.0), (-0.42, roof), (0.3, roof), (0.62, 0.0)], shade(c, 0.85))
    p.poly([(-0.5, -0.02), (-0.34, roof + 0.12), (-0.1, roof + 0.12), (-0.1, -0.02)], GLASS)
    p.poly([(0.02, -0.02), (0.02, roof + 0.12), (0.24, roof + 0.12), (0.46, -0.02)], GLASS)
    p.box(-0.98, -0.06, 0.98, 0.42, c, 0.16)
    p.oval(0.86, 0.1, 0.1, 0.1, LAMP)
    p.box(-0.98, 0.04, -0.86, 0.18, (206, 52, 52))
    for x in (-0.54, 0.54):
        wheel(p, x, 0.42, 0.24 + 0.04 * u[1])


def bus(p, c, u):
    n = 3 + int(3 * u[0])  # windows
    p.box(-0.98, -0.7, 0.98, 0.5, c, 0.14)
    w = 1.76 / n
    for i in range(n):
        p.box(-0.88 + i * w, -0.52, -0.88 + (i + 0.8) * w, -0.06, GLASS, 0.05)
    p.box(-0.98, 0.06, 0.98, 0.2, shade(c, 0.7))
    p.oval(0.88, 0.34, 0.09, 0.09, LAMP)
    for x in (-0.56, 0.56):
        wheel(p, x, 0.54, 0.25)


def boat(p, c, u):
    p.poly([(0.0, -0.92), (0.0, 0.4), (0.62 + 0.3 * u[0], 0.4)], SNOW)
    p.poly([(0.0, -0.72), (0.0, 0.4), (-0.5 - 0.2 * u[1], 0.4)], shade(SNOW, 0.86))
    p.line([(0.0, 0.4), (0.0, -0.93)], 0.13, WOOD)
    p.poly([(-0.98, 0.34), (0.98, 0.34), (0.66, 0.9), (-0.6, 0.9)], c)
    p.poly([(-0.98, 0.34), (0.98, 0.34), (0.9, 0.48), (-0.86, 0.48)], shade(c, 0.7))


def airplane(p, c, u):
    p.poly([(-0.78, 0.0), (-0.98, -0.6), (-0.7, -0.6), (-0.36, -0.08)], shade(c, 0.75))  # fin
    p.poly(
        [(-0.1, 0.0), (-0.46, -0.5 - 0.1 * u[0]), (-0.22, -0.5 - 0.1 * u[0]), (0.36, 0.0)], shade(c, 0.62)
    )  # far wing
    p.oval(0.04, 0.0, 0.94, 0.25, c)
    p.poly([(0.66, -0.19), (0.78, -0.02), (0.96, -0.02), (0.84, -0.13)], GLASS)
    for i in range(4):
        p.oval(-0.36 + 0.26 * i, -0.06, 0.08, 0.08, GLASS)
    p.poly(
        [(-0.12, 0.06), (-0.56, 0.68 + 0.2 * u[1]), (-0.26, 0.68 + 0.2 * u[1]), (0.4, 0.06)], shade(c, 0.75)
    )
    p.poly([(-0.9, 0.0), (-0.98, 0.22), (-0.8, 0.22), (-0.56, 0.06)], shade(c, 0.62))


# ------------------------------------------------------------------------------------------------------------
# Food


def apple(p, c, u):
    p.line([(0, -0.4), (0.04 + 0.2 * (u[0] - 0.5), -0.92)], 0.12, WOOD)
    if u[1] > 0.3:
        p.oval(0.32, -0.74, 0.3, 0.14, LEAF, -0.5 + 0.5 * u[2])
    for side in (-1, 1):
        p.oval(0.32 * side, 0.16, 0.6, 0.74, c, 0.12 * side)
    p.oval(-0.5, -0.08, 0.14, 0.24, shade(c, 1.55), 0.4)


def banana(p, c, u):
    bend = 0.3 * u[0]
    outer, inner = (
        arc(0, -0.3, 0.94, 1.05, 8, 172, 20),
        arc(0, -0.42, 0.66 + 0.04 * u[1], 0.55 + bend, 172, 8, 20),
    )
    p.poly(outer + inner, c)
    p.line(arc(0, -0.34, 0.82, 0.86 + 0.3 * bend, 20, 160, 20), 0.1, shade(c, 0.78))
    p.line([(0.86, -0.22), (0.86, -0.46)], 0.2, shade(c, 0.62))
    p.oval(-0.86, -0.22, 0.12, 0.12, WOOD)


def orange(p, c, u):
    p.oval(0, 0.1, 0.84, 0.84, c)
    p.oval(-0.38, -0.24, 0.2, 0.12, shade(c, 1.5), -0.7)
    for x, y in ((0.3, 0.1), (0.02, 0.5), (-0.36, 0.3), (0.44, 0.52), (0.1, -0.14)):
        p.oval(x, y, 0.06, 0.06, shade(c, 0.78))
    for turn in (-2.6 + 0.3 * u[0], -0.5 - 0.3 * u[1]):
        p.oval(0.3 * math.cos(turn), -0.66 + 0.12 * math.sin(turn), 0.3, 0.12, LEAF, turn)
    p.oval(0, -0.66, 0.1, 0.1, WOOD)


def carrot(p, c, u):
    for turn in (-0.5 - 0.2 * u[0], 0.0, 0.5 + 0.2 * u[1]):
        p.line([(0.0, -0.4), (0.52 * math.sin(turn), -0.4 - 0.5 * math.cos(turn))], 0.2, LEAF)
    tip = 0.24 * (u[2] - 0.5)
    p.poly([*arc(0, -0.2, 0.42, 0.3, 180, 360), (tip + 0.05, 0.98), (tip - 0.05, 0.98)], c)
    for y, x0, x1 in ((-0.14, -0.38, -0.06), (0.18, 0.02, 0.26), (0.46, -0.18, 0.04)):
        p.line([(x0 + tip * y, y), (x1 + tip * y, y)], 0.1, shade(c, 0.72))


def pizza(p, c, u):
    start = 300 + 40 * u[0]  # one slice is missing
    cut = [(0, 0), *arc(0, 0, 0.98, 0.98, start - 310, start, 48)]
    p.poly(cut, DOUGH)
    p.poly([(0, 0), *arc(0, 0, 0.8, 0.8, start - 310, start, 48)], c)
    turn = math.radians(start)
    for k in range(5):
        a = turn - math.radians(50) - k * math.radians(53) - 0.35 - 0.2 * u[1]
        p.oval(0.5 * math.cos(a), 0.5 * math.sin(a), 0.16, 0.16, (168, 44, 40) if u[2] < 0.6 else LEAF)


def donut(p, c, u):
    p.poly(arc(0, 0, 0.98, 0.9, 0, 360, 48) + arc(0, -0.02, 0.3, 0.26, 360, 0, 24), DOUGH)
    wavy = [((0.84 + 0.05 * math.cos(7 * a + 6 * u[0])) * math.cos(a), (0.76 + 0.05 * math.cos(7 * a + 6 * u[0])) * math.sin(a))
            for a in (2 * math.pi * i / 55 for i in range(56))]  # fmt: skip
    p.poly(wavy + arc(0, -0.02, 0.38, 0.34, 360, 0, 24), c)
    for k in range(7):
        a = 2 * math.pi * (k + u[1]) / 7
        x, y = 0.6 * math.cos(a), 0.55 * math.sin(a)
        p.line([(x - 0.07, y - 0.04), (x + 0.07, y + 0.04)], 0.1, (SNOW, LAMP, (96, 196, 220))[k % 3])


def cake(p, c, u):
    n = 1 + int(3 * u[0])  # candles
    for i in range(n):
        x = 0.4 * (i - (n - 1) / 2)
        p.box(x - 0.07, -0.7, x + 0.07, -0.1, SNOW)
        p.oval(x, -0.82, 0.09, 0.15, (246, 176, 46))
    p.box(-0.84, 0.0, 0.84, 0.8, DOUGH, 0.06)
    p.box(-0.88, -0.2, 0.88, 0.22, c, 0.14)
    drops = 0.16 + 0.12 * u[1]
    for i, x in enumerate((-0.7, -0.36, 0.0, 0.36, 0.7)):
        p.oval(x, 0.2, 0.17, drops + 0.08 * (i % 2), c)
    p.box(-0.84, 0.58, 0.84, 0.7, shade(c, 0.8))
    p.box(-0.98, 0.78, 0.98, 0.92, STEEL, 0.06)


# ------------------------------------------------------------------------------------------------------------
# Things of the house


def cup(p, c, u):
    p.line(arc(0.5, 0.1, 0.4, 0.34 + 0.08 * u[0], -80, 80), 0.17, shade(c, 0.8))
    p.poly([(-0.86, -0.6), (0.6, -0.6), (0.48, 0.84), (-0.74, 0.84)], c)
    p.oval(-0.13, -0.6, 0.73, 0.2, shade(c, 0.75))
    p.oval(-0.13, -0.56, 0.6, 0.13, (92, 58, 40))  # coffee
    if u[1] < 0.5:
        p.box(-0.79, 0.1, 0.535, 0.34, SNOW)
    p.oval(-0.13, 0.84, 0.6, 0.1, c)


def bottle(p, c, u):
    neck = -0.3 - 0.2 * u[0]
    p.box(-0.4, -0.2, 0.4, 0.98, c, 0.14)
    p.poly([(-0.4, 0.0), (-0.15, neck), (0.15, neck), (0.4, 0.0)], c)
    p.box(-0.15, -0.85, 0.15, neck + 0.05, c)
    p.box(-0.2, -0.98, 0.2, -0.78, (206, 52, 52) if u[1] < 0.5 else STEEL, 0.05)
    p.box(-0.4, 0.24, 0.4, 0.68, SNOW)
    p.box(-0.24, 0.4, 0.24, 0.52, shade(c, 0.85))


def clock(p, c, u):
    for side in (-1, 1):
        p.line([(0.4 * side, 0.6), (0.62 * side, 0.92)], 0.16, INK)
        p.oval(0.52 * side, -0.72, 0.32, 0.2, shade(c, 0.7), 0.7 * side)  # bells
    p.oval(0, 0.06, 0.8, 0.8, c)
    p.oval(0, 0.06, 0.6, 0.6, SNOW)
    hour, minute = 2 * math.pi * u[0], 2 * math.pi * u[1]
    p.line([(0, 0.06), (0.28 * math.sin(hour), 0.06 - 0.28 * math.cos(hour))], 0.14, INK)
    p.line([(0, 0.06), (0.46 * math.sin(minute), 0.06 - 0.46 * math.cos(minute))], 0.1, INK)


def umbrella(p, c, u):
    handle = (96, 74, 56)
    if u[0] < 0.25:  # closed
        p.line([(0, -0.98), (0, 0.7), *arc(0.14, 0.78, 0.14, 0.16, 170, 10, 8)], 0.12, handle)
        p.poly([(0, -0.86), (0.42, 0.3), (0.2, 0.46), (-0.2, 0.46), (-0.42, 0.3)], c)
        p.poly([(0, -0.86), (0.12, 0.42), (-0.12, 0.42)], shade(c, 0.72))
        return
    n = 3 + 2 * int(2 * u[1])  # panels
    p.line([(0, -0.2), (0, 0.74), *arc(0.15, 0.78, 0.15, 0.16, 170, 10, 8)], 0.12, handle)
    p.line([(0, -0.8), (0, -0.96)], 0.1, handle)
    p.poly(arc(0, 0.12, 0.98, 0.98, 180, 360, 40), c)
    edges = [1.96 * i / n - 0.98 for i in range(n + 1)]
    for left, right in zip(edges[1::2], edges[2::2], strict=False):
        p.poly([(0, -0.86), (left, 0.12), (right, 0.12)], shade(c, 0.72))


def chair(p, c, u):
    back = -0.75 - 0.22 * u[0]
    for x in (-0.46, 0.5):
        p.line([(x, 0.2), (x + 0.08, 0.92)], 0.16, shade(c, 0.72))
    for x in (-0.6, 0.34):
        p.line([(x + 0.02, 0.2), (x, 0.92)], 0.16, shade(c, 0.85))
    p.line([(-0.62, 0.2), (-0.66, back)], 0.16, c)
    p.line([(-0.1, 0.0), (-0.14, back)], 0.16, shade(c, 0.85))
    n = 2 + int(2 * u[1])  # slats
    for i in range(n):
        y = back + 0.1 + 0.62 * i / n
        p.line([(-0.64, y), (-0.14, y)], 0.18, shade(c, 0.9))
    p.poly([(-0.7, 0.3), (0.66, 0.3), (0.5, 0.0), (-0.58, 0.0)], c)
    p.box(-0.7, 0.24, 0.66, 0.38, shade(c, 0.85))


def laptop(p, c, u):
    lean = 0.16 * u[0]
    p.poly([(-0.72 - lean, -0.8), (0.72 - lean, -0.8), (0.78, 0.26), (-0.78, 0.26)], c)
    p.poly([(-0.58 - lean, -0.66), (0.6 - lean, -0.66), (0.64, 0.12), (-0.64, 0.12)], GLASS)
    p.poly([(-0.78, 0.26), (0.78, 0.26), (0.99, 0.74), (-0.99, 0.74)], shade(c, 0.8))
    p.poly([(-0.66, 0.34), (0.66, 0.34), (0.74, 0.54), (-0.74, 0.54)], INK)
    p.box(-0.99, 0.72, 0.99, 0.84, shade(c, 0.62))
    if u[1] < 0.5:
        p.poly(
            [(-0.44 - lean / 2, 0.0), (-0.1 - lean / 2, -0.42), (0.3 - lean / 2, 0.0)], LEAF
        )  # a picture on the screen
    else:
        p.oval(-lean / 2, -0.26, 0.22, 0.22, (246, 176, 46))


def potted_plant(p, c, u):
    for turn, length in ((-1.0, 0.62), (1.0, 0.62), (-0.5, 0.86), (0.5, 0.86), (0.0, 1.0)):
        a = turn * (0.8 + 0.3 * u[0])
        n = length * (0.85 + 0.15 * u[1])
        p.oval(0.5 * n * math.sin(a), 0.1 - 0.52 * n * math.cos(a), 0.17, 0.52 * n,
               shade(LEAF, 0.8) if turn in (-0.5, 0.5) else LEAF, a)  # fmt: skip
    p.poly([(-0.52, 0.2), (0.52, 0.2), (0.36, 0.98), (-0.36, 0.98)], c)
    p.box(-0.6, 0.06, 0.6, 0.32, shade(c, 0.85), 0.05)
    if u[2] < 0.5:
        p.box(-0.44, 0.54, 0.44, 0.68, SNOW)


def backpack(p, c, u):
    p.line(arc(0, -0.72, 0.22, 0.2, 180, 360), 0.13, shade(c, 0.62))
    for side in (-1, 1):
        p.line([(0.6 * side, 0.0), (0.86 * side, 0.2 + 0.1 * u[0]), (0.6 * side, 0.75)], 0.16, shade(c, 0.62))
    p.box(-0.7, -0.76, 0.7, 0.96, c, 0.3)
    p.box(-0.5, 0.18, 0.5, 0.8, shade(c, 0.78), 0.14)
    p.line([(-0.4, 0.34), (0.4, 0.34)], 0.1, LAMP)
    p.line(arc(0, -0.2, 0.5, 0.3 + 0.1 * u[1], 200, 340), 0.1, STEEL)


class Kind(NamedTuple):
    """What there is to know about a thing: how it is drawn, which colors it has in life, its plural if not
    name + s."""

    draw: callable
    colors: tuple  # RGB, one of which is taken where the caption leaves the color open
    plural: str = ""


# Names are GenEval's (COCO's).
THINGS = {
    "cat": Kind(cat, ((240, 150, 60), (120, 120, 128), (60, 58, 62))),
    "dog": Kind(dog, ((176, 122, 70), (214, 178, 124), (110, 72, 46))),
    "bird": Kind(bird, ((70, 140, 214), (206, 66, 54), (122, 96, 74))),
    "elephant": Kind(elephant, ((150, 154, 164), (126, 128, 140))),
    "giraffe": Kind(giraffe, ((236, 188, 92), (224, 172, 86))),
    "zebra": Kind(zebra, (SNOW,)),
    "bear": Kind(bear, ((134, 88, 54), (92, 62, 44))),
    "car": Kind(car, ((206, 48, 46), (58, 104, 206), (150, 156, 166))),
    "bus": Kind(bus, ((242, 196, 44), (208, 54, 48)), "buses"),
    "boat": Kind(boat, ((206, 58, 50), (48, 92, 180))),
    "airplane": Kind(airplane, ((176, 192, 208), (104, 156, 214))),
    "apple": Kind(apple, ((212, 44, 42), (128, 186, 60))),
    "banana": Kind(banana, ((246, 208, 56),)),
    "orange": Kind(orange, ((242, 144, 34),)),
    "carrot": Kind(carrot, ((240, 126, 36),)),
    "pizza": Kind(pizza, ((248, 206, 92),)),
    "donut": Kind(donut, ((240, 138, 180), (112, 68, 44))),
    "cake": Kind(cake, ((244, 170, 196), (104, 64, 44))),
    "cup": Kind(cup, ((70, 130, 200), (206, 60, 54))),
    "bottle": Kind(bottle, ((54, 122, 70), (96, 62, 40))),
    "clock": Kind(clock, ((206, 54, 50), (64, 112, 196))),
    "umbrella": Kind(umbrella, ((206, 48, 54), (52, 96, 190), (120, 70, 160))),
    "chair": Kind(chair, ((160, 108, 62), (116, 76, 48))),
    "laptop": Kind(laptop, ((150, 154, 162), (92, 96, 106))),
    "potted plant": Kind(potted_plant, ((192, 96, 58), (170, 120, 84))),
    "backpack": Kind(backpack, ((56, 104, 190), (70, 128, 84))),
}
