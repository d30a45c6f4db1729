"""The networks in the form that half precision and the neural engine can take. Same weights, same numbers, other operations.

A phone computes in float16: nothing above 65504, three decimal digits, and a square overflows beyond 255. And its neural engine
likes tensors of (B, C, 1, S), with 1x1 convolutions where PyTorch has linear layers (apple/ml-ane-transformers). So, for export:

    GroupNorm       as one layer_norm over each group: Core ML then has one operation that takes care of its own sums, where it
                    would otherwise write out the squares of differences, in float16. Its reshapes leave the last axis alone
    time embedding  in float32, see export_coreml.py: 1000 t radians have no decimals left in float16
    masks           as numbers added to the logits, -10000 for padding: a phone's programs take no booleans as inputs
    CLIP            written out, without the last layer and the pooled state, which the student does not read
    transformers    in (B, C, 1, S), attention in pieces, the gains of norms inside the weights behind them (--layout standard: as
                    they are in model.py)

Every form is tested to give the numbers of the original.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm, Transformer2D, rope_table

MASKED = -1e4  # added to the logit of padding; exp() of it is 0 in any precision, and float16 can hold it


class LayerNormGroups(nn.Module):
    """nn.GroupNorm for (B, C, H, W), as one layer_norm over (B, groups, C / groups * H, W), then gain and offset."""

    def __init__(self, norm):
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x):
        h = x.reshape(x.shape[0], self.groups, -1, x.shape[3])
        h = F.layer_norm(h, h.shape[2:], eps=self.eps).reshape(x.shape)
        return h if self.weight is None else h * self.weight[None, :, None, None] + self.bias[None, :, None, None]


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
        unet = copy.deepcopy(unet).eval()
        if layout == "ane":
            unet = replace_modules(unet, Transformer2D, AneTransformer)
        self.unet = replace_modules(unet, nn.GroupNorm, LayerNormGroups)

    def forward(self, latent, t, text, mask):
        return self.unet(latent, t, text, (1 - mask) * MASKED)


class PhoneDecoder(nn.Module):
    """The tiny decoder: forward(latent (1, 16, h, w)) -> picture (1, 3, 8h, 8w), from 0 to 255."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = replace_modules(copy.deepcopy(decoder).eval(), nn.GroupNorm, LayerNormGroups)

    def forward(self, latent):
        return ((self.decoder(latent) + 1) * 127.5).clamp(0, 255)


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
            x = x + layer.mlp.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
        return x


class PhoneText(nn.Module):
    """Both CLIPs: forward(tokens, tokens_2 (1, T) int32) -> text (1, T, width), mask (1, T) of 0 and 1.

    The mask is 1 up to and including the first end-of-text token, the tokenizer's `end` (old CLIP configs name another).
    `width` pads the states with zeros, as encoders.pad_text.
    """

    def __init__(self, clips, width, end):
        super().__init__()
        self.clips, self.width = nn.ModuleList(PhoneClip(clip) for clip in clips), width
        self.end = end

    def forward(self, tokens, tokens_2):
        text = torch.cat([clip(ids) for clip, ids in zip(self.clips, (tokens, tokens_2), strict=True)], dim=-1)
        ends = (tokens == self.end).float()
        ends_before = torch.cumsum(ends, dim=1) - ends
        return F.pad(text, (0, self.width - text.shape[-1])), (ends_before < 0.5).float()


# ------------------------------------------------------------------------------------------------------------------
# The layout of the neural engine: (B, C, 1, S), S = H * W positions

LONGEST = 16384  # positions or queries on the last axis: the neural engine's compiler takes no H or W beyond it
PIECE = 4096  # positions that pass through a stage's blocks at once, where they need not see each other
SCORES = 2**20  # numbers in one tensor of attention scores: 2 MiB in float16


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
    return x * torch.rsqrt((x * x).mean(1, keepdim=True) + eps)


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
        for part in pieces(h, PIECE) if alone else [h]:
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
