"""Make a complete Stable Diffusion 3 pipeline for the class world, a thousand times smaller, from nothing.

The course needs a teacher of another architecture, text encoders and an autoencoder, and a class has no time to download
16 GB. So this script trains all three, in the shape of the real thing: an AutoencoderKL (f = 8, 16 channels), two CLIP
text models, and SD3's MMDiT.

    python -m assets.make_things_sd3 --only vae --out runs/things-sd3

Each part goes on where it was stopped when the same command is given again.
"""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common.arguments import Parser, add_device, integer, real
from common.checkpoint import load_state, save_json, save_state
from common.device import matmul_dtype, pick_device
from common.muon import Muon
from common.pictures import to_tensor
from common.seeds import rng
from common.world import ThingsWorld


def cosine(step, steps, peak, warmup=100):
    """Learning rate: linear warm-up, then cosine decay to zero."""
    return peak * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def say(part, bar, step, steps, **values):
    """Values on the progress bar; without a terminal, a line for the log file every 100 steps."""
    shown = {name: f"{value:.3g}" for name, value in values.items()}
    bar.set_postfix(shown, refresh=False)
    if bar.disable and (step + 1) % 100 == 0:
        print(f"{part}: step {step + 1} of {steps}, " + ", ".join(f"{n} {v}" for n, v in shown.items()), flush=True)


