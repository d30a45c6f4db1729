"""Exercises of page 2, flow matching."""

import math

import torch

import flow
from course.checks.trainings import finished, only_differs, said
from course.exercise import Exercise, Hint


def on_the_line(answer):
    torch.manual_seed(0)
    x0, eps, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 0.25, 0.6, 1.0])
    v = answer.velocity(x0, eps)
    return {"interpolate": answer.interpolate(x0, eps, t), "velocity": v,
            "x0_from_velocity": answer.x0_from_velocity(flow.interpolate(x0, eps, t), flow.velocity(x0, eps), t)}  # fmt: skip


def draw_times(answer):
    def times(*args, **kwargs):
        return answer.logit_normal_timesteps(1000, *args, generator=torch.Generator().manual_seed(0), **kwargs)

    return {"the times": times(), "the times with shift=3": times(3.0), "the times with mean=1, std=0.5": times(mean=1.0, std=0.5)}


def drawn(n, generator):
    return torch.randn(n, generator=generator)


def uniform(n, shift=1.0, mean=0.0, std=1.0, generator=None):
    return flow.shift_timesteps(torch.rand(n, generator=generator), shift)


def unshifted(n, shift=1.0, mean=0.0, std=1.0, generator=None):
    return torch.sigmoid(mean + std * drawn(n, generator))


def outside(n, shift=1.0, mean=0.0, std=1.0, generator=None):
    return flow.shift_timesteps(mean + std * torch.sigmoid(drawn(n, generator)), shift)


def sampler(sign=1, extra=0, swapped=False, then_first=False):
    """flow.euler_sample with a mistake."""

    def euler_sample(model, noise, text, empty, steps=28, guidance=3.0, shift=1.0):
        times, x = flow.sampling_timesteps(steps, shift), noise
        for now, then in zip(times[:-1], times[1:], strict=True):
            t = (then if then_first else now).expand(len(x))
            v_text, v_empty = model(x, t, *text), model(x, t, *empty)
            v = v_text if guidance == 1 else flow.guide(*((v_empty, v_text) if swapped else (v_text, v_empty)), guidance + extra)
            x = x + sign * (then - now) * v
        return x

    return euler_sample


def sample(answer):
    """A field that bends, and one that depends on the text alone."""
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text, empty = (torch.tensor([1.0, 2.0, 3.0]),), (torch.zeros(3),)

    def bent(x, t, label):
        return torch.sin(3 * x) + flow.expand(t, x) ** 2 + flow.expand(label, x)

    return {"a drawing without guidance": answer.euler_sample(bent, noise.clone(), text, empty, 4, 1, 3.0),
            "a drawing with guidance 3": answer.euler_sample(bent, noise.clone(), text, empty, 4, 3.0, 3.0)}  # fmt: skip


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def memory_runs(answer):
    """2e: the same training on few and on many pictures."""
    few, many = finished(answer.RUN_FEW), finished(answer.RUN_MANY)
    only_differs(few, many, "pictures")
    counts = [int(run.settings["pictures"].split("-")[3]) for run in (few, many)]
    if counts != sorted(counts) or counts[0] > 100 or counts[1] < 10_000:
        raise Hint(f"RUN_FEW must have at most 100 pictures and RUN_MANY at least 10,000, not {counts[0]} and {counts[1]}.")
    for name, column in (("LOWER_LOSS", "loss"), ("LOWER_VAL_LOSS", "val_loss")):
        said(name, getattr(answer, name), {"few": few.last(column), "many": many.last(column)}, lowest=True)


