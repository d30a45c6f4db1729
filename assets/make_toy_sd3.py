"""Make assets/toy-sd3: a complete Stable Diffusion 3 pipeline, a thousand times smaller, from nothing.

The course needs a teacher of another architecture, text encoders and an autoencoder, and a class has no time to download
16 GB. So this script trains all three on the shapes world, in the shape of the real thing: an AutoencoderKL (f = 8, 16
channels), two CLIP text models, and SD3's MMDiT. The result loads with diffusers' own
`StableDiffusion3Pipeline.from_pretrained("assets/toy-sd3")` and is committed; nobody needs to run this again.

    python -m assets.make_toy_sd3                       # makes what --out lacks: hours on 2 cores
    python -m assets.make_toy_sd3 --only text --force   # one part again
    python -m assets.make_toy_sd3 --check               # how well the autoencoder restores pictures

The parts are made in this order, since each is frozen when the next one learns:

    vae                              pictures -> latents -> pictures; MSE + L1 + a strong KL, so that latents are smooth
    tokenizer, text_encoder (x 2)    byte-pair merges from captions and Unicode names; CLIP's training, with two helps
    transformer, scheduler           flow matching as in SD3, with one addition (see make_teacher)

Layout of the text: 24 CLIP tokens, then 256 zero tokens where T5's would be: what the pipeline appends without a T5 when
`max_sequence_length` is left at 256, and what our silent T5 gives. Draw with that default.
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
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
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
from common.device import matmul_dtype, pick_device
from common.encoders import FrozenEncoders
from common.muon import Muon
from common.pictures import to_tensor
from common.seeds import batch_indices, rng
from common.shapes import COLORS, SHAPES, SIDE, ShapesWorld, family_of, make_scene, parse_caption, write_caption
from common.training import learning_rate, update_ema
from data import encode_dataset
from evaluate import falsify
from teacher import T5_TOKENS, WeightedTextAttention


def cosine(step, steps, peak, warmup=100):
    """Learning rate: linear warm-up, then cosine decay to zero."""
    return peak * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def say(part, bar, step, steps, **values):
    """Values on the progress bar; without a terminal, a line for the log file every 100 steps."""
    shown = {name: f"{value:.3g}" for name, value in values.items()}
    bar.set_postfix(shown, refresh=False)
    if bar.disable and (step + 1) % 100 == 0:
        print(f"{part}: step {step + 1} of {steps}, {shown}", flush=True)


def save_part(network, folder):
    """A diffusers or transformers network in half precision, complete or not at all."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    copy.deepcopy(network).half().save_pretrained(beside)
    # transformers would load half precision as such, diffusers as float32, and the pipeline would mix them: float32 for all.
    config = json.loads((beside / "config.json").read_text(encoding="utf-8-sig"))
    if "dtype" in config:
        save_json({**config, "dtype": "float32"}, beside / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def make_autoencoder(out, device, steps=2400, batch=16, lr=1e-3, kl_weight=1e-3, seed=0):
    """vae/: an AutoencoderKL with the global shift and scale that make its latents zero-mean and of unit deviation."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(16, 32, 64, 128), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8,
        use_quant_conv=False, use_post_quant_conv=False, sample_size=64, force_upcast=False,
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    data = ShapesWorld("train", seed, steps * batch)
    bar = tqdm(range(steps), desc="vae", mininterval=1, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, lr)
        x = to_tensor([data[i][0] for i in range(step * batch, (step + 1) * batch)])
        x = x.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=matmul_dtype(device) == torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(restored.float(), x)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = mse + 0.1 * (restored.float() - x).abs().mean() + kl_weight * min(1, step / (0.3 * steps)) * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        say("vae", bar, step, steps, psnr=10 * math.log10(4 / mse.item()), kl=kl.item())
    vae.eval()
    val = ShapesWorld("val", 0, 256)
    with torch.no_grad():
        x = to_tensor([val[i][0] for i in range(256)]).to(device)
        z = vae.encode(x).latent_dist.mean
        psnr = (10 * torch.log10(4 / ((vae.decode(z).sample - x) ** 2).mean((1, 2, 3)))).mean().item()
    # One scale for all channels, as SD3: unit deviation per channel would blow up the channels that hold next to nothing.
    shift, scale = z.mean().item(), 1 / z.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
    print(f"vae: {psnr:.2f} dB on 256 validation pictures, shift {shift:.4f}, scale {scale:.4f}")
    save_part(vae.cpu(), out / "vae")


def make_tokenizers(out, merges=992, max_tokens=24):
    """CLIP's byte-pair tokenizer, merges learned on shapes-world captions and on the Unicode names of pictographs."""
    names = [unicodedata.name(chr(c), "").lower() for c in (*range(0x2600, 0x27C0), *range(0x1F300, 0x1FB00))]
    shapes = ShapesWorld("train", 0, 4000)
    corpus = [shapes.caption(i) for i in range(len(shapes))] + [f"a photo of a {name}" for name in names if name]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=True)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    at_end = [a + "</w>" for a in alphabet]
    # Of two pairs that occur equally often, the one with the lower token numbers is merged first. Bytes at a word's end get theirs
    # here; by itself the trainer numbers them as it meets them, in another order each time.
    trainer = trainers.BpeTrainer(
        vocab_size=len(at_end) + len(alphabet) + merges,
        special_tokens=at_end,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: "!" first (it is the padding of the second tokenizer), bytes, bytes at a word's end, merges, specials.
    tokens = alphabet + at_end + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=max_tokens).save_pretrained(
            out / name
        )
    return len(vocab)


