"""Exercises of page 6, the phone."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from coreml import layers
from course.checks.trainings import said
from course.exercise import Called, Exercise, Hint

PARAMETERS = 379.7


def group(answer):
    """A GroupNorm with given gain and offset, on a picture of random numbers, and in half precision on one of large numbers."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 12)
    nn.init.uniform_(norm.weight, 0.5, 2.0), nn.init.normal_(norm.bias)
    x = torch.randn(2, 12, 5, 7)
    with torch.no_grad(), Called() as called:
        picture, right = answer.LayerNormGroups(norm)(3 * x + 1), F.group_norm(x, 4, norm.weight, norm.bias)
        names = called.names
    with torch.no_grad():
        large = answer.LayerNormGroups(norm.half())((1000 * x).half())
    return {"the normalised picture": picture, "whether float16 holds what is computed": bool((large - right).abs().max() < 0.02),
            "whether F.layer_norm computes it": "layer_norm" in names}  # fmt: skip


def norm_with(normalise):
    class LayerNormGroups(layers.LayerNormGroups):
        def forward(self, x):
            return normalise(self, x)

    return LayerNormGroups


def per_channel(self, x):
    h = F.layer_norm(x, x.shape[2:], eps=self.eps)
    return h * self.weight[None, :, None, None] + self.bias[None, :, None, None]


def no_gain(self, x):
    return F.layer_norm(x.reshape(len(x), self.groups, -1), (x[0].numel() // self.groups,), eps=self.eps).reshape(x.shape)


def gain_before_shape(self, x):
    """One group of all channels."""
    h = F.layer_norm(x, x.shape[1:], eps=self.eps)
    return h * self.weight[None, :, None, None] + self.bias[None, :, None, None]


def written_out(self, x):
    """What a converter makes of GroupNorm."""
    h = x.reshape(len(x), self.groups, -1)
    h = h - h.mean(-1, keepdim=True)
    h = (h / (h.square().mean(-1, keepdim=True) + self.eps).sqrt()).reshape(x.shape)
    return h * self.weight[None, :, None, None] + self.bias[None, :, None, None]


def as_it_was(self, x):
    return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


def attend(answer):
    """The weights that a softmax in half precision gives to three tokens, of which the last is padding."""
    logits, mask = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 100.0]]), torch.tensor([[1.0, 1.0, 0.0]] * 2)
    bias = answer.as_bias(mask.half())
    return {"the weights of three tokens, of which the last is padding": (logits.half() + bias).softmax(-1).float(),
            "the kind of number": str(bias.dtype)}  # fmt: skip


def turn(answer):
    """A linear layer as a convolution on (B, C, 1, S)."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 10)
    x = torch.randn(2, 6, 1, 7)
    with torch.no_grad():
        return {"the output": answer.as_conv(linear)(x)}


def conv_with(change):
    def as_conv(linear):
        conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
        change(conv, linear)
        return conv

    return as_conv


def forget_bias(conv, linear):
    conv.weight = nn.Parameter(linear.weight[:, :, None, None])
    nn.init.zeros_(conv.bias)


def forget_weights(conv, linear):
    nn.init.zeros_(conv.weight)
    conv.bias = linear.bias


def transposed(conv, linear):
    conv.weight = nn.Parameter(linear.weight.T.reshape(linear.weight.shape)[:, :, None, None])
    conv.bias = linear.bias


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
        raise Hint(f"LOST_PER_BIT is {answer.LOST_PER_BIT}, but from 6 to 4 bits your UNet loses {lost:.1f} dB.")


EXERCISES = {
    "6a": Exercise(
        "What fits into a phone, and into a half-precision number",
        right={"MEGABYTES_16": PARAMETERS * 2, "MEGABYTES_6": PARAMETERS * 6 / 8, "LARGEST_SQUARE": math.floor(math.sqrt(65504)),
               "SPACING": 0.5},
        mistakes={
            "16 bits are two bytes.": {"MEGABYTES_16": PARAMETERS * 16, "MEGABYTES_6": PARAMETERS * 6},
            "float32 has four bytes a weight; the packages have two.": {"MEGABYTES_16": PARAMETERS * 4},
            "65504 is the largest number of float16. Whose square is that?": {"LARGEST_SQUARE": 65504},
            "a half-precision number has 10 bits after the leading one: between 512 and 1024 the steps are 512 / 1024.":
                {"SPACING": 1.0},
            "the error of rounding is at most half the spacing; SPACING asks for the distance of two neighbours.":
                {"SPACING": 0.25},
        },
    ),
    "6b": Exercise(
        "Write GroupNorm for float16",
        right={"LayerNormGroups": layers.LayerNormGroups},
        mistakes={
            "a *group* of channels is normalised together: reshape to (B, groups, everything else) first.":
                {"LayerNormGroups": norm_with(per_channel)},
            "the gain and the offset of each channel are missing.": {"LayerNormGroups": norm_with(no_gain)},
            "there are several groups, each with a mean of its own; yours are all one.":
                {"LayerNormGroups": norm_with(gain_before_shape)},
            "that is GroupNorm as it was, and becomes nine operations: reshape, and call F.layer_norm.":
                {"LayerNormGroups": norm_with(as_it_was)},
            "squares of differences overflow float16: leave sums and squares to one F.layer_norm.":
                {"LayerNormGroups": norm_with(written_out)},
        },
        probe=group, replaces={"coreml.layers.LayerNormGroups": "LayerNormGroups"},
        tests={"test_export_coreml.py": ("test_group_norm_as_layer_norm",)},
    ),
    "6c": Exercise(
        "Write the mask as numbers",
        right={"as_bias": lambda mask: (1 - mask) * layers.MASKED},
        mistakes={
            "padding is where the mask is 0: those logits shall be lowered, not the real tokens'.":
                {"as_bias": lambda mask: mask * layers.MASKED},
            "float16 has no number below -65504: the rest is minus infinity, and 0 times infinity is NaN.":
                {"as_bias": lambda mask: (1 - mask) * torch.tensor(float("-inf"), dtype=mask.dtype)},
            "that is too small a number: a padding token with a large logit still gets a weight.":
                {"as_bias": lambda mask: (1 - mask) * -1.0},
        },
        probe=attend,
    ),
    "6d": Exercise(
        "A linear layer as a 1x1 convolution",
        right={"as_conv": layers.as_conv},
        mistakes={
            "the bias is missing.": {"as_conv": conv_with(forget_bias)},
            "the weights are not the linear layer's: (out, in) becomes (out, in, 1, 1).": {"as_conv": conv_with(forget_weights)},
            "no transpose is needed: both layers keep their weights as (out, in).": {"as_conv": conv_with(transposed)},
        },
        probe=turn, replaces={"coreml.layers.as_conv": "as_conv"},
        tests={"test_export_coreml.py": ("test_transformer_with_many_keys_in_both_layouts",)},
    ),
    "6e": Exercise(
        "Six bits and four (2 x 2 minutes)",
        right={"BUILD_6": "build6", "BUILD_4": "build4", "MORE_DECIBELS": 6, "LOST_PER_BIT": 6.0},
        mistakes={}, runs=bits_runs,
    ),
}  # fmt: skip
