"""2b  The derivative of the line holds no t: the path is straight. From x_t to the data it is t against v."""

from flow import expand


def interpolate(x0, eps, t):
    return (1 - expand(t, x0)) * x0 + expand(t, x0) * eps


def velocity(x0, eps):
    return eps - x0


def x0_from_velocity(x_t, v, t):
    return x_t - expand(t, x_t) * v
