"""5b  Each head answers for every token; all answers count alike in the mean of the hinge."""

import torch
import torch.nn.functional as F
from torch import nn


def hinge(on_real, on_fake):
    return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()


class Discriminator(nn.Module):
    def __init__(self, teacher, width=64):
        super().__init__()
        self.teacher = teacher

        def head():
            first = nn.Conv2d(teacher.feature_dim, width, 3, padding=1)
            second = nn.Conv2d(width, width, 3, padding=1)
            return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Conv2d(width, 1, 1))

        self.heads = nn.ModuleList(head() for _ in teacher.layers)

    def forward(self, latents, t, ids):
        return self.logits(self.features(latents, t, ids))

    def features(self, latents, t, ids):
        return [F.group_norm(f, 1) for f in self.teacher(latents, t, ids)[1]]

    def logits(self, features):
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)], dim=1)
