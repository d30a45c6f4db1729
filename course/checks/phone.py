"""Exercises of page 6, the phone."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from course.checks.trainings import said
from course.exercise import Called, Exercise, Hint


def group(answer):
    """A GroupNorm with given gain and offset, on random numbers; and in half precision on large ones."""
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(4, 12, eps=0.05), torch.randn(2, 12, 5, 7)
    nn.init.uniform_(norm.weight, 0.5, 2.0), nn.init.normal_(norm.bias)
    with torch.no_grad(), Called() as called:
        picture, right = answer.LayerNormGroups(norm)(3 * x + 1), F.group_norm(x, 4, norm.weight, norm.bias)
        large = answer.LayerNormGroups(norm.half())((1000 * x).half())
        held = large.shape == right.shape and bool((large - right).abs().max() < 0.02)
        return {
            "the normalised picture": picture,
            "whether float16 holds what is computed": held,
            "whether F.layer_norm computes it": "layer_norm" in called.names,
            "whether it does without F.group_norm": "group_norm" not in called.names,
        }


class HalfConstants(TorchFunctionMode):
    """A phone has a program's constants in float16 as well, where PyTorch takes them as they are written."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def held(x):
            return math.copysign(math.inf, x) if isinstance(x, int | float) and abs(x) > 65519 else x

        return function(*map(held, args), **{name: held(x) for name, x in (kwargs or {}).items()})


def attend(answer):
    """What a softmax in half precision makes of three tokens, of which the last is padding."""
    logits = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 100.0]]).half()
    mask = torch.tensor([[1.0, 1.0, 0.0]] * 2).half()
    with HalfConstants():
        bias = answer.as_bias(mask)
    weights = (logits + bias).softmax(-1)
    return {
        "whether it is free of NaN": not bias.isnan().any().item(),
        "whether the real tokens' logits stay as they are": not bias[:, :2].any().item(),
        "whether padding's logits are not raised": not (bias[:, 2] > 0).any().item(),
        "whether padding gets no weight": not weights[:, 2].any().item(),
        "whether it is float16": bias.dtype == torch.float16,
    }


def turn(answer):
    """A linear layer as a convolution: what kind of layer, and whose weights it has."""
    torch.manual_seed(0)
    seen = {}
    for name, linear in (("a square layer", nn.Linear(6, 6)), ("a wide layer", nn.Linear(6, 10)),
                         ("a layer without bias", nn.Linear(6, 10, bias=False))):  # fmt: skip
        conv = answer.as_conv(linear)
        a_conv, w = isinstance(conv, nn.Conv2d), linear.weight
        weights = conv.weight.squeeze() if a_conv else torch.zeros(())
        whose = [kind for kind, mine in (("its own", w), ("transposed", w.T)) if torch.equal(weights, mine)]
        bias = conv.bias if a_conv else None
        the_same = bias is linear.bias or None not in (bias, linear.bias) and torch.equal(bias, linear.bias)
        output = conv(torch.zeros(2, 6, 1, 7)).shape if a_conv else ()
        seen |= {
            f"whether {name} becomes an nn.Conv2d": a_conv,
            f"whether the kernel of {name} is 1x1": a_conv and conv.kernel_size == (1, 1),
            f"the weights of {name}": whose[0] if whose else "others",
            f"the bias of {name}": "its own" if the_same else "none" if bias is None else "another",
            f"the shape of what {name} gives": str(tuple(output)),
        }
    return seen


def bits_runs(answer):
    """6e: packages of 4 and of 6 bits."""
    decibels = {}
    for bits in (4, 6):
        folder = Path(str(getattr(answer, f"BUILD_{bits}")))
        try:
            plan = json.loads((folder / "pipeline.json").read_text(encoding="utf-8-sig"))
            report = json.loads((folder / "verification.json").read_text(encoding="utf-8-sig"))
            decibels[bits] = min(size["decibels"] for size in report["parts"]["unet"]["sizes"].values())
        except (OSError, ValueError, KeyError):
            make = f"python export_coreml.py --nbits {bits} --out {folder}"
            raise Hint(f"{folder} holds no verified UNet: {make} makes it.") from None
        if plan["nbits"] != bits:
            raise Hint(f"{folder} has weights of {plan['nbits']} bits, not {bits}.")
    said("MORE_DECIBELS", answer.MORE_DECIBELS, decibels, lowest=False)
    lost = decibels[6] - decibels[4]
    try:
        said_lost = float(answer.LOST_PER_BIT)
    except (TypeError, ValueError):
        raise Hint("LOST_PER_BIT is still empty: write a number there.") from None
    if not abs(said_lost - lost / 2) <= 0.3:
        raise Hint(f"LOST_PER_BIT is {answer.LOST_PER_BIT}, but from 6 to 4 bits your UNet loses {lost:.1f} "
                   f"dB.")


