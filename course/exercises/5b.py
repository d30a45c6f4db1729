"""5b  Write the discriminator's heads and the hinge loss.

The discriminator is the frozen teacher with small heads on some of its blocks. Real latents shall get logits
above 1, predicted ones below -1; whoever is beyond that costs nothing:

    L_D = E[max(0, 1 - D(real))] + E[max(0, 1 + D(predicted))]
"""

import torch
import torch.nn.functional as F
from torch import nn


def hinge(on_real, on_fake):
    """Logits of any shape -> the loss, a scalar."""
    raise NotImplementedError  # your code


class Discriminator(nn.Module):
    def __init__(self, teacher, width=64):
        super().__init__()
        self.teacher = teacher  # teacher(latents, t, ids) -> (velocity, features of some of its blocks)

        def head():
            first = nn.Conv2d(teacher.feature_dim, width, 3, padding=1)
            second = nn.Conv2d(width, width, 3, padding=1)
            return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Conv2d(width, 1, 1))

        self.heads = nn.ModuleList(head() for _ in teacher.layers)

    def forward(self, latents, t, ids):
        """Logits of latents (B, C, h, w) at times t (B,) for captions ids (B,)."""
        return self.logits(self.features(latents, t, ids))

    def features(self, latents, t, ids):
        """[(B, D, h, w), ...], one for each head: the teacher's, each normalised by F.group_norm(f, 1)."""
        raise NotImplementedError  # your code

    def logits(self, features):
        """(B, heads * h * w): what self.heads say to them, side by side."""
        raise NotImplementedError  # your code
