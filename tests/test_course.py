"""The course: every solution is right, every known mistake gets its own hint, every hole is one."""

import ast
import importlib
import json
import re
import shutil
import textwrap
import types

import numpy as np
import pytest
import torch

import decoder
import distill
import flow
import model
from course import check, exercise
from course.check import EXERCISES, exercise_file
from course.exercise import Hint, load_answer

TRAININGS = [number for number, one in EXERCISES.items() if one.runs]
CODE = [number for number in EXERCISES if number not in TRAININGS]
HOLE = re.compile(r"^( *)raise NotImplementedError.*$", flags=re.M)


def checked(number, text, tmp_path):
    """Checks an answer with this text."""
    path = tmp_path / f"{number}.py"
    path.write_text(text, encoding="utf-8")
    exercise.check(number, EXERCISES[number], load_answer(path), path)


def filled(number, *answers):
    """The exercise with code in its holes, from top to bottom; or behind it, where it asks for numbers."""
    text = exercise_file(number).read_text(encoding="utf-8")
    if not HOLE.search(text):
        return "\n".join([text, *answers])
    for code in answers:
        text = HOLE.sub(lambda hole, code=code: textwrap.indent(code, hole[1]), text, count=1)
    return text


def test_every_page_has_its_exercises_and_every_exercise_its_files():
    for page in "123456":
        mine = [number for number in EXERCISES if number.startswith(page)]
        assert 3 <= len(mine) <= 5 and any(EXERCISES[number].tests for number in mine)
    for folder in ("exercises", "solutions"):
        assert sorted(p.stem for p in (exercise.ROOT / "course" / folder).glob("*.py")) == sorted(EXERCISES)
    for number in EXERCISES:
        title = EXERCISES[number].title.split(" (")[0]  # without the minutes
        assert exercise_file(number).read_text(encoding="utf-8").startswith(f'"""{number}  {title}')


@pytest.mark.parametrize("number", CODE)
def test_the_solution_is_right(number):
    path = exercise_file(number, "solutions")
    exercise.check(number, EXERCISES[number], load_answer(path), path)


@pytest.mark.parametrize("number", [number for number in CODE if EXERCISES[number].replaces])
def test_the_project_computes_what_the_solution_computes(number):
    """To the same probe the project's own function is the solution's twin; but it is no student's work."""
    one, project = EXERCISES[number], types.SimpleNamespace()
    for target, name in one.replaces.items():
        module, attribute = target.rsplit(".", 1)
        setattr(project, name, getattr(importlib.import_module(module), attribute))
    solution = load_answer(exercise_file(number, "solutions"))
    right, got = (exercise.outcome(one, answer) for answer in (solution, project))
    differ = [what for what in right if not exercise.same(got[what], right[what])]
    assert differ == {"1b": ["whether it is written out"]}.get(number, [])
    with pytest.raises(Hint, match="project's own|written out|write out"):
        exercise.check(number, one, project)


def test_the_numbers_of_the_solutions_are_the_projects():
    solution = {number: load_answer(exercise_file(number, "solutions")) for number in CODE}
    full, separable = (model.conv3x3(model.UNetConfig(separable=kind), 256, 512) for kind in (False, True))
    assert sum(p.numel() for p in full.parameters()) == solution["1a"].FULL
    assert sum(p.numel() for p in separable.parameters()) == solution["1a"].SEPARABLE
    sizes = []
    with torch.device("meta"):
        net = decoder.TinyDecoder(decoder.PRESETS["sd3"])
        for module in net.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _, given, out: sizes.append(out.numel()))
                module.register_forward_pre_hook(lambda _, given: sizes.append(given[0].numel()))
        net(torch.zeros(1, 16, 128, 128))
    assert sizes[1] * 2 / 1e6 == solution["3a"].FIRST  # sizes[0] is what the first convolution takes
    assert max(sizes) * 2 / 1e6 == solution["3a"].LARGEST
    assert pytest.approx(distill.timestep_weight(torch.tensor([0.5, 0.75, 0.9])).tolist()) == solution["4a"].A
    times = flow.sampling_timesteps(4, 3.0)[:-1]
    assert pytest.approx(times.tolist()) == solution["5a"].TIMES
    assert pytest.approx(distill.timestep_weight(times).tolist(), abs=1e-4) == solution["5a"].A
    below_1000 = np.nextafter(np.float16(1000), np.float16(0))
    assert 1000 - below_1000 == solution["6a"].SPACING
    largest = solution["6a"].LARGEST_SQUARE
    assert np.isfinite(np.float16(largest**2)) and np.isinf(np.float16((largest + 1) ** 2))


@pytest.mark.parametrize("number", CODE)
def test_every_mistake_gets_its_own_hint(number):
    one, path = EXERCISES[number], exercise_file(number, "solutions")
    assert len(one.mistakes) >= 3
    for hint, ways in one.mistakes.items():
        for changes in ways if isinstance(ways, list) else [ways]:
            with pytest.raises(Hint) as raised:
                exercise.check(number, one, load_answer(path, changes), path)
            assert str(raised.value) == hint, changes


@pytest.mark.parametrize("number", CODE)
def test_an_exercise_as_it_is_handed_out_is_not_right(number):
    path = exercise_file(number)
    with pytest.raises(Hint, match="hole|empty"):
        exercise.check(number, EXERCISES[number], load_answer(path), path)


