"""5d  create_graph keeps the way from the slope back to the heads' weights: a gradient of a gradient."""

import torch


def gradient_penalty(discriminator, features):
    features = [f.detach().requires_grad_() for f in features]
    logits = discriminator.logits(features)
    gradients = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return sum(g.square().sum(dim=1).mean() for g in gradients), logits
