"""How fast the real sizes train on this device: pictures a second, memory, and the share of the device's peak.

Weights, latents and text are random, since speed does not depend on what they hold; the steps are those of the stages, on a CPU in
float32 throughout. With --data pictures and text are read from the disk, ahead of the step as in training: if that is slower than
the GPU, it shows here.

    python -m studies.speed --size imagenet --batch 64                 # stages 1 to 3
    python -m studies.speed --size t2i --batch 8 --teacher sd3.5-large --checkpointing   # with an 8 B teacher in bfloat16
    python -m studies.speed --size t2i --batch 256 --data /data/t2i-256 --stages 1    # reading included
    python -m studies.speed --size imagenet --batch 2 --device cpu --stages 1     # minutes, not hours, on a laptop

"Model FLOPs" are counted by torch.utils.flop_counter in one eager step: matrix products, convolutions and attention, forward and
backward, of all networks, without what --checkpointing computes twice (with it they are those of one picture, times the batch; in
stage 3 the student's way from noise differs from picture to picture). The peak is what a product of two 8192 x 8192 matrices
reaches here in the training's precision, and what the maker says where we know it.
"""

import argparse
import itertools
import json
import time

import diffusers
import torch
from diffusers import SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import flow
import step_distill
from common import latents
from common.arguments import Parser, add_device, integer
from common.device import describe_machine, half, move, pick_device
from common.training import ahead, make_optimizers, noisy_batch, predict, update_ema
from distill import Projector, Ratio, combine, normalized
from model import PRESETS, UNet
from teacher import T5_TOKENS, Teacher, WeightedTextAttention

diffusers.utils.logging.set_verbosity_error()  # casting random weights is no mistake
MODES = ("eager", "channels_last", "compile")  # how the student runs; each with what the one before has
MAKERS_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # bfloat16, dense
TEACHERS = {  # transformers of random weights
    "toy": dict(num_layers=6, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=192, caption_projection_dim=128,
                pooled_projection_dim=160),
    "sd3.5-large": dict(num_layers=38, attention_head_dim=64, num_attention_heads=38, joint_attention_dim=4096,
                        caption_projection_dim=2432, pooled_projection_dim=2048, qk_norm="rms_norm"),
}  # fmt: skip


class RandomLatents:
    """Stands in for Latents: `batch` pictures and captions of random numbers, in the sizes of the real ones."""

    streamed, several_encoders, first_clip = True, False, None

    def __init__(self, cfg, side, teacher, tokens):
        self.shape, self.tokens, self.width = (cfg.latent_channels, side, side), tokens, cfg.text_dim
        self.drawn = {}
        self.clip_width, self.pooled_width = min(2048, teacher["joint_attention_dim"]), teacher["pooled_projection_dim"]

    def random(self, *shape):
        """Always the same numbers of a shape: drawing them is no part of what is timed."""
        if shape not in self.drawn:
            self.drawn[shape] = torch.randn(*shape).half()
        return self.drawn[shape]

    def batch(self, seed, step, size, rows=slice(None)):
        return self.random(size, *self.shape).float(), torch.arange(size)

    def text(self, ids):
        mask = torch.ones(len(ids), self.tokens, dtype=torch.bool)
        return self.random(len(ids), self.tokens, self.width), mask

    def clip(self, ids):
        return self.random(len(ids), 77, self.clip_width), self.random(len(ids), self.pooled_width)

    def captions_of(self, ids):
        return ids


class RandomTeacher(Teacher):
    """A Teacher without a folder: the transformer of TEACHERS[name] with random weights.

    The toy's T5 says nothing, as in assets/toy-sd3; the large one's 256 tokens are random."""

    def __init__(self, name, data, device, dtype, layers, captions):
        with torch.device("meta"):
            net = SD3Transformer2DModel(
                sample_size=128, patch_size=2, in_channels=16, pos_embed_max_size=192, **TEACHERS[name]
            )
        self.net = (
            net.to_empty(device="cpu" if device.type == "mps" else device)
            .to(device, dtype)
            .requires_grad_(False)
            .eval()
        )
        for weight in [*self.net.parameters(), *self.net.buffers()]:
            weight.data.normal_(0, 0.02)
        self.silent, t5 = name == "toy", torch.randn(captions, T5_TOKENS, TEACHERS[name]["joint_attention_dim"]).half()
        self.t5 = lambda captions: t5[: len(captions)]
        if self.silent:
            self.net.set_attn_processor(WeightedTextAttention(T5_TOKENS))
        n = len(self.net.transformer_blocks)
        self.data, self.device, self.dtype, self.seen = data, device, dtype, {}
        self.layers, self.feature_dim, self.last = tuple(layer % n for layer in layers), self.net.inner_dim, None
        self.patch = self.net.config.patch_size
        for layer in self.layers:
            self.net.transformer_blocks[layer].register_forward_hook(
                lambda block, i, out, layer=layer: self.seen.update({layer: out[1]})
            )


