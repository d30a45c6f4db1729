"""The networks in the form that half precision and the neural engine can take. Same weights, same numbers, other operations.

A phone computes in float16: nothing above 65504, three decimal digits, and a square overflows beyond 255. And its neural engine
likes tensors of (B, C, 1, S), with 1x1 convolutions where PyTorch has linear layers (apple/ml-ane-transformers). So, for export:

    GroupNorm       as one layer_norm over each group: Core ML then has one operation that takes care of its own sums,
                    where it would otherwise write out the squares of differences, in float16. Its reshapes leave the
                    last axis alone
    time embedding  in float32, see export_coreml.py: 1000 t radians have no decimals left in float16
    masks           as numbers added to the logits, -10000 for padding: a phone's programs take no booleans as inputs
    CLIP            written out, without the last layer and the pooled state, which the student does not read
    transformers    in (B, C, 1, S), attention in pieces, the gains of norms inside the weights behind them
                    (--layout standard: as they are in model.py)
    upsamplers      of the decoder behind their convolution, which then computes 16 products in place of 36
                    (--layout standard: as they are in decoder.py)

Every form is tested to give the numbers of the original. What coremltools 9.0 does otherwise than one would guess, and
what is written here because of it, stands in comments that begin with "coremltools:".
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import Layer, ResBlock, RMSNorm, Transformer2D, rope_table

# Added to the logit of padding: exp() of it is 0 in any precision. coremltools: below -65504 it would be -inf in float16,
# and a row that is masked whole NaN; and a mask of booleans would be an input of float32.
MASKED = -1e4


class LayerNormGroups(nn.Module):
    """nn.GroupNorm for (B, C, H, W), as one layer_norm over (B, groups, C / groups * H, W), then gain and offset."""

    def __init__(self, norm):
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x):
        return norm_groups(x, self.groups, self.eps, self.weight, self.bias)


def norm_groups(x, groups, eps, weight, bias):
    h = x.reshape(x.shape[0], groups, -1, x.shape[3])
    h = F.layer_norm(h, h.shape[2:], eps=eps).reshape(x.shape)
    return h if weight is None else h * weight[None, :, None, None] + bias[None, :, None, None]


def copied(net):
    """A copy of a network to take apart: modules of its own, the same parameters."""
    return copy.deepcopy(net, {id(p): p for p in net.parameters()}).eval()


def replace_modules(net, kind, build):
    """`net` with every submodule of class `kind` replaced by build(submodule)."""
    for name, child in net.named_children():
        if isinstance(child, kind):
            setattr(net, name, build(child))
        else:
            replace_modules(child, kind, build)
    return net


class PhoneUNet(nn.Module):
    """The UNet with fixed sizes: forward(latent (B, 16, h, w), t (B,), text (B, T, D), mask (B, T) of 0 and 1) -> velocity."""

    def __init__(self, unet, layout="ane"):
        super().__init__()
        unet = copied(unet)
        if layout == "ane":
            unet = replace_modules(unet, Transformer2D, AneTransformer)
            for stage in unet.up:
                replace_modules(stage, Layer, lambda layer: layer if layer.merge is None else MergeApart(layer))
            if unet.cfg.separable:
                replace_modules(unet, ResBlock, ResBlockInPieces)
        self.unet = replace_modules(unet, nn.GroupNorm, LayerNormGroups)

    def forward(self, latent, t, text, mask):
        return self.unet(latent, t, text, (1 - mask) * MASKED)


class PhoneDecoder(nn.Module):
    """The tiny decoder: forward(latent (1, 16, h, w)) -> picture (1, 3, 8h, 8w), from 0 to 255.

    `upsample` is the class of the upsamplers that become UpsampleLast: decoder.Upsample, or None to leave them.
    """

    def __init__(self, decoder, upsample=None):
        super().__init__()
        decoder = copied(decoder)
        if upsample is not None:
            decoder = replace_modules(decoder, upsample, UpsampleLast)
        self.decoder = replace_modules(decoder, nn.GroupNorm, LayerNormGroups)

    def forward(self, latent):
        return ((self.decoder(latent) + 1) * 127.5).clamp(0, 255)


class UpsampleLast(nn.Module):
    """decoder.Upsample without the doubled picture: a 2x2 convolution of the small one, whose channels become the pixels.

    Of a picture whose pixels stand there twice, a 3x3 window sees 2x2 different pixels. Which ones depends on whether the window's
    middle has an even or an odd row and column: four 2x2 windows, 16 multiplications in place of 36, with sums of the 3x3 weights.
    """

    def __init__(self, upsample):
        super().__init__()
        conv = upsample.conv
        windows = [self.met(self.met(conv.weight, row, 2), column, 3) for row in (0, 1) for column in (0, 1)]
        self.weight = nn.Parameter(torch.cat(windows), requires_grad=False)  # (4 c_out, c_in, 2, 2)
        self.bias = nn.Parameter(conv.bias.repeat(4), requires_grad=False)

    def met(self, weight, odd, axis):
        """Three rows of weights as two: around an even row they meet the one before and itself, else itself and the next."""
        first, middle, last = weight.unbind(axis)
        return torch.stack([first + middle, last] if odd else [first, middle + last], dim=axis)

    def forward(self, x):
        height, width = x.shape[2:]
        windows = F.conv2d(x, self.weight, self.bias, padding=1).chunk(4, dim=1)  # 4 x (B, c_out, H + 1, W + 1)
        windows = [h[:, :, i // 2 : i // 2 + height, i % 2 : i % 2 + width] for i, h in enumerate(windows)]
        return F.pixel_shuffle(torch.stack(windows, dim=2).flatten(1, 2), 2)


class PhoneClip(nn.Module):
    """A CLIP text model up to its last layer but one: tokens (1, T) int32 -> states (1, T, D), which is all the student reads."""

    def __init__(self, clip):
        super().__init__()
        text, config = clip.text_model, clip.config
        self.tokens, self.layers = text.embeddings.token_embedding, nn.ModuleList(text.encoder.layers[:-1])
        self.positions = text.embeddings.position_embedding.weight
        self.heads, self.quick = config.num_attention_heads, config.hidden_act == "quick_gelu"
        if config.hidden_act not in ("quick_gelu", "gelu"):
            raise SystemExit(f"a text encoder with activation {config.hidden_act} is not a CLIP that can be exported.")
        length = len(self.positions)
        self.register_buffer(
            "causal", torch.full((length, length), MASKED).triu(1)
        )  # a token sees itself and those before

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            h, attention = layer.layer_norm1(x), layer.self_attn
            q, k, v = (
                project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            h = F.scaled_dot_product_attention(q, k, v, self.causal)
            x = x + attention.out_proj(h.transpose(1, 2).flatten(2))
            h = layer.mlp.fc1(layer.layer_norm2(x))
            # coremltools: drops keyword arguments, so that gelu(h, approximate="tanh") would be the exact one in silence.
            x = x + layer.mlp.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
        return x


class PhoneText(nn.Module):
    """Both CLIPs: forward(tokens, tokens_2 (1, T) int32) -> text (1, T, width), mask (1, T) of 0 and 1.

    The mask is 1 up to and including the first end-of-text token, the tokenizer's `end` (old CLIP configs name another).
    `width` pads the states with zeros, as encoders.pad_text. `tail` (1, n, up to width) are states that stand behind every text, as
    real tokens, so that T grows by n: see coreml/texts.py.
    """

    def __init__(self, clips, width, end, tail=None):
        super().__init__()
        self.clips, self.width = nn.ModuleList(PhoneClip(clip) for clip in clips), width
        self.end = end
        tail = torch.zeros(1, 0, width) if tail is None else tail.float()
        self.register_buffer("tail", F.pad(tail, (0, width - tail.shape[-1])))

    def forward(self, tokens, tokens_2):
        text = torch.cat([clip(ids) for clip, ids in zip(self.clips, (tokens, tokens_2), strict=True)], dim=-1)
        ends = (tokens == self.end).float()
        ends_before = torch.cumsum(ends, dim=1) - ends
        text, mask = F.pad(text, (0, self.width - text.shape[-1])), (ends_before < 0.5).float()
        if self.tail.shape[1] == 0:
            return text, mask
        return torch.cat([text, self.tail], dim=1), torch.cat([mask, torch.ones(self.tail.shape[:2])], dim=1)


# ------------------------------------------------------------------------------------------------------------------
# The layout of the neural engine: (B, C, 1, S), S = H * W positions

LONGEST = 16384  # positions or queries on the last axis: the neural engine's compiler takes no H or W beyond it
PIECE = 2**20  # numbers that pass through a stage's blocks at once, where positions need not see each other
SCORES = 2**20  # numbers in one tensor of attention scores: 2 MiB in float16
HIDDEN = 2**22  # numbers of a ResBlock's hidden channels at once: 8 MiB in float16


def as_conv(linear):
    """nn.Linear as a 1x1 convolution with the same weights."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    conv.weight = nn.Parameter(linear.weight[:, :, None, None], requires_grad=False)
    conv.bias = linear.bias
    return conv


