"""The efficient UNet of SnapGen (Sec. 3.1, Fig. 2), and the seven changes that lead to it from a small SDXL.

One class builds all of it: `UNetConfig` has a switch for each panel of Fig. 2, `ladder("a")` ... `ladder("f")` set them.

    x_t (B, 16, H, W) ----> conv_in                                   conv_out ----> v (B, 16, H, W)
                              |                                           ^
    stage 1, H x W          2 layers -------------- skips ------------> 3 layers     attend to the text
                              v downsample                                ^ upsample
    stage 2, H/2 x W/2      2 layers -------------- skips ------------> 3 layers     attend to the text
                              v downsample                                ^ upsample
    stage 3, H/4 x W/4      2 layers -------------- skips ------------> 3 layers     attend to the text and to each other
                              '---> ResBlock, Transformer, ResBlock ------'

What the paper does not tell (time embedding, depth of the middle, the text width of t2i) is our assumption, marked [A]. Parameters
and MACs beside the paper's stand in studies/sizes.py, the time that each step of the ladder takes in studies/ladder.py.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides the shape of the UNet. The defaults are the paper's final model on ImageNet."""

    channels: tuple = (256, 512, 896)  # per stage: a thinner SDXL, which has (320, 640, 1280)
    # Transformer blocks per layer of each stage: a shorter SDXL, which has (0, 2, 10). How many in stage 1 is ours [A]: one.
    depth: tuple = (1, 2, 4)
    # Depth of the middle and width of the time embedding are ours [A]: 4 and 1024 on the ladder. With 3 and 896 the
    # parameters are Table 1's, and the MACs 4.5 % fewer.
    mid_depth: int = 3
    layers: int = 2  # per down stage; an up stage has one more
    head_dim: int = 64
    groups: int = 32  # of every GroupNorm
    text_dim: int = 768  # width of the text states
    time_dim: int = 896
    latent_channels: int = 16
    # The panels of Fig. 2, each a switch:
    self_attention: tuple = (False, False, True)  # (b) per stage: only the lowest resolution lets pixels look around
    separable: bool = True  # (c) depthwise 3x3 + pointwise 1x1 for every 3x3 convolution but the first and the last
    expansion: int = 2  # (c) ResBlocks widen to this multiple of their input channels (1: to their output channels)
    ffn_ratio: int = 3  # (d) hidden width of the feed-forward layers, before the gate doubles it; 4 in SDXL
    multi_query: bool = True  # (d) one key/value head for all query heads, in self- and [A] in cross-attention
    text_in_first_stage: bool = True  # (e) stage 1: transformer blocks with text instead of ResBlocks
    qk_norm: bool = True  # (f) RMSNorm on queries and keys
    rope: bool = True  # (f) rotary position embedding over rows and columns, in self-attention

    def __post_init__(self):
        for name in ("channels", "depth", "self_attention"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if wrong := [c for c in self.channels if c % self.head_dim or c % self.groups]:
            raise ValueError(f"channels {wrong} must be multiples of head_dim={self.head_dim} and groups={self.groups}")


# What each step changes against the one before. The paper treats c1 and c2, and d1 and d2, under one letter.
LADDER = {
    "a": dict(depth=(0, 2, 4), mid_depth=4, time_dim=1024, self_attention=(False, True, True), separable=False,
              expansion=1, ffn_ratio=4, multi_query=False, text_in_first_stage=False, qk_norm=False, rope=False),
    "b": dict(self_attention=(False, False, True)),
    "c1": dict(separable=True),
    "c2": dict(expansion=2),
    "d1": dict(ffn_ratio=3),
    "d2": dict(multi_query=True),
    "e": dict(text_in_first_stage=True, depth=(1, 2, 4)),
    "f": dict(qk_norm=True, rope=True),
}  # fmt: skip

PRESETS = {
    "tiny": UNetConfig((64, 96, 160), (1, 1, 1), mid_depth=1, head_dim=32, groups=16, text_dim=160, time_dim=256),
    "imagenet": UNetConfig(),
    "t2i": UNetConfig(text_dim=2304),  # [A] Gemma-2-2b's width
}


def ladder(step, base=None):
    """The config of ladder step a, b, c1, c2, d1, d2, e or f, as switches on `base` (default: the paper's widths).

    With another base, such as PRESETS["tiny"], only the switches are set: its widths and sizes stay, and its depths but
    for stage 1, which has transformer blocks from step e on.
    """
    if step not in LADDER:
        raise ValueError(f"no ladder step {step!r}; it has {', '.join(LADDER)}")
    config = base or UNetConfig()
    for name, change in LADDER.items():
        if base is not None:
            change = {k: v for k, v in change.items() if k not in ("depth", "mid_depth", "time_dim")}
            change |= {"a": {"depth": (0, *base.depth[1:])}, "e": {"depth": base.depth}}.get(name, {})
        config = replace(config, **change)
        if name == step:
            return config


# ------------------------------------------------------------------------------------------------------------------
# Convolutions


def conv3x3(cfg, c_in, c_out, stride=1):
    """Fig. 2 (c): a 3x3 convolution; separable, as one in each channel (depthwise) and a 1x1 across channels (pointwise)."""
    if not cfg.separable:
        return nn.Conv2d(c_in, c_out, 3, stride, padding=1)
    depthwise = nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(c_in, c_out, 1))


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W). With separable convs and expansion 2 it is close to MobileNetV4's UIB."""

    def __init__(self, cfg, c_in, c_out):
        super().__init__()
        # "the number of channels after the first PW layer is increased [...] and reduced back" (Sec. 3.1). Twice the
        # *input* channels is what meets the paper's parameters; twice the output channels does not.
        hidden = c_in * cfg.expansion if cfg.expansion > 1 else c_out
        self.norm1 = nn.GroupNorm(cfg.groups, c_in)
        self.conv1 = conv3x3(cfg, c_in, hidden)
        self.time_proj = nn.Linear(cfg.time_dim, hidden)
        self.norm2 = nn.GroupNorm(cfg.groups, hidden)
        self.conv2 = conv3x3(cfg, hidden, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)"""

    def __init__(self, cfg, channels):
        super().__init__()
        self.conv = conv3x3(cfg, channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ------------------------------------------------------------------------------------------------------------------
# Attention


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    By hand: coremltools 9.0 divides the rows of F.rms_norm by their largest value first. Zeros become NaN, and eps changes
    with the row. rsqrt(x), and not 1 / sqrt(x): its 1 / x is 1 / (x + 1e-4).
    """

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        h = x.float()  # half precision has too few digits for a sum of squares; coremltools' float16 leaves .float() out
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rope_table(height, width, head_dim, device=None, theta=1e4):
    """Cosines and sines (height * width, head_dim / 2) of 2-D RoPE, for any grid.

    A head's channels come in pairs (i, i + head_dim / 2); the first half of the pairs turns with the row, the second half
    with the column [A].
    """
    frequencies = theta ** -(torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2))  # (head_dim / 4,)
    rows = torch.arange(height, device=device)[:, None, None] * frequencies  # (H, 1, head_dim / 4)
    columns = torch.arange(width, device=device)[None, :, None] * frequencies  # (1, W, head_dim / 4)
    angles = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
    return angles.flatten(0, 1).cos(), angles.flatten(0, 1).sin()


