"""Stage 1: train the efficient UNet from scratch by flow matching (first part of Sec. 3.3).

The network sees a noisy latent x_t = (1 - t) x_0 + t eps, the time t and a caption, and learns the velocity eps - x_0:

    L_task = || v_theta(x_t, t, c) - (eps - x_0) ||^2                                                              [S]

    python train_fm.py                                  # class scale: shapes world, tiny UNet, 9 to 17 minutes on 2 cores
    python train_fm.py --data DIR --out runs/mine       # your own pictures with captions
    python train_fm.py --size t2i --teacher stable-diffusion-3.5-large --data DIR --lr 1e-4     # the paper's 379 M UNet
    torchrun --nproc_per_node 8 train_fm.py --size t2i --batch 1024 ...     # on 8 GPUs; recipes/ has whole commands

Class scale: captioned pictures of flat shapes, 64 pixels wide (common/shapes.py), and assets/toy-sd3, a Stable Diffusion 3 of 7 M
parameters, for encoders and teacher. The zoo, assets/zoo, holds what the stages have trained on it.

Timesteps come from a logit-normal, shifted towards noise; one caption in ten is dropped, for classifier-free guidance.
Writes runs/fm: model.safetensors (EMA weights) and config.json for sample.py and evaluate.py, train_state/ for --resume,
log.csv, loss.png, samples/. Every random number comes from (--seed, step): stop it at any moment, run the same command
with --resume, and the weights end bit for bit as if it had never stopped (CPU, same number of threads).

Differences from the paper ([A] our assumption, [S] their later papers, see README): Muon for the transformers' matrices at class
scale, AdamW otherwise, with warm-up and linear decay; shift 3 at class scale and at 1024 px, 1 at 256 px; text dropped 10 % of the
time. The paper's data, batch sizes and learning rate here are not public.
"""

import copy
import math
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import flow
from common import arguments, parallel, training
from common.arguments import integer, real
from common.checkpoint import check_encoders, load_state, load_student, save_network, save_state
from common.device import autocast, describe_machine, half, move, multiply_in_bfloat16, pick_device, student_dtype, take
from common.encoders import FrozenEncoders
from common.figures import curves
from common.muon import Muon
from common.seeds import noise_rows, rng
from common.training import BINS, Log, Means, ahead, clip_gradients, learning_rate, update_ema
from data import open_data, sample_prompts
from model import LADDER, PRESETS, UNet, ladder, zero_branches
from sample import draw_pictures

CAPTION_DROPOUT = 0.1  # [A]
LR = 5e-3, 1e-4  # at class scale, at the paper's sizes [A]
WARMUP, EVERY = 200, 50  # steps until the learning rate is at its peak [A]; steps between two rows of log.csv


def make_parser():
    p = arguments.Parser(__doc__, "python train_fm.py --steps 600 --pictures 10000 --out runs/mine")
    add = p.add_argument
    # the network and what it starts from
    add("--size", choices=PRESETS, default="tiny", help="the UNet: class scale, or one of the paper's two")
    add("--ladder", choices=LADDER, help="train an earlier step of the ladder of Fig. 2, at the widths of --size")
    add("--init", metavar="DIR", help="start from this student's weights instead of random ones")
    # data and the frozen encoders
    add("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder whose autoencoder and text encoders are used")
    add("--gemma", metavar="DIR", help="folder of google/gemma-2-2b: a third text encoder, as in the paper's --size t2i")
    arguments.add_data(p)
    # training
    add("--steps", type=integer(1), default=2500, help="training steps")
    add("--batch", type=integer(1), default=64, help="pictures a step, of all GPUs together")
    add("--accumulate", type=integer(1), default=1, help="parts in which each GPU takes its share, to save memory")
    add("--checkpointing", action="store_true", help="compute activations twice, to save memory")
    add("--lr", type=real(0), help="learning rate after the warm-up; default: {:g}; the paper's sizes: {:g}".format(*LR))
    add("--optimizer", choices=("adamw", "muon"), help="default: muon for --size tiny, adamw for the paper's")
    add("--ema", type=real(0, 1), default=0.999, help="decay of the averaged weights; 0.9999 for a million steps")
    add("--seed", type=integer(0), default=0, help="seed of weights, noise, timesteps and the data's order")
    # the run
    arguments.add_run(p, out="runs/fm", save_every=500)
    return p


def parse_arguments(argv=None):
    return arguments.by_size(make_parser().parse_args(argv), lr=LR)


