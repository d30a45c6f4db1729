"""Stage 2: multi-level knowledge distillation from a large transformer (Sec. 3.3, Fig. 5 and 6).

The student UNet goes on learning, now from the data and from a frozen MMDiT of another architecture, at three levels:

    L_task = || v_theta(x_t, t, c) - (eps - x_0) ||^2           stage 1's loss: the data's own velocity            [S]
    L_kd   = || v_T(x_t, t, c) - v_theta(x_t, t, c) ||^2        output ("out"): the teacher's velocity, noise-free [S]
    L_feat = || f_T - phi(f_theta) ||^2                         features: what both know half-way through          [S, A]

    L = S(L_task, L_kd) + S(L_task, L_feat)                                                                        [R]
    S(L_task, L_kd) = E_t[ a_t L_task^t + (1 - a_t) sg(|L_task^t| / |L_kd^t|) L_kd^t ]      timestep-aware scaling [R]

a_t is the density of the logit-normal: the middle of the path learns from the data, its hard ends from the teacher. At class scale
fixed weights, most of all for the teacher, do better and are the default (--weighting linear; course/4_distillation.md):

    L = L_task + 100 L_kd + 25 L_feat                                                                              [A]

    python distill.py                                   # class scale: from runs/fm (or the zoo's), teacher assets/toy-sd3
    python distill.py --losses task --out runs/task     # the same without a teacher, to compare with
    python distill.py --weighting scaled --out runs/scaled                  # S, as in the paper
    python distill.py --teacher-layer -1 --student-layer up.2.layers.2 --out runs/last      # features of the last layers, as in [S]
    python distill.py --size t2i --init runs/t2i --teacher stable-diffusion-3.5-large --data DIR --lr 1e-4   # the paper's

Comparisons, the ablation and Fig. 6 in small: studies/losses.py. Writes runs/distill, as stage 1 does; the projection head phi
stays in train_state/ and is no part of the student.

Sec. 3.3 was not available to us in the original: [S] and [R] as in the README. Our own assumptions [A]: a_t is 1 at its largest,
and the density of unshifted times; |L^t| is a running mean for each fifth of t; features are those of middle layers, which know
where things will be; the teacher's are normalised; the shape of phi; --weighting linear and its weights.
"""

