"""Failures made on purpose: healthy beside broken, from the same noise, and the number that tells.

    python -m studies.failures --list                      # what there is; is its figure up to date?
    python -m studies.failures                             # make all that are missing or of other weights
    python -m studies.failures fm_mask decoder_latents     # these
    python -m studies.failures --only-drawing              # those that train nothing: minutes
    python -m studies.failures distill_weights --steps 100     # a shorter training; the figure says so

Each failure is a stage's own code or command with one thing broken. Where a flag can break it, that is the
flag; else one named function is replaced while the figure is made (unittest.mock.patch). Failure.line is the
flag, or the line that would be wrong: the figures and the pages show it. The stages have no switches for it.

Writes assets/readme/failure_NAME.png. The weights that it was made of and the steps stand inside the
file: new weights in the zoo make those figures anew. Trainings and scores are kept under
runs/studies/failures/WEIGHTS, and go on where they were stopped.
"""

import argparse
import contextlib
import functools
import json
import math
import shlex
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

import decoder
import distill
import export_coreml
import flow
import step_distill
import train_fm
from common.arguments import Parser, add_device, integer
from common.checkpoint import load_student, save_atomically, save_json
from common.device import describe_machine, move, pick_device
from common.distances import psnr
from common.encoders import FrozenEncoders, hash_folders
from common.figures import pyplot
from common.pictures import to_pictures, to_tensor
from common.seeds import rng
from common.shapes import ShapesWorld
from common.training import BINS, Batch, Log, noisy_batch, predict
from coreml import layers
from coreml import mil_interpreter as mil
from coreml.compress import compress
from coreml.verify import decibels
from data import open_data
from decoder import load_decoder
from evaluate import FAMILIES, prompts_of, score
from sample import decode, draw_pictures
from studies.students import draw_with_teacher, encode_prompts, noise_for
from teacher import Teacher

TOY, ZOO = "assets/toy-sd3", Path("assets/zoo")
PROMPTS = [f"a photo of {what}" for what in (
    "a red circle", "two blue squares", "a star left of a triangle", "a green square", "three red triangles",
    "a purple star and a yellow circle")]  # fmt: skip
PER_FAMILY = 10  # prompts of each family for a score: enough to see a failure, not to report
HEALTHY, BROKEN, OVER_T = "#1f78b4", "#d7301f", "t (0: data, 1: noise)"


class Failure(NamedTuple):
    """One way to fail. make(args) returns (healthy pictures, broken pictures, captions, panel).

    panel(axis) draws what tells.
    """

    title: str  # what is wrong, for the figure
    line: str  # the changed line or flag
    make: object
    zoo: tuple  # what it takes from there: with other weights the figure is made again
    steps: int = 0  # of its training; 0: it trains nothing


# ----------------------------------------------------------------------------------------------------------
# What is drawn and measured, and kept


@functools.cache
def encoders(device):
    return FrozenEncoders(TOY, device)


@functools.cache
def student(stage, device):
    return load_student(ZOO / stage, device)


def draw(args, stage, prompts=PROMPTS, **how):
    """Pictures of the zoo's student, from the noise of seeds 0, 1, ..."""
    network, config = student(stage, args.device)
    return draw_pictures(network, config, encoders(args.device), prompts, range(len(prompts)), **how)


def kept(args, name, measure):
    """measure()'s value, from runs/studies/failures where it is there already."""
    path = args.work / f"{name}.json"
    if not path.is_file():
        save_json(measure(), path)
    return json.loads(path.read_text(encoding="utf-8-sig"))


def scores(args, name, stage, **how):
    """mini-GenEval of a few prompts, [a value for each family, overall]."""

    def measure():
        prompts = prompts_of("val", PER_FAMILY, 0)
        result = score(draw(args, stage, prompts, **how), prompts)
        return [result["families"][family]["score"] for family in FAMILIES] + [result["overall"]]

    return kept(args, f"score-{name}", measure)