def train(args):
    """One run, from flags to saved weights."""
    # ---- the folder, the device, the ranks
    out, device, rank = Path(args.out), pick_device(args.device), parallel.rank()
    if (out / "train_state").is_dir() and not args.resume:
        raise SystemExit(f"{out} holds a run already: go on with --resume, choose another --out, or delete it.")
    rows = parallel.rows(args.batch, args.accumulate)  # this rank's, of each batch
    size = (rows.stop - rows.start) // args.accumulate  # pictures that are on the device together
    torch.manual_seed(args.seed)

    # ---- the network, and its average
    cfg, trained = PRESETS[args.size], {}
    if args.ladder:
        cfg = ladder(args.ladder, cfg)
    model = zero_branches(UNet(cfg))
    if args.init:
        start_from, trained = load_student(args.init)
        if start_from.cfg != cfg:
            raise SystemExit(f"{args.init} is not of --size {args.size}: give the size it was trained with. (A student of "
                             "another --ladder step than f goes no further than stage 1.)")  # fmt: skip
        model.load_state_dict(start_from.state_dict())
    model.to(device, memory_format=torch.channels_last)  # depthwise convolutions like it
    multiply_in_bfloat16(model, device)
    model.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).requires_grad_(False).eval()

    # ---- frozen encoders, data
    gemma = args.gemma or trained.get("gemma")
    encoders = FrozenEncoders(args.teacher, device, torch.float32 if args.size == "tiny" else half(device), gemma)
    if trained:
        check_encoders(trained, encoders)
    if encoders.latent_channels != cfg.latent_channels:
        raise SystemExit(f"the autoencoder of {args.teacher} has {encoders.latent_channels} latent channels, the UNet "
                         f"{cfg.latent_channels}: give --teacher an SD3 folder.")  # fmt: skip
    data, val = open_data(args, encoders)
    prompts, shift = sample_prompts(args, data), timestep_shift(args)

    # ---- the optimizers; what --resume restores, bit for bit
    optimizers = make_optimizers(model, args.lr, args.optimizer)
    networks = {"model": model, "ema": ema}
    hashes = {"contents": data.name, "teacher": encoders.fingerprint()}
    settings = arguments.settings_of(args) | hashes
    start = load_state(out, settings, optimizers, **networks) if args.resume else 0
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # loading makes new ones
    machine = describe_machine(device) | {"products": str(student_dtype(device)).removeprefix("torch.")}
    config = {
        "stage": "fm", "size": args.size, "machine": machine, "encoders": args.teacher, "gemma": gemma,
        "scaling_factor": encoders.scaling_factor, "shift_factor": encoders.shift_factor,
        "latent_size": list(data.shape[1:]), "sampling": sampling_settings(args), "settings": arguments.all_of(args) | hashes,
    }  # fmt: skip
    training.say_start(out, config, start, args.steps, model)

    # ---- several GPUs: the backward pass averages the gradients of all ranks
    forward, several = torch.compile(model) if args.compile else model, parallel.world() > 1
    if several:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True)  # fmt: skip

    # ---- the loop
    def make(step):
        return noisy_batch(data, args.seed, step, args.batch, shift, rows=rows)

    log, means, bad_steps, last_row, clock = Log(out / "log.csv", start), Means(device), 0, start, time.perf_counter()
    bar = tqdm(total=args.steps, initial=start, desc="fm", mininterval=1, disable=None if rank == 0 else True)
    for step, batch in zip(range(start, args.steps), ahead(make, range(start, args.steps), device), strict=True):
        for group in groups:
            group["lr"] = args.lr * learning_rate(step, args.steps, WARMUP)

        for k in range(args.accumulate):
            part = move(take(batch, slice(k * size, (k + 1) * size)), device)
            last = k == args.accumulate - 1
            with forward.no_sync() if several and not last else nullcontext():  # only the last part averages over ranks
                predicted = predict(forward, part)
                loss = (predicted - part.v).square().mean((1, 2, 3))  # (B,)   || v_theta(x_t, t, c) - v ||^2
                (loss.mean() / args.accumulate).backward()
            means.add(t=part.t, loss=loss)

        norm, bad = clip_gradients(model.parameters(), 1.0)
        means.add(grad_norm=norm, skipped=bad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step, args.ema)
        bar.update()

        # ---- a row of log.csv; now and then validate, draw, save
        due = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if not due and (step + 1) % EVERY:
            continue
        row, by_t = means.take()
        seconds = (time.perf_counter() - clock) / (step + 1 - last_row)  # a step
        bad_steps = bad_steps + step + 1 - last_row if row["skipped"] > 0.5 else 0
        last_row = step + 1
        if bad_steps > 1:  # a row may cover a single step
            training.stop_on_nan(out, step, f"--lr {args.lr}")
        if rank == 0:
            if due:
                row["val_loss"] = validate(ema, val, shift, device)
                if not math.isfinite(row["val_loss"]):
                    training.stop_on_nan(out, step, f"--lr {args.lr}")
            rate = args.batch / seconds
            log.add(step=step + 1, pictures=(step + 1) * args.batch, **row, **by_t, lr=groups[0]["lr"], pictures_per_second=rate)
            training.say_row(bar, step + 1, args.steps, row, groups[0]["lr"], rate, seconds)
        if rank == 0 and due:  # the state comes last: what a kill leaves undone before it is done again by --resume
            training.save_samples(out, step + 1, draw_pictures(ema, config, encoders, prompts, range(len(prompts))))
            plot(log, out)
            save_network(out, ema, config | {"step": step + 1, "pictures_seen": (step + 1) * args.batch})
            save_state(out, step + 1, settings, optimizers, **networks)
        if due:
            parallel.wait(patient=False)
        clock = time.perf_counter()
    bar.close()
    training.say_end(out)


