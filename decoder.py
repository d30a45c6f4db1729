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

    python decoder.py                                   # train the class-scale decoder, writes runs/decoder
    torchrun --nproc_per_node 8 decoder.py --size sd3 --vae stable-diffusion-3.5-large --data DIR --batch 256 --steps 1000000

Table 2, quality beside the teacher's decoder and the ablation: studies/decoder.py.

    L   = || x' - x ||^2 + 0.002 LPIPS(x', x) + 0.05 w L_adv      x' = decoder(z)                            [P], weights [A]
    L_adv = - E[ D(x') ],  w = |grad (the other two)| / |grad L_adv| at the last layer                                 [A]
    L_D = E[ max(0, 1 - D(x)) ] + E[ max(0, 1 + D(x')) ]                                                               [A]

No KL: the encoder is frozen, the latents are given. The discriminator D, widths and blocks (the simplest that meet Table 2): [A].
Marks: [P] the paper, [S] the team's later papers, [A] our assumption.
"""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import arguments, parallel, training
from common.arguments import integer, real
from common.checkpoint import load_network, load_state, load_weights, save_atomically, save_network, save_state
from common.device import autocast, describe_machine, half, move, pick_device
from common.distances import Perceptual, psnr
from common.encoders import FrozenAutoencoder
from common.figures import curves, side_by_side
from common.pictures import CACHE, to_tensor
from common.seeds import rng
from common.shapes import SIDE, ShapesWorld
from common.sources import CaptionedFolder
from common.training import Log, Means, ahead, clip_gradients, learning_rate, update_ema

WARMUP, EVERY = 200, 50  # steps until the learning rates are at their peak [A]; steps between two rows of log.csv

# ------------------------------------------------------------------------------------------------------------------
# The decoder


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the shape of the decoder. The defaults are the paper's size, for SD3's latents."""

    channels: tuple = (256, 160, 160, 64)  # at 1, 2, 4 and 8 times the latent's side [A]
    blocks: tuple = (3, 3, 1, 1)  # per resolution [A]
    latent_channels: int = 16
    groups: int = 32  # of every GroupNorm
    # The paper's changes. Thinner and with fewer blocks are the numbers above, the others are switches:
    attention: bool = False  # (1) True: attention over all latent pixels, as in the middle of SD3's decoder
    norm_everywhere: bool = False  # (2) True: GroupNorm and SiLU before every convolution, as in SD3's blocks
    separable: bool = True  # (3) False: full 3x3 convolutions in the blocks
    conv_shortcut: bool = False  # (5) True: upsamplers keep the channels, a block changes them, with a 1x1 beside it

    def __post_init__(self):
        for name in ("channels", "blocks"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if any(c % self.groups for c in self.channels) or len(self.channels) != len(self.blocks):
            raise ValueError(f"channels {self.channels} must be multiples of groups={self.groups}, one for each of blocks")


PRESETS = {"tiny": DecoderConfig(channels=(96, 48, 32, 16), blocks=(3, 3, 2, 2), groups=8), "sd3": DecoderConfig()}


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
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()  # (5): the identity, unless conv_shortcut

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


class Upsample(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, 2H, 2W): nearest neighbour, then a full 3x3 convolution that changes the channels."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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
        latents = latents.to(self.layers[0].weight).contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        return self(latents).float().clamp(-1, 1)


def load_decoder(folder, device="cpu"):
    """A decoder's folder -> (TinyDecoder in eval mode; its config). Raises SystemExit with one sentence if it cannot."""

    def build(config):
        config["scaling_factor"], config["shift_factor"]  # without them it decodes no one's latents
        return TinyDecoder(DecoderConfig(**config["decoder"]))

    decoder, config = load_network(folder, build, "decoder", "Train one with decoder.py, or use assets/zoo/decoder", device)
    return decoder.to(memory_format=torch.channels_last), config


# ------------------------------------------------------------------------------------------------------------------
# Losses


class Discriminator(nn.Sequential):
    """PatchGAN (arXiv 1611.07004): pictures (B, 3, H, W) -> real or reconstructed, for each patch of 34 pixels, (B, 1, h, w)."""

    def __init__(self, width=32):
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 1, 1, bias=False), nn.GroupNorm(8, 4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, 1, 1),
        )  # fmt: skip


def adaptive_weight(loss, loss_adv, weight):
    """How much the adversarial loss may count: as VQGAN (arXiv 2012.09841) does, such that at the last layer its gradient
    is as long as the other losses' gradient. Without it one of the two always drowns the other. Gradients are averaged over
    ranks before their lengths are taken: the weight is that of the whole batch, and the same on every rank."""
    gradients = (torch.autograd.grad(some, weight, retain_graph=True)[0] for some in (loss, loss_adv))
    length, length_adv = (parallel.total(gradient).norm() / parallel.world() for gradient in gradients)
    return (length / (length_adv + 1e-8)).clamp(max=1e4).detach()


# ------------------------------------------------------------------------------------------------------------------
# Training


class Crops(NamedTuple):
    x: torch.Tensor  # (B, 3, patch, patch) in [-1, 1]


def open_pictures(args):
    """(training pictures, validation pictures): anything with len() whose [i] is (picture, caption)."""
    if args.data:
        return CaptionedFolder(args.data, args.resolution, captioned=False, cache=CACHE).split()
    if args.resolution != SIDE:
        raise SystemExit(f"the shapes world has pictures of {SIDE} pixels, not {args.resolution}: give --data a folder.")
    return ShapesWorld("train", 0, max(1, args.steps * args.batch)), ShapesWorld("val", 0, 256)


def random_crops(pictures, args, step, pool, rows=slice(None)):
    """Crops of the pictures of one step, all drawn from (seed, step); with `rows`, one rank's. The threads of `pool` open them."""
    g, places = rng(args.seed, step, 1), []
    for i in range(step * args.batch, (step + 1) * args.batch):
        i = int(torch.randint(len(pictures), (), generator=g)) if args.data else i % len(pictures)
        places.append((i, *torch.randint(args.resolution - args.patch + 1, (2,), generator=g).tolist()))

    def crop(i, left, top):
        try:
            return pictures[i][0].crop((left, top, left + args.patch, top + args.patch))
        except OSError as error:
            raise SystemExit(f"{error}. It was there when the run began; put it back and --resume.") from error

    return Crops(to_tensor(list(pool.map(crop, *zip(*places[rows], strict=True)))))


def train(args, cfg=None):
    """Train one decoder, from flags to saved weights; cfg: its DecoderConfig, if not that of --size."""
    # ---- the folder, the device, the ranks
    out, device, rank, several = Path(args.out), pick_device(args.device), parallel.rank(), parallel.world() > 1
    if (out / "train_state").is_dir() and not args.resume:
        raise SystemExit(f"{out} holds a run already: go on with --resume, choose another --out, or delete it.")
    rows, pool = parallel.rows(args.batch), ThreadPoolExecutor(args.workers)
    torch.manual_seed(args.seed)

    # ---- the frozen autoencoder, pictures
    autoencoder = FrozenAutoencoder(args.vae, device, half(device))
    pictures, validation = open_pictures(args)
    held_out = to_tensor([validation[i][0] for i in range(min(len(validation), 64))]).to(device)
    at_once = max(1, 64 * SIDE**2 // math.prod(held_out.shape[2:]))  # of large pictures one at a time
    held_out_latents = torch.cat([autoencoder.encode_pictures(x) for x in held_out.split(at_once)])

    # ---- the networks: the decoder and its average, and what judges it
    cfg = replace(cfg or PRESETS[args.size], latent_channels=autoencoder.latent_channels)
    networks = TinyDecoder(cfg), TinyDecoder(cfg), Discriminator(), Perceptual(args.perceptual)
    decoder, ema, discriminator, perceptual = (net.to(device, memory_format=torch.channels_last) for net in networks)
    if args.init:
        load_weights(decoder, load_decoder(args.init)[0].state_dict(), args.init)
    ema.requires_grad_(False).eval().load_state_dict(decoder.state_dict())

    # ---- the optimizers; what --resume restores, bit for bit
    # Betas and rates [A]. The discriminator forgets fast (beta1 = 0.5), since what it looks at changes all the time, and
    # learns at a tenth of the decoder's rate: at the same rate its logits swung, together for real and reconstructed, and
    # said nothing.
    plain = {"weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.lr, betas=(0.9, 0.99), **plain)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=args.lr / 10, betas=(0.5, 0.9), **plain)
    kept = {"model": decoder, "ema": ema, "discriminator": discriminator}
    hashes = {"contents": pictures.name, "vae": autoencoder.fingerprint("vae"), "shape": json.loads(json.dumps(asdict(cfg)))}
    settings = arguments.settings_of(args) | hashes
    start = load_state(out, settings, [optimizer, optimizer_d], **kept) if args.resume else 0
    config = {
        "stage": "decoder", "size": args.size, "machine": describe_machine(device), "encoders": args.vae,
        "scaling_factor": autoencoder.scaling_factor, "shift_factor": autoencoder.shift_factor,
        "settings": arguments.all_of(args) | hashes,
    }  # fmt: skip
    training.say_start(out, config, start, args.steps, decoder)

    # ---- the loop
    def make(step):
        return random_crops(pictures, args, step, pool, rows)

    log, means, bad_steps, last_row, clock = Log(out / "log.csv", start), Means(device), 0, start, time.perf_counter()
    bar = tqdm(total=args.steps, initial=start, desc="decoder", mininterval=1, disable=None if rank == 0 else True)
    for step, crops in zip(range(start, args.steps), ahead(make, range(start, args.steps), device), strict=True):
        share = learning_rate(step, args.steps, WARMUP)
        optimizer.param_groups[0]["lr"], optimizer_d.param_groups[0]["lr"] = args.lr * share, args.lr / 10 * share
        x = move(crops, device).x.contiguous(memory_format=torch.channels_last)
        latents = autoencoder.encode_pictures(x).contiguous(memory_format=torch.channels_last)  # frozen: no gradient

        # The decoder: near in pixels, near in features, and good enough to fool the discriminator.
        discriminator.requires_grad_(False)
        with autocast(device):
            reconstructed = decoder(latents).float()
        mse, distance = F.mse_loss(reconstructed, x), perceptual(reconstructed, x).mean()
        loss = mse + args.perceptual_weight * distance
        adversarial = args.gan_weight > 0 and step >= args.gan_start
        if adversarial:
            loss_adv = -discriminator(reconstructed).mean()
            weight = args.gan_weight * adaptive_weight(loss, loss_adv, decoder.layers[-1].weight)
            loss = loss + weight * loss_adv
            means.add(gan_weight=weight)
        loss.backward()
        means.add(mse=mse, perceptual=distance)
        if several:
            parallel.average_gradients(decoder)
        norm, bad = clip_gradients(decoder.parameters(), 1.0)
        means.add(grad_norm=norm, skipped=bad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, decoder, step, args.ema)

        # The discriminator: real above 1, reconstructed below -1 (hinge loss). Detached: the decoder learns nothing here.
        if adversarial:
            discriminator.requires_grad_(True)
            on_real, on_fake = discriminator(x), discriminator(reconstructed.detach())
            (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()).backward()
            if several:
                parallel.average_gradients(discriminator)
            norm, bad = clip_gradients(discriminator.parameters(), math.inf)
            means.add(d_real=on_real, d_fake=on_fake, grad_norm_d=norm, skipped_d=bad)
            optimizer_d.step()
            optimizer_d.zero_grad(set_to_none=True)
        bar.update()

        # ---- a row of log.csv; now and then validate, draw, save
        due = (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if not due and (step + 1) % EVERY:
            continue
        row, by_t = means.take()
        seconds = (time.perf_counter() - clock) / (step + 1 - last_row)  # a step
        bad_steps = bad_steps + step + 1 - last_row if max(row["skipped"], row.get("skipped_d", 0)) > 0.5 else 0
        last_row = step + 1
        if bad_steps > 1:  # a row may cover a single step
            training.stop_on_nan(out, step, f"--lr {args.lr}")
        if rank == 0:
            if due:
                pairs = zip(held_out_latents.split(at_once), held_out.split(at_once), strict=True)
                row["val_psnr"] = torch.cat([psnr(ema.decode_latents(z), x) for z, x in pairs]).mean().item()
                if not math.isfinite(row["val_psnr"]):
                    training.stop_on_nan(out, step, f"--lr {args.lr}")
            lr, rate = optimizer.param_groups[0]["lr"], args.batch / seconds
            log.add(step=step + 1, pictures=(step + 1) * args.batch, **row, **by_t, lr=lr, pictures_per_second=rate)
            training.say_row(bar, step + 1, args.steps, row, lr, rate, seconds)
        if rank == 0 and due:  # the state comes last: what a kill leaves undone before it is done again by --resume
            save_atomically(side_by_side(validation, autoencoder, ema, device, count=6).save, out / "compare.png")
            plot(log, out)
            save_network(out, ema, config | {"step": step + 1, "pictures_seen": (step + 1) * args.batch}, kind="decoder")
            save_state(out, step + 1, settings, [optimizer, optimizer_d], **kept)
        if due:
            parallel.wait(patient=False)
        clock = time.perf_counter()
    bar.close()
    training.say_end(out)


def plot(table, out):
    """loss.png: MSE and perceptual distance, what the discriminator says, and the validation PSNR of the EMA."""
    curves(table, out / "loss.png", ("losses", {"mse": "mse", "perceptual": "perceptual"}, "log"),
           ("the discriminator: apart, and not far beyond 1 and -1", {"real": "d_real", "fake": "d_fake"}, "linear"),
           ("validation PSNR, dB", {"EMA": "val_psnr"}, "linear"))  # fmt: skip


def make_parser(doc=__doc__, example="python decoder.py --steps 1000 --out runs/mine"):
    p = arguments.Parser(doc, example)
    p.add_argument("--size", choices=PRESETS, default="tiny", help="class scale, or the paper's 1.38 M for SD3's latents")
    p.add_argument("--vae", metavar="DIR", default="assets/toy-sd3", help="SD3 folder, or an AutoencoderKL's own folder")
    p.add_argument("--init", metavar="DIR", help="start from this decoder's weights instead of random ones")
    # data
    p.add_argument("--data", metavar="DIR", help="folder of pictures, captions or not; without it, the shapes world")
    p.add_argument("--resolution", type=integer(16, multiple=8),
                   help="--data is scaled and centre-cropped to it; default: 64 or 512 by --size")  # fmt: skip
    p.add_argument("--patch", type=integer(16, multiple=8), help="side of the random crops; default: 48 or 256 by --size")
    p.add_argument("--workers", type=integer(1), default=8, help="threads of each process that open pictures, ahead of the GPU")
    # optimisation
    p.add_argument("--steps", type=integer(1), default=4000, help="training steps")
    p.add_argument("--batch", type=integer(1), default=16, help="crops a step, of all GPUs together")
    p.add_argument("--lr", type=real(0), default=2e-3, help="the decoder's after the warm-up; the discriminator's is a tenth")
    p.add_argument("--ema", type=real(0, 1), default=0.999, help="decay of the averaged weights; 0.9999 for a million steps")
    p.add_argument("--seed", type=integer(0), default=0, help="of weights, pictures and crops")
    p.add_argument("--perceptual", choices=("effnet", "lpips"), default="effnet", help="whose features: see class Perceptual")
    # Weights [A]. MSE counts 1. At the quality of the teacher's decoder, 36 dB, it is 0.001 (the peak is 2) and the perceptual
    # distance 0.5, so 0.002 makes them equals there. The adversarial gradient is a twentieth of both: it sharpens, and PSNR pays.
    p.add_argument("--perceptual-weight", type=real(0), default=0.002, help="of the perceptual distance; the MSE's is 1")
    p.add_argument("--gan-weight", type=real(0), default=0.05, help="of the adversarial loss, times the adaptive weight; 0: none")
    p.add_argument("--gan-start", type=integer(0), metavar="STEP", help="adversarial loss from here on; default: half-way")
    arguments.add_run(p, out="runs/decoder", save_every=500, compiled=False)
    return p


def finish(args):
    """What depends on --size and --steps."""
    args.resolution = args.resolution or {"tiny": SIDE, "sd3": 512}[args.size]
    args.patch = args.patch or {"tiny": 48, "sd3": 256}[args.size]
    args.gan_start = args.steps // 2 if args.gan_start is None else args.gan_start
    if args.patch > args.resolution:
        raise SystemExit(f"--patch must be at most --resolution {args.resolution}, not {args.patch}.")
    return args


def parse_arguments(argv=None):
    return finish(make_parser().parse_args(argv))


def main(argv=None):
    train(parse_arguments(argv))


if __name__ == "__main__":
    parallel.launch(main)