def make_stage(stage, model, forward, data, teacher, device, args):
    """step(number): one whole training step of stage 1, 2 or 3, optimizer and EMA included, on its loss functions."""
    ema = UNet(model.cfg).to(device).requires_grad_(False)
    optimizers, layer = make_optimizers(model, 1e-5, "adamw"), list(model.features())[-1]
    if stage == 2:
        projector = Projector(model.cfg.channels[0], data.shape[-1], teacher.feature_dim, data.shape[-1] // teacher.patch)
        optimizers += make_optimizers(projector.to(device), 1e-5, "adamw")
        ratios = {name: Ratio().to(device) for name in ("out", "feat")}
    if stage == 3:
        discriminator, ratio = step_distill.Discriminator(teacher).to(device), Ratio().to(device)
        of_heads = torch.optim.AdamW(discriminator.parameters(), lr=1e-5)
        times = flow.sampling_timesteps(4, 3.0)[:-1]
    settings = argparse.Namespace(batch=args.batch, seed=0, on_policy=0.5, level_shift=1.0)
    if stage == 3:
        batches = ahead(lambda i: step_distill.draw_points(data, settings, times, i), itertools.count(), device)
    else:
        batches = ahead(lambda i: noisy_batch(data, 0, i, args.batch, 1.0), itertools.count(), device)

    def finish(step):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step)

    def first(step):
        b = move(next(batches), device)
        (predict(forward, b) - b.v).square().mean().backward()
        finish(step)

    def second(step):
        b = move(next(batches), device)
        predicted, feature = predict(forward, b, layer)
        v_teacher, features = teacher(b.x_t, b.t, b.ids)
        losses = {"task": (predicted - b.v).square().mean((1, 2, 3)), "out": (predicted - v_teacher).square().mean((1, 2, 3)),
                  "feat": (projector(feature) - normalized(features[-1])).square().mean((1, 2, 3))}  # fmt: skip
        combine(losses, b.t, ratios, "scaled", {}).mean().backward()
        finish(step)

    def third(step):  # the target is one forward of a few-step teacher, as with SD3.5-Large-Turbo
        p = move(step_distill.walk_on_policy(model, next(batches), times, device, args.batch), device)

        def renoised(x):
            return flow.interpolate(x, p.noise, p.level), p.level, p.ids

        discriminator.requires_grad_(True)
        with torch.no_grad():
            predicted = flow.x0_from_velocity(p.x_t, predict(forward, p), p.t)
            real, fake = discriminator.features(*renoised(p.x_0)), discriminator.features(*renoised(predicted))
        penalty, on_real = step_distill.gradient_penalty(discriminator, real)
        (step_distill.hinge(on_real, discriminator.logits(fake)) + 0.1 * penalty).backward()
        of_heads.step()
        of_heads.zero_grad(set_to_none=True)
        discriminator.requires_grad_(False)
        v = predict(forward, p)
        kd, task = (v - teacher(p.x_t, p.t, p.ids)[0]).square().mean((1, 2, 3)), (v - p.v).square().mean((1, 2, 3))
        loss = step_distill.distillation_loss(task, kd, p.t, p.on_policy, ratio(p.t)).mean()
        (loss - 0.05 * discriminator(*renoised(flow.x0_from_velocity(p.x_t, v, p.t))).mean()).backward()
        finish(step)

    return {1: first, 2: second, 3: third}[stage]


class CountFlops(TorchDispatchMode):
    """`total` FLOPs of everything inside, by torch's own formulas.

    With two differences from FlopCounterMode: it may be around autograd.grad, and the backward of a depthwise convolution counts
    twice its forward, where torch 2.13 forgets the groups (and would triple the FLOPs of this UNet).
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            grad_out, _, weight, *_, wanted = args
            self.total += sum(wanted[:2]) * 2 * grad_out.numel() * weight[0].numel()
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def median_seconds(work, device, rounds):
    """The median time of `work(k)` after two rounds of warm-up."""
    seconds = []
    for k in tqdm(range(rounds + 2), leave=False, disable=None):
        start = time.perf_counter()
        work(k)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[rounds // 2]


def matmul_peak(device, dtype):
    """FLOP/s of a large product of two matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median_seconds(lambda k: a @ a, device, 10)


