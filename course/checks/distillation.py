"""Exercises of page 4, distillation."""

import torch

from course.checks.trainings import finished, only_differs, said
from course.exercise import Exercise, Hint


def scale(answer):
    """a_t, S and its gradients, at three times; and a_t at both ends of the path."""
    task = torch.tensor([0.5, 2.0, 0.1], requires_grad=True)
    kd = torch.tensor([0.25, 30.0, 0.2], requires_grad=True)
    t, ratio = torch.tensor([0.6, 0.9, 0.02]), torch.tensor([2.0, 0.1, 0.5])
    weight, value = answer.timestep_weight(t), answer.scaled(task, kd, t, ratio)
    gradients = torch.autograd.grad(value.sum(), (task, kd), allow_unused=True)
    of_task, of_kd = (torch.zeros(3) if g is None else g for g in gradients)
    return {
        "timestep_weight": weight,
        "timestep_weight at t = 0 and t = 1": answer.timestep_weight(torch.tensor([0.0, 1.0])),
        "scaled": value,
        "the gradient of task": of_task,
        "the gradient of kd": of_kd,
    }


def remember(answer):
    """What a Ratio says after each of four steps; the last fifth has no pictures in the second and third."""
    ratio, t, said = answer.Ratio(), torch.tensor([0.1, 0.15, 0.9, 1.0]), {}
    said["the ratio before the first step"] = ratio(t)
    ratio.add(torch.tensor([1.0, 3.0, 8.0, 8.0]), torch.tensor([2.0, 0.5, 1.0, 3.0]), t)
    said["the ratio before the step is over"] = ratio(t)
    ratio.step()
    said["the ratio after one step"] = ratio(t)
    for number, losses in (("two", [4.0]), ("three", [2.0])):
        ratio.add(torch.tensor(losses), torch.tensor([1.0]), t[:1])
        ratio.step()
        said[f"the ratio after {number} steps"] = ratio(t)
    ratio.add(torch.tensor([100.0]), torch.tensor([1.0]), t[3:])
    ratio.step()
    said["the ratio after four steps"] = ratio(t)
    return said


def teacher_runs(answer):
    """4e: the same student and steps, without and with a teacher."""
    alone, taught = (finished(folder, steps=400) for folder in (answer.RUN_ALONE, answer.RUN_TAUGHT))
    if alone.settings["losses"] != "task" or "out" not in taught.settings["losses"]:
        raise Hint("RUN_ALONE needs --losses task, and RUN_TAUGHT the losses of a teacher, which are the "
                   "default.")
    only_differs(alone, taught, "losses", "teacher")
    losses = {"alone": alone.last("val_loss"), "taught": taught.last("val_loss")}
    rates = {"alone": alone.median("pictures_per_second"), "taught": taught.median("pictures_per_second")}
    said("LOWER_VAL_LOSS", answer.LOWER_VAL_LOSS, losses, lowest=True)
    said("FASTER", answer.FASTER, rates, lowest=False)


S = "a * task + (1 - a) * ratio * kd"
NEW = "torch.stack([task, kd]) / n.clamp(min=1)"
MOVED = "torch.where(n > 0, self.means + rate * (new - self.means), self.means)"
KNOWN = "torch.where(kd > 0, task / kd.clamp(min=1e-12), torch.ones_like(kd))"

