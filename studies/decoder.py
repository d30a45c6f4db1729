"""What a decoder costs and how good it is: Table 2, time and memory, quality beside the teacher's decoder, the ablation.

    python -m studies.decoder                                      # time and memory at 64 and 1024 pixels; Table 2
    python -m studies.decoder --evaluate assets/zoo/decoder        # PSNR, SSIM, perceptual distance; pictures side by side
    python -m studies.decoder --ablate                             # the paper's changes undone one at a time
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from matplotlib import cbook
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

import decoder
from common.arguments import integer
from common.checkpoint import check_encoders, latest, save_atomically, save_json
from common.device import describe_machine, pick_device
from common.distances import Perceptual, psnr, ssim
from common.encoders import FrozenAutoencoder
from common.figures import side_by_side
from common.pictures import open_picture, to_pictures, to_tensor
from decoder import PRESETS, TinyDecoder, load_decoder, open_pictures

ABLATIONS = {
    "ours": {}, "with attention": dict(attention=True), "full convolutions": dict(separable=False),
    "GroupNorm everywhere": dict(norm_everywhere=True), "conv shortcuts": dict(conv_shortcut=True),
}  # fmt: skip
OWN = ("evaluate", "ablate", "latent", "json")  # flags that are no part of a training

# ------------------------------------------------------------------------------------------------------------------
# Table 2

# The paper's Table 2: PSNR on COCO 2017 val, parameters in millions, GMACs from a 128x128 latent, iPhone 15 Pro. We count
# 5 % more for SDXL and SD3: the products inside the attention, 2 * 16384^2 * 512 = 275 G, are not in the paper's number.
TABLE_2 = {
    "SDXL": (24.89, 49.49, 4970, "out of memory"), "SD3": (27.92, 49.55, 4970, "out of memory"),
    "SnapGen": (27.85, 1.38, 224, "174 ms"),
}  # fmt: skip


@torch.no_grad()
def count(net, *inputs):
    """(parameters, MACs of one forward) of a network, on the meta device or not."""
    with FlopCounterMode(display=False) as counter:
        net(*inputs)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


def count_decoder(cfg, side):
    with torch.device("meta"):
        return count(TinyDecoder(cfg), torch.empty(1, cfg.latent_channels, side, side))


def build(name):
    """The decoder of SDXL, SD3 or ours with random weights, or that of a folder: latents in, pictures out."""
    if name == "SnapGen":
        return TinyDecoder(PRESETS["sd3"])
    if name not in TABLE_2:
        is_ours = (Path(name) / "model.safetensors").is_file()
        return load_decoder(name)[0] if is_ours else FrozenAutoencoder(name).vae.decoder
    channels, convolution = (4, True) if name == "SDXL" else (16, False)
    vae = AutoencoderKL(
        latent_channels=channels, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=convolution, use_post_quant_conv=convolution,
    )  # fmt: skip
    return vae.decoder


def measure(name, side, batch, rounds, threads, pipe):
    """In a process of its own: median seconds, peak memory (bytes) and shares of the time by operation, sent through `pipe`."""
    torch.manual_seed(0)
    pick_device("cpu")  # and its settings
    torch.set_num_threads(threads)
    before = resident_peak()
    net = build(name).eval().to(memory_format=torch.channels_last)  # faster for both, and saves copies
    latents = torch.randn(batch, 4 if name == "SDXL" else 16, side, side).contiguous(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds):
            start = time.perf_counter()
            net(latents)
            seconds.append(time.perf_counter() - start)
        peak = resident_peak() - before
        with torch.profiler.profile() as profiler:  # once more, to see where the time goes
            net(latents)
    spent = dict.fromkeys((*OPERATIONS, "other"), 0.0)
    for event in profiler.key_averages():
        kind = [kind for kind, words in OPERATIONS.items() if any(word in event.key for word in words)]
        spent[kind[0] if kind else "other"] += event.self_cpu_time_total
    pipe.send((statistics.median(seconds), peak, {kind: value / sum(spent.values()) for kind, value in spent.items()}))


OPERATIONS = {"convolution": ["conv"], "GroupNorm": ["group_norm"], "SiLU": ["silu"], "upsampling": ["upsample"],
              "attention": ["attention", "mm", "linear"], "sum": ["aten::add"], "copies": ["copy_"]}  # fmt: skip


def resident_peak():
    """The most memory this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's getrusage would count the parent's peak as well
        return 1024 * int(status.read_text(encoding="utf-8-sig").split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_alone(name, side, batch, rounds, threads):
    """measure() of a decoder in a fresh process: (seconds, peak bytes, shares of the time)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would tell when it starts and stops
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, side, batch, rounds, threads, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise SystemExit(f"the measurement of {name} ended early: not enough memory for side {side}?") from error
    finally:
        process.join()


def costs(args):
    """Time and memory of our decoder beside the teacher's: one and 16 pictures of 64 pixels, one of 1024; then Table 2.

    Pictures of 64 pixels are decoded by one thread: their layers take microseconds, and threads would wait for each other.
    """
    ours, factor, all_threads, rows = latest("decoder"), FrozenAutoencoder(args.vae).factor, torch.get_num_threads(), []
    for theirs, mine, side, batch, rounds, threads in (
        (args.vae, ours, 8, 1, 31, 1), (args.vae, ours, 8, 16, 11, 1), ("SD3", "SnapGen", args.latent, 1, 1, all_threads),
    ):  # fmt: skip
        found = [run_alone(name, side, batch, rounds, threads) for name in (theirs, mine)]
        pair = [dict(zip(("seconds", "peak_bytes", "spent"), values, strict=True)) for values in found]
        rows.append({"names": [theirs, mine], "pixels": factor * side, "batch": batch, "threads": threads,
                     "theirs": pair[0], "ours": pair[1]})  # fmt: skip
    print(f"Time and memory on {describe_machine(torch.device('cpu'))}, float32, channels_last, each in a process of its own:")
    print(f"pixels batch threads   {'teacher, seconds':24}{'ours, seconds':26}  faster peak GB    ours")
    for row in rows:
        (a, b), theirs, ours = row["names"], row["theirs"], row["ours"]
        seconds = [f"{side['seconds']:.4f} {name}" for side, name in ((theirs, a), (ours, b))]
        peaks = "".join(f"{side['peak_bytes'] / 1e9:8.3f}" for side in (theirs, ours))
        print(f"{row['pixels']:6}{row['batch']:6}{row['threads']:8}   {seconds[0]:24}{seconds[1]:26}"
              f"{theirs['seconds'] / ours['seconds']:7.1f}x{peaks}")  # fmt: skip
    for row in rows[-1:]:
        for name, side in zip(row["names"], ("theirs", "ours"), strict=True):
            shares = sorted(row[side]["spent"].items(), key=lambda item: -item[1])
            print(f"where its time goes, {name + ':':9} {', '.join(f'{kind} {share:.0%}' for kind, share in shares)}")

    print("\nTable 2: MACs from a 128x128 latent to 1024 pixels")
    print("decoder   params M   paper   GMACs  paper  smaller  fewer MACs   the paper, iPhone 15 Pro")
    table = {}
    for name in TABLE_2:
        with torch.device("meta"):
            table[name] = count(build(name), torch.empty(1, 4 if name == "SDXL" else 16, 128, 128))
    for name, (params, macs) in table.items():
        _, paper_params, paper_macs, phone = TABLE_2[name]
        print(f"{name:9}{params / 1e6:9.2f}{paper_params:8.2f}{macs / 1e9:8.0f}{paper_macs:7}{table['SD3'][0] / params:8.1f}x"
              f"{table['SD3'][1] / macs:11.1f}x   {phone}")  # fmt: skip
    report = {"costs": rows, "table_2": {name: {"params": p, "macs": m} for name, (p, m) in table.items()}}
    save_json(report, args.out / "costs.json")
    if args.json:
        print(json.dumps(report))


# ------------------------------------------------------------------------------------------------------------------
# Quality


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
    restored = [picture for part in latents.split(32) for picture in to_pictures(decode(part))]
    x = to_tensor(restored).to(pictures.device)
    distance = torch.cat([perceptual(a, b) for a, b in zip(x.split(32), pictures.split(32), strict=True)])
    similar = [ssim(a, b) for a, b in zip(restored, to_pictures(pictures), strict=True)]
    return {"psnr": psnr(x, pictures).mean().item(), "ssim": float(np.mean(similar)),
            "perceptual": distance.mean().item(), "ms": milliseconds(decode, latents[:1])}  # fmt: skip


def evaluate(args):
    """Print quality and cost of the teacher's decoder and of a tiny one, and draw them side by side."""
    device = pick_device(args.device)
    net, config = load_decoder(args.evaluate, device)
    autoencoder = FrozenAutoencoder(args.vae, device)
    check_encoders(config, autoencoder)
    _, validation = open_pictures(args)
    pictures = to_tensor([validation[i][0] for i in range(min(len(validation), 256))]).to(device)
    latents = torch.cat([autoencoder.encode_pictures(part) for part in pictures.split(32)])
    perceptual, side = Perceptual(args.perceptual).to(device), latents.shape[2]
    with torch.device("meta"):
        teacher = AutoencoderKL.from_config(autoencoder.vae.config).decoder
        theirs = count(teacher, torch.empty(1, *latents.shape[1:]))
    rows = {}
    for name, decode, (params, macs) in (
        (f"decoder of {args.vae}", autoencoder.decode_latents, theirs),
        (str(args.evaluate), net.decode_latents, count_decoder(net.cfg, side)),
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
    save_atomically(side_by_side(validation, autoencoder, net, device, count=6).save, args.out / "compare.png")
    strange = side_by_side(out_of_domain(2 * pictures.shape[3]), autoencoder, net, device, count=4, scale=1)
    save_atomically(strange.save, args.out / "out_of_domain.png")
    save_json(rows, args.out / "report.json")
    print(f"wrote {args.out}/compare.png, out_of_domain.png, report.json")
    if args.json:
        print(json.dumps(rows))


def out_of_domain(side):
    """Pictures unlike the shapes world: a photograph, letters, a smooth gradient, fine lines."""
    photo = open_picture(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), side)  # comes with matplotlib
    letters = Image.new("RGB", (side, side), "white")
    for line in range(side // 12):
        ImageDraw.Draw(letters).text((2, 12 * line), "the quick brown fox jumps"[line:], "black", ImageFont.load_default(10))
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    across, flat = np.tile(ramp, (side, 1)), np.full((side, side), 128, np.uint8)
    gradient = Image.fromarray(np.stack([across, across.T, flat], -1))
    diagonals = np.add.outer(np.arange(side), np.arange(side)) % 4 < 2
    lines = Image.fromarray(np.where(diagonals, 255, 0).astype(np.uint8)).convert("RGB")
    return [(picture, "") for picture in (photo, letters, gradient, lines)]


# ------------------------------------------------------------------------------------------------------------------
# The ablation


def ablate(args):
    """Train every variant for the same short budget and print what it costs and gives. Finished rows are kept."""
    device, rows = pick_device(args.device), {}
    flags = {name: value for name, value in vars(args).items() if name not in OWN}
    for name, switches in ABLATIONS.items():
        cfg, out = replace(PRESETS[args.size], **switches), args.out / name.replace(" ", "_")
        print(f"-- {name}")
        decoder.train(argparse.Namespace(**{**flags, "resume": True, "out": out}), cfg)
        net, _ = load_decoder(out, device)
        autoencoder = FrozenAutoencoder(args.vae, device)
        _, validation = open_pictures(args)
        x = to_tensor([validation[i][0] for i in range(min(len(validation), 256))]).to(device)
        latents = torch.cat([autoencoder.encode_pictures(part) for part in x.split(32)])
        params, macs = count_decoder(net.cfg, latents.shape[2])
        quality = [psnr(net.decode_latents(z), part) for z, part in zip(latents.split(32), x.split(32), strict=True)]
        rows[name] = {"params": params, "macs": macs, "ms": milliseconds(net.decode_latents, latents[:1]),
                      "psnr": torch.cat(quality).mean().item()}  # fmt: skip
    print(f"\n{args.steps} steps of {args.batch} crops, seed {args.seed}, {describe_machine(device)}")
    print(f"{'':24}{'params M':>10}{'MMACs':>9}{'ms':>8}{'PSNR dB':>9}")
    for name, row in rows.items():
        print(f"{name:24}{row['params'] / 1e6:10.3f}{row['macs'] / 1e6:9.1f}{row['ms']:8.2f}{row['psnr']:9.2f}")
    save_json(rows, args.out / "ablation.json")
    if args.json:
        print(json.dumps(rows))


def parse_arguments(argv=None):
    p = decoder.make_parser(__doc__, "python -m studies.decoder --evaluate assets/zoo/decoder")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--evaluate", metavar="DIR", help="measure this decoder beside the teacher's, and draw both")
    what.add_argument("--ablate", action="store_true", help="undo the paper's changes one at a time, a short training each")
    p.add_argument("--latent", type=integer(1), default=128, help="side of the latent for SD3's decoder and ours")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    p.set_defaults(out=Path("runs/studies/decoder"), steps=400)
    return decoder.finish(p.parse_args(argv))


def main(argv=None):
    args = parse_arguments(argv)
    (evaluate if args.evaluate else ablate if args.ablate else costs)(args)


if __name__ == "__main__":
    main()