def bars(title, names, healthy, broken):
    """A panel of pairs of bars."""

    def panel(axis):
        axis.bar(range(len(names)), healthy, 0.38, label="healthy", color=HEALTHY)
        axis.bar([i + 0.4 for i in range(len(names))], broken, 0.38, label="broken", color=BROKEN)
        axis.set_xticks([i + 0.2 for i in range(len(names))], names, rotation=35, ha="right")
        axis.set_title(title, fontsize=12)
        axis.margins(y=0.2)  # room for the legend above full bars
        axis.legend(fontsize=10, loc="upper center", ncols=2)

    return panel


def lines(title, xlabel, healthy, broken, scale="linear", limit=None):
    """A panel of curves, {label: [(x, y), ...]} for each side; the second of a side is dashed.

    `limit` (value, its name) is a dashed line.
    """

    def panel(axis):
        for some, color in ((healthy, HEALTHY), (broken, BROKEN)):
            for (label, points), style in zip(some.items(), ("o-", "s--"), strict=False):
                x, y = zip(*[(x, y) for x, y in points if math.isfinite(y)], strict=True)
                axis.plot(x, y, style, ms=4, label=label, color=color)
        if limit:
            axis.axhline(limit[0], ls="--", color="#555555", lw=1, label=limit[1])
        axis.set_yscale(scale)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel(xlabel)
        axis.legend(fontsize=10)

    return panel


def family_bars(args, name, stage, healthy=None, broken=None, patch=contextlib.nullcontext):
    """The panel of scores by family, healthy and broken; `patch` breaks the code, `broken` the settings."""
    good = scores(args, f"{stage}-healthy", stage, **healthy or {})
    with patch():
        bad = scores(args, name, stage, **broken or {})
    title = f"mini-GenEval of {6 * PER_FAMILY} prompts: {good[-1]:.2f} and {bad[-1]:.2f}"
    return bars(title, [*FAMILIES, "overall"], good, bad)


# ----------------------------------------------------------------------------------------------------------
# Stage 1


def without_mask():
    """FrozenEncoders.student_text that calls padding a word."""
    right = FrozenEncoders.student_text

    def student_text(self, captions, width):
        states, mask = right(self, captions, width)
        return states, torch.ones_like(mask)

    return mock.patch.object(FrozenEncoders, "student_text", student_text)


def wrong_way():
    """flow.shift_timesteps towards the data: the inverse of the right one."""
    return mock.patch.object(flow, "shift_timesteps", lambda t, shift: t / (shift - (shift - 1) * t))


def fm_mask(args):
    with without_mask():
        broken = draw(args, "fm")
    return draw(args, "fm"), broken, PROMPTS, family_bars(args, "fm-mask", "fm", patch=without_mask)


def fm_shift(args):
    def drawn_and_scored(name):
        points = [(n, scores(args, f"{name}-{n}", "fm", steps=n)[-1]) for n in (4, 8, 28)]
        return draw(args, "fm", steps=4), points

    healthy, good = drawn_and_scored("fm")
    with wrong_way():
        broken, bad = drawn_and_scored("fm-shift")
    title = f"mini-GenEval of {6 * PER_FAMILY} prompts"
    return healthy, broken, PROMPTS, lines(title, "steps", {"healthy": good}, {"broken": bad})


def fm_guidance(args):
    return (draw(args, "fm"), draw(args, "fm", guidance=10.0), PROMPTS,
            family_bars(args, "fm-guidance", "fm", broken={"guidance": 10.0}))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Trainings: the stage's own command, and the same with a flag


STAGES = {"fm": train_fm, "distill": distill, "decoder": decoder, "step_distill": step_distill}


def train(args, stage, flags, name, steps):
    """Train by the stage's own command, or go on with that: (folder or None, Log, "" or ", then NaN").

    A training that broke is what is wanted here: the stage says so and stops, and the last save is drawn.
    """
    module, out, ended = STAGES[stage], args.work / name, ""
    flags += f" --steps {steps} --save-every {max(1, steps // 5)} --out {out.as_posix()} --resume"
    flags += f" --device {args.device}"
    print(f"$ python {module.__name__}.py {flags}", flush=True)
    try:
        module.main(shlex.split(flags))
    except SystemExit as stopped:
        if "became NaN or infinite" not in str(stopped):
            raise
        ended = ", then NaN"
    log = Log(out / "log.csv", resume_step=10**9)
    return (out if (out / "model.safetensors").is_file() else None), log, ended


