"""5c  Rows with t above the end of the step are on their way; none starts above `now`."""

import torch

import flow


@torch.no_grad()
def solve(teacher, x_t, t, ids, guidance, shift, steps=8):
    times, x0 = flow.sampling_timesteps(steps, shift), x_t.clone()
    for now, then in zip(times[:-1], times[1:], strict=True):
        rows = t > then + 1e-4
        if rows.any():
            start = t[rows].clamp(max=float(now))
            v, _ = teacher(x0[rows], start, ids[rows], guidance)
            x0[rows] += flow.expand(then - start, v) * v
    return x0
