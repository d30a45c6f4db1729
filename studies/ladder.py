"""The ablation ladder of Fig. 2 and 3 on this machine: how long each step takes, and what it learns.

    python -m studies.ladder --forward               # time of one forward of steps a to f at the paper's widths, beside the paper's
    python -m studies.ladder --forward --sdxl        # and of SDXL's UNet (2.6 B parameters)
    python -m studies.ladder --training              # training pictures a second at the widths of --size tiny
    python -m studies.ladder --training --compile --only a f      # the first and the last one, through torch.compile
    python -m studies.ladder --train --steps 1500    # train every step at class scale on the same data: Fig. 3 in small

Where nothing is trained weights are random: time does not depend on them. --train runs train_fm.py --ladder STEP for each step and
seed, keeps what is finished, and draws ladder.png: validation loss and mini-GenEval against parameters, MACs and time.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import train_fm
from common.arguments import Parser, add_device, integer, real
from common.checkpoint import save_json
from common.device import describe_machine, half, multiply_in_bfloat16, pick_device
from common.encoders import FrozenEncoders
from common.figures import pyplot, save_figure
from common.training import Log
from model import LADDER, PRESETS, UNet, ladder
from studies.sizes import PAPER_LADDER, count
from studies.students import mini_geneval, train_rows

# The paper's latency on iPhone 15 Pro (Sec. 3.1, Fig. 3).
PAPER_LATENCY = {"b": "-24 %", "c1": "-62 %", "c2": "2.4x faster than b", "d2": "-9 %"}


def sdxl():
    """diffusers' UNet in the shape of SDXL's, with 16 latent channels: 2.6 B parameters."""
    return UNet2DConditionModel(
        in_channels=16, out_channels=16, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), use_linear_projection=True,
    )  # fmt: skip


@torch.inference_mode()
def forward_times(steps, side, batch, rounds, device):
    """{step: seconds of one forward}, median of `rounds`; steps are those of LADDER, and "SDXL".

    They take turns, so that a slow moment of the machine hits all alike; each is built when its turn comes, since together they
    would not fit into memory.
    """
    samples, dtype = {step: [] for step in steps}, half(device)
    for _ in range(rounds):
        for step, taken in samples.items():
            with torch.device("meta"):
                net = sdxl() if step == "SDXL" else UNet(ladder(step))
            net = net.to_empty(device=device).to(dtype, memory_format=torch.channels_last).eval()
            for weight in [*net.parameters(), *net.buffers()]:
                weight.normal_(0, 0.02)
            width = 2048 if step == "SDXL" else net.cfg.text_dim
            x, text = (torch.randn(batch, *s, device=device, dtype=dtype) for s in ((16, side, side), (77, width)))
            t = torch.full((batch,), 0.5, device=device)
            for _ in range(2):  # the first forward warms up
                start = time.perf_counter()
                out = net(x, t, text)
                (out.sample if step == "SDXL" else out).sum().item()  # waits for a GPU
                seconds = time.perf_counter() - start
            taken.append(seconds)
            del net
    return {step: statistics.median(taken) for step, taken in samples.items()}


def report_forward(args, device):
    steps = [*args.only, *(["SDXL"] if args.sdxl else [])]
    side = args.latent
    print(f"one forward of {args.batch} latents of {side}x{side}, 77 tokens, {half(device)}, {describe_machine(device)}")
    seconds, before, first = forward_times(steps, args.latent, args.batch, args.rounds, device), None, steps[0]
    print(f"{'step':6}{'ms':>9}{'change':>10}{'against ' + first:>12}   the paper, on the phone")
    for step, value in seconds.items():
        change = "" if before is None else f"{100 * (value / before - 1):+.1f} %"
        print(f"{step:6}{1000 * value:9.1f}{change:>10}{value / seconds[first]:11.2f}x   {PAPER_LATENCY.get(step, '')}", flush=True)
        before = value
    if {"b", "c2"} <= seconds.keys():
        print(f"c2 beside b: {seconds['b'] / seconds['c2']:.2f} times as fast (the paper: 2.4)")
    return {"forward_seconds": seconds}


def training_speed(steps, batch, rounds, compiled, device, side=8, tokens=13):
    """{step: training pictures a second} (forward, backward, AdamW) at the widths of --size tiny, median of `rounds`.

    The longest captions of the shapes world have 13 tokens. The steps take turns here too.
    """
    turns = {}
    for step in steps:
        cfg = ladder(step, PRESETS["tiny"])
        net = multiply_in_bfloat16(UNet(cfg).to(device, memory_format=torch.channels_last), device)
        if compiled:
            net.compile()
        turns[step] = (net, torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True), cfg, [])
    for _ in range(rounds + 1):  # the first round warms up
        for net, optimizer, cfg, seconds in turns.values():
            x, t = torch.randn(batch, cfg.latent_channels, side, side, device=device), torch.rand(batch, device=device)
            text = torch.randn(batch, tokens, cfg.text_dim, device=device)
            mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
            start = time.perf_counter()
            loss = net(x, t, text, mask).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
    return {step: batch / statistics.median(seconds[1:]) for step, (_, _, _, seconds) in turns.items()}


def report_training(args, device):
    print(f"training at the widths of --size tiny, batch {args.batch}, 8x8 latents, {describe_machine(device)}"
          f"{', compiled' if args.compile else ''}")  # fmt: skip
    speed = training_speed(args.only, args.batch, args.rounds, args.compile, device)
    for step, rate in speed.items():
        params, macs = count(ladder(step, PRESETS["tiny"]), 8, 13)
        first = args.only[0]
        print(f"{step:5}{params / 1e6:8.2f} M{macs / 1e6:8.1f} MMACs{rate:8.1f} pictures/s{rate / speed[first]:8.2f} x {first}")
    return {"training_pictures_per_second": speed}


def train(args, device):
    """Stage 1 for every step of the ladder and every seed: the table, ladder.png, ladder.json."""
    encoders, results = FrozenEncoders(args.teacher, device), {step: [] for step in args.only}
    flags = {"teacher": args.teacher, "steps": args.steps, "save-every": args.steps, "pictures": args.pictures, "batch": args.batch,
             "device": device} | ({"lr": args.lr} if args.lr else {})  # fmt: skip
    flags = [text for name, value in flags.items() for text in (f"--{name}", str(value))] + ["--compile"] * args.compile
    settings = train_fm.parse_arguments(flags)
    settings.seeds = args.seeds
    for step, out in train_rows(settings, {step: {"ladder": step} for step in args.only}, train_fm.train, ("seeds",), args.out):
        log = Log(out / "log.csv", resume_step=args.steps)
        results[step].append({"score": mini_geneval(out, encoders, args.per_family)["overall"],
                              "val_loss": log.column("val_loss")[-1],
                              "ms_per_step": 1000 * args.batch / statistics.median(log.column("pictures_per_second"))})  # fmt: skip
    print(f"\n{args.steps} steps of {args.batch}, rate {settings.lr:g}, {args.seeds} seeds, {6 * args.per_family} prompts, "
          f"{describe_machine(device)}")  # fmt: skip
    print(f"{'step':5}{'params M':>9}{'MMACs':>8}{'ms a step':>10}{'val loss':>10}{'range':>18}{'mini-GenEval':>14}{'range':>16}"
          "   the paper")  # fmt: skip
    for step, runs in results.items():
        params, macs = count(ladder(step, PRESETS["tiny"]), 8, 13)
        losses, scores = [run["val_loss"] for run in runs], [run["score"] for run in runs]
        print(f"{step:5}{params / 1e6:9.2f}{macs / 1e6:8.1f}{least_time(runs):10.0f}"
              f"{statistics.mean(losses):10.4f}{f'{min(losses):.4f} to {max(losses):.4f}':>18}{statistics.mean(scores):14.3f}"
              f"{f'{min(scores):.3f} to {max(scores):.3f}':>16}   {PAPER_LADDER[step]}")  # fmt: skip
    plot(results, args)
    save_json(results, args.out / "ladder.json")
    print(f"wrote {args.out}/ladder.png, ladder.json")
    return {"trained": results}


def least_time(runs):
    """Milliseconds of a training step, of the seed that was disturbed least by other work on the machine."""
    return min(run["ms_per_step"] for run in runs)


def plot(results, args):
    """ladder.png: each step a point, the bar over its seeds; smaller and to the left is cheaper."""
    figure, axes = pyplot().subplots(2, 3, figsize=(13, 7.5), sharey="row")
    for step, runs in results.items():
        params, macs = count(ladder(step, PRESETS["tiny"]), 8, 13)
        costs = (params / 1e6, macs / 1e6, least_time(runs))
        for row, column in enumerate(("val_loss", "score")):
            values = [run[column] for run in runs]
            middle = statistics.mean(values)
            for axis, cost in zip(axes[row], costs, strict=True):
                axis.errorbar(cost, middle, [[middle - min(values)], [max(values) - middle]], fmt="o", capsize=3)
                axis.annotate(step, (cost, middle), xytext=(5, 4), textcoords="offset points")
    for axis, label in zip(axes[1], ("parameters, M", "MACs of a forward, M", "ms of a training step"), strict=True):
        axis.set_xlabel(label)
    axes[0][0].set_ylabel("validation loss"), axes[1][0].set_ylabel("mini-GenEval")
    save_figure(figure, args.out / "ladder.png")


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m studies.ladder --forward --only a f")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--forward", action="store_true", help="time one forward of each step at the paper's widths")
    what.add_argument("--training", action="store_true", help="time training at the widths of --size tiny")
    what.add_argument("--train", action="store_true", help="train each step at the widths of --size tiny, or go on with that")
    p.add_argument("--only", nargs="+", choices=LADDER, default=list(LADDER), help="these steps; default: all")
    p.add_argument("--latent", type=integer(4, multiple=4), default=32, help="side of the latent, for --forward")
    p.add_argument("--batch", type=integer(1), help="latents at once; default: 1 for --forward, 64 for training")
    p.add_argument("--rounds", type=integer(1), default=5, help="turns of each step, of which the median counts")
    p.add_argument("--sdxl", action="store_true", help="with --forward, also SDXL's UNet")
    p.add_argument("--compile", action="store_true", help="with --training, --train: torch.compile each first, some minutes a step")
    p.add_argument("--steps", type=integer(1), default=1500, help="training steps, for --train")
    p.add_argument("--lr", type=real(above=0), help="learning rate, for --train; default: stage 1's")
    p.add_argument("--pictures", type=integer(1), default=20_000, help="different pictures to train on, for --train")
    p.add_argument("--seeds", type=integer(1), default=2, help="runs of each step, for --train: seeds 0, 1, ...")
    p.add_argument("--per-family", type=integer(1), default=100, help="mini-GenEval prompts a family, for --train")
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder whose encoders are used, for --train")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/studies/ladder"), help="where --train writes")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    add_device(p)
    args = p.parse_args(argv)
    args.batch = args.batch or (64 if args.training or args.train else 1)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    report = (train if args.train else report_forward if args.forward else report_training)(args, device)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