def beside(args, failure, stage, flags, broken_flags, title, columns, scale="linear"):
    """(healthy pictures, broken ones, captions, panel) of a training with and without `broken_flags`.

    `columns` of log.csv, one or two, make the panel: the second is dashed.
    """
    steps = args.steps or FAILURES[failure].steps
    runs = [train(args, stage, flags, f"{stage}-healthy-{steps}", steps),
            train(args, stage, f"{flags} {broken_flags}", f"{failure}-{steps}", steps)]  # fmt: skip
    pictures = [look(args, stage, run) for run, _, _ in runs]

    def logged(run, name):
        _, log, ended = run
        labels = [name + ended] if len(columns) == 1 else [f"{name}: {column}{ended}" for column in columns]
        points = [list(zip(log.column("step"), log.column(column), strict=True)) for column in columns]
        return dict(zip(labels, points, strict=True))

    curves = (logged(run, name) for run, name in zip(runs, ("healthy", "broken"), strict=True))
    panel = lines(f"log.csv: {title}", f"step of {steps}", *curves, scale)
    captions = PROMPTS if stage != "decoder" else [""] * len(PROMPTS)
    return *pictures, captions, panel


def look(args, stage, folder):
    """What a run draws: a student the prompts, a decoder six pictures; grey where nothing was saved."""
    if folder is None:
        return [Image.new("RGB", (64, 64), "#bbbbbb")] * len(PROMPTS)
    if stage == "decoder":
        return restored(args, load_decoder(folder, args.device)[0])[0][: len(PROMPTS)]
    network, config = load_student(folder, args.device)
    return draw_pictures(network, config, encoders(args.device), PROMPTS, range(len(PROMPTS)))


FM, FM_LR = "--pictures 4000", "--lr 0.1"
DISTILL = f"--init {ZOO.as_posix()}/fm --pictures 4000 --batch 16 --lr 1e-3 --weighting scaled"
WEIGHTS = "--weighting linear --out-weight 1 --feat-weight 1000"
DECODER, GAN = f"--init {ZOO.as_posix()}/decoder --gan-start 0", "--gan-weight 20"
STEPS = f"--init {ZOO.as_posix()}/distill --pictures 4000 --batch 32 --watch 0 --ramp 0"
WINS, ALONE = "--heads-lr 3e-3 --penalty 0", "--losses adv"

# ----------------------------------------------------------------------------------------------------------
# Stage 2: what the teacher says, before anything is trained


def time_from_0_to_1():
    """The teacher's transformer, asked at t instead of 1000 t."""
    right = SD3Transformer2DModel.forward

    def forward(self, *inputs, timestep, **others):
        return right(self, *inputs, timestep=timestep / 1000, **others)

    return mock.patch.object(SD3Transformer2DModel, "forward", forward)


def others_captions():
    """Teacher.text that forgets that caption 0 is the empty one: each caption is the one before it."""
    right = Teacher.text
    return mock.patch.object(Teacher, "text", lambda self, ids: right(self, ids - 1))


def agreement(args, name):
    """(L_kd, cosine) of the zoo's student of stage 1 and the teacher, [value for each fifth of t]."""

    @torch.no_grad()
    def measure():
        device = args.device
        data, _ = open_data(None, encoders(device), pictures=256)
        teacher, sums = Teacher(TOY, data, device), torch.zeros(BINS, 3, device=device)
        for step in range(4):
            batch = move(noisy_batch(data, 0, step, 64, shift=1.0, caption_dropout=0.0), device)
            v = predict(student("fm", device)[0], batch)
            v_teacher, _ = teacher(batch.x_t, batch.t, batch.ids)
            cosine = torch.cosine_similarity(v.flatten(1), v_teacher.flatten(1))
            kd = (v - v_teacher).square().mean((1, 2, 3))
            fifth = (batch.t * BINS).long().clamp(max=BINS - 1)
            sums.index_add_(0, fifth, torch.stack([kd, cosine, torch.ones_like(kd)], 1))
        return (sums[:, :2] / sums[:, 2:]).T.tolist()

    return kept(args, f"agreement-{name}", measure)


