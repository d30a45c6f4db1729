"""2c  Draw logit-normal timesteps.

The middle of the path is where learning pays most, so times are drawn as t = sigmoid(N(mean, std)) and then
shifted by flow.shift_timesteps. Draw the normal numbers with torch.randn(n, generator=generator), so that a
seed gives the same times.

A Kolmogorov-Smirnov test (tests/test_flow.py) checks your distribution.
"""

import torch

import flow


def logit_normal_timesteps(n, shift=1.0, mean=0.0, std=1.0, generator=None):
    """n timesteps (n,) in (0, 1)."""
    raise NotImplementedError  # your code
