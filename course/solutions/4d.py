"""4d  The ratio of the means, not the mean of the ratios; and of the steps before this one."""

import torch


class Ratio(torch.nn.Module):
    def __init__(self, bins=5):
        super().__init__()
        self.bins = bins
        self.means = torch.zeros(2, bins)
        self.sums = torch.zeros(3, bins)

    def bin(self, t):
        return (t * self.bins).long().clamp(max=self.bins - 1)

    def forward(self, t):
        task, kd = self.means
        ratio = torch.where(kd > 0, task / kd.clamp(min=1e-12), torch.ones_like(kd))
        return ratio[self.bin(t)]

    def add(self, task, kd, t):
        self.sums.index_add_(1, self.bin(t), torch.stack([task, kd, torch.ones_like(t)]))

    def step(self):
        task, kd, n = self.sums
        new = torch.stack([task, kd]) / n.clamp(min=1)
        rate = torch.where(self.means > 0, 0.05, 1.0)
        self.means = torch.where(n > 0, self.means + rate * (new - self.means), self.means)
        self.sums.zero_()
