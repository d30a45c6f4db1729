"""1c  (a, b) turned by an angle is (a cos - b sin, a sin + b cos)."""

import torch


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)  # (B, HW, heads, head_dim / 2) each
    cos, sin = cos[:, None, :], sin[:, None, :]  # (HW, 1, head_dim / 2): room for the heads
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