def describe(scene):
    """What CLIP's picture tower would have to see, from the scene itself: (148,) numbers.

    Which color-shape pairs there are and how many, which shape is on which side of which, how many of each shape.
    """
    pairs, sides, counts = torch.zeros(6, 4), torch.zeros(4, 4, 4), torch.zeros(4, 5)
    for a in scene.things:
        pairs[list(COLORS).index(a.color), SHAPES.index(a.shape)] += 1
        for b in scene.things:
            if a is not b:
                dx, dy = b.x - a.x, b.y - a.y
                side = (0 if dx > 0 else 1) if abs(dx) > abs(dy) else (2 if dy > 0 else 3)
                sides[SHAPES.index(a.shape), SHAPES.index(b.shape), side] = 1
    for i, shape in enumerate(SHAPES):
        counts[i, sum(thing.shape == shape for thing in scene.things)] = 1
    features = (pairs.clamp(max=1), pairs / 2, sides, sides.amax(1), counts)
    return torch.cat([f.flatten() for f in features])


def readings(caption, tokens):
    """What a caption says, as classes for the read-outs of make_text_encoders; -100 where there is nothing to tell.

    at each noun (tokens,): its color (6: none named); at the second noun (tokens,): its side of the first (4: none named);
    at the end, for each shape (4,): color, side, count. Every word of these captions is one token.
    """
    phrases, relation = parse_caption(caption)
    side_of = {"left of": (0, 1), "right of": (1, 0), "above": (2, 3), "below": (3, 2), None: (4, 4)}[relation]
    color_here, side_here = torch.full((2, tokens), -100)
    color, side, count = torch.full((4,), -100), torch.full((4,), -100), torch.zeros(4, dtype=torch.long)
    nouns = [i + 1 for i, word in enumerate(caption.split()) if word.removesuffix("s") in SHAPES]
    for k, (noun, phrase) in enumerate(zip(nouns, phrases, strict=True)):
        shape = SHAPES.index(phrase.shape)
        color_here[noun] = color[shape] = list(COLORS).index(phrase.color) if phrase.color else 6
        side[shape], count[shape] = side_of[k], phrase.count
        if k == 1:
            side_here[noun] = side_of[k]
    return color_here, side_here, color, side, count


