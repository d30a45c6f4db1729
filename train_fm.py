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

import math
import re
from typing import NamedTuple

import torch

import flow
from common import arguments, parallel
from common.device import autocast, move, take
from common.figures import curves
from common.muon import Muon
from common.run import BINS, Run, update_ema
from common.seeds import noise_rows, rng
from data import open_data, sample_prompts
from model import LADDER
from sample import draw_pictures

CAPTION_DROPOUT = 0.1  # [A]
LR = 5e-3, 1e-4  # at class scale, at the paper's sizes [A]


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


def train(args):
    run = Run(args, "fm")
    model, ema, encoders = run.student(args.init)
    data, val = open_data(args, encoders)
    prompts, shift = sample_prompts(args, data), timestep_shift(args)
    run.config |= {"latent_size": list(data.shape[1:]), "sampling": sampling_settings(args)}
    optimizers = make_optimizers(model, args.lr, args.optimizer)
    run.keep(optimizers, {"pictures": data.name, "teacher": encoders.fingerprint()}, model=model, ema=ema)
    forward = run.wrap(model)

    for step, batch in run.steps(lambda step: noisy_batch(data, args.seed, step, args.batch, shift, rows=run.rows)):
        for part in run.parts(batch):
            predicted = predict(forward, part)
            loss = (predicted - part.v).square().mean((1, 2, 3))  # (B,)   || v_theta(x_t, t, c) - v ||^2
            run.backward(loss.mean())
            run.log(t=part.t, loss=loss)
        run.step(optimizers, model)
        update_ema(ema, model, step, args.ema)
        if run.due():
            run.save(ema, plot=plot, measure=lambda: {"val_loss": validate(ema, val, shift, run.device)},
                     samples=lambda: draw_pictures(ema, run.config, encoders, prompts, range(len(prompts))))  # fmt: skip


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


def make_parser():
    p = arguments.Parser(__doc__, "python train_fm.py --steps 600 --pictures 10000 --out runs/mine")
    arguments.add_model(p, init="start from this student's weights instead of random ones",
                        teacher="SD3 folder whose autoencoder and text encoders are used")  # fmt: skip
    p.add_argument("--ladder", choices=LADDER, help="train an earlier step of the ladder of Fig. 2, at the widths of --size")
    p.add_argument("--gemma", metavar="DIR", help="folder of google/gemma-2-2b: a third text encoder, as in the paper's --size t2i")
    arguments.add_data(p)
    arguments.add_training(p, steps=2500, batch=64, lr=LR)
    arguments.add_run(p, out="runs/fm", save_every=500)
    return p


def parse_arguments(argv=None):
    return arguments.by_size(make_parser().parse_args(argv), lr=LR)


def main(argv=None):
    train(parse_arguments(argv))


if __name__ == "__main__":
    parallel.launch(main)