def from_the_teacher(args, name, patch, which, title):
    """What the teacher draws, right and broken, and L_kd (which 0) or the cosine (1) over t."""
    _, config = student("distill", args.device)
    folder, noise = argparse.Namespace(teacher=TOY), noise_for(PROMPTS, 0, config, encoders(args.device))

    def drawn():
        return draw_with_teacher(folder, encoders(args.device), PROMPTS, noise, config["sampling"]["shift"])

    healthy, good = drawn(), agreement(args, "healthy")[which]
    with patch():
        broken, bad = drawn(), agreement(args, name)[which]
    middles = [(i + 0.5) / BINS for i in range(BINS)]
    good, bad = (list(zip(middles, values, strict=True)) for values in (good, bad))
    panel = lines(title, OVER_T, {"healthy": good}, {"broken": bad}, "linear" if which else "log")
    return healthy, broken, PROMPTS, panel


# ----------------------------------------------------------------------------------------------------------
# Stage 3: the few-step target


def target_not_divided():
    """step_distill.target_velocity that returns the way from x_t to x0_T, and forgets its time t."""
    right = step_distill.target_velocity

    def target_velocity(teacher, turbo, x_t, t, *others):
        return flow.expand(t, x_t) * right(teacher, turbo, x_t, t, *others)

    return mock.patch.object(step_distill, "target_velocity", target_velocity)


@torch.no_grad()
def step_distill_target(args, count=32):
    """What a student would draw that has learned the target perfectly; L_kd of the zoo's at each start."""
    device, flags = args.device, step_distill.parse_arguments(["--pictures", "256"])
    (network, config), frozen = student("step_distill", device), encoders(device)
    shift, text = config["sampling"]["shift"], encode_prompts(PROMPTS, frozen)
    times = flow.sampling_timesteps(flags.for_steps, shift)
    teacher, noise = Teacher(TOY, text, device), noise_for(PROMPTS, 0, config, frozen)
    ids = torch.tensor([text.captions.index(prompt) for prompt in PROMPTS])
    data, _ = open_data(None, frozen, pictures=256, text_dim=network.cfg.text_dim)
    of_data, (x_0, which) = Teacher(TOY, data, device), data.batch(0, 0, count)
    states, mask = data.text(which)

    def drawn():
        def perfect(x, t):
            return step_distill.target_velocity(teacher, None, x, t, ids, flags, shift)

        return decode(frozen, flow.euler_sample(perfect, noise, (), (), guidance=1.0, times=times.tolist()))

    def losses(name):
        def measure():
            found = []
            for t in times[:-1]:
                t = t.expand(count)
                eps = torch.randn(x_0.shape, generator=rng(0))
                x_t = flow.interpolate(x_0, eps, t)
                batch = Batch(x_t.to(device), t.to(device), None, which, states.to(device), mask.to(device))
                target = step_distill.target_velocity(of_data, None, batch.x_t, batch.t, which, flags, shift)
                found.append((predict(network, batch) - target).square().mean().item())
            return found

        return list(zip(times[:-1].tolist(), kept(args, f"target-{name}", measure), strict=True))

    healthy, good = drawn(), losses("healthy")
    with target_not_divided():
        broken, bad = drawn(), losses("broken")
    panel = lines("loss_kd of a trained student", "start time t", {"healthy": good}, {"broken": bad}, "log")
    return healthy, broken, PROMPTS, panel


# ----------------------------------------------------------------------------------------------------------
# The decoder


@torch.no_grad()
def restored(args, network, latents=None, encode=lambda x: x, count=64):
    """(pictures, PSNR (count,)) of validation pictures through the frozen encoder and a decoder.

    `encode` changes what the encoder gets, `latents` what the decoder gets.
    """
    autoencoder = encoders(args.device)
    x = to_tensor([ShapesWorld("val", 0, 256)[i][0] for i in range(count)]).to(args.device)
    z = autoencoder.encode_pictures(encode(x))
    out = network.decode_latents(latents(z) if latents else z)
    return to_pictures(out), psnr(out, x)


