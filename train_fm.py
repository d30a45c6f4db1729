"""Stage 1: train the efficient UNet from scratch by flow matching (first part of Sec. 3.3).

The network sees a noisy latent x_t = (1 - t) x_0 + t eps, the time t and a caption, and learns the velocity eps - x_0.
Timesteps come from a logit-normal, shifted towards noise; one caption in ten is dropped, for classifier-free guidance.

    python train_fm.py                                  # class scale: shapes world, tiny UNet, 15 minutes on 2 cores
    python train_fm.py --data DIR --out runs/mine       # your own pictures with captions
    python train_fm.py --size t2i --teacher stable-diffusion-3.5-large --data DIR --batch 64    # the paper's 379 M UNet

Writes runs/fm: model.safetensors (EMA weights) and config.json for sample.py and evaluate.py, train_state/ for --resume,
log.csv, loss.png, samples/. Every random number comes from (--seed, step): stop it at any moment, run the same command
with --resume, and the weights end bit for bit as if it had never stopped (CPU, same number of threads).

Differences from the paper [A]: AdamW with warm-up and linear decay, shift 3 at every size, text dropped 10 % of the time;
the paper's private data, its batch sizes and its learning rate for this stage are not public.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import flow
from checkpoint import (
    Log,
    describe_machine,
    load_state,
    load_student,
    load_weights,
    pick_device,
    save_atomically,
    save_state,
    save_student,
)
from data import CaptionedFolder, ShapesWorld, encode_dataset, rng, to_pictures
from encoders import FrozenEncoders, pad_text
from model import PRESETS, UNet

BINS = 5  # of t: the loss is logged for each fifth of (0, 1), since the average alone goes flat early and says little
PROMPTS = (  # drawn from the same noise over and over: two of every family that is not learned at once
    "a photo of a star", "a photo of a red circle", "a photo of a square and a triangle", "a photo of three stars",
    "a photo of two blue squares", "a photo of a triangle left of a circle", "a photo of a red star above a green square",
    "a photo of a purple circle and a yellow star",
)  # fmt: skip


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # what to train
    p.add_argument("--size", choices=PRESETS, default="tiny", help="the UNet: class scale, or one of the paper's two")
    p.add_argument("--init", metavar="DIR", help="start from this student's weights instead of random ones")
    p.add_argument(
        "--teacher",
        metavar="DIR",
        default="assets/toy-sd3",
        help="SD3 folder whose autoencoder and text encoders are used",
    )
    # data
    p.add_argument("--data", metavar="DIR", help="folder of pictures with captions; without it, the shapes world")
    p.add_argument("--pictures", type=int, default=40_000, help="how many different shapes-world pictures to train on")
    p.add_argument("--resolution", type=int, help="side in pixels for --data; default: 64, 256 or 1024 by --size")
    # optimisation
    p.add_argument("--steps", type=int, default=3000, help="training steps")
    p.add_argument("--batch", type=int, default=64, help="pictures a step")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate after the warm-up")
    p.add_argument("--seed", type=int, default=0, help="of weights, noise, timesteps and the data's order")
    # writing
    p.add_argument("--out", metavar="DIR", default="runs/fm", help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on from the last saved state in --out, if there is one")
    p.add_argument(
        "--save-every", type=int, default=500, metavar="STEPS", help="save, validate and draw samples this often"
    )
    # system
    p.add_argument("--device", help="cuda, mps or cpu; chosen by itself if not given")
    p.add_argument("--compile", action="store_true", help="torch.compile the UNet: minutes to start, then faster")
    return p.parse_args(argv)


def learning_rate(step, steps, peak, warmup=200):
    """Linear warm-up, a plateau, and a linear decay to zero over the last 40 % of the run."""
    return peak * min(1, (step + 1) / warmup) * min(1, (steps - step) / (0.4 * steps))


def noisy_batch(data, seed, step, batch, shift, drop):
    """One training example from (seed, step) alone: x_t, t, the target velocity and the captions' ids, all on the CPU."""
    x0, caption_ids = data.batch(seed, step, batch)
    g = rng(seed, step)
    dropped = torch.rand(batch, generator=g) < drop
    caption_ids = torch.where(dropped, 0, caption_ids)  # caption 0 is the empty one
    t = flow.logit_normal_timesteps(batch, shift, generator=g)
    eps = torch.randn(x0.shape, generator=g)
    return flow.interpolate(x0, eps, t), t, flow.velocity(x0, eps), caption_ids


