"""The networks in the form in which a browser runs them fastest. Same weights, same numbers, fewer operations.

ONNX Runtime as WebAssembly takes some microseconds for each operation besides its arithmetic, and a class student has more
than a thousand of small ones. So, for export:

    text            keys and values of every cross-attention depend on the caption alone: they are computed once a picture, behind
                    the text encoders, and the UNet takes them as inputs in place of the text states
    time            what the time says to all ResBlocks is one product
    transformers    (S, C) in place of (1, S, C); gain and offset of a GroupNorm inside the weights behind it
    RoPE            x cos + (x R) sin, with R the matrix that turns every pair of channels by 90 degrees
    RMSNorm         x / sqrt(.), the form in which ONNX Runtime sees one operation
    few pixels      pointwise convolutions as products: the kernels of convolutions take 16 pixels at a time
    upsamplers      of the decoder: nearest neighbour and a 3x3 convolution are one transposed 4x4 convolution

Every form is tested to give the numbers of the original.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from coreml.layers import MASKED, linear_of, replace_modules, with_norm
from decoder import Upsample
from model import ResBlock, RMSNorm, Transformer2D, rope_table

FEW_PIXELS = 16


def cross_attentions(unet):
    """The cross-attentions of a UNet in the order of its forward pass, which is that of its modules."""
    return [block.attn2 for block in unet.modules() if hasattr(block, "attn2")]


class WebText(nn.Module):
    """Text encoders and what the UNet makes of them: tokens, tokens_2 (1, T) -> keys (D, T), values (T, D), mask (1, T).

    The D channels are those of all cross-attentions, one behind the other. The mask is added to the logits: 0 for tokens, -10000
    for padding. `text` is coreml.layers.PhoneText.
    """

    def __init__(self, text, unet):
        super().__init__()
        attentions = [WebAttention(attention) for attention in cross_attentions(unet)]
        self.text, self.head_dim, self.eps = text, unet.cfg.head_dim, getattr(attentions[0].norm_k, "eps", None)
        self.to_k = linear_of(torch.cat([a.to_k.weight for a in attentions]), None)
        self.to_v = linear_of(torch.cat([a.to_v.weight for a in attentions]), None)
        if self.eps is not None:  # a row of gains for every head
            gains = [a.norm_k.weight.repeat(a.to_k.out_features // self.head_dim, 1) for a in attentions]
            self.gains = nn.Parameter(torch.cat(gains), requires_grad=False)

    def forward(self, tokens, tokens_2):
        text, mask = self.text(tokens, tokens_2)
        keys = self.to_k(text[0])
        if self.eps is not None:
            keys = rms_norm(keys.unflatten(1, (-1, self.head_dim)), self.gains, self.eps).flatten(1)
        return keys.T, self.to_v(text[0]), (1 - mask) * MASKED


class WebAttention(nn.Module):
    """model.Attention of x (S, C) on itself, or on a key (C', T) and value (T, C') that are given, C' = head_dim or C.

    Queries and keys are normed and turned as (S heads, head_dim), the heads of a pixel one behind the other.
    """

    def __init__(self, attention, norm=None, own_norm=None):
        """norm, own_norm: the LayerNorms of the queries' x and of the keys' x, whose gains and offsets move into the weights."""
        super().__init__()
        self.head_dim, self.multi_query, self.to_out = attention.head_dim, attention.multi_query, attention.to_out
        self.to_q, self.to_v = with_norm(norm, attention.to_q), with_norm(own_norm, attention.to_v)
        scale = attention.head_dim**-0.5  # of the logits, inside the key
        normed = isinstance(attention.norm_k, RMSNorm)
        self.to_k = with_norm(own_norm, attention.to_k if normed else linear_of(attention.to_k.weight * scale, None))
        self.norm_q = WebRMSNorm(attention.norm_q, 1.0) if normed else nn.Identity()
        self.norm_k = WebRMSNorm(attention.norm_k, scale) if normed else nn.Identity()

    def forward(self, x, key=None, value=None, mask=None, rope=None):
        query = turn(self.norm_q(self.to_q(x).reshape(-1, self.head_dim)), rope)
        if key is None:
            key, value = turn(self.norm_k(self.to_k(x).reshape(-1, self.head_dim)), rope), self.to_v(x)
            key = key.T if self.multi_query else key.reshape(x.shape).T
        if self.multi_query:  # one key/value head serves all: every head of every pixel is one more query
            out = attend(query, key, value, mask)
        else:
            query, value = (h.reshape(len(h), -1, self.head_dim).transpose(0, 1) for h in (query.reshape(x.shape), value))
            out = attend(query, key.unflatten(0, (-1, self.head_dim)), value, mask).transpose(0, 1)
        return self.to_out(out.reshape(x.shape))


def turn(x, rope):
    """model.rotate of x (S heads, d) by cos and sin (S, d)."""
    if rope is None:
        return x
    cos, sin = (table.repeat_interleave(len(x) // len(table), dim=0) for table in rope)
    one, zero = torch.eye(x.shape[1] // 2), torch.zeros(x.shape[1] // 2, x.shape[1] // 2)
    quarter = torch.cat([torch.cat([zero, one], 1), torch.cat([-one, zero], 1)])  # (a, b) -> (-b, a)
    return x * cos + (x @ quarter) * sin


def attend(query, key, value, mask):
    logits = query @ key
    return (logits if mask is None else logits + mask).softmax(-1) @ value


class WebRMSNorm(nn.Module):
    def __init__(self, norm, scale):
        super().__init__()
        self.weight, self.eps = nn.Parameter(norm.weight * scale, requires_grad=False), norm.eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x, weight, eps):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class WebTransformer(nn.Module):
    """model.Transformer2D whose blocks see (S, C). `text` is what WebUNet hands to each block in turn."""

    def __init__(self, transformer):
        super().__init__()
        self.cfg, self.norm, self.proj_in = transformer.cfg, None, None
        if transformer.norm is not None:
            self.norm = transformer.norm
            self.proj_in = with_norm(transformer.norm, transformer.proj_in)
        self.blocks, self.proj_out = nn.ModuleList(map(WebBlock, transformer.blocks)), transformer.proj_out

    def forward(self, x, text, _):
        channels, height, width = x.shape[1:]
        rope = None
        if self.cfg.rope and self.blocks[0].attn1 is not None:
            rope = [table.repeat(1, 2) for table in rope_table(height, width, self.cfg.head_dim)]
        h = x if self.norm is None else normalize(x, self.norm)
        h = h.reshape(channels, -1).T  # (1, C, H, W) -> (S, C)
        h = h if self.proj_in is None else self.proj_in(h)
        for block in self.blocks:
            h = block(h, *next(text), rope)
        h = h if self.proj_out is None else self.proj_out(h)
        h = h.T.reshape(x.shape)
        return h if self.norm is None else x + h


class WebBlock(nn.Module):
    """model.TransformerBlock of (S, C). Value and gate of GEGLU are two products, so that nothing is cut in two."""

    def __init__(self, block):
        super().__init__()
        self.eps, norm1 = block.norm2.eps, block.norm1
        self.attn1 = None if block.attn1 is None else WebAttention(block.attn1, norm1, norm1)
        self.attn2, proj_in = WebAttention(block.attn2, block.norm2), with_norm(block.norm3, block.ff.proj_in)
        halves = zip(proj_in.weight.chunk(2), proj_in.bias.chunk(2), strict=True)
        self.value, self.gate = (linear_of(*half) for half in halves)
        self.proj_out = block.ff.proj_out

    def forward(self, x, key, value, mask, rope):
        if self.attn1 is not None:
            x = x + self.attn1(self.normalize(x), rope=rope)
        x = x + self.attn2(self.normalize(x), key, value, mask)
        h = self.normalize(x)
        return x + self.proj_out(self.value(h) * F.gelu(self.gate(h)))

    def normalize(self, x):
        """LayerNorm without gain and offset, as an InstanceNorm of S channels: three times as fast in ONNX Runtime."""
        return F.instance_norm(x.reshape(1, *x.shape), eps=self.eps).reshape(x.shape)


class WebTime(nn.Module):
    """The time embedding (1, C) -> for each ResBlock in turn, what it adds to its channels, (1, hidden, 1, 1)."""

    def __init__(self, time_mlp, blocks):
        super().__init__()
        projections = [block.time_proj for block in blocks]
        self.time_mlp, self.sizes = time_mlp, [p.out_features for p in projections]
        self.project = linear_of(torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections]))

    def forward(self, embedding):
        both = self.project(F.silu(self.time_mlp(embedding)))
        return iter(both[:, :, None, None].split(self.sizes, dim=1))


class WebResBlock(nn.Module):
    """model.ResBlock that takes what the time adds from WebTime."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm2 = WebGroupNorm(block.norm1), WebGroupNorm(block.norm2)
        self.conv1, self.conv2, self.shortcut = block.conv1, block.conv2, block.shortcut

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + next(time)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def normalize(x, norm):
    """nn.GroupNorm of (1, C, H, W) without gain and offset: (1, groups, -1)."""
    return F.instance_norm(x.reshape(1, norm.num_groups, -1), eps=norm.eps)


