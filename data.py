"""Pictures with captions, and the latents that training reads.

Pictures come from the shapes world (`common/shapes.py`) or from a folder of your own: `x.png` beside `x.txt`, or Hugging Face's
`metadata.jsonl`. Both pass once through the frozen encoders (`common/encoders.py`), and training reads the cached latents and text
states: the paper trains in the latent space of SD3's autoencoder (Sec. 3.2), so no stage but the decoder's sees a pixel.

    python data.py --out shapes.png         # a captioned contact sheet of the shapes world
    python data.py --data DIR --out my.png  # the same for your own folder: does it load as you think?
    python data.py encode SOURCE --out DIR  # large data sets (ImageNet, WebDataset): encoded once into shards (common/shards.py)
"""

import functools
import hashlib
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import parallel, shards
from common.arguments import Parser, integer
from common.checkpoint import save_atomically
from common.encoders import join_text, pad_text
from common.pictures import CACHE, to_tensor
from common.seeds import batch_indices, choose_one, pad_choices, rng
from common.shapes import SPLITS, ShapesWorld
from common.sources import CaptionedFolder, is_raw
from model import PRESETS

# ------------------------------------------------------------------------------------------------------------------
# Latents and text states, computed once by the frozen encoders


@dataclass
class Latents:
    """What training reads. N pictures, K distinct captions; caption 0 is the empty one (dropped captions use it).

    latents (N, 16, h, w) float16, model latents; caption_ids (N,) int64 into `captions`, or (N, M) where pictures have
    several, -1 behind the shorter ones: training takes one by chance;
    states (K, T, D) float16, mask (K, T) bool, pooled (K, P) float16: see FrozenEncoders.encode_text;
    gemma (K, T', D') float16, gemma_mask (K, T') bool: see Gemma.encode; None without it;
    first_clip: channels of `states` that belong to the first of the two CLIPs;
    text_dim: width of the states that text() gives, if not their own; name: stands for the pictures, to tell data sets apart.
    """

    latents: torch.Tensor
    caption_ids: torch.Tensor
    captions: list
    states: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor
    gemma: torch.Tensor | None = None
    gemma_mask: torch.Tensor | None = None
    first_clip: int | None = None
    text_dim: int | None = None
    name: str = ""
    streamed = False  # ShardedLatents is: then nothing can be computed for all captions at once

    def __len__(self):
        return len(self.latents)

    @property
    def shape(self):
        """Of one latent: (16, h, w)."""
        return self.latents.shape[1:]

    @functools.cached_property
    def longest(self):
        """Tokens of the longest caption. What lies behind is padding for all of them, and attention there is wasted."""
        return int(self.mask.any(0).sum())

    @property
    def several_encoders(self):
        """Whether captions may be dropped from one encoder and not from another: see text()."""
        return self.gemma is not None

    def caption_of(self, i):
        """The caption of picture i."""
        return self.captions[choose_one(self.caption_ids)[i]]

    def pictures(self, index, chance=None):
        """(latents (B, 16, h, w) float32, caption ids (B,)) of these pictures: of several captions the one that `chance` (B,),
        numbers in [0, 1), picks; or the first."""
        return self.latents[index].float(), choose_one(self.caption_ids[index], chance)

    def text(self, ids):
        """(states (B, T, text_dim) float16, mask (B, T)) of captions, for the student.

        ids is (B,): a caption for each picture, 0 the empty one. With Gemma, training drops each encoder by itself; then ids is
        (B, 3), a column each for CLIP-L, CLIP-G and Gemma, and a dropped encoder reads caption 0. Whoever wants the caption of
        the picture takes the row's maximum: 0 only if all three have dropped it.
        """
        if self.gemma is None:
            states = self.states[ids, : self.longest]
            fits = self.text_dim in (None, states.shape[-1])
            return states if fits else self.fit(states), self.mask[ids, : self.longest]
        large, giant, gemma = (ids if ids.dim() == 1 else ids[:, i] for i in range(3))
        clip = self.states[giant, : self.longest]
        clip[..., : self.first_clip] = self.states[large, : self.longest, : self.first_clip]
        mask = self.mask[torch.maximum(large, giant), : self.longest]
        states, mask = join_text([(clip, mask), (self.gemma[gemma], self.gemma_mask[gemma])])
        return self.fit(states), mask

    def fit(self, states):
        return pad_text(states, self.text_dim or states.shape[-1], self.first_clip)

    def clip(self, ids):
        """(states (B, T, D), pooled (B, P)) float16 of captions, both CLIPs alone and padding included: for the teacher.

        With an id for each encoder, (B, 3), the teacher sees the caption unless all have dropped it.
        """
        ids = ids if ids.dim() == 1 else ids.amax(1)
        return self.states[ids], self.pooled[ids]

    def batch(self, seed, step, size, rows=slice(None)):
        """(latents (B, 16, h, w) float32, caption_ids (B,)) of one training step; with `rows`, of a part of its batch."""
        chance = torch.rand(size, generator=rng(seed, step, 7))
        return self.pictures(batch_indices(seed, step, size, len(self))[rows], chance[rows])


def cached(path, compute):
    """The tensors and captions in a safetensors file, or what `compute()` returns, saved there for the next run."""
    if path.is_file():
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(bytes(tensors.pop("captions").numpy()))
        except (safetensors.SafetensorError, KeyError, ValueError):
            warnings.warn(f"{path} is damaged; computing it again", stacklevel=3)
    tensors, captions = compute()
    shards.save_shard(tensors, path, captions=captions)
    return tensors, captions


