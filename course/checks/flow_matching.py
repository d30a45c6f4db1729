"""Exercises of page 2, flow matching."""

import math

import torch

import flow
from course.checks.trainings import finished, only_differs, said
from course.exercise import Exercise, Hint


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def on_the_line(answer):
    torch.manual_seed(0)
    x0, eps, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 0.25, 0.6, 1.0])
    x_t = torch.lerp(x0, eps, t[:, None, None, None])
    return {
        "interpolate": answer.interpolate(x0, eps, t),
        "velocity": answer.velocity(x0, eps),
        "x0_from_velocity": answer.x0_from_velocity(x_t, eps - x0, t),
    }


def draw_times(answer):
    def times(*args, **kwargs):
        torch.manual_seed(1)  # of numbers that are drawn without the generator
        generator = torch.Generator().manual_seed(0)
        return answer.logit_normal_timesteps(1000, *args, generator=generator, **kwargs)

    return {
        "the times": times(),
        "the times with shift=3": times(3.0),
        "the times with mean=1, std=0.5": times(mean=1.0, std=0.5),
    }


def sample(answer):
    """Drawings of three pictures in four steps, along a field that bends and that is moved by the text."""
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text, empty, times, seen = (torch.tensor([1.0, 2.0, 3.0]),), (torch.zeros(3),), [], 0

    def bent(x, t, label):
        nonlocal seen
        seen += len(x)
        times.append(t.shape == (len(x),))
        return torch.sin(3 * x) + flow.expand(t, x) ** 2 + flow.expand(label, x)

    mine = noise.clone()
    plain = answer.euler_sample(bent, mine, text, empty, 4, 1, 3.0)
    seen_plain, seen = seen, 0
    guided = answer.euler_sample(bent, noise.clone(), text, empty, 4, 3.0, 3.0)
    return {
        "a drawing without guidance": plain,
        "a drawing with guidance 3": guided,
        "the number of pictures that the model sees without guidance": seen_plain,
        "the number of pictures that the model sees with guidance 3": seen,
        "whether t has one time for each picture": all(times),
        "whether the caller's noise is as it was": torch.equal(mine, noise),
    }


def memory_runs(answer):
    """2e: the same training on few and on many pictures."""
    few, many = (finished(folder, steps=400) for folder in (answer.RUN_FEW, answer.RUN_MANY))
    only_differs(few, many, "pictures", "contents")
    counts = [run.settings["pictures"] for run in (few, many)]
    if counts != sorted(counts) or counts[0] > 100 or counts[1] < 10_000:
        raise Hint("RUN_FEW must have at most 100 pictures and RUN_MANY at least 10,000, "
                   f"not {counts[0]} and {counts[1]}.")  # fmt: skip
    for name, column in (("LOWER_LOSS", "loss"), ("LOWER_VAL_LOSS", "val_loss")):
        said(name, getattr(answer, name), {"few": few.last(column), "many": many.last(column)}, lowest=True)


LINE = "(1 - expand(t, x0)) * x0 + expand(t, x0) * eps"
NORMAL = "mean + std * torch.randn(n, generator=generator)"
GUIDED = "v_empty + guidance * (v - v_empty)"

