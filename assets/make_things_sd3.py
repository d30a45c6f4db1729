"""Make a complete Stable Diffusion 3 pipeline for the class world, a thousand times smaller, from nothing.

The course needs a teacher of another architecture, text encoders and an autoencoder, and a class has no time
to download 16 GB. So this script trains all three, in the shape of the real thing: an AutoencoderKL (f = 8,
16 channels), two CLIP text models, and SD3's MMDiT.

    python -m assets.make_things_sd3 --only vae --out runs/things-sd3

Each part goes on where it was stopped when the same command is given again.
"""

import copy
import json
import math
import os
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import flow
from common.arguments import Parser, add_device, integer, real
from common.checkpoint import load_state, save_json, save_state
from common.detector import falsify
from common.device import matmul_dtype, pick_device
from common.encoders import FrozenAutoencoder, FrozenEncoders
from common.muon import Muon
from common.pictures import cut_square, to_tensor
from common.seeds import batch_indices, rng
from common.things import THINGS
from common.training import learning_rate, update_ema
from common.world import (
    COLORS,
    SIDE,
    ThingsWorld,
    family_of,
    make_scene,
    parse_caption,
    vocabulary,
    write_caption,
)
from data import encode_dataset


def cosine(step, steps, peak, warmup=100):
    """Learning rate: linear warm-up, then cosine decay to zero."""
    return peak * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def say(part, bar, step, steps, **values):
    """Values on the progress bar; without a terminal, a line for the log file every 100 steps."""
    shown = {name: f"{value:.3g}" for name, value in values.items()}
    bar.set_postfix(shown, refresh=False)
    if bar.disable and (step + 1) % 100 == 0:
        print(
            f"{part}: step {step + 1} of {steps}, " + ", ".join(f"{n} {v}" for n, v in shown.items()),
            flush=True,
        )


def save_part(network, folder):
    """A diffusers or transformers network in half precision, complete or not at all."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    copy.deepcopy(network).half().save_pretrained(beside)
    # transformers would load half precision as such, diffusers as float32, and the pipeline would mix them:
    # float32 for all.
    config = json.loads((beside / "config.json").read_text(encoding="utf-8-sig"))
    if "dtype" in config:
        save_json({**config, "dtype": "float32"}, beside / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


# ------------------------------------------------------------------------------------------------------------
# The autoencoder


class Leaves:
    """Pictures of nothing in particular, which teach an autoencoder what any picture may hold: `side` pixels,
    (side, side, 3).

    "Dead leaves": shapes of all sizes, each hiding what was drawn before, filled with flat colors, gradients
    and noise of natural spectrum; then, some of the time, strokes and letters.
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
    """A square of `side` pixels with something in it: of `tries` places the one whose pixels differ most. (H,
    W, 3) uint8."""
    most, best = -1.0, None
    for _ in range(tries):
        y, x = g.integers(0, picture.shape[0] - side + 1), g.integers(0, picture.shape[1] - side + 1)
        part = picture[y : y + side, x : x + side]
        if (spread := float(part[::4, ::4].std((0, 1)).sum())) > most:
            most, best = spread, part
    return best


def autoencoder_batch(world, leaves, seed, step, size, side):
    """(B, 3, side, side) in [-1, 1]: half the class world's pictures, half leaves; a pure function of (seed,
    step)."""
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


