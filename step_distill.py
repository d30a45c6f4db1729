r"""Stage 3: adversarial step distillation, 28 guided steps become 4 or 8 without guidance (Sec. 3.4, Fig. 7).

A velocity names the *average* of all pictures that may lie behind x_t. A short step corrects itself at the next one; a long step
commits to the average, which is a blur. Here the student of stage 2 learns to name *one* good picture at each of a few times:

    x_t  --student-->  v_theta  -->  x0' = x_t - t v_theta                          its picture, from each start time

    L_kd   = || v_T - v_theta ||^2             v_T = (x_t - x0_T) / t, x0_T the few-step target: where a teacher that needs few
                                               steps lands from x_t, guidance included                                       [R]
    L_task = || (eps - x_0) - v_theta ||^2     the data's velocity, as in stages 1 and 2
    L_adv  = - E[ D(renoise(x0')) ]            the judge D: an average is no picture, and does not pass                      [R]
    L      = S(L_task, L_kd) + weight L_adv    S: timestep-aware scaling, as in stage 2                                      [R]

    L_D    = E[max(0, 1 - D(renoise(x_0)))] + E[max(0, 1 + D(renoise(x0')))] + penalty R1                                    [A]

The judge wants answers above 1 for real latents and below -1 for predicted ones; beyond that it is sure enough, and learns nothing.
It is the frozen teacher, which sees both noised again to one random level with their caption (UFOGen, arXiv 2311.09257), and light
heads on some of its blocks, all that learns (LADD, 2403.12015) [A]. R1 keeps its slope small, so that its advice stays smooth.

    python step_distill.py                                   # class scale: from assets/zoo/distill, 4 steps
    python step_distill.py --for-steps 8                     # for 8 steps
    python step_distill.py --losses adv                      # adversarial alone; kd: distillation alone
    python step_distill.py --ablate --steps 300 --seeds 2    # the three side by side
    python step_distill.py --compare assets/zoo/step_distill # grid: teacher | before: 28, 4 | ours: 8, 4, 2, 1 steps
    python step_distill.py --size t2i --init runs/t2i-distill --teacher stable-diffusion-3.5-large \
        --turbo stable-diffusion-3.5-large-turbo --data DIR --lr 1e-5                       # the paper's

The paper's few-step teacher is SD3.5-Large-Turbo: one forward a target (--turbo). Without one, the target is a short guided ODE
solve of the many-step teacher from x_t: the same kind of answer, for up to 16 forwards. Sec. 3.4 was not at hand: [R], [A] as in
the README. [A] besides: the judge's noise level is logit-normal and not shifted; R1; both learning rates; no caption is dropped.
"""

import argparse
import collections
import json
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
    describe_machine,
    load_state,
    pick_device,
    save_network,
    save_state,
)
from common.encoders import hash_folders
from common.figures import curves
from common.seeds import noise_rows, rng
from distill import scaled, start_from
from evaluate import prompts_of, score
from model import PRESETS
from sample import draw_pictures
from teacher import Teacher
from train_fm import (
    PROMPTS,
    autocast,
    draw_samples,
    learning_rate,
    make_optimizers,
    open_data,
    predict,
    stop_on_nan,
    update_ema,
)

ROWS = {  # of --ablate
    "adversarial only": {"losses": "adv"},
    "distillation only": {"losses": "kd"},
    "both": {"losses": "adv+kd"},
}


# ------------------------------------------------------------------------------------------------------------------
# The few-step teacher


@torch.no_grad()
def solve(teacher, x_t, t, ids, guidance, shift, steps=8):
    """x0_T: where the teacher's guided ODE leads from x_t (B, C, H, W) at t (B,), by Euler steps on the sampler's own grid.

    A picture at t joins when the grid has come down to t: at t = 1 it takes all steps, at t = 0.25 few.
    """
    times, x0 = flow.sampling_timesteps(steps, shift), x_t.clone()
    for now, then in zip(times[:-1], times[1:], strict=True):
        on_way = t > then + 1e-4
        if on_way.any():
            start = t[on_way].clamp(max=now.item())
            v, _ = teacher(x0[on_way], start, ids[on_way], guidance)
            x0[on_way] = x0[on_way] + flow.expand(then - start, v).to(v.device) * v
    return x0


