"""5b  Write the discriminator's heads and the hinge loss.

The discriminator is the frozen teacher with small heads on some of its blocks. Real latents shall get logits above 1, predicted
ones below -1; whoever is beyond that costs nothing:

    L_D = E[max(0, 1 - D(real))] + E[max(0, 1 + D(predicted))]
"""

import torch
import torch.nn.functional as F

import step_distill


def hinge(on_real, on_fake):
    """Logits of any shape -> the loss, a scalar."""
    raise NotImplementedError  # your code


class Discriminator(step_distill.Discriminator):
    def features(self, latents, t, ids):
        """[(B, D, h, w), ...], one for each head: self.teacher(latents, t, ids)[1], each normalised by F.group_norm(f, 1)."""
        raise NotImplementedError  # your code

    def logits(self, features):
        """(B, heads * h * w): what self.heads say to them, side by side."""
        raise NotImplementedError  # your code