EXERCISES = {
    "2a": Exercise(
        "Where does the shift put the times?",
        asks=("SHIFTED", "BEFORE", "SHARE"),
        mistakes={
            "you have t = 0 for noise throughout, as some papers do. Here t = 1 is noise, and the shift "
            "moves times up.":
                [{"SHIFTED": 0.25, "BEFORE": 2.7 / 2.8, "SHARE": normal_cdf(-math.log(3))},
                 {"SHIFTED": 0.25, "BEFORE": 2.7 / 2.8}],
            "t' = s t / (1 + (s - 1) t) with s = 3 moves 0.5 towards noise, and noise is t = 1.":
                {"SHIFTED": 0.25},
            "a shifted time is still at most 1: what is s t divided by?":
                {"SHIFTED": 1.5},
            "BEFORE is asked the other way: which t is sent to 0.9? Solve the formula for t.":
                [{"BEFORE": 2.7 / 2.8}, {"BEFORE": 0.3}],
            "half of the times are above 0.5 only before the shift. Which t is sent to 0.5, and how likely "
            "is a larger one?":
                {"SHARE": 0.5},
            "that is the share *below* 0.5: a shift towards noise leaves more than half of the times above "
            "it.":
                {"SHARE": normal_cdf(-math.log(3))},
            "t = sigmoid(n): compare n, a standard normal number, with logit(0.25), not with 0.25.":
                {"SHARE": 1 - normal_cdf(0.25)},
            "1 - 0.25 would be the share of uniform times; these are logit-normal.":
                {"SHARE": 0.75},
        },
    ),
    "2b": Exercise(
        "Write the line and its velocity",
        asks=("interpolate", "velocity", "x0_from_velocity"),
        mistakes={
            "you have t = 0 for noise and t = 1 for data throughout, as some papers do. Here it is the other "
            "way round.":
                {LINE: "expand(t, x0) * x0 + (1 - expand(t, x0)) * eps", "eps - x0": "x0 - eps",
                 "x_t - expand(t, x_t) * v": "x_t + (1 - expand(t, x_t)) * v"},
            "the velocity is d x_t / d t: what does x_t = (1 - t) x_0 + t eps give, and with which sign?":
                {"eps - x0": "x0 - eps"},
            "the velocity is d x_t / d t, the slope of the line, and not the noise, which is what older "
            "models learn.":
                {"return eps - x0": "return eps"},
            "t = 0 is data and t = 1 is noise here; some papers count the other way.":
                {LINE: "expand(t, x0) * x0 + (1 - expand(t, x0)) * eps"},
            "the line is straight: its weights are 1 - t and t, without the square roots of diffusion "
            "models.":
                [{LINE: "(1 - expand(t, x0)).sqrt() * x0 + expand(t, x0).sqrt() * eps"},
                 {LINE: "(1 - expand(t, x0) ** 2).sqrt() * x0 + expand(t, x0) * eps"}],
            "from x_t back to x_0 you walk against the velocity: what is x_t - x_0?":
                {"x_t - expand": "x_t + expand"},
            "from x_t it is t, not 1 - t, back to the data.":
                [{"x_t - expand(t, x_t)": f"x_t {sign} (1 - expand(t, x_t))"} for sign in "-+"],
            "from x_t it is not the whole way back, but t of it.":
                {"x_t - expand(t, x_t) * v": "x_t - v"},
            "t (B,) has one number for each picture, and x_0 (B, ...) has more axes: expand(t, x0) makes "
            "them meet.":
                {LINE: "(1 - t) * x0 + t * eps"},
        },
        probe=on_the_line, own=("flow.interpolate", "flow.velocity", "flow.x0_from_velocity"),
        replaces={f"flow.{name}": name for name in ("interpolate", "velocity", "x0_from_velocity")},
        tests={"test_flow.py": ("test_the_line_and_its_velocity",)},
    ),
    "2c": Exercise(
        "Draw logit-normal timesteps",
        asks=("logit_normal_timesteps",),
        mistakes={
            "these times are uniform. Draw normal numbers with torch.randn, then bring them into (0, 1).":
                {f"torch.sigmoid({NORMAL})": "torch.rand(n, generator=generator)"},
            "`shift` changes nothing in your code: shift the times at the end, with flow.shift_timesteps.":
                {"flow.shift_timesteps(t, shift)": "t"},
            "a shift is no factor: times would leave (0, 1). flow.shift_timesteps has its formula.":
                {"flow.shift_timesteps(t, shift)": "shift * t"},
            "mean and std belong to the normal number, before the sigmoid: after it the times can leave (0, "
            "1).":
                {f"torch.sigmoid({NORMAL})": "mean + std * torch.sigmoid(torch.randn(n, "
                                             "generator=generator))"},
            "mean and std change nothing in your code.":
                {"mean + std * ": ""},
            "std scales a standard normal number, and the mean is added afterwards.":
                {NORMAL: "std * (mean + torch.randn(n, generator=generator))"},
            "std is a deviation: the variance is its square.":
                {"std *": "std**0.5 *"},
            "hand the generator to torch.randn: otherwise a seed does not give the same times twice.":
                {", generator=generator)": ")"},
        },
        probe=draw_times, own=("flow.logit_normal_timesteps",),
        replaces={"flow.logit_normal_timesteps": "logit_normal_timesteps"},
        tests={"test_flow.py": ("test_logit_normal_timesteps_have_the_right_distribution",)},
    ),
    "2d": Exercise(
        "Write the Euler sampler with guidance",
        asks=("euler_sample",),
        mistakes={
            "time runs from 1 to 0 while drawing, so the step (then - now) is negative: x moves by (then - "
            "now) v.":
                {"(then - now)": "(now - then)"},
            "the shift makes the steps unequal: each goes from `now` to `then`, and not by 1 / steps.":
                {"(then - now)": "-1 / steps"},
            "guidance starts from v_empty, not from v_text: guidance 1 must change nothing.":
                [{GUIDED: "v + guidance * (v - v_empty)"},
                 {GUIDED: "v + guidance * (v - v_empty)", "guidance != 1": "True"}],
            "guidance leads away from the empty caption; yours leads towards it.":
                [{GUIDED: "v + guidance * (v_empty - v)"}, {GUIDED: "v_empty + guidance * (v_empty - v)"}],
            "guidance is no factor of the velocity: it scales the way from v_empty to v_text.":
                {GUIDED: "guidance * v"},
            "with guidance 1 the empty caption says nothing: make one forward a step, not two.":
                {"guidance != 1": "True"},
            "the velocity is asked where the step begins, at `now`, not at `then`.":
                {"now.expand": "then.expand"},
            "the model wants a time for each picture, t (B,): now.expand(len(x)).":
                [{"now.expand(len(x))": "now"}, {"now.expand(len(x))": "now.expand(1)"}],
            "x += ... writes into the caller's noise, since x is no copy: x = x + ..., or begin with "
            "noise.clone().":
                {"x = x + (then": "x += (then"},
            "text and empty are tuples, of as many things as the model wants besides: hand them over with a "
            "star, *text.":
                [{"*text": "text", "*empty": "empty"}, {"*empty": "empty"}],
        },
        probe=sample, own=("flow.euler_sample", "flow.euler_steps", "flow.guide"),
        replaces={"flow.euler_sample": "euler_sample"},
        tests={"test_flow.py": ("test_sampler_is_exact_for_a_single_picture",
                                "test_sampler_turns_noise_into_the_right_gaussian",
                                "test_euler_step_is_diffusers_scheduler_step")},
    ),
    "2e": Exercise(
        "What a training of 64 pictures remembers (2 x 3 minutes)",
        asks=("RUN_FEW", "RUN_MANY", "LOWER_LOSS", "LOWER_VAL_LOSS"), runs=memory_runs,
    ),
}  # fmt: skip
