"""What the paper's text-to-image model asks for: disk, and hours of a GPU. Computed from shapes: nothing here is measured.

    python -m studies.costs                          # the figures of recipes/t2i.md
    python -m studies.costs --gemma-tokens 60        # with captions of 60 tokens on average, not of 128, the most that are kept
    python -m studies.costs --peak 312e12 --share 0.4     # of another GPU, at another share of its peak

FLOPs are those of matrix products, convolutions and attention, two for a multiply-accumulate, counted by torch.utils.flop_counter
on the meta device. A training step of a network is three forwards. The share of the peak is an assumption; studies.speed measures
yours.
"""

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from common.arguments import Parser, integer, real
from common.encoders import GEMMA_TOKENS, T5_TOKENS
from model import PRESETS, UNet
from studies.speed import MAKERS_PEAK, TEACHERS

CLIP_TOKENS, CLIP_WIDTH, GEMMA_WIDTH, SIDES = 77, 768 + 1280, 2304, (256, 512, 1024)
STAGES = ((1, 256, 2048, 300_000), (1, 512, 1024, 100_000), (1, 1024, 512, 100_000), (2, 1024, 256, 50_000),
          (3, 1024, 128, 10_000))  # of recipes/t2i.md: stage, pixels, batch, steps [A]  # fmt: skip


def clip(width, layers, heads):
    """A CLIP text model of SD3.5: CLIP-L is (768, 12, 12), CLIP-G (1280, 32, 20)."""
    return CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                                                      num_attention_heads=heads, projection_dim=width))  # fmt: skip


def t5():
    """T5 v1.1 XXL's encoder, SD3.5's text_encoder_3."""
    return T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                   feed_forward_proj="gated-gelu"))  # fmt: skip


def encoder():
    """SD3's autoencoder, its first half."""
    return AutoencoderKL(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                         down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         use_quant_conv=False, use_post_quant_conv=False).encoder  # fmt: skip


def teacher():
    """SD3.5-Large's transformer."""
    return SD3Transformer2DModel(sample_size=128, patch_size=2, in_channels=16, pos_embed_max_size=192, **TEACHERS["sd3.5-large"])


@torch.no_grad()
def count(build, *shapes, **more):
    """(parameters, FLOPs of one forward) of build(). `shapes` and `more` are those of its inputs; an int: so many token numbers."""
    with torch.device("meta"):
        net = build()
        inputs = [torch.zeros(1, shape).long() if isinstance(shape, int) else torch.zeros(shape) for shape in shapes]
        named = {name: torch.zeros(shape) for name, shape in more.items()}
    with FlopCounterMode(display=False) as counter:
        net(*inputs, **named)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()


def networks():
    """{name: (parameters, FLOPs a picture or caption)} of all that the recipe runs."""
    found = {
        "CLIP-L, 77 tokens": count(lambda: clip(768, 12, 12), CLIP_TOKENS),
        "CLIP-G, 77 tokens": count(lambda: clip(1280, 32, 20), CLIP_TOKENS),
        "Gemma-2-2b, 128 tokens": count(lambda: Gemma2Model(Gemma2Config()), GEMMA_TOKENS),
        "T5, 256 tokens": count(t5, T5_TOKENS),
        "SD3.5-Large at 1024 pixels": count(teacher, (1, 16, 128, 128), encoder_hidden_states=(1, CLIP_TOKENS + T5_TOKENS, 4096),
                                            pooled_projections=(1, CLIP_WIDTH), timestep=(1,)),
    }  # fmt: skip
    text = (1, CLIP_TOKENS + GEMMA_TOKENS, GEMMA_WIDTH)
    for side in SIDES:
        found[f"autoencoder, {side} pixels"] = count(encoder, (1, 3, side, side))
        params, flops = count(lambda: UNet(PRESETS["t2i"]), (1, 16, side // 8, side // 8), (1,), text)
        found[f"UNet, {side} pixels, a training step"] = params, 3 * flops
    return found


def disk(millions, gemma_tokens):
    """{what: bytes} of so many million pictures with a caption each, in half precision."""
    n = 1e6 * millions
    latents = {f"latents of {side} pixels": n * 2 * 16 * (side // 8) ** 2 for side in SIDES}
    return latents | {"CLIP's states": n * 2 * CLIP_TOKENS * CLIP_WIDTH, "Gemma's states": n * 2 * gemma_tokens * GEMMA_WIDTH}


def print_disk(args):
    sizes = disk(args.millions, args.gemma_tokens)
    text = sizes["CLIP's states"] + sizes["Gemma's states"]
    print(f"\nDisk, TB, {args.millions} million pictures with a caption of {args.gemma_tokens} Gemma tokens each")
    for name, size in sizes.items():
        print(f"{name:44}{size / 1e12:8.2f}")
    print(f"{'all: text once, whatever the resolutions':44}{sum(sizes.values()) / 1e12:8.2f}")
    print(f"{'if each resolution had its own text':44}{(sum(sizes.values()) + (len(SIDES) - 1) * text) / 1e12:8.2f}")


def print_hours(args, flops):
    def row(what, pictures, each):
        print(f"{what:44}{pictures / 1e6:8.1f} M{pictures * each / (args.peak * args.share) / 3600:10.1f}")

    print(f"\nGPU-hours at an assumed {100 * args.share:g} % of {args.peak / 1e12:g} TFLOP/s (an H200's, by its maker: 989)")
    for side in SIDES:
        row(f"encode, pictures of {side} pixels", 1e6 * args.millions, flops[f"autoencoder, {side} pixels"])
    texts = [flops[name] for name in ("CLIP-L, 77 tokens", "CLIP-G, 77 tokens", "Gemma-2-2b, 128 tokens")]
    row("encode, text, once", 1e6 * args.millions, sum(texts))
    for stage, side, batch, steps in STAGES:
        # Stage 2 asks the teacher once a picture. Stage 3 five times: the target, D on real and on predicted latents, D once more
        # for the student, and the backward to its input. T5 reads each caption once; twice in stage 3 with --accumulate, which goes
        # through the parts of the batch for D and again for the student.
        teachers, t5s = {1: (0, 0), 2: (1, 1), 3: (5, 2)}[stage]
        row(f"stage {stage}, {side} pixels, UNet", steps * batch, flops[f"UNet, {side} pixels, a training step"])
        if stage > 1:
            row(f"stage {stage}, teacher, {teachers} a picture", steps * batch, teachers * flops["SD3.5-Large at 1024 pixels"])
            row(f"stage {stage}, T5, {t5s} a caption", steps * batch, t5s * flops["T5, 256 tokens"])


def main(argv=None):
    p = Parser(__doc__, "python -m studies.costs --gemma-tokens 60")
    p.add_argument("--millions", type=integer(1), default=10, help="million pictures")
    p.add_argument("--gemma-tokens", type=integer(1, GEMMA_TOKENS), default=GEMMA_TOKENS, help="real ones of a caption, on average")
    p.add_argument("--peak", type=real(above=0), default=MAKERS_PEAK["H200"], help="FLOP/s of the GPU in bfloat16, by its maker")
    p.add_argument("--share", type=real(0.01, 1), default=0.35, help="of the peak that training reaches [A]")
    args = p.parse_args(argv)
    found = networks()
    print("One forward, or one training step, of one picture or caption        parameters M      TFLOP")
    for name, (params, flops) in found.items():
        print(f"{name:64}{params / 1e6:16.1f}{flops / 1e12:11.3f}")
    print_disk(args)
    print_hours(args, {name: flops for name, (_, flops) in found.items()})


if __name__ == "__main__":
    main()
