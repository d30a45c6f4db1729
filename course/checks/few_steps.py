"""Exercises of page 5, few steps."""

from types import SimpleNamespace

import torch
from torch import nn

import flow
from course.checks.trainings import finished, only_differs, said
from course.exercise import Exercise, Hint


class Features:
    """Stands in for a teacher: two features that are linear in the latents, the second much larger."""

    layers, feature_dim = (0, 1), 16

    def __call__(self, latents, t, ids):
        return latents, [2 * latents, 100 * latents + 3]


def judge(answer):
    """Losses of known logits; the logits of a Discriminator with given weights, and their gradient."""
    torch.manual_seed(0)
    real, fake = 2 * torch.randn(2, 5), 2 * torch.randn(2, 5)
    discriminator = answer.Discriminator(Features())
    with torch.no_grad():
        for weight in discriminator.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape))
    latents = torch.randn(3, 16, 4, 4, requires_grad=True)
    logits = discriminator(latents, torch.ones(3), torch.zeros(3, dtype=torch.long))
    (gradient,) = torch.autograd.grad(logits.square().sum(), latents, allow_unused=True)
    return {
        "hinge": answer.hinge(real, fake),
        "hinge of certain answers": answer.hinge(torch.tensor([3.0]), torch.tensor([-3.0])),
        "the logits": logits,
        "the gradient that the latents get": torch.zeros_like(latents) if gradient is None else gradient,
    }


def lead(answer):
    """Where a field that bends leads from four times, and whose guidance it was asked for."""
    torch.manual_seed(0)
    x, rows, guidances = torch.randn(4, 2, 4, 4), [], set()

    def teacher(x, t, ids, guidance=1.0):
        rows.append(len(x))
        guidances.add(guidance)
        return torch.sin(3 * x) + guidance * flow.expand(t, x) ** 2, []

    t = torch.tensor([1.0, 0.93, 0.8, 0.45])
    x0 = answer.solve(teacher, x, t, torch.zeros(4, dtype=torch.long), 3.0, 3.0, 8)
    return {"x0_T": x0, "the number of pictures in each forward": rows, "the guidance": list(guidances)}


def slope(answer):
    """The penalty of three heads on three features, which come from latents."""
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 1)) for _ in range(3)]

    def answers(features):
        return torch.cat([head(f).flatten(1) for head, f in zip(heads, features, strict=True)], dim=1)

    discriminator = SimpleNamespace(heads=heads, logits=answers)
    latents = torch.randn(2, 16, 4, 4, requires_grad=True)
    penalty, logits = answer.gradient_penalty(discriminator, [latents.sin(), latents.cos(), latents.tanh()])
    trains = penalty.requires_grad
    if trains:
        penalty.backward()
    return {
        "the penalty": penalty.detach(),
        "the logits": logits.detach(),
        "whether the penalty has a gradient": trains,
        "whether the features are detached": latents.grad is None,
    }


def winning_runs(answer):
    """5e: a discriminator that learns too fast."""
    calm, wins = (finished(folder, steps=100) for folder in (answer.RUN_CALM, answer.RUN_WINS))
    only_differs(calm, wins, "heads_lr", "penalty")
    if wins.settings["heads_lr"] < 10 * calm.settings["heads_lr"]:
        raise Hint("give RUN_WINS at least ten times the --heads-lr of RUN_CALM.")
    gaps = {name: run.last("d_real") - run.last("d_fake") for name, run in (("calm", calm), ("wins", wins))}
    said("WIDER_GAP", answer.WIDER_GAP, gaps, lowest=False)
    losses = {"calm": calm.last("loss_d"), "wins": wins.last("loss_d")}
    said("LOWER_LOSS_D", answer.LOWER_LOSS_D, losses, lowest=True)


HINGE = "F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()"
CAT = "torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)], dim=1)"
OWN_T = "t[rows].clamp(max=float(now))"
LENGTH = ".sum(dim=1).mean()"
FORWARD = "v, _ = teacher(x0[rows], start, ids[rows], guidance)"

