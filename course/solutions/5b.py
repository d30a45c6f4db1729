"""5b  Each head answers for every token; all answers count alike in the mean of the hinge."""

import torch
import torch.nn.functional as F

import step_distill


def hinge(on_real, on_fake):
    return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()


class Discriminator(step_distill.Discriminator):
    def features(self, latents, t, ids):
        return [F.group_norm(f, 1) for f in self.teacher(latents, t, ids)[1]]

    def logits(self, features):
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)], dim=1)
