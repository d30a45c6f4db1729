r"""Stage 3: adversarial step distillation, 28 guided steps become 4 or 8 without guidance (Sec. 3.4, Fig. 7).

A velocity points to the *average* of all pictures behind x_t. A short step corrects itself at the next one; a long step
commits to the average, which is a blur. Here the student of stage 2 learns to predict *one* good picture at each of a few times:

    x_t  --student-->  v_theta  -->  x0' = x_t - t v_theta                          its picture, from each start time

    L_kd   = || v_T - v_theta ||^2             v_T = (x_t - x0_T) / t, x0_T the few-step target: where a teacher that needs few
                                               steps lands from x_t, guidance included                                       [R]
    L_task = || (eps - x_0) - v_theta ||^2     the data's velocity, as in stages 1 and 2
    L_adv  = - E[ D(renoise(x0')) ]            the discriminator D: an average is no picture, and does not pass              [R]
    L      = S(L_task, L_kd) + weight L_adv    S: timestep-aware scaling, distill.py's `scaled`                              [R]
             r L_kd + weight L_adv             on the student's own way from noise, where there is no x_0; r = L_task / L_kd [A]

    L_D    = E[max(0, 1 - D(renoise(x_0)))] + E[max(0, 1 + D(renoise(x0')))] + penalty R1       hinge loss                   [A]

D wants logits above 1 for real latents and below -1 for predicted ones; beyond that it is sure enough, and learns nothing. Heads
that know nothing yet teach nothing: the weight of L_adv is 0 for the first --ramp steps, and grows over as many more [A].
D is the frozen teacher, which sees real and predicted latents noised again to one random level with their caption (UFOGen, arXiv
2311.09257), and light heads on some of its blocks, all that learns (LADD, 2403.12015) [A]. R1 keeps its slope small, so that its
advice stays smooth.

    python step_distill.py                                   # class scale: from runs/distill (or the zoo's), 4 steps
    python step_distill.py --for-steps 8                     # for 8 steps
    python step_distill.py --losses adv                      # adversarial alone; kd: distillation alone
    python step_distill.py --size t2i --init runs/t2i-distill --teacher stable-diffusion-3.5-large \
        --turbo stable-diffusion-3.5-large-turbo --data DIR --lr 1e-5                       # the paper's

The ablation and the comparison: studies/few_steps.py. Writes runs/step_distill, as stage 1 does, with gan.png instead of loss.png.

The paper's few-step teacher is SD3.5-Large-Turbo: one forward a target (--turbo). Without one, the target is a short guided ODE
solve of the many-step teacher from x_t: the same kind of answer, for up to 16 forwards. Sec. 3.4 was not available: [R], [A] as in
the README. [A] besides: D's noise level is logit-normal and not shifted; R1; both learning rates; no caption is dropped.
"""

import copy
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import flow
from common import arguments, parallel, training
from common.arguments import integer, real
from common.checkpoint import check_encoders, latest, load_state, load_student, save_network, save_state, state_settings
from common.device import (
    describe_machine,
    half,
    matmul_dtype,
    move,
    multiply_in_bfloat16,
    pick_device,
    student_dtype,
    take,
)
from common.encoders import FrozenEncoders, hash_folders
from common.figures import curves
from common.seeds import noise_rows, rng
from common.training import (
    Log,
    Means,
    ahead,
    clip_gradients,
    learning_rate,
    make_optimizers,
    predict,
    timestep_shift,
    update_ema,
)
from data import open_data, sample_prompts
from distill import Ratio, scaled
from evaluate import prompts_of, score
from model import PRESETS, UNet
from sample import draw_pictures
from teacher import Teacher

LR = 1e-3, 1e-5  # at class scale, at the paper's sizes [A]
WARMUP, EVERY = 50, 25  # steps until the learning rates are at their peak [A]; steps between two rows of log.csv

# ------------------------------------------------------------------------------------------------------------------
# The few-step teacher