def decoder_fed_wrongly(args, **wrong):
    network, _ = load_decoder(ZOO / "decoder", args.device)
    (healthy, good), (broken, bad) = restored(args, network), restored(args, network, **wrong)

    def panel(axis):
        for values, label, color in ((good, "healthy", HEALTHY), (bad, "broken", BROKEN)):
            label = f"{label}: {values.mean():.1f} dB"
            axis.hist(values.tolist(), bins=16, color=color, alpha=0.8, label=label)
        axis.set_title(f"PSNR of {len(good)} pictures, dB", fontsize=12)
        axis.legend(fontsize=10)

    n = len(PROMPTS)
    return healthy[:n], broken[:n], [""] * n, panel


def decoder_latents(args):
    scale, shift = encoders(args.device).scaling_factor, encoders(args.device).shift_factor
    return decoder_fed_wrongly(args, latents=lambda z: z / scale + shift)


# ----------------------------------------------------------------------------------------------------------
# The phone: float16 programs, interpreted


def converted(part, bits=16):
    """A Part's float16 program, as export_coreml.py makes it."""
    about = describe_machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        package = export_coreml.convert(part, about=about)
        path = Path(scratch) / "part.mlpackage"
        (package if bits == 16 else compress(package, bits)).save(str(path))
        return mil.read_package(path)


def unet_to_go():
    """(Part, config, text, mask) of the zoo's student of stage 3 for all prompts at once."""
    (network, config), frozen = student("step_distill", torch.device("cpu")), encoders(torch.device("cpu"))
    text, mask = frozen.student_text(PROMPTS, network.cfg.text_dim)
    part = export_coreml.unet_part(network, config["latent_size"][0], text, mask, len(PROMPTS), "ane")
    return part, config, text, mask.float()


def phone_draws(program, config, text, mask):
    """Pictures by the interpreted UNet and the teacher's decoder, from the noise of seeds 0, 1, ..."""

    def velocity(x, t, text, mask):
        return mil.run(program, {"latent": x, "t": t, "text": text, "mask": mask})["velocity"]

    frozen, sampling = encoders(torch.device("cpu")), config["sampling"]
    times = sampling.get("times") or flow.sampling_timesteps(sampling["steps"], sampling["shift"]).tolist()
    noise = noise_for(PROMPTS, 0, config, frozen)
    return decode(frozen, flow.euler_sample(velocity, noise, (text, mask), (), guidance=1.0, times=times))


@torch.no_grad()
def exactness(part, program, times):
    """[(t, decibels of the program's velocity beside PyTorch's)]"""
    found = []
    for t in times:
        inputs = part.inputs | {"t": torch.full_like(part.inputs["t"], t)}
        found.append((t, decibels(part.reference(*inputs.values()), mil.run(program, inputs)["velocity"])))
    return found


def two_programs(unet, right, wrong, limit, labels=("healthy", "broken")):
    """(pictures of both programs, captions, a panel of how exact they are over t); unet: of unet_to_go()."""
    part, config, *text = unet
    times = [0.05 + 0.1 * i for i in range(10)]
    good, bad = {labels[0]: exactness(part, right, times)}, {labels[1]: exactness(part, wrong, times)}
    panel = lines("decibels of the velocity", OVER_T, good, bad, limit=(export_coreml.FLOAT16_BAR, limit))
    return phone_draws(right, config, *text), phone_draws(wrong, config, *text), PROMPTS, panel


def phone_time(args):
    unet = unet_to_go()
    right = converted(unet[0])
    with mock.patch.object(export_coreml, "feeds_sine", lambda op: False):
        wrong = converted(unet[0])
    return two_programs(unet, right, wrong, "the bar")


def phone_bits(args, few=4):
    unet = unet_to_go()
    programs = converted(unet[0]), converted(unet[0], few)
    return two_programs(unet, *programs, "the bar of 16 bits", ("16 bits", f"{few} bits"))


def large_inside(network, times=300.0):
    """The same decoder with numbers `times` as large before each GroupNorm, as large networks have them.

    GroupNorm divides them away.
    """
    for block in network.modules():
        if isinstance(block, decoder.Block):
            block.body[2].weight.data *= times
    return network


