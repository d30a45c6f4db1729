"""4b  Write timestep-aware scaling.

    S(L_task, L_kd) = a_t L_task + (1 - a_t) ratio L_kd       for every picture

The ratio is |L_task^t| / |L_kd^t|, and is given.

a_t is the density of the logit-normal(0, 1) at t, divided by its largest value, which it takes at t = 0.5. It
must not become NaN at t = 0 and t = 1.
"""

import torch


def timestep_weight(t):
    """a_t in [0, 1], (B,), from t (B,)."""
    raise NotImplementedError  # your code


def scaled(task, kd, t, ratio):
    """task, kd, t, ratio: (B,) -> S (B,)."""
    raise NotImplementedError  # your code