def save_part(network, folder):
    """A diffusers or transformers network in half precision, complete or not at all."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    copy.deepcopy(network).half().save_pretrained(beside)
    # transformers would load half precision as such, diffusers as float32, and the pipeline would mix them: float32 for all.
    config = json.loads((beside / "config.json").read_text())
    if "dtype" in config:
        save_json({**config, "dtype": "float32"}, beside / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


# ------------------------------------------------------------------------------------------------------------------
# The autoencoder


class Leaves:
    """Pictures of nothing in particular, which teach an autoencoder what any picture may hold: `side` pixels, (side, side, 3).

    "Dead leaves": shapes of all sizes, each hiding what was drawn before, filled with flat colors, gradients and noise of
    natural spectrum; then, some of the time, strokes and letters.
    """

    def __init__(self, side, seed=0, textures=48):
        g = np.random.default_rng(seed)
        self.side = side
        f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
        f[0, 0] = 1
        self.textures = []  # noise whose amplitude falls with frequency, as in photographs; colors go together
        for _ in range(textures):
            spectrum = np.fft.fft2(g.standard_normal((3, 256, 256))) / f ** g.uniform(1.0, 2.0)
            spectrum[:, 0, 0] = 0
            noise = np.fft.ifft2(spectrum).real
            noise /= noise.std((1, 2), keepdims=True)
            mix = g.uniform(0.0, 0.4)
            noise = (1 - mix) * noise[:1] + mix * noise
            self.textures.append(np.moveaxis(noise, 0, -1).astype(np.float32))

    def fill(self, g):
        """(side, side, 3) in 0..255: a color, with a gradient or a texture."""
        n, grey = self.side, g.uniform(0, 255)
        color = np.clip(grey + g.uniform(-1, 1, 3) * g.choice([12, 60, 160]), 0, 255)
        kind = g.random()
        if kind < 0.3:
            return np.broadcast_to(color.astype(np.float32), (n, n, 3))
        if kind < 0.55:
            x, y = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n))
            a = g.uniform(0, 2 * np.pi)
            ramp = (x * np.cos(a) + y * np.sin(a))[..., None]
            return np.clip(color + ramp * g.uniform(-110, 110, 3), 0, 255).astype(np.float32)
        noise = self.textures[g.integers(len(self.textures))]
        step = int(g.integers(1, max(2, 256 // n)))
        top, left = g.integers(0, 256 - n * step + 1, 2) if n * step <= 256 else (0, 0)
        part = noise[top : top + n * step : step, left : left + n * step : step]
        return np.clip(color + part * g.uniform(4, 36), 0, 255)

    def __call__(self, g):
        n, k = self.side, 2
        picture = np.array(self.fill(g))
        for _ in range(int(g.integers(0, 14))):
            big = Image.new("L", (n * k, n * k))
            pen = ImageDraw.Draw(big)
            r = n * k * 0.5 * min(1, 0.06 / g.random() ** 0.7)
            x, y = g.uniform(0, n * k, 2)
            if g.random() < 0.5:
                corners = int(g.integers(3, 8))
                a = np.sort(g.uniform(0, 2 * np.pi, corners))
                far = r * g.uniform(0.5, 1, corners)
                pen.polygon(list(zip(x + far * np.cos(a), y + far * np.sin(a), strict=True)), fill=255)
            else:
                s = r * g.uniform(0.4, 1)
                pen.ellipse([x - r, y - s, x + r, y + s], fill=255)
            cover = np.asarray(big.reduce(k), dtype=np.float32)[..., None] / 255
            picture = picture + cover * (self.fill(g) - picture)
        if g.random() < 0.35:
            image = Image.fromarray(picture.astype(np.uint8))
            pen = ImageDraw.Draw(image)
            for _ in range(int(g.integers(1, 6))):
                color, (x, y) = tuple(int(v) for v in g.integers(0, 256, 3)), g.uniform(-10, n, 2)
                if g.random() < 0.5:
                    points = [(x, y)] + [tuple(g.uniform(0, n, 2)) for _ in range(int(g.integers(1, 4)))]
                    pen.line(points, fill=color, width=int(g.integers(1, 5)), joint="curve")
                else:
                    text = "".join(chr(int(c)) for c in g.integers(33, 127, int(g.integers(1, 9))))
                    pen.text((x, y), text, fill=color, font=ImageFont.load_default(int(g.integers(9, 30))))
            picture = np.asarray(image, dtype=np.float32)
        return picture


def crop(picture, side, g, tries=3):
    """A square of `side` pixels with something in it: of `tries` places the one whose pixels differ most. (H, W, 3) uint8."""
    most, best = -1.0, None
    for _ in range(tries):
        y, x = g.integers(0, picture.shape[0] - side + 1), g.integers(0, picture.shape[1] - side + 1)
        part = picture[y : y + side, x : x + side]
        if (spread := float(part[::4, ::4].std((0, 1)).sum())) > most:
            most, best = spread, part
    return best


def autoencoder_batch(world, leaves, seed, step, size, side):
    """(B, 3, side, side) in [-1, 1]: half the class world's pictures, half leaves; a pure function of (seed, step)."""
    g = np.random.default_rng((seed, step))
    parts = []
    while len(parts) < size // 2:  # two crops of each picture of the world, or the picture
        picture = np.asarray(world[step * (size // 2) + len(parts)][0])
        parts += [crop(picture, side, g), crop(picture, side, g)] if side < len(picture) else [picture]
    parts += [leaves(g) for _ in range(size - len(parts))]
    x = torch.from_numpy(np.stack(parts).astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def new_autoencoder():
    """AutoencoderKL of 3.1 M parameters, f = 8, 16 channels."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(24, 48, 96, 128), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8,
        use_quant_conv=False, use_post_quant_conv=False, sample_size=128, force_upcast=False, mid_block_add_attention=False,
    )  # fmt: skip


def make_autoencoder(out, device, steps=5400, batch=32, side=64, lr=4e-3, kl_weight=4e-4, seed=0, state="runs/things-vae"):
    """vae/: an AutoencoderKL with the global shift and scale that make its latents zero-mean and of unit deviation.

    It learns on crops, which hold more than the plain ground of whole pictures; in the last third on whole pictures, since a
    GroupNorm does mind how much of a picture is plain. Muon for the kernels: after 160 steps it is 2 to 3 dB ahead of AdamW.
    """
    torch.manual_seed(seed)
    vae = new_autoencoder().to(device, memory_format=torch.channels_last)
    kernels = [w for w in vae.parameters() if w.dim() == 4 and min(w.shape[0], w[0].numel()) >= 24]
    others = [w for w in vae.parameters() if not any(w is kernel for kernel in kernels)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    optimizers.append(Muon(kernels, lr=lr, weight_decay=0.01))
    world, crops, whole = ThingsWorld("train", seed, steps * batch), Leaves(side), Leaves(2 * side)
    settings = {"steps": steps, "batch": batch, "side": side, "lr": lr, "kl": kl_weight, "seed": seed, "world": world.name}
    first = load_state(state, settings, optimizers, vae=vae)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="vae", mininterval=1, disable=None)
    smooth = []
    for step in bar:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = cosine(step, steps, lr)
        if step < 2 * steps // 3:
            x = autoencoder_batch(world, crops, seed, step, batch, side).to(device)
        else:
            x = autoencoder_batch(world, whole, seed, step, batch // 4, 2 * side).to(device)
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng(seed, step))))  # for the posterior's sample
        with torch.autocast(device.type, torch.bfloat16, enabled=matmul_dtype(device) == torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample.float()
        error = ((restored - x) ** 2).mean((1, 2, 3))
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = error.mean() + 0.1 * (restored - x).abs().mean() + kl_weight * min(1, step / 500) * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        half = len(x) // 2
        smooth = [*smooth[-99:], [error[:half].mean().item(), error[half:].mean().item(), kl.item()]]
        a, b, k = np.mean(smooth, 0)
        say("vae", bar, step, steps, world_db=10 * math.log10(4 / a), leaves_db=10 * math.log10(4 / b), kl=k)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_state(state, step + 1, settings, optimizers, vae=vae)
    vae.eval()
    val = ThingsWorld("val", 0, 256)
    with torch.no_grad():
        x = to_tensor([val[i][0] for i in range(len(val))])
        z = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in x.split(32)])
        restored = torch.cat([vae.decode(part).sample.cpu() for part in z.split(32)])
    psnr = (10 * torch.log10(4 / ((restored.clamp(-1, 1) - x) ** 2).mean((1, 2, 3)))).mean().item()
    # One scale for all channels, as SD3: unit deviation per channel would blow up the channels that hold next to nothing.
    shift, scale = z.mean().item(), 1 / z.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
    print(f"vae: {psnr:.2f} dB on {len(val)} validation pictures, shift {shift:.4f}, scale {scale:.4f}")
    save_part(vae.cpu(), out / "vae")


def main(argv=None):
    p = Parser(__doc__, "python -m assets.make_things_sd3 --only vae")
    p.add_argument("--out", type=Path, default=Path("runs/things-sd3"), help="where to")
    p.add_argument("--only", choices=("vae",), help="make this part alone")
    p.add_argument("--steps", type=integer(1), help="training steps of the part named by --only, if not its own number")
    p.add_argument("--lr", type=real(above=0), help="the same of its learning rate")
    add_device(p)
    args = p.parse_args(argv)
    device, own = pick_device(args.device), {name: getattr(args, name) for name in ("steps", "lr") if getattr(args, name)}
    make_autoencoder(args.out, device, **own)


if __name__ == "__main__":
    main()
