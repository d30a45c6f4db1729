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
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import arguments, parallel, training
from common.arguments import integer, real
from common.checkpoint import check_encoders, load_state, load_student, save_network, save_state
from common.device import describe_machine, half, move, multiply_in_bfloat16, pick_device, student_dtype, take
from common.encoders import FrozenEncoders
from common.figures import curves
from common.training import (
    BINS,
    Log,
    Means,
    ahead,
    clip_gradients,
    learning_rate,
    make_optimizers,
    noisy_batch,
    predict,
    update_ema,
    validate,
)
from data import open_data, sample_prompts
from model import LADDER, PRESETS, UNet, ladder, zero_branches
from sample import draw_pictures

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
    data, val = open_data(args.data, encoders, args.resolution, args.pictures, cfg.text_dim)
    prompts, shift = sample_prompts(args.data, data), training.timestep_shift(args.size, args.resolution)

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
        "latent_size": list(data.shape[1:]), "sampling": training.sampling_settings(args.size, args.resolution),
        "settings": arguments.all_of(args) | hashes,
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


def plot(table, out):
    """loss.png: the loss of each timestep bin, and the validation loss of the EMA."""
    bins = {f"t in ({i / BINS:.1f}, {(i + 1) / BINS:.1f})": f"loss_t{i / BINS:.1f}" for i in range(BINS)}
    title = "Flow matching, || v_theta - v ||^2: the ends of the path are hard, in their own ways"
    curves(table, out / "loss.png", (title, bins | {"all t": "loss", "validation, EMA": "val_loss"}, "log"))


def main(argv=None):
    train(parse_arguments(argv))


if __name__ == "__main__":
    parallel.launch(main)
