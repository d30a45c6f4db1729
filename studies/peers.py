"""What else would a student take? Three networks of one size learn from the same batches for the same wall time.

    python -m studies.peers --minutes 10                          # ours, a UNet of diffusers', a plain DiT: half an hour in all
    python -m studies.peers --minutes 10 --lr 2.5e-3 5e-3         # each at both rates: what suits one need not suit another
    python -m studies.peers --minutes 10 --only ours dit          # two of them

    ours        model.py's UNet, --size tiny
    diffusers   UNet2DConditionModel of the same widths: full convolutions, self-attention from the second stage on, all heads with
                keys of their own; where SnapGen's ladder begins
    dit         a plain diffusion transformer as in minRF, with as many parameters as ours: patches of 2x2, adaptive norms for the
                time, cross-attention for the text

Loss, noise, times, batches, optimizers (Muon for the matrices of transformer blocks, AdamW for the rest) and averaged weights
are those of stage 1. Learning rates fall over the last 40 % of the time, so that each network has its whole schedule. Validation
and drawing do not count. Writes peers.png (loss, mini-GenEval over the minutes) and peers.json; what that has is not trained again.
"""

import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from common.arguments import Parser, add_device, by_size, integer, real
from common.checkpoint import save_json
from common.device import describe_machine, move, multiply_in_bfloat16, pick_device
from common.encoders import FrozenEncoders
from common.figures import pyplot, save_figure
from common.training import (
    learning_rate,
    make_optimizers,
    noisy_batch,
    predict,
    sampling_settings,
    timestep_shift,
    update_ema,
    validate,
)
from data import open_data
from evaluate import prompts_of, score
from model import PRESETS, UNet, timestep_embedding, zero_branches
from sample import draw_pictures


class DiffusersUNet(nn.Module):
    """diffusers' UNet, called as ours is. (B, 16, H, W), (B,), (B, T, D), (B, T) -> (B, 16, H, W)"""

    def __init__(self, cfg):
        super().__init__()
        self.net = UNet2DConditionModel(
            in_channels=cfg.latent_channels, out_channels=cfg.latent_channels, block_out_channels=cfg.channels,
            layers_per_block=cfg.layers, cross_attention_dim=cfg.text_dim, norm_num_groups=cfg.groups,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=cfg.depth,
            attention_head_dim=tuple(c // cfg.head_dim for c in cfg.channels), use_linear_projection=True,
        )  # fmt: skip

    def forward(self, x_t, t, text, mask=None, feature=None):
        return self.net(x_t, 1000 * t, text, encoder_attention_mask=mask).sample


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the time scales, shifts and gates the first and the last."""

    def __init__(self, width, text_dim, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.heads = heads
        self.to_qkv, self.to_out1 = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.to_q, self.to_kv, self.to_out2 = nn.Linear(width, width), nn.Linear(text_dim, 2 * width), nn.Linear(width, width)
        self.norm_text = nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)  # adaLN-Zero: the identity at first

    def attend(self, q, k, v, mask=None):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, S, D) -> (B, heads, S, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def forward(self, x, time, text, mask):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.to_out1(self.attend(*self.to_qkv(h).chunk(3, dim=-1)))
        x = x + self.to_out2(self.attend(self.to_q(self.norm_text(x)), *self.to_kv(text).chunk(2, dim=-1), mask))
        return x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A plain diffusion transformer (Peebles & Xie, 2212.09748), called as our UNet is; `side` is that of the latents."""

    def __init__(self, cfg, side, width=224, depth=6, heads=7, patch=2):
        super().__init__()
        self.patch, self.width = patch, width
        self.embed = nn.Linear(cfg.latent_channels * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, cfg.text_dim, heads) for _ in range(depth))
        self.norm_out, self.out = nn.LayerNorm(width), nn.Linear(width, cfg.latent_channels * patch**2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_t, t, text, mask=None, feature=None):
        size, p = x_t.shape[2:], self.patch
        x = self.embed(F.unfold(x_t, p, stride=p).transpose(1, 2)) + self.position  # (B, tokens, width)
        time = self.time_mlp(timestep_embedding(t, self.width))
        for block in self.blocks:
            x = block(x, time, text, None if mask is None else mask[:, None, None])
        return F.fold(self.out(self.norm_out(x)).transpose(1, 2), size, p, stride=p)


def build(name, cfg, side):
    net = zero_branches(UNet(cfg)) if name == "ours" else DiffusersUNet(cfg) if name == "diffusers" else DiT(cfg, side)
    net.cfg = cfg  # what drawing needs to know: widths of text and latents
    return net


