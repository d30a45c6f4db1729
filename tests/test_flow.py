"""The flow against analytic solutions, scipy, and diffusers' scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats

import flow


def test_the_line_and_its_velocity():
    x0, eps, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 0.25, 0.6, 1.0])
    x_t, v = flow.interpolate(x0, eps, t), flow.velocity(x0, eps)
    assert torch.equal(x_t[0], x0[0]) and torch.allclose(x_t[3], eps[3], atol=1e-6)
    assert torch.allclose(flow.x0_from_velocity(x_t, v, t), x0, atol=1e-6)
    h = 1e-3  # the derivative along the path, by finite differences
    numeric = (flow.interpolate(x0, eps, t + h) - flow.interpolate(x0, eps, t - h)) / (2 * h)
    assert torch.allclose(numeric, v, atol=1e-2)


def test_logit_normal_timesteps_have_the_right_distribution():
    t = flow.logit_normal_timesteps(20_000, generator=torch.Generator().manual_seed(0)).numpy()
    assert stats.kstest(np.log(t / (1 - t)), "norm").pvalue > 0.01


def test_shift_keeps_the_ends_and_moves_to_noise():
    t = torch.linspace(0, 1, 11)
    shifted = flow.shift_timesteps(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    assert shifted[5] == pytest.approx(0.75)
    assert torch.equal(flow.shift_timesteps(t, 1.0), t)
    # Shifting multiplies the ratio of noise to data by s: t' / (1 - t') = s t / (1 - t)
    assert torch.allclose(shifted[1:-1] / (1 - shifted[1:-1]), 3 * t[1:-1] / (1 - t[1:-1]))


def test_rounding_does_not_take_the_first_step_out_of_the_guidance_interval():
    """1/3 / (1 - 2/3) is 1.0000001 in float32: with it the first step would go without guidance."""
    for shift in (1 / 3, 0.2, 0.4, 1.0, 1.7, 3.0):
        times = flow.sampling_timesteps(4, shift)
        assert times[0] <= 1 and times[0] == pytest.approx(1) and times[-1] == 0
    assert flow.shift_timesteps(torch.ones(1), 1 / 3) > 1  # the case is a real one


def test_sampler_is_exact_for_a_single_picture():
    """If the data is one point, v = (x_t - x_0) / t is linear along the path, and one Euler step is enough."""
    x0 = torch.randn(1, 4, 2, 2)

    def model(x, t, *_):
        return (x - x0) / flow.expand(t, x)

    for steps in (1, 4):
        out = flow.euler_sample(model, torch.randn(3, 4, 2, 2), (torch.zeros(3),), (torch.zeros(3),), steps, guidance=1)
        assert torch.allclose(out, x0.expand(3, -1, -1, -1), atol=1e-5)


def test_sampler_turns_noise_into_the_right_gaussian():
    """For x_0 ~ N(m, s^2) the best velocity is known in closed form; the sampler must land on that distribution."""
    m, s = 1.5, 0.5

    def model(x, t, *_):
        t = flow.expand(t, x)
        variance = (1 - t) ** 2 * s**2 + t**2
        surprise = x - (1 - t) * m
        return t / variance * surprise - (m + (1 - t) * s**2 / variance * surprise)  # E[eps | x_t] - E[x_0 | x_t]

    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    out = flow.euler_sample(model, noise, (torch.zeros(20_000),), (torch.zeros(20_000),), 200, guidance=1)
    assert out.mean().item() == pytest.approx(m, abs=0.02)
    assert out.std().item() == pytest.approx(s, abs=0.02)


def test_guidance():
    calls = []

    def model(x, t, label):
        calls.append(len(x))
        return label.view(-1, 1).expand_as(x)

    text, empty = (torch.ones(2),), (torch.zeros(2),)
    out = flow.euler_sample(model, torch.zeros(2, 3), text, empty, steps=4, guidance=5.0)
    assert torch.allclose(out, torch.full((2, 3), -5.0)) and calls == [4] * 4  # dt sums to -1, v = 0 + 5 (1 - 0)
    calls.clear()
    out = flow.euler_sample(model, torch.zeros(2, 3), text, empty, steps=4, guidance=1)
    assert torch.allclose(out, torch.full((2, 3), -1.0)) and calls == [2] * 4
    calls.clear()
    out = flow.euler_sample(model, torch.zeros(2, 3), text, empty, steps=4, guidance=5.0, interval=(0.5, 0.8))  # t = 0.75, 0.5
    assert torch.allclose(out, torch.full((2, 3), -3.0)) and calls == [2, 4, 4, 2]


def test_euler_step_is_diffusers_scheduler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    times = flow.sampling_timesteps(6, shift=3.0)
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    assert torch.allclose(scheduler.sigmas, times, atol=1e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * times[:-1], atol=1e-3)
    g = torch.Generator().manual_seed(0)
    noise, fields = torch.randn(2, 4, 3, 3, generator=g), torch.randn(6, 2, 4, 3, 3, generator=g)
    x = noise
    for t, v in zip(scheduler.timesteps, fields, strict=True):
        x = scheduler.step(v, t, x).prev_sample
    remaining = list(fields)
    ours = flow.euler_sample(lambda *_: remaining.pop(0), noise, (torch.zeros(2),), (torch.zeros(2),), 6, 1, 3.0)
    assert torch.allclose(ours, x, atol=1e-5)
