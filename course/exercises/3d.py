"""3d  Write the perceptual distance.

LPIPS compares two pictures in the features of a network that was trained to see (class Perceptual in
common/distances.py). Given the features of both pictures at several layers:

    distance = sum over layers of mean over pixels of || f / |f| - g / |g| ||^2

|f| is the length over the channels of each pixel.
"""

import torch.nn.functional as F


def feature_distance(f, g):
    """f, g: lists of (B, C, h, w), one a layer, of different sizes -> (B,)"""
    raise NotImplementedError  # your code