def make_autoencoder(
    out, device, steps=5000, batch=32, side=64, lr=4e-3, kl_weight=1e-3, seed=0, state="runs/things-vae"
):
    """vae/: an AutoencoderKL with the global shift and scale that make its latents zero-mean and of unit
    deviation.

    It learns on crops, which hold more than the plain ground of whole pictures; in the last third on whole
    pictures, since a GroupNorm does mind how much of a picture is plain. Muon for the kernels: after 160
    steps it is 2 to 3 dB ahead of AdamW.
    """
    torch.manual_seed(seed)
    vae = new_autoencoder().to(device, memory_format=torch.channels_last)
    kernels = [w for w in vae.parameters() if w.dim() == 4 and min(w.shape[0], w[0].numel()) >= 24]
    others = [w for w in vae.parameters() if not any(w is kernel for kernel in kernels)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    optimizers.append(Muon(kernels, lr=lr, weight_decay=0.01))
    world, crops, whole = ThingsWorld("train", seed, steps * batch), Leaves(side), Leaves(2 * side)
    settings = {
        "steps": steps,
        "batch": batch,
        "side": side,
        "lr": lr,
        "kl": kl_weight,
        "seed": seed,
        "world": world.name,
    }
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
        torch.manual_seed(
            int(torch.randint(2**31, (), generator=rng(seed, step)))
        )  # for the posterior's sample
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
    # One scale for all channels, as SD3: unit deviation per channel would blow up the channels that hold next
    # to nothing.
    shift, scale = z.mean().item(), 1 / z.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
    print(f"vae: {psnr:.2f} dB on {len(val)} validation pictures, shift {shift:.4f}, scale {scale:.4f}")
    save_part(vae.cpu(), out / "vae")


# ------------------------------------------------------------------------------------------------------------
# Tokenizers and text encoders

NAMES, PALETTE = list(THINGS), np.array(list(COLORS.values()))


def make_tokenizers(out, merges=992, max_tokens=24):
    """CLIP's byte-pair tokenizer, merges learned on captions of the class world and on the Unicode names of
    pictographs."""
    names = [unicodedata.name(chr(c), "").lower() for c in (*range(0x2600, 0x27C0), *range(0x1F300, 0x1FB00))]
    world = ThingsWorld("train", 0, 20_000)
    corpus = [world.caption(i) for i in range(len(world))] + [
        f"a photo of a {name}" for name in names if name
    ]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=True)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    at_end = [a + "</w>" for a in alphabet]
    # Of two pairs that occur equally often, the one with the lower token numbers is merged first. Bytes at a
    # word's end get theirs here; by itself the trainer numbers them as it meets them, in another order each
    # time.
    trainer = trainers.BpeTrainer(
        vocab_size=len(at_end) + len(alphabet) + merges,
        special_tokens=at_end,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: "!" first (it is the padding of the second tokenizer), bytes, bytes at a word's end,
    # merges, specials.
    tokens = alphabet + at_end + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=max_tokens)
        tokenizer.save_pretrained(out / name)
    broken = [word for word in vocabulary() if f"{word}</w>" not in vocab]
    if broken:
        raise SystemExit(
            f"the tokenizer cuts {', '.join(broken)} into pieces: give make_tokenizers more merges."
        )
    return len(vocab)


def color_index(rgb):
    """Which of GenEval's ten colors is nearest."""
    return int(np.linalg.norm(PALETTE - np.array(rgb), axis=1).argmin())


def describe(scene):
    """What CLIP's picture tower would have to see, from the scene itself: (N,) numbers.

    Which things there are in which color, which thing is on which side of which, how many of each.
    """
    n = len(NAMES)
    pairs, sides, counts = torch.zeros(len(COLORS), n), torch.zeros(n, n, 4), torch.zeros(n, 5)
    for a in scene.things:
        here = NAMES.index(a.look.name)
        pairs[color_index(a.look.rgb), here] = 1
        counts[here, sum(b.look.name == a.look.name for b in scene.things)] = 1
        for b in scene.things:
            if a.look.name != b.look.name:
                dx, dy = b.x - a.x, b.y - a.y
                side = (0 if dx > 0 else 1) if abs(dx) > abs(dy) else (2 if dy > 0 else 3)
                sides[here, NAMES.index(b.look.name), side] = 1
    return torch.cat(
        [f.flatten() for f in (pairs, pairs.amax(1), sides, sides.amax(1), counts, counts.amax(0))]
    )


