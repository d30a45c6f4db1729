"""What a decoder costs and how good it is: Table 2, quality beside the teacher's decoder, the ablation.

decoder.py calls it by flags of its own:

    python decoder.py --table            # Table 2 beside the paper's; time and memory measured here
    python decoder.py --evaluate DIR     # quality and cost beside the teacher's own decoder, pictures side by side
    python decoder.py --ablate           # the paper's changes undone one at a time
"""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

from common.checkpoint import check_encoders, describe_machine, pick_device, save_atomically, save_json
from common.encoders import FrozenAutoencoder
from common.pictures import open_picture, to_pictures, to_tensor
from decoder import ABLATIONS, PRESETS, Perceptual, TinyDecoder, load_decoder, open_pictures, psnr, side_by_side

# ------------------------------------------------------------------------------------------------------------------
# Quality and cost


def ssim(a, b):
    """Mean structural similarity (Wang et al. 2004) of two RGB pictures (PIL), by scikit-image in its original setting."""
    from skimage.metrics import structural_similarity

    return structural_similarity(np.asarray(a), np.asarray(b), channel_axis=2, data_range=255, gaussian_weights=True,
                                 sigma=1.5, use_sample_covariance=False)  # fmt: skip


@torch.no_grad()
def count(net, *inputs):
    """(parameters, MACs of one forward) of a network, on the meta device or not."""
    with FlopCounterMode(display=False) as counter:
        net(*inputs)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


def count_decoder(cfg, side):
    with torch.device("meta"):
        return count(TinyDecoder(cfg), torch.empty(1, cfg.latent_channels, side, side))


def milliseconds(decode, latents, rounds=15):
    """Median time of decoding one picture, after a warm-up."""
    seconds = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        decode(latents).sum().item()  # .item() waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[3:])


@torch.no_grad()
def score(decode, latents, pictures, perceptual):
    """{"psnr", "ssim", "perceptual", "ms"}: means over pictures (N, 3, H, W), rounded to 8 bits as on a screen."""
    restored = [to_pictures(decode(part)) for part in latents.split(32)]
    restored = [picture for part in restored for picture in part]
    x = to_tensor(restored).to(pictures.device)
    distance = torch.cat([perceptual(a, b) for a, b in zip(x.split(32), pictures.split(32), strict=True)])
    similar = [ssim(a, b) for a, b in zip(restored, to_pictures(pictures), strict=True)]
    return {"psnr": psnr(x, pictures).mean().item(), "ssim": float(np.mean(similar)),
            "perceptual": distance.mean().item(), "ms": milliseconds(decode, latents[:1])}  # fmt: skip


def evaluate(args):
    """Print quality and cost of the teacher's decoder and of a tiny one, and draw them side by side."""
    device = pick_device(args.device)
    decoder, config = load_decoder(args.evaluate, device)
    autoencoder = FrozenAutoencoder(args.vae, device)
    check_encoders(config, autoencoder)
    _, validation = open_pictures(args)
    pictures = to_tensor([validation[i][0] for i in range(min(len(validation), 256))]).to(device)
    latents = torch.cat([autoencoder.encode_pictures(part) for part in pictures.split(32)])
    perceptual, side = Perceptual(args.perceptual).to(device), latents.shape[2]
    with torch.device("meta"):
        teacher = AutoencoderKL.from_config(autoencoder.vae.config).decoder
        costs = [count(teacher, torch.empty(1, *latents.shape[1:])), count_decoder(decoder.cfg, side)]
    rows = {}
    for name, decode, (params, macs) in zip(
        (f"decoder of {args.vae}", str(args.evaluate)),
        (autoencoder.decode_latents, decoder.decode_latents),
        costs,
        strict=True,
    ):
        rows[name] = {**score(decode, latents, pictures, perceptual), "params": params, "macs": macs}
    print(f"{len(pictures)} validation pictures of {pictures.shape[3]} pixels, {describe_machine(device)}; "
          f"perceptual distance: {args.perceptual}")  # fmt: skip
    print(f"{'':32}{'PSNR dB':>9}{'SSIM':>8}{'percept.':>10}{'params M':>10}{'MMACs':>9}{'ms':>8}")
    for name, row in rows.items():
        print(f"{name[:31]:32}{row['psnr']:9.2f}{row['ssim']:8.4f}{row['perceptual']:10.4f}{row['params'] / 1e6:10.3f}"
              f"{row['macs'] / 1e6:9.1f}{row['ms']:8.2f}")  # fmt: skip
    first, second = rows.values()
    print(f"{'ratio':59}{first['params'] / second['params']:9.1f}x{first['macs'] / second['macs']:8.1f}x"
          f"{first['ms'] / second['ms']:7.1f}x")  # fmt: skip
    save_atomically(side_by_side(validation, autoencoder, decoder, device, count=6).save, args.out / "compare.png")
    strange = strangers(2 * pictures.shape[3])
    save_atomically(
        side_by_side(strange, autoencoder, decoder, device, count=4, scale=1).save, args.out / "strangers.png"
    )
    save_json(rows, args.out / "report.json")
    print(f"wrote {args.out}/compare.png, strangers.png, report.json")
    if args.json:
        print(json.dumps(rows))


