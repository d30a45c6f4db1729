"""Exercises of page 1, the UNet."""

import torch

import model
from course.checks.trainings import finished, only_differs, said
from course.exercise import Called, Exercise, Hint
from model import UNetConfig, conv3x3

FULL, SEPARABLE = (conv3x3(UNetConfig(separable=separable), 256, 512) for separable in (False, True))


def weights(module):
    return sum(p.numel() for p in module.parameters())


def attention_with(scale=None, axis=-1, masked=True):
    """The reference's Attention with its middle written out, and a mistake in it."""

    class Attention(model.Attention):
        def forward(self, x, context=None, mask=None, rope=None):
            context = x if context is None else context
            q = self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim)))
            k, v = self.norm_k(self.to_k(context)), self.to_v(context)
            scores = torch.einsum("bshd,btd->bhst", q, k) * (scale or self.head_dim) ** -0.5
            if mask is not None and masked:
                scores = scores.masked_fill(~mask, float("-inf"))
            return self.to_out(torch.einsum("bhst,btd->bshd", scores.softmax(axis), v).flatten(2))

    return Attention


def attend(answer):
    """What an Attention with given weights answers: 2 pictures of 6 pixels, 5 tokens, some of them padding."""
    torch.manual_seed(1)
    cfg = UNetConfig(channels=(64,), head_dim=32, groups=16, text_dim=24, rope=False)
    layer = answer.Attention(cfg, 64, context_dim=24)
    x, context = torch.randn(2, 6, 64), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])[:, None, None, :]
    with torch.no_grad(), Called() as called:
        return {"the output without a mask": layer(x, context), "the output with a mask": layer(x, context, mask),
                "whether it is written out": "scaled_dot_product_attention" not in called.names}  # fmt: skip


def turn(answer):
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(2, 12, 3, 8), model.rope_table(3, 4, 8)
    return {"the turned x": answer.rotate(x, cos, sin)}


def pairs_of_neighbours(x, cos, sin):
    first, second, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def backwards(x, cos, sin):
    return model.rotate(x, cos, -sin)


def no_rotation(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, first * cos + second * sin], dim=-1)


def ladder_runs(answer):
    """1e: two short trainings, steps a and f, and what they said."""
    a, f = finished(answer.RUN_A), finished(answer.RUN_F)
    for run, step in ((a, "a"), (f, "f")):
        if run.settings.get("ladder") not in ((step,) if step == "a" else ("f", None)):
            raise Hint(f"{run.folder} was trained with --ladder {run.settings.get('ladder')}, not {step}.")
    only_differs(a, f, "ladder")
    said("LOWER_LOSS", answer.LOWER_LOSS, {"a": a.last("val_loss"), "f": f.last("val_loss")}, lowest=True)
    said("FASTER", answer.FASTER, {name: run.median("pictures_per_second") for name, run in (("a", a), ("f", f))}, lowest=False)


EXERCISES = {
    "1a": Exercise(
        "Count the weights of a convolution by hand",
        right={"FULL": weights(FULL), "SEPARABLE": weights(SEPARABLE), "MACS_RATIO": (9 * 256 * 512) / (9 * 256 + 256 * 512)},
        mistakes={
            "every output channel of nn.Conv2d also has a bias, and so has the pointwise convolution.":
                {"FULL": 9 * 256 * 512, "SEPARABLE": 9 * 256 + 256 * 512},
            "conv3x3 writes bias=False for the depthwise convolution: what would it add that the pointwise bias does not?":
                {"SEPARABLE": weights(SEPARABLE) + 256},
            "a depthwise kernel sees one input channel: there are 256 kernels of 3x3, as many as *input* channels.":
                {"SEPARABLE": 9 * 512 + 256 * 512 + 512},
            "that is the separable convolution's share of the full one's; MACS_RATIO is the other way round, above 1.":
                {"MACS_RATIO": (9 * 256 + 256 * 512) / (9 * 256 * 512)},
        },
    ),
    "1b": Exercise(
        "Write multi-query attention",
        right={"Attention": attention_with()},
        mistakes={
            "the logits are divided by the square root of the width of *one head*, not of all channels.":
                {"Attention": attention_with(scale=64)},
            "softmax goes over the keys: for one query, the weights of all tokens add up to 1.":
                {"Attention": attention_with(axis=-2)},
            "the mask is not used: a token of padding (False) must get the weight 0, so its logit is -inf before the softmax.":
                {"Attention": attention_with(masked=False)},
            "right, but by F.scaled_dot_product_attention: write out what it computes.": {"Attention": model.Attention},
        },
        probe=attend, replaces={"model.Attention": "Attention"},
        tests={"test_model.py": ("test_multi_query_attention_is_the_written_out_loop",)},
    ),
    "1c": Exercise(
        "Write the rotation of RoPE",
        right={"rotate": model.rotate},
        mistakes={
            "you turn by -angle. Attention would still see relative positions, but not those that trained weights know.":
                {"rotate": backwards},
            "channel i goes with channel i + head_dim / 2 here, not with its neighbour.": {"rotate": pairs_of_neighbours},
            "a rotation mixes both halves in both outputs: (a cos - b sin, a sin + b cos).": {"rotate": no_rotation},
        },
        probe=turn, replaces={"model.rotate": "rotate"}, tests={"test_model.py": ("test_rope_sees_only_relative_positions",)},
    ),
    "1d": Exercise(
        "Why self-attention leaves stage 2: count its scores",
        right={"STAGE_2": 8 * 4096**2 * 2 / 1e6, "STAGE_3": 14 * 1024**2 * 2 / 1e6},
        mistakes={
            "each head has scores of its own: heads of 64 channels, so 8 of them in stage 2 and 14 in stage 3.":
                {"STAGE_2": 4096**2 * 2 / 1e6, "STAGE_3": 1024**2 * 2 / 1e6},
            "stage 2 works at half the latent's side and stage 3 at a quarter: 64x64 and 32x32 pixels.":
                {"STAGE_2": 8 * 16384**2 * 2 / 1e6, "STAGE_3": 14 * 4096**2 * 2 / 1e6},
            "float16 has two bytes a number.": {"STAGE_2": 8 * 4096**2 * 4 / 1e6, "STAGE_3": 14 * 1024**2 * 4 / 1e6},
        },
    ),
    "1e": Exercise(
        "Two steps of the ladder, trained (4 to 8 minutes each)",
        right={"RUN_A": "runs/1e-a", "RUN_F": "runs/1e-f", "LOWER_LOSS": "a", "FASTER": "f"},
        mistakes={}, runs=ladder_runs,
    ),
}  # fmt: skip