@torch.no_grad()
def solve(teacher, x_t, t, ids, guidance, shift, steps=8):
    """x0_T: where the teacher's guided ODE leads from x_t (B, C, H, W) at t (B,), by Euler steps on the sampler's own grid.

    A picture at t joins when the grid has come down to t: at t = 1 it takes all steps, at t = 0.25 few.
    """
    times, x0 = flow.sampling_timesteps(steps, shift), x_t.clone()
    for now, then in zip(times[:-1], times[1:], strict=True):
        on_way = (t > then + 1e-4).cpu()  # captions are counted in the CPU's memory
        if on_way.any():
            start = t[on_way].clamp(max=now.item())
            v, _ = teacher(x0[on_way], start, ids[on_way], guidance)
            x0[on_way] = x0[on_way] + flow.expand(then - start, v) * v
    return x0


@torch.no_grad()
def target_velocity(teacher, turbo, x_t, t, ids, args, shift):
    """v_T (B, C, H, W): one forward of a turbo teacher, or the straight way from x_t to where the teacher's ODE leads."""
    if turbo is not None:
        return turbo(x_t, t, ids)[0]
    x0 = solve(teacher, x_t, t, ids, args.teacher_guidance, shift, args.solver_steps)
    return (x_t - x0) / flow.expand(t, x_t)


# ------------------------------------------------------------------------------------------------------------------
# The discriminator


class Discriminator(nn.Module):
    """D: light heads on several blocks of the frozen teacher, which sees noisy latents with their text.

    forward(latents (B, C, H, W), t (B,), ids (B,)) -> (B, heads * h * w): above 0 for real, below for predicted, from every head
    for every token of the teacher's grid. Only the heads have trainable weights; gradients pass through the teacher to the
    latents, which is how the student learns.
    """

    def __init__(self, teacher, width=64):
        super().__init__()
        self.teacher = teacher  # a plain object, no nn.Module: its weights are neither trained nor saved with the heads
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(teacher.feature_dim, width, 3, padding=1), nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 1),
            )
            for _ in teacher.layers
        )  # fmt: skip

    def features(self, latents, t, ids):
        """What the heads see: the blocks' features (B, D, h, w), scaled to deviation 1, since deep blocks have large ones."""
        return [F.group_norm(f, 1) for f in self.teacher(latents, t, ids)[1]]

    def logits(self, features):
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)], dim=1)

    def forward(self, latents, t, ids):
        return self.logits(self.features(latents, t, ids))


def gradient_penalty(discriminator, features):
    """(R1, logits): |d answer / d feature|^2 on real features, a mean over pictures and tokens (Mescheder 2018, here at the
    heads' inputs). The features are detached: the slope is the heads' own."""
    features = [f.detach().requires_grad_() for f in features]
    logits = discriminator.logits(features)
    gradients = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return sum(g.square().sum(1).mean() for g in gradients), logits


def hinge(on_real, on_fake):
    """D's loss: 0 when all real latents get 1 or more and all predicted ones -1 or less; 2 when it says 0 to all."""
    return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()


# ------------------------------------------------------------------------------------------------------------------
# Where the student learns, and from what


class Points(NamedTuple):
    """What one step sees; B pictures, each at one of the start times. x_t to mask: see common.training.Batch."""

    x_t: torch.Tensor
    t: torch.Tensor
    v: torch.Tensor
    ids: torch.Tensor
    states: torch.Tensor
    mask: torch.Tensor
    which: torch.Tensor  # (B,) number of the start time
    x_0: torch.Tensor  # (B, 16, h, w) the real latent
    eps: torch.Tensor  # (B, 16, h, w) the noise
    on_policy: torch.Tensor  # (B,) bool: x_t is a point of the student's own way from eps, and no x_0 lies behind it
    level: torch.Tensor  # (B,) how noisy D sees both sides, and
    noise: torch.Tensor  # (B, 16, h, w) the noise for it