def strangers(side):
    """Pictures that no decoder of the shapes world has seen: a photograph, letters, a smooth gradient, fine lines."""
    from matplotlib import cbook

    photo = open_picture(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), side)  # comes with matplotlib
    letters = Image.new("RGB", (side, side), "white")
    for line in range(side // 12):
        ImageDraw.Draw(letters).text(
            (2, 12 * line), "the quick brown fox jumps"[line:], "black", ImageFont.load_default(10)
        )
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    gradient = Image.fromarray(
        np.stack(
            [np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 128, np.uint8)], -1
        )
    )
    lines = Image.fromarray(
        np.where(np.add.outer(np.arange(side), np.arange(side)) % 4 < 2, 255, 0).astype(np.uint8)
    ).convert("RGB")
    return [(picture, "") for picture in (photo, letters, gradient, lines)]


# ------------------------------------------------------------------------------------------------------------------
# Table 2

# The paper's Table 2: PSNR on COCO 2017 val, parameters in millions, GMACs from a 128x128 latent, iPhone 15 Pro. We count
# 5 % more for SDXL and SD3: the products inside the attention, 2 * 16384^2 * 512 = 275 G, are not in the paper's number.
TABLE_2 = {
    "SDXL": (24.89, 49.49, 4970, "out of memory"), "SD3": (27.92, 49.55, 4970, "out of memory"),
    "SnapGen": (27.85, 1.38, 224, "174 ms"),
}  # fmt: skip


def build(name):
    """The decoder of SDXL, SD3 or ours, with random weights: latents in, pictures out."""
    if name == "SnapGen":
        return TinyDecoder(PRESETS["sd3"])
    channels, convolution = (4, True) if name == "SDXL" else (16, False)
    vae = AutoencoderKL(
        latent_channels=channels, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=convolution, use_post_quant_conv=convolution,
    )  # fmt: skip
    return vae.decoder


def measure(name, side, pipe):
    """In a process of its own: seconds, peak memory (bytes) and shares of the time by operation, sent through `pipe`."""
    torch.manual_seed(0)
    before = resident_peak()
    net = build(name).eval().to(memory_format=torch.channels_last)  # faster for both, and saves copies
    latents = torch.randn(1, 4 if name == "SDXL" else 16, side, side).contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    with torch.inference_mode():
        net(latents)
        seconds, peak = time.perf_counter() - start, resident_peak() - before
        with torch.profiler.profile() as profiler:  # once more, to see where the time goes
            net(latents)
    spent = dict.fromkeys((*OPERATIONS, "other"), 0.0)
    for event in profiler.key_averages():
        kind = [kind for kind, words in OPERATIONS.items() if any(word in event.key for word in words)]
        spent[kind[0] if kind else "other"] += event.self_cpu_time_total
    pipe.send((seconds, peak, {kind: value / sum(spent.values()) for kind, value in spent.items()}))


OPERATIONS = {"convolution": ["conv"], "GroupNorm": ["group_norm"], "SiLU": ["silu"], "upsampling": ["upsample"],
              "attention": ["attention", "mm", "linear"], "sum": ["aten::add"], "copies": ["copy_"]}  # fmt: skip


