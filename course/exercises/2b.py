"""2b  Write the line and its velocity.

    x_t = (1 - t) x_0 + t eps        t = 0 is data, t = 1 is noise

The project's test checks your velocity against the derivative of your line by finite differences.
"""

from flow import expand  # expand(t (B,), x) -> (B, 1, ..., 1), ready to multiply x


def interpolate(x0, eps, t):
    """x_t, as x0. x0, eps: (B, ...); t: (B,)."""
    raise NotImplementedError  # your code


def velocity(x0, eps):
    """d x_t / d t, as x0."""
    raise NotImplementedError  # your code


def x0_from_velocity(x_t, v, t):
    """x_0, from a point of the line and the velocity."""
    raise NotImplementedError  # your code
