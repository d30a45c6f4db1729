"""The networks in the form that half precision and the neural engine can take. Same weights, same numbers, other operations.

A phone computes in float16: nothing above 65504, three decimal digits, and a square overflows beyond 255. And its neural engine
likes tensors of (B, C, 1, S), with 1x1 convolutions where PyTorch has linear layers (apple/ml-ane-transformers). So, for export:

    GroupNorm       as one layer_norm over each group: Core ML then has one operation that takes care of its own sums, where it
                    would otherwise write out the squares of differences, in float16
    time embedding  in float32, see export_coreml.py: 1000 t radians have no decimals left in float16
    masks           as numbers added to the logits, -10000 for padding: a phone's programs take no booleans as inputs
    CLIP            written out, without the last layer and the pooled state, which the student does not read
    --layout ane    every transformer in (B, C, 1, S), each head's attention by itself

Every form is tested to give the numbers of the original.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm, Transformer2D, rope_table

MASKED = -1e4  # added to the logit of padding; exp() of it is 0 in any precision, and float16 can hold it


class LayerNormGroups(nn.Module):
    """nn.GroupNorm for (B, C, H, W), as one layer_norm over (B, groups, C / groups * H * W), then gain and offset."""

    def __init__(self, norm):
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x):
        h = x.reshape(x.shape[0], self.groups, -1)
        h = F.layer_norm(h, (h.shape[-1],), eps=self.eps).reshape(x.shape)
        return h * self.weight[None, :, None, None] + self.bias[None, :, None, None]


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

    def __init__(self, unet, layout="standard"):
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
# --layout ane: (B, C, 1, S)


def as_conv(linear):
    """nn.Linear as a 1x1 convolution with the same weights."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    conv.weight = nn.Parameter(linear.weight[:, :, None, None], requires_grad=False)
    conv.bias = linear.bias
    return conv


class AneNorm(nn.Module):
    """LayerNorm or RMSNorm over the channels of (B, C, 1, S)."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, getattr(norm, "bias", None), norm.eps

    def forward(self, x):
        if self.bias is None:
            return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) * self.weight[:, None, None]
        x = (x - x.mean(1, keepdim=True)) / 16  # so that the squares stay below 65504 up to |x| = 4096
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps / 256)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class AneAttention(nn.Module):
    """model.Attention of x (B, C, 1, S) on context (B, D, 1, T): head by head, scores as (B, T, 1, S)."""

    def __init__(self, attention):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (
            as_conv(linear) for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out)
        )
        self.head_dim = attention.head_dim
        self.norm_q, self.norm_k = (
            AneNorm(norm) if isinstance(norm, RMSNorm) else nn.Identity()
            for norm in (attention.norm_q, attention.norm_k)
        )

    def forward(self, x, context=None, mask=None, rope=None):
        context = x if context is None else context
        queries = [self.norm_q(q) for q in self.to_q(x).split(self.head_dim, dim=1)]  # (B, d, 1, S) each
        keys = [self.norm_k(k) for k in self.to_k(context).split(self.head_dim, dim=1)]  # one for all heads with MQA
        values = self.to_v(context).split(self.head_dim, dim=1)
        if rope is not None:
            queries, keys = ([rotate_channels(h, *rope) for h in some] for some in (queries, keys))
        keys = [k.transpose(1, 3) for k in keys]  # (B, T, 1, d)
        out = []
        for i, q in enumerate(queries):
            j = i % len(keys)
            scores = torch.einsum("bchq,bkhc->bkhq", q * self.head_dim**-0.5, keys[j])  # (B, T, 1, S)
            scores = scores if mask is None else scores + mask
            out.append(torch.einsum("bkhq,bchk->bchq", scores.softmax(dim=1), values[j]))
        return self.to_out(torch.cat(out, dim=1))


def rotate_channels(x, cos, sin):
    """model.rotate for one head in (B, d, 1, S): cos, sin (d / 2, 1, S)."""
    first, second = x.chunk(2, dim=1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=1)


class AneTransformer(nn.Module):
    """model.Transformer2D with everything between the picture-shaped ends in (B, C, 1, S)."""

    def __init__(self, transformer):
        super().__init__()
        self.cfg, self.norm = transformer.cfg, transformer.norm
        self.proj_in, self.proj_out = (
            None if linear is None else as_conv(linear) for linear in (transformer.proj_in, transformer.proj_out)
        )
        self.blocks = nn.ModuleList(AneBlock(block) for block in transformer.blocks)

    def forward(self, x, text, mask):
        height, width = x.shape[2:]
        rope = None
        if self.cfg.rope and self.blocks[0].attn1 is not None:
            rope = [
                table.T[:, None] for table in rope_table(height, width, self.cfg.head_dim, x.device)
            ]  # (d / 2, 1, S)
        text = text.transpose(1, 2)[:, :, None]  # (B, T, D) -> (B, D, 1, T)
        mask = mask[:, 0, 0, :, None, None]  # (B, 1, 1, T) -> (B, T, 1, 1)
        h = x if self.norm is None else self.norm(x)
        h = h.flatten(2)[:, :, None]  # (B, C, H, W) -> (B, C, 1, S)
        h = h if self.proj_in is None else self.proj_in(h)
        for block in self.blocks:
            h = block(h, text, mask, rope)
        h = h if self.proj_out is None else self.proj_out(h)
        h = h.reshape(x.shape)
        return h if self.norm is None else x + h


class AneBlock(nn.Module):
    """model.TransformerBlock in (B, C, 1, S)."""

    def __init__(self, block):
        super().__init__()
        self.norm1 = None if block.norm1 is None else AneNorm(block.norm1)
        self.attn1 = None if block.attn1 is None else AneAttention(block.attn1)
        self.norm2, self.attn2 = AneNorm(block.norm2), AneAttention(block.attn2)
        self.norm3, self.proj_in, self.proj_out = (
            AneNorm(block.norm3),
            as_conv(block.ff.proj_in),
            as_conv(block.ff.proj_out),
        )

    def forward(self, x, text, mask, rope):
        if self.attn1 is not None:
            x = x + self.attn1(self.norm1(x), rope=rope)
        x = x + self.attn2(self.norm2(x), text, mask)
        value, gate = self.proj_in(self.norm3(x)).chunk(2, dim=1)
        return x + self.proj_out(value * F.gelu(gate))