def hard_negatives(caption, rng, n=3):
    """n captions that are false of its picture and nearly the same: objects or colors swapped, one word exchanged."""
    phrases, relation = parse_caption(caption)
    wrong = []
    if relation:  # a circle left of a star -> a star left of a circle
        wrong.append(write_caption(phrases[::-1], relation))
    elif len(phrases) == 2 and phrases[0].color:  # a red circle and a blue star -> a blue circle and a red star
        first, second = phrases
        wrong.append(write_caption([replace(first, color=second.color), replace(second, color=first.color)]))
    return wrong + [falsify(caption, rng) for _ in range(n - len(wrong))]


def make_text_encoders(out, device, steps=500, batch=128, lr=3e-3, seed=1):
    """Two CLIP text models, trained as CLIP is: every caption must find its scene among the batch's, and back.

    CLIP trained so learns which words there are, not which belongs to which: after hundreds of steps "a red circle and a blue
    star" and its swap were still one to it, and no diffusion model learned position from its states. SD3 has T5 for that; T5
    is not to be made in an afternoon. So there are two helps. Hard negatives (NegCLIP, arXiv 2210.01936): a scene must also
    tell its caption from three that differ in one word or in their order. Read-outs, linear and not saved: the states that the
    diffusion models get (the layer before last) must tell each noun's color and side, and at the end the whole caption.
    """
    vocabulary, length = make_tokenizers(out), 16  # what lies behind 16 tokens is padding in every caption
    tokenizers = [CLIPTokenizer.from_pretrained(out / name) for name in ("tokenizer", "tokenizer_2")]
    torch.manual_seed(seed)
    towers = nn.ModuleList()
    for width, activation in ((64, "quick_gelu"), (96, "gelu")):
        towers.append(CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=3, num_attention_heads=width // 32, max_position_embeddings=tokenizers[0].model_max_length,
            hidden_act=activation, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1 if width == 64 else 0)))  # fmt: skip
        towers[-1].text_model.embeddings.position_embedding.weight.data.mul_(4)  # order matters here
    scene_tower = nn.ModuleList(nn.Sequential(nn.Linear(148, 512), nn.ReLU(), nn.Linear(512, w)) for w in (64, 96))
    readouts = nn.ModuleList(nn.ModuleList(nn.Linear(w, n) for n in (7, 5, 4 * 7, 4 * 5, 4 * 5)) for w in (64, 96))
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
        scenes = [make_scene("train", seed, step * batch + i, str(chance.choice(families))) for i in range(batch)]
        captions = [scene.caption for scene in scenes]
        wrong = [negative for caption in captions for negative in hard_negatives(caption, chance)]
        described = torch.stack([describe(scene) for scene in scenes]).to(device)
        said = [torch.stack(column).to(device) for column in zip(*(readings(c, length) for c in captions), strict=True)]
        # Equal captions are equally right: the target spreads over them.
        same = torch.tensor([[a == b for b in captions] for a in captions]).float().to(device)
        target = same / same.sum(1, keepdim=True)
        loss, told = 0, []
        for k, (tokenizer, tower) in enumerate(zip(tokenizers, towers, strict=True)):
            ids = (
                tokenizer(captions + wrong, padding="max_length", return_tensors="pt").input_ids[:, :length].to(device)
            )
            end = (ids == vocabulary - 1).int().argmax(1)
            states = tower(ids, output_hidden_states=True).hidden_states
            scene = F.normalize(scene_tower[k](described), dim=-1)
            for state in states[-2:]:  # the contrastive loss at the last layer, and at the one whose states are used
                summary = tower.text_projection(tower.text_model.final_layer_norm(state[torch.arange(len(ids)), end]))
                text = F.normalize(summary, dim=-1)
                scale = temperature[k].exp().clamp(max=100)
                logits = scale * scene @ text[:batch].T  # (B, B)
                negative = scale * (scene[:, None] * text[batch:].unflatten(0, (batch, -1))).sum(-1)  # (B, 3)
                wide = torch.cat([logits, negative], dim=1)
                loss = loss + F.cross_entropy(wide, F.pad(target, (0, 3))) / 4 + F.cross_entropy(logits.T, target) / 4
                told.append((logits.diagonal() > negative.max(1).values).float().mean().item())
            used = states[-2][:batch]
            at_end = used[torch.arange(batch), end[:batch]]
            for r, (readout, classes) in enumerate(zip(readouts[k], said, strict=True)):
                guess = readout(used) if r < 2 else readout(at_end).unflatten(1, (4, -1))
                loss = loss + F.cross_entropy(guess.flatten(0, 1), classes.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        say("text encoders", bar, step, steps, loss=loss.item(), told_apart=min(told))
    for name, tower in zip(("text_encoder", "text_encoder_2"), towers, strict=True):
        save_part(tower.cpu(), out / name)


def object_map(scene, cells=8):
    """What is where: (cells * cells, 24) shares, one class per color and shape, of each cell that the objects' boxes cover."""
    target, side = torch.zeros(cells, cells, len(COLORS) * len(SHAPES)), SIDE / cells
    for thing in scene.things:
        index = list(COLORS).index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)
        cover = []
        for centre in (thing.y, thing.x):
            low, high = centre - thing.radius, centre + thing.radius
            cover.append(
                torch.tensor([max(0.0, min(high, (i + 1) * side) - max(low, i * side)) / side for i in range(cells)])
            )
        target[:, :, index] += cover[0][:, None] * cover[1][None]
    return target.flatten(0, 1).clamp(max=1)


