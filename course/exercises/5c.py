"""5c  Write the few-step target's ODE solve.

Where does the teacher's guided path lead from x_t? Euler steps on the sampler's own grid of times. Each row
of the batch has its own t: a row joins when the grid has come down to it, and its first step begins at its
own t. So a row at t = 1 takes all steps, and one at t = 0.5 only the last few. A teacher is dear: only rows
on their way go through it, all of them in one forward a step.
"""

import torch

import flow


@torch.no_grad()
def solve(teacher, x_t, t, ids, guidance, shift, steps=8):
    """teacher(x, t, ids, guidance) -> (v, features); x_t (B, C, H, W); t, ids (B,). Returns x0_T, as x_t."""
    times, x0 = flow.sampling_timesteps(steps, shift), x_t.clone()
    for now, then in zip(times[:-1], times[1:], strict=True):
        raise NotImplementedError  # your code: which rows are on their way? From where, how far?
    return x0
