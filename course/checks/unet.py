"""Exercises of page 1, the UNet."""

import torch

import model
from course.checks.trainings import finished, only_differs, said
from course.exercise import Called, Exercise, Hint

COMPLEX = {"complex", "polar", "view_as_complex"}


def attend(answer):
    """What an Attention with given weights answers: 2 pictures of 6 pixels, 5 tokens, some padding."""
    torch.manual_seed(1)
    cfg = model.UNetConfig(channels=(64,), head_dim=32, groups=16, text_dim=24)
    to_text, to_itself = answer.Attention(cfg, 64, context_dim=24), answer.Attention(cfg, 64)
    x, text, rope = torch.randn(2, 6, 64), torch.randn(2, 5, 24), model.rope_table(2, 3, 32)
    mask = torch.tensor([[True, True, True, True, False], [True, True, False, True, False]])[:, None, None, :]
    with torch.no_grad(), Called() as called:
        return {
            "the output without a mask": to_text(x, text),
            "the output with a mask": to_text(x, text, mask),
            "the output with rope": to_itself(x, rope=rope),
            "whether it is written out": "scaled_dot_product_attention" not in called.names,
        }


def turn(answer):
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(2, 12, 3, 8), model.rope_table(3, 4, 8)
    with Called() as called:
        turned = answer.rotate(x, cos, sin)
        return {"the turned x": turned, "whether the numbers are real": not called.names & COMPLEX}


def ladder_runs(answer):
    """1e: two short trainings, steps a and f, and what they said."""
    a, f = (finished(folder, steps=300) for folder in (answer.RUN_A, answer.RUN_F))
    for run, step in ((a, "a"), (f, "f")):
        if run.settings.get("ladder") not in ((step,) if step == "a" else ("f", None)):
            raise Hint(f"{run.folder} was trained with --ladder {run.settings.get('ladder')}, not {step}.")
    only_differs(a, f, "ladder")
    said("LOWER_LOSS", answer.LOWER_LOSS, {"a": a.last("val_loss"), "f": f.last("val_loss")}, lowest=True)
    rates = {name: run.median("pictures_per_second") for name, run in (("a", a), ("f", f))}
    said("FASTER", answer.FASTER, rates, lowest=False)


WITH_ROPE = "q, k = model.rotate(q, *rope), model.rotate(k[:, :, None], *rope)[:, :, 0]"
MASKED = 'logits.masked_fill(~mask, float("-inf"))'
WEIGHTED = 'torch.einsum("bhst,btd->bshd", logits.softmax(dim=-1), v)'

