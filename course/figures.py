"""The paper's figures in our own drawing: SVG files for the pages, and for a teacher's slides.

    python -m course.figures                          # all of them, into assets/readme
    python -m course.figures ladder scaling           # these
    python -m course.figures --out slides --png       # as PNG files, 1920 pixels wide, into another folder

    unet                Fig. 2 (f)          the UNet with its stages, their parameters and MACs
    ladder              Fig. 2              panels (a) to (f): what a layer of each stage is made of
    flow                Sec. 3.3, no figure x_t, v and x_0' in a world of two pictures
    decoder             Fig. 4, Table 2     SD3's decoder beside the tiny one, layer by layer
    distillation        Fig. 5              three levels: task, output, features
    scaling             Fig. 6's idea       a_t over t: who teaches when
    step_distillation   Fig. 7              the loop of stage 3
    phone               Sec. 3.2, its end   text encoder, four Euler steps, decoder

Each is drawing_NAME.svg, 16:9, on a white ground. Every number of ours in them is computed from the code
(model.PRESETS, decoder.PRESETS, the defaults of the stages, the configs in assets/), and a test holds the
committed files against it. Letters are paths, so they look alike everywhere; the words stand in the file as
comments.

MEASURED lists the other figures of the pages and what makes each; failure_*.png: studies/failures.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import SD3Transformer2DModel
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch.utils.flop_counter import FlopCounterMode

import decoder
import distill
import flow
import step_distill
from common.arguments import Parser
from common.checkpoint import save_atomically
from common.figures import pyplot
from common.training import timestep_shift
from model import PRESETS, RMSNorm, UNet, ladder
from studies.decoder import build as build_decoder
from studies.decoder import count
from studies.sizes import count as count_unet
from studies.sizes import count_parts

TOY = Path("assets/toy-sd3")  # the class-scale teacher
LATENT = 128  # side of the latent of a 1024-pixel picture
PHONE = {"UNet, a step": 274, "decoder": 119}  # ms on an iPhone 16 Pro Max [P]
CONV, SELF, TEXT, FEED = "#a6cee3", "#fdc086", "#b2df8a", "#fff3a8"
STUDENT, TEACHER, DATA, LOSS, CHANGED = "#a6cee3", "#d4bfe0", "#e4e4e4", "#fbb4ae", "#d7301f"
INK = "#222222"

# ----------------------------------------------------------------------------------------------------------
# A sheet of 160 x 90, boxes and arrows


def sheet(title):
    """(figure, axis) of a white sheet of 160 x 90 units without scales, from the lower left corner."""
    plt = pyplot()
    figure = plt.figure(figsize=(12.8, 7.2), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 160), ylim=(0, 90))
    axis.axis("off")
    write(axis, 80, 85, title, 20, weight="bold")
    return figure, axis


def write(axis, x, y, text, size=14, color=INK, **kwargs):
    """Text with its middle at (x, y)."""
    kwargs = {"ha": "center", "va": "center", "linespacing": 1.35} | kwargs
    axis.text(x, y, text, fontsize=size, color=color, **kwargs)


def box(axis, x, y, width, height, text="", color="white", size=14, changed=False, **kwargs):
    """A box with its lower left corner at (x, y); `changed` gives it a red edge."""
    edge = dict(edgecolor=CHANGED, linewidth=2.6) if changed else dict(edgecolor=INK, linewidth=1.0)
    style = "round,pad=0,rounding_size=1"
    axis.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=color, **edge))
    write(axis, x + width / 2, y + height / 2, text, size, **kwargs)


def row(axis, x, y, pitch, width, height, texts, color, size, changed=()):
    """Boxes side by side, `pitch` apart; `changed` are the numbers of those with a red edge."""
    for i, text in enumerate(texts):
        box(axis, x + pitch * i, y, width, height, text, color, size, changed=i in changed)


def arrow(axis, start, end, text="", at=(0, 2.4), size=13, color=INK, dashed=False, bend=0.0):
    """An arrow between two points, and a text beside its middle, `at` away from it."""
    line = dict(arrowstyle="-|>", linestyle="--" if dashed else "-", linewidth=1.6, mutation_scale=16)
    way = dict(connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0)
    axis.add_patch(FancyArrowPatch(start, end, color=color, **line, **way))
    if text:
        write(axis, (start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1], text, size, color)


def arrows(axis, *ways):
    """Plain arrows, each (start, end)."""
    for start, end in ways:
        arrow(axis, start, end)


def million(n):
    """1379000 -> "1.38 M"; three digits that count."""
    return f"{n / 1e6:.1f} M" if n >= 1e7 else f"{n / 1e6:.2f} M"


def giga(macs):
    return f"{macs / 1e9:.0f} GMACs"


# ----------------------------------------------------------------------------------------------------------
# The UNet


def on_meta(cfg):
    """A UNet without weights."""
    with torch.device("meta"):
        return UNet(cfg)


def pieces(net, stage):
    """What a layer of a down stage is made of: ([(name, detail, color)], number of its transformer blocks).

    Read off the network. The ResBlock comes first, if there is one; then the parts of one transformer block.
    """
    layer, found, depth = net.down[stage].layers[-1], [], 0
    if layer.resblock is not None:
        conv, detail = layer.resblock.conv1, "3x3"
        if isinstance(conv, torch.nn.Sequential):
            wider = conv[-1].out_channels // conv[0].in_channels
            detail = f"sep x{wider}" if wider > 1 else "sep"
        found.append(("Conv", detail, CONV))
    if layer.transformer is not None:
        block, depth = layer.transformer.blocks[0], len(layer.transformer.blocks)
        for name, attention, color in (("SA", block.attn1, SELF), ("CA", block.attn2, TEXT)):
            if attention is not None:
                detail = "1 key" if attention.multi_query else "heads"
                if isinstance(attention.norm_q, RMSNorm):
                    detail = "RoPE" if name == "SA" and net.cfg.rope else "RMS"
                found.append((name, detail, color))
        found.append(("FFN", f"x{block.ff.proj_out.in_features // block.ff.proj_out.out_features}", FEED))
    return found, depth


def draw_unet():
    cfg = PRESETS["t2i"]
    net, parts = on_meta(cfg), count_parts(cfg, LATENT)
    params, macs = count_unet(cfg, LATENT)
    size = f"{LATENT} x {LATENT}"
    figure, axis = sheet(f"The UNet: {params / 1e6:.0f} M parameters, {giga(macs)} at a {size} latent")
    left, right, wide, high = 9, 95, 56, 14
    down, up = left + wide / 2, right + wide / 2  # the middles of both columns
    bottoms, last = (60, 39, 18), len(cfg.channels) - 1

    def stage(x, y, i, part, layers):
        (made, depth), (n, m), side = pieces(net, i), parts[part], LATENT // 2**i
        attends = [name for name, _, _ in made if name != "Conv"]
        inside = f"{'ResBlock, ' if made[0][0] == 'Conv' else ''}{depth} x [{', '.join(attends)}]"
        text = f"{cfg.channels[i]} channels, {side} x {side}\n{layers} layers: {inside}\n"
        text += f"{million(n)},  {giga(m)}"
        box(axis, x, y, wide, high, text, SELF if "SA" in attends else TEXT, 13.5)

    for i, y in enumerate(bottoms):
        stage(left, y, i, f"down.{i}", cfg.layers)
        stage(right, y, i, f"up.{last - i}", cfg.layers + 1)
        arrow(axis, (left + wide, y + high / 2), (right, y + high / 2), f"{cfg.layers + 1} skips", size=12)
        if i < last:
            below = bottoms[i + 1] + high
            arrow(axis, (down, y), (down, below), "half the side", (11, 0), 12)
            arrow(axis, (up, below), (up, y), "twice the side", (11, 0), 12)
    write(axis, 80, 56.5, "SA: self-attention\nCA: attention to text\nFFN: feed-forward", 12)
    middle = sum(parts[f"mid.{i}"][0] for i in range(3))
    depth = len(net.mid[1].blocks)
    text = f"middle: ResBlock, {depth} x transformer block, ResBlock;  {million(middle)}"
    box(axis, 44, 2, 72, 9, text, SELF, 12)
    arrow(axis, (down, bottoms[last]), (44, 6.5), bend=0.25)
    arrow(axis, (116, 6.5), (up, bottoms[last]), bend=0.25)
    write(axis, down, 79, f"$x_t$: {cfg.latent_channels} x {size}", 14)
    write(axis, up, 79, f"$v$: {cfg.latent_channels} x {size}", 14)
    arrows(axis, ((down, 77.3), (down, bottoms[0] + high)), ((up, bottoms[0] + high), (up, 77.3)))
    write(axis, 80, 77.5, f"$t$: {cfg.time_dim} numbers\ntext: tokens x {cfg.text_dim}", 12)
    return figure


PANELS = {
    "a": "a thin, short SDXL",
    "b": "self-attention in stage 3 only",
    "c2": "separable, widened convolutions",
    "d2": "FFN x3; one key for all heads",
    "e": "text in stage 1, no convolution",
    "f": "RMSNorm on q and k; RoPE",
}


def draw_ladder():
    figure, axis = sheet("Six panels, one change after the other")
    before = None
    for k, (step, title) in enumerate(PANELS.items()):
        x, y = 4 + 52 * (k % 3), (46, 6)[k // 3]
        cfg = ladder(step)
        net, (params, macs) = on_meta(cfg), count_unet(cfg, LATENT)
        made = [pieces(net, i) for i in range(len(cfg.channels))]
        write(axis, x, y + 32, f"({step[0]}) {title}", 13, weight="bold", ha="left")
        for i, (parts, depth) in enumerate(made):
            bottom, at = y + 22 - 9 * i, x + 3.5
            write(axis, x + 1, bottom + 3.5, str(i + 1), 13)
            known = {name: detail for name, detail, _ in before[i][0]} if before else None
            for name, detail, color in parts:
                changed = known is not None and known.get(name) != detail
                box(axis, at, bottom, 9.6, 7, f"{name}\n{detail}", color, 10.5, changed, linespacing=1.15)
                at += 10.2
            gone = [f"no {name}" for name in known or () if name not in {name for name, _, _ in parts}]
            words = "  ".join([f"x {depth}" if depth > 1 else "", *gone]).strip()
            write(axis, at, bottom + 3.5, words, 11, CHANGED if gone else INK, ha="left")
        write(axis, x, y - 0.5, f"{params / 1e6:.0f} M parameters, {giga(macs)}", 13, ha="left")
        before = made
    write(axis, 80, 1.5, "1, 2, 3: a layer of each stage.  SA: self-attention.  CA: attention to text.  "
          f"x n: transformer blocks.  GMACs: {LATENT} x {LATENT} latent.  Red: changed.", 11)  # fmt: skip
    return figure


# ----------------------------------------------------------------------------------------------------------
# Flow matching, in a world of two pictures


def two_pictures(x, t, *text):
    """The exact velocity where the data are -1 and 1, equally often: (x_t - E[x_0 | x_t]) / t, (N, 1, 1, 1).

    E[x_0 | x_t] = tanh((1 - t) x_t / t^2), from two Gaussians of deviation t around (1 - t) and -(1 - t).
    """
    t = flow.expand(t, x)
    return (x - torch.tanh((1 - t) * x / t**2)) / t


def way(x, steps):
    """(times (steps + 1,), x_t and predicted x_0 (steps + 1, N)) on the way from the noise x (N,)."""
    walk = flow.euler_steps(two_pictures, x.view(-1, 1, 1, 1), (), (), steps, guidance=1.0)
    times, noisy, clean = zip(*walk, strict=True)
    return torch.tensor(times), torch.cat(noisy).view(steps + 1, -1), torch.cat(clean).view(steps + 1, -1)


def draw_flow():
    figure, axis = sheet("A world of two pictures, -1 and 1: from noise (left) to data (right)")
    panels = [figure.add_axes((0.06 + 0.32 * i, 0.2, 0.27, 0.58)) for i in range(3)]
    noise = torch.erfinv(torch.linspace(-0.97, 0.97, 24)) * 2**0.5  # quantiles of N(0, 1)
    for panel in panels:
        panel.set(xlim=(1.03, -0.06), ylim=(-2.5, 2.5), yticks=(-1, 0, 1), xticks=(1, 0.5, 0))
        panel.tick_params(labelsize=13)
        panel.plot([0, 0], [-1, 1], "o", color=INK, ms=11, zorder=5, clip_on=False)
    for i, eps in enumerate(noise):
        panels[0].plot([1, 0], [eps, 1 - 2 * ((7 * i // 3) % 2)], color="#bbbbbb", lw=0.8)
    x0, eps, t = torch.tensor([1.0]), torch.tensor([-1.6]), torch.tensor([0.55])
    x_t, v = flow.interpolate(x0, eps, t).item(), flow.velocity(x0, eps).item()
    panels[0].plot([1, 0], [eps, x0], color="#1f78b4", lw=2.5)
    panels[0].plot(t, x_t, "o", color=CHANGED, ms=11, zorder=6)
    head = dict(arrowstyle="-|>", mutation_scale=22, color=CHANGED, lw=2.5, shrinkA=0, shrinkB=0)
    panels[0].annotate("", (t.item() + 0.27, x_t + 0.27 * v), (t.item(), x_t), arrowprops=head, zorder=6)
    ground = dict(facecolor="white", edgecolor="none", alpha=0.85, pad=1)
    label = dict(fontsize=15, color=CHANGED, bbox=ground)
    panels[0].text(0.5, x_t - 0.45, "$x_t$", **label)
    panels[0].text(0.74, -1.5, "$v$", **label)
    panels[0].text(0.97, -2.1, r"$\epsilon$", **label | {"color": "#1f78b4"})
    panels[0].text(0.12, 1.3, "$x_0$", **label | {"color": "#1f78b4"})
    times, ways, _ = way(noise, 28)
    for k in range(len(noise)):
        panels[1].plot(times, ways[:, k], color="#1f78b4" if ways[-1, k] > 0 else "#e08214", lw=1.3)
    start = torch.tensor([0.7])
    for steps, color in ((1, "#e08214"), (4, CHANGED)):
        times, ways, clean = way(start, steps)
        name = f"{steps} step{'s' * (steps > 1)}"
        panels[2].plot(times, ways[:, 0], "o-", color=color, lw=2.5, ms=7, label=name, zorder=4)
        for j in range(steps if steps > 1 else 0):
            panels[2].plot([times[j], 0], [ways[j, 0], clean[j, 0]], "--", color=color, lw=1)
    panels[2].legend(fontsize=13, loc="lower left", frameon=False)
    panels[2].text(0.2, -0.42, "$x_0'$", **label)
    titles = ("learned: straight lines,\n$v = \\epsilon - x_0$ at $x_t = (1 - t)\\, x_0 + t\\, \\epsilon$",
              "drawn: the average velocity of\nall lines through a point, 28 steps",
              "one step lands on $x_0' = x_t - t\\, v$,\nthe average: no picture")  # fmt: skip
    for panel, text in zip(panels, titles, strict=True):
        panel.set_title(text, fontsize=13, pad=9, linespacing=1.35)
        panel.set_xlabel("t", fontsize=14)
    write(axis, 80, 5, "dashed: the picture $x_0'$ that each of the four steps believes in.  "
          "Computed by flow.py, with the exact velocity of this world.", 12.5)  # fmt: skip
    return figure


# ----------------------------------------------------------------------------------------------------------
# The decoder


def macs_of(net, *inputs):
    """{module name: MACs} of one forward on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        net(*inputs)
    name, found = type(net).__name__, counter.get_flop_counts()
    return {key.removeprefix(f"{name}."): sum(kinds.values()) // 2 for key, kinds in found.items()}


def stages_of_sd3(net, macs):
    """[(channels, side of its blocks, text, MACs)] of diffusers' decoder, from the latent to the picture."""
    blocks = len(net.mid_block.resnets)
    width = net.conv_in.out_channels
    rows = [(width, LATENT, f"{blocks} blocks, attention", macs["conv_in"] + macs["mid_block"])]
    side = LATENT
    for i, up in enumerate(net.up_blocks):
        text = f"{len(up.resnets)} blocks" + (", up" if up.upsamplers else "")
        rows.append((up.resnets[-1].out_channels, side, text, macs[f"up_blocks.{i}"]))
        side *= 2 if up.upsamplers else 1
    rows[-1] = (*rows[-1][:3], rows[-1][3] + macs["conv_out"])
    return rows


def stages_of_ours(net, macs):
    """The same of a TinyDecoder."""
    rows, side, width, blocks, spent = [], LATENT, net.cfg.channels[0], 0, 0
    for i, layer in enumerate(net.layers):
        if isinstance(layer, decoder.Upsample):
            rows.append((width, side, f"{blocks} block{'s' * (blocks > 1)}, up", spent + macs[f"layers.{i}"]))
            width, side, blocks, spent = layer.conv.out_channels, 2 * side, 0, 0
            continue
        blocks, spent = blocks + isinstance(layer, decoder.Block), spent + macs.get(f"layers.{i}", 0)
    return [*rows, (width, side, f"{blocks} block{'s' * (blocks > 1)}", spent)]


def draw_decoder():
    latent_size, size = f"{LATENT} x {LATENT}", f"{8 * LATENT} x {8 * LATENT}"
    figure, axis = sheet(f"Two decoders for one latent: {latent_size} to {size} pixels")
    with torch.device("meta"):
        networks = {"SD3's decoder": build_decoder("SD3"), "the tiny decoder": build_decoder("SnapGen")}
        latent = torch.empty(1, 16, LATENT, LATENT)
    for x, (name, net), read in zip((4, 84), networks.items(), (stages_of_sd3, stages_of_ours), strict=True):
        params, macs = count(net, latent)
        write(axis, x + 36, 77, f"{name}: {million(params)} parameters, {giga(macs)}", 14, weight="bold")
        write(axis, x + 25, 70.5, f"latent, {latent.shape[1]} x {latent_size}", 12.5)
        rows = read(net, macs_of(net, latent))
        for k, (channels, side, text, spent) in enumerate(rows):
            y, wide = 57.5 - 11 * k, 50 * channels / 512
            arrow(axis, (x + 25, y + 11.2 if k == 0 else y + 11), (x + 25, y + 8.2))
            attends = "attention" in text
            box(axis, x + 25 - wide / 2, y, wide, 8, "", SELF if attends else CONV, changed=attends)
            if wide > 24:  # room for words inside
                write(axis, x + 25, y + 4, f"{channels} channels:\n{text}", 11.5)
            else:
                write(axis, x + 26.5 + wide / 2, y + 4, f"{channels}: {text}", 11.5, ha="left")
            write(axis, x + 54, y + 4, f"{side} x {side}\n{giga(spent)}", 11.5, ha="left")
        bottom = 57.5 - 11 * (len(rows) - 1)
        arrow(axis, (x + 25, bottom), (x + 25, bottom - 3))
        write(axis, x + 25, bottom - 5.2, f"picture, 3 x {size}", 12.5)
    write(axis, 120, 10.5, "no attention · one GroupNorm a block, none elsewhere\n"
          "thinner, separable convolutions in the blocks\n"
          "fewer blocks at high resolution · no 1x1 beside a block", 12.5)  # fmt: skip
    write(axis, 80, 2.2, "A box is as wide as its channels. Beside it: its side, its multiply-accumulates, "
          "upsampling included.", 11)  # fmt: skip
    return figure


# ----------------------------------------------------------------------------------------------------------
# Teachers


def toy_teacher():
    """(config of the class-scale transformer, its parameters)."""
    config = json.loads((TOY / "transformer" / "config.json").read_text(encoding="utf-8-sig"))
    with torch.device("meta"):
        net = SD3Transformer2DModel.from_config(config)
    return config, sum(p.numel() for p in net.parameters())


def draw_distillation():
    config, params = toy_teacher()
    n, flags, net = config["num_layers"], distill.parse_arguments([]), on_meta(PRESETS["tiny"])
    layer, asked = flags.student_layer, flags.teacher_layer
    channels, _ = net.features()[layer]
    taken = n // 2 if asked is None else asked % n
    figure, axis = sheet("Three levels: the data, the teacher's answer, the teacher's features")
    box(axis, 4, 33, 19, 24, "$x_t$, $t$, text\n\nof one batch,\nfor both", DATA, 13)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text = f"teacher, frozen: a transformer, {n} blocks of {width} channels, {million(params)}"
    write(axis, 74, 77, text, 14)
    row(axis, 32, 63, 84 / n, 84 / n - 2, 10, range(1, n + 1), TEACHER, 13, [taken])
    names = [f"down.{i}" for i in range(3)] + ["mid"] + [f"up.{i}" for i in range(3)]
    number = sum(p.numel() for p in net.parameters())
    write(axis, 74, 10, f"student: the UNet, {million(number)}", 14)
    at = next(i for i, name in enumerate(names) if layer.startswith(f"{name}."))
    row(axis, 32, 15, 12, 10, 10, names, STUDENT, 12.5, [at])
    arrows(axis, ((23, 52), (31.5, 67)), ((23, 38), (31.5, 21)))
    above, below = 32 + 84 / n * (taken + 0.5) - 1, 32 + 12 * at + 5
    box(axis, 70, 33, 28, 9, f"$\\phi$: {channels} to {width} channels", "white", 13)
    arrow(axis, (below, 25), (below, 33), "$f_\\theta$", (3, 0), 14)
    box(axis, 64, 48, 36, 9, r"$L_{feat} = \|f_T - \phi(f_\theta)\|^2$", LOSS, 14)
    arrow(axis, (84, 42), (84, 48))
    arrow(axis, (above, 63), (above, 57), "$f_T$", (3, 0), 14)
    box(axis, 120, 63, 14, 10, "$v_T$", TEACHER, 16)
    box(axis, 120, 15, 14, 10, r"$v_\theta$", STUDENT, 16)
    arrows(axis, ((114, 68), (120, 68)), ((114, 20), (120, 20)))
    box(axis, 108, 39, 38, 9, r"$L_{kd} = \|v_T - v_\theta\|^2$", LOSS, 14)
    arrows(axis, ((127, 63), (127, 48)), ((127, 25), (127, 39)))
    box(axis, 120, 2.5, 36, 7.5, r"$L_{task} = \|v_\theta - (\epsilon - x_0)\|^2$", LOSS, 12.5)
    arrow(axis, (127, 15), (127, 10))
    write(axis, 50, 4, f"red: {layer} of the student, block {taken + 1} of the teacher [A]", 12, CHANGED)
    write(axis, 147, 57, "same latents,\nsame velocity", 12.5)
    text = f"$L = L_{{task}} + {flags.out_weight:g}\\, L_{{kd}}$\n"
    text += f"     $+\\, {flags.feat_weight:g}\\, L_{{feat}}$"
    write(axis, 46, 44, text, 14)
    return figure


def class_shift():
    """s of the sampling shift that stages 2 and 3 take at class scale."""
    args = distill.parse_arguments([])
    return timestep_shift(args.size, args.resolution)


def draw_scaling():
    figure, axis = sheet("Who teaches when: $a_t$ over t")
    panel = figure.add_axes((0.09, 0.17, 0.86, 0.66))
    t = torch.linspace(0, 1, 401)
    a = distill.timestep_weight(t)
    panel.fill_between(t, 0, a, color=STUDENT)
    panel.fill_between(t, a, 1, color=TEACHER)
    panel.plot(t, a, color=INK, lw=2)
    panel.set(xlim=(0, 1), ylim=(0, 1.0), xticks=(0, 0.25, 0.5, 0.75, 1), yticks=(0, 0.5, 1))
    panel.tick_params(labelsize=14, pad=9)
    panel.set_xlabel("t    (0: data, 1: noise)", fontsize=15)
    middle = dict(ha="center", va="center", linespacing=1.4)
    panel.text(0.5, 0.35, "learns from the data:\n$a_t\\, L_{task}$", fontsize=18, **middle)
    panel.text(0.16, 0.88, "learns from the teacher:\n$(1 - a_t)$ ratio $L_{kd}$", fontsize=16, **middle)
    times = flow.sampling_timesteps(step_distill.parse_arguments([]).for_steps, class_shift())[:-1]
    weights = distill.timestep_weight(times)
    panel.plot(times, weights, "o", color=CHANGED, ms=10, clip_on=False, zorder=5)
    for time, weight in zip(times.tolist(), weights.tolist(), strict=True):
        x, y, side = time - (0.07 if weight < 0.05 else 0.02), max(weight, 0.05), "right"
        if weight > 0.95:
            x, y, side = time, 0.92, "center"
        panel.text(x, y, f"t = {time:g}: {weight:.2f}", fontsize=14, color=CHANGED, ha=side, va="center")
    write(axis, 80, 3, "red: the start times of stage 3. The ratio is $L_{task} / L_{kd}$: "
          "both parts get the same size.", 12.5)  # fmt: skip
    return figure


def draw_step_distillation():
    config, _ = toy_teacher()
    n, flags = config["num_layers"], step_distill.parse_arguments([])
    times = [f"{t:g}" for t in flow.sampling_timesteps(flags.for_steps, class_shift())[:-1].tolist()]
    layers = sorted({n // 4, n // 2, n - 1})
    width = config["num_attention_heads"] * config["attention_head_dim"]
    seen = SimpleNamespace(feature_dim=width, layers=layers)  # what a Discriminator asks of a teacher
    heads = sum(p.numel() for p in step_distill.Discriminator(seen).parameters())
    figure, axis = sheet(f"One training step of stage 3: a student for {flags.for_steps} steps")
    box(axis, 3, 62, 26, 13, "real latent $x_0$\nand noise $\\epsilon$", DATA, 14)
    text = f"$x_t$ at t = {', '.join(times[:2])},\n{', '.join(times[2:])}: noised $x_0$,\nor on policy"
    box(axis, 3, 35, 26, 15, text, DATA, 12)
    arrow(axis, (16, 62), (16, 50))
    box(axis, 40, 36, 20, 13, "student\nUNet", STUDENT, 15)
    arrow(axis, (29, 42.5), (40, 42.5))
    box(axis, 71, 36, 26, 13, "$x_0' = x_t - t\\, v_\\theta$\none picture", STUDENT, 14)
    arrow(axis, (60, 42.5), (71, 42.5), r"$v_\theta$", size=15)
    text = (f"few-step target: a turbo teacher, or {flags.solver_steps} steps\n"
            f"of the teacher, guidance {flags.teacher_guidance:g}, from the same $x_t$")  # fmt: skip
    box(axis, 3, 5, 57, 14, text, TEACHER, 13)
    arrow(axis, (12, 35), (12, 19))
    box(axis, 71, 5, 26, 14, r"$L_{kd} = \|v_T - v_\theta\|^2$", LOSS, 13.5)
    arrow(axis, (60, 12), (71, 12), "$v_T$", size=15)
    arrow(axis, (65, 42.5), (74, 19), r"$v_\theta$", (-4, -1), 15)
    box(axis, 71, 62, 26, 13, "noise both again,\nto one random level", "white", 13.5)
    arrow(axis, (29, 68.5), (71, 68.5), "$x_0$: real", size=14)
    arrow(axis, (84, 49), (84, 62), "$x_0'$: predicted", (12, 0), 14)
    box(axis, 112, 52, 44, 23, "", TEACHER)
    write(axis, 134, 71.5, "discriminator: frozen teacher", 13.5)
    row(axis, 114.5, 61, 39.5 / n, 39.5 / n - 1, 7, range(1, n + 1), "white", 12, layers)
    write(axis, 134, 56.5, f"{len(layers)} heads learn, {heads / 1e3:.0f} thousand weights", 12, CHANGED)
    arrow(axis, (97, 68.5), (112, 68.5))
    box(axis, 112, 34, 21, 12, "$L_D$: real > 1,\npredicted < -1", LOSS, 12.5)
    box(axis, 135, 34, 21, 12, "$L_{adv}$ =\n$-\\,E\\,[\\,D(x_0')\\,]$", LOSS, 12.5)
    arrows(axis, ((122.5, 52), (122.5, 46)), ((145.5, 52), (145.5, 46)))
    arrow(axis, (145.5, 34), (92, 36), color=CHANGED, dashed=True, bend=-0.3)
    write(axis, 120, 22.5, "gradient, through the teacher", 12.5, CHANGED)
    write(axis, 134, 10.5, f"student: $S(L_{{task}}, L_{{kd}})$ + {flags.adv_weight:g} $L_{{adv}}$\n"
          f"heads: $L_D$ + {flags.penalty:g} R1", 13.5)  # fmt: skip
    return figure


# ----------------------------------------------------------------------------------------------------------
# The phone


def draw_phone():
    cfg, side, steps = PRESETS["t2i"], LATENT, step_distill.parse_arguments([]).for_steps
    params, macs = count_unet(cfg, side)
    with torch.device("meta"):
        small = count(build_decoder("SnapGen"), torch.empty(1, cfg.latent_channels, side, side))
    times = flow.sampling_timesteps(steps, flow.resolution_shift(8 * side)).tolist()
    whole = steps * PHONE["UNet, a step"] + PHONE["decoder"]
    figure, axis = sheet(f"On the phone: {steps} steps, then one decoder")
    box(axis, 3, 55, 30, 14, '"a photo of\na red circle"', "white", 14)
    box(axis, 3, 30, 30, 15, f"text encoders, once\ntokens x {cfg.text_dim}", TEXT, 14)
    arrow(axis, (18, 55), (18, 45), "tokens", (7, 0), 13)
    box(axis, 44, 24, 72, 51, "", "#f5f5f5")
    text = f"UNet, {steps} times: {million(params)}, {2 * params / 1e6:.0f} MB in float16"
    write(axis, 80, 71, text, 13.5, weight="bold")
    wide = 68 / steps
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = 46 + wide * i
        box(axis, x + 0.6, 42, wide - 4.2, 19, f"t = {t:g}\nto\n{s:g}", STUDENT, 13.5)
        if i < steps - 1:
            arrow(axis, (x + wide - 3.6, 51.5), (x + wide + 0.6, 51.5))
    write(axis, 80, 36, "$x_s = x_t + (s - t)\\, v$:  no guidance, one forward a step", 13)
    write(axis, 80, 29, f"latent {cfg.latent_channels} x {side} x {side},  {giga(macs)} a step", 13)
    arrow(axis, (33, 37.5), (44, 37.5), "text,\nmask", (0, 4.6), 12)
    write(axis, 38.5, 62, r"noise $\epsilon$", 13)
    arrow(axis, (37, 60), (46.6, 51.5))
    text = f"tiny decoder\n{million(small[0])}\n{2 * small[0] / 1e6:.1f} MB\n{giga(small[1])}"
    box(axis, 127, 40, 30, 21, text, SELF, 13)
    arrow(axis, (46 + wide * steps - 3.6, 51.5), (127, 51.5), "$x_0$", (3.5, 2.6), 14)
    box(axis, 127, 17, 30, 12, f"picture\n3 x {8 * side} x {8 * side}", "white", 14)
    arrow(axis, (142, 40), (142, 29))
    sums = f"{steps} x {PHONE['UNet, a step']} ms + {PHONE['decoder']} ms = {whole / 1000:.1f} s"
    write(axis, 80, 9, f"the paper, iPhone 16 Pro Max [P]: {sums}", 15)
    write(axis, 80, 3.5, "sizes of --size t2i and --size sd3; ours has not been timed on a phone", 12)
    return figure


DRAWINGS = {draw.__name__.removeprefix("draw_"): draw for draw in (
    draw_unet, draw_ladder, draw_flow, draw_decoder, draw_distillation, draw_scaling, draw_step_distillation,
    draw_phone)}  # fmt: skip

ZOO_FM = "python train_fm.py --pictures 60000 --steps 12000 --compile --out runs/zoo_fm"
# Figures that are measured or drawn by a network: {file in assets/readme: the command that makes it}.
MEASURED = {
    "zoo_fm.png": "make demo",
    "progress.png": ZOO_FM,
    "loss.png": ZOO_FM,
    "decoder_loss.png": "python decoder.py --out runs/zoo_decoder",
    "decoder.png": "python -m studies.decoder --evaluate assets/zoo/decoder",
    "decoder_out_of_domain.png": "python -m studies.decoder --evaluate assets/zoo/decoder",
    "scaling.png": "python -m studies.losses --plot-scaling assets/zoo/distill",
    "distill.png": "python -m studies.losses --compare runs/studies/teaching/task-seed0 "
                   "runs/studies/teaching/task+out+feat-linear-100.0-25.0-seed0",
    "few_steps.png": "python -m studies.few_steps --compare assets/zoo/step_distill",
    "ladder.png": "python -m studies.ladder --train --steps 600 --lr 2.5e-3 --seeds 2",
    "peers.png": "python -m studies.peers --minutes 10 --lr 2.5e-3 5e-3",
    "lab.png": "python -m studies.lab",
    "gan.png": "python step_distill.py --init assets/zoo/distill --pictures 60000 --steps 2500 --watch 0 "
               "--compile --out runs/zoo_4",
    "bits.png": "python -m studies.bits",
    "things.png": "python data.py --things --out things.png",
    "phone.png": "python export_coreml.py",
    "web.png": "SNAPGEN_SCREENSHOTS=runs python -m pytest tests/test_web.py -k fits",
    "emoji.png": "python sample.py",
    "emoji_autoencoder.png": "from common.encoders import FrozenAutoencoder",
}  # fmt: skip


def save(name, out, png=False):
    """Draw one of DRAWINGS into the folder `out`; returns its path. The same code makes the same bytes."""
    plt = pyplot()
    path = Path(out) / f"drawing_{name}.{'png' if png else 'svg'}"
    style = {"svg.fonttype": "path", "svg.hashsalt": name}
    style |= {"font.family": "DejaVu Sans", "axes.edgecolor": INK}
    about = None if png else {"Date": None, "Title": f"{name}, drawn by python -m course.figures {name}"}
    with plt.rc_context(style):
        figure = DRAWINGS[name]()
        save_atomically(lambda p: figure.savefig(p, dpi=150, metadata=about), path)
        plt.close(figure)
    return path


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m course.figures ladder scaling")
    p.add_argument("names", metavar="NAME", nargs="*", help=f"which: {', '.join(DRAWINGS)}; default: all")
    p.add_argument("--png", action="store_true", help="PNG files, 1920 pixels wide, instead of SVG")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("assets/readme"), help="where to")
    args = p.parse_args(argv)
    if unknown := [name for name in args.names if name not in DRAWINGS]:
        raise SystemExit(f"there is no drawing {unknown[0]!r}; there are {', '.join(DRAWINGS)}.")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    for name in args.names or DRAWINGS:
        print(f"wrote {save(name, args.out, args.png).as_posix()}")


if __name__ == "__main__":
    main()
