"""Exercises of page 3, the tiny decoder."""

from types import SimpleNamespace

import torch

from course.checks.trainings import finished, only_differs, said
from course.exercise import Exercise, Hint


def weigh(answer):
    """adaptive_weight on the last of two layers, whose two gradients have known lengths."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 3, 3))
    y = net(torch.randn(2, 4, 8, 8))
    loss, loss_adv = y.square().mean(), 50 * y.abs().mean()
    weight, most = (answer.adaptive_weight(loss, adv, net[1].weight) for adv in (loss_adv, 1e-9 * loss_adv))
    seen = {
        "whether the weight is a tensor": isinstance(weight, torch.Tensor),
        "the weight": torch.as_tensor(weight).detach(),
        "the weight beside a vanishing gradient": torch.as_tensor(most).detach(),
        "whether the weight has a gradient": getattr(weight, "requires_grad", False),
        "whether .grad of the layers is as it was": all(p.grad is None for p in net.parameters()),
    }
    torch.autograd.grad(loss + loss_adv, net[1].weight)  # the training step: both graphs must still be there
    return seen


def far_apart(answer):
    """The distance of features of three layers, one of which is loud."""
    torch.manual_seed(0)
    f = [scale * torch.randn(2, c, side, side) for scale, c, side in ((1, 4, 8), (100, 6, 4), (1, 8, 2))]
    g = [x + 0.3 * x.std() * torch.randn_like(x) for x in f]
    return {"the distances": answer.feature_distance(f, g)}


def block_output(answer):
    """A block's output for given weights."""
    block = answer.Block(SimpleNamespace(groups=4, separable=True, norm_everywhere=False), 16, 16)
    kinds = [type(module).__name__ for module in block.body]
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in block.body.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape))
        output = block(torch.randn(2, 16, 6, 6))
    return {
        "the order of the layers": " ".join(kinds),
        "the number of weights": sum(p.numel() for p in block.parameters()),
        "the output": output,
    }


def gan_runs(answer):
    """3e: the decoder without and with much of the adversarial loss."""
    without, much = (finished(folder, steps=800) for folder in (answer.RUN_WITHOUT, answer.RUN_MUCH))
    only_differs(without, much, "gan_weight")
    if without.settings["gan_weight"] != 0 or much.settings["gan_weight"] < 0.4:
        raise Hint("RUN_WITHOUT needs --gan-weight 0, and RUN_MUCH --gan-weight 0.5.")
    decibels = {"without": without.last("val_psnr"), "much": much.last("val_psnr")}
    said("HIGHER_PSNR", answer.HIGHER_PSNR, decibels, lowest=False)


BODY = "depthwise(), pointwise(), depthwise(), norm, nn.SiLU(), pointwise()"
FIRST = "(restoring,) = torch.autograd.grad(loss, weight, retain_graph=True)"
SECOND = "(fooling,) = torch.autograd.grad(loss_adv, weight, retain_graph=True)"
BACKWARD = "loss.backward(retain_graph=True); restoring, weight.grad = weight.grad, None"
BACKWARD_ADV = "loss_adv.backward(retain_graph=True); fooling = weight.grad"
QUOTIENT = "restoring.norm() / (fooling.norm() + 1e-8)"
UNIT = "F.normalize(a, dim=1) - F.normalize(b, dim=1)"