@torch.no_grad()
def target_velocity(teacher, turbo, x_t, t, ids, args, shift):
    """v_T (B, C, H, W): one forward of a turbo teacher, or the straight way from x_t to where the teacher's ODE leads."""
    if turbo is not None:
        return turbo(x_t, t, ids)[0]
    x0 = solve(teacher, x_t, t, ids, args.teacher_guidance, shift, args.solver_steps)
    return (x_t - x0) / flow.expand(t, x_t).to(x_t.device)


# ------------------------------------------------------------------------------------------------------------------
# The discriminator


class Judge(nn.Module):
    """The discriminator: light heads on several blocks of the frozen teacher, which sees noisy latents with their text.

    forward(latents (B, C, H, W), t (B,), ids (B,)) -> (B, heads * h * w): above 0 for real, below for predicted, from every head
    for every token of the teacher's grid. Only the heads have trainable weights; gradients pass through the teacher to the
    latents, which is how the student learns.
    """

    def __init__(self, teacher, width=64):
        super().__init__()
        self.__dict__["teacher"] = teacher  # no submodule: its weights are not ours to train or save
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(teacher.feature_dim, width, 3, padding=1), nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 1),
            )
            for _ in teacher.layers
        )  # fmt: skip
        self.register_buffer(
            "ratio", torch.tensor(1.0)
        )  # of distillation_loss: kept here, so that it is saved with the heads

    def features(self, latents, t, ids):
        """What the heads see: the blocks' features (B, D, h, w), scaled to deviation 1, since deep blocks have large ones."""
        return [F.group_norm(f, 1) for f in self.teacher(latents, t, ids)[1]]

    def answers(self, features):
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)], dim=1)

    def forward(self, latents, t, ids):
        return self.answers(self.features(latents, t, ids))


def gradient_penalty(judge, features):
    """(R1, answers): |d answer / d feature|^2 on real features, a mean over pictures and tokens (Mescheder 2018, here at the
    heads' inputs). The features are detached: the slope is the heads' own."""
    features = [f.detach().requires_grad_() for f in features]
    answers = judge.answers(features)
    gradients = torch.autograd.grad(answers.sum(), features, create_graph=True)
    return sum(g.square().sum(1).mean() for g in gradients), answers


def hinge(on_real, on_fake):
    """The judge's loss: 0 when all real latents get 1 or more and all predicted ones -1 or less; 2 when it answers 0 to all."""
    return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()


def distillation_loss(task, kd, t, own, ratio):
    """S(L_task, L_kd) of real points; on own points, which have no x_0, L_kd alone, brought to L_task's size as S does.

    task, kd, t (B,), own (B,) bool -> (B,). `ratio` is L_task / L_kd of real points, a running mean over the steps before: then
    the loss of a picture does not depend on which others share its part of the batch. At the shifted start times of 4 steps,
    t = 1, 0.9, 0.75, 0.5, a_t is 0, 0.25, 0.73, 1: at the last one real points learn from the data alone, and the target
    reaches the student through own points and the judge.
    """
    return torch.where(own, ratio * kd, scaled(task, kd, t))


# ------------------------------------------------------------------------------------------------------------------
# Training