def readings(caption, tokens):
    """What a caption says, as classes for the read-outs of make_text_encoders; -100 where there is nothing to
    tell.

    at each noun (tokens,): its color (10: none named); at the second noun (tokens,): its side of the first
    (4: none named); at the end, for each thing (26,): color, side, count. Every word of these captions is one
    token.
    """
    phrases, relation = parse_caption(caption)
    side_of = {"left of": (0, 1), "right of": (1, 0), "above": (2, 3), "below": (3, 2), None: (4, 4)}[
        relation
    ]
    color_here, side_here = torch.full((2, tokens), -100)
    color, side = torch.full((2, len(NAMES)), -100)
    count = torch.zeros(len(NAMES), dtype=torch.long)
    parts = [caption] if len(phrases) == 1 else caption.split(f" {relation or 'and'} ")
    nouns = [
        len(parts[0].split()),
        len(caption.split()),
    ]  # the last word of each part; the first token is <|startoftext|>
    for k, phrase in enumerate(phrases):
        thing, noun = NAMES.index(phrase.name), nouns[k]
        color_here[noun] = color[thing] = list(COLORS).index(phrase.color) if phrase.color else len(COLORS)
        side[thing], count[thing] = side_of[k], phrase.count
        if k == 1:
            side_here[noun] = side_of[k]
    return color_here, side_here, color, side, count


def hard_negatives(caption, chance, n=3):
    """n captions that are false of its picture and nearly the same: things or colors swapped, one idea
    exchanged."""
    phrases, relation = parse_caption(caption)
    wrong = []
    if relation:  # a cat left of a cup -> a cup left of a cat
        wrong.append(write_caption(phrases[::-1], relation))
    elif len(phrases) == 2 and phrases[0].color:  # a red cat and a blue cup -> a blue cat and a red cup
        first, second = phrases
        wrong.append(write_caption([replace(first, color=second.color), replace(second, color=first.color)]))
    return wrong + [falsify(caption, chance) for _ in range(n - len(wrong))]


