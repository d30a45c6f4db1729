"""Pictures with captions, and the latents that training reads.

Pictures come from the shapes world (`shapes.py`) or from a folder of your own: `x.png` beside `x.txt`, or Hugging Face's
`metadata.jsonl`. Both pass once through the frozen encoders (`encoders.py`), and training reads the cached latents and text
states: the paper trains in the latent space of SD3's autoencoder (Sec. 3.2), so no stage but the decoder's sees a pixel.

    python data.py --out shapes.png         # a captioned contact sheet of the shapes world
    python data.py --data DIR --out my.png  # the same for your own folder: does it load as you think?
    python data.py encode SOURCE --out DIR  # large data sets (ImageNet, WebDataset): encoded once into shards (shards.py)
"""

import argparse
import collections
import concurrent.futures
import copy
import functools
import hashlib
import json
import math
import struct
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import parallel
from checkpoint import save_atomically
from encoders import join_text
from shapes import SIDE, SPLITS, ShapesWorld

# ------------------------------------------------------------------------------------------------------------------
# Folders of your own

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_picture(path, size=None):
    """A picture file as RGB (PIL), whatever it holds; with `size`, scaled and centre-cropped to (size, size).

    Transparency is laid on white, the first frame of an animation is taken, 16-bit greyscale is scaled to 8 bits, CMYK,
    palettes and greyscale are converted. Raises OSError (or one of its kind) when the file is corrupt or truncated.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            picture = ImageOps.exif_transpose(picture)  # phones write the pixels lying down and say so
            if picture.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel: Pillow's own conversion would clip
                values = np.asarray(picture, dtype=np.float32)
                wide = picture.mode.startswith("I;16") or values.max() > 255
                top = 65535.0 if wide else 255.0 if values.max() > 1 else 1.0
                picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise OSError(f"{path} is not a readable picture: {error}") from error
    if size is None:
        return picture
    scale = size / min(picture.size)
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def list_captions(folder, captioned=True):
    """[(picture path, caption)] of a folder: `metadata.jsonl` (file_name, text) if it has one, else x.png + x.txt.

    captioned=False takes every picture, and leaves out the captions: a decoder needs none.
    Raises SystemExit with one sentence when the folder does not exist or holds no captioned picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SystemExit(f"no such folder: {folder}. Give --data a folder of pictures with captions.")
    pairs, metadata = [], folder / "metadata.jsonl"
    if not captioned:
        pairs = [(path, "") for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURE_ENDINGS]
        if not pairs:
            raise SystemExit(f"no pictures in {folder}: it needs files that end in {', '.join(PICTURE_ENDINGS)}.")
    elif metadata.is_file():
        for number, line in enumerate(_read_text(metadata).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                pairs.append((folder / row["file_name"], str(row["text"])))
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"{metadata}, line {number}: expected an object with file_name and text ({error!r})."
                ) from error
    else:
        for path in sorted(folder.rglob("*")):
            text = path.with_suffix(".txt")
            if path.suffix.lower() in PICTURE_ENDINGS and text.is_file():
                pairs.append((path, _read_text(text).strip()))
    if not pairs:
        raise SystemExit(
            f"no captioned pictures in {folder}: put x.txt beside each x.png, or a metadata.jsonl with one "
            '{"file_name": ..., "text": ...} a line.'
        )
    return pairs


