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

import torch
import torch.nn.functional as F
from torch import nn

from common import arguments, parallel
from common.arguments import integer, real
from common.device import autocast, matmul_dtype
from common.figures import curves
from common.run import Run
from common.training import update_ema
from data import open_data, sample_prompts
from sample import draw_pictures
from teacher import Teacher
from train_fm import make_optimizers, noisy_batch, predict, sampling_settings, timestep_shift, validate

LR = 3e-3, 1e-4  # at class scale, at the paper's sizes [A]
WEIGHTING = "linear", "scaled"  # likewise

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


def combine(losses, t, ratios, args):
    """The training loss of each picture, (B,), from {"task": (B,), "out": (B,), "feat": (B,)}; the teacher's may be missing."""
    task, levels = losses["task"], [name for name in ("out", "feat") if name in losses]
    if not levels:
        return task
    if args.weighting == "scaled":  # L = S(L_task, L_kd) + S(L_task, L_feat)
        return sum(scaled(task, losses[name], t, ratios[name](t), args.task_weight) for name in levels)
    return task + sum(getattr(args, f"{name}_weight") * losses[name] for name in levels)


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


def make_projector(args, student, teacher, side):
    """phi from --student-layer to --teacher-layer, for latents of this side. Raises SystemExit if there is no such layer."""
    layers = student.features()
    if args.student_layer not in layers:
        raise SystemExit(f"the student has no layer {args.student_layer!r}; it has {', '.join(layers)}.")
    channels, coarser = layers[args.student_layer]
    return Projector(channels, side // coarser, teacher.feature_dim, side // teacher.patch)


# ------------------------------------------------------------------------------------------------------------------
# Training


def train(args):
    run = Run(args, "distill")
    student, ema, encoders = run.student(run.before("fm"))
    data, val = open_data(args, encoders)
    prompts, shift = sample_prompts(args, data), timestep_shift(args)
    run.config |= {"latent_size": list(data.shape[1:]), "sampling": sampling_settings(args)}
    teacher = projector = feature = None
    if "out" in args.losses:
        layer = "middle" if args.teacher_layer is None else args.teacher_layer
        teacher = Teacher(args.teacher, data, run.device, matmul_dtype(run.device), layers=(layer,))
    if "feat" in args.losses:
        feature, projector = args.student_layer, make_projector(args, student, teacher, data.shape[-1]).to(run.device)
    ratios = nn.ModuleDict()
    for name in args.losses.split("+")[1:]:
        ratios[name] = Ratio().to(run.device)
    optimizers = make_optimizers(student, args.lr, args.optimizer)
    phi_optimizers = make_optimizers(projector, args.lr, args.optimizer) if projector else []
    kept = {"model": student, "ema": ema, "ratios": ratios} | ({"projector": projector} if projector else {})
    parts = [*encoders.parts, "transformer"] if teacher else encoders.parts
    weights = {"teacher": encoders.fingerprint(*parts)} | ({"gemma": encoders.gemma.fingerprint()} if encoders.gemma else {})
    run.keep([*optimizers, *phi_optimizers], {"contents": data.name, **weights}, **kept)
    forward = run.wrap(student)
    if args.compile and teacher:
        teacher.compile()

    for step, batch in run.steps(lambda step: noisy_batch(data, args.seed, step, args.batch, shift, rows=run.rows)):
        for part in run.parts(batch):
            predicted = predict(forward, part, feature)
            predicted, f_theta = predicted if feature else (predicted, None)
            losses = {"task": (predicted - part.v).square().mean((1, 2, 3))}  # (B,)   || v_theta - v ||^2
            if teacher:
                v_teacher, (f_teacher,) = teacher(part.x_t, part.t, part.ids, args.teacher_guidance)
                losses["out"] = (predicted - v_teacher).square().mean((1, 2, 3))  # || v_T - v_theta ||^2
                run.log(cosine=F.cosine_similarity(predicted.flatten(1), v_teacher.flatten(1)))
            if projector:
                losses["feat"] = (projector(f_theta) - normalized(f_teacher)).square().mean((1, 2, 3))  # || f_T - phi(f_theta) ||^2
            for name, ratio in ratios.items():
                ratio.add(losses["task"], losses[name], part.t)
            loss = combine(losses, part.t, ratios, args)  # of each picture, as --weighting says
            run.backward(loss.mean())
            run.log(loss=loss, **{f"ratio_{name}": ratio(part.t) for name, ratio in ratios.items()})
            run.log(t=part.t, **{f"loss_{name}": value for name, value in losses.items()})
        run.step(optimizers, student)
        if projector:  # by itself: the student's step is not shorter because phi's gradient is long
            run.step(phi_optimizers, projector, name="grad_norm_phi")
        for ratio in ratios.values():
            ratio.step()
        update_ema(ema, student, step, args.ema)
        if run.due():
            run.save(ema, plot=plot, measure=lambda: {"val_loss": validate(ema, val, shift, run.device)},
                     samples=lambda: draw_pictures(ema, run.config, encoders, prompts, range(len(prompts))))  # fmt: skip


def plot(table, out):
    """loss.png: the three losses, the agreement with the teacher, the validation loss."""
    curves(table, out / "loss.png",
           ("the three levels, unscaled", {name: f"loss_{name}" for name in ("task", "out", "feat")}, "log"),
           ("agreement with the teacher", {"cosine to the teacher's velocity": "cosine"}, "linear"),
           ("validation", {"L_task, EMA": "val_loss"}, "linear"))  # fmt: skip


def make_parser(doc=__doc__, example="python distill.py --init runs/fm --steps 1000 --out runs/mine"):
    p = arguments.Parser(doc, example)
    arguments.add_model(p, init="the student of stage 1 to start from; default: runs/fm, or the zoo's if there is none",
                        teacher="SD3 folder: encoders and transformer")  # fmt: skip
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
    arguments.add_data(p)
    arguments.add_training(p, steps=2500, batch=64, lr=LR, seed="seed of phi, noise, timesteps and the data's order")
    arguments.add_run(p, out="runs/distill", save_every=500)
    return p


def parse_arguments(argv=None):
    args = arguments.by_size(make_parser().parse_args(argv), lr=LR, weighting=WEIGHTING)
    if args.weighting == "linear" and args.task_weight != 1:
        raise SystemExit("--task-weight is the most that a_t may be, and --weighting linear has no a_t: add --weighting scaled.")
    return args


def main(argv=None):
    train(parse_arguments(argv))


if __name__ == "__main__":
    parallel.launch(main)
