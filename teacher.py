"""The frozen teacher: the transformer (MMDiT) of a Stable Diffusion 3 folder, its text, and its inner features.

Stage 2 learns from its velocity and its last block, the discriminator of stage 3 looks through several. `assets/toy-sd3` and a
folder of stable-diffusion-3.5-large are read by the same lines. Its conventions, beside ours:

    time    diffusers counts the t of flow.py from 0 to 1000
    text    both CLIPs' token states side by side, padded with zeros to T5's width, then 256 tokens of T5; the pooled states
            go in with the time. Without a T5 (or with a silent one, as in toy-sd3) the 256 tokens are zeros
    path    the same straight line and the same velocity eps - x_0, in the same latent space: nothing to convert
"""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from transformers import AutoTokenizer, T5EncoderModel

import flow
from common import parallel
from data import cached

T5_TOKENS = 256  # diffusers' max_sequence_length


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


class T5:
    """The T5 of an SD3 folder as a text encoder, or one that says nothing: no folder text_encoder_3, or zeros for any caption."""

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        self.device, self.silent = device, not (folder / "text_encoder_3").is_dir()
        if not self.silent:
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_3")
            self.encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_3", dtype=dtype).to(device).eval()
            self.silent = not self(["a photo"]).any()

    @torch.no_grad()
    def __call__(self, captions):
        """Captions -> (B, 256, D) float16, padding included: SD3's transformer attends to it."""
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=T5_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        return self.encoder(ids.to(self.device))[0].half().cpu()


class Teacher:
    """The transformer of an SD3 folder, in eval mode and without gradients of its own (they flow through it to its input).

    Args:
        folder: an SD3 folder in diffusers' layout.
        data: the data.Latents whose captions it will be asked about; their T5 states are computed once and cached.
        device, dtype: where and in which precision it runs; velocities and features come back in float32.
        layers: indices of the joint blocks whose picture tokens are returned as features, -1 the last, "middle" the
            middle one; None: at a quarter, a half and the end, where a transformer knows about layout, objects, detail.

    Raises:
        SystemExit: with one sentence, when the folder has no transformer, it cannot be read, or has no such layer.
    """

    def __init__(self, folder, data, device="cpu", dtype=torch.float32, layers=(-1,), cache="runs/cache"):
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

        # text: CLIP's states come with the data; T5's are computed once for its captions, or as they come if there are many
        self.data, self.live, self.t5 = data, T5(folder, device, dtype) if data.streamed else None, None
        if not data.streamed:
            self.t5 = self._t5_of_all(folder, data.captions, cache)
        self.silent = self.live.silent if data.streamed else self.t5 is None
        if self.silent:
            self.net.set_attn_processor(WeightedTextAttention(T5_TOKENS))

    def _t5_of_all(self, folder, captions, cache, batch=64):
        """(K, 256, D): T5's states of all captions, computed once, so that T5 need not stay in memory; None if it is silent."""
        if not (folder / "text_encoder_3").is_dir():
            return None
        weights = sorted((p.name, p.stat().st_size) for p in (folder / "text_encoder_3").iterdir())
        key = hashlib.sha256(json.dumps([captions, str(folder.resolve()), weights]).encode()).hexdigest()[:16]

        def compute():
            t5 = T5(folder, self.device, self.dtype)
            if t5.silent:
                return {"t5": torch.zeros(0)}, []
            return {"t5": torch.cat([t5(captions[i : i + batch]) for i in range(0, len(captions), batch)])}, []

        with parallel.first_alone():
            states = cached(Path(cache) / f"t5-{key}.safetensors", compute)[0]["t5"]
        return states if len(states) else None

    def compile(self):
        """torch.compile each block: minutes to start, then faster."""
        torch._dynamo.config.recompile_limit = 32  # the last block is another, with and without gradients, for any batch
        for block in self.net.transformer_blocks:
            block.compile()

    def text(self, ids):
        """What the transformer reads of captions: (states (B, T, D), pooled (B, P)), as diffusers' pipeline lays them out."""
        ids = ids if ids.dim() == 1 else ids.amax(1)
        if self.live is not None and not self.silent and self.last is not None and torch.equal(ids, self.last[0]):
            return self.last[1]  # stage 3 asks about the same captions several times a step, and T5 is large
        states, pooled = self.data.clip(ids)
        clip = F.pad(states, (0, self.net.config.joint_attention_dim - states.shape[-1]))
        if self.silent:  # one zero token that counts 256 times
            t5 = clip.new_zeros(len(clip), 1, clip.shape[-1])
        else:
            t5 = self.t5[ids] if self.live is None else self._t5_now(ids)
        text = torch.cat([clip, t5], dim=1).to(self.device, self.dtype), pooled.to(self.device, self.dtype)
        self.last = (ids.clone(), text)
        return text

    def _t5_now(self, ids):
        """T5's states of captions (B,), each different caption once: with guidance half of them are the empty one."""
        different, where = ids.unique(return_inverse=True)
        return self.live(self.data.captions_of(different))[where]

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