def draw_points(data, args, times, step, rows=slice(None)):
    """The Points of a step, from (seed, step) alone: noised real latents, and which rows walk_on_policy() is to replace.

    A share --on-policy of the rows below t = 1 is marked for that. At t = 1 there is no choice: x_t is noise, whatever x_0.
    """
    x_0, ids = data.batch(args.seed, step, args.batch, rows)
    g = rng(args.seed, step, 1)
    eps = noise_rows(data.shape, args.batch, args.seed, step, 2, rows=rows)
    which = torch.randint(len(times), (args.batch,), generator=g)  # of the start times
    on_policy = ((torch.rand(args.batch, generator=g) < args.on_policy) & (which > 0))[rows]
    t = times[which[rows]]
    level = flow.logit_normal_timesteps(args.batch, args.level_shift, generator=rng(args.seed, step, 3))[rows]
    noise = noise_rows(data.shape, args.batch, args.seed, step, 4, rows=rows)
    x_t, v = flow.interpolate(x_0, eps, t), flow.velocity(x_0, eps)
    return Points(x_t, t, v, ids, *data.text(ids), which[rows], x_0, eps, on_policy, level, noise)


@torch.no_grad()
def walk_on_policy(model, points, times, device, at_once):
    """The points with x_t of the on-policy rows as the student itself gets there: backward simulation, as in DMD2 (2405.14867).

    When the student draws, its second step starts where its first one led, not on the straight line to a real picture.

        t = 1          0.9            0.75           0.5
        eps ---------> x ----------> x ----------> x            on policy: sampled so far, stopped at the row's own t
                       (1-t) x_0 + t eps, anywhere              real: between a picture and noise
    """
    x = points.eps.to(device, copy=True)
    for now, then in zip(times[:-1], times[1:], strict=True):
        far = points.on_policy & (points.t < now - 1e-6)  # these go on from `now`; the others have stopped at their own t
        for some in far.nonzero()[:, 0].split(at_once):
            if len(some):
                here = move(take(points, some), device)._replace(x_t=x[some], t=now.to(device).expand(len(some)))
                x[some] = x[some] + (then - now) * predict(model, here)
    return points._replace(x_t=torch.where(points.on_policy[:, None, None, None].to(device), x, points.x_t.to(device)))


def ramp(step, args):
    """The weight of L_adv at a step: 0 while D's heads begin to learn, then in a straight line to --adv-weight."""
    return args.adv_weight * min(1.0, max(0.0, step / args.ramp - 1)) if args.ramp else args.adv_weight


def distillation_loss(task, kd, t, on_policy, ratio, most=1.0):
    """S(L_task, L_kd) of real points; on policy, where there is no x_0, L_kd alone, brought to L_task's size as S does.

    task, kd, t (B,), on_policy (B,) bool -> (B,). `ratio` (B,) is L_task / L_kd of real points at such t: distill.Ratio. At the
    shifted start times of 4 steps, t = 1, 0.9, 0.75, 0.5, a_t is 0, 0.25, 0.73, 1: at the last one real points learn from the data
    alone, and the target reaches the student on policy and through D, unless `most` says how much of a_t there may be at most.
    """
    return torch.where(on_policy, ratio * kd, scaled(task, kd, t, ratio, most))


