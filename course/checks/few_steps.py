"""Exercises of page 5, few steps."""

import torch
import torch.nn.functional as F

import flow
import step_distill
from course.checks.distillation import a
from course.checks.trainings import finished, only_differs, said
from course.exercise import Exercise, Hint

TIMES = [round(float(t), 4) for t in flow.sampling_timesteps(4, 3.0)[:-1]]


class Features:
    """Stands in for a Teacher: two features that are linear in the latents, the second a hundred times as large."""

    layers, feature_dim = (0, 1), 16

    def __call__(self, latents, t, ids):
        return latents, [latents, 100 * latents + 3]


def judge(answer):
    """Losses of known logits, and the logits of a Discriminator with given weights."""
    torch.manual_seed(0)
    real, fake = 2 * torch.randn(2, 5), 2 * torch.randn(2, 5)
    discriminator = answer.Discriminator(Features())
    with torch.no_grad():
        for i, weight in enumerate(discriminator.parameters()):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
        logits = discriminator(torch.randn(3, 16, 4, 4), torch.ones(3), torch.zeros(3, dtype=torch.long))
    return {"hinge": answer.hinge(real, fake), "hinge of certain answers": answer.hinge(torch.tensor([3.0]), torch.tensor([-3.0])),
            "the logits": logits}  # fmt: skip


class OneHead(step_distill.Discriminator):
    def logits(self, features):
        return self.heads[-1](features[-1]).flatten(1)


class AverageOfHeads(step_distill.Discriminator):
    def logits(self, features):
        return sum(head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)) / len(self.heads)


class Loud(step_distill.Discriminator):
    def features(self, latents, t, ids):
        return self.teacher(latents, t, ids)[1]


def lead(answer):
    """Where a field that bends leads from four times, and whose guidance it was asked for."""
    torch.manual_seed(0)
    x, asked = torch.randn(4, 2, 4, 4), []

    def teacher(x, t, ids, guidance=1.0):
        asked.append((len(x), guidance))
        return torch.sin(3 * x) + guidance * flow.expand(t, x) ** 2, []

    t = torch.tensor([1.0, 0.93, 0.8, 0.45])
    x0 = answer.solve(teacher, x, t, torch.zeros(4, dtype=torch.long), 3.0, 3.0, 8)
    return {"x0_T": x0, "how many pictures each forward had": [n for n, _ in asked], "the guidance": {g for _, g in asked}}


def solver(sign=1, everyone=False, guided=True, from_one=False):
    @torch.no_grad()
    def solve(teacher, x_t, t, ids, guidance, shift, steps=8):
        times, x0 = flow.sampling_timesteps(steps, shift), x_t.clone()
        for now, then in zip(times[:-1], times[1:], strict=True):
            on_way = torch.ones_like(t, dtype=torch.bool) if everyone else t > then + 1e-4
            if on_way.any():
                start = torch.full_like(t[on_way], float(now)) if everyone or from_one else t[on_way].clamp(max=now.item())
                v, _ = teacher(x0[on_way], start, ids[on_way], guidance if guided else 1.0)
                x0[on_way] = x0[on_way] + sign * flow.expand(then - start, v) * v
        return x0

    return solve


def slope(answer):
    torch.manual_seed(0)
    discriminator, latents = step_distill.Discriminator(Features()), torch.randn(2, 16, 4, 4, requires_grad=True)
    penalty, logits = answer.gradient_penalty(discriminator, [latents.sin(), latents.cos()])
    if penalty.requires_grad:
        penalty.backward()
    return {"the penalty": penalty.detach(), "the logits": logits.detach(),
            "whether the penalty has a gradient": penalty.requires_grad,
            "whether the features are detached": latents.grad is None}  # fmt: skip


def penalty_with(squared=True, per_value=False, graph=True, detached=True):
    def gradient_penalty(discriminator, features):
        features = [(f.detach() if detached else f).requires_grad_() for f in features]
        logits = discriminator.logits(features)
        gradients = torch.autograd.grad(logits.sum(), features, create_graph=graph, retain_graph=True)
        lengths = [(g.square().mean(1) if per_value else g.square().sum(1)) for g in gradients]
        return sum((length if squared else length.sqrt()).mean() for length in lengths), logits

    return gradient_penalty


def winning_runs(answer):
    """5e: a discriminator that learns too fast."""
    calm, wins = (finished(folder) for folder in (answer.RUN_CALM, answer.RUN_WINS))
    only_differs(calm, wins, "heads_lr", "penalty")
    if wins.settings["heads_lr"] < 10 * calm.settings["heads_lr"]:
        raise Hint("give RUN_WINS at least ten times the --heads-lr of RUN_CALM.")
    gaps = {name: run.last("d_real") - run.last("d_fake") for name, run in (("calm", calm), ("wins", wins))}
    said("WIDER_GAP", answer.WIDER_GAP, gaps, lowest=False)
    said("LOWER_LOSS_D", answer.LOWER_LOSS_D, {"calm": calm.last("loss_d"), "wins": wins.last("loss_d")}, lowest=True)


