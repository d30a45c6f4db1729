"""The frozen teacher: the transformer (MMDiT) of a Stable Diffusion 3 folder, its text, and its inner features.

Stage 2 learns from its velocity and the features of a middle block, the discriminator of stage 3 looks through several.
`assets/toy-sd3` and a folder of stable-diffusion-3.5-large are read by the same lines. Its conventions, beside ours:

    time    diffusers counts the t of flow.py from 0 to 1000
    text    both CLIPs' token states side by side, padded with zeros to T5's width, then 256 tokens of T5; the pooled states
            go in with the time. Without a T5 (or with a silent one, as in toy-sd3) the 256 tokens are zeros
    path    the same straight line and the same velocity eps - x_0, in the same latent space: nothing to convert
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel

import flow
from common.encoders import T5, T5_TOKENS, StoredT5
from common.pictures import CACHE


class WeightedTextAttention:
    """diffusers' joint attention of SD3 and SD3.5, with the last text token counted `n` times.

    Without T5 the pipeline appends n = 256 zero tokens to the text. SD3's transformer gives text tokens no position, so
    the 256 stay equal in every layer: one of them with log(n) added to its attention logit is the same sum (in float32),
    and at class scale the teacher sees 25 text tokens, not 280.
    """

    def __init__(self, n):
        self.bias = math.log(n)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        def heads(x, norm):  # (B, S, H * d) -> (B, H, S, d)
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        picture, text = hidden_states, encoder_hidden_states
        q, k, v = (
            heads(attn.to_q(picture), attn.norm_q),
            heads(attn.to_k(picture), attn.norm_k),
            heads(attn.to_v(picture), None),
        )
        bias = None
        if text is not None:
            q = torch.cat([q, heads(attn.add_q_proj(text), attn.norm_added_q)], dim=2)
            k = torch.cat([k, heads(attn.add_k_proj(text), attn.norm_added_k)], dim=2)
            v = torch.cat([v, heads(attn.add_v_proj(text), None)], dim=2)
            bias = q.new_zeros(1, 1, 1, k.shape[2])
            bias[..., -1] = self.bias
            bias = bias.expand(1, 1, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        if text is None:  # the second attention of SD3.5-Medium, among the picture's tokens alone
            return attn.to_out[0](out)
        picture, text = out[:, : picture.shape[1]], out[:, picture.shape[1] :]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](picture), text


class Teacher:
    """The transformer of an SD3 folder, in eval mode and without gradients of its own (they flow through it to its input).

    Args:
        folder: an SD3 folder in diffusers' layout.
        data: the data.Latents whose captions it will be asked about; their T5 states are computed once and lie on the disk. Of
            ShardedLatents, which may have millions of captions, T5 reads those of a batch as they come.
        device, dtype: where and in which precision it runs; velocities and features come back in float32.
        layers: indices of the joint blocks whose picture tokens are returned as features, -1 the last, "middle" the
            middle one; None: at a quarter, a half and the end, where a transformer knows about layout, objects, detail.

    Raises:
        SystemExit: with one sentence, when the folder has no transformer, it cannot be read, has no such layer, or none
            for so large a picture.
    """

    def __init__(self, folder, data, device="cpu", dtype=torch.float32, layers=(-1,), cache=CACHE):
        folder = Path(folder)
        if not (folder / "transformer").is_dir():
            raise SystemExit(
                f"{folder} has no transformer/ to learn from: give assets/toy-sd3 or a folder of "
                "stable-diffusion-3.5-large (or -large-turbo, for --turbo) in diffusers' layout."
            )
        try:
            self.net = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
        except Exception as error:  # diffusers has many for a damaged file
            raise SystemExit(f"cannot read the transformer in {folder}: {error}") from error
        side, most = max(data.shape[1:], default=0), self.net.config.pos_embed_max_size * self.net.config.patch_size
        if side > most:
            raise SystemExit(f"the teacher in {folder} knows latents of at most {most} a side, not {side}: give a "
                             f"--resolution of at most {8 * most}, or another --teacher.")  # fmt: skip
        self.net.requires_grad_(False).eval().to(device)
        blocks = self.net.transformer_blocks
        layers = layers or (len(blocks) // 4, "middle", len(blocks) - 1)
        layers = [len(blocks) // 2 if layer == "middle" else layer for layer in layers]
        self.device, self.dtype, self.layers, self.seen = torch.device(device), dtype, tuple(dict.fromkeys(layers)), {}
        for layer in self.layers:
            if not -len(blocks) <= layer < len(blocks):
                raise SystemExit(f"the teacher has {len(blocks)} blocks; there is no layer {layer}.")
            blocks[layer].register_forward_hook(lambda block, i, out, layer=layer: self.seen.update({layer: out[1]}))
        self.feature_dim, self.patch, self.last = self.net.inner_dim, self.net.config.patch_size, None

        self.data = data  # with CLIP's states of the captions; T5's are the teacher's own affair
        self.t5 = T5(folder, device, dtype) if data.streamed else StoredT5(folder, data.captions, device, dtype, cache)
        self.silent = self.t5.silent
        if self.silent:
            self.net.set_attn_processor(WeightedTextAttention(T5_TOKENS))

    def compile(self):
        """torch.compile each block: minutes to start, then faster."""
        torch._dynamo.config.recompile_limit = 32  # the last block is another, with and without gradients, for any batch
        for block in self.net.transformer_blocks:
            block.compile()

    def text(self, ids):
        """What the transformer reads of captions: (states (B, T, D), pooled (B, P)), as diffusers' pipeline lays them out."""
        ids = ids if ids.dim() == 1 else ids.amax(1)
        if not self.silent and self.last is not None and torch.equal(ids, self.last[0]):
            return self.last[1]  # stage 3 asks about the same captions several times a step, and T5 is large
        states, pooled = self.data.clip(ids)
        clip = F.pad(states, (0, self.net.config.joint_attention_dim - states.shape[-1]))
        if self.silent:  # one zero token that counts 256 times
            t5 = clip.new_zeros(len(clip), 1, clip.shape[-1])
        else:
            different, where = ids.unique(return_inverse=True)  # with guidance half of them are the empty one
            t5 = self.t5(self.data.captions_of(different) if self.data.streamed else different)[where]
        text = torch.cat([clip, t5], dim=1).to(self.device, self.dtype), pooled.to(self.device, self.dtype)
        self.last = (ids.clone(), text)
        return text

    def __call__(self, x_t, t, ids, guidance=1.0):
        """What the teacher says about noisy latents.

        Args:
            x_t: (B, C, H, W) noisy latents; t: (B,) in [0, 1]; ids: (B,) rows of the data's captions, 0 the empty one.
            guidance: 1 returns the velocity of the caption; otherwise it is guided away from the empty caption's.

        Returns (velocity (B, C, H, W), [features (B, D, H / p, W / p) of each layer]), p the patch size: 2 in SD3.
        """
        if guidance != 1:
            both, features = self(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([ids, torch.zeros_like(ids)]))
            return flow.guide(*both.chunk(2), guidance), [f[: len(x_t)] for f in features]
        states, pooled = self.text(ids.cpu())
        velocity = self.net(
            x_t.to(self.device, self.dtype),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=1000 * t.to(self.device, torch.float32),
            return_dict=False,
        )[0]
        grid = [side // self.patch for side in x_t.shape[2:]]
        # contiguous: torch 2.13 on the CPU crashes in a convolution's second derivative otherwise
        features = [self.seen.pop(n).transpose(1, 2).unflatten(2, grid).float().contiguous() for n in self.layers]
        return velocity.float(), features