def phone_groupnorm(args):
    """GroupNorm as PyTorch has it, in float16, beside coreml/layers.py's form, with large numbers inside."""
    latents, device = [], torch.device("cpu")
    draw_pictures(*student("fm", device), encoders(device), PROMPTS, range(len(PROMPTS)),
                  callback=lambda t, x, x0: latents.append(x0))  # fmt: skip
    network = large_inside(load_decoder(ZOO / "decoder")[0])
    right = converted(export_coreml.decoder_part(network, latents[-1].shape[-1]))
    with mock.patch.object(layers, "replace_modules", lambda net, kind, build: net):
        wrong = converted(export_coreml.decoder_part(network, latents[-1].shape[-1]))

    def drawn(program):
        return torch.cat([mil.run(program, {"latent": z})["picture"] for z in latents[-1].split(1)])

    def largest(program):  # of each operation, in float32: what float16 would have to hold
        steps = mil.step_by_step(program, {"latent": latents[-1][:1]}, "exact")
        values = [value.abs().max().item() for _, _, value in steps if value.is_floating_point()]
        return [(i / len(values), v) for i, v in enumerate(values) if v > 0]

    panel = lines("largest value of each operation", "share of the program", {"healthy": largest(right)},
                  {"broken": largest(wrong)}, "log", limit=(65504, "float16's largest"))  # fmt: skip
    healthy, broken = (to_pictures(drawn(program).nan_to_num(0.0) / 127.5 - 1) for program in (right, wrong))
    return healthy, broken, PROMPTS, panel


# ----------------------------------------------------------------------------------------------------------
# All of them

FAILURES = {
    "fm_mask": Failure("padding is attended to", "return states, torch.ones_like(mask)", fm_mask, ("fm",)),
    "fm_shift": Failure(
        "the shift in the wrong direction, 4 steps", "return t / (shift - (shift - 1) * t)", fm_shift,
        ("fm",)),
    "fm_guidance": Failure("too much guidance", "--guidance 10", fm_guidance, ("fm",)),
    "fm_lr": Failure(
        "a learning rate that is too high", f"train_fm.py {FM_LR}",
        lambda args: beside(args, "fm_lr", "fm", FM, FM_LR, "loss", ["loss"], "log"), (), 300),
    "decoder_latents": Failure(
        "latents without their scaling factor", "decoder(latents / scaling_factor + shift_factor)",
        decoder_latents, ("decoder",)),
    "decoder_range": Failure(
        "pictures from 0 to 1 for an encoder that knows -1 to 1", "encode_pictures((x + 1) / 2)",
        lambda args: decoder_fed_wrongly(args, encode=lambda x: (x + 1) / 2), ("decoder",)),
    "decoder_gan": Failure(
        "too much of the adversarial loss", f"decoder.py {GAN}",
        lambda args: beside(args, "decoder_gan", "decoder", DECODER, GAN, "val_psnr, dB", ["val_psnr"]),
        ("decoder",), 200),
    "distill_time": Failure(
        "the teacher is asked at t, not at 1000 t", "timestep=t.to(self.device, torch.float32)",
        lambda args: from_the_teacher(args, "time", time_from_0_to_1, 1, "cosine, student and teacher"),
        ("fm", "distill")),
    "distill_captions": Failure(
        "the teacher reads the captions of other pictures", "states, pooled = self.data.clip(ids - 1)",
        lambda args: from_the_teacher(args, "captions", others_captions, 0, "loss_out over t"),
        ("fm", "distill")),
    "distill_weights": Failure(
        "fixed weights, and features that drown the rest", f"distill.py {WEIGHTS}",
        lambda args: beside(args, "distill_weights", "distill", DISTILL, WEIGHTS, "grad_norm", ["grad_norm"],
                            "log"), ("fm",), 150),
    "step_distill_target": Failure(
        "a few-step target that is not divided by t", "return x_t - x0", step_distill_target,
        ("step_distill",)),
    "step_distill_discriminator": Failure(
        "a discriminator that wins", f"step_distill.py {WINS}",
        lambda args: beside(args, "step_distill_discriminator", "step_distill", STEPS, WINS,
                            "d_real and d_fake", ["d_real", "d_fake"]), ("distill",), 150),
    "step_distill_adversarial": Failure(
        "the adversarial loss alone", f"step_distill.py {ALONE}",
        lambda args: beside(args, "step_distill_adversarial", "step_distill", STEPS, ALONE,
                            "collapse alarm: mean_gap", ["mean_gap"]), ("distill",), 150),
    "phone_time": Failure(
        "the time embedding in float16", "FP16ComputePrecision(lambda op: True)", phone_time,
        ("step_distill",)),
    "phone_groupnorm": Failure(
        "GroupNorm written out in float16, large numbers inside", "self.decoder = decoder", phone_groupnorm,
        ("fm", "decoder")),
    "phone_bits": Failure(
        "too few bits a weight", "export_coreml.py --nbits 4", phone_bits, ("step_distill",)),
}  # fmt: skip


