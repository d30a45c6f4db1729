"""Stage 2: multi-level knowledge distillation from a large transformer (Sec. 3.3, Fig. 5 and 6).

The student UNet goes on learning, now from the data and from a frozen MMDiT of another architecture, at three levels:

    L_task = || v_theta(x_t, t, c) - (eps - x_0) ||^2           stage 1's loss: the data's own velocity            [S]
    L_kd   = || v_T(x_t, t, c) - v_theta(x_t, t, c) ||^2        output: the teacher's velocity, free of the noise  [S]
    L_feat = || f_T - phi(f_theta) ||^2                         features: of the last transformer layers           [S]

    L = S(L_task, L_kd) + S(L_task, L_feat)                                                                        [R]
    S(L_task, L_kd) = E_t[ a_t L_task^t + (1 - a_t) sg(|L_task^t| / |L_kd^t|) L_kd^t ]      timestep-aware scaling [R]

a_t is the density of the logit-normal: the middle of the path learns from the data, its hard ends from the teacher.

    python distill.py                                        # class scale: from assets/zoo/fm, teacher assets/toy-sd3
    python distill.py --losses task                          # the same without a teacher, to compare with
    python distill.py --ablate --steps 1000 --seeds 2        # five rows: which losses, scaled or not
    python distill.py --plot-scaling                         # Fig. 6 in small, of assets/zoo/distill
    python distill.py --compare runs/task runs/distill       # teacher | without teacher | with teacher, same noise
    python distill.py --size t2i --init runs/t2i --teacher stable-diffusion-3.5-large --data DIR --lr 1e-4   # the paper's

Writes runs/distill, as stage 1 does; the projector phi stays in train_state/ and is no part of the student.

Sec. 3.3 was not at hand in the original: [S] and [R] as in the README. Our own assumptions [A]: a_t is 1 at its largest;
L^t is the loss of each picture at its own t; the features compared, the shape of phi, the fixed weights of --weighting linear.
"""

import argparse
import collections
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import flow
from common import parallel
from common.checkpoint import (
    HelpFormatter,
    Log,
    check_encoders,
    describe_machine,
    load_state,
    load_student,
    load_weights,
    pick_device,
    save_network,
    save_state,
)
from common.encoders import FrozenEncoders
from common.figures import curves
from data import ahead
from model import PRESETS, UNet
from teacher import Teacher
from train_fm import (
    BINS,
    PROMPTS,
    autocast,
    draw_samples,
    learning_rate,
    make_optimizers,
    noisy_batch,
    open_data,
    predict,
    stop_on_nan,
    update_ema,
    validate,
)  # fmt: skip

LEVELS = ("task", "out", "feat")
ROWS = {  # of --ablate
    "no teacher": {"losses": "task", "weighting": "scaled"},
    "output, fixed weight": {"losses": "task+out", "weighting": "linear"},
    "output, timestep-aware": {"losses": "task+out", "weighting": "scaled"},
    "output + features, fixed": {"losses": "task+out+feat", "weighting": "linear"},
    "output + features, timestep-aware": {"losses": "task+out+feat", "weighting": "scaled"},
}


# ------------------------------------------------------------------------------------------------------------------
# Timestep-aware scaling: half a page


def timestep_weight(t):
    """a_t in [0, 1]: the density of the logit-normal(0, 1) at t (B,), divided by its largest value, which is at t = 0.5."""
    t = t.clamp(1e-6, 1 - 1e-6)
    density = torch.exp(-0.5 * torch.logit(t) ** 2) / (t * (1 - t))  # times 1 / sqrt(2 pi), which the division removes
    return density / 4.0


def scaled(task, other, t):
    """S(L_task, L_kd) for every picture: task, other, t (B,) -> (B,).

    The ratio brings the teacher's loss to the size of the task's, whatever units it comes in. sg: it is a number, not a
    function of the weights; otherwise ratio * other would be the task's loss once more, and nothing would be distilled.
    """
    a = timestep_weight(t)
    ratio = (task / other.clamp(min=1e-12)).detach()
    return a * task + (1 - a) * ratio * other


def combine(losses, t, weighting, fixed):
    """The training loss from {"task": (B,), "out": (B,), "feat": (B,)}; the teacher's two may be missing."""
    task, teachers = losses["task"], [name for name in ("out", "feat") if name in losses]
    if not teachers:
        return task.mean()
    if weighting == "scaled":  # L = S(L_task, L_kd) + S(L_task, L_feat)
        return sum(scaled(task, losses[name], t) for name in teachers).mean()
    return (task + sum(fixed[name] * losses[name] for name in teachers)).mean()