# ------------------------------------------------------------------------------------------------------------
# The pieces


class Batch(NamedTuple):
    """What one step of stages 1 and 2 sees; B pictures."""

    x_t: torch.Tensor  # (B, 16, h, w) noisy latents
    t: torch.Tensor  # (B,) in (0, 1)
    v: torch.Tensor  # (B, 16, h, w) the target eps - x_0
    ids: torch.Tensor  # (B,) which captions, 0 the empty one; (B, 3) with three text encoders: see Latents.text
    states: torch.Tensor  # (B, T, text_dim) float16, the captions' tokens
    mask: torch.Tensor  # (B, T) True for real tokens


def noisy_batch(data, seed, step, batch, shift, caption_dropout=CAPTION_DROPOUT, rows=slice(None)):
    """The Batch of a training step, from (seed, step) alone; with `rows`, those of one GPU: N GPUs see what one would have seen."""
    g = rng(seed, step)
    dropped = torch.rand(batch, generator=g) < caption_dropout
    t = flow.logit_normal_timesteps(batch, shift, generator=g)[rows]
    eps = noise_rows(data.shape, batch, seed, step, 0, rows=rows)
    x_0, ids = data.batch(seed, step, batch, rows)
    ids = torch.where(dropped[rows], 0, ids)  # caption 0 is the empty one
    if data.several_encoders:  # each encoder is also dropped independently [S]; ids becomes (B, 3)
        ids = ids[:, None] * (torch.rand((batch, 3), generator=g) >= caption_dropout)[rows]
    return Batch(flow.interpolate(x_0, eps, t), t, flow.velocity(x_0, eps), ids, *data.text(ids))


def predict(net, batch, feature=None):
    """v_theta(x_t, t, c), (B, 16, h, w) float32; with the name of a layer as `feature`, (v, that layer's output)."""
    with autocast(batch.x_t.device):
        out = net(batch.x_t, batch.t, batch.states.float(), batch.mask, feature)
    return tuple(x.float() for x in out) if feature else out.float()


def timestep_shift(args):
    """s of the resolution shift [A]: 3 at class scale, where the layout is decided near t = 1; by the side in pixels otherwise."""
    return 3.0 if args.size == "tiny" else flow.resolution_shift(args.resolution)


def sampling_settings(args):
    """How config.json says that the student is to be drawn. At class scale 2 was best of 2, 3 and 5, early on [A]."""
    return {"steps": 28, "guidance": 2.0 if args.size == "tiny" else 3.0, "shift": timestep_shift(args)}


def make_optimizers(model, lr, kind):
    """AdamW for all weights; or, with kind "muon", Muon for the matrices of the transformer blocks and AdamW for the rest.

    Muon makes the step of a matrix orthogonal, so that no direction starves; AdamW scales each number by itself. At class
    scale it learns faster [A].
    """
    named = model.named_parameters()
    in_block = re.compile(r"(^|\.|transformer_)blocks\.")  # diffusers' name, too
    matrices = [w for name, w in named if w.dim() == 2 and in_block.search(name)] if kind == "muon" else []
    chosen = {id(w) for w in matrices}
    others = [w for w in model.parameters() if id(w) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, weight_decay=0.01))
    return optimizers


@torch.no_grad()
def validate(model, val, shift, device):
    """L_task of a UNet on fixed pictures, noise and times."""
    losses, size = [], min(64, len(val))
    at_once = max(1, 64 * 32**2 // math.prod(val.shape[1:]))  # pictures: of large latents only some fit
    for i in range(min(4, math.ceil(len(val) / 64))):
        batch = noisy_batch(val, 1, i, size, shift, caption_dropout=0.0)
        for rows in torch.arange(size).split(at_once):
            part = move(take(batch, rows), device)
            losses.append((predict(model, part) - part.v).square().mean((1, 2, 3)))
    return torch.cat(losses).mean().item()


def plot(table, out):
    """loss.png: the loss of each timestep bin, and the validation loss of the EMA."""
    bins = {f"t in ({i / BINS:.1f}, {(i + 1) / BINS:.1f})": f"loss_t{i / BINS:.1f}" for i in range(BINS)}
    title = "Flow matching, || v_theta - v ||^2: the ends of the path are hard, in their own ways"
    curves(table, out / "loss.png", (title, bins | {"all t": "loss", "validation, EMA": "val_loss"}, "log"))


def main(argv=None):
    train(parse_arguments(argv))


if __name__ == "__main__":
    parallel.launch(main)