def rotate(x, cos, sin):
    """Turn each pair of channels of x (B, HW, heads, head_dim) by its position's angle. Real numbers only."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (HW, 1, head_dim / 2): the same for every head
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head or (Fig. 2 (d)) multi-query attention of x (B, S, C) on itself or on text states (B, T, text_dim)."""

    def __init__(self, cfg, channels, context_dim=None):
        super().__init__()
        self.multi_query, self.head_dim = cfg.multi_query, cfg.head_dim
        kv_dim = cfg.head_dim if cfg.multi_query else channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, kv_dim, bias=False)
        self.to_v = nn.Linear(context_dim or channels, kv_dim, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.norm_q = RMSNorm(cfg.head_dim) if cfg.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(cfg.head_dim) if cfg.qk_norm else nn.Identity()

    def forward(self, x, context=None, mask=None, rope=None):
        context = x if context is None else context
        q = self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim)))  # (B, S, heads, d)
        k = self.norm_k(self.to_k(context).unflatten(-1, (-1, self.head_dim)))  # (B, T, heads or 1, d)
        v = self.to_v(context).unflatten(-1, (-1, self.head_dim))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.multi_query:  # one key/value head serves all: every head of every pixel is one more query of one attention
            shape, q = q.shape, q.flatten(1, 2)[:, :, None]  # (B, S, heads, d) -> (B, S heads, 1, d)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        out = out.view(shape) if self.multi_query else out  # (B, S, heads, d)
        return self.to_out(out.flatten(2))  # (B, S, C)