def linear_of(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight, linear.bias = (None if x is None else nn.Parameter(x, requires_grad=False) for x in (weight, bias))
    return linear


def with_norm(norm, linear):
    """The linear layer behind a norm, with the norm's gain g and offset b inside: W (g x + b) + c = (W g) x + (W b + c)."""
    if norm is None:
        return linear
    offset = linear.weight @ norm.bias
    return linear_of(linear.weight * norm.weight, offset if linear.bias is None else offset + linear.bias)


def normalize(x, eps):
    """LayerNorm over axis 1 without gain and offset, in the form in which coremltools sees one layer_norm."""
    x = x - x.mean(1, keepdim=True)
    return x * torch.rsqrt((x * x).mean(1, keepdim=True) + eps)  # coremltools: 1 / x would be 1 / (x + 1e-4)


def pieces(x, most):
    """x (B, C, H, S) in pieces of at most so many positions."""
    return x.split(max(1, most), dim=3) if x.shape[3] > most else [x]


def joined(parts):
    return torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]


class AneAttention(nn.Module):
    """model.Attention of x (B, C, 1, S) on context (B, D, 1, T).

    Queries, keys and values have their channels in the order (head_dim, heads), so that (B, C, 1, S) is (B, head_dim, heads, S)
    without a copy. With one key/value head for all it is (B, head_dim, 1, heads S) as well: every head of every position is one
    more query, and the key is not repeated. Scores are (B, T, 1, queries), for as many queries at a time as SCORES allows.
    """

    def __init__(self, attention, norm, context_norm=None):
        """norm, context_norm: the LayerNorms of x and of the context, whose gains and offsets move into the weights."""
        super().__init__()
        self.head_dim, self.multi_query = attention.head_dim, attention.multi_query
        norms = {"to_q": norm, "to_k": context_norm, "to_v": context_norm}
        for name, norm in norms.items():
            linear = with_norm(norm, getattr(attention, name))
            order = self.heads_last(linear.out_features)
            setattr(self, name, as_conv(linear_of(linear.weight[order], None if linear.bias is None else linear.bias[order])))
        out = attention.to_out
        self.to_out = as_conv(linear_of(out.weight[:, self.heads_last(out.in_features)], out.bias))
        self.norm_q, self.norm_k = attention.norm_q, attention.norm_k

    def heads_last(self, channels):
        """Where each channel of (head_dim, heads) stands in (heads, head_dim)."""
        return torch.arange(channels).view(-1, self.head_dim).T.flatten()

    def heads(self, x, norm=None, rope=None):
        """(B, C, 1, S) -> (B, head_dim, heads, S), normed and turned."""
        x = x.reshape(len(x), self.head_dim, -1, x.shape[3])
        if isinstance(norm, RMSNorm):
            # coremltools: F.rms_norm would divide by the largest value first, zeros by zero
            x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + norm.eps) * norm.weight[:, None, None]
        return x if rope is None else rotate_channels(x, *rope)

    def forward(self, x, context=None, mask=None, rope=None):
        context = x if context is None else context
        key = self.heads(self.to_k(context), self.norm_k, rope) * self.head_dim**-0.5
        value = self.heads(self.to_v(context))
        key = key.transpose(1, 3)  # (B, T, 1 or heads, head_dim)
        whole = self.heads(self.to_q(x), self.norm_q, rope)
        parts = []
        for query in pieces(whole, LONGEST // whole.shape[2]):
            if self.multi_query:
                out = attend(query.flatten(2)[:, :, None], key, value, mask)
            else:
                each = (tensor.split(1, dim=2) for tensor in (query, key, value))
                out = torch.cat([attend(*head, mask) for head in zip(*each, strict=True)], dim=2)
            parts.append(out.reshape(len(x), x.shape[1], 1, -1))  # (B, C, 1, part of S)
        return self.to_out(joined(parts))


def attend(query, key, value, mask):
    """query (B, d, 1, Q), key (B, T, 1, d), value (B, d, 1, T), mask (B, T, 1, 1) -> (B, d, 1, Q)"""
    out = []
    for part in pieces(query, SCORES // key.shape[1]):
        scores = torch.einsum("bkhc,bchq->bkhq", key, part)  # (B, T, 1, part of Q)
        scores = scores if mask is None else scores + mask
        out.append(torch.einsum("bchk,bkhq->bchq", value, scores.softmax(dim=1)))
    return joined(out)


def rotate_channels(x, cos, sin):
    """model.rotate of x (B, d, heads, S); cos, sin (d / 2, 1, S)."""
    first, second = x.chunk(2, dim=1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=1)


class ResBlockInPieces(nn.Module):
    """model.ResBlock with separable convolutions, whose hidden channels, the widest of all, are computed some groups at a time.

    From the pointwise convolution that makes them to the one that sums them up, no group of channels sees another.
    """

    def __init__(self, block):
        super().__init__()
        self.norm1, self.time_proj, self.norm2, self.shortcut = block.norm1, block.time_proj, block.norm2, block.shortcut
        self.groups = block.norm2.num_groups
        (self.first, self.widen), (self.second, self.narrow) = block.conv1, block.conv2

    def forward(self, x, time):
        norm, numbers = self.norm2, self.second.in_channels * x.shape[2] * x.shape[3]
        n = next(n for n in range(1, self.groups + 1) if self.groups % n == 0 and numbers <= n * HIDDEN or n == self.groups)
        h, time, out = self.first(F.silu(self.norm1(x))), self.time_proj(F.silu(time))[:, :, None, None], self.shortcut(x)
        weights = (self.widen.weight, self.widen.bias, time.transpose(0, 1), norm.weight, norm.bias, self.second.weight)
        pieces = zip(*(w.chunk(n) for w in weights), self.narrow.weight.chunk(n, dim=1), strict=True)
        for i, (widen, bias, shift, gain, offset, depthwise, narrow) in enumerate(pieces):
            part = F.conv2d(h, widen, bias) + shift.transpose(0, 1)
            part = F.silu(norm_groups(part, self.groups // n, norm.eps, gain, offset))
            part = F.conv2d(part, depthwise, None, self.second.stride, self.second.padding, groups=part.shape[1])
            out = out + F.conv2d(part, narrow, self.narrow.bias if i == 0 else None)
        return out


class MergeApart(nn.Module):
    """model.Layer of stage 1 on the way up: W [x, skip] + b as W_x x + (W_skip skip + b), so that no tensor holds x and skip."""

    def __init__(self, layer):
        super().__init__()
        self.transformer, merge = layer.transformer, layer.merge
        skip = merge.out_channels  # a skip of this stage is as wide as the stage
        weight_x, weight_skip = merge.weight[:, :, 0, 0].split([merge.in_channels - skip, skip], dim=1)
        self.of_x, self.of_skip = as_conv(linear_of(weight_x, None)), as_conv(linear_of(weight_skip, merge.bias))

    def forward(self, x, time, text, mask, skip):
        return self.transformer(self.of_x(x) + self.of_skip(skip), text, mask)


class AneTransformer(nn.Module):
    """model.Transformer2D with everything between the picture-shaped ends in (B, C, 1, S).

    Without self-attention no position sees another, so that they pass through all blocks in pieces: stage 1 has 16384 of them.
    """

    def __init__(self, transformer):
        super().__init__()
        self.cfg, self.norm = transformer.cfg, None
        self.proj_in, self.proj_out = None, None
        if transformer.norm is not None:
            self.norm = nn.GroupNorm(transformer.norm.num_groups, transformer.norm.num_channels, transformer.norm.eps)
            self.proj_in = as_conv(with_norm(transformer.norm, transformer.proj_in))
            self.proj_out = as_conv(transformer.proj_out)
        self.blocks = nn.ModuleList(AneBlock(block) for block in transformer.blocks)

    def forward(self, x, text, mask):
        height, width = x.shape[2:]
        alone, rope = self.blocks[0].attn1 is None, None
        if self.cfg.rope and not alone:
            rope = [table.T[:, None] for table in rope_table(height, width, self.cfg.head_dim, x.device)]  # (d / 2, 1, S)
        text = text.transpose(1, 2)[:, :, None]  # (B, T, D) -> (B, D, 1, T)
        mask = mask[:, 0, 0, :, None, None]  # (B, 1, 1, T) -> (B, T, 1, 1)
        h = x if self.norm is None else self.norm(x)
        h = h.flatten(2)[:, :, None]  # (B, C, H, W) -> (B, C, 1, S)
        parts = []
        for part in pieces(h, PIECE // h.shape[1]) if alone else [h]:
            part = part if self.proj_in is None else self.proj_in(part)
            for block in self.blocks:
                part = block(part, text, mask, rope)
            parts.append(part if self.proj_out is None else self.proj_out(part))
        h = joined(parts).reshape(x.shape)
        return h if self.norm is None else x + h


class AneBlock(nn.Module):
    """model.TransformerBlock in (B, C, 1, S). Value and gate of GEGLU are two convolutions: no tensor holds both."""

    def __init__(self, block):
        super().__init__()
        norms = [norm for norm in (block.norm1, block.norm2, block.norm3) if norm is not None]
        self.eps = norms[0].eps
        self.attn1 = None if block.attn1 is None else AneAttention(block.attn1, block.norm1, block.norm1)
        self.attn2 = AneAttention(block.attn2, block.norm2)
        proj_in = with_norm(block.norm3, block.ff.proj_in)
        halves = zip(proj_in.weight.chunk(2), proj_in.bias.chunk(2), strict=True)
        self.value, self.gate = (as_conv(linear_of(*half)) for half in halves)
        self.proj_out = as_conv(block.ff.proj_out)

    def forward(self, x, text, mask, rope):
        if self.attn1 is not None:
            x = x + self.attn1(normalize(x, self.eps), rope=rope)
        x = x + self.attn2(normalize(x, self.eps), text, mask)
        h = normalize(x, self.eps)
        return x + self.proj_out(self.value(h) * F.gelu(self.gate(h)))