def make_text_encoders(out, device, steps=900, batch=128, lr=3e-3, seed=1):
    """Two CLIP text models, trained as CLIP is: every caption must find its scene among the batch's, and
    back.

    CLIP trained so learns which words there are, not which belongs to which: after hundreds of steps "a red
    cat and a blue cup" and its swap were still one to it, and no diffusion model learned position from its
    states. SD3 has T5 for that; T5 is not to be made in an afternoon. So there are two helps. Hard negatives
    (NegCLIP, arXiv 2210.01936): a scene must also tell its caption from three that differ in one word or in
    their order. Read-outs, linear and not saved: the states that the diffusion models get (the layer before
    last) must tell each noun's color and side, and at the end the whole caption.
    """
    words, length = make_tokenizers(out), 16  # what lies behind 16 tokens is padding in every caption
    tokenizers = [CLIPTokenizer.from_pretrained(out / name) for name in ("tokenizer", "tokenizer_2")]
    torch.manual_seed(seed)
    towers = nn.ModuleList()
    for width, activation in ((64, "quick_gelu"), (96, "gelu")):
        towers.append(CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=words, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=3, num_attention_heads=width // 32, max_position_embeddings=tokenizers[0].model_max_length,
            hidden_act=activation, bos_token_id=words - 2, eos_token_id=words - 1,
            pad_token_id=words - 1 if width == 64 else 0)))  # fmt: skip
        towers[-1].text_model.embeddings.position_embedding.weight.data.mul_(4)  # order matters here
    seen, n, kinds = len(describe(make_scene("train", seed, 0))), len(NAMES), len(COLORS) + 1
    scene_tower = nn.ModuleList(
        nn.Sequential(nn.Linear(seen, 512), nn.ReLU(), nn.Linear(512, w)) for w in (64, 96)
    )
    readouts = nn.ModuleList(
        nn.ModuleList(nn.Linear(w, m) for m in (kinds, 5, n * kinds, n * 5, n * 5)) for w in (64, 96)
    )
    temperature = nn.Parameter(torch.full((2,), math.log(1 / 0.07)))
    everything = nn.ModuleList([towers, scene_tower, readouts, nn.ParameterList([temperature])]).to(device)
    matrices = [w for name, w in towers.named_parameters() if w.dim() == 2 and ".layers." in name]
    others = [w for w in everything.parameters() if not any(w is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
        Muon(matrices, lr=lr, weight_decay=0.01),
    ]
    families = ["single", "two", "counting", "counting", "colors"] + 4 * ["position"] + 3 * ["attribution"]
    bar = tqdm(range(steps), desc="text encoders", mininterval=1, disable=None)
    for step in bar:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1, (step + 1) / 30) * min(1, (steps - step) / (0.4 * steps))
        chance = np.random.default_rng((seed, step))
        scenes = [
            make_scene("train", seed, step * batch + i, str(chance.choice(families))) for i in range(batch)
        ]
        captions = [scene.caption for scene in scenes]
        wrong = [negative for caption in captions for negative in hard_negatives(caption, chance)]
        described = torch.stack([describe(scene) for scene in scenes]).to(device)
        said = [
            torch.stack(column).to(device)
            for column in zip(*(readings(c, length) for c in captions), strict=True)
        ]
        # Equal captions are equally right: the target spreads over them.
        same = torch.tensor([[a == b for b in captions] for a in captions]).float().to(device)
        target = same / same.sum(1, keepdim=True)
        loss, told = 0, []
        for k, (tokenizer, tower) in enumerate(zip(tokenizers, towers, strict=True)):
            ids = (
                tokenizer(captions + wrong, padding="max_length", return_tensors="pt")
                .input_ids[:, :length]
                .to(device)
            )
            end = (ids == words - 1).int().argmax(1)
            states = tower(ids, output_hidden_states=True).hidden_states
            scene = F.normalize(scene_tower[k](described), dim=-1)
            for state in states[
                -2:
            ]:  # the contrastive loss at the last layer, and at the one whose states are used
                summary = tower.text_projection(
                    tower.text_model.final_layer_norm(state[torch.arange(len(ids)), end])
                )
                text = F.normalize(summary, dim=-1)
                scale = temperature[k].exp().clamp(max=100)
                logits = scale * scene @ text[:batch].T  # (B, B)
                negative = scale * (scene[:, None] * text[batch:].unflatten(0, (batch, -1))).sum(-1)  # (B, 3)
                wide = torch.cat([logits, negative], dim=1)
                loss = (
                    loss
                    + F.cross_entropy(wide, F.pad(target, (0, 3))) / 4
                    + F.cross_entropy(logits.T, target) / 4
                )
                told.append((logits.diagonal() > negative.max(1).values).float().mean().item())
            used = states[-2][:batch]
            at_end = used[torch.arange(batch), end[:batch]]
            for r, (readout, classes) in enumerate(zip(readouts[k], said, strict=True)):
                guess = readout(used) if r < 2 else readout(at_end).unflatten(1, (n, -1))
                loss = loss + F.cross_entropy(guess.flatten(0, 1), classes.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        say("text encoders", bar, step, steps, loss=loss.item(), told_apart=min(told))
    for name, tower in zip(("text_encoder", "text_encoder_2"), towers, strict=True):
        save_part(tower.cpu(), out / name)


# ------------------------------------------------------------------------------------------------------------
# The teacher


def what_is_where(scene, cells=8):
    """(cells * cells, 36) shares of each cell that the things' boxes cover: one class for each thing, one for
    each color."""
    target, side = torch.zeros(cells, cells, len(NAMES) + len(COLORS)), SIDE / cells
    for thing in scene.things:
        cover = []
        for centre in (thing.y, thing.x):
            low, high = centre - thing.look.radius, centre + thing.look.radius
            cover.append(
                torch.tensor(
                    [max(0.0, min(high, (i + 1) * side) - max(low, i * side)) / side for i in range(cells)]
                )
            )
        for index in (NAMES.index(thing.look.name), len(NAMES) + color_index(thing.look.rgb)):
            target[:, :, index] += cover[0][:, None] * cover[1][None]
    return target.flatten(0, 1).clamp(max=1)


def make_teacher(
    out,
    device,
    steps=12_000,
    batch=64,
    lr=3e-3,
    pictures=100_000,
    seed=2,
    focus=0.3,
    state="runs/things-teacher",
):
    """transformer/: the MMDiT, by flow matching on the frozen autoencoder's latents with the frozen CLIPs'
    states.

    A patch is 2x2 latent cells, as in SD3, so the picture has 64 tokens. Behind the text stands one zero
    token where T5's would be.

    A second loss helps it to learn composition sooner: a linear read-out of its fourth block must tell what
    is where (in the spirit of REPA, arXiv 2410.06940, with the scene itself in place of a pretrained picture
    encoder). The read-out is not saved. The students never get this help: they learn as the paper says.

    `focus` is the share of each batch that is taken from captions whose things must be drawn in agreement,
    one of each kind or
    three and four of one: that is learned last.

    Its state is kept in the folder `state`, from which the same call goes on.
    """
    encoders = FrozenEncoders(out, device)
    world = ThingsWorld("train", 0, pictures)
    data = encode_dataset(world, encoders)
    hard = [
        family_of(c) in ("two", "attribution") or parse_caption(c)[0][0].count > 2 for c in data.captions[1:]
    ]
    ids = data.pictures(torch.arange(pictures))[1]
    hard = torch.tensor([False, *hard])[ids].nonzero()[:, 0]  # indices of pictures
    maps = torch.stack([(what_is_where(world.scene(i)) * 255).byte() for i in range(pictures)])  # (N, 64, 36)
    rows = data.rows(torch.arange(len(data.captions)))
    pooled, width = rows["pooled"].float().to(device), 192  # 64 + 96, padded with zeros as SD3 pads 2048 to 4096
    text = F.pad(rows["states"].float(), (0, width - encoders.text_dim, 0, 1)).to(
        device
    )  # (K, T + 1, 192), the last zero
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=7, attention_head_dim=32, num_attention_heads=5,
        joint_attention_dim=width, caption_projection_dim=160, pooled_projection_dim=pooled.shape[1], pos_embed_max_size=16,
    ).to(device)  # fmt: skip
    for name, parameter in model.named_parameters():  # as DiT: every block starts as the identity
        if "norm1" in name or "norm_out" in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    ema = copy.deepcopy(model).requires_grad_(False)
    readout, seen = nn.Linear(160, len(NAMES) + len(COLORS)).to(device), []
    model.transformer_blocks[3].register_forward_hook(lambda block, inputs, output: seen.append(output[1]))
    # Muon for the matrices of the blocks: from the same state its loss fell faster than AdamW's. AdamW for
    # everything else.
    parameters = [*model.parameters(), *readout.parameters()]
    matrices = [p for p in model.transformer_blocks.parameters() if p.dim() == 2]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.AdamW(others, lr=lr, fused=True, betas=(0.9, 0.99), weight_decay=0.01),
        Muon(matrices, lr=lr, weight_decay=0.01),
    ]
    settings = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "pictures": world.name,
        "focus": focus,
    }
    settings["encoders"] = encoders.fingerprint()
    first = load_state(state, settings, optimizers, model=model, ema=ema, readout=readout)
    for block in model.transformer_blocks:
        block.compile()

    bar, log = (
        tqdm(range(first, steps), initial=first, total=steps, desc="teacher", mininterval=1, disable=None),
        [],
    )
    for step in bar:
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr * learning_rate(step, steps)
        index, g = batch_indices(seed, step, batch, len(data)), rng(seed, step)
        n = round(focus * batch)
        index[:n] = hard[torch.randint(len(hard), (n,), generator=rng(seed, step, 1))]
        x0, ids = data.pictures(index)
        ids = torch.where(torch.rand(batch, generator=g) < 0.1, 0, ids).to(device)
        t = flow.logit_normal_timesteps(batch, shift=4.0, generator=g)  # the layout is decided near t = 1
        eps = torch.randn(x0.shape, generator=g)
        x_t, v, t = flow.interpolate(x0, eps, t).to(device), flow.velocity(x0, eps).to(device), t.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=matmul_dtype(device) == torch.bfloat16):
            predicted = model(
                x_t, encoder_hidden_states=text[ids], pooled_projections=pooled[ids], timestep=1000 * t
            ).sample
        loss = F.mse_loss(predicted.float(), v)
        target = maps[index].float().to(device) / 255
        where = F.binary_cross_entropy_with_logits(readout(seen.pop().float()), target) * target.shape[-1]
        (loss + 0.2 * where).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step)
        log.append(torch.stack([loss, where]).detach())
        if (step + 1) % 100 == 0:
            smooth, smooth_where = torch.stack(log).mean(0).tolist()
            say("teacher", bar, step, steps, loss=smooth, what_is_where=smooth_where)
            if not math.isfinite(smooth):
                raise SystemExit(
                    f"the teacher's loss became NaN by step {step}: lower its learning rate of {lr}."
                )
            log = []
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(state, step + 1, settings, optimizers, model=model, ema=ema, readout=readout)
    save_part(ema.cpu(), out / "transformer")