def starting_points(model, data, args, times, step, device, rows=slice(None)):
    """What the student is asked about in one step, from (seed, step) and its weights: x0, eps, x_t, t, ids, own (B rows each;
    with `rows`, those of one GPU).

    Half of the rows below t = 1 (--own) are not noised real latents but points of the student's own way from noise: when it
    draws, its second step starts where its first one led, not on the straight line to a real picture. No x_0 lies behind them,
    so L_task leaves them out. At t = 1 there is nothing to choose: x_t is noise, and any x_0 may lie behind it.

        t = 1          0.9            0.75           0.5
        eps ---------> x ----------> x ----------> x            own: sampled so far, stopped at the row's own t
                       (1-t) x0 + t eps, anywhere               real: between a picture and noise
    """
    x0, ids = data.batch(args.seed, step, args.batch, rows)
    g = rng(args.seed, step, 1)
    eps = noise_rows(data.shape, args.batch, args.seed, step, 2, rows=rows)
    which = torch.randint(len(times), (args.batch,), generator=g)  # of the start times
    own = ((torch.rand(args.batch, generator=g) < args.own) & (which > 0))[rows]
    which = which[rows]
    t = times[which]
    x_t = flow.interpolate(x0, eps, t)
    x = eps[own]
    for k in range(len(times) - 1):  # walk all of them down; a row stops at its own time
        far = which[own] > k
        at_once = max(1, len(t) // args.accumulate)  # as in training
        for part in far.nonzero()[:, 0].split(at_once) if far.any() else ():
            now = times[k].expand(len(part))
            with torch.no_grad(), autocast(device):
                v = predict(model, model.cfg, data, x[part], now, ids[own][part], device).float().cpu()
            x[part] = x[part] + (times[k + 1] - times[k]) * v
    x_t[own] = x
    return x0, eps, x_t, t, ids, own


def spread_layers(folder):
    """Blocks at a quarter, a half and the end of the transformer in an SD3 folder: layout, objects, detail."""
    path = Path(folder) / "transformer" / "config.json"
    n = json.loads(path.read_text())["num_layers"] if path.is_file() else 0  # Teacher says what is wrong
    return [n // 4, n // 2, n - 1]


def train(args, out):
    """Make a few-step student in the folder `out`."""
    device = pick_device(args.device)
    if (out / "train_state").is_dir() and not args.resume:
        raise SystemExit(f"{out} holds a run already: go on with --resume, choose another --out, or delete it.")
    torch.manual_seed(args.seed)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    adversarial, distilling = "adv" in args.losses, "kd" in args.losses
    main_rank, rows = parallel.rank() == 0, parallel.rows(args.batch, args.accumulate)

    model, ema, student_config, encoders = start_from(args, device)
    data, _, pictures_name = open_data(args, encoders)
    prompts = PROMPTS if not args.data else [data.caption_of(i * len(data) // 8) for i in range(8)]
    shift = student_config["sampling"]["shift"] if args.size == "tiny" else flow.resolution_shift(args.resolution)
    times = flow.sampling_timesteps(args.for_steps, shift)[:-1]  # t in {1, 0.75, 0.5, 0.25} before the shift [A]
    sampling = {
        "steps": args.for_steps,
        "guidance": 1.0,
        "shift": shift,
        "times": [round(float(t), 6) for t in times] + [0.0],
    }

    args.layers = args.layers or spread_layers(args.turbo or args.teacher)
    # The judge looks through the few-step teacher if there is one, else through the many-step teacher [A].
    teacher = Teacher(args.turbo or args.teacher, data, device, half, layers=args.layers)
    turbo = teacher if args.turbo else None
    judge = Judge(teacher).to(device)
    of_student = make_optimizers(model, args.lr, args.optimizer)
    # beta1 [A]: the judge forgets fast, since what it judges changes all the time
    of_heads = torch.optim.AdamW(judge.parameters(), lr=args.heads_lr, betas=(0.5, 0.99), weight_decay=0.0, fused=True)
    optimizers = [*of_student, of_heads]
    names = "size init data resolution steps batch lr optimizer heads_lr seed losses for_steps own adv_weight penalty layers"
    settings = {name: getattr(args, name) for name in (names + " teacher_guidance solver_steps turbo").split()}
    settings |= {"pictures": pictures_name, "teacher": encoders.fingerprint(*encoders.parts, "transformer")}
    settings |= {"turbo_weights": hash_folders([Path(args.turbo) / "transformer"])} if args.turbo else {}
    networks = {"model": model, "ema": ema, "heads": judge}
    forward = parallel.wrap(model, device)
    start_step = load_state(out, settings, optimizers, **networks) if args.resume else 0
    log = Log(out / "log.csv", start_step)
    config = {
        **student_config, "stage": "step_distill", "latent_size": list(data.shape[1:]), "encoders": args.teacher,
        "sampling": sampling, "settings": settings, "machine": describe_machine(device),
    }  # fmt: skip
    if main_rank:
        print(f"{args.size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {args.losses} for "
              f"{args.for_steps} steps, {len(data)} pictures, {config['machine']}, seed {args.seed}, "
              f"steps {start_step} to {args.steps}")  # fmt: skip

    def velocity_of(net, part):
        with autocast(device):
            return predict(net, model.cfg, data, x_t[part], t[part], ids[part], device).float()

    def judged(latents, part):
        """Latents noised again to the part's levels. Real and predicted ones get the same noise: nothing else tells them apart."""
        return flow.interpolate(latents, noise[part].to(device), level[part].to(device)), level[part], ids[part]

    bar = tqdm(range(start_step, args.steps), initial=start_step, total=args.steps, desc="stage 3", mininterval=1,
               disable=not main_rank)  # fmt: skip
    seen, answers, begin = {}, {}, time.time()
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                peak = args.heads_lr if optimizer is of_heads else args.lr
                group["lr"] = learning_rate(step, args.steps, peak, warmup=50)
        values, predictions, sums = collections.defaultdict(float), [], torch.zeros(2, device=device)
        x0, eps, x_t, t, ids, own = starting_points(model, data, args, times, step, device, rows)
        g = rng(args.seed, step, 3)
        # How noisy the judge sees them, anew every step, and the noise.
        level = flow.logit_normal_timesteps(args.batch, generator=g)[rows]
        noise = noise_rows(data.shape, args.batch, args.seed, step, 4, rows=rows)
        parts = torch.arange(len(t)).chunk(args.accumulate)  # one part, unless memory is short

        # First the judge, D. The student's pictures come without a graph: nothing here may reach the student. The teacher's
        # weights are frozen, and on this side not even its activations need a gradient: the heads are all that learns.
        for part in parts if adversarial else ():
            with torch.no_grad():
                v = velocity_of(model, part)
                predicted = flow.x0_from_velocity(x_t[part].to(device), v, t[part].to(device))
                real = judge.features(*judged(x0[part].to(device), part))
                fake = judge.features(*judged(predicted, part))
            penalty, on_real = gradient_penalty(judge, real)
            on_fake = judge.answers(fake)
            judge_loss = hinge(on_real, on_fake)
            ((judge_loss + args.penalty * penalty) / len(parts)).backward()
            answers = {"real": on_real.detach().flatten().cpu(), "fake": on_fake.detach().flatten().cpu()}
            for name, value in (("loss_d", judge_loss), ("penalty", penalty), ("d_real", on_real), ("d_fake", on_fake)):
                values[name] += value.detach().mean() / len(parts)
        if adversarial:
            parallel.average_gradients(judge)
            values["grad_norm_d"] = nn.utils.clip_grad_norm_(judge.parameters(), 10.0)
            of_heads.step()

        # Then the student, G, against the judge as it is now. The gradient runs from the heads through the frozen teacher into
        # the student's picture x0' and on into its weights; what it leaves in the heads on the way is dropped below.
        for part in parts:
            with parallel.averaging(forward, now=part is parts[-1]):
                v, x, t_part = velocity_of(forward, part), x_t[part].to(device), t[part].to(device)
                predicted, loss = flow.x0_from_velocity(x, v, t_part), 0.0
                if distilling:
                    v_teacher = target_velocity(teacher, turbo, x, t[part], ids[part], args, shift)
                    kd = (v - v_teacher).square().mean((1, 2, 3))  # (b,)   || v_T - v_theta ||^2
                    data_velocity = flow.velocity(x0[part], eps[part]).to(device)
                    task = (v - data_velocity).square().mean((1, 2, 3))  # (b,)   of real points only
                    of_real = ~own[part].to(device)
                    loss = distillation_loss(task, kd, t_part, ~of_real, judge.ratio).mean()
                    sums += torch.stack([task[of_real].sum(), kd[of_real].sum()]).detach()
                    values["loss_kd"] += kd.detach().mean() / len(parts)
                    if of_real.any():
                        values["loss_task"] += task[of_real].detach().mean() / len(parts)
                if adversarial:  # no hinge here: the student may please the judge as much as it can
                    fooling = -judge(*judged(predicted, part)).mean()
                    loss = loss + args.adv_weight * fooling
                    values["loss_adv"] += fooling.detach() / len(parts)
                (loss / len(parts)).backward()
            predictions.append(predicted.detach())
        values["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not all(torch.isfinite(values[name]) for name in ("grad_norm", "grad_norm_d") if name in values):
            stop_on_nan(step, out, f"{args.lr} (or --heads-lr {args.heads_lr})")
        for optimizer in of_student:
            optimizer.step()
        # The heads' gradients go as well: what they gathered in the student's turn is not theirs to follow.
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step, longest=0.995)
        if distilling:
            of_all = parallel.total(sums)
            if of_all[1] > 0:  # with --own 1 a small batch may hold no real point
                judge.ratio.lerp_(of_all[0] / of_all[1], 0.05 if step else 1.0)

        # Collapse alarm: of every channel, the deviation of the predicted latents beside the real ones', and the means' gap.
        predicted, x0 = torch.cat(predictions), x0.to(device)
        ratio = predicted.std((0, 2, 3)) / x0.std((0, 2, 3))  # (C,)
        gap = (predicted.mean((0, 2, 3)) - x0.mean((0, 2, 3))).abs()  # (C,)
        values |= {"std_ratio_low": ratio.min(), "std_ratio_high": ratio.max(), "mean_gap": gap.max()}
        for name, value in values.items():
            seen.setdefault(name, []).append(float(value))
        save = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if save or (step + 1) % 25 == 0:
            mean = torch.tensor([np.mean(seen.get(name, [math.nan])) for name in COLUMNS])
            mean = dict(zip(COLUMNS, (parallel.total(mean) / parallel.world()).tolist(), strict=True))
            seen = {}
            scores = {f"score_{n}": math.nan for n in (1, 2, 4, 8)}
            if save and main_rank and args.watch and not args.data:
                scores = few_step_scores(ema, config, encoders, args.watch)
            if main_rank:
                log.add(step=step + 1, pictures=(step + 1) * args.batch, **mean, **scores, lr=of_student[0].param_groups[0]["lr"],
                        pictures_per_second=(step + 1 - start_step) * args.batch / (time.time() - begin))  # fmt: skip
                bar.set_postfix(real=f"{mean['d_real']:.2f}", fake=f"{mean['d_fake']:.2f}", kd=f"{mean['loss_kd']:.3f}",
                                refresh=False)  # fmt: skip
        if save and main_rank:
            draw_samples(out, step + 1, ema, encoders, prompts, data.shape, sampling, args.seed)
            plot(log, answers, out / "gan.png")
            save_network(out, ema, {**config, "step": step + 1, "pictures_seen": (step + 1) * args.batch})
            save_state(out, step + 1, settings, optimizers, **networks)
    parallel.wait()
    if main_rank:
        print(f"{out}: model.safetensors, config.json, log.csv, gan.png, samples/progress.png")


COLUMNS = ("loss_task", "loss_kd", "loss_adv", "loss_d", "penalty", "d_real", "d_fake", "grad_norm", "grad_norm_d",
           "std_ratio_low", "std_ratio_high", "mean_gap")  # fmt: skip


def few_step_scores(model, config, encoders, per_family, seed=1):
    """mini-GenEval with 1, 2, 4 and 8 steps, without guidance. While training: of few prompts, to watch and not to report."""
    prompts = prompts_of("val", per_family, seed)
    pictures = {n: draw_pictures(model, config, encoders, prompts, range(len(prompts)), n, 1.0) for n in (1, 2, 4, 8)}
    return {f"score_{n}": score(pictures[n], prompts)["overall"] for n in pictures}


def plot(log, answers, path):
    """gan.png: what the judge says, the losses, the collapse alarm, the scores, and the judge's last answers."""

    def same(*names):
        return {name: name for name in names}

    curves(log, path, ("the judge: real above predicted, a small gap", same("d_real", "d_fake"), "linear"),
           ("losses", same("loss_kd", "loss_task", "loss_d", "loss_adv"), "linear"),
           ("collapse alarm: ratios near 1, gap near 0", same("std_ratio_low", "std_ratio_high", "mean_gap"), "linear"),
           ("mini-GenEval of few prompts", {f"{n} steps": f"score_{n}" for n in (1, 2, 4, 8)}, "linear"),
           histogram=("the judge's last answers", answers))  # fmt: skip


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    # what to do, if not to train
    p.add_argument(
        "--ablate", action="store_true", help="adversarial only, distillation only, both: train and print the table"
    )
    p.add_argument("--seeds", type=int, default=3, help="runs a row, for --ablate")
    p.add_argument("--per-family", type=int, default=100, help="mini-GenEval prompts a family, for --ablate")
    p.add_argument(
        "--compare", metavar="DIR", help="draw this student with 8, 4, 2, 1 steps beside --before and the teacher"
    )
    p.add_argument(
        "--before", metavar="DIR", default="assets/zoo/distill", help="the student of stage 2, for --compare"
    )
    # who learns from whom
    p.add_argument("--size", choices=PRESETS, default="tiny", help="the UNet: class scale, or one of the paper's two")
    p.add_argument("--init", metavar="DIR", default="assets/zoo/distill", help="the student of stage 2 to start from")
    p.add_argument("--for-steps", type=int, default=4, help="sampling steps to learn: 4 or 8 in the paper")
    p.add_argument(
        "--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder: encoders and many-step transformer"
    )
    p.add_argument(
        "--turbo",
        metavar="DIR",
        help="few-step teacher, such as stable-diffusion-3.5-large-turbo; default: an ODE solve",
    )
    p.add_argument(
        "--teacher-guidance", type=float, default=3.0, help="of the ODE solve; it ends up inside the student"
    )
    p.add_argument(
        "--solver-steps", type=int, default=8, help="Euler steps of the ODE solve from t = 1; fewer from below"
    )
    # losses
    p.add_argument(
        "--losses", choices=("adv", "kd", "adv+kd"), default="adv+kd", help="adversarial, distillation, or both"
    )
    p.add_argument("--adv-weight", type=float, default=0.05, help="of the adversarial loss beside S(L_task, L_kd)")
    p.add_argument("--penalty", type=float, default=0.1, help="of the gradient penalty (R1) on the heads' inputs")
    p.add_argument(
        "--layers", type=int, nargs="+", help="blocks of the teacher that get a head; default: at 1/4, 1/2, the last"
    )
    p.add_argument(
        "--own", type=float, default=0.5, help="share of training points on the student's own way from noise"
    )
    # data
    p.add_argument(
        "--data", metavar="DIR", help="pictures with captions, or shards of `data.py encode`; default: the shapes world"
    )
    p.add_argument("--pictures", type=int, default=20_000, help="how many different shapes-world pictures to train on")
    p.add_argument("--resolution", type=int, help="side in pixels for --data; default: 64, 256 or 1024 by --size")
    # optimisation
    p.add_argument("--steps", type=int, default=1500, help="training steps")
    p.add_argument("--batch", type=int, default=64, help="pictures a step, of all GPUs together")
    p.add_argument("--accumulate", type=int, default=1, help="parts in which each GPU takes its share, to save memory")
    p.add_argument("--checkpointing", action="store_true", help="compute activations twice, to save memory")
    p.add_argument("--lr", type=float, default=3e-4, help="the student's learning rate after the warm-up")
    p.add_argument(
        "--optimizer", choices=("adamw", "muon"), help="default: muon for --size tiny, adamw for the paper's"
    )
    p.add_argument("--heads-lr", type=float, default=1e-4, help="the heads' learning rate")
    p.add_argument("--seed", type=int, default=0, help="of the heads, noise, timesteps and the data's order")
    # writing and system
    p.add_argument("--out", metavar="DIR", type=Path, help="default: runs/step_distill, or runs/step_distill-ablate")
    p.add_argument("--resume", action="store_true", help="go on from the last saved state in --out, if there is one")
    p.add_argument(
        "--save-every", type=int, default=250, metavar="STEPS", help="save, score and draw samples this often"
    )
    p.add_argument(
        "--watch", type=int, default=10, help="prompts a family for the scores in log.csv at each save; 0: none"
    )
    p.add_argument("--device", help="cuda, mps or cpu; chosen by itself if not given")
    args = p.parse_args(argv)
    for name in [
        "steps",
        "batch",
        "accumulate",
        "pictures",
        "save_every",
        "seeds",
        "per_family",
        "for_steps",
        "solver_steps",
    ]:
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    if not 0 <= args.own <= 1:
        raise SystemExit(f"--own must be a share from 0 to 1, not {args.own}.")
    args.optimizer = args.optimizer or ("muon" if args.size == "tiny" else "adamw")
    args.resolution = args.resolution or {"tiny": 64, "imagenet": 256, "t2i": 1024}[args.size]
    args.out = args.out or Path("runs/step_distill-ablate" if args.ablate else "runs/step_distill")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.compare or args.ablate:
        import studies  # pictures and tables about trained students, one file for stages 2 and 3

    if args.compare:
        studies.compare_steps(args)
    elif args.ablate:
        studies.ablate_few_steps(args, ROWS, train)
    else:
        train(args, args.out)


if __name__ == "__main__":
    parallel.launch(main)
