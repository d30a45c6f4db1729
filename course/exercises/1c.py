"""1c  Write the rotation of RoPE.

Channel i of a head and channel i + head_dim / 2 are a pair, a point in the plane. Turn each pair by its
position's angle, by real numbers only (Core ML knows no complex ones). `rope_table` in model.py makes the
cosines and sines.
"""

import torch


def rotate(x, cos, sin):
    """x (B, HW, heads, head_dim), cos and sin (HW, head_dim / 2), the same for every head -> as x"""
    raise NotImplementedError  # your code
