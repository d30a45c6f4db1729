"""Stage 1: train the efficient UNet from scratch by flow matching (first part of Sec. 3.3).

The network sees a noisy latent x_t = (1 - t) x_0 + t eps, the time t and a caption, and learns the velocity eps - x_0.
Timesteps come from a logit-normal, shifted towards noise; one caption in ten is dropped, for classifier-free guidance.

    python train_fm.py                                  # class scale: shapes world, tiny UNet, 15 minutes on 2 cores
    python train_fm.py --data DIR --out runs/mine       # your own pictures with captions
    python train_fm.py --size t2i --teacher stable-diffusion-3.5-large --data DIR --lr 1e-4     # the paper's 379 M UNet
    torchrun --nproc_per_node 8 train_fm.py --size t2i --batch 1024 ...     # on 8 GPUs; recipes/ has whole commands

Writes runs/fm: model.safetensors (EMA weights) and config.json for sample.py and evaluate.py, train_state/ for --resume,
log.csv, loss.png, samples/. Every random number comes from (--seed, step): stop it at any moment, run the same command
with --resume, and the weights end bit for bit as if it had never stopped (CPU, same number of threads).

Differences from the paper [A]: Muon for the transformers' matrices at class scale, AdamW else, with warm-up and linear decay;
shift 3 at class scale and at 1024 px, 1 at 256 px; text dropped 10 % of the time. The paper's data, batch sizes and learning rate
here are not public.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import flow
from common import parallel, shards
from common.checkpoint import (
    HelpFormatter,
    Log,
    describe_machine,
    load_state,
    load_student,
    load_weights,
    pick_device,
    save_atomically,
    save_network,
    save_state,
)
from common.encoders import FrozenEncoders, pad_text
from common.figures import curves, stack
from common.pictures import CaptionedFolder, to_pictures
from common.seeds import noise_rows, rng
from common.shapes import ShapesWorld
from data import ahead, encode_dataset
from model import PRESETS, UNet

BINS = 5  # of t: the loss is logged for each fifth of (0, 1), since the average alone goes flat early and says little
PROMPTS = (  # drawn from the same noise over and over: easy families once, hard ones more often
    "a photo of a star", "a photo of a red circle", "a photo of a square and a triangle", "a photo of three stars",
    "a photo of two blue squares", "a photo of a triangle left of a circle", "a photo of a red star above a green square",
    "a photo of a purple circle and a yellow star",
)  # fmt: skip


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    # what to train
    p.add_argument("--size", choices=PRESETS, default="tiny", help="the UNet: class scale, or one of the paper's two")
    p.add_argument("--init", metavar="DIR", help="start from this student's weights instead of random ones")
    p.add_argument(
        "--teacher",
        metavar="DIR",
        default="assets/toy-sd3",
        help="SD3 folder whose autoencoder and text encoders are used",
    )
    p.add_argument(
        "--gemma", metavar="DIR", help="folder of google/gemma-2-2b: a third text encoder, as in the paper's --size t2i"
    )
    # data
    p.add_argument(
        "--data", metavar="DIR", help="pictures with captions, or shards of `data.py encode`; default: the shapes world"
    )
    p.add_argument("--pictures", type=int, default=20_000, help="how many different shapes-world pictures to train on")
    p.add_argument("--resolution", type=int, help="side in pixels for --data; default: 64, 256 or 1024 by --size")
    # optimisation
    p.add_argument("--steps", type=int, default=2500, help="training steps")
    p.add_argument("--batch", type=int, default=64, help="pictures a step, of all GPUs together")
    p.add_argument("--accumulate", type=int, default=1, help="parts in which each GPU takes its share, to save memory")
    p.add_argument("--checkpointing", action="store_true", help="compute activations twice, to save memory")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate after the warm-up")
    p.add_argument(
        "--optimizer", choices=("adamw", "muon"), help="default: muon for --size tiny, adamw for the paper's"
    )
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
    args = p.parse_args(argv)
    for name in ("steps", "batch", "accumulate", "pictures", "save_every"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    args.optimizer = args.optimizer or ("muon" if args.size == "tiny" else "adamw")
    args.resolution = args.resolution or {"tiny": 64, "imagenet": 256, "t2i": 1024}[args.size]
    return args


def learning_rate(step, steps, peak, warmup=200):
    """Linear warm-up, a plateau, and a linear decay to zero over the last 40 % of the run."""
    return peak * min(1, (step + 1) / warmup) * min(1, (steps - step) / (0.4 * steps))


def open_data(args, encoders):
    """(training data, validation data, name): --data or the shapes world as data.Latents, through the frozen encoders."""
    if args.resolution < 32 or args.resolution % 32:  # 8 pixels a latent cell, and the UNet halves the latent twice
        raise SystemExit(f"--resolution must be a multiple of 32, not {args.resolution}.")
    if args.data and list(Path(args.data).glob("0*.safetensors")):
        training, validation = shards.open_shards(args.data, encoders)
        side = encoders.factor * training.shape[-1]
        if side != args.resolution:
            raise SystemExit(
                f"the shards in {args.data} are of {side} pixels: give --resolution {side}, or encode others."
            )
        return training, validation, training.name
    if args.data and (args.data.endswith(".tar") or shards.is_raw(Path(args.data))):
        raise SystemExit(f"{args.data} is encoded once before training: python data.py encode {args.data} --out DIR "
                         f"--resolution {args.resolution} --teacher {args.teacher}, then --data DIR.")  # fmt: skip
    if args.data:
        pictures, validation = CaptionedFolder(args.data, args.resolution).split()
    else:
        pictures, validation = ShapesWorld("train", 0, args.pictures), ShapesWorld("val", 0, 256)
    return encode_dataset(pictures, encoders), encode_dataset(validation, encoders), pictures.name


def noisy_batch(data, seed, step, batch, shift, caption_dropout, rows=slice(None)):
    """One training batch from (seed, step) alone: x_t, t, the target velocity and the captions' ids, all on the CPU.

    With `rows`, those of one GPU: N GPUs see what one would have seen.
    """
    g = rng(seed, step)
    dropped = torch.rand(batch, generator=g) < caption_dropout
    t = flow.logit_normal_timesteps(batch, shift, generator=g)[rows]
    eps = noise_rows(data.shape, batch, seed, step, 0, rows=rows)
    x0, ids = data.batch(seed, step, batch, rows)
    ids = torch.where(dropped[rows], 0, ids)  # caption 0 is the empty one
    if data.several_encoders:  # each of them is dropped apart besides [S]; ids becomes (B, 3)
        ids = ids[:, None] * (torch.rand((batch, 3), generator=g) >= caption_dropout)[rows]
    return flow.interpolate(x0, eps, t), t, flow.velocity(x0, eps), ids


def predict(net, cfg, source, x_t, t, ids, device):
    """The velocity that a UNet of config `cfg` sees in x_t (B, 16, h, w) at t, with captions ids of `source`."""
    states, mask = source.text(ids)
    states = pad_text(states.to(device).float(), cfg.text_dim, source.first_clip)  # (B, T, text_dim)
    return net(x_t.to(device), t.to(device), states, mask.to(device))


def autocast(device):
    """Inside it a GPU multiplies and convolves in bfloat16, with weights and sums in float32; elsewhere nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def validate(model, val, shift, device):
    """Mean squared error of a UNet on fixed pictures, noise and times."""
    losses, size = [], min(64, len(val))
    at_once = max(1, 64 * 32**2 // math.prod(val.shape[1:]))  # pictures: of large latents only some fit
    for i in range(min(4, math.ceil(len(val) / 64))):
        x_t, t, v, ids = noisy_batch(val, 1, i, size, shift, caption_dropout=0.0)
        for part in torch.arange(size).split(at_once):
            with autocast(device):
                predicted = predict(model, model.cfg, val, x_t[part], t[part], ids[part], device)
            losses.append((predicted.float().cpu() - v[part]).square().mean((1, 2, 3)))
    return torch.cat(losses).mean().item()


def draw_samples(out, step, model, encoders, prompts, shape, sampling, seed):
    """One row of pictures: the same prompts and the same noise every time. samples/progress.png stacks the rows."""
    noise = torch.randn(len(prompts), *shape, generator=rng(seed)).to(encoders.device)
    text, empty = (encoders.student_text(c, model.cfg.text_dim) for c in (prompts, [""] * len(prompts)))
    steps = min(16, sampling["steps"])
    latents = flow.euler_sample(model, noise, text, empty, steps, sampling["guidance"], sampling["shift"])
    row = to_pictures(encoders.decode_latents(latents))
    save_atomically(stack([row]).save, out / "samples" / f"{step:07d}.png")
    rows = [Image.open(p) for p in sorted((out / "samples").glob("[0-9]*.png")) if int(p.stem) <= step]
    save_atomically(stack([[r] for r in rows]).save, out / "samples" / "progress.png")


def make_optimizers(model, lr, kind):
    """AdamW for all weights; or, with kind "muon", Muon for the matrices of the transformer blocks and AdamW for the rest.

    Muon makes the step of a matrix orthogonal, so that no direction starves; AdamW scales each number by itself. At class
    scale it learns faster [A]. `match_rms_adamw` lets both use one learning rate.
    """
    matrices = (
        [w for name, w in model.named_parameters() if w.dim() == 2 and ".blocks." in name] if kind == "muon" else []
    )
    chosen = {id(w) for w in matrices}
    others = [w for w in model.parameters() if id(w) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@torch.no_grad()
def update_ema(ema, model, step, longest=0.999):
    """ema <- d ema + (1 - d) model, with a short memory at first, when the weights still run."""
    decay = min(longest, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def main(argv=None):
    args = parse_arguments(argv)
    device, out = pick_device(args.device), Path(args.out)
    if (out / "train_state").is_dir() and not args.resume:
        raise SystemExit(f"{out} holds a run already: go on with --resume, choose another --out, or delete it.")
    torch.manual_seed(args.seed)
    caption_dropout, shift = 0.1, 3.0 if args.size == "tiny" else flow.resolution_shift(args.resolution)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    main_rank, rows = parallel.rank() == 0, parallel.rows(args.batch, args.accumulate)

    # data: pictures and captions pass through the frozen encoders once
    encoders = FrozenEncoders(args.teacher, device, half if args.size != "tiny" else torch.float32, args.gemma)
    data, val, pictures_name = open_data(args, encoders)

    # model: the UNet, and the average of its weights over time (EMA), which is what gets sampled
    unet_config = PRESETS[args.size]
    if encoders.latent_channels != unet_config.latent_channels:
        raise SystemExit(
            f"the autoencoder of {args.teacher} has {encoders.latent_channels} latent channels, the UNet "
            f"{unet_config.latent_channels}: give --teacher an SD3 folder."
        )
    model = UNet(unet_config).to(device, memory_format=torch.channels_last)  # depthwise convolutions like it
    model.checkpointing = args.checkpointing
    prompts = PROMPTS if not args.data else [data.caption_of(i * len(data) // 8) for i in range(8)]
    if args.init:
        load_weights(model, load_student(args.init)[0].state_dict(), args.init)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizers = make_optimizers(model, args.lr, args.optimizer)
    names = "size init data gemma resolution steps batch lr optimizer seed"
    settings = {name: getattr(args, name) for name in names.split()}
    settings |= {"pictures": pictures_name, "teacher": encoders.fingerprint()}  # the same folder may hold other things
    start_step = load_state(out, settings, optimizers, model=model, ema=ema) if args.resume else 0
    log = Log(out / "log.csv", start_step)
    forward = parallel.wrap(torch.compile(model) if args.compile else model, device)
    config = {
        "stage": "fm", "size": args.size, "encoders": args.teacher, "gemma": args.gemma, "latent_size": list(data.shape[1:]),
        "scaling_factor": encoders.scaling_factor, "shift_factor": encoders.shift_factor,
        "sampling": {"steps": 28, "guidance": 3.0, "shift": shift}, "settings": settings, "machine": describe_machine(device),
    }  # fmt: skip
    if main_rank:
        print(f"{args.size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(data)} pictures, "
              f"{config['machine']}, seed {args.seed}, steps {start_step} to {args.steps}")  # fmt: skip

    # the loop
    batches = ahead(
        lambda step: noisy_batch(data, args.seed, step, args.batch, shift, caption_dropout, rows),
        range(start_step, args.steps), device,
    )  # fmt: skip
    bar = tqdm(batches, initial=start_step, total=args.steps, desc="stage 1", mininterval=1, disable=not main_rank)
    bins, start = torch.zeros(2, BINS), time.time()  # sums of losses, and counts
    for step, (x_t, t, v, ids) in enumerate(bar, start_step):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, args.steps, args.lr)

        losses = []
        parts = torch.arange(len(t)).chunk(args.accumulate)  # one part, unless memory is short
        for part in parts:
            with parallel.averaging(forward, now=part is parts[-1]):
                with autocast(device):
                    predicted = predict(forward, model.cfg, data, x_t[part], t[part], ids[part], device)
                # (b,)   || v_theta(x_t, t, c) - v ||^2
                losses.append((predicted.float() - v[part].to(device)).square().mean((1, 2, 3)))
                (losses[-1].mean() / args.accumulate).backward()
        losses = torch.cat(losses)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(grad_norm):
            stop_on_nan(step, out, args.lr)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step)

        which = (t * BINS).long().clamp(max=BINS - 1)
        bins[0].index_add_(0, which, losses.detach().float().cpu())
        bins[1].index_add_(0, which, torch.ones_like(t))
        save = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if not (save or (step + 1) % 50 == 0):
            continue
        bins = parallel.total(bins)
        if main_rank:
            mean = (bins[0].sum() / bins[1].sum()).item()
            per_bin = {f"loss_t{i / BINS:.1f}": (bins[0, i] / bins[1, i]).item() for i in range(BINS)}
            val_loss = validate(ema, val, shift, device) if save else float("nan")
            if save and not math.isfinite(val_loss + mean):
                stop_on_nan(step, out, args.lr)
            log.add(step=step + 1, pictures=(step + 1) * args.batch, loss=mean, **per_bin, val_loss=val_loss,
                    grad_norm=grad_norm.item(), lr=group["lr"],
                    pictures_per_second=(step + 1 - start_step) * args.batch / (time.time() - start))  # fmt: skip
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        bins.zero_()
        if save and main_rank:  # the state last: whatever a kill leaves undone before it is done again by --resume
            draw_samples(out, step + 1, ema, encoders, prompts, data.shape, config["sampling"], args.seed)
            plot(log, out / "loss.png")
            save_network(out, ema, {**config, "step": step + 1, "pictures_seen": (step + 1) * args.batch})
            save_state(out, step + 1, settings, optimizers, model=model, ema=ema)
    parallel.wait()
    if main_rank:
        print(f"{out}: model.safetensors, config.json, log.csv, loss.png, samples/progress.png")


def stop_on_nan(step, out, lr):
    """End the run in one sentence; what was saved before stays as it is."""
    saved = (out / "model.safetensors").is_file()
    raise SystemExit(
        f"the loss or its gradient is no longer a number at step {step}: the learning rate {lr} is too high. "
        + (
            f"Go on from the last good weights with --init {out}, another --out and a lower --lr."
            if saved
            else "Lower --lr."
        )
    )


def plot(log, path):
    """loss.png: the loss of each timestep bin, and the validation loss of the EMA."""
    bins = {f"t in ({i / BINS:.1f}, {(i + 1) / BINS:.1f})": f"loss_t{i / BINS:.1f}" for i in range(BINS)}
    title = "Flow matching, || v_theta - v ||^2: the ends of the path are hard, in their own ways"
    curves(log, path, (title, bins | {"all t": "loss", "validation, EMA": "val_loss"}, "log"))


if __name__ == "__main__":
    parallel.launch(main)