class WebGroupNorm(nn.Module):
    """nn.GroupNorm, with gain and offset as one operation."""

    def __init__(self, norm):
        super().__init__()
        self.norm, ones = norm, torch.ones(norm.num_channels)
        self.register_buffer("mean", 0 * ones)
        self.register_buffer("variance", ones)

    def forward(self, x):
        h = normalize(x, self.norm).reshape(x.shape)
        return F.batch_norm(h, self.mean, self.variance, self.norm.weight, self.norm.bias, eps=0.0)


class Pointwise(nn.Module):
    """A 1x1 convolution, of few pixels as a product."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.linear = conv, linear_of(conv.weight[:, :, 0, 0], conv.bias)

    def forward(self, x):
        if x.shape[2] * x.shape[3] >= FEW_PIXELS:
            return self.conv(x)
        return self.linear(x.reshape(x.shape[1], -1).T).T.reshape(1, -1, *x.shape[2:])


class WebUNet(nn.Module):
    """The UNet with fixed sizes: forward(latent (1, C, h, w), t (1,), keys, values, mask: see WebText) -> velocity."""

    def __init__(self, unet):
        super().__init__()
        self.sizes = [attention.to_k.out_features for attention in cross_attentions(unet)]
        unet = copy.deepcopy(unet).eval()
        unet.time_mlp = WebTime(unet.time_mlp, [m for m in unet.modules() if isinstance(m, ResBlock)])
        unet.norm_out = WebGroupNorm(unet.norm_out)
        replace_modules(replace_modules(unet, Transformer2D, WebTransformer), ResBlock, WebResBlock)
        self.unet = replace_modules(unet, nn.Conv2d, lambda conv: Pointwise(conv) if conv.kernel_size == (1, 1) else conv)

    def forward(self, latent, t, keys, values, mask):
        text = ((key, value, mask) for key, value in zip(keys.split(self.sizes), values.split(self.sizes, 1), strict=True))
        return self.unet(latent, t, text)


class WebDecoder(nn.Module):
    """The tiny decoder: forward(latent (1, C, h, w)) -> picture (1, 3, 8h, 8w), from 0 to 255."""

    def __init__(self, decoder):
        super().__init__()
        decoder = copy.deepcopy(decoder).eval().to(memory_format=torch.contiguous_format)
        decoder = replace_modules(decoder, Upsample, transposed)
        self.decoder = replace_modules(decoder, nn.GroupNorm, WebGroupNorm)

    def forward(self, latent):
        return ((self.decoder(latent) + 1) * 127.5).clamp(0, 255)


def transposed(upsample):
    """decoder.Upsample as one transposed convolution: each small pixel, four times, through the 3x3 kernel, reaches 4x4 pixels."""
    conv = upsample.conv
    weight = conv.weight.detach().flip(2, 3).transpose(0, 1)  # (c_in, c_out, 3, 3)
    wide = sum(F.pad(weight, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1))  # (c_in, c_out, 4, 4)
    up = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1)
    up.weight, up.bias = nn.Parameter(wide, requires_grad=False), conv.bias
    return up
