"""2d  The step is negative, since time falls while we draw."""

import flow


def euler_sample(model, noise, text, empty, steps=28, guidance=3.0, shift=1.0):
    times = flow.sampling_timesteps(steps, shift)
    x = noise
    for now, then in zip(times[:-1], times[1:], strict=True):
        t = now.expand(len(x))
        v = model(x, t, *text)
        if guidance != 1:
            v_empty = model(x, t, *empty)
            v = v_empty + guidance * (v - v_empty)
        x = x + (then - now) * v
    return x