def collapse_alarm(predicted, x_0):
    """Of every channel, the deviation of the predicted latents beside the real ones', and the largest gap between their means."""
    ratio = predicted.std((0, 2, 3)) / x_0.std((0, 2, 3))  # (C,)
    gap = (predicted.mean((0, 2, 3)) - x_0.mean((0, 2, 3))).abs()  # (C,)
    return {"std_ratio_low": ratio.min(), "std_ratio_high": ratio.max(), "mean_gap": gap.max()}


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

    # ---- the student of stage 2, and its average
    args.init = args.init or (state_settings(out).get("init") if args.resume else None) or latest("distill")
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
    data, _ = open_data(args.data, encoders, args.resolution, args.pictures, student.cfg.text_dim)
    prompts, shift = sample_prompts(args.data, data), timestep_shift(args.size, args.resolution)
    times = flow.sampling_timesteps(args.for_steps, shift)[:-1]  # t in {1, 0.75, 0.5, 0.25} before the shift [A]

    # ---- the teacher. D looks through the few-step one if there is one, else through the many-step one [A].
    teacher = Teacher(args.turbo or args.teacher, data, device, matmul_dtype(device), layers=args.layers)
    turbo, args.layers = teacher if args.turbo else None, list(teacher.layers)
    if args.checkpointing:  # the student's gradient runs through all of its blocks
        teacher.net.enable_gradient_checkpointing()
    discriminator, ratio = Discriminator(teacher).to(device), Ratio().to(device)

    # ---- the optimizers; what --resume restores, bit for bit
    optimizers = make_optimizers(student, args.lr, args.optimizer)
    betas = (0.5, 0.99)  # [A]: D forgets fast, since what it looks at changes all the time
    of_heads = torch.optim.AdamW(discriminator.parameters(), lr=args.heads_lr, betas=betas, weight_decay=0.0, fused=True)
    networks = {"model": student, "ema": ema, "discriminator": discriminator, "ratio": ratio}
    hashes = {"contents": data.name, "teacher": encoders.fingerprint(*encoders.parts, "transformer")}
    hashes |= {"gemma": encoders.gemma.fingerprint()} if encoders.gemma else {}
    hashes |= {"turbo_weights": hash_folders([Path(args.turbo) / "transformer"])} if args.turbo else {}
    settings = arguments.settings_of(args) | hashes
    start = load_state(out, settings, [*optimizers, of_heads], **networks) if args.resume else 0
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    machine = describe_machine(device) | {"products": str(student_dtype(device)).removeprefix("torch.")}
    config = {
        "stage": "step_distill", "size": args.size, "machine": machine, "encoders": args.teacher, "gemma": gemma,
        "scaling_factor": encoders.scaling_factor, "shift_factor": encoders.shift_factor,
        "latent_size": list(data.shape[1:]), "settings": arguments.all_of(args) | hashes,
        "sampling": {"steps": args.for_steps, "guidance": 1.0, "shift": shift,
                     "times": [round(float(t), 6) for t in times] + [0.0]},
    }  # fmt: skip
    training.say_start(out, config, start, args.steps, student)

    # ---- several GPUs: the student's backward pass averages the gradients of all ranks
    forward, several = torch.compile(student) if args.compile else student, parallel.world() > 1
    if args.compile:
        teacher.compile()
    if several:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True)  # fmt: skip

    def make(step):
        return draw_points(data, args, times, step, rows)

    def renoised(x, part, others=0):
        """What D is asked about. Real and predicted latents get the same noise: nothing else tells them apart. With
        others=1 each comes with its neighbor's caption."""
        return flow.interpolate(x, part.noise, part.level), part.level, part.ids.roll(others)

    def target(k, part):
        """The k-th part's few-step target. Two may ask for it (--real teacher), and it is what costs most."""
        if k not in targets:
            targets[k] = target_velocity(teacher, turbo, part.x_t, times[part.which], part.ids, args, shift)
        return targets[k]

    # ---- the loop
    scored, adversarial = args.watch and not args.data, "adv" in args.losses
    logits, targets = {}, {}  # D's last answers, for gan.png; what target() said in this step
    log, means, bad_steps, last_row, clock = Log(out / "log.csv", start), Means(device), 0, start, time.perf_counter()
    bar = tqdm(total=args.steps, initial=start, desc="step_distill", mininterval=1, disable=None if rank == 0 else True)
    for step, points in zip(range(start, args.steps), ahead(make, range(start, args.steps), device), strict=True):
        share = learning_rate(step, args.steps, WARMUP)
        of_heads.param_groups[0]["lr"] = args.heads_lr * share
        for group in groups:
            group["lr"] = args.lr * share
        points = walk_on_policy(student, points, times, device, at_once=max(1, len(points.t) // args.accumulate))
        parts = [slice(k * size, (k + 1) * size) for k in range(args.accumulate)]
        targets.clear()

        # First D. The student's pictures come without a graph: nothing here may reach the student.
        discriminator.requires_grad_(True)
        for k, some in enumerate(parts if adversarial else ()):
            part = move(take(points, some), device)
            with torch.no_grad():
                predicted = flow.x0_from_velocity(part.x_t, predict(forward, part), part.t)
                x_0 = part.x_0 if args.real == "data" else flow.x0_from_velocity(part.x_t, target(k, part), part.t)
                real = discriminator.features(*renoised(x_0, part))
                fake = discriminator.features(*renoised(predicted, part))
                wrong = discriminator.features(*renoised(x_0, part, others=1)) if args.wrong_captions else None
            penalty, on_real = gradient_penalty(discriminator, real)
            on_fake = discriminator.logits(fake)
            loss = hinge(on_real, on_fake)
            if wrong is not None:  # a real latent with the caption of another is as wrong: D must read
                differ = (part.ids != part.ids.roll(1)).to(device)
                loss = loss + args.wrong_captions * (differ[:, None] * F.relu(1 + discriminator.logits(wrong))).mean()
            ((loss + args.penalty * penalty) / args.accumulate).backward()
            means.add(d_real=on_real, d_fake=on_fake, loss_d=loss, penalty=penalty)
            logits.update(real=on_real.detach(), fake=on_fake.detach())
        if adversarial:
            if several:
                parallel.average_gradients(discriminator)
            norm, bad = clip_gradients(discriminator.parameters(), 10.0)
            means.add(grad_norm_d=norm, skipped_d=bad)
            of_heads.step()
            of_heads.zero_grad(set_to_none=True)

        # Then the student, against D as it is now: the gradient runs from the heads through the frozen teacher into x0'.
        discriminator.requires_grad_(False)
        for k, some in enumerate(parts):
            part, last = move(take(points, some), device), k == args.accumulate - 1
            with forward.no_sync() if several and not last else nullcontext():  # only the last part averages over ranks
                v = predict(forward, part)
                predicted, loss = flow.x0_from_velocity(part.x_t, v, part.t), 0.0
                if "kd" in args.losses:
                    kd = (v - target(k, part)).square().mean((1, 2, 3))  # (B,)   || v_T - v_theta ||^2
                    task = (v - part.v).square().mean((1, 2, 3))  # (B,)   || (eps - x_0) - v_theta ||^2, of real points
                    ratio.add(task, kd, part.t, ~part.on_policy)
                    loss = distillation_loss(task, kd, part.t, part.on_policy, ratio(part.t), args.task_weight).mean()
                    means.add(loss_kd=kd)
                    means.add(loss_task=task, weights=(~part.on_policy).float())
                if adversarial:  # no hinge here: the student may please D as much as it can
                    loss_adv = -discriminator(*renoised(predicted, part)).mean()
                    loss = loss + ramp(step, args) * loss_adv
                    means.add(loss_adv=loss_adv)
                (loss / args.accumulate).backward()
            means.add(**collapse_alarm(predicted.detach(), part.x_0))
        norm, bad = clip_gradients(student.parameters(), 1.0)
        means.add(grad_norm=norm, skipped=bad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ratio.step()
        update_ema(ema, student, step, args.ema)
        bar.update()

        # ---- a row of log.csv; now and then score, draw, save
        due = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if not due and (step + 1) % EVERY:
            continue
        row, by_t = means.take()
        seconds = (time.perf_counter() - clock) / (step + 1 - last_row)  # a step
        bad_steps = bad_steps + step + 1 - last_row if max(row["skipped"], row.get("skipped_d", 0)) > 0.5 else 0
        last_row = step + 1
        rates = f"--lr {args.lr} or --heads-lr {args.heads_lr}"
        if bad_steps > 1:  # a row may cover a single step
            training.stop_on_nan(out, step, rates)
        if rank == 0:
            scores = few_step_scores(ema, config, encoders, args.watch) if due and scored else {}
            lr, rate = groups[0]["lr"], args.batch / seconds
            log.add(step=step + 1, pictures=(step + 1) * args.batch, **row, **by_t, **scores, lr=lr, pictures_per_second=rate)
            training.say_row(bar, step + 1, args.steps, row | scores, lr, rate, seconds)
        if rank == 0 and due:  # the state comes last: what a kill leaves undone before it is done again by --resume
            training.save_samples(out, step + 1, draw_pictures(ema, config, encoders, prompts, range(len(prompts))))
            plot(log, out, logits)
            save_network(out, ema, config | {"step": step + 1, "pictures_seen": (step + 1) * args.batch})
            save_state(out, step + 1, settings, [*optimizers, of_heads], **networks)
        if due:
            parallel.wait(patient=False)
        clock = time.perf_counter()
    bar.close()
    training.say_end(out)


def few_step_scores(model, config, encoders, per_family, seed=1):
    """mini-GenEval with 1, 2, 4 and 8 steps, without guidance. While training: of few prompts, to watch and not to report."""
    prompts = prompts_of("val", per_family, seed)
    pictures = {n: draw_pictures(model, config, encoders, prompts, range(len(prompts)), n, 1.0) for n in (1, 2, 4, 8)}
    return {f"score_{n}": score(pictures[n], prompts)["overall"] for n in pictures}


def plot(table, out, logits):
    """gan.png: what D says, the losses, the collapse alarm, the scores, and D's last logits."""

    def same(*names):
        return {name: name for name in names}

    last = {name: values[values.isfinite()].cpu() for name, values in logits.items()}
    curves(table, out / "gan.png", ("D: real above predicted, a small gap", same("d_real", "d_fake"), "linear"),
           ("losses", same("loss_kd", "loss_task", "loss_d", "loss_adv"), "linear"),
           ("collapse alarm: ratios near 1, gap near 0", same("std_ratio_low", "std_ratio_high", "mean_gap"), "linear"),
           ("mini-GenEval of few prompts", {f"{n} steps": f"score_{n}" for n in (1, 2, 4, 8)}, "linear"),
           histogram=("its last logits", last) if last else None)  # fmt: skip


def make_parser(doc=__doc__, example="python step_distill.py --init runs/distill --steps 600 --out runs/mine"):
    p = arguments.Parser(doc, example)
    arguments.add_model(p, init="the student of stage 2 to start from; default: runs/distill, or the zoo's if there is none",
                        teacher="SD3 folder: encoders and many-step transformer")  # fmt: skip
    p.add_argument("--turbo", metavar="DIR", help="few-step teacher, such as SD3.5-Large-Turbo's folder; default: an ODE solve")
    p.add_argument("--for-steps", type=integer(1), default=4, help="sampling steps to learn: 4 or 8 in the paper")
    # losses
    p.add_argument("--losses", choices=("adv", "kd", "adv+kd"), default="adv+kd", help="adversarial, distillation, or both")
    p.add_argument("--adv-weight", type=real(0), default=0.05, help="weight of the adversarial loss beside S(L_task, L_kd)")
    p.add_argument("--ramp", type=integer(0), default=100, help="steps without L_adv, and as many again in which its weight grows")
    p.add_argument("--task-weight", type=real(0, 1), default=1.0, help="a_t at most: below 1, real points always learn from both")
    p.add_argument("--real", choices=("data", "teacher"), default="data", help="D's real side: data, or where the target leads")
    p.add_argument("--wrong-captions", type=real(0), default=0.0, help="weight of real latents with wrong captions in D's loss")
    p.add_argument("--level-shift", type=real(0.1), default=1.0, help="shift of the noise level at which D looks")
    p.add_argument("--penalty", type=real(0), default=0.1, help="weight of the gradient penalty (R1) on the heads' inputs")
    p.add_argument("--layers", type=integer(), nargs="+", help="blocks that get a head; default: at 1/4, 1/2, the last")
    p.add_argument("--on-policy", type=real(0, 1), default=0.5, help="share of points below t = 1 on the student's way from noise")
    p.add_argument("--teacher-guidance", type=real(0), default=3.0, help="guidance of the ODE solve; it ends up inside the student")
    p.add_argument("--solver-steps", type=integer(1), default=8, help="Euler steps of the ODE solve from t = 1; fewer from below")
    arguments.add_data(p)
    arguments.add_training(p, steps=1500, batch=64, lr=LR, ema=0.995, seed="seed of heads, noise, timesteps, order of the data")
    p.add_argument("--heads-lr", type=real(0), default=1e-4, help="the heads' learning rate")
    arguments.add_run(p, out="runs/step_distill", save_every=250)
    p.add_argument("--watch", type=integer(0), default=10, help="prompts a family for the scores in log.csv; 0, or --data: none")
    return p


def parse_arguments(argv=None):
    return arguments.by_size(make_parser().parse_args(argv), lr=LR)


def main(argv=None):
    train(parse_arguments(argv))


if __name__ == "__main__":
    parallel.launch(main)