EXERCISES = {
    "3a": Exercise(
        "The largest tensor of the decoder at 1024 pixels",
        asks=("LARGEST", "FIRST"),
        mistakes={
            "64 channels is what the last upsampler's convolution *gives*. What does it take, after "
            "nearest-neighbour upsampling?":
                {"160 * 1024": "64 * 1024"},
            "that is what goes into the last upsampler; nearest neighbour makes it four times as large, and "
            "then comes its convolution.":
                {"160 * 1024 * 1024": "160 * 512 * 512"},
            "the last upsampler comes from 160 channels; 256 is the width at the latent's own side.":
                {"160 * 1024": "256 * 1024"},
            "the picture has only 3 channels: what lies before the last convolutions is wider, and as many "
            "pixels.":
                {"160 * 1024": "3 * 1024"},
            "the first convolution takes 16 channels; FIRST asks for what it gives.":
                {"256 * 128": "16 * 128"},
            "float16 has two bytes a number.":
                [{"* 2 /": "* 4 /"}, {"* 2 /": "* 16 /"}],
            "count bytes, not numbers: float16 has two of them a number.":
                {"* 2 /": "/"},
            "2^20 bytes are a mebibyte (MiB); a megabyte (MB) is 10^6 bytes.":
                {"1e6": "2**20"},
        },
    ),
    "3b": Exercise(
        "Build the block of Fig. 4",
        asks=("Block",),
        mistakes={
            "the block adds its input at the end: x + body(x).":
                {"x + self.body(x)": "self.body(x)"},
            "one GroupNorm a block, between the second depthwise and its pointwise convolution; yours comes "
            "first.":
                {BODY: "norm, nn.SiLU(), depthwise(), pointwise(), depthwise(), pointwise()"},
            "SepConv is depthwise, then pointwise: 3x3 in each channel first, then 1x1 across channels.":
                {BODY: "pointwise(), depthwise(), pointwise(), norm, nn.SiLU(), depthwise()"},
            "GroupNorm comes before SiLU: after the norm about half of the numbers are below 0, which is "
            "what SiLU bends.":
                {BODY: "depthwise(), pointwise(), depthwise(), nn.SiLU(), norm, pointwise()"},
            "the depthwise convolutions have no bias: a pointwise convolution or a norm follows, and has "
            "one.":
                {", bias=False": ""},
            "a depthwise convolution has one group a channel (groups=c_out); yours mixes all channels.":
                {"groups=c_out, ": ""},
            "without padding=1 a 3x3 convolution takes one pixel off every side, and the shortcut no longer "
            "fits.":
                {"padding=1, ": ""},
            "nn.GroupNorm takes the number of groups first, then the channels.":
                {"cfg.groups, c_out": "c_out, cfg.groups"},
        },
        probe=block_output, own=("decoder.Block.__init__", "decoder.Block.forward"),
        replaces={"decoder.Block": "Block"},
        tests={"test_decoder.py": ("test_block_against_loops",)},
    ),
    "3c": Exercise(
        "Write VQGAN's adaptive weight",
        asks=("adaptive_weight",),
        mistakes={
            ".backward() adds its gradients to every layer's .grad, also of the layers before: "
            "torch.autograd.grad leaves nothing.":
                [{FIRST: BACKWARD, SECOND: BACKWARD_ADV + end} for end in ("", "; weight.grad = None")],
            "the graphs are still needed: retain_graph=True, for both gradients.":
                [{", retain_graph=True": ""}, {"(loss, weight, retain_graph=True": "(loss, weight"},
                 {"(loss_adv, weight, retain_graph=True": "(loss_adv, weight"}],
            "torch.autograd.grad gives a tuple, one gradient for each input: take its only element.":
                [{"(restoring,)": "restoring"}, {"(fooling,)": "fooling"}],
            "upside down: a long adversarial gradient must get a *small* weight.":
                {QUOTIENT: "fooling.norm() / (restoring.norm() + 1e-8)"},
            "the weight must be a number, not a function of the weights: .detach() it.":
                {"retain_graph=": "create_graph=", ".detach()": ""},
            "a tensor is asked for: .item() makes the CPU wait for the GPU in every step.":
                {".detach()": ".item()"},
            "the lengths are norms, not their squares.":
                {QUOTIENT: "restoring.square().sum() / "
                                                               "(fooling.square().sum() + 1e-8)"},
            "the lengths are norms over all numbers of the gradient, not their mean.":
                {QUOTIENT: "restoring.abs().mean() / (fooling.abs().mean() + 1e-8)"},
            "it is the gradients that are compared, not the losses.":
                {QUOTIENT: "loss / (loss_adv + 1e-8)"},
            "at most 1e4: where the adversarial gradient vanishes, the quotient explodes.":
                {".clamp(max=1e4)": ""},
        },
        probe=weigh, own=("decoder.adaptive_weight",),
        replaces={"decoder.adaptive_weight": "adaptive_weight"},
        tests={"test_decoder.py": ("test_adaptive_weight_makes_gradients_equally_long",)},
    ),
    "3d": Exercise(
        "Write the perceptual distance",
        asks=("feature_distance",),
        mistakes={
            "each pixel's features have length 1 first: otherwise the layer with large features decides "
            "alone.":
                {UNIT: "a - b"},
            "the length is taken over the channels (dim 1) of every pixel, not over the whole map.":
                {UNIT: "a / a.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - b / "
                       "b.flatten(1).norm(dim=1).view(-1, 1, 1, 1)"},
            "the length is taken over the channels (dim 1): the last axes are pixels.":
                {UNIT: "F.normalize(a, dim=-1) - F.normalize(b, dim=-1)"},
            "f and g are brought to length 1 each, not their difference: that would be 1 everywhere.":
                {UNIT: "F.normalize(a - b, dim=1)"},
            "squares are summed over channels and *averaged* over pixels: a fine layer must not count more "
            "for having more pixels.":
                {".sum(dim=1).mean(dim=(1, 2))": ".sum(dim=(1, 2, 3))"},
            "squares are *summed* over channels: || . ||^2 of a pixel is no mean.":
                {".sum(dim=1)": ".mean(dim=1)"},
            "the distance is squared, || . ||^2: without the square root.":
                {".sum(dim=1)": ".sum(dim=1).sqrt()"},
            "there is a distance for each picture, (B,): the batch is not averaged.":
                {"mean(dim=(1, 2))": "mean()"},
            "the layers are summed, not averaged.":
                {"return distance": "return distance / len(f)"},
        },
        probe=far_apart,
    ),
    "3e": Exercise(
        "What the discriminator costs in decibels (2 x 3 minutes)",
        asks=("RUN_WITHOUT", "RUN_MUCH", "HIGHER_PSNR"), runs=gan_runs,
    ),
}  # fmt: skip