def make_silent_t5(out, width=192):
    """text_encoder_3/, tokenizer_3/: a T5 that says nothing. Its last norm is zero, and so are all its
    states.

    SD3 can do without T5 (the pipeline then appends as many zero tokens as T5 would give), but diffusers
    loads such a folder only when told so by hand. With this one it loads by itself, draws the same, and has
    the layout of the real one.
    """
    letters = [chr(c) for c in range(33, 127)]
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        *((letter, -4.0) for letter in letters),
    ]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(out / "tokenizer_3")
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    silent = T5EncoderModel(config)
    nn.init.zeros_(silent.encoder.final_layer_norm.weight)
    save_part(silent, out / "text_encoder_3")


def make_index(out):
    """scheduler/ and model_index.json: what diffusers needs to put the parts together."""
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(out / "scheduler")
    classes = {
        "scheduler": "FlowMatchEulerDiscreteScheduler", "transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer",
        "text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5Tokenizer",
    }  # fmt: skip
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1"}
    index |= {name: ["transformers" if name.startswith("t") and name != "transformer" else "diffusers", kind]
              for name, kind in classes.items()}  # fmt: skip
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    save_json(index, out / "model_index.json")


EMOJI = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian's package fonts-noto-color-emoji


def strange_pictures():
    """{what: pictures (PIL) of 128 pixels} that the autoencoder has never seen: photographs that come with scikit-image, each
    whole and a part of it; and emoji, where the font is."""
    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    found = {"photographs": [cut_square(photo, 128) for photo in photos]}
    found["photographs"] += [photo.resize((256, 256)).crop((64, 64, 192, 192)) for photo in photos]
    if EMOJI.is_file():
        font, found["emoji"] = ImageFont.truetype(EMOJI, 109), []
        for code in range(0x1F300, 0x1F650, 10):
            picture = Image.new("RGB", (144, 144), "white")
            ImageDraw.Draw(picture).text((4, 8), chr(code), font=font, embedded_color=True)
            if picture.getextrema() != ((255, 255),) * 3:  # the font knows it
                found["emoji"].append(picture.resize((128, 128), Image.Resampling.LANCZOS))
    return found