def make_teacher(out, device, steps=12_000, batch=64, lr=3e-3, pictures=60_000, seed=2, focus=0.4, state="runs/toy-sd3"):
    """transformer/: the MMDiT, by flow matching on the frozen autoencoder's latents with the frozen CLIPs' states.

    A patch is one latent cell, so the picture has 64 tokens. With SD3's patches of 2x2 there are 16, two small objects meet in one,
    and after 32,000 steps a third of the pictures of two different objects still were wrong.

    A second loss helps it to learn composition sooner: a linear read-out of its fourth block must tell what is where
    (in the spirit of REPA, arXiv 2410.06940, with the scene itself in place of a pretrained picture encoder). The
    read-out is not saved. The students never get this help: they learn as the paper says.

    `focus` is the share of each batch that is taken from captions whose objects must be drawn in agreement, one of each kind or
    three and four of one: that is learned last.

    Its state is kept in the folder `state`, from which the same call goes on.
    """
    encoders = FrozenEncoders(out, device)
    world = ShapesWorld("train", 0, pictures)
    data = encode_dataset(world, encoders)
    hard = [family_of(c) in ("two", "attribution") or parse_caption(c)[0][0].count > 2 for c in data.captions[1:]]
    hard = torch.tensor([False, *hard])[data.pictures(torch.arange(pictures))[1]].nonzero()[:, 0]  # indices of pictures
    maps = torch.stack([(object_map(world.scene(i)) * 255).byte() for i in range(pictures)])  # (N, 64, 24)
    rows = data.rows(torch.arange(len(data.captions)))
    pooled, width = rows["pooled"].float().to(device), 192  # 64 + 96, padded with zeros as SD3 pads 2048 to 4096
    text = F.pad(rows["states"].float(), (0, width - encoders.text_dim, 0, 1)).to(device)  # (K, T + 1, 192), the last zero
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=16, num_layers=6, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=width, caption_projection_dim=128, pooled_projection_dim=pooled.shape[1], pos_embed_max_size=16,
    ).to(device)  # fmt: skip
    for name, parameter in model.named_parameters():  # as DiT: every block starts as the identity
        if "norm1" in name or "norm_out" in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    ema = copy.deepcopy(model).requires_grad_(False)
    model.set_attn_processor(WeightedTextAttention(T5_TOKENS))
    readout, seen = nn.Linear(128, len(COLORS) * len(SHAPES)).to(device), []
    model.transformer_blocks[3].register_forward_hook(lambda block, inputs, output: seen.append(output[1]))
    # Muon for the matrices of the blocks: from the same state its loss fell faster than AdamW's. AdamW for everything else.
    parameters = [*model.parameters(), *readout.parameters()]
    matrices = [p for p in model.transformer_blocks.parameters() if p.dim() == 2]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.AdamW(others, lr=lr, fused=True, betas=(0.9, 0.99), weight_decay=0.01),
        Muon(matrices, lr=lr, weight_decay=0.01),
    ]
    settings = {"steps": steps, "batch": batch, "lr": lr, "seed": seed, "pictures": world.name, "focus": focus}
    settings["encoders"] = encoders.fingerprint()
    first = load_state(state, settings, optimizers, model=model, ema=ema, readout=readout)
    for block in model.transformer_blocks:
        block.compile()

    bar, log = tqdm(range(first, steps), initial=first, total=steps, desc="teacher", mininterval=1, disable=None), []
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
                raise SystemExit(f"the teacher's loss became NaN by step {step}: lower its learning rate of {lr}.")
            log = []
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(state, step + 1, settings, optimizers, model=model, ema=ema, readout=readout)
    save_part(ema.cpu(), out / "transformer")


