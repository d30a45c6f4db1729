"""4b  At the ends the exponential and t (1 - t) go to 0, the former much faster; a clamp keeps off 0 / 0."""

import torch


def timestep_weight(t):
    t = t.clamp(1e-6, 1 - 1e-6)
    density = torch.exp(-torch.logit(t) ** 2 / 2) / (t * (1 - t))
    return density / 4  # its value at t = 0.5


def scaled(task, kd, t, ratio):
    a = timestep_weight(t)
    return a * task + (1 - a) * ratio * kd