class Projector(nn.Module):
    """phi: the student's feature (B, c, h, w) -> the teacher's channels and grid (B, d, h', w').

    A finer grid is gathered by a strided convolution (each teacher token is a patch of p x p latent cells), a coarser one
    is spread out; one hidden layer, so that the student need not copy the teacher's coordinates.
    """

    def __init__(self, c, side, d, teacher_side):
        super().__init__()
        self.teacher_side, stride = teacher_side, max(1, side // teacher_side)
        self.gather = nn.Conv2d(c, d, stride, stride)
        self.out = nn.Conv2d(d, d, 1)

    def forward(self, feature):
        h = self.gather(feature)
        if h.shape[2] != self.teacher_side:
            h = F.interpolate(h, self.teacher_side, mode="nearest")
        return self.out(F.silu(h))


# ------------------------------------------------------------------------------------------------------------------
# Training


def start_from(args, device):
    """(student to train, its EMA, its config, its encoders) from the folder --init of an earlier stage."""
    student, config = load_student(args.init)
    half = torch.bfloat16 if device.type == "cuda" and args.size != "tiny" else torch.float32
    encoders = FrozenEncoders(args.teacher, device, half, gemma=config.get("gemma"))
    check_encoders(config, encoders)
    if student.cfg != PRESETS[args.size]:
        raise SystemExit(f"{args.init} is not of --size {args.size}: give the size it was trained with.")
    model = UNet(student.cfg).to(device, memory_format=torch.channels_last)
    load_weights(model, student.state_dict(), args.init)
    model.checkpointing = args.checkpointing
    return model, copy.deepcopy(model).requires_grad_(False).eval(), config, encoders


def train(args, out):
    """Distil one student into the folder `out`."""
    device = pick_device(args.device)
    if (out / "train_state").is_dir() and not args.resume:
        raise SystemExit(f"{out} holds a run already: go on with --resume, choose another --out, or delete it.")
    torch.manual_seed(args.seed)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    with_teacher, with_features = "out" in args.losses, "feat" in args.losses

    # data and student, as in stage 1
    main_rank, rows = parallel.rank() == 0, parallel.rows(args.batch, args.accumulate)
    model, ema, student_config, encoders = start_from(args, device)
    data, val, pictures_name = open_data(args, encoders)
    prompts = PROMPTS if not args.data else [data.caption_of(i * len(data) // 8) for i in range(8)]
    shift = student_config["sampling"]["shift"] if args.size == "tiny" else flow.resolution_shift(args.resolution)
    caption_dropout, sampling = 0.1, {**student_config["sampling"], "shift": shift}

    # the teacher, and phi between its feature and the student's
    teacher = Teacher(args.teacher, data, device, half, layers=(args.teacher_layer,)) if with_teacher else None
    seen, phi = [], nn.Identity()
    if with_features:
        try:
            layer = model.get_submodule(args.student_layer)
        except AttributeError as error:
            raise SystemExit(
                f"the student has no layer {args.student_layer!r}, such as up.2.layers.2.transformer."
            ) from error
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.no_grad():  # one forward of each tells the shapes
            x_t, t, _, ids = noisy_batch(data, 0, 0, 1, shift, 0.0)
            predict(model, model.cfg, data, x_t, t, ids, device)
            theirs, ours = teacher(x_t, t, ids)[1][0], seen.pop()
        phi = Projector(ours.shape[1], ours.shape[2], theirs.shape[1], theirs.shape[2]).to(device)
    parameters = [*model.parameters(), *phi.parameters()]
    optimizers = make_optimizers(nn.ModuleList([model, phi]), args.lr, args.optimizer)
    forward = parallel.wrap(torch.compile(model) if args.compile else model, device)
    for block in teacher.net.transformer_blocks if args.compile and with_teacher else ():
        block.compile()

    fixed = {"out": args.out_weight, "feat": args.feat_weight}
    names = "size init data resolution steps batch lr optimizer seed losses weighting out_weight feat_weight"
    names += " teacher_guidance student_layer teacher_layer"
    settings = {name: getattr(args, name) for name in names.split()}
    settings |= {
        "pictures": pictures_name,
        "teacher": encoders.fingerprint(*encoders.parts, *(["transformer"] if with_teacher else [])),
    }
    networks = {"model": model, "ema": ema, "phi": phi}
    start_step = load_state(out, settings, optimizers, **networks) if args.resume else 0
    log = Log(out / "log.csv", start_step)
    config = {
        **student_config, "stage": "distill", "latent_size": list(data.shape[1:]), "encoders": args.teacher,
        "sampling": sampling, "settings": settings, "machine": describe_machine(device),
    }  # fmt: skip
    if main_rank:
        print(f"{args.size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {args.losses} "
              f"({args.weighting}), {len(data)} pictures, {config['machine']}, seed {args.seed}, "
              f"steps {start_step} to {args.steps}")  # fmt: skip

    def losses_of(x_t, t, v, ids):
        """({"task": (b,) [, "out", "feat"]}, the cosine between both velocities): the three levels of a batch or a part of it."""
        seen.clear()
        with autocast(device):
            predicted = predict(forward, model.cfg, data, x_t, t, ids, device)
            projected = phi(seen[0]) if with_features else None
        predicted, v, cosine = predicted.float(), v.to(device), None
        losses = {"task": (predicted - v).square().mean((1, 2, 3))}  # || v_theta - v ||^2
        if with_teacher:
            with torch.no_grad():
                v_teacher, features = teacher(x_t, t, ids, args.teacher_guidance)
            losses["out"] = (predicted - v_teacher).square().mean((1, 2, 3))  # || v_T - v_theta ||^2
            cosine = F.cosine_similarity(predicted.flatten(1), v_teacher.flatten(1)).mean()
        if with_features:
            losses["feat"] = (projected.float() - features[0]).square().mean((1, 2, 3))  # || f_T - phi(f_theta) ||^2
        return losses, cosine

    batches = ahead(
        lambda step: noisy_batch(data, args.seed, step, args.batch, shift, caption_dropout, rows),
        range(start_step, args.steps), device,
    )  # fmt: skip
    bar = tqdm(batches, initial=start_step, total=args.steps, desc="stage 2", mininterval=1, disable=not main_rank)
    bins, seen_values, begin = torch.zeros(len(LEVELS) + 1, BINS), {}, time.time()
    for step, (x_t, t, v, ids) in enumerate(bar, start_step):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, args.steps, args.lr)

        values, all_losses = collections.defaultdict(float), []
        parts = torch.arange(len(t)).chunk(args.accumulate)  # one part, unless memory is short
        for part in parts:
            with parallel.averaging(forward, now=part is parts[-1]):
                losses, cosine = losses_of(x_t[part], t[part], v[part], ids[part])
                loss = combine(losses, t[part].to(device), args.weighting, fixed)
                (loss / args.accumulate).backward()
            all_losses.append({name: value.detach() for name, value in losses.items()})
            values["loss"] += loss.detach() / args.accumulate
            if with_teacher:
                values["cosine"] += cosine.detach() / args.accumulate
        losses = {name: torch.cat([part[name] for part in all_losses]) for name in all_losses[0]}
        if with_features:
            parallel.average_gradients(phi)
        grad_norm = values["grad_norm"] = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(grad_norm):
            stop_on_nan(step, out, args.lr)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step)

        # What was measured: each loss by itself and by time, the ratios of S, the agreement with the teacher.
        values |= {f"loss_{name}": values.mean() for name, values in losses.items()}
        values |= {f"ratio_{n}": (losses["task"] / losses[n]).mean() for n in ("out", "feat") if n in losses}
        for name, value in values.items():
            seen_values.setdefault(name, []).append(float(value))
        which = (t * BINS).long().clamp(max=BINS - 1)
        bins[-1].index_add_(0, which, torch.ones_like(t))
        for i, name in enumerate(LEVELS):
            if name in losses:
                bins[i].index_add_(0, which, losses[name].cpu())
        save = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if not (save or (step + 1) % 50 == 0):
            continue
        bins = parallel.total(bins)
        mean = (
            parallel.total(torch.tensor([np.mean(seen_values.get(name, math.nan)) for name in COLUMNS]))
            / parallel.world()
        )
        if main_rank:
            mean = dict(zip(COLUMNS, mean.tolist(), strict=True))
            for i, name in enumerate(LEVELS):
                by_time = bins[i] / bins[-1] if name in losses else torch.full((BINS,), math.nan)
                mean |= {f"{name}_t{b / BINS:.1f}": by_time[b].item() for b in range(BINS)}
            val_loss = validate(ema, val, shift, device) if save else math.nan
            log.add(step=step + 1, pictures=(step + 1) * args.batch, **mean, val_loss=val_loss, lr=group["lr"],
                    pictures_per_second=(step + 1 - start_step) * args.batch / (time.time() - begin))  # fmt: skip
            bar.set_postfix({name: f"{mean[f'loss_{name}']:.3f}" for name in losses}, refresh=False)
        bins.zero_()
        seen_values = {}
        if save and main_rank:
            draw_samples(out, step + 1, ema, encoders, prompts, data.shape, sampling, args.seed)
            plot(log, out / "loss.png")
            save_network(out, ema, {**config, "step": step + 1, "pictures_seen": (step + 1) * args.batch})
            save_state(out, step + 1, settings, optimizers, **networks)
    parallel.wait()
    if main_rank:
        print(f"{out}: model.safetensors, config.json, log.csv, loss.png, samples/progress.png")


COLUMNS = ("loss", "loss_task", "loss_out", "loss_feat", "ratio_out", "ratio_feat", "cosine", "grad_norm")


def plot(log, path):
    """loss.png: the three losses, the agreement with the teacher, the validation loss."""
    levels = {name: f"loss_{name}" for name in LEVELS}
    curves(log, path, ("the three levels, unscaled", levels, "log"),
           ("agreement with the teacher", {"cosine to the teacher's velocity": "cosine"}, "linear"),
           ("validation", {"L_task, EMA": "val_loss"}, "linear"))  # fmt: skip


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    # what to do, if not to train
    p.add_argument("--ablate", action="store_true", help="train the five rows of the ablation and print the table")
    p.add_argument("--seeds", type=int, default=3, help="runs a row, for --ablate: seeds --seed, --seed + 1, ...")
    p.add_argument("--per-family", type=int, default=100, help="mini-GenEval prompts a family, for --ablate")
    p.add_argument(
        "--plot-scaling",
        metavar="DIR",
        nargs="?",
        const="assets/zoo/distill",
        help="draw a_t and this student's losses",
    )
    p.add_argument(
        "--compare", metavar="DIR", nargs="+", help="draw the teacher and these students from the same noise"
    )
    # who learns from whom
    p.add_argument("--size", choices=PRESETS, default="tiny", help="the UNet: class scale, or one of the paper's two")
    p.add_argument("--init", metavar="DIR", default="assets/zoo/fm", help="the student of stage 1 to start from")
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder: encoders and transformer")
    p.add_argument(
        "--teacher-guidance", type=float, default=1.0, help="distil the teacher's guided velocity instead; 1 = not"
    )
    # losses
    p.add_argument(
        "--losses", choices=("task", "task+out", "task+out+feat"), default="task+out+feat", help="which levels"
    )
    p.add_argument(
        "--weighting", choices=("scaled", "linear"), default="scaled", help="timestep-aware, or fixed weights"
    )
    p.add_argument("--out-weight", type=float, default=1.0, help="of L_kd with --weighting linear")
    p.add_argument("--feat-weight", type=float, default=0.04, help="of L_feat with --weighting linear")
    p.add_argument(
        "--student-layer", default="up.2.layers.2.transformer", help="whose output is f_theta: the last transformer"
    )
    p.add_argument(
        "--teacher-layer", type=int, default=-1, help="joint block whose picture tokens are f_T; -1 is the last"
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
    p.add_argument("--lr", type=float, default=5e-4, help="learning rate after the warm-up")
    p.add_argument(
        "--optimizer", choices=("adamw", "muon"), help="default: muon for --size tiny, adamw for the paper's"
    )
    p.add_argument("--seed", type=int, default=0, help="of phi, noise, timesteps and the data's order")
    # writing and system
    p.add_argument("--out", metavar="DIR", type=Path, help="default: runs/distill, or runs/distill-ablate")
    p.add_argument("--resume", action="store_true", help="go on from the last saved state in --out, if there is one")
    p.add_argument(
        "--save-every", type=int, default=500, metavar="STEPS", help="save, validate and draw samples this often"
    )
    p.add_argument("--device", help="cuda, mps or cpu; chosen by itself if not given")
    p.add_argument(
        "--compile", action="store_true", help="torch.compile student and teacher: minutes to start, then faster"
    )
    args = p.parse_args(argv)
    for name in ("steps", "batch", "accumulate", "pictures", "save_every", "seeds", "per_family"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    args.optimizer = args.optimizer or ("muon" if args.size == "tiny" else "adamw")
    args.resolution = args.resolution or {"tiny": 64, "imagenet": 256, "t2i": 1024}[args.size]
    args.out = args.out or Path("runs/distill-ablate" if args.ablate else "runs/distill")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot_scaling or args.compare or args.ablate:
        import studies  # pictures and tables about trained students, one file for stages 2 and 3

    if args.plot_scaling:
        studies.plot_scaling(args)
    elif args.compare:
        studies.compare_students(args)
    elif args.ablate:
        studies.ablate_losses(args, ROWS, train)
    else:
        train(args, args.out)


if __name__ == "__main__":
    parallel.launch(main)