def encode_dataset(dataset, encoders, cache=CACHE, batch=None):
    """Pass a dataset through the frozen encoders once: Latents, cached as two or three safetensors files in `cache`.

    The files' names are hashes of the dataset's content and of the encoders' weights, so another picture, caption or
    encoder never meets an old cache. `batch` defaults to as many pictures as make 64 of 128x128 pixels.
    """
    batch = batch or max(1, 64 * 128**2 // math.prod(dataset[0][0].size))

    def key(*parts):
        return hashlib.sha256(json.dumps(["captions as bytes", *parts]).encode()).hexdigest()[:16]

    def encode_pictures():
        captions, ids, latents = {"": 0}, [], []
        bar = tqdm(total=len(dataset), desc="encoding pictures", unit=" pictures", mininterval=1, disable=None)
        for start in range(0, len(dataset), batch):
            items = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
            latents.append(
                encoders.encode_pictures(to_tensor([picture for picture, _ in items])).half().cpu().contiguous()
            )
            for i, (_, caption) in enumerate(items, start):
                texts = dataset.captions(i) if hasattr(dataset, "captions") else [caption]
                ids.append([captions.setdefault(text, len(captions)) for text in texts or [caption]])
            bar.update(len(items))
        bar.close()
        return {"latents": torch.cat(latents), "caption_ids": pad_choices(ids)}, list(captions)

    def encode_captions():
        states, mask, pooled = encoders.encode_captions(captions, batch)
        return {"states": states, "mask": mask, "pooled": pooled}, captions

    def encode_gemma():
        states, mask = encoders.gemma.encode(captions)
        longest = int(mask.any(0).sum())
        return {"gemma": states[:, :longest].contiguous(), "gemma_mask": mask[:, :longest].contiguous()}, captions

    with parallel.first_alone():
        name = key(dataset.name, encoders.fingerprint("vae"))
        pictures, captions = cached(Path(cache) / f"latents-{name}.safetensors", encode_pictures)
        name = key(*captions, encoders.fingerprint("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        text, _ = cached(Path(cache) / f"text-{name}.safetensors", encode_captions)
        if encoders.gemma is not None:
            name = key(*captions, encoders.gemma.fingerprint())
            text |= cached(Path(cache) / f"gemma-{name}.safetensors", encode_gemma)[0]
    return Latents(captions=captions, **pictures, **text, first_clip=encoders.first_clip, name=dataset.name)


PROMPTS = (  # drawn from the same noise over and over while a student trains: easy families once, hard ones more often
    "a photo of a star", "a photo of a red circle", "a photo of a square and a triangle", "a photo of three stars",
    "a photo of two blue squares", "a photo of a triangle left of a circle", "a photo of a red star above a green square",
    "a photo of a purple circle and a yellow star",
)  # fmt: skip


def open_data(args, encoders):
    """(training data, validation data) of --data, or of the shapes world: Latents, or ShardedLatents from the disk.

    Their text states are as wide as the UNet of --size takes them. Raises SystemExit with one sentence when --data cannot be read.
    """
    folder = Path(args.data) if args.data else None
    if folder and list(folder.glob("0*.safetensors")):
        parts = shards.open_shards(folder, encoders)
        side = encoders.factor * parts[0].shape[-1]
        if side != args.resolution:
            raise SystemExit(f"the shards in {folder} are of {side} pixels: give --resolution {side}, or encode others.")
    elif folder and (folder.suffix == ".tar" or is_raw(folder)):
        raise SystemExit(f"{folder} is encoded once before training: python data.py encode {folder} --out DIR "
                         f"--resolution {args.resolution} --teacher {args.teacher}, then --data DIR.")  # fmt: skip
    elif folder:
        parts = [encode_dataset(part, encoders) for part in CaptionedFolder(folder, args.resolution, cache=CACHE).split()]
    else:
        worlds = ShapesWorld("train", 0, args.pictures), ShapesWorld("val", 0, 256)
        parts = [encode_dataset(world, encoders) for world in worlds]
    for part in parts:
        part.text_dim = PRESETS[args.size].text_dim
    return parts


def sample_prompts(args, data):
    """Eight captions to draw while training: PROMPTS, or some of --data's own."""
    return [data.caption_of(i * len(data) // 8) for i in range(8)] if args.data else list(PROMPTS)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["encode"]:
        shards.main(argv[1:])
        return
    doc = "Draw a captioned contact sheet of a data set. `data.py encode --help`: encode a large one into shards."
    p = Parser(doc, "python data.py --out sheet.png")
    p.add_argument("--data", metavar="DIR", help="folder of pictures with captions; without it, the shapes world")
    p.add_argument("--split", choices=SPLITS, default="train", help="of the shapes world")
    p.add_argument("--seed", type=integer(0), default=0, help="of the shapes world")
    p.add_argument("--n", type=integer(1), default=24, help="pictures")
    p.add_argument("--out", metavar="FILE", default="data.png", help="where to write the sheet")
    args = p.parse_args(argv)
    pictures = CaptionedFolder(args.data, 128, cache=CACHE) if args.data else ShapesWorld(args.split, args.seed, args.n)
    items = [pictures[i] for i in range(min(args.n, len(pictures)))]
    side, columns, font = 128, 4, ImageFont.load_default(11)
    sheet = Image.new("RGB", (columns * 310, math.ceil(len(items) / columns) * (side + 24)), "white")
    for i, (picture, caption) in enumerate(items):
        x, y = i % columns * 310 + 4, i // columns * (side + 24)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y + 18))
        ImageDraw.Draw(sheet).text((x, y + 3), caption[:52], fill="black", font=font)
    save_atomically(sheet.save, args.out)
    print(f"wrote {args.out}: {len(items)} of {len(pictures)} pictures")


if __name__ == "__main__":
    parallel.launch(main)