import copy
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import arguments, parallel, training
from common.arguments import integer, real
from common.checkpoint import check_encoders, latest, load_state, load_student, save_network, save_state, state_settings
from common.device import (
    autocast,
    describe_machine,
    half,
    matmul_dtype,
    move,
    multiply_in_bfloat16,
    pick_device,
    student_dtype,
    take,
)
from common.encoders import FrozenEncoders
from common.figures import curves
from common.training import (
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
from model import PRESETS, UNet
from sample import draw_pictures
from teacher import Teacher

LR = 3e-3, 1e-4  # at class scale, at the paper's sizes [A]
WEIGHTING = "linear", "scaled"  # likewise
WARMUP, EVERY = 200, 50  # as in stage 1


def make_parser(doc=__doc__, example="python distill.py --init runs/fm --steps 1000 --out runs/mine"):
    p = arguments.Parser(doc, example)
    # the student, the teacher, data
    p.add_argument("--size", choices=PRESETS, default="tiny", help="the UNet: class scale, or one of the paper's two")
    p.add_argument("--init", metavar="DIR", help="the student of stage 1 to start from; default: runs/fm, or else the zoo's")
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder: encoders and transformer")
    arguments.add_data(p)
    # losses
    p.add_argument("--losses", choices=("task", "task+out", "task+out+feat"), default="task+out+feat", help="which levels")
    p.add_argument("--weighting", choices=("scaled", "linear"),
                   help="timestep-aware, or fixed weights; default: linear for --size tiny, scaled for the paper's")  # fmt: skip
    p.add_argument("--task-weight", type=real(0, 1), default=1.0, help="with --weighting scaled: a_t at most; 0: the teacher alone")
    p.add_argument("--out-weight", type=real(0), default=100.0, help="weight of L_kd with --weighting linear")
    p.add_argument("--feat-weight", type=real(0), default=25.0, help="weight of L_feat with --weighting linear")
    p.add_argument("--student-layer", default="up.1.layers.0", help="UNet layer whose output is f_theta; up.2.layers.2 is the last")
    p.add_argument("--teacher-layer", type=integer(), help="joint block whose tokens are f_T; default: the middle; -1: the last")
    p.add_argument("--teacher-guidance", type=real(0), default=1.0, help="guidance of the teacher's velocity; 1: none")
    # training and the run
    arguments.add_training(p, steps=2500, batch=64, lr=LR, seed="seed of phi, noise, timesteps and the data's order")
    arguments.add_run(p, out="runs/distill", save_every=500)
    return p


def parse_arguments(argv=None):
    args = arguments.by_size(make_parser().parse_args(argv), lr=LR, weighting=WEIGHTING)
    if args.weighting == "linear" and args.task_weight != 1:
        raise SystemExit("--task-weight is the most that a_t may be, and --weighting linear has no a_t: add --weighting scaled.")
    return args


# ------------------------------------------------------------------------------------------------------------------
# Timestep-aware scaling: half a page


def timestep_weight(t):
    """a_t in [0, 1]: the density of the logit-normal(0, 1) at t (B,), divided by its largest value, which is at t = 0.5."""
    t = t.clamp(1e-6, 1 - 1e-6)
    density = torch.exp(-0.5 * torch.logit(t) ** 2) / (t * (1 - t))  # times 1 / sqrt(2 pi), which the division removes
    return density / 4.0


class Ratio(nn.Module):
    """|L_task^t| / |L_kd^t| of S: a running mean over the steps for each fifth of t. A module, so that it is saved with the run.

    A ratio for each picture by itself would make ratio * L_kd's gradient that of L_task * log L_kd: the better a picture agrees
    with the teacher, the harder it would pull, and pictures that agree already would rule the clipped batch.
    """

    def __init__(self, bins=5):
        super().__init__()
        self.bins = bins
        self.register_buffer("means", torch.zeros(2, bins))  # of L_task and of L_kd, in each fifth of t; 0: none yet
        self.register_buffer("sums", torch.zeros(3, bins), persistent=False)  # of this step: L_task, L_kd, pictures

    def bin(self, t):
        return (t * self.bins).long().clamp(max=self.bins - 1)

    def forward(self, t):
        """The ratio at t (B,): numbers, not functions of the weights; otherwise ratio * L_kd would be L_task once more. It is that
        of the steps before, whatever the parts and ranks of this one; 1 where there were none."""
        task, kd = self.means
        return torch.where(kd > 0, task / kd.clamp(min=1e-12), 1.0)[self.bin(t)]

    def add(self, task, kd, t, weights=None):
        """Losses (B,) of this step; with weights (B,) bool, of some of its pictures."""
        weights = torch.ones_like(t) if weights is None else weights.to(t.dtype)
        values = torch.stack([torch.where(weights > 0, loss.detach(), 0.0) for loss in (task, kd)] + [weights])  # (3, B)
        self.sums.index_add_(1, self.bin(t), values)

    def step(self):
        """Update the means with this step's losses over all ranks, where there were any and they did not overflow."""
        task, kd, n = parallel.total(self.sums)
        new = torch.stack([task, kd]) / n.clamp(min=1)
        good = (n > 0) & new.isfinite().all(0)
        rate = torch.where(self.means > 0, 0.05, 1.0)
        self.means.copy_(torch.where(good, self.means.lerp(new, rate), self.means))
        self.sums.zero_()


def scaled(task, kd, t, ratio, most=1.0):
    """S(L_task, L_kd) for every picture: task, kd, t (B,) -> (B,). `ratio` is Ratio's at t; a_t is at most `most`.

    The ratio brings the teacher's loss to the size of the task's, whatever units it comes in.
    """
    a = timestep_weight(t).clamp(max=most)
    return a * task + (1 - a) * ratio * kd


def combine(losses, t, ratios, weighting, weights, most=1.0):
    """The training loss of each picture, (B,), from {"task": (B,), "out": (B,), "feat": (B,)}; the teacher's may be missing.
    weights: {"out": ..., "feat": ...}, for weighting "linear"; most: of a_t, for "scaled"."""
    task, levels = losses["task"], [name for name in ("out", "feat") if name in losses]
    if not levels:
        return task
    if weighting == "scaled":  # L = S(L_task, L_kd) + S(L_task, L_feat)
        return sum(scaled(task, losses[name], t, ratios[name](t), most) for name in levels)
    return task + sum(weights[name] * losses[name] for name in levels)


class Projector(nn.Module):
    """The projection head phi: the student's feature (B, c, h, w) -> the teacher's channels and grid (B, d, h', w').

    A finer grid is gathered by a strided convolution (each teacher token is a patch of p x p latent cells), a coarser one
    is spread out by a transposed one; one hidden layer, so that the student need not copy the teacher's coordinates.
    """

    def __init__(self, c, side, d, teacher_side):
        super().__init__()
        finer, coarser = max(1, side // teacher_side), max(1, teacher_side // side)
        self.to_grid = nn.Conv2d(c, d, finer, finer) if coarser == 1 else nn.ConvTranspose2d(c, d, coarser, coarser)
        self.out = nn.Conv2d(d, d, 1)

    def forward(self, feature):
        with autocast(feature.device):
            return self.out(F.silu(self.to_grid(feature))).float()


def normalized(feature):
    """Each token of a teacher's feature (B, D, h, w) with mean 0 and deviation 1 over its channels: deep blocks' are large [A]."""
    return F.layer_norm(feature.movedim(1, -1), feature.shape[1:2]).movedim(-1, 1)


def make_projector(student, layer, teacher, side):
    """phi from a layer of the student to the teacher's, for latents of this side. Raises SystemExit if there is no such layer."""
    layers = student.features()
    if layer not in layers:
        raise SystemExit(f"the student has no layer {layer!r}; it has {', '.join(layers)}.")
    channels, coarser = layers[layer]
    return Projector(channels, side // coarser, teacher.feature_dim, side // teacher.patch)


# ------------------------------------------------------------------------------------------------------------------
# Training


def train(args):
    """One run, from flags to saved weights. The order is stage 1's."""
    # ---- the folder, the device, the ranks
    out, device, rank = Path(args.out), pick_device(args.device), parallel.rank()
    if (out / "train_state").is_dir() and not args.resume:
        raise SystemExit(f"{out} holds a run already: go on with --resume, choose another --out, or delete it.")
    rows = parallel.rows(args.batch, args.accumulate)  # this rank's, of each batch
    size = (rows.stop - rows.start) // args.accumulate  # pictures that are on the device together
    torch.manual_seed(args.seed)

    # ---- the student of stage 1, and its average
    args.init = args.init or (state_settings(out).get("init") if args.resume else None) or latest("fm")
    student = UNet(PRESETS[args.size])
    start_from, trained = load_student(args.init)
    if start_from.cfg != student.cfg:
        raise SystemExit(f"{args.init} is not of --size {args.size}: give the size it was trained with. (A student of another "
                         "--ladder step than f goes no further than stage 1.)")  # fmt: skip
    student.load_state_dict(start_from.state_dict())
    student.to(device, memory_format=torch.channels_last)
    multiply_in_bfloat16(student, device)
    student.checkpointing = args.checkpointing
    ema = copy.deepcopy(student).requires_grad_(False).eval()

    # ---- frozen encoders, data
    gemma = trained.get("gemma")
    encoders = FrozenEncoders(args.teacher, device, torch.float32 if args.size == "tiny" else half(device), gemma)
    check_encoders(trained, encoders)
    data, val = open_data(args.data, encoders, args.resolution, args.pictures, student.cfg.text_dim)
    prompts, shift = sample_prompts(args.data, data), training.timestep_shift(args.size, args.resolution)

    # ---- the teacher, and the projection head phi from the student's features to its own
    teacher = projector = feature = None
    if "out" in args.losses:
        layer = "middle" if args.teacher_layer is None else args.teacher_layer
        teacher = Teacher(args.teacher, data, device, matmul_dtype(device), layers=(layer,))
    if "feat" in args.losses:
        feature = args.student_layer
        projector = make_projector(student, feature, teacher, data.shape[-1]).to(device)
    ratios = nn.ModuleDict({name: Ratio().to(device) for name in args.losses.split("+")[1:]})
    weights = {"out": args.out_weight, "feat": args.feat_weight}

    # ---- the optimizers; what --resume restores, bit for bit
    optimizers = make_optimizers(student, args.lr, args.optimizer)
    phi_optimizers = make_optimizers(projector, args.lr, args.optimizer) if projector else []
    networks = {"model": student, "ema": ema, "ratios": ratios} | ({"projector": projector} if projector else {})
    hashes = {"contents": data.name, "teacher": encoders.fingerprint(*encoders.parts, *(["transformer"] if teacher else []))}
    hashes |= {"gemma": encoders.gemma.fingerprint()} if encoders.gemma else {}
    settings = arguments.settings_of(args) | hashes
    start = load_state(out, settings, [*optimizers, *phi_optimizers], **networks) if args.resume else 0
    groups = [group for optimizer in [*optimizers, *phi_optimizers] for group in optimizer.param_groups]
    machine = describe_machine(device) | {"products": str(student_dtype(device)).removeprefix("torch.")}
    config = {
        "stage": "distill", "size": args.size, "machine": machine, "encoders": args.teacher, "gemma": gemma,
        "scaling_factor": encoders.scaling_factor, "shift_factor": encoders.shift_factor,
        "latent_size": list(data.shape[1:]), "sampling": training.sampling_settings(args.size, args.resolution),
        "settings": arguments.all_of(args) | hashes,
    }  # fmt: skip
    training.say_start(out, config, start, args.steps, student)

    # ---- several GPUs: the backward pass averages the gradients of all ranks
    forward, several = torch.compile(student) if args.compile else student, parallel.world() > 1
    if args.compile and teacher:
        teacher.compile()
    if several:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True)  # fmt: skip

    # ---- the loop
    def make(step):
        return noisy_batch(data, args.seed, step, args.batch, shift, rows=rows)

    log, means, bad_steps, last_row, clock = Log(out / "log.csv", start), Means(device), 0, start, time.perf_counter()
    bar = tqdm(total=args.steps, initial=start, desc="distill", mininterval=1, disable=None if rank == 0 else True)
    for step, batch in zip(range(start, args.steps), ahead(make, range(start, args.steps), device), strict=True):
        for group in groups:
            group["lr"] = args.lr * learning_rate(step, args.steps, WARMUP)

        for k in range(args.accumulate):
            part = move(take(batch, slice(k * size, (k + 1) * size)), device)
            last = k == args.accumulate - 1
            with forward.no_sync() if several and not last else nullcontext():  # only the last part averages over ranks
                predicted = predict(forward, part, feature)
                predicted, f_theta = predicted if feature else (predicted, None)
                losses = {"task": (predicted - part.v).square().mean((1, 2, 3))}  # (B,)   || v_theta - v ||^2
                if teacher:
                    v_teacher, (f_teacher,) = teacher(part.x_t, part.t, part.ids, args.teacher_guidance)
                    losses["out"] = (predicted - v_teacher).square().mean((1, 2, 3))  # || v_T - v_theta ||^2
                    means.add(cosine=F.cosine_similarity(predicted.flatten(1), v_teacher.flatten(1)))
                if projector:  # || f_T - phi(f_theta) ||^2
                    losses["feat"] = (projector(f_theta) - normalized(f_teacher)).square().mean((1, 2, 3))
                for name, ratio in ratios.items():
                    ratio.add(losses["task"], losses[name], part.t)
                loss = combine(losses, part.t, ratios, args.weighting, weights, args.task_weight)  # (B,)
                (loss.mean() / args.accumulate).backward()
            means.add(loss=loss, **{f"ratio_{name}": ratio(part.t) for name, ratio in ratios.items()})
            means.add(t=part.t, **{f"loss_{name}": value for name, value in losses.items()})

        norm, bad = clip_gradients(student.parameters(), 1.0)
        means.add(grad_norm=norm, skipped=bad)
        if projector:  # by itself: the student's step is not shorter because phi's gradient is long
            parallel.average_gradients(projector)
            norm, bad = clip_gradients(projector.parameters(), 1.0)
            means.add(grad_norm_phi=norm, skipped_phi=bad)
        for optimizer in [*optimizers, *phi_optimizers]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for ratio in ratios.values():
            ratio.step()
        update_ema(ema, student, step, args.ema)
        bar.update()

        # ---- a row of log.csv; now and then validate, draw, save
        due = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if not due and (step + 1) % EVERY:
            continue
        row, by_t = means.take()
        seconds = (time.perf_counter() - clock) / (step + 1 - last_row)  # a step
        bad_steps = bad_steps + step + 1 - last_row if max(row["skipped"], row.get("skipped_phi", 0)) > 0.5 else 0
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
            save_state(out, step + 1, settings, [*optimizers, *phi_optimizers], **networks)
        if due:
            parallel.wait(patient=False)
        clock = time.perf_counter()
    bar.close()
    training.say_end(out)


def plot(table, out):
    """loss.png: the three losses, the agreement with the teacher, the validation loss."""
    curves(table, out / "loss.png",
           ("the three levels, unscaled", {name: f"loss_{name}" for name in ("task", "out", "feat")}, "log"),
           ("agreement with the teacher", {"cosine to the teacher's velocity": "cosine"}, "linear"),
           ("validation", {"L_task, EMA": "val_loss"}, "linear"))  # fmt: skip


def main(argv=None):
    train(parse_arguments(argv))


if __name__ == "__main__":
    parallel.launch(main)