EXERCISES = {
    "2a": Exercise(
        "Where does the shift put the times?",
        right={"SHIFTED": 0.75, "BEFORE": 0.75, "SHARE": normal_cdf(math.log(3))},
        mistakes={
            "t' = s t / (1 + (s - 1) t) with s = 3 moves 0.5 towards noise, and noise is t = 1.": {"SHIFTED": 0.25},
            "BEFORE is asked the other way: which t is sent to 0.9? Solve the formula for t.": {"BEFORE": 2.7 / 2.8},
            "half of the times are above 0.5 only before the shift. Which t is sent to 0.5, and how likely is a larger one?":
                {"SHARE": 0.5},
            "t = sigmoid(n): compare n, a standard normal number, with logit(0.25), not with 0.25.":
                {"SHARE": 1 - normal_cdf(0.25)},
            "1 - 0.25 would be the share of uniform times; these are logit-normal.": {"SHARE": 0.75},
        },
    ),
    "2b": Exercise(
        "Write the line and its velocity",
        right={name: getattr(flow, name) for name in ("interpolate", "velocity", "x0_from_velocity")},
        mistakes={
            "the velocity is d x_t / d t: what does x_t = (1 - t) x_0 + t eps give, and with which sign?":
                {"velocity": lambda x0, eps: x0 - eps},
            "t = 0 is data and t = 1 is noise here; some papers count the other way.":
                {"interpolate": lambda x0, eps, t: flow.interpolate(eps, x0, t)},
            "from x_t back to x_0 you walk against the velocity: what is x_t - x_0?":
                {"x0_from_velocity": lambda x_t, v, t: x_t + flow.expand(t, x_t) * v},
            "from x_t it is t, not 1 - t, back to the data.":
                {"x0_from_velocity": lambda x_t, v, t: flow.x0_from_velocity(x_t, v, 1 - t)},
        },
        probe=on_the_line, replaces={f"flow.{name}": name for name in ("interpolate", "velocity", "x0_from_velocity")},
        tests={"test_flow.py": ("test_the_line_and_its_velocity",)},
    ),
    "2c": Exercise(
        "Draw logit-normal timesteps",
        right={"logit_normal_timesteps": flow.logit_normal_timesteps},
        mistakes={
            "these times are uniform. Draw normal numbers with torch.randn, then bring them into (0, 1).":
                {"logit_normal_timesteps": uniform},
            "`shift` changes nothing in your code: shift the times at the end, with flow.shift_timesteps.":
                {"logit_normal_timesteps": unshifted},
            "mean and std belong to the normal number, before the sigmoid: after it the times can leave (0, 1).":
                {"logit_normal_timesteps": outside},
        },
        probe=draw_times, replaces={"flow.logit_normal_timesteps": "logit_normal_timesteps"},
        tests={"test_flow.py": ("test_logit_normal_timesteps_have_the_right_distribution",)},
    ),
    "2d": Exercise(
        "Write the Euler sampler with guidance",
        right={"euler_sample": sampler()},
        mistakes={
            "time runs from 1 to 0 while drawing, so the step (then - now) is negative: x moves by (then - now) v.":
                {"euler_sample": sampler(sign=-1)},
            "guidance 1 must change nothing: v_empty + scale (v_text - v_empty), not v_text + scale (...).":
                {"euler_sample": sampler(extra=1)},
            "guidance leads away from the empty caption; yours leads towards it.": {"euler_sample": sampler(swapped=True)},
            "the velocity is asked where the step begins, at `now`, not at `then`.": {"euler_sample": sampler(then_first=True)},
        },
        probe=sample, replaces={"flow.euler_sample": "euler_sample"},
        tests={"test_flow.py": ("test_sampler_is_exact_for_a_single_picture", "test_sampler_turns_noise_into_the_right_gaussian",
                                "test_euler_step_is_diffusers_scheduler_step")},
    ),
    "2e": Exercise(
        "What a training of 64 pictures remembers (2 x 3 minutes)",
        right={"RUN_FEW": "runs/2e-few", "RUN_MANY": "runs/2e-many", "LOWER_LOSS": "few", "LOWER_VAL_LOSS": "many"},
        mistakes={}, runs=memory_runs,
    ),
}  # fmt: skip
