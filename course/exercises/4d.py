"""4d  Write the running ratio.

|L_task^t| / |L_kd^t| of S for each fifth of t: means over the steps, of L_task and of L_kd. `add` is called
for every part of a batch, `step` once when the step is over. Write what is missing:

* forward(t): the ratio of the two means in the fifth of each t; 1 where nothing is known yet.
* step(): per fifth, the mean of this step's losses; the first one is taken as it is, each later one moves the
  running mean by a twentieth of the way. Fifths without pictures stay as they are. Then the sums are zero
  again.
"""

import torch


class Ratio(torch.nn.Module):
    def __init__(self, bins=5):
        super().__init__()
        self.bins = bins
        self.means = torch.zeros(2, bins)  # running, of L_task and of L_kd, in each fifth of t; 0: none yet
        self.sums = torch.zeros(3, bins)  # of this step: L_task, L_kd, number of pictures

    def bin(self, t):
        """The number of each t's fifth."""
        return (t * self.bins).long().clamp(max=self.bins - 1)

    def forward(self, t):
        """t (B,) in [0, 1] -> (B,)."""
        raise NotImplementedError  # your code

    def add(self, task, kd, t):
        """Losses (B,) of some pictures of this step."""
        self.sums.index_add_(1, self.bin(t), torch.stack([task, kd, torch.ones_like(t)]))

    def step(self):
        raise NotImplementedError  # your code
