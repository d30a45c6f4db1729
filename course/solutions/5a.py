"""5a  At the last step a_t is 1: S listens to the data alone; the target comes in at on-policy points."""

import math


def shift(t, s=3):
    return s * t / (1 + (s - 1) * t)


def a(t):
    return 0.0 if t in (0, 1) else math.exp(-(math.log(t / (1 - t)) ** 2) / 2) / (t * (1 - t)) / 4


TIMES = [shift(t) for t in (1, 0.75, 0.5, 0.25)]
FORWARDS_BEFORE = 28 * 2
FORWARDS_AFTER = 4
A = [a(t) for t in TIMES]