class CaptionedFolder:
    """A sequence of (picture, caption) from a folder. Unreadable pictures are left out, counted, and named once.

    Raises SystemExit when the folder, its captions, or every one of its pictures cannot be read.
    """

    def __init__(self, folder, size=SIDE, captioned=True):
        self.size = size
        pairs, self.pairs, self.skipped = list_captions(folder, captioned), [], []
        for path, caption in tqdm(pairs, desc="checking pictures", disable=len(pairs) < 500):
            try:
                open_picture(path)
                self.pairs.append((path, caption))
            except OSError:
                self.skipped.append(path)
        if self.skipped:
            warnings.warn(
                f"left out {len(self.skipped)} of {len(pairs)} pictures that cannot be read, such as {self.skipped[0]}",
                stacklevel=2,
            )
        if not self.pairs:
            raise SystemExit(f"none of the {len(pairs)} pictures in {folder} can be read, such as {self.skipped[0]}.")

    @property
    def name(self):
        """Stands for the content: another caption or a touched picture makes another cache."""
        content = [(str(path), path.stat().st_size, path.stat().st_mtime_ns, text) for path, text in self.pairs]
        return f"folder-{self.size}-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def split(self, every=20):
        """(training part, validation part): every 20th picture is held out; with fewer, both parts are everything."""
        if len(self) < every:
            return self, self
        parts = copy.copy(self), copy.copy(self)
        parts[0].pairs = [pair for i, pair in enumerate(self.pairs) if i % every != every - 1]
        parts[1].pairs = self.pairs[every - 1 :: every]
        return parts

    def __len__(self):
        return len(self.pairs)

    def caption(self, i):
        return self.pairs[i][1]

    def __getitem__(self, i):
        path, caption = self.pairs[i]
        return open_picture(path, self.size), caption


