"""1b  The keys and values have no head axis: einsum uses the same ones for every head."""

import torch

import model


class Attention(model.Attention):
    def forward(self, x, context=None, mask=None, rope=None):
        context = x if context is None else context
        q = self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim)))  # (B, S, heads, d)
        k = self.norm_k(self.to_k(context))  # (B, T, d): one head for all
        v = self.to_v(context)  # (B, T, d)

        if rope is not None:  # rotate wants an axis of heads
            q, k = model.rotate(q, *rope), model.rotate(k[:, :, None], *rope)[:, :, 0]
        logits = torch.einsum("bshd,btd->bhst", q, k) / self.head_dim**0.5  # (B, heads, S, T)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        out = torch.einsum("bhst,btd->bshd", logits.softmax(dim=-1), v)  # (B, S, heads, d)

        return self.to_out(out.flatten(2))
