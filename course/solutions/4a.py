"""4a  The density of t = sigmoid(n): the normal at n = log(t / (1 - t)), times dn / dt = 1 / (t (1 - t))."""

import math


def density(t):
    n = math.log(t / (1 - t))
    return math.exp(-(n**2) / 2) / math.sqrt(2 * math.pi) / (t * (1 - t))


A = [density(t) / density(0.5) for t in (0.5, 0.75, 0.9)]
PULL = (1 - A[2]) * 0.6 / 0.02  # the teacher's loss is thirty times smaller, and counts nevertheless
