"""2c  A normal number, squeezed into (0, 1), then shifted."""

import torch

import flow


def logit_normal_timesteps(n, shift=1.0, mean=0.0, std=1.0, generator=None):
    t = torch.sigmoid(mean + std * torch.randn(n, generator=generator))
    return flow.shift_timesteps(t, shift)
