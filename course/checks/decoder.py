"""Exercises of page 3, the tiny decoder."""

import torch
import torch.nn.functional as F

import decoder
from course.checks.trainings import finished, only_differs, said
from course.exercise import Exercise, Hint

PIXELS = 1024 * 1024
BYTES = 2  # of a float16


def weigh(answer):
    """adaptive_weight on a last layer whose two gradients have known lengths."""
    torch.manual_seed(0)
    last = torch.nn.Conv2d(4, 3, 3)
    y = last(torch.randn(2, 4, 8, 8))
    loss, loss_adv = y.square().mean(), 50 * y.abs().mean()
    weight, most = (answer.adaptive_weight(loss, adv, last.weight) for adv in (loss_adv, 1e-9 * loss_adv))
    return {"the weight": weight.detach(), "the weight beside a vanishing gradient": most.detach(),
            "whether the weight has a gradient": weight.requires_grad}  # fmt: skip


def weight_with(upside_down=False, detached=True, squared=False, most=1e4):
    def adaptive_weight(loss, loss_adv, weight):
        keep = {"retain_graph": True, "create_graph": not detached}
        a, b = (torch.autograd.grad(some, weight, **keep)[0].norm() for some in (loss, loss_adv))
        a, b = (b, a) if upside_down else (a, b)
        ratio = ((a / (b + 1e-8)) ** (2 if squared else 1)).clamp(max=most)
        return ratio.detach() if detached else ratio

    return adaptive_weight


def far_apart(answer):
    """The distance of features of three layers, one of which is loud."""
    torch.manual_seed(0)
    f = [scale * torch.randn(2, c, side, side) for scale, c, side in ((1, 4, 8), (100, 6, 4), (1, 8, 2))]
    g = [x + 0.3 * x.std() * torch.randn_like(x) for x in f]
    return {"the distances": answer.feature_distance(f, g)}


def feature_distance(f, g):
    """Perceptual.forward's formula, for features that are given."""
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in zip(f, g, strict=True))


def block_output(answer):
    """A block's output for given weights."""
    block, kinds = answer.Block(decoder.PRESETS["tiny"], 16, 16), []
    with torch.no_grad():
        torch.manual_seed(0)
        for module in block.body:
            kinds.append(type(module).__name__)
            for weight in module.parameters():
                weight.copy_(0.3 * torch.randn(weight.shape))
        return {"the layers of the body": kinds, "weights": sum(p.numel() for p in block.parameters()),
                "the output": block(torch.randn(2, 16, 6, 6))}  # fmt: skip


def block_with(order, shortcut=True):
    class Block(torch.nn.Module):
        def __init__(self, cfg, c_in, c_out):
            super().__init__()
            make = {"d": lambda: torch.nn.Conv2d(c_out, c_out, 3, padding=1, groups=c_out, bias=False),
                    "p": lambda: torch.nn.Conv2d(c_out, c_out, 1), "n": lambda: torch.nn.GroupNorm(cfg.groups, c_out),
                    "s": torch.nn.SiLU}  # fmt: skip
            self.body = torch.nn.Sequential(*(make[letter]() for letter in order))

        def forward(self, x):
            return self.body(x) + (x if shortcut else 0)

    return Block


def gan_runs(answer):
    """3e: the decoder without and with much of the adversarial loss."""
    without, much = (finished(folder) for folder in (answer.RUN_WITHOUT, answer.RUN_MUCH))
    only_differs(without, much, "gan_weight")
    if without.settings["gan_weight"] != 0 or much.settings["gan_weight"] < 0.4:
        raise Hint("RUN_WITHOUT needs --gan-weight 0, and RUN_MUCH --gan-weight 0.5.")
    said("HIGHER_PSNR", answer.HIGHER_PSNR, {"without": without.last("val_psnr"), "much": much.last("val_psnr")}, lowest=False)


EXERCISES = {
    "3a": Exercise(
        "The largest tensor of the decoder at 1024 pixels",
        right={"LARGEST": 160 * PIXELS * BYTES / 1e6, "FIRST": 256 * 128 * 128 * BYTES / 1e6},
        mistakes={
            "64 channels is what the last upsampler's convolution *gives*. What does it take, after nearest-neighbour upsampling?":
                {"LARGEST": 64 * PIXELS * BYTES / 1e6},
            "float16 has two bytes a number.": {"LARGEST": 160 * PIXELS * 4 / 1e6, "FIRST": 256 * 128 * 128 * 4 / 1e6},
            "the last upsampler comes from 160 channels; 256 is the width at the latent's own side.":
                {"LARGEST": 256 * PIXELS * BYTES / 1e6},
        },
    ),
    "3b": Exercise(
        "Build the block of Fig. 4",
        right={"Block": decoder.Block},
        mistakes={
            "the block adds its input at the end: x + body(x).": {"Block": block_with("dpdnsp", shortcut=False)},
            "one GroupNorm a block, between the second depthwise and its pointwise convolution; yours comes first.":
                {"Block": block_with("nsdpdp")},
            "SepConv is depthwise, then pointwise: 3x3 in each channel first, then 1x1 across channels.":
                {"Block": block_with("pdpnsd")},
        },
        probe=block_output, replaces={"decoder.Block": "Block"}, tests={"test_decoder.py": ("test_block_against_loops",)},
    ),
    "3c": Exercise(
        "Write VQGAN's adaptive weight",
        right={"adaptive_weight": decoder.adaptive_weight},
        mistakes={
            "upside down: a long adversarial gradient must get a *small* weight.":
                {"adaptive_weight": weight_with(upside_down=True)},
            "the weight must be a number, not a function of the weights: .detach() it.":
                {"adaptive_weight": weight_with(detached=False)},
            "the lengths are norms, not their squares.": {"adaptive_weight": weight_with(squared=True)},
            "at most 1e4: where the adversarial gradient vanishes, the quotient explodes.":
                {"adaptive_weight": weight_with(most=float("inf"))},
        },
        probe=weigh, replaces={"decoder.adaptive_weight": "adaptive_weight"},
        tests={"test_decoder.py": ("test_adaptive_weight_makes_gradients_equally_long",)},
    ),
    "3d": Exercise(
        "Write the perceptual distance",
        right={"feature_distance": feature_distance},
        mistakes={
            "each pixel's features have length 1 first: otherwise the layer with large features decides alone.":
                {"feature_distance": lambda f, g: sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(f, g, strict=True))},
            "the length is taken over the channels (dim 1) of every pixel, not over the whole map.":
                {"feature_distance": lambda f, g: sum(
                    (F.normalize(a.flatten(1)) - F.normalize(b.flatten(1))).square().view(a.shape).sum(1).mean((1, 2))
                    for a, b in zip(f, g, strict=True))},
            "squares are summed over channels and *averaged* over pixels: a fine layer must not count more for having more pixels.":
                {"feature_distance": lambda f, g: sum(
                    (F.normalize(a) - F.normalize(b)).square().sum((1, 2, 3)) for a, b in zip(f, g, strict=True))},
        },
        probe=far_apart,
    ),
    "3e": Exercise(
        "What the discriminator costs in decibels (2 x 3 minutes)",
        right={"RUN_WITHOUT": "runs/3e-without", "RUN_MUCH": "runs/3e-much", "HIGHER_PSNR": "without"},
        mistakes={}, runs=gan_runs,
    ),
}  # fmt: skip