def to_tensor(pictures):
    """A list of equally large RGB pictures (PIL) -> (B, 3, H, W) float32 in [-1, 1]."""
    x = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # (B, H, W, 3) uint8
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x):
    """(B, 3, H, W) in [-1, 1] -> a list of B RGB pictures (PIL)."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(picture) for picture in x]


# ------------------------------------------------------------------------------------------------------------------
# Latents and text states, computed once by the frozen encoders


@dataclass
class Latents:
    """What training reads. N pictures, K distinct captions; caption 0 is the empty one (dropped captions use it).

    latents (N, 16, h, w) float16, model latents; caption_ids (N,) int64 into `captions`;
    states (K, T, D) float16, mask (K, T) bool, pooled (K, P) float16: see FrozenEncoders.encode_text;
    gemma (K, T', D') float16, gemma_mask (K, T') bool: see Gemma.encode; None without it;
    first_clip: channels of `states` that belong to the first of the two CLIPs.
    """

    latents: torch.Tensor
    caption_ids: torch.Tensor
    captions: list
    states: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor
    gemma: torch.Tensor | None = None
    gemma_mask: torch.Tensor | None = None
    first_clip: int = 0
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
        return self.captions[self.caption_ids[i]]

    def pictures(self, index):
        """(latents (B, 16, h, w) float32, caption ids (B,)) of these pictures."""
        return self.latents[index].float(), self.caption_ids[index]

    def text(self, ids):
        """(states (B, T, D) float16, mask (B, T)) of captions, for the student.

        ids is (B,): a caption for each picture, 0 the empty one. With Gemma, training drops each encoder by itself; then ids is
        (B, 3), a column each for CLIP-L, CLIP-G and Gemma, and a dropped encoder reads caption 0. Whoever wants the caption of
        the picture takes the row's maximum: 0 only if all three have dropped it.
        """
        if self.gemma is None:
            return self.states[ids, : self.longest], self.mask[ids, : self.longest]
        large, giant, gemma = (ids if ids.dim() == 1 else ids[:, i] for i in range(3))
        clip = self.states[giant, : self.longest]
        clip[..., : self.first_clip] = self.states[large, : self.longest, : self.first_clip]
        mask = self.mask[torch.maximum(large, giant), : self.longest]
        return join_text([(clip, mask), (self.gemma[gemma], self.gemma_mask[gemma])])

    def clip(self, ids):
        """(states (B, T, D), pooled (B, P)) float16 of captions, both CLIPs alone and padding included: for the teacher.

        With an id for each encoder, (B, 3), the teacher sees the caption unless all have dropped it.
        """
        ids = ids if ids.dim() == 1 else ids.amax(1)
        return self.states[ids], self.pooled[ids]

    def batch(self, seed, step, size, rows=slice(None)):
        """(latents (B, 16, h, w) float32, caption_ids (B,)) of one training step; with `rows`, of a part of its batch."""
        return self.pictures(self.indices(seed, step, size)[rows])

    def indices(self, seed, step, size):
        """Which pictures a step sees, (B,): a pure function of (seed, step), so a resume needs no saved order.

        The pictures come in a new random order every epoch.
        """
        index, start, n = [], step * size, len(self)
        for epoch in range(start // n, (start + size - 1) // n + 1):
            order = _epoch_order(seed, epoch, n)
            index.append(order[max(0, start - epoch * n) : start + size - epoch * n])
        return torch.cat(index)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=rng(seed, epoch, 0))


def rng(*key):
    """A torch.Generator seeded by integers such as (seed, step, rank): the same key, the same random numbers."""
    digest = hashlib.sha256(repr(tuple(int(k) for k in key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def noise_rows(shape, batch, *key, rows=slice(None)):
    """Standard normal noise (B, *shape) of a batch; with `rows`, of a part of it. Every row has its own generator, so that a
    GPU among many draws its own rows alone, and they are those that a single one would have drawn."""
    return torch.stack([torch.randn(*shape, generator=rng(*key, i)) for i in range(batch)[rows]])


def cached(path, compute):
    """The tensors and captions in a safetensors file, or what `compute()` returns, saved there for the next run."""
    if path.is_file():
        try:
            with safetensors.safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["captions"])  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, TypeError):
            warnings.warn(f"{path} is damaged; computing it again", stacklevel=3)
    tensors, captions = compute()
    save_atomically(lambda p: safetensors.torch.save_file(tensors, p, {"captions": json.dumps(captions)}), path)
    return tensors, captions


def encode_dataset(dataset, encoders, cache="runs/cache", batch=None):
    """Pass a dataset through the frozen encoders once: Latents, cached as two safetensors files under `cache`.

    The files' names are hashes of the dataset's content and of the encoders' weights, so another picture, caption or
    encoder never meets an old cache. `batch` defaults to as many pictures as make 64 of 128x128 pixels.
    """
    batch = batch or max(1, 64 * 128**2 // math.prod(dataset[0][0].size))

    def key(*parts):
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def encode_pictures():
        captions, ids, latents = {"": 0}, [], []
        bar = tqdm(total=len(dataset), desc="encoding pictures", unit=" pictures", mininterval=1)
        for start in range(0, len(dataset), batch):
            items = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
            latents.append(
                encoders.encode_pictures(to_tensor([picture for picture, _ in items])).half().cpu().contiguous()
            )
            ids += [captions.setdefault(caption, len(captions)) for _, caption in items]
            bar.update(len(items))
        bar.close()
        return {"latents": torch.cat(latents), "caption_ids": torch.tensor(ids)}, list(captions)

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
    return Latents(captions=captions, **pictures, **text, first_clip=encoders.first_clip)


def ahead(make, numbers, device):
    """make(number) for each number; on a GPU the next one is made by a thread while this one is worked on."""
    if device.type == "cpu":
        yield from map(make, numbers)
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = collections.deque()
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["encode"]:
        import shards

        shards.main(argv[1:])
        return
    p = argparse.ArgumentParser(
        description="Draw a captioned contact sheet of a data set. `data.py encode --help`: encode a large one into shards."
    )
    p.add_argument("--data", metavar="DIR", help="folder of pictures with captions; without it, the shapes world")
    p.add_argument("--split", choices=SPLITS, default="train", help="of the shapes world (default: train)")
    p.add_argument("--seed", type=int, default=0, help="of the shapes world (default: 0)")
    p.add_argument("--n", type=int, default=24, help="pictures (default: 24)")
    p.add_argument("--out", metavar="FILE", default="data.png", help="where to write the sheet (default: data.png)")
    args = p.parse_args(argv)
    if args.n < 1 or args.seed < 0:
        raise SystemExit("--n must be at least 1, and --seed at least 0.")
    pictures = CaptionedFolder(args.data, 128) if args.data else ShapesWorld(args.split, args.seed, args.n)
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