def test_the_projects_own_tests_see_the_answer():
    """With a wrong function in place the reference test fails, and afterwards the project is as it was."""
    one, original = EXERCISES["2c"], flow.logit_normal_timesteps
    wrong = types.SimpleNamespace(logit_normal_timesteps=lambda n, **more: torch.rand(n, **more))
    with pytest.raises(Hint, match="test_logit_normal_timesteps_have_the_right_distribution"):
        exercise.run_tests(one, wrong, "answer")
    assert flow.logit_normal_timesteps is original


@pytest.mark.parametrize(("number", "answers"), [
    ("1b", ["if rope is not None:\n    q, k = (model.rotate(x, *rope) for x in (q, k.unsqueeze(2)))\n"
            "k = k.view(len(k), -1, self.head_dim)\nw = q.transpose(1, 2) @ k[:, None].transpose(2, 3) * "
            "self.head_dim**-0.5\n"
            "w = w if mask is None else w + torch.zeros(mask.shape).masked_fill(mask.logical_not(), -1e9)\n"
            "out = (w.softmax(3) @ v[:, None]).transpose(1, 2)"]),
    ("1c", ["half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)\n"
            "return x * torch.cat([cos, cos], -1).unsqueeze(1) + half * torch.cat([sin, sin], "
            "-1).unsqueeze(1)"]),
    ("2a", ["import numpy as np\nSHIFTED, BEFORE, SHARE = np.float32(0.75), np.float64(0.75), "
            "np.float32(0.864)"]),
    ("2b", ["return x0 + expand(t, x0) * (eps - x0)", "return eps - x0", "return x_t - expand(t, v) * v"]),
    ("2d", ["t = torch.full((len(x),), float(now))\nboth = [torch.cat(pair) for pair in zip(text, empty)]\n"
            "if guidance == 1:\n    v = model(x, t, *text)\nelse:\n"
            "    v_text, v_empty = model(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)\n"
            "    v = v_text + (guidance - 1) * (v_text - v_empty)\nx += (then - now) * v"]),
    ("3c", ["a, b = (torch.autograd.grad(some, weight, retain_graph=True)[0].square().sum() ** 0.5 for some "
            "in (loss, loss_adv))\n"
            "return torch.clamp(a / (b + 1e-8), 0, 1e4).detach()"]),
    ("4a", ["import numpy as np, torch\nfrom distill import timestep_weight\n"
            "A = [timestep_weight(torch.tensor([t])) for t in (0.5, 0.75, 0.9)]\nPULL = (1 - A[-1]) * 30"]),
    ("4b", ["n = torch.distributions.Normal(0, 1).log_prob(torch.logit(t, eps=1e-5)).exp()\n"
            "t = t.clamp(1e-5, 1 - 1e-5)\nreturn n / (t - t**2) * (2 * torch.pi) ** 0.5 / 4",
            "return torch.lerp(ratio * kd, task, timestep_weight(t))"]),
    ("5a", ["import numpy as np\nTIMES, A = np.array([1, 0.9, 0.75, 0.5]), np.array([0, 0.248, 0.729, 1])\n"
            "FORWARDS_BEFORE, FORWARDS_AFTER = np.int64(56), 4"]),
    ("6c", ["return (mask - 1) * 3e4"]),
    ("6c", ["return mask.log()"]),
    ("6d", ["conv = nn.Conv2d(*linear.weight.T.shape, (1, 1), bias=linear.bias is not None)\n"
            "conv.load_state_dict({k: w if w.dim() < 2 else w[..., None, None] for k, w in "
            "linear.state_dict().items()})\n"
            "return conv"]),
])  # fmt: skip
def test_other_forms_of_a_right_answer_are_right(number, answers, tmp_path):
    checked(number, "import torch\n" + filled(number, *answers), tmp_path)


@pytest.mark.parametrize(("number", "text"), [
    ("1b", "from model import Attention as Theirs\nclass Attention(Theirs):\n    def forward(self, *args, "
           "**more):\n"
           "        return super().forward(*args, **more)"),
    ("1c", "import model\ndef rotate(*args):\n    return model.rotate(*args)"),
    ("2b", "from flow import *\nfrom flow import expand, velocity as slope\n"
           "def velocity(x0, eps):\n    return slope(x0, eps)"),
    ("2c", "import functools, flow\nlogit_normal_timesteps = functools.partial(flow.logit_normal_timesteps)"),
    ("2d", "from flow import euler_sample"),
    ("2d", "import flow\ndef euler_sample(model, noise, text, empty, steps=28, guidance=3.0, shift=1.0):\n"
           "    times, x = flow.sampling_timesteps(steps, shift), noise\n"
           "    for now, then in zip(times[:-1], times[1:]):\n"
           "        v = model(x, now.expand(len(x)), *text)\n"
           "        if guidance != 1:\n"
           "            v = flow.guide(v, model(x, now.expand(len(x)), *empty), guidance)\n"
           "        x = x + (then - now) * v\n"
           "    return x"),
    ("3b", "from decoder import Block"),
    ("3c", "from decoder import adaptive_weight"),
    ("4b", "from distill import timestep_weight\ndef scaled(task, kd, t, ratio):\n"
           "    a = timestep_weight(t)\n    return a * task + (1 - a) * ratio * kd"),
    ("4d", "import distill\nclass Ratio(distill.Ratio):\n    def step(self):\n        return super().step()"),
    ("5b", "import torch.nn.functional as F\nfrom step_distill import Discriminator\n"
           "def hinge(real, fake):\n    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()"),
    ("5c", "import step_distill\nsolve = step_distill.solve"),
    ("5d", "from step_distill import gradient_penalty"),
    ("6b", "from coreml.layers import LayerNormGroups"),
    ("6b", "from coreml import layers\nclass LayerNormGroups(layers.LayerNormGroups):\n    def forward(self, "
           "x):\n"
           "        return layers.norm_groups(x, self.groups, self.eps, self.weight, self.bias)"),
    ("6d", "from coreml.layers import as_conv"),
])  # fmt: skip
def test_the_projects_own_function_is_no_answer(number, text, tmp_path):
    with pytest.raises(Hint, match="by calling the project's own|right, but by "
                                   "F.scaled_dot_product_attention"):
        checked(number, text, tmp_path)