def train(name, lr, args, data, val, encoders, prompts):
    """Train one network for --minutes: {"parameters", "rows": [{"minutes", "step", "val_loss", "score"}, ...]}."""
    device, shift, side = encoders.device, timestep_shift(args.size, args.resolution), data.shape[-1]
    torch.manual_seed(args.seed)
    model = build(name, PRESETS[args.size], side).to(device, memory_format=torch.channels_last)
    multiply_in_bfloat16(model, device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizers = make_optimizers(model, lr, args.optimizer)
    forward = torch.compile(model) if args.compile else model
    config = {"latent_size": list(data.shape[1:]), "sampling": sampling_settings(args.size, args.resolution)}
    rows, seconds, step, total = [], 0.0, 0, 60 * args.minutes
    bar = tqdm(total=round(total), desc=name, unit=" s", mininterval=1, disable=None)
    while step <= 3 or seconds < total:
        if step == 3:  # torch.compile and the caches have warmed up: now the time counts
            seconds = 0.0
        start = time.perf_counter()
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr * min(1, (step + 1) / 200) * learning_rate(int(1e4 * seconds / total), 10_000, warmup=1)
        batch = move(noisy_batch(data, args.seed, step, args.batch, shift), device)
        loss = (predict(forward, batch) - batch.v).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step)
        if not loss.isfinite():
            raise SystemExit(f"the loss of {name} became NaN at step {step} with --lr {lr:g}: choose a lower one.")
        step, seconds = step + 1, seconds + time.perf_counter() - start
        bar.update(min(round(seconds), bar.total) - bar.n)
        if step > 3 and seconds >= total * (len(rows) + 1) / args.points:
            pictures = draw_pictures(ema, config, encoders, prompts, range(len(prompts)))
            rows.append({"minutes": seconds / 60, "step": step, "val_loss": validate(ema, val, shift, device),
                         "score": score(pictures, prompts)["overall"]})  # fmt: skip
            if bar.disable:
                print(f"{name}: {rows[-1]}", flush=True)
    bar.close()
    return {"parameters": sum(p.numel() for p in model.parameters()), "rows": rows}


def plot(results, args):
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4))
    for name, result in results.items():
        rows, size = result["rows"], result["parameters"] / 1e6
        for axis, column in zip(axes, ("val_loss", "score"), strict=True):
            axis.plot([row["minutes"] for row in rows], [row[column] for row in rows], "o-", ms=4,
                      label=f"{name}, {size:.1f} M, {rows[-1]['step']} steps")  # fmt: skip
    axes[0].set(title="validation loss", xlabel="minutes of training", yscale="log")
    axes[1].set(title=f"mini-GenEval of {6 * args.per_family} prompts", xlabel="minutes of training")
    save_figure(figure, args.out / "peers.png")


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m studies.peers --minutes 10")
    p.add_argument("--minutes", type=real(above=0), default=10.0, help="wall time of each training")
    p.add_argument("--only", nargs="+", choices=("ours", "diffusers", "dit"), default=["ours", "diffusers", "dit"], help="these")
    p.add_argument("--points", type=integer(1), default=4, help="measurements of each, evenly in time, the last at the end")
    p.add_argument("--per-family", type=integer(1), default=40, help="mini-GenEval prompts a family")
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder whose encoders are used")
    p.add_argument("--pictures", type=integer(1), default=20_000, help="different pictures of the shapes world to train on")
    p.add_argument("--batch", type=integer(1), default=64, help="pictures a step")
    p.add_argument("--lr", type=real(above=0), nargs="+", default=[5e-3], help="learning rates, each in turn, after the warm-up")
    p.add_argument("--seed", type=integer(0), default=0, help="of weights, noise, timesteps and the data's order")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/studies/peers"), help="where to")
    p.add_argument("--compile", action="store_true", help="torch.compile each network")
    add_device(p)
    p.set_defaults(size="tiny", data=None, optimizer=None, resolution=None)
    return by_size(p.parse_args(argv))


def main(argv=None):
    args = parse_arguments(argv)
    encoders, results = FrozenEncoders(args.teacher, pick_device(args.device)), {}
    names = ("minutes", "points", "per_family", "teacher", "pictures", "batch", "seed", "compile")
    settings = {name: getattr(args, name) for name in names} | describe_machine(encoders.device)
    if (args.out / "peers.json").is_file():
        results = json.loads((args.out / "peers.json").read_text(encoding="utf-8-sig"))
        if any(result.get("settings") != settings for result in results.values()):
            raise SystemExit(f"{args.out}/peers.json is of other settings, another commit or machine: give another --out, or "
                             "delete it.")  # fmt: skip
    data, val = open_data(args.data, encoders, args.resolution, args.pictures, PRESETS[args.size].text_dim)
    prompts = prompts_of("val", args.per_family, 0)
    for lr in args.lr:
        for name in args.only:
            if f"{name}, {lr:g}" not in results:
                trained = train(name, lr, args, data, val, encoders, prompts)
                results[f"{name}, {lr:g}"] = {"settings": settings} | trained
                save_json(results, args.out / "peers.json")
    print(f"\n{args.minutes} minutes each, batch {args.batch}, seed {args.seed}, {describe_machine(encoders.device)}")
    print(f"{'network, rate':18}{'params M':>9}{'steps':>7}{'val loss':>10}{'mini-GenEval':>14}")
    for name, result in results.items():
        last = result["rows"][-1]
        print(f"{name:18}{result['parameters'] / 1e6:9.2f}{last['step']:7}{last['val_loss']:10.4f}{last['score']:14.3f}")
    plot(results, args)
    print(f"wrote {args.out}/peers.png, peers.json")


if __name__ == "__main__":
    main()