def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    args.resolution = args.resolution or {"tiny": 64, "imagenet": 256, "t2i": 1024}[args.size]
    out, shift, drop, ema_decay = Path(args.out), 3.0, 0.1, 0.999

    # data: pictures and captions pass through the frozen encoders once
    encoders = FrozenEncoders(args.teacher, device)
    if args.data:
        pictures = validation = CaptionedFolder(args.data, args.resolution)
    else:
        pictures, validation = ShapesWorld("train", 0, args.pictures), ShapesWorld("val", 0, 256)
    data, val = encode_dataset(pictures, encoders), encode_dataset(validation, encoders)
    prompts = PROMPTS if not args.data else [pictures.caption(i * len(pictures) // 8) for i in range(8)]

    # model: the UNet, and the average of its weights over time (EMA), which is what gets sampled
    model_config = PRESETS[args.size]
    if encoders.latent_channels != model_config.latent_channels:
        raise SystemExit(
            f"the autoencoder of {args.teacher} has {encoders.latent_channels} latent channels, the UNet "
            f"{model_config.latent_channels}: give --teacher an SD3 folder."
        )
    if encoders.text_dim > model_config.text_dim:
        raise SystemExit(f"the text states of {args.teacher} are {encoders.text_dim} wide, --size {args.size} takes "
                         f"{model_config.text_dim}: give a larger --size.")  # fmt: skip
    model = UNet(model_config).to(device, memory_format=torch.channels_last)  # depthwise convolutions like it
    states, mask = (
        pad_text(data.states.float(), model_config.text_dim).to(device),
        data.mask.to(device),
    )  # (K, T, D), (K, T)
    text, empty = (
        encoders.student_text(captions, model_config.text_dim) for captions in (prompts, [""] * len(prompts))
    )
    if args.init:
        load_weights(model, load_student(args.init)[0].state_dict(), args.init)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    settings = {
        k: getattr(args, k) for k in ("size", "data", "steps", "batch", "lr", "seed", "init", "pictures", "resolution")
    }
    first = load_state(out, settings, optimizer, model=model, ema=ema) if args.resume else 0
    log = Log(out / "log.csv", first)
    forward = torch.compile(model) if args.compile else model
    config = {
        "stage": "fm", "size": args.size, "encoders": args.teacher, "scale": encoders.scale, "shift_factor": encoders.shift,
        "latent_size": list(data.latents.shape[2:]), "sampling": {"steps": 28, "guidance": 3.0, "shift": shift},
        "settings": settings, "machine": describe_machine(device),
    }  # fmt: skip
    print(f"{args.size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(data)} pictures, "
          f"{config['machine']}, seed {args.seed}, steps {first} to {args.steps}")  # fmt: skip

    def velocity_of(net, x_t, t, ids):
        return net(x_t.to(device), t.to(device), states[ids.to(device)], mask[ids.to(device)])

    @torch.no_grad()
    def validate():
        """Mean squared error of the EMA on fixed pictures, noise and times."""
        losses, val_states, val_mask = (
            [],
            pad_text(val.states.float(), model_config.text_dim).to(device),
            val.mask.to(device),
        )
        for i in range(min(4, math.ceil(len(val) / 64))):
            x_t, t, v, ids = noisy_batch(val, 1, i, min(64, len(val)), shift, drop=0.0)
            predicted = ema(x_t.to(device), t.to(device), val_states[ids], val_mask[ids])
            losses.append(F.mse_loss(predicted.float().cpu(), v).item())
        return sum(losses) / len(losses)

    def draw_samples(step):
        """One row of pictures: the same prompts and the same noise every time. samples/progress.png stacks the rows."""
        noise = torch.randn(len(prompts), *data.latents.shape[1:], generator=rng(args.seed)).to(device)
        latents = flow.euler_sample(ema, noise, text, empty, 16, 3.0, shift)
        row = to_pictures(encoders.decode_latents(latents))
        strip = Image.new("RGB", (row[0].width * len(row), row[0].height))
        for i, picture in enumerate(row):
            strip.paste(picture, (i * picture.width, 0))
        save_atomically(strip.save, out / "samples" / f"{step:07d}.png")
        rows = [Image.open(p) for p in sorted((out / "samples").glob("[0-9]*.png")) if int(p.stem) <= step]
        grid = Image.new("RGB", (strip.width, sum(r.height for r in rows)))
        for i, r in enumerate(rows):
            grid.paste(r, (0, i * strip.height))
        save_atomically(grid.save, out / "samples" / "progress.png")

    # the loop
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="stage 1", mininterval=1)
    bins, start = torch.zeros(2, BINS), time.time()  # sums of losses, and counts
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)

        x_t, t, v, ids = noisy_batch(data, args.seed, step, args.batch, shift, drop)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = velocity_of(forward, x_t, t, ids)
        losses = (predicted.float() - v.to(device)).square().mean((1, 2, 3))  # (B,)   || v_theta(x_t, t, c) - v ||^2
        loss = losses.mean()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(grad_norm):
            raise SystemExit(f"the loss became {loss.item()} at step {step}. The last good state is in {out / 'train_state'}: "
                             f"try again from there with a lower --lr than {args.lr}, through --init.")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (step + 1) / (step + 10))  # a short memory at first, when the weights still run
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

        which = (t * BINS).long().clamp(max=BINS - 1)
        bins[0].index_add_(0, which, losses.detach().float().cpu())
        bins[1].index_add_(0, which, torch.ones_like(t))
        save = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if save or (step + 1) % 50 == 0:
            mean = (bins[0].sum() / bins[1].sum()).item()
            per_bin = {f"loss_t{i / BINS:.1f}": (bins[0, i] / bins[1, i]).item() for i in range(BINS)}
            bins.zero_()
            val_loss = validate() if save else float("nan")
            log.add(step=step + 1, pictures=(step + 1) * args.batch, loss=mean, **per_bin, val_loss=val_loss,
                    grad_norm=grad_norm.item(), lr=optimizer.param_groups[0]["lr"],
                    pictures_per_second=(step + 1 - first) * args.batch / (time.time() - start))  # fmt: skip
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if save:
                save_student(out, ema, {**config, "step": step + 1, "pictures_seen": (step + 1) * args.batch})
                save_state(out, step + 1, settings, optimizer, model=model, ema=ema)
                draw_samples(step + 1)
                plot(log, out / "loss.png")
    print(f"wrote {out}: model.safetensors, config.json, log.csv, loss.png, samples/progress.png")


def plot(log, path):
    """loss.png: the loss of each timestep bin, and the validation loss of the EMA."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    steps = log.column("step")
    for i in range(BINS):
        axis.plot(
            steps, log.column(f"loss_t{i / BINS:.1f}"), lw=1, label=f"t in ({i / BINS:.1f}, {(i + 1) / BINS:.1f})"
        )
    axis.plot(steps, log.column("loss"), "k", lw=2, label="all t")
    points = [(s, v) for s, v in zip(steps, log.column("val_loss"), strict=True) if not math.isnan(v)]
    axis.plot(*zip(*points, strict=True), "ko:", label="validation, EMA")
    axis.set(
        xlabel="step",
        ylabel="|| v_theta - v ||^2",
        yscale="log",
        title="Flow matching: the ends of the path are hard, in their own ways",
    )
    axis.legend(fontsize=8)
    figure.tight_layout()
    save_atomically(figure.savefig, path)
    plt.close(figure)


if __name__ == "__main__":
    main()