SUM = "out = torch.einsum('bhst,btd->bshd', w, v)"
TURN = "if rope:\n    q = model.rotate(q, *rope)\n    k = model.rotate(k[:, :, None], *rope).squeeze(2)"
DOT = "w = torch.einsum('bshd,btd->bhst', q, k)"
MASK = "if mask is not None:\n    w = w.masked_fill(mask.logical_not(), float('-inf'))"
BLOCK = "def conv(k, groups):\n    return nn.Conv2d(c_out, c_out, k, 1, k // 2, 1, groups, groups == 1)\n"
PASS = "return x + self.body(x)"
WRONG = [  # (exercise, what a student writes into its holes, a piece of the hint)
    ("1a", "FULL, SEPARABLE = 9 * 256 * 512, 9 * 256 + 256 * 512", "also has a bias"),
    ("1a", "FULL = 3 * 3 * 256 * 512 + 256\nSEPARABLE = 9 * 256 + 256 * 512 + 256\nMACS_RATIO = 8.84",
     "each *output* channel"),
    ("1a", "FULL, SEPARABLE = 1180160, 133888\nMACS_RATIO = FULL / SEPARABLE",
     "leave them out of MACS_RATIO"),
    ("1a", "FULL, MACS_RATIO = 1180160, 8.845\nSEPARABLE = 512 * 9 + 256 * 512 + 512",
     "as many as *input* channels"),
    ("1b", f"{TURN}\n{DOT}\n{MASK}\nw = w.softmax(-1)\n{SUM}", "not scaled"),
    ("1b", f"{TURN}\n{DOT} / self.head_dim**0.5\nw = w if mask is None else w + mask * -1e9\nw = "
           f"w.softmax(-1)\n{SUM}",
     "the mask is inverted"),
    ("1b", f"{TURN}\n{DOT} / self.head_dim**0.5\n{MASK}\nw = w.softmax(-1)\n"
           "out = torch.matmul(w, v[:, None]).permute(0, 2, 3, 1)", "heads stand in the wrong order"),
    ("1b", f"{TURN}\n{DOT} / self.head_dim**0.5\n{MASK}\nw = w.softmax(-1)\n"
           "out = (w @ v[:, None]).reshape(len(x), -1, q.shape[2], self.head_dim)",
     "heads stand in the wrong order"),
    ("1b", f"{DOT} / self.head_dim**0.5\n{MASK}\nw = w.softmax(-1)\n{SUM}", "`rope` changes nothing"),
    ("1b", f"if rope:\n    q = model.rotate(q, *rope)\n{DOT} / self.head_dim**0.5\n{MASK}\nw = "
           f"w.softmax(-1)\n{SUM}",
     "`rope` turns both"),
    ("1b", f"{TURN}\n{DOT} / x.shape[2] ** 0.5\n{MASK}\nw = w.softmax(-1)\n{SUM}", "width of *one head*"),
    ("1b", f"{TURN}\n{DOT} / self.head_dim**0.5\nw = w.softmax(-1)\nw = w * mask if mask is not None else "
           f"w\n{SUM}",
     "masked after the softmax"),
    ("1b", f"{TURN}\n{DOT} / self.head_dim**0.5\n{MASK}\nw = torch.softmax(w, 1)\n{SUM}",
     "softmax goes over the keys"),
    ("1c", "a, b = x[..., ::2], x[..., 1::2]\nc, s = cos.unsqueeze(1), sin.unsqueeze(1)\n"
           "return torch.stack([a * c - b * s, b * c + a * s], -1).reshape(x.shape)",
     "not with its neighbour"),
    ("1c", "a, b = x.chunk(2, -1)\nreturn torch.cat([a * cos - b * sin, a * sin + b * cos], -1)",
     "an axis of length 1"),
    ("1c", "d = x.shape[-1] // 2\nc, s = cos[:, None], sin[:, None]\n"
           "return torch.cat([x[..., :d] * c + x[..., d:] * s, x[..., d:] * c - x[..., :d] * s], -1)",
     "turn by -angle"),
    ("1c", "a, b = x.chunk(2, -1)\nz = torch.view_as_complex(torch.stack([a, b], -1)) * "
           "torch.polar(torch.ones_like(cos), "
           "torch.atan2(sin, cos))[:, None]\nreturn torch.cat([z.real, z.imag], -1)", "complex numbers"),
    ("1d", "STAGE_2, STAGE_3 = 8 * 4096**2 * 2 / 2**20, 14 * 1024**2 * 2 / 2**20", "mebibyte"),
    ("1d", "STAGE_2, STAGE_3 = 4096**2 * 2 / 1e6, 1024**2 * 2 / 1e6", "each head has scores of its own"),
    ("1d", "STAGE_2, STAGE_3 = 512 * 4096**2 * 2 / 1e6, 896 * 1024**2 * 2 / 1e6",
     "one score for a pair of pixels"),
    ("1d", "STAGE_2, STAGE_3 = 8 * 4096 * 2 / 1e6, 14 * 1024 * 2 / 1e6", "the number of pixels is squared"),
    ("2a", "SHIFTED, BEFORE, SHARE = 0.25, 0.964, 0.136", "t = 0 for noise throughout"),
    ("2a", "SHIFTED, BEFORE, SHARE = 1.5, 0.3, 0.864", "a shifted time is still at most 1"),
    ("2a", "SHIFTED, BEFORE, SHARE = 0.75, 0.75, 0.136", "the share *below* 0.5"),
    ("2a", "SHIFTED, BEFORE, SHARE = 0.75, 0.964, 0.864", "Solve the formula for t"),
    ("2b", ["return (1 - expand(t, eps)) * eps + expand(t, x0) * x0", "return x0 - eps",
            "return x_t + v - expand(t, v) * v"], "throughout"),
    ("2b", ["return x0 + expand(t, x0) * (eps - x0)", "return -(eps - x0)", "return x_t - expand(t, v) * v"],
     "with which sign"),
    ("2b", ["return x0 + t * (eps - x0)", "return eps - x0", "return x_t - expand(t, v) * v"], "expand"),
    ("2b", ["return x0 + expand(t, x0) * (eps - x0)", "return eps", "return x_t - expand(t, v) * v"],
     "and not the noise"),
    ("2b", ["return (1 - expand(t, x0)) ** 0.5 * x0 + expand(t, x0) ** 0.5 * eps", "return eps - x0",
            "return x_t - expand(t, v) * v"],
     "without the square roots"),
    ("2c", "n = torch.randn(n) * std + mean\nreturn flow.shift_timesteps(n.sigmoid(), shift)",
     "hand the generator"),
    ("2c", "return flow.shift_timesteps(torch.rand(n, generator=generator), shift)",
     "these times are uniform"),
    ("2c", "return 1 / (1 + torch.exp(-torch.randn(n, generator=generator) * std - mean))",
     "`shift` changes nothing"),
    ("2c", "x = torch.randn(n, generator=generator)\nreturn flow.shift_timesteps(torch.sigmoid((x + mean) * "
           "std), shift)",
     "the mean is added afterwards"),
    ("2d", "v = model(x, now, *text)\nif guidance != 1:\n    e = model(x, now, *empty)\n    v = e + guidance "
           "* (v - e)\n"
           "x = x + (then - now) * v", "a time for each picture"),
    ("2d", "x = noise if now == 1 else x\nt = now.repeat(len(x))\nv = model(x, t, *text)\nif guidance != 1:\n"
           "    e = model(x, t, *empty)\n    v = e + guidance * (v - e)\nx += (then - now) * v",
     "caller's noise"),
    ("2d", "t = now.repeat(len(x))\nv, e = model(x, t, *text), model(x, t, *empty)\nx = x + (then - now) * "
           "(v + guidance * (v - e))",
     "guidance starts from v_empty"),
    ("2d", "t = now.repeat(len(x))\nv, e = model(x, t, *text), model(x, t, *empty)\nx = x + (then - now) * "
           "(e + guidance * (v - e))",
     "one forward a step"),
    ("2d", "t = now.repeat(len(x))\nv = model(x, t, *text)\nif guidance != 1:\n    e = model(x, t, *empty)\n"
           "    v = e + guidance * (v - e)\nx = x - v / steps", "steps unequal"),
    ("2d", "t = now.repeat(len(x))\nv = model(x, t, text)\nx = x + (then - now) * v",
     "hand them over with a star"),
    ("2d", "t = now.repeat(len(x))\nv = model(x, t, *text)\nif guidance != 1:\n    e = model(x, t, *empty)\n"
           "    v = v + guidance * (v - e)\nx = x - (then - now) * v", "the step (then - now) is negative"),
    ("3a", "LARGEST, FIRST = 320, 8", "mebibyte"),
    ("3a", "LARGEST, FIRST = 160 * 512**2 * 2e-6, 8.39", "four times as large"),
    ("3a", "LARGEST, FIRST = 167.8, 4.19", "count bytes"),
    ("3a", "LARGEST, FIRST = 335.5, 0.524", "the first convolution takes 16 channels"),
    ("3b", [f"{BLOCK}self.body = nn.Sequential(conv(3, c_out), conv(1, 1), conv(3, c_out), nn.SiLU(), "
            "nn.GroupNorm(cfg.groups, c_out), conv(1, 1))", PASS], "GroupNorm comes before SiLU"),
    ("3b", [f"{BLOCK}self.body = nn.Sequential(conv(3, 1), conv(1, 1), conv(3, 1), nn.GroupNorm(cfg.groups, "
            f"c_out), nn.SiLU(), "
            "conv(1, 1))\nself.body[0].bias = self.body[2].bias = None", PASS], "one group a channel"),
    ("3b", [f"{BLOCK}self.body = nn.Sequential(conv(3, c_out), conv(1, 1), conv(3, c_out), "
            f"nn.GroupNorm(c_out, cfg.groups), "
            "nn.SiLU(), conv(1, 1))", PASS], "the number of groups first"),
    ("3b", [f"{BLOCK}self.body = nn.Sequential(conv(3, c_out), conv(1, 1), conv(3, c_out), "
            f"nn.GroupNorm(cfg.groups, c_out), "
            "nn.SiLU(), conv(1, 1))", "return self.body(x)"], "adds its input"),
    ("3c", "lengths = []\nfor some in (loss, loss_adv):\n    weight.grad = None\n    "
           "some.backward(retain_graph=True)\n"
           "    lengths.append(weight.grad.norm())\nweight.grad = None\n"
           "return (lengths[0] / (lengths[1] + 1e-8)).clamp(max=1e4).detach()", "every layer's .grad"),
    ("3c", "a, b = (torch.autograd.grad(some, weight)[0].norm() for some in (loss, loss_adv))\n"
           "return (a / (b + 1e-8)).clamp(max=1e4).detach()", "graphs are still needed"),
    ("3c", "a, b = (torch.autograd.grad(some, weight, retain_graph=True) for some in (loss, loss_adv))\n"
           "return (a.norm() / (b.norm() + 1e-8)).clamp(max=1e4).detach()", "gives a tuple"),
    ("3c", "a, b = (torch.autograd.grad(some, weight, retain_graph=True)[0].norm() for some in (loss, "
           "loss_adv))\n"
           "return min((a / (b + 1e-8)).item(), 1e4)", "a tensor is asked for"),
    ("3c", "return (loss / (loss_adv + 1e-8)).clamp(max=1e4).detach()", "not the losses"),
    ("3d", "return sum((F.normalize(a - b) ** 2).sum(1).mean((1, 2)) for a, b in zip(f, g))",
     "not their difference"),
    ("3d", "return sum(F.mse_loss(F.normalize(a), F.normalize(b), reduction='none').mean((1, 2, 3)) for a, b "
           "in zip(f, g))",
     "*summed* over channels"),
    ("3d", "return sum((F.normalize(a) - F.normalize(b)).norm(dim=1).mean((1, 2)) for a, b in zip(f, g))",
     "without the square root"),
    ("3d", "return sum((F.normalize(a) - F.normalize(b)).pow(2).sum(1).mean() for a, b in zip(f, g))",
     "for each picture"),
    ("4a", "A, PULL = [1, 0.547, 0.0894], 27.3", "has a factor 1 / (t (1 - t))"),
    ("4a", "A, PULL = [1, 0.729, 0.248], 0.752", "multiplies L_kd as well"),
    ("4a", "A, PULL = [1, 0.729, 0.248], 0.752 * 0.6", "without L_kd itself"),
    ("4a", "A, PULL = [1.5958, 1.1636, 0.3963], 18.11", "divided by its largest value"),
    ("4b", ["return torch.exp(-torch.logit(t) ** 2 / 2) / (4 * t * (1 - t))",
            "a = timestep_weight(t)\nreturn a * task + (1 - a) * ratio * kd"], "clamp t a little inside"),
    ("4b", ["t = t.clamp(1e-6, 1 - 1e-6)\nd = torch.exp(-torch.logit(t) ** 2 / 2) / (t * (1 - t))\nreturn d "
            "/ d.amax()",
            "a = timestep_weight(t)\nreturn a * task + (1 - a) * ratio * kd"],
     "not the largest in this batch"),
    ("4b", ["t = t.clamp(1e-6, 1 - 1e-6)\nreturn torch.exp(-torch.logit(t) ** 2 / 2) / (4 * t * (1 - t))",
            "a = timestep_weight(t)\nreturn a * task + (1 - a) * (ratio * kd).detach()"], "stop-gradient"),
    ("4b", ["t = t.clamp(1e-6, 1 - 1e-6)\nreturn torch.exp(-torch.logit(t) ** 2 / 2) / (4 * t * (1 - t))",
            "a = timestep_weight(t)\nreturn (a * task + (1 - a) * ratio * kd).mean()"], "for each picture"),
    ("4c", "NEAR, FAR, RUNNING_NEAR, RUNNING_FAR = 100, 1, 0.02, 2", "the derivative of d^2 is 2 d"),
    ("4c", "NEAR, FAR, RUNNING_NEAR, RUNNING_FAR = 200, 2, 100.01, 10001", "not the mean of both ratios"),
    ("4c", "NEAR, FAR, RUNNING_NEAR, RUNNING_FAR = 0, 0, 0.04, 4", "S has sg() in it"),
    ("4d", ["return (self.means[0] / self.means[1])[self.bin(t)]",
            "new = self.sums[:2] / self.sums[2].clamp(min=1)\nfor i in range(self.bins):\n"
            "    rate = (0.05 if self.means[0, i] else 1) if self.sums[2, i] else 0\n"
            "    self.means[:, i] += rate * (new[:, i] - self.means[:, i])\nself.sums.zero_()"],
     "0 / 0 is NaN"),
    ("4d", ["return torch.nan_to_num(self.means[0] / self.means[1], nan=1.0)[self.bin(t)]",
            "self.means = 0.95 * self.means + 0.05 * self.sums[:2] / "
            "self.sums[2].clamp(min=1)\nself.sums.zero_()"],
     "does not start from 0"),
    ("4d", ["return torch.nan_to_num(self.means[0] / self.means[1], nan=1.0)[self.bin(t)]",
            "n = self.sums[2]\nnew = self.sums[:2] / n.clamp(min=1)\nmoved = torch.where(self.means > 0, "
            "self.means + (new - self.means) / 20, new)\nself.means = torch.where(n > 0, moved, self.means)"],
     "begin at zero again"),
    ("4d", ["return torch.nan_to_num(self.means[0] / self.means[1], nan=1.0)[self.bin(t)]",
            "n = self.sums[2]\nnew = self.sums[:2]\nmoved = torch.where(self.means > 0, self.means + (new - "
            "self.means) / 20, new)\n"
            "self.means = torch.where(n > 0, moved, self.means)\nself.sums.zero_()"], "divide the sums"),
    ("5a", "TIMES, A = [1, 0.857, 0.6, 0], [0, 0.42, 0.9, 0]\nFORWARDS_BEFORE, FORWARDS_AFTER = 56, 4",
     "four steps have five times"),
    ("5a", "TIMES, A = [1, 0.9, 0.75, 0.5, 0], [0, 0.248, 0.729, 1, 0]\nFORWARDS_BEFORE, FORWARDS_AFTER = "
           "56, 4",
     "0 is where the last one ends"),
    ("5a", "TIMES, A = [1, 0.9, 0.75, 0.5], [0, 0.729, 1, 0.729]\nFORWARDS_BEFORE, FORWARDS_AFTER = 56, 4",
     "TIMES, which are shifted"),
    ("5b", ["return torch.clamp(1 - on_real, min=0).mean() + torch.clamp(1 + on_fake, min=0).mean()",
            "with torch.no_grad():\n    features = self.teacher(latents, t, ids)[1]\nreturn [F.group_norm(f, "
            "1) for f in features]",
            "return torch.cat([h(f).flatten(1) for h, f in zip(self.heads, features)], 1)"],
     "the gradient ends at your features"),
    ("5b", ["return F.relu(1 - on_real.mean()) + F.relu(1 + on_fake.mean())",
            "return [F.group_norm(f, 1) for f in self.teacher(latents, t, ids)[1]]",
            "return torch.cat([h(f).flatten(1) for h, f in zip(self.heads, features)], 1)"],
     "relu comes before the mean"),
    ("5b", ["return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()",
            "return [F.group_norm(f, 1) for f in self.teacher(latents, t, ids)[1]]",
            "return torch.cat([h(f).flatten() for h, f in zip(self.heads, features)])"],
     "keeps a row of logits"),
    ("5b", ["return F.relu(-on_real).mean() + F.relu(on_fake).mean()", "return list(self.teacher(latents, t, "
                                                                       "ids)[1])",
            "return torch.cat([h(f).flatten(1) for h, f in zip(self.heads, features)], 1)"],
     "bring each to deviation 1"),
    ("5c", "rows = (t >= now - 1e-4).nonzero()[:, 0]\nif len(rows):\n    v = teacher(x0[rows], "
           "t[rows].clamp(max=float(now)), "
           "ids[rows], guidance)[0]\n    x0[rows] += flow.expand(then - t[rows].clamp(max=float(now)), v) * "
           "v",
     "its first step is a short one"),
    ("5c", "v = teacher(x0, t.clamp(max=float(now)), ids, guidance)[0]\nstep = (then - "
           "t.clamp(max=float(now))).clamp(max=0)\n"
           "x0 = x0 + flow.expand(step, v) * v", "only the rows on their way"),
    ("5c", "rows = t > then + 1e-4\nif rows.any():\n    v = teacher(x0[rows], t[rows].clamp(max=float(now)), "
           "ids[rows], guidance)[0]\n"
           "    x0[rows] += (then - now) * v", "first step begins at its own t"),
    ("5d", "f = [x.detach() for x in features]\ny = discriminator.logits(f)\ng = "
           "torch.autograd.grad(y.sum(), f, create_graph=True)\n"
           "return sum((x**2).sum(1).mean() for x in g), y", "no longer asks for a gradient"),
    ("5d", "f = [x.detach().requires_grad_() for x in features]\ny = discriminator.logits(f)\n"
           "g = torch.autograd.grad(y.mean(), f, create_graph=True)\nreturn sum((x**2).sum(1).mean() for x "
           "in g), y", "gradient of the *sum*"),
    ("5d", "f = [x.detach().requires_grad_() for x in features]\ny = discriminator.logits(f)\n"
           "g = torch.autograd.grad(y.sum(), f, create_graph=True)\nreturn 0.5 * sum((x**2).sum(1).mean() "
           "for x in g), y", "no half"),
    ("5d", "f = [x.detach().requires_grad_() for x in features]\ny = discriminator.logits(f)\n"
           "g = torch.autograd.grad(y.sum(), f, create_graph=True)\nreturn sum(x.norm(dim=1).mean() for x in "
           "g), y", "*squared* length"),
    ("6a", "MEGABYTES_16, MEGABYTES_6, LARGEST_SQUARE, SPACING = 724.2, 271.6, 255, 0.5", "mebibyte"),
    ("6a", "MEGABYTES_16, MEGABYTES_6, LARGEST_SQUARE, SPACING = 759.4, 284.8, 256, 0.5", "beyond 65504"),
    ("6a", "MEGABYTES_16, MEGABYTES_6, LARGEST_SQUARE, SPACING = 759.4, 284.8, 255, 2**-10",
     "grows with the number"),
    ("6b", "h = F.layer_norm(x.view(len(x), self.groups, -1), (x[0].numel() // self.groups,)).view_as(x)\n"
           "return h * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)",
     "F.layer_norm would take 1e-5"),
    ("6b", "h = F.layer_norm(x.view(len(x), self.groups, -1), (x[0].numel() // self.groups,), "
           "eps=self.eps).view_as(x)\n"
           "return h * self.weight + self.bias", "axes of length 1"),
    ("6b", "h = x.view(len(x), self.groups, -1)\nm, s = h.mean(2, True), h.var(2, False, keepdim=True)\n"
           "h = ((h - m) / (s + self.eps) ** 0.5).view_as(x)\n"
           "return h * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)",
     "leave sums and squares"),
    ("6b", "return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)", "GroupNorm as it was"),
    ("6c", "return (1 - mask) * -1e9", "0 times that is NaN"),
    ("6c", "return -10**9 * (1.0 - mask)", "0 times that is NaN"),
    ("6c", "return (mask == 0).float() * -10000", "that is float32"),
    ("6c", "return (1 - mask) * -50", "too small a number"),
    ("6c", "return mask * -1e4", "where the mask is 0"),
    ("6c", "return (1 - mask) * 1e4", "raises the logits of padding"),
    ("6d", "return linear", "no nn.Conv2d"),
    ("6d", "return lambda x: linear(x.transpose(1, 3)).transpose(1, 3)", "no nn.Conv2d"),
    ("6d", "conv = nn.Conv1d(linear.in_features, linear.out_features, 1)\nreturn lambda x: conv(x[:, :, "
           "0])[:, :, None]", "no nn.Conv2d"),
    ("6d", "conv = nn.Conv2d(linear.in_features, linear.out_features, 1)\nconv.weight.data = "
           "linear.weight.data.t()[:, :, None, None]\n"
           "conv.bias = linear.bias\nreturn conv", "no transpose is needed"),
    ("6d", "conv = nn.Conv2d(linear.in_features, linear.out_features, 1)\nconv.weight.data = "
           "linear.weight.data[:, :, None, None]\n"
           "conv.bias.data = linear.bias.data\nreturn conv", "without a bias has linear.bias None"),
    ("6d", "conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=False)\n"
           "conv.weight.data = linear.weight.data[..., None, None]\nreturn conv", "the bias is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answers", "hint"), WRONG)