EXERCISES = {
    "5a": Exercise(
        "Four steps: when, how many forwards, who teaches",
        asks=("TIMES", "FORWARDS_BEFORE", "FORWARDS_AFTER", "A"),
        mistakes={
            "the even times 1, 0.75, 0.5, 0.25 are shifted as in sampling, with s = 3.":
                {"[shift(t) for": "[t for"},
            "a step starts at each of TIMES; 0 is where the last one ends.":
                [{"0.5, 0.25)": "0.5, 0.25, 0)"}, {"(1, 0.75, 0.5, 0.25)": "(0.75, 0.5, 0.25, 0)"}],
            "four steps have five times, from 1 to 0: they are a quarter apart before the shift.":
                {"(1, 0.75, 0.5, 0.25)": "(1, 2 / 3, 1 / 3, 0)"},
            "drawing begins with noise, at t = 1: the times fall.":
                {"(1, 0.75, 0.5, 0.25)": "(0.25, 0.5, 0.75, 1)"},
            "with guidance a step costs two forwards, one with the caption and one without.":
                {"FORWARDS_BEFORE": 28},
            "the few-step student draws without guidance: it has learned guided pictures.":
                {"FORWARDS_AFTER": 8},
            "a_t is 1 at its largest; at t = 1 the density is 0: noise holds nothing of the picture.":
                {"A = [a(t)": "A = [1 - a(t)"},
            "a_t is asked at TIMES, which are shifted.":
                {"[a(t) for t in TIMES]": "[a(t) for t in (1, 0.75, 0.5, 0.25)]"},
            "a_t must be 1 at its largest: divide the density by its value at t = 0.5.":
                [{" / 4": ""}, {" / 4": " / 2.5066283"}],
        },
    ),
    "5b": Exercise(
        "Write the discriminator's heads and the hinge loss",
        asks=("hinge", "Discriminator"),
        mistakes={
            "the signs: real logits shall rise above 1, predicted ones fall below -1.":
                {HINGE: "F.relu(1 + on_real).mean() + F.relu(1 - on_fake).mean()"},
            "beyond 1 and -1 the loss is 0 (relu): a discriminator that is sure enough must not go on.":
                {HINGE: "(1 - on_real).mean() + (1 + on_fake).mean()"},
            "that is the softplus of the classic GAN loss; the hinge has a corner: relu(1 - real) and relu(1 "
            "+ fake).":
                {HINGE: "F.softplus(-on_real).mean() + F.softplus(on_fake).mean()"},
            "the corner is at 1 and at -1, not at 0: a logit must be right with a margin.":
                {HINGE: "F.relu(-on_real).mean() + F.relu(on_fake).mean()"},
            "E is a mean over pictures and tokens, and not their sum.":
                {".mean()": ".sum()"},
            "relu comes before the mean: it is each answer that may be sure enough, not all of them "
            "together.":
                {HINGE: "F.relu(1 - on_real.mean()) + F.relu(1 + on_fake.mean())"},
            "L_D is the sum of both means, without a half.":
                {HINGE: f"({HINGE}) / 2"},
            "every head answers: concatenate the logits of all of them.":
                [{CAT: f"self.heads[{i}](features[{i}]).flatten(1)"} for i in (0, -1)],
            "the heads' logits are put side by side (torch.cat), not averaged: each of them has to be "
            "convinced.":
                [{CAT: CAT.replace("torch.cat", "torch.stack").replace("dim=1", "dim=0") + ".mean(dim=0)"},
                 {CAT: CAT.replace("torch.cat", "torch.stack").replace("dim=1", "dim=0") + ".sum(dim=0)"}],
            "each picture keeps a row of logits, (B, heads * h * w): flatten(1), and put them together along "
            "dim 1.":
                [{CAT: CAT.replace("dim=1", "dim=0")}, {"flatten(1)": "flatten()", "dim=1": "dim=0"}],
            "a deep block's features are much larger: bring each to deviation 1 with F.group_norm(f, 1).":
                {"F.group_norm(f, 1)": "f"},
            "the gradient ends at your features: without .detach() and no_grad it reaches the latents, and "
            "the student learns.":
                {"F.group_norm(f, 1)": "F.group_norm(f.detach(), 1)"},
        },
        probe=judge,
        own=("step_distill.hinge", "step_distill.Discriminator.features",
             "step_distill.Discriminator.logits"),
        replaces={"step_distill.hinge": "hinge", "step_distill.Discriminator": "Discriminator"},
        tests={"test_step_distill.py": ("test_hinge_and_who_wants_what",
                                        "test_it_has_logits_for_every_head_and_token_and_trains_only_heads")},
    ),
    "5c": Exercise(
        "Write the few-step target's ODE solve",
        asks=("solve",),
        mistakes={
            "the target is guided: hand `guidance` to the teacher.":
                {", ids[rows], guidance)": ", ids[rows])"},
            "time falls from now to then, so the step (then - start) is negative.":
                {"then - start": "start - then"},
            "a picture at t joins when the grid has come down to t: only the rows with t > then go through "
            "the teacher.":
                [{"t > then + 1e-4": "t >= 0", OWN_T: "now.expand(int(rows.sum()))"},
                 {"t > then + 1e-4": "t >= 0"}],
            "a picture between `now` and `then` is on its way already: its first step is a short one, from "
            "its own t.":
                [{"t > then + 1e-4": "t >= now - 1e-4"}, {"t > then + 1e-4": "t > now - 1e-4"}],
            "a picture's first step begins at its own t, between now and then: clamp t to at most `now`.":
                [{OWN_T: "now.expand(int(rows.sum()))"}, {"flow.expand(then - start, v)": "(then - now)"}],
            "once a picture is on the grid, its step begins at `now`, no longer at its own t.":
                {".clamp(max=float(now))": ""},
            "a teacher is dear: only the rows on their way go through it, not all of them with most thrown "
            "away.":
                {FORWARD: "v = teacher(x0, t.clamp(max=float(now)), ids, guidance)[0][rows]"},
            "all rows on their way go through the teacher in one forward, not one after the other.":
                {FORWARD: "v = torch.cat([teacher(x0[i : i + 1], t[i : i + 1].clamp(max=float(now)), ids[i : "
                          "i + 1], guidance)[0] "
                          "for i in torch.where(rows)[0].tolist()])"},
        },
        probe=lead, own=("step_distill.solve",), replaces={"step_distill.solve": "solve"},
        tests={"test_step_distill.py": ("test_solve_of_a_perfect_field_lands_on_x0",
                                        "test_solve_from_noise_is_the_sampler")},
    ),
    "5d": Exercise(
        "Write the gradient penalty R1",
        asks=("gradient_penalty",),
        mistakes={
            "R1 is the *squared* length of the gradient.":
                [{".sum(dim=1)": ".sum(dim=1).sqrt()"}, {"square()": "abs()"}],
            "the square is summed over the channels of a token, and averaged over tokens and pictures.":
                [{LENGTH: wrong} for wrong in (".mean()", ".sum()", ".sum(dim=(1, 2, 3)).mean()")],
            "it is the gradient of the *sum* of the logits: a mean makes every slope as small as there are "
            "logits.":
                {"logits.sum()": "logits.mean()"},
            "the heads are summed, not averaged.":
                {"for g in gradients)": "for g in gradients) / len(gradients)"},
            "no half here: how much R1 counts is a weight of its own.":
                {"return sum(": "return 0.5 * sum("},
            "the penalty must itself have a gradient: create_graph=True.":
                [{"create_graph=": "retain_graph="}, {", create_graph=True": ""}],
            "the slope is the heads' own: detach the features first, or the penalty also pulls at what made "
            "them.":
                [{"f.detach().requires_grad_()": "f"}, {"f.detach()": "f.clone()"}],
            "a detached feature no longer asks for a gradient: .requires_grad_() after .detach().":
                {".requires_grad_()": ""},
        },
        probe=slope, own=("step_distill.gradient_penalty",),
        replaces={"step_distill.gradient_penalty": "gradient_penalty"},
        tests={"test_step_distill.py": ("test_gradient_penalty_is_the_squared_slope_on_real_features",)},
    ),
    "5e": Exercise(
        "A discriminator that wins (2 x 6 minutes)",
        asks=("RUN_CALM", "RUN_WINS", "WIDER_GAP", "LOWER_LOSS_D"), runs=winning_runs,
    ),
}  # fmt: skip
