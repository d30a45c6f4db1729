"""The mathematics of flow matching on one page (Sec. 3.3).

The paper trains with flow matching, "aligning with larger models like SD3 and SD3.5" (Sec. 1). The formulas are those
of the team's later papers; the logit-normal is from a review; the shift is SD3's, and our assumption here.
Conventions, the same everywhere in this project: t = 0 is data, t = 1 is noise; || . ||^2 is a mean over elements.

    x_t = (1 - t) x_0 + t eps,   eps ~ N(0, I)          the straight line from data to noise
    v   = d x_t / d t = eps - x_0                       its velocity, the target of the network
    L_task = || v_theta(x_t, t, c) - v ||^2

diffusers counts the same t from 0 to 1000 and calls it sigma when it runs from 0 to 1.
"""

import math

import torch


def expand(t, x):
    """t (B,) -> (B, 1, ..., 1), ready to multiply x (B, ...): of its dtype, on its device."""
    return t.to(x).view(-1, *[1] * (x.dim() - 1))


def interpolate(x0, eps, t):
    """x_t = (1 - t) x_0 + t eps. x0, eps: (B, ...); t: (B,) in [0, 1]."""
    return (1 - expand(t, x0)) * x0 + expand(t, x0) * eps


def velocity(x0, eps):
    """v = eps - x_0, the same at every t: the path is straight."""
    return eps - x0


def x0_from_velocity(x_t, v, t):
    """x_0 = x_t - t v: walk the line back to its start."""
    return x_t - expand(t, x_t) * v


def shift_timesteps(t, shift):
    """t' = s t / (1 + (s - 1) t): more time at high noise, by s = 3 at 1024 px as in SD3 (their Sec. 5.3.2).

    A larger picture needs more noise to hide the same structure, since neighbouring pixels agree.
    """
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(side):
    """The shift for pictures of `side` pixels: 1 at 256, 1.7 at 512, 3 at 1024 (SD3's value there; the way between is ours)."""
    return 3.0 ** math.log(max(side, 256) / 256, 4)


def logit_normal_timesteps(n, shift=1.0, mean=0.0, std=1.0, generator=None):
    """n timesteps in (0, 1): t = sigmoid(N(mean, std)), then shifted. The middle is where learning pays most (SD3)."""
    t = torch.sigmoid(mean + std * torch.randn(n, generator=generator))
    return shift_timesteps(t, shift)


def sampling_timesteps(steps, shift=1.0):
    """The times from 1 to 0 that a sampler visits: (steps + 1,), evenly spaced, then shifted."""
    return shift_timesteps(torch.linspace(1, 0, steps + 1), shift).clamp(max=1)  # rounding may pass 1, where no interval reaches


def guide(v_text, v_empty, scale):
    """Classifier-free guidance: away from what the model draws without text. scale 1 = no guidance."""
    return v_empty + scale * (v_text - v_empty)


@torch.no_grad()
def euler_steps(model, noise, text, empty, steps=28, guidance=3.0, shift=1.0, times=None, interval=(0, 1)):
    """Integrate dx/dt = v_theta from noise (t = 1) to a latent (t = 0) with Euler steps: x_s = x_t + (s - t) v.

    Args:
        model: called as model(x_t, t, states, mask) -> velocity; t is (B,) in [0, 1].
        noise: (B, C, H, W) ~ N(0, I).
        text, empty: (states (B, T, D), mask (B, T)) of the captions and of the empty caption.
        guidance: 1 costs one forward a step; anything else two, in one batch of 2B.
        times: the times to visit, from 1 to 0, in place of those that steps and shift give.
        interval: guidance counts while t is within it (arXiv 2404.07724); outside, a step costs one forward. Table 1's FID was
            drawn with guidance that varies over the timesteps; how, the paper does not tell.

    Yields (t, x_t, predicted x_0) at each of the steps + 1 times; at the last, t = 0, both latents (B, C, H, W) are what was drawn.
    """
    times = (sampling_timesteps(steps, shift) if times is None else torch.tensor(times)).to(noise.device)
    x, grid = noise, [round(t, 6) for t in times.tolist()]  # float32 has 0.8999999 for 0.9, outside of (0.9, 1)
    for i in range(len(times) - 1):
        t = times[i].expand(len(x))
        if guidance == 1 or not interval[0] <= grid[i] <= interval[1]:
            v = model(x, t, *text).to(x.dtype)
        else:
            both = [torch.cat(pair) for pair in zip(text, empty, strict=True)]
            v = guide(*model(torch.cat([x, x]), torch.cat([t, t]), *both).to(x.dtype).chunk(2), guidance)
        yield grid[i], x, x0_from_velocity(x, v, t)
        x = x + (times[i + 1] - times[i]) * v
    yield grid[-1], x, x


def euler_sample(*args, **kwargs):
    """euler_steps() to its end: the latents (B, C, H, W)."""
    *_, (_, latents, _) = euler_steps(*args, **kwargs)
    return latents
