"""3c  retain_graph keeps the graphs for the training step that follows; detach makes the weight a number."""

import torch


def adaptive_weight(loss, loss_adv, weight):
    (restoring,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (fooling,) = torch.autograd.grad(loss_adv, weight, retain_graph=True)
    return (restoring.norm() / (fooling.norm() + 1e-8)).clamp(max=1e4).detach()