EXERCISES = {
    "5a": Exercise(
        "Four steps: when, how many forwards, who teaches",
        right={"TIMES": TIMES, "FORWARDS_BEFORE": 56, "FORWARDS_AFTER": 4, "A": [a(t) for t in TIMES]},
        mistakes={
            "the even times 1, 0.75, 0.5, 0.25 are shifted as in sampling, with s = 3.":
                {"TIMES": [1.0, 0.75, 0.5, 0.25], "A": [a(t) for t in (1.0, 0.75, 0.5, 0.25)]},
            "a step starts at each of TIMES; 0 is where the last one ends.":
                {"TIMES": [*TIMES, 0.0], "A": [a(t) for t in (*TIMES, 0.0)]},
            "with guidance a step costs two forwards, one with the caption and one without.": {"FORWARDS_BEFORE": 28},
            "the few-step student draws without guidance: it has learned guided pictures.": {"FORWARDS_AFTER": 8},
            "a_t is 1 at its largest; at t = 1 the density is 0: noise holds nothing of the picture.":
                {"A": [1 - a(t) for t in TIMES]},
        },
    ),
    "5b": Exercise(
        "Write the discriminator's heads and the hinge loss",
        right={"hinge": step_distill.hinge, "Discriminator": step_distill.Discriminator},
        mistakes={
            "the signs: real logits shall rise above 1, predicted ones fall below -1.":
                {"hinge": lambda real, fake: F.relu(1 + real).mean() + F.relu(1 - fake).mean()},
            "beyond 1 and -1 the loss is 0 (relu): a discriminator that is sure enough must not go on.":
                {"hinge": lambda real, fake: (1 - real).mean() + (1 + fake).mean()},
            "that is the softplus of the classic GAN loss; the hinge has a corner: relu(1 - real) and relu(1 + fake).":
                {"hinge": lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean()},
            "every head answers: concatenate the logits of all of them.": {"Discriminator": OneHead},
            "the heads' logits are put side by side (torch.cat), not averaged: each of them has to be convinced.":
                {"Discriminator": AverageOfHeads},
            "a deep block's features are much larger: bring each to deviation 1 with F.group_norm(f, 1).": {"Discriminator": Loud},
        },
        probe=judge, replaces={"step_distill.hinge": "hinge", "step_distill.Discriminator": "Discriminator"},
        tests={"test_step_distill.py": ("test_hinge_and_who_wants_what",
                                        "test_it_has_logits_for_every_head_and_token_and_trains_only_heads")},
    ),
    "5c": Exercise(
        "Write the few-step target's ODE solve",
        right={"solve": step_distill.solve},
        mistakes={
            "the target is guided: hand `guidance` to the teacher.": {"solve": solver(guided=False)},
            "time falls from now to then, so the step (then - start) is negative.": {"solve": solver(sign=-1)},
            "a picture at t joins when the grid has come down to t: only the rows with t > then go through the teacher.":
                {"solve": solver(everyone=True)},
            "a picture's first step begins at its own t, between now and then: clamp t to at most `now`.":
                {"solve": solver(from_one=True)},
        },
        probe=lead, replaces={"step_distill.solve": "solve"},
        tests={"test_step_distill.py": ("test_solve_of_a_perfect_field_lands_on_x0", "test_solve_from_noise_is_the_sampler")},
    ),
    "5d": Exercise(
        "Write the gradient penalty R1",
        right={"gradient_penalty": step_distill.gradient_penalty},
        mistakes={
            "R1 is the *squared* length of the gradient.": {"gradient_penalty": penalty_with(squared=False)},
            "the square is summed over the channels of a token, and averaged over tokens and pictures.":
                {"gradient_penalty": penalty_with(per_value=True)},
            "the penalty must itself have a gradient: create_graph=True.": {"gradient_penalty": penalty_with(graph=False)},
            "the slope is the heads' own: detach the features first, or the penalty also pulls at what made them.":
                {"gradient_penalty": penalty_with(detached=False)},
        },
        probe=slope, replaces={"step_distill.gradient_penalty": "gradient_penalty"},
        tests={"test_step_distill.py": ("test_gradient_penalty_is_the_squared_slope_on_real_features",)},
    ),
    "5e": Exercise(
        "A discriminator that wins (2 x 6 minutes)",
        right={"RUN_CALM": "runs/5e-calm", "RUN_WINS": "runs/5e-wins", "WIDER_GAP": "wins", "LOWER_LOSS_D": "wins"},
        mistakes={}, runs=winning_runs,
    ),
}  # fmt: skip
