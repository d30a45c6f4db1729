"""2d  Write the Euler sampler with guidance.

Follow the velocity from noise (t = 1) to a latent (t = 0):  x_s = x_t + (s - t) v.  With guidance,
v = v_empty + guidance (v_text - v_empty), from two forwards; with guidance 1 make only one.

Three tests of tests/test_flow.py run with your sampler: one whose data is a single picture, one whose data is
a Gaussian (the best velocity is then known in closed form), and diffusers' own scheduler.
"""

import flow


def euler_sample(model, noise, text, empty, steps=28, guidance=3.0, shift=1.0):
    """model(x_t, t (B,), *text) -> v; noise (B, ...); text, empty: tuples of what the model wants besides.

    Returns the latents (B, ...).
    """
    times = flow.sampling_timesteps(steps, shift)  # (steps + 1,) from 1 to 0
    x = noise.clone()
    for now, then in zip(times[:-1], times[1:], strict=True):
        raise NotImplementedError  # your code
    return x
