"""Exercises of page 4, distillation."""

import math

import torch

import distill
from course.checks.trainings import finished, only_differs, said
from course.exercise import Exercise, Hint


def a(t):
    return distill.timestep_weight(torch.tensor([t])).item()


def density(t):
    return math.exp(-0.5 * math.log(t / (1 - t)) ** 2) / (t * (1 - t)) / math.sqrt(2 * math.pi)


def scale(answer):
    """S and its gradients, at a time in the middle and at both ends."""
    task = torch.tensor([0.5, 2.0, 0.1], requires_grad=True)
    kd = torch.tensor([0.25, 30.0, 0.2], requires_grad=True)
    t, ratio = torch.tensor([0.5, 0.9, 0.02]), torch.tensor([2.0, 0.1, 0.5])
    weight, value = answer.timestep_weight(t), answer.scaled(task, kd, t, ratio)
    gradients = torch.autograd.grad(value.sum(), (task, kd), allow_unused=True, retain_graph=True)
    zeros = [torch.zeros(3) if g is None else g for g in gradients]
    return {"timestep_weight": weight, "scaled": value, "the gradient of task": zeros[0], "the gradient of kd": zeros[1]}


def swapped(task, kd, t, ratio):
    weight = distill.timestep_weight(t)
    return (1 - weight) * task + weight * ratio * kd


def without_ratio(task, kd, t, ratio):
    return distill.scaled(task, kd, t, 1.0)


def not_divided(t):
    return torch.exp(-0.5 * torch.logit(t) ** 2) / (t * (1 - t)) / math.sqrt(2 * math.pi)


def remember(answer):
    """What a Ratio says after each of three steps."""
    ratio, t, said = answer.Ratio(), torch.tensor([0.1, 0.15, 0.9, 1.0]), {}
    said["the ratio before the first step"] = ratio(t)
    ratio.add(torch.tensor([1.0, 3.0, 8.0, 8.0]), torch.tensor([2.0, 0.5, 1.0, 3.0]), t)
    said["the ratio before the step is over"] = ratio(t)
    ratio.step()
    said["the ratio after one step"] = ratio(t)
    ratio.add(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0]), t[:2])
    ratio.step()
    said["the ratio after two steps"] = ratio(t)
    return said


def ratio_with(of_means=True, rate=0.05, at_once=False):
    """distill.Ratio with a mistake: the mean of ratios, no memory, or a ratio that knows the step's own pictures."""

    class Ratio(distill.Ratio):
        def add(self, task, kd, t, weights=None):
            super().add(task if of_means else task / kd, kd if of_means else torch.ones_like(kd), t, weights)
            if at_once:
                self.update(1.0)

        def update(self, rate):
            task, kd, n = self.sums
            new = torch.stack([task, kd]) / n.clamp(min=1)
            self.means.copy_(torch.where(n > 0, self.means.lerp(new, torch.where(self.means > 0, rate, 1.0)), self.means))

        def step(self):
            self.update(rate)
            self.sums.zero_()

    return Ratio


def teacher_runs(answer):
    """4e: the same student and steps, without and with a teacher."""
    alone, taught = finished(answer.RUN_ALONE), finished(answer.RUN_TAUGHT)
    if alone.settings["losses"] != "task" or "out" not in taught.settings["losses"]:
        raise Hint("RUN_ALONE needs --losses task, and RUN_TAUGHT the losses of a teacher, which are the default.")
    only_differs(alone, taught, "losses", "teacher")
    said("LOWER_VAL_LOSS", answer.LOWER_VAL_LOSS, {"alone": alone.last("val_loss"), "taught": taught.last("val_loss")}, lowest=True)
    said("FASTER", answer.FASTER, {"alone": alone.median("pictures_per_second"), "taught": taught.median("pictures_per_second")},
         lowest=False)  # fmt: skip