def bench_stages(args, device, cfg, side, peak):
    rows, teacher_name = [], args.teacher or "toy"
    for stage in args.stages:
        for mode in args.modes:
            torch.manual_seed(0)
            data = open_latents(args, cfg, side, TEACHERS[teacher_name])
            teacher = None
            if stage > 1:
                teacher = RandomTeacher(teacher_name, data, device, half(device), spread(teacher_name), args.batch + 1)
            model = UNet(cfg).to(device)
            if mode != "eager":
                model = model.to(memory_format=torch.channels_last)
            model.checkpointing = False
            counted = 1 if args.checkpointing else args.batch  # without it a batch may not fit; one picture does
            with CountFlops() as counter:
                few = argparse.Namespace(**{**vars(args), "batch": counted})
                make_stage(stage, model, model, data, teacher, device, few)(0)
            flops = counter.total * args.batch / counted
            model.checkpointing = args.checkpointing
            if teacher and args.checkpointing:
                teacher.net.enable_gradient_checkpointing()
            step = make_stage(stage, model, torch.compile(model) if mode == "compile" else model, data, teacher, device, args)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds = median_seconds(step, device, args.rounds)
            memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
            space = f"{memory:8.1f} GB" if memory else ""  # only a GPU counts it
            rows.append({"stage": stage, "mode": mode, "pictures_per_second": args.batch / seconds, "memory_gb": memory,
                         "tflops_per_step": flops / 1e12, "share_of_peak": flops / seconds / peak})  # fmt: skip
            print(f"stage {stage}, {mode:14}{args.batch / seconds:10.2f} pictures/s{seconds:9.3f} s a step{space}"
                  f"{flops / 1e12:9.2f} TFLOP a step{100 * rows[-1]['share_of_peak']:7.1f} % of the peak")  # fmt: skip
            del step, model, teacher
    return rows


def open_latents(args, cfg, side, teacher):
    """What the steps read: --data, or random numbers of the same sizes."""
    if args.data is None:
        return RandomLatents(cfg, side, teacher, args.tokens)
    data = latents.open_latents(args.data)
    data.text_dim = cfg.text_dim
    if tuple(data.shape) != (cfg.latent_channels, side, side):
        raise SystemExit(f"{args.data} holds latents of {'x'.join(map(str, data.shape))}, not of --latent {side}.")
    return data


def spread(name):
    n = TEACHERS[name]["num_layers"]
    return n // 4, n // 2, n - 1


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m studies.speed --size imagenet --batch 2 --device cpu --stages 1")
    p.add_argument("--size", choices=PRESETS, default="imagenet", help="the UNet")
    p.add_argument("--latent", type=integer(4, multiple=4), help="side of the latent; default: 8, 32 or 128 by --size")
    p.add_argument("--data", metavar="DIR", help="what data.py encode wrote, to read from; default: random numbers")
    p.add_argument("--batch", type=integer(1), default=8, help="pictures a step")
    p.add_argument("--tokens", type=integer(1), help="of the student's text; default: 77, for t2i 205, with Gemma's 128")
    p.add_argument("--stages", type=integer(1, 3), nargs="+", default=(1, 2, 3), help="which stages")
    p.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="how the student runs")
    p.add_argument("--teacher", choices=TEACHERS, help="of stages 2 and 3; default: sd3.5-large for t2i, else toy")
    p.add_argument("--checkpointing", action="store_true", help="compute activations twice, to save memory")
    p.add_argument("--rounds", type=integer(1), default=5, help="timed steps; the median counts")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    add_device(p)
    args = p.parse_args(argv)
    args.tokens = (205 if args.size == "t2i" else 77) if args.tokens is None else args.tokens
    args.teacher = args.teacher or ("sd3.5-large" if args.size == "t2i" else "toy")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    device, cfg = pick_device(args.device), PRESETS[args.size]
    side = args.latent or {"tiny": 8, "imagenet": 32, "t2i": 128}[args.size]
    peak = matmul_peak(device, half(device))
    machine = describe_machine(device)
    maker = next((value for name, value in MAKERS_PEAK.items() if name in machine["device"]), None)
    print(
        f"--size {args.size}, {side}x{side} latents, batch {args.batch}, {args.tokens} tokens, teacher {args.teacher}, {machine}"
    )
    of_maker = f", {maker / 1e12:.0f} by its maker, of which the shares are" if maker else ""
    print(f"peak: {peak / 1e12:.2f} TFLOP/s by a matrix product{of_maker}")
    report = {"machine": machine, "peak": maker or peak}
    try:
        report["stages"] = bench_stages(args, device, cfg, side, maker or peak)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"out of memory with --batch {args.batch}: lower it, or give --checkpointing.") from error
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