def make_silent_t5(out, width=192):
    """text_encoder_3/, tokenizer_3/: a T5 that says nothing. Its last norm is zero, and so are all its states.

    SD3 can do without T5 (the pipeline then appends as many zero tokens as T5 would give), but diffusers loads such a
    folder only when told so by hand. With this one it loads by itself, draws the same, and has the layout of the real one.
    """
    letters = [chr(c) for c in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -4.0) for letter in letters)]
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


def check(out, device):
    """Print how well the saved autoencoder restores 256 validation pictures, and how large everything is."""
    encoders, world = FrozenEncoders(out, device), ShapesWorld("val", 0, 256)
    x = to_tensor([world[i][0] for i in range(len(world))]).to(device)
    error = ((encoders.decode_latents(encoders.encode_pictures(x)) - x) ** 2).mean((1, 2, 3))
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {(10 * torch.log10(4 / error)).mean():.2f} dB on 256 validation pictures, {size / 1e6:.1f} MB")


def main(argv=None):
    p = Parser(__doc__, "python -m assets.make_toy_sd3 --only teacher --force")
    p.add_argument("--out", type=Path, default=Path("assets/toy-sd3"), help="where to")
    p.add_argument("--only", choices=("vae", "text", "teacher"), help="make this part alone")
    p.add_argument("--force", action="store_true", help="make parts again that are there already")
    p.add_argument("--steps", type=integer(1), help="training steps of the part named by --only, if not its own number")
    p.add_argument("--lr", type=real(above=0), help="the same of its learning rate")
    p.add_argument("--check", action="store_true", help="make nothing; measure the autoencoder that is there")
    add_device(p)
    args = p.parse_args(argv)
    if args.check:
        check(args.out, pick_device(args.device))
        return
    if (args.steps or args.lr) and not args.only:
        p.error("--steps and --lr go with --only")
    if args.force and args.only in (None, "teacher"):
        shutil.rmtree("runs/toy-sd3", ignore_errors=True)  # where an earlier teacher's training was kept
    device, own = pick_device(args.device), {name: getattr(args, name) for name in ("steps", "lr") if getattr(args, name)}
    makers = {
        "vae": (["vae"], make_autoencoder),
        "text": (["text_encoder", "text_encoder_2"], make_text_encoders),
        "teacher": (["transformer"], make_teacher),
    }
    for name, (folders, make) in makers.items():
        if args.only in (None, name):
            if all((args.out / folder).is_dir() for folder in folders) and not args.force:
                print(f"{name}: kept what is in {args.out} (--force makes it again)")
            else:
                make(args.out, device, **own)
    make_silent_t5(args.out)
    make_index(args.out)


if __name__ == "__main__":
    main()