def test_what_students_write_is_refused_with_a_hint_that_teaches(number, answers, hint, tmp_path):
    text = filled(number, *([answers] if isinstance(answers, str) else answers))
    with pytest.raises(Hint) as raised:
        checked(number, text, tmp_path)
    assert hint in str(raised.value) and str(raised.value) in EXERCISES[number].mistakes


@pytest.mark.parametrize(("number", "text", "hint"), [
    ("2a", "import numpy as np\nSHIFTED = BEFORE = SHARE = np.array([0.75, 0.75])", "not right yet"),
    ("2a", "import sys\nsys.exit()", "stops with SystemExit"),
])  # fmt: skip
def test_an_answer_of_the_wrong_form_is_not_right(number, text, hint, tmp_path):
    with pytest.raises(Hint, match=hint):
        checked(number, text, tmp_path)


@pytest.mark.parametrize(("text", "sentence"), [
    ("def velocity(", "line 1, is not Python"),
    ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ("interpolate = x0_from_velocity = None", "defines no velocity"),
    ("from flow import *\ndef velocity(x0, eps):\n    return x0 @ 3", "line 3 of answers"),
    ("from flow import *\ndef velocity(x0, eps):\n    return 2 * (eps - x0)", "velocity is not right yet: it "
                                                                              "is off by up to"),
    ("from flow import *\ndef velocity(x0, eps):\n    return (eps - x0)[:1]", "must have the shape (4, 3, 2, "
                                                                              "2), not (1, 3, 2, 2)"),
    ("from flow import *\ndef velocity(x0, eps):\n    return x0 - eps", "and with which sign?"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_one_sentence(text, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check.main(["2b"])
    assert "wrote answers" in capsys.readouterr().out
    (tmp_path / "answers" / "2b.py").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        check.main(["2b"])
    message = str(stopped.value)
    assert message.startswith("2b: not yet. ") and sentence in message and "\n" not in message


def test_a_right_answer_and_the_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers").mkdir()
    shutil.copy(exercise_file("2a", "solutions"), tmp_path / "answers" / "2a.py")
    shutil.copy(exercise_file("3a"), tmp_path / "answers" / "3a.py")
    check.main(["2a"])
    assert capsys.readouterr().out == "2a: right.\n"
    check.main([])
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == EXERCISES.keys()
    assert lines["2a"].endswith(" right") and lines["3a"].endswith(" not yet")
    assert lines["4a"] == EXERCISES["4a"].title
    with pytest.raises(SystemExit, match="there is no exercise '9z'"):
        check.main(["9z"])


# ----------------------------------------------------------------------------------------------------------
# Questions about trainings: runs of the right form, made by hand

COLUMNS = {  # of the last row: {exercise: {run: (settings that differ, columns)}}
    "1e": {"1e-a": ({"ladder": "a"}, {"val_loss": 0.8, "pictures_per_second": 200}),
           "1e-f": ({"ladder": None}, {"val_loss": 0.9, "pictures_per_second": 250})},
    "2e": {"2e-few": ({"pictures": 64, "contents": "1f"}, {"loss": 0.5, "val_loss": 0.9}),
           "2e-many": ({"pictures": 20000, "contents": "2f"}, {"loss": 0.7, "val_loss": 0.7})},
    "3e": {"3e-without": ({"gan_weight": 0.0}, {"val_psnr": 33.0}),
           "3e-much": ({"gan_weight": 0.5}, {"val_psnr": 32.0})},
    "4e": {"4e-alone": ({"losses": "task"}, {"val_loss": 0.5, "pictures_per_second": 100}),
           "4e-taught": ({"losses": "task+out+feat"}, {"val_loss": 0.45, "pictures_per_second": 80})},
    "5e": {"5e-calm": ({"heads_lr": 1e-4, "penalty": 0.1}, {"d_real": 0.1, "d_fake": -0.1, "loss_d": 1.8}),
           "5e-wins": ({"heads_lr": 3e-3, "penalty": 0.0}, {"d_real": 2.0, "d_fake": -2.0, "loss_d": 0.1})},
}  # fmt: skip


def make_run(folder, settings, columns, step=800, steps=800):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"settings": {"steps": steps, "lr": 1e-3, **settings}, "step": step}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [["step", *columns], [50, *(2 * value for value in columns.values())], [step, *columns.values()]]
    (folder / "log.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("number", COLUMNS)
def test_questions_about_trainings(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, path = EXERCISES[number], exercise_file(number, "solutions")
    solution = load_answer(path)
    with pytest.raises(Hint, match="holds no run with a log yet"):
        exercise.check(number, one, solution, path)
    for name, (settings, columns) in COLUMNS[number].items():
        make_run(tmp_path / "runs" / name, settings, columns)
    exercise.check(number, one, solution, path)
    with pytest.raises(Hint, match="must be one of"):  # as it is handed out
        exercise.check(number, one, load_answer(exercise_file(number)), path)
    claims = [name for name in one.asks if not name.startswith("RUN")]
    runs = [name for name in one.asks if name.startswith("RUN")]
    for name in claims:  # the other answer
        (other,) = {run.split("-")[1] for run in COLUMNS[number]} - {getattr(solution, name)}
        with pytest.raises(Hint, match="your own logs say"):
            exercise.check(number, one, types.SimpleNamespace(**{**vars(solution), name: other}))
    swapped = dict(zip(runs, reversed([getattr(solution, run) for run in runs]), strict=True))
    with pytest.raises(Hint):
        exercise.check(number, one, types.SimpleNamespace(**{**vars(solution), **swapped}))
    name, (settings, columns) = next(iter(COLUMNS[number].items()))
    make_run(tmp_path / "runs" / name, {**settings, "lr": 5.0}, columns)
    with pytest.raises(Hint, match="also differ in --lr"):
        exercise.check(number, one, solution, path)
    make_run(tmp_path / "runs" / name, settings, columns, step=250)
    with pytest.raises(Hint, match="is at step 250 of 800"):
        exercise.check(number, one, solution, path)
    for name, (settings, columns) in COLUMNS[number].items():
        make_run(tmp_path / "runs" / name, settings, columns, step=50, steps=50)
    with pytest.raises(Hint, match="was trained for 50 steps, and much of that is warm-up"):
        exercise.check(number, one, solution, path)


def test_the_question_about_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    number, one, path = "6e", EXERCISES["6e"], exercise_file("6e", "solutions")
    with pytest.raises(Hint, match="FileNotFoundError"):
        load_answer(path)
    for bits, decibels in ((6, 24.5), (4, 12.1)):
        (tmp_path / f"build{bits}").mkdir()
        (tmp_path / f"build{bits}" / "pipeline.json").write_text(json.dumps({"nbits": bits}))
        report = {"parts": {"unet": {"sizes": {"8x8": {"decibels": decibels}}}}}
        (tmp_path / f"build{bits}" / "verification.json").write_text(json.dumps(report))
    solution = load_answer(path)
    exercise.check(number, one, solution, path)
    for changes, sentence in (
        ({"BUILD_4": "build6"}, "has weights of 6 bits, not 4"),
        ({"BUILD_6": "nowhere"}, "holds no verified UNet"),
        ({"MORE_DECIBELS": 4}, "your own logs say"),
        ({"LOST_PER_BIT": 12.4}, "loses 12.4 dB"),
    ):
        with pytest.raises(Hint, match=sentence):
            exercise.check(number, one, types.SimpleNamespace(**{**vars(solution), **changes}))


# ----------------------------------------------------------------------------------------------------------
# The pages


PAGES = sorted((exercise.ROOT / "course").glob("[1-6]_*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_equation_stands_beside_the_line_that_computes_it(page):
    """| equation | `file.py`, `function` | `line` |: the line is in that function today, whitespace apart."""
    section = page.read_text(encoding="utf-8").split("## The equations and their lines")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .+ \| `(\S+\.py)`, `(\w+)` \| `(.+)` \|$", section, flags=re.M)
    assert len(rows) >= 5 and len(rows) == section.count("\n| ") - 1
    for file, name, line in rows:
        source = (exercise.ROOT / file).read_text(encoding="utf-8")
        (node,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == name)
        found = "".join(ast.get_source_segment(source, node).split())
        assert "".join(line.replace("\\|", "|").split()) in found, f"{file}, {name} has no line {line}"


def test_every_page_lists_its_exercises():
    for page in PAGES:
        listed = re.findall(r"^\* \*\*(\d\w)\*\* (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
        mine = {number: one.title for number, one in EXERCISES.items() if number[0] == page.stem[0]}
        assert dict(listed) == mine and len(listed) == len(mine)