def check(out, device):
    """Print how well the saved autoencoder restores the world's pictures, and others."""
    autoencoder, world = FrozenAutoencoder(out, device), ThingsWorld("val", 0, 256)
    for what, pictures in ({"the world": [world[i][0] for i in range(len(world))]} | strange_pictures()).items():
        x = to_tensor(pictures).to(device)
        restored = torch.cat([autoencoder.decode_latents(autoencoder.encode_pictures(part)) for part in x.split(32)])
        psnr = (10 * torch.log10(4 / ((restored - x) ** 2).mean((1, 2, 3)))).mean()
        print(f"{what:12} {len(pictures):4} pictures  {psnr:.2f} dB")


def main(argv=None):
    p = Parser(__doc__, "python -m assets.make_things_sd3 --only vae")
    p.add_argument("--out", type=Path, default=Path("runs/things-sd3"), help="where to")
    p.add_argument("--only", choices=("vae", "text", "teacher"), help="which part")
    p.add_argument("--check", action="store_true", help="make nothing; measure the autoencoder that is there")
    p.add_argument(
        "--steps", type=integer(1), help="training steps of the part named by --only, if not its own number"
    )
    p.add_argument("--lr", type=real(above=0), help="the same of its learning rate")
    add_device(p)
    args = p.parse_args(argv)
    if args.check:
        check(args.out, pick_device(args.device))
        return
    if not args.only:
        p.error("--only vae, text or teacher, in this order; or --check")
    device, own = (
        pick_device(args.device),
        {name: getattr(args, name) for name in ("steps", "lr") if getattr(args, name)},
    )
    {"vae": make_autoencoder, "text": make_text_encoders, "teacher": make_teacher}[args.only](
        args.out, device, **own
    )
    make_silent_t5(args.out)
    make_index(args.out)


if __name__ == "__main__":
    main()