class FeedForward(nn.Module):
    """GEGLU: the hidden width is `ffn_ratio` times the channels, computed twice, one half gating the other."""

    def __init__(self, cfg, channels):
        super().__init__()
        self.proj_in = nn.Linear(channels, 2 * cfg.ffn_ratio * channels)
        self.proj_out = nn.Linear(cfg.ffn_ratio * channels, channels)

    def forward(self, x):
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """[self-attention,] cross-attention to the text, feed-forward, each with a LayerNorm before and a sum after."""

    def __init__(self, cfg, channels, self_attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels) if self_attention else None
        self.attn1 = Attention(cfg, channels) if self_attention else None
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(cfg, channels, cfg.text_dim)
        self.norm3, self.ff = nn.LayerNorm(channels), FeedForward(cfg, channels)

    def forward(self, x, text, mask, rope):
        if self.attn1 is not None:
            x = x + self.attn1(self.norm1(x), rope=rope)
        x = x + self.attn2(self.norm2(x), text, mask)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer blocks on a picture-shaped tensor: (B, C, H, W) -> (B, HW, C) -> blocks -> (B, C, H, W)."""

    def __init__(self, cfg, channels, depth, self_attention, projections=True):
        super().__init__()
        self.cfg = cfg
        self.norm = nn.GroupNorm(cfg.groups, channels, eps=1e-6) if projections else None
        self.proj_in = nn.Linear(channels, channels) if projections else None
        self.blocks = nn.ModuleList(TransformerBlock(cfg, channels, self_attention) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if projections else None

    def forward(self, x, text, mask):
        height, width = x.shape[2:]
        rope = None
        if self.cfg.rope and self.blocks[0].attn1 is not None:
            rope = [table.to(x.dtype) for table in rope_table(height, width, self.cfg.head_dim, x.device)]
        h = x if self.norm is None else self.norm(x)
        h = h.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        h = h if self.proj_in is None else self.proj_in(h)
        for block in self.blocks:
            h = block(h, text, mask, rope)
        h = h if self.proj_out is None else self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width))  # (B, HW, C) -> (B, C, H, W)
        return h if self.norm is None else x + h


# ------------------------------------------------------------------------------------------------------------------
# The UNet


class Layer(nn.Module):
    """A ResBlock [and a Transformer2D]; in stage 1 from step e on, transformer blocks alone (Fig. 2 (e))."""

    def __init__(self, cfg, stage, c_in, c_out):
        super().__init__()
        self.resblock = self.merge = self.transformer = None
        depth, attend = cfg.depth[stage], cfg.self_attention[stage]
        if stage == 0 and cfg.text_in_first_stage:
            if c_in != c_out:
                self.merge = nn.Conv2d(c_in, c_out, 1)  # a skip is concatenated
            self.transformer = Transformer2D(cfg, c_out, depth, attend, projections=False)
        else:
            self.resblock = ResBlock(cfg, c_in, c_out)
            if depth:
                self.transformer = Transformer2D(cfg, c_out, depth, attend)

    def forward(self, x, time, text, mask, skip=None):
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        if self.merge is not None:
            x = self.merge(x)
        if self.resblock is not None:
            x = self.resblock(x, time)
        if self.transformer is not None:
            x = self.transformer(x, text, mask)
        return x


class Stage(nn.Module):
    def __init__(self, layers, resample=None):
        super().__init__()
        self.layers, self.resample = nn.ModuleList(layers), resample


def timestep_embedding(t, dim):
    """t (B,) in [0, 1] -> (B, dim): cosines and sines of 1000 t, always in float32 (in float16, 1000 t is off by 0.25)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(1e4) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = 1000.0 * t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UNet(nn.Module):
    """The denoiser v_theta(x_t, t, c) of flow matching.

    forward(x_t, t, text, mask=None, feature=None):
        x_t: (B, 16, H, W) noisy latents, H and W multiples of 4.
        t: (B,) in [0, 1], 0 = data, 1 = noise.
        text: (B, T, text_dim) states of the caption's tokens.
        mask: (B, T) bool, True for real tokens; padding is not attended to.
        feature: the name of a layer (see features()), whose output is returned as well: stage 2 compares it with the teacher's.
        Returns the velocity (B, 16, H, W), or (velocity, feature (B, C, H / s, W / s)). Raises ValueError on other sizes.

    checkpointing = True keeps only what goes into each layer, and computes the rest again in the backward pass: a third more
    time, a fraction of the memory.
    """

    checkpointing = False

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        channels, last = cfg.channels, len(cfg.channels) - 1
        # Full here and at the end [A], where the paper replaces "all": a separable one has one 3x3 kernel for each latent channel.
        self.conv_in = nn.Conv2d(cfg.latent_channels, channels[0], 3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(channels[0], cfg.time_dim), nn.SiLU(), nn.Linear(cfg.time_dim, cfg.time_dim))
        self.down, skips, width = nn.ModuleList(), [channels[0]], channels[0]
        for stage, c in enumerate(channels):
            layers = [Layer(cfg, stage, width if i == 0 else c, c) for i in range(cfg.layers)]
            self.down.append(Stage(layers, conv3x3(cfg, c, c, stride=2) if stage < last else None))
            skips += [c] * (cfg.layers + (stage < last))
            width = c
        middle = Transformer2D(cfg, width, cfg.mid_depth, cfg.self_attention[last])
        self.mid = nn.ModuleList([ResBlock(cfg, width, width), middle, ResBlock(cfg, width, width)])
        self.up = nn.ModuleList()
        for stage, c in reversed(list(enumerate(channels))):
            layers = [Layer(cfg, stage, (width if i == 0 else c) + skips.pop(), c) for i in range(cfg.layers + 1)]
            self.up.append(Stage(layers, Upsample(cfg, c) if stage > 0 else None))
            width = c
        self.norm_out = nn.GroupNorm(cfg.groups, width)
        self.conv_out = nn.Conv2d(width, cfg.latent_channels, 3, padding=1)

    def features(self):
        """{name: (channels, s)} of the layers whose output forward() can return: s = 1, 2, 4 is how much coarser its grid is."""
        stages, n = [(c, 2**i) for i, c in enumerate(self.cfg.channels)], self.cfg.layers
        found = {f"down.{i}.layers.{j}": stage for i, stage in enumerate(stages) for j in range(n)}
        found |= {f"mid.{i}": stages[-1] for i in range(3)}
        return found | {f"up.{i}.layers.{j}": stage for i, stage in enumerate(reversed(stages)) for j in range(n + 1)}

    def forward(self, x_t, t, text, mask=None, feature=None):
        step = 2 ** (len(self.cfg.channels) - 1)
        if x_t.shape[1] != self.cfg.latent_channels or x_t.shape[2] % step or x_t.shape[3] % step:
            raise ValueError(f"x_t must be (B, {self.cfg.latent_channels}, H, W), H and W multiples of {step}, not {[*x_t.shape]}")
        again, kept = self.checkpointing and torch.is_grad_enabled(), []  # the output of the layer that `feature` names

        def run(name, layer, *inputs):
            out = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
            if name == feature:
                kept.append(out)
            return out

        time = self.time_mlp(timestep_embedding(t, self.cfg.channels[0]).to(x_t.dtype))  # (B, time_dim)
        if mask is not None:
            mask = mask[:, None, None, :]  # (B, 1, 1, T): the same for every head and pixel
        x = self.conv_in(x_t)
        skips = [x]
        for i, stage in enumerate(self.down):
            for j, layer in enumerate(stage.layers):
                x = run(f"down.{i}.layers.{j}", layer, x, time, text, mask)
                skips.append(x)
            if stage.resample is not None:
                x = stage.resample(x)
                skips.append(x)
        x = run("mid.0", self.mid[0], x, time)
        x = run("mid.1", self.mid[1], x, text, mask)
        x = run("mid.2", self.mid[2], x, time)
        for i, stage in enumerate(self.up):
            for j, layer in enumerate(stage.layers):
                x = run(f"up.{i}.layers.{j}", layer, x, time, text, mask, skips.pop())
            if stage.resample is not None:
                x = stage.resample(x)
        velocity = self.conv_out(F.silu(self.norm_out(x)))
        if feature and not kept:
            raise ValueError(f"no layer {feature!r}; there are {', '.join(self.features())}")
        return (velocity, *kept) if feature else velocity


def zero_branches(net):
    """Let each residual branch of a new UNet end in zeros, as ADM's do [A], so that no random branch drowns what the others say.

    At the start a ResBlock is its shortcut and a transformer block the identity; Transformer2D's own two projections stay random.
    For training; random weights that are only to be timed or converted stay as they are, since zeros would verify nothing.
    """
    for module in net.modules():
        if isinstance(module, ResBlock):
            last = module.conv2[-1] if net.cfg.separable else module.conv2
        elif isinstance(module, (Attention, FeedForward)):
            last = module.to_out if isinstance(module, Attention) else module.proj_out
        else:
            continue
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return net