EXERCISES = {
    "1a": Exercise(
        "Count the weights of a convolution by hand",
        asks=("FULL", "SEPARABLE", "MACS_RATIO"),
        mistakes={
            "every output channel of nn.Conv2d also has a bias, and so has the pointwise convolution.":
                {" + 512": ""},
            "there is one bias for each *output* channel.":
                {" + 512": " + 256"},
            "conv3x3 writes bias=False for the depthwise convolution: what would it add that the pointwise "
            "bias does not?":
                {"256 * 9 + 256 * 512 + 512": "256 * 9 + 256 + 256 * 512 + 512"},
            "a depthwise kernel sees one input channel: there are 256 kernels of 3x3, as many as *input* "
            "channels.":
                {"256 * 9 + 256 * 512 + 512": "512 * 9 + 256 * 512 + 512"},
            "a kernel of 3x3 has nine numbers, not three.":
                {"* 9": "* 3"},
            "that is the separable convolution's share of the full one's; MACS_RATIO is the other way round, "
            "above 1.":
                {"MACS_RATIO": (9 * 256 + 256 * 512) / (9 * 256 * 512)},
            "biases are added, not multiplied: leave them out of MACS_RATIO.":
                {"(256 * 512 * 9) / (256 * 9 + 256 * 512)": "FULL / SEPARABLE"},
        },
    ),
    "1b": Exercise(
        "Write multi-query attention",
        asks=("Attention",),
        mistakes={
            "the logits are not scaled: they are divided by the square root of the width of a head, or "
            "softmax is too sure.":
                [{" / self.head_dim**0.5": ""}, {"self.head_dim**0.5": "self.head_dim"}],
            "the logits are divided by the square root of the width of *one head*, not of all channels.":
                {"self.head_dim**0.5": "x.shape[-1] ** 0.5"},
            "softmax goes over the keys: for one query, the weights of all tokens add up to 1.":
                [{"dim=-1": "dim=-2"}, {"dim=-1": "dim=1"}],
            "the mask is inverted: it is True for real tokens, and masked_fill fills where it is told True.":
                [{"~mask": "mask"}, {'~mask, float("-inf")': "mask, -1e9"}],
            "the mask is not used: a token of padding (False) must get the weight 0, so its logit is -inf "
            "before the softmax.":
                [{"mask is not None": "False"}, {MASKED: "logits + mask"}],
            "masked after the softmax, the weights of the real tokens no longer add up to 1: mask the "
            "logits.":
                {MASKED: "logits",
                 "logits.softmax(dim=-1)": "(logits.softmax(dim=-1) * (1 if mask is None else mask))"},
            "the heads stand in the wrong order: out is (B, S, heads, d), each head's channels side by side.":
                [{"->bshd": "->bsdh"}, {"->bshd": "->bhsd"},
                 {WEIGHTED: WEIGHTED.replace("bshd", "bhsd") + ".reshape(q.shape)"}],
            "`rope` changes nothing in your code: queries and keys are turned by model.rotate before they "
            "meet.":
                {"rope is not None": "False"},
            "`rope` turns both, queries and keys: only then does their product see the way from one pixel to "
            "the other.":
                [{WITH_ROPE: "q = model.rotate(q, *rope)"}, {WITH_ROPE: "k = model.rotate(k[:, :, None], "
                                                                        "*rope)[:, :, 0]"}],
            "`rope` turns queries and keys alone: the values are what is read there, wherever it stands.":
                {WITH_ROPE: WITH_ROPE + "; v = model.rotate(v[:, :, None], *rope)[:, :, 0]"},
            "model.rotate wants an axis of heads, (B, T, heads, d), and the keys (B, T, d) have none: k[:, "
            ":, None].":
                {WITH_ROPE: "q, k = model.rotate(q, *rope), model.rotate(k, *rope)"},
            "right, but by F.scaled_dot_product_attention: write out what it computes.":
                {WEIGHTED: "torch.nn.functional.scaled_dot_product_attention("
                           "q.transpose(1, 2), k[:, None], v[:, None], mask).transpose(1, 2)"},
        },
        probe=attend, own=("model.Attention.forward",), replaces={"model.Attention": "Attention"},
        tests={"test_model.py": ("test_multi_query_attention_is_the_written_out_loop",)},
    ),
    "1c": Exercise(
        "Write the rotation of RoPE",
        asks=("rotate",),
        mistakes={
            "you turn by -angle. Attention would still see relative positions, but not those that trained "
            "weights know.":
                {"a * cos - b * sin, a * sin + b * cos": "a * cos + b * sin, b * cos - a * sin"},
            "channel i goes with channel i + head_dim / 2 here, not with its neighbour.":
                [{"x.chunk(2, dim=-1)": "x[..., 0::2], x[..., 1::2]"},
                 {"x.chunk(2, dim=-1)": "x[..., 0::2], x[..., 1::2]",
                  "torch.cat": "torch.stack", "dim=-1)": "dim=-1).flatten(-2)"}],
            "a rotation mixes both halves in both outputs: (a cos - b sin, a sin + b cos).":
                [{"a * sin + b * cos": "a * cos + b * sin"}, {"- b * sin, a * sin +": ","}],
            "the signs make a mirror of it: a rotation has one minus, at the sine of the first output.":
                [{"a * sin + b * cos": "a * sin - b * cos"}, {"a * cos - b": "a * cos + b"}],
            "cos and sin are (HW, head_dim / 2): they need an axis of length 1 where x has its heads.":
                [{"cos[:, None, :], sin[:, None, :]": "cos, sin"}, {"[:, None, :]": "[None, None]"}],
            "the halves that were taken apart are put together again along the channels, the last axis.":
                [{"b * cos], dim=-1": "b * cos], dim=1"}, {"b * cos], dim=-1": "b * cos], dim=-2"}],
            "right, but with complex numbers, which Core ML does not know: write out what the product of two "
            "of them is.":
                {"torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)":
                 "torch.cat([(z := torch.complex(a, b) * torch.complex(cos, sin)).real, z.imag], dim=-1)"},
        },
        probe=turn, own=("model.rotate",), replaces={"model.rotate": "rotate"},
        tests={"test_model.py": ("test_rope_sees_only_relative_positions",)},
    ),
    "1d": Exercise(
        "Why self-attention leaves stage 2: count its scores",
        asks=("STAGE_2", "STAGE_3"),
        mistakes={
            "each head has scores of its own: heads of 64 channels, so 8 of them in stage 2 and 14 in stage "
            "3.":
                {"(512 // 64) * ": "", "(896 // 64) * ": ""},
            "a head has one score for a pair of pixels, not one for each of its 64 channels.":
                {"512 // 64": "512", "896 // 64": "896"},
            "stage 2 works at half the latent's side and stage 3 at a quarter: 64x64 and 32x32 pixels.":
                {"64 * 64": "128 * 128", "32 * 32": "64 * 64"},
            "every pixel has a score with every other: the number of pixels is squared.":
                {" ** 2": ""},
            "float16 has two bytes a number.":
                [{"* 2 /": "* 4 /"}, {"* 2 /": "* 16 /"}],
            "2^20 bytes are a mebibyte (MiB); a megabyte (MB) is 10^6 bytes.":
                {"1e6": "2**20"},
        },
    ),
    "1e": Exercise(
        "Two steps of the ladder, trained (4 to 8 minutes each)",
        asks=("RUN_A", "RUN_F", "LOWER_LOSS", "FASTER"), runs=ladder_runs,
    ),
}  # fmt: skip