ROWS = "x.reshape(x.shape[0], self.groups, -1)"
AFFINE = "h * self.weight[None, :, None, None] + self.bias[None, :, None, None]"
NORMED = "F.layer_norm(rows, rows.shape[-1:], eps=self.eps)"
WITH_BIAS = ", bias=linear.bias is not None"

EXERCISES = {
    "6a": Exercise(
        "What fits into a phone, and into a half-precision number",
        asks=("MEGABYTES_16", "MEGABYTES_6", "LARGEST_SQUARE", "SPACING"),
        mistakes={
            "eight bits are one byte.":
                {" / 8": ""},
            "float32 has four bytes a weight; the packages have two.":
                {"MEGABYTES_16": 379.7 * 4},
            "six bits are less than one byte: three quarters of it.":
                [{"MEGABYTES_6": 379.7}, {"MEGABYTES_6": 379.7 * 6}],
            "2^20 bytes are a mebibyte (MiB); a megabyte (MB) is 10^6 bytes.":
                {" / 8": " / 8 * 1e6 / 2**20"},
            "65504 is the largest number of float16. Whose square is that?":
                {"LARGEST_SQUARE": 65504},
            "256^2 is 65536, and that is beyond 65504.":
                {"LARGEST_SQUARE": 256},
            "a whole number is asked for.":
                {"int(65504**0.5)": "65504**0.5"},
            "a half-precision number has 10 bits after the leading one: between 512 and 1024 the steps are "
            "512 / 1024.":
                {"SPACING": 1.0},
            "the error of rounding is at most half the spacing; SPACING asks for the distance of two "
            "neighbours.":
                {"SPACING": 0.25},
            "that is the spacing just above 1; a floating-point number's spacing grows with the number.":
                {"SPACING": 2**-10},
        },
    ),
    "6b": Exercise(
        "Write GroupNorm for float16",
        asks=("LayerNormGroups",),
        mistakes={
            "a *group* of channels is normalised together: reshape to (B, groups, everything else) first.":
                {ROWS: "x.reshape(x.shape[0], x.shape[1], -1)"},
            "the gain and the offset of each channel are missing.":
                {AFFINE: "h"},
            "the offset of each channel is added, after the gain.":
                [{AFFINE: AFFINE.replace(" + ", " - ")}, {AFFINE: AFFINE.split(" + ")[0]}],
            "gain and offset have one number a channel: they need axes of length 1 for height and width.":
                {AFFINE: "h * self.weight + self.bias"},
            "there are several groups, each with a mean of its own; yours are all one.":
                {ROWS: "x.reshape(x.shape[0], 1, -1)"},
            "each picture has means of its own: the first axis stays the batch.":
                {ROWS: "x.transpose(0, 1).reshape(self.groups, -1)",
                 ".reshape(x.shape)": ".reshape(x.transpose(0, 1).shape).transpose(0, 1)"},
            "the channels of a group are neighbours: (B, groups, everything else), in this order.":
                {ROWS: "x.reshape(x.shape[0], -1, self.groups).transpose(1, 2)",
                 ".reshape(x.shape)": ".transpose(1, 2).reshape(x.shape)"},
            "eps is the norm's own, self.eps: F.layer_norm would take 1e-5.":
                {", eps=self.eps": ""},
            "that is GroupNorm as it was, and becomes nine operations: reshape, and call F.layer_norm.":
                {f"{NORMED}.reshape(x.shape)": "F.group_norm(x, self.groups, eps=self.eps)"},
            "squares of differences overflow float16: leave sums and squares to one F.layer_norm.":
                [{NORMED: "((d := rows - rows.mean(-1, keepdim=True)) / (d.square().mean(-1, keepdim=True) + "
                          "self.eps).sqrt())"},
                 {NORMED: "((rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, False, keepdim=True) + "
                          "self.eps).sqrt())"}],
        },
        probe=group, own=("coreml.layers.LayerNormGroups.forward", "coreml.layers.norm_groups"),
        replaces={"coreml.layers.LayerNormGroups": "LayerNormGroups"},
        tests={"test_export_coreml.py": ("test_group_norm_as_layer_norm",)},
    ),
    "6c": Exercise(
        "Write the mask as numbers",
        asks=("as_bias",),
        mistakes={
            "padding is where the mask is 0: those logits shall be lowered, not the real tokens'.":
                {"1 - mask": "mask"},
            "float16 has no number below -65504: on the phone your constant is minus infinity, and 0 times "
            "that is NaN.":
                [{"-1e4": "-1e9"}, {"-1e4": 'float("-inf")'},
                 {"(1 - mask) * -1e4": "((1 - mask.float()) * -1e9).half()"}],
            "that is float32, since a mask of booleans or floats came between: a phone's logits are float16, "
            "and so must this be.":
                {"(1 - mask)": "(1 - mask.float())"},
            "that is too small a number: a padding token with a large logit still gets a weight.":
                [{"-1e4": "-1.0"}, {"-1e4": "0"}],
            "that raises the logits of padding: what has to be added is negative.":
                {"-1e4": "1e4"},
        },
        probe=attend,
    ),
    "6d": Exercise(
        "A linear layer as a 1x1 convolution",
        asks=("as_conv",),
        mistakes={
            "what you give is no nn.Conv2d: linear layers are what the neural engine does not like.":
                {"return conv": "return linear"},
            "the kernel is 1x1: each position is computed by itself, as the linear layer does.":
                {"linear.out_features, 1,": "linear.out_features, 3, padding=1,",
                 "linear.weight[:, :, None, None]": "F.pad(linear.weight[:, :, None, None], [1] * 4)",
                 "from torch import nn": "import torch.nn.functional as F\nfrom torch import nn"},
            "the bias is missing.":
                [{"conv.bias = linear.bias": "pass"}, {"bias=linear.bias is not None": "bias=False",
                                                       "conv.bias = linear.bias": "pass"}],
            "a layer without a bias has linear.bias None, and becomes a convolution without one.":
                [{"bias=linear.bias is not None": "bias=True",
                  "conv.bias = linear.bias": "conv.bias = conv.bias if linear.bias is None else linear.bias"},
                 {"conv.bias = linear.bias": "conv.bias.data.copy_(linear.bias)"},
                 {"conv.bias = linear.bias": "conv.bias.data = linear.bias.data"},
                 {WITH_BIAS: "", "conv.bias = linear.bias": "conv.bias.data.copy_(linear.bias)"},
                 {WITH_BIAS: "", "conv.bias = linear.bias": "conv.bias.data = linear.bias.data"}],
            "the weights are not the linear layer's: (out, in) becomes (out, in, 1, 1).":
                [{"conv.weight =": "_ ="}, {"conv.weight =": "_ =", "conv.bias = linear.bias": "pass"}],
            "no transpose is needed: both layers keep their weights as (out, in).":
                [{"linear.weight[": "linear.weight.T["},
                 {"conv.weight = nn.Parameter(linear.weight[:, :, None, None])":
                  "conv.weight.data.copy_(linear.weight.T[:, :, None, None])"},
                 {"linear.weight[:, :, None, None]": "linear.weight.T.reshape(linear.weight.shape)[:, :, "
                                                     "None, None]"}],
        },
        probe=turn, own=("coreml.layers.as_conv",), replaces={"coreml.layers.as_conv": "as_conv"},
        tests={"test_export_coreml.py": ("test_transformer_with_many_keys_in_both_layouts",)},
    ),
    "6e": Exercise(
        "Six bits and four (2 x 2 minutes)",
        asks=("BUILD_6", "BUILD_4", "MORE_DECIBELS", "LOST_PER_BIT"), runs=bits_runs,
    ),
}  # fmt: skip