EXERCISES = {
    "4a": Exercise(
        "Who teaches when: a_t at three times",
        asks=("A", "PULL"),
        mistakes={
            "a_t is the density *divided by its largest value*, which it takes at t = 0.5.":
                {" / density(0.5)": ""},
            "the logit-normal's density has a factor 1 / (t (1 - t)): t is a function of the normal number, "
            "not that number.":
                {" / (t * (1 - t))": ""},
            "t = sigmoid(n): the normal density is asked at n = log(t / (1 - t)), not at t.":
                [{"math.log(t / (1 - t))": "t"}, {"math.log(t / (1 - t))": "t", " / (t * (1 - t))": ""}],
            "the exponent of the normal density is -n^2 / 2, with a half.":
                {"-(n**2) / 2": "-(n**2)"},
            "n is the natural logarithm of t / (1 - t).":
                {"math.log(": "math.log10("},
            "PULL is what multiplies the teacher's loss: (1 - a_t) and the ratio, not a_t.":
                {"1 - A[2]": "A[2]"},
            "the ratio is |L_task| / |L_kd|: it brings the small loss of the teacher up to the task's size.":
                {"0.6 / 0.02": "0.02 / 0.6"},
            "the ratio sg(L_task / L_kd) multiplies L_kd as well, not only 1 - a_t.":
                {" * 0.6 / 0.02": ""},
            "PULL is what L_kd is multiplied *with*: without L_kd itself.":
                {" * 0.6 / 0.02": " * 0.6"},
        },
    ),
    "4b": Exercise(
        "Write timestep-aware scaling",
        asks=("timestep_weight", "scaled"),
        mistakes={
            "at t = 0 and t = 1 the density is 0 / 0: clamp t a little inside (0, 1) first.":
                [{"t = t.clamp(1e-6, 1 - 1e-6)": "t = t"}, {"1e-6, 1 - 1e-6": "0, 1"}],
            "the data teaches in the middle (a_t L_task), the teacher at the ends ((1 - a_t) ratio L_kd); "
            "yours is the other way.":
                {S: "(1 - a) * task + a * ratio * kd"},
            "the ratio is missing: L_kd is much smaller than L_task, and would say nothing.":
                {"ratio * ": ""},
            "ratio multiplies L_kd alone, not the whole sum.":
                {S: "ratio * (a * task + (1 - a) * kd)"},
            "the ratio multiplies: it is |L_task| / |L_kd| already.":
                {S: "a * task + (1 - a) * kd / ratio"},
            "a_t must be 1 at its largest: divide the density by its value at t = 0.5.":
                [{"density / 4": "density"}, {"density / 4": "density / 2.5066283"}],
            "its largest value is that at t = 0.5, and not the largest in this batch.":
                {"density / 4": "density / density.max()"},
            "the density has a factor 1 / (t (1 - t)): t is a function of the normal number, not that "
            "number.":
                [{" / (t * (1 - t))": "", "density / 4": "density"}, {" / (t * (1 - t))": ""}],
            "the exponent of the normal density is -n^2 / 2, with a half.":
                {"** 2 / 2": "** 2"},
            "the stop-gradient sg() is around the ratio, which is given as a number; L_kd itself is what the "
            "student learns from.":
                {"ratio * kd": "ratio * kd.detach()"},
            "there is an S for each picture, (B,): the batch is not averaged here.":
                {S: f"({S}).mean()"},
        },
        probe=scale, own=("distill.timestep_weight", "distill.scaled"),
        replaces={"distill.timestep_weight": "timestep_weight", "distill.scaled": "scaled"},
        tests={"test_distill.py": ("test_a_t_is_the_logit_normal_density_divided_by_its_maximum",
                                   "test_scaling_gives_each_loss_its_gradient",
                                   "test_scaling_does_not_depend_on_the_features_unit")},
    ),
    "4c": Exercise(
        "Why the ratio is a running mean",
        asks=("NEAR", "FAR", "RUNNING_NEAR", "RUNNING_FAR"),
        mistakes={
            "with sg() the ratio is a number, 1 / d^2 here. Multiply it by the derivative of d^2.":
                {"NEAR": 0.02, "FAR": 2.0},
            "without sg() the product is 1 whatever d is, and its derivative is 0. S has sg() in it.":
                {"NEAR": 0.0, "FAR": 0.0},
            "the derivative of d^2 is 2 d, and it is that of each picture's own loss, not of the mean over "
            "two pictures.":
                [{" * 2 *": " *"}, {"* 2 * 0.01": "* 0.01**2", "* 2 * 1": "* 1"}],
            "the running ratio is one number for both pictures: the mean of L_task over the mean of L_kd, "
            "which is about 1 / 0.5.":
                {"RUNNING_NEAR": 200.0, "RUNNING_FAR": 2.0},
            "the ratio of the means, not the mean of both ratios: in the latter the near picture decides "
            "alone.":
                {"1 / ((0.01**2 + 1**2) / 2)": "(1 / 0.01**2 + 1) / 2"},
            "the ratio is |L_task| / |L_kd|, and not upside down.":
                {"1 / ((0.01**2 + 1**2) / 2)": "(0.01**2 + 1**2) / 2"},
        },
    ),
    "4d": Exercise(
        "Write the running ratio",
        asks=("Ratio",),
        mistakes={
            "the ratio of the means, not the mean of the ratios: one picture that agrees would make the "
            "latter explode.":
                {"[task, kd, torch.ones_like(t)]": "[task / kd, torch.ones_like(t), torch.ones_like(t)]"},
            "a running mean moves by a twentieth of the way to the new value; yours forgets all steps but "
            "the last.":
                {"0.05, 1.0": "1.0, 1.0"},
            "a running mean moves by a twentieth of the way to the new value; yours keeps a twentieth of the "
            "old one.":
                {"0.05, 1.0": "0.95, 1.0"},
            "the first mean is taken as it is: it does not start from 0.":
                {"torch.where(self.means > 0, 0.05, 1.0)": "0.05"},
            "a step uses the ratio of the steps before it: otherwise it depends on how the batch is cut into "
            "parts.":
                [{"task, kd = self.means": "task, kd, _ = self.sums"},
                 {"[task, kd, torch.ones_like(t)]))": "[task, kd, torch.ones_like(t)])); was = "
                                                      "self.sums.clone(); "
                                                      "self.step(); self.sums = was"}],
            "it is the mean of this step's losses that moves the running mean: divide the sums by the number "
            "of pictures.":
                {" / n.clamp(min=1)": ""},
            "fifths without pictures stay as they are; yours move towards 0, or become NaN.":
                [{MOVED: MOVED.split(", ")[1]}, {MOVED: MOVED.split(", ")[1], "n.clamp(min=1)": "n"}],
            "once the step is over its sums begin at zero again.":
                {"self.sums.zero_()": "pass"},
            "where nothing is known yet the ratio is 1: 0 / 0 is NaN.":
                [{KNOWN: "task / kd"}, {KNOWN: "task / kd.clamp(min=1e-12)"}],
            "each picture gets the ratio of its own fifth: index with self.bin(t).":
                [{"[self.bin(t)]": ""}, {"[self.bin(t)]": ".mean().expand(len(t))"}],
            "the ratio is L_task over L_kd, and not upside down.":
                {"task, kd = self.means": "kd, task = self.means"},
        },
        probe=remember, own=("distill.Ratio.forward", "distill.Ratio.step"),
        replaces={"distill.Ratio": "Ratio"},
        tests={"test_distill.py": ("test_ratio_is_a_running_mean_for_each_fifth_of_t",)},
    ),
    "4e": Exercise(
        "The same steps without and with a teacher (10 minutes)",
        asks=("RUN_ALONE", "RUN_TAUGHT", "LOWER_VAL_LOSS", "FASTER"), runs=teacher_runs,
    ),
}  # fmt: skip
