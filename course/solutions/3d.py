"""3d  Unit length makes every layer count alike; a sum over channels is the squared distance of two unit vectors, at most 4."""

import torch.nn.functional as F


def feature_distance(f, g):
    distance = 0
    for a, b in zip(f, g, strict=True):
        distance = distance + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
    return distance