EXERCISES = {
    "4a": Exercise(
        "Who teaches when: a_t at three times",
        right={"A": [a(0.5), a(0.75), a(0.9)], "PULL": (1 - a(0.9)) * 0.6 / 0.02},
        mistakes={
            "a_t is the density *divided by its largest value*, which it takes at t = 0.5.":
                {"A": [density(0.5), density(0.75), density(0.9)], "PULL": (1 - density(0.9)) * 0.6 / 0.02},
            "the logit-normal's density has a factor 1 / (t (1 - t)): t is a function of the normal number, not that number.":
                {"A": [math.exp(-0.5 * math.log(t / (1 - t)) ** 2) for t in (0.5, 0.75, 0.9)],
                 "PULL": (1 - math.exp(-0.5 * math.log(9) ** 2)) * 0.6 / 0.02},
            "PULL is what multiplies the teacher's loss: (1 - a_t) and the ratio, not a_t.": {"PULL": a(0.9) * 0.6 / 0.02},
            "the ratio is |L_task| / |L_kd|: it brings the small loss of the teacher up to the task's size.":
                {"PULL": (1 - a(0.9)) * 0.02 / 0.6},
        },
    ),
    "4b": Exercise(
        "Write timestep-aware scaling",
        right={"timestep_weight": distill.timestep_weight, "scaled": distill.scaled},
        mistakes={
            "the data teaches in the middle (a_t L_task), the teacher at the ends ((1 - a_t) ratio L_kd); yours is the other way.":
                {"scaled": swapped},
            "the ratio is missing: L_kd is much smaller than L_task, and would say nothing.": {"scaled": without_ratio},
            "a_t must be 1 at its largest: divide the density by its value at t = 0.5.":
                {"timestep_weight": not_divided,
                 "scaled": lambda task, kd, t, ratio: not_divided(t) * task + (1 - not_divided(t)) * ratio * kd},
            "ratio multiplies L_kd alone, not the whole sum.":
                {"scaled": lambda task, kd, t, ratio: ratio * distill.scaled(task, kd, t, 1.0)},
        },
        probe=scale, replaces={"distill.timestep_weight": "timestep_weight", "distill.scaled": "scaled"},
        tests={"test_distill.py": ("test_a_t_is_the_logit_normal_density_divided_by_its_maximum",
                                   "test_scaling_gives_each_loss_its_gradient",
                                   "test_scaling_does_not_depend_on_the_features_unit")},
    ),
    "4c": Exercise(
        "Why the ratio is a running mean",
        right={"NEAR": 200.0, "FAR": 2.0, "RUNNING_NEAR": 0.04, "RUNNING_FAR": 4.0},
        mistakes={
            "with sg() the ratio is a number, 1 / d^2 here. Multiply it by the derivative of d^2.": {"NEAR": 0.02, "FAR": 2.0},
            "without sg() the product is 1 whatever d is, and its derivative is 0. S has sg() in it.": {"NEAR": 0.0, "FAR": 0.0},
            "the running ratio is one number for both pictures: the mean of L_task over the mean of L_kd, which is about 1 / 0.5.":
                {"RUNNING_NEAR": 200.0, "RUNNING_FAR": 2.0},
        },
    ),
    "4d": Exercise(
        "Write the running ratio",
        right={"Ratio": distill.Ratio},
        mistakes={
            "the ratio of the means, not the mean of the ratios: one picture that agrees would make the latter explode.":
                {"Ratio": ratio_with(of_means=False)},
            "a running mean moves by a twentieth of the way to the new value; yours forgets all steps but the last.":
                {"Ratio": ratio_with(rate=1.0)},
            "a step uses the ratio of the steps before it: otherwise it depends on how the batch is cut into parts.":
                {"Ratio": ratio_with(at_once=True)},
        },
        probe=remember, replaces={"distill.Ratio": "Ratio"},
        tests={"test_distill.py": ("test_ratio_is_a_running_mean_for_each_fifth_of_t",)},
    ),
    "4e": Exercise(
        "The same steps without and with a teacher (10 minutes)",
        right={"RUN_ALONE": "runs/4e-alone", "RUN_TAUGHT": "runs/4e-taught", "LOWER_VAL_LOSS": "taught", "FASTER": "alone"},
        mistakes={}, runs=teacher_runs,
    ),
}  # fmt: skip