def figure(name, healthy, broken, captions, panel, about, out):
    """failure_NAME.png: two blocks of six pictures and the panel; `about` {word: text} goes into the file."""
    plt, failure = pyplot(), FAILURES[name]
    sheet = plt.figure(figsize=(13.3, 5.2), facecolor="white")
    sheet.suptitle(failure.title, fontsize=17, weight="bold", y=0.975)
    sides = (0.02, healthy, "healthy", HEALTHY), (0.345, broken, "broken", BROKEN)
    for left, pictures, word, color in sides:
        sheet.text(left + 0.155, 0.86, word, fontsize=14, color=color, ha="center")
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            axis = sheet.add_axes((left + 0.105 * (i % 3), 0.49 - 0.38 * (i // 3), 0.1, 0.27))
            axis.imshow(picture.resize((256, 256), Image.Resampling.BICUBIC))
            axis.set(xticks=[], yticks=[])
            words = textwrap.wrap(caption.removeprefix("a photo of "), 19)
            axis.set_title("\n".join(words), fontsize=9, pad=4)
    panel(sheet.add_axes((0.725, 0.2, 0.26, 0.6)))
    sheet.text(0.02, 0.03, failure.line, fontsize=12, family="monospace", color=BROKEN)
    save_atomically(lambda p: sheet.savefig(p, dpi=110, metadata=about), out)
    plt.close(sheet)


def up_to_date(path, about):
    """Whether the figure is there and was made of these weights, in so many steps."""
    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return all(picture.text.get(word) == text for word, text in about.items())


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m studies.failures fm_mask decoder_latents")
    p.add_argument("names", metavar="NAME", nargs="*", help=f"which: {', '.join(FAILURES)}; default: all")
    p.add_argument("--steps", type=integer(1), help="training steps of those that train; default: 150 to 300")
    p.add_argument("--only-drawing", action="store_true", help="leave out those that train")
    p.add_argument("--list", "--dry", action="store_true", help="only print what there is")
    p.add_argument("--force", action="store_true", help="make figures again that are there")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("assets/readme"), help="where to")
    add_device(p)
    args = p.parse_args(argv)
    if unknown := [name for name in args.names if name not in FAILURES]:
        raise SystemExit(f"there is no failure {unknown[0]!r}; there are {', '.join(FAILURES)}.")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    args.device = pick_device(args.device)
    for name in args.names or FAILURES:
        failure, path = FAILURES[name], args.out / f"failure_{name}.png"
        weights = hash_folders([Path(TOY), *(ZOO / stage for stage in failure.zoo)])
        args.work = Path("runs/studies/failures") / weights
        about = {"Weights": weights, "Steps": str(args.steps or failure.steps) if failure.steps else "0"}
        done = up_to_date(path, about)
        if args.list:
            kind = f"{about['Steps']} steps" if failure.steps else "draws"
            state = "up to date" if done else "to be made"
            print(f"{name:28}{kind:12}{state:12}{failure.title}: {failure.line}")
        elif done and not args.force:
            print(f"{path.as_posix()}: up to date")
        elif not (failure.steps and args.only_drawing):
            print(f"-- {name}: {failure.title}", flush=True)
            figure(name, *failure.make(args), about | {"Title": f"python -m studies.failures {name}"}, path)
            print(f"wrote {path.as_posix()}", flush=True)


if __name__ == "__main__":
    main()