def resident_peak():
    """The most memory this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's getrusage would count the parent's peak as well
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_alone(name, side):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, side, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise SystemExit(
            f"the measurement of {name}'s decoder ended early: not enough memory for side {side}?"
        ) from error
    finally:
        process.join()


def table(args):
    """Print Table 2 beside the paper's numbers, and what one 1024-pixel picture costs on this CPU."""
    rows = {}
    for name in TABLE_2:
        with torch.device("meta"):
            params, macs = count(build(name), torch.empty(1, 4 if name == "SDXL" else 16, 128, 128))
        rows[name] = {"params": params, "macs": macs}
    for name in ("SD3", "SnapGen"):
        rows[name]["seconds"], rows[name]["peak_bytes"], rows[name]["spent"] = run_alone(name, args.latent)
    machine = describe_machine(torch.device("cpu"))
    print(f"Table 2: MACs from a 128x128 latent to 1024 pixels. Time and memory: one {8 * args.latent}-pixel picture on {machine}, "
          "float32, channels_last, random weights, each in a process of its own.")  # fmt: skip
    print(f"{'decoder':9}{'params M':>9}{'paper':>8}{'GMACs':>8}{'paper':>7}{'smaller':>9}{'fewer MACs':>12}{'seconds':>9}"
          f"{'peak GB':>9}   the paper, iPhone 15 Pro")  # fmt: skip
    theirs, ours = rows["SD3"], rows["SnapGen"]
    for name, row in rows.items():
        _, params, macs, phone = TABLE_2[name]
        here = f"{row['seconds']:9.2f}{row['peak_bytes'] / 1e9:9.2f}" if "seconds" in row else " " * 18
        print(f"{name:9}{row['params'] / 1e6:9.2f}{params:8.2f}{row['macs'] / 1e9:8.0f}{macs:7}"
              f"{theirs['params'] / row['params']:8.1f}x{theirs['macs'] / row['macs']:11.1f}x{here}   {phone}")  # fmt: skip
    print(f"ours beside SD3's: {theirs['seconds'] / ours['seconds']:.1f} times faster, "
          f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f} of its memory")  # fmt: skip
    for name, row in (("SD3", theirs), ("SnapGen", ours)):
        shares = sorted(row["spent"].items(), key=lambda item: -item[1])
        print(f"where its time goes, {name + ':':9} {', '.join(f'{kind} {share:.0%}' for kind, share in shares)}")
    if args.json:
        print(json.dumps(rows))


def ablate(args, train):
    """Train every variant for the same short budget and print what it costs and gives. Finished rows are kept."""
    device, rows = pick_device(args.device), {}
    for name, switches in ABLATIONS.items():
        cfg, out = replace(PRESETS[args.size], **switches), args.out / name.replace(" ", "_")
        args.resume = True
        print(f"-- {name}")
        train(args, cfg, out)
        decoder, config = load_decoder(out, device)
        autoencoder = FrozenAutoencoder(args.vae, device)
        _, validation = open_pictures(args)
        x = to_tensor([validation[i][0] for i in range(min(len(validation), 256))]).to(device)
        latents = autoencoder.encode_pictures(x)
        params, macs = count_decoder(decoder.cfg, latents.shape[2])
        quality = psnr(decoder.decode_latents(latents), x).mean().item()
        rows[name] = {
            "params": params,
            "macs": macs,
            "ms": milliseconds(decoder.decode_latents, latents[:1]),
            "psnr": quality,
        }
    print(f"\n{args.steps} steps of {args.batch} crops, seed {args.seed}, {describe_machine(device)}")
    print(f"{'':24}{'params M':>10}{'MMACs':>9}{'ms':>8}{'PSNR dB':>9}")
    for name, row in rows.items():
        print(f"{name:24}{row['params'] / 1e6:10.3f}{row['macs'] / 1e6:9.1f}{row['ms']:8.2f}{row['psnr']:9.2f}")
    save_json(rows, args.out / "ablation.json")
    if args.json:
        print(json.dumps(rows))
