"""Pictures with captions, and the latents that training reads.

Pictures come from the shapes world (`common/shapes.py`), from a folder of your own (x.png beside x.txt, or Hugging Face's
metadata.jsonl), from ImageNet's folder, WebDataset's .tar files, or the hub. All of them pass once through the frozen
encoders (`common/encoders.py`), and training reads the latents and text states: the paper trains in the latent space of
SD3's autoencoder (Sec. 3.2), so no stage but the decoder's sees a pixel.

    python data.py --out shapes.png         # a captioned contact sheet of the shapes world
    python data.py --data DIR --out my.png  # the same for your own folder: does it load as you think?
    python data.py encode SOURCE --out DIR  # large data sets (ImageNet, WebDataset): encoded once, before training

What is encoded lies in Arrow files (common/tables.py): a step reads its rows of them from the disk, and a million
pictures take no memory. In a folder DIR:

    source-*.arrow    what was found in .tar files
    pictures-*.arrow  name, captions, latent (16 x h x w in half precision), or the reason why it was left out
    captions.arrow, caption_ids.arrow    every caption once, the empty one first; which of them a picture has
    text-*.arrow      of each caption the states of both CLIPs, their pooled states, and of Gemma the real tokens
    index.json        written last: sizes, and how many were left out
"""

import functools
import hashlib
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont

from common import arguments, parallel, sources
from common.arguments import Parser, integer, real
from common.checkpoint import save_atomically, save_json
from common.device import half, pick_device
from common.encoders import FrozenEncoders
from common.figures import stack
from common.latents import CAPTIONS, IDS, PICTURES, TEXTS, open_latents, text_columns
from common.pictures import CACHE, to_tensor
from common.shapes import SPLITS, ShapesWorld
from common.tables import column, is_whole, map_in_parts, open_tables, save_table
from common.world import ThingsWorld, poses_of
from model import PRESETS

PER_PART = 4096  # pictures, or captions, in a file: what a kill undoes at most

# ------------------------------------------------------------------------------------------------------------------
# Encoding


def encode(rows, load, encoders, folder, settings, source, text=None, per_part=PER_PART, batch=64, workers=8):
    """Pass pictures and captions through the frozen encoders, into `folder`; what is there is not made again.

    Args:
        rows: a datasets.Dataset; load: (row, its number) -> (name, [caption, ...], picture (PIL) or why it is left out).
        settings: what the result depends on besides the encoders: "name" stands for the pictures, "side" is theirs.
        source: what the pictures are called in a message.
        text: where the text goes, or is from another resolution; None: into `folder`.
    """
    text = text or folder
    of_text = {"encoders": encoders.fingerprint(*encoders.parts[1:]), "gemma": encoders.gemma and encoders.gemma.fingerprint(),
               "per_part": per_part}  # fmt: skip
    settings = {**settings, "per_part": per_part, "encoders": encoders.fingerprint(*encoders.parts), "gemma": of_text["gemma"]}
    with parallel.first_alone():
        begin({folder / "settings.json": settings, text / "text-settings.json": of_text})

    def encode_pictures(columns, numbers):
        some = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        names, captions, found = zip(*pool.map(load, some, numbers), strict=True)
        pictures = [picture for picture in found if not isinstance(picture, str)]
        latents = iter(encoders.encode_pictures(to_tensor(pictures)).half().cpu().numpy() if pictures else ())
        reasons = [picture if isinstance(picture, str) else None for picture in found]
        kept = [None if reason else next(latents).tobytes() for reason in reasons]
        return {"name": names, "captions": captions, "reason": reasons, "latent": kept}

    def encode_text(columns, numbers):
        captions = columns["caption"]
        gemma = encoders.gemma.encode(captions, batch) if encoders.gemma else ()
        return text_columns(*encoders.encode_captions(captions, batch), *gemma)

    side = settings["side"] // encoders.factor
    sizes = {"per_part": per_part, "batch": batch}
    with ThreadPoolExecutor(workers) as pool:
        latent = encoders.latent_channels, side, side
        pictures = map_in_parts(rows, encode_pictures, PICTURES, folder, "pictures", row_bytes=2 * math.prod(latent), **sizes)
    captions = number_captions(pictures, folder, text)
    token_bytes = 2 * encoders.max_tokens * encoders.text_dim
    texts = map_in_parts(captions, encode_text, TEXTS, text, "text", row_bytes=token_bytes, unit="captions", **sizes)
    left_out = sources.LeftOut(column(pictures, "name"), column(pictures, "reason"))
    if left_out.total() == len(pictures):
        raise SystemExit(sources.nothing_left(source, left_out))
    if parallel.rank() == 0 and left_out:
        print(f"{source}: {len(pictures) - left_out.total()} pictures; left out: {left_out}")
    longest, gemma_longest = (pc.max(column(texts, name)).as_py() for name in ("tokens", "gemma_tokens"))
    index = {**settings, "text": Path(os.path.relpath(text, folder)).as_posix(), "latent": latent, "longest": longest,
             "gemma_longest": gemma_longest, "gemma_width": encoders.gemma and encoders.gemma.net.config.hidden_size,
             "first_clip": encoders.first_clip, "pictures": len(pictures) - left_out.total(), "left_out": left_out}  # fmt: skip
    with parallel.first_alone():
        if parallel.rank() == 0:
            save_json(index, folder / "index.json")


def begin(settings):
    """Write {file: what the tables beside it are made of}. Raises SystemExit when those begun there are made otherwise."""
    for path, new in settings.items():
        old = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else new
        changed = [f"{name} was {old.get(name)}, is {value}" for name, value in new.items() if old.get(name) != value]
        if changed:
            raise SystemExit(f"{path.parent} was begun otherwise: {'; '.join(changed)}. Use the same settings or another folder.")
    if parallel.rank() == 0:
        for path, new in settings.items():
            save_json(new, path)


def number_captions(pictures, folder, text):
    """The table of all captions, also of pictures that were left out: at another resolution they may not be. Rank 0 writes
    it, or finds it there (of another resolution), and which of them each picture has."""
    path = text / "captions.arrow"
    with parallel.first_alone():
        if parallel.rank() == 0 and not is_whole(folder / "caption_ids.arrow"):
            there = is_whole(path)
            known = column(open_tables([path]), "caption").to_pylist() if there else [""]
            numbers = {caption: i for i, caption in enumerate(known)}
            ids = [[numbers.setdefault(caption, len(numbers)) for caption in own]
                   for chunk in column(pictures, "captions").chunks for own in chunk.to_pylist()]  # fmt: skip
            if there and len(numbers) > len(known):
                raise SystemExit(f"{path} has other captions than the source has now, such as "
                                 f"{list(numbers)[len(known)]!r}: give another --text, or another --out.")  # fmt: skip
            if not there:
                save_table({"caption": list(numbers)}, CAPTIONS, path)
            save_table({"ids": ids}, IDS, folder / "caption_ids.arrow")
    return open_tables([path]).with_format(None)


def encode_dataset(world, encoders, cache=CACHE, batch=None):
    """A world (anything with len() whose [i] is (picture, caption), and a name) through the encoders, once: Latents."""
    side = world[0][0].width
    rows = Dataset.from_dict({"index": range(len(world))})

    def load(row, number):
        picture, caption = world[row["index"]]
        return "", [caption], picture

    return encode_cached(rows, load, {"name": world.name, "side": side}, encoders, world.name, cache, batch)


def encode_folder(folder, resolution, encoders, cache=CACHE):
    """A folder of pictures with captions through the encoders, once: Latents."""
    source, crop = sources.open_source(folder), sources.Crop(resolution)
    if not len(source.rows):
        raise SystemExit(sources.nothing_left(folder, "nothing"))
    settings = {"name": f"folder-{resolution}-{source.name}", **crop._asdict()}
    return encode_cached(source.rows, functools.partial(source.load, crop=crop), settings, encoders, folder, cache)


def encode_cached(rows, load, settings, encoders, source, cache, batch=None):
    """encode() into a folder whose name is a hash of the pictures and of the encoders' weights."""
    gemma = encoders.gemma and encoders.gemma.fingerprint()
    key = hashlib.sha256(json.dumps([settings["name"], encoders.fingerprint(*encoders.parts), gemma]).encode()).hexdigest()[:16]
    folder = Path(cache) / f"encoded-{key}"
    batch = batch or max(1, 64 * 128**2 // settings["side"] ** 2)  # as many as make 64 of 128 x 128 pixels
    encode(rows, load, encoders, folder, settings, source, None, PER_PART, batch)
    return open_latents(folder, streamed=False)


PROMPTS = (  # drawn from the same noise over and over while a student trains: easy families once, hard ones more often
    "a photo of a star", "a photo of a red circle", "a photo of a square and a triangle", "a photo of three stars",
    "a photo of two blue squares", "a photo of a triangle left of a circle", "a photo of a red star above a green square",
    "a photo of a purple circle and a yellow star",
)  # fmt: skip


def open_data(folder, encoders, resolution=64, pictures=20_000, text_dim=None):
    """(training data, validation data), Latents: of a folder, of what data.py encode wrote, or without one of the class world.

    text_dim: as wide as the UNet takes its text states. Raises SystemExit with one sentence when they cannot be read.
    """
    if hasattr(folder, "data"):  # a stage's flags
        flags, text_dim = folder, PRESETS[folder.size].text_dim
        folder, resolution, pictures = flags.data, flags.resolution, flags.pictures
    if not folder:
        parts = [encode_dataset(world, encoders) for world in (ShapesWorld("train", 0, pictures), ShapesWorld("val", 0, 256))]
    elif any(Path(folder).glob("0*.safetensors")):
        raise SystemExit(f"{folder} was encoded by an earlier version: encode it again, with data.py encode.")
    elif any(Path(folder).glob("pictures-*.arrow")) or any(Path(folder).glob("source-*.arrow")):
        data = open_latents(folder, encoders)
        side = encoders.factor * data.shape[-1]
        if side != resolution:
            raise SystemExit(f"the latents in {folder} are of {side} pixels: give --resolution {side}, or encode others.")
        parts = data.split()
    elif (kind := sources.kind_of(folder)[0]) != "folder":
        raise SystemExit(f"{folder} ({kind}) is encoded once before training: python data.py encode {folder} --out DIR "
                         f"--resolution {resolution} --teacher {encoders.folder}, then --data DIR.")  # fmt: skip
    else:
        parts = encode_folder(folder, resolution, encoders).split()
    for part in parts:
        part.text_dim = text_dim
    return parts


def sample_prompts(folder, data):
    """Eight captions to draw while training: PROMPTS, or some of the folder's own."""
    own = getattr(folder, "data", folder)
    return [data.caption_of(i * len(data) // 8) for i in range(8)] if own else list(PROMPTS)


# ------------------------------------------------------------------------------------------------------------------
# The command line


def draw_sheet(argv):
    doc = "Draw a captioned contact sheet of a data set. `data.py encode --help`: encode a large one."
    p = Parser(doc, "python data.py --out sheet.png")
    p.add_argument("--data", metavar="DIR", help="folder of pictures with captions; without it, the shapes world")
    p.add_argument("--split", choices=SPLITS, default="train", help="of the shapes world")
    p.add_argument("--seed", type=integer(0), default=0, help="of the shapes world")
    p.add_argument("--n", type=integer(1), default=24, help="pictures")
    p.add_argument("--things", action="store_true", help="the world of drawn things (common/world.py) in place of the shapes")
    p.add_argument("--thing", metavar="NAME", help="one drawn thing, such as cat, in its poses and colors")
    p.add_argument("--out", metavar="FILE", default="data.png", help="where to write the sheet")
    args = p.parse_args(argv)
    if args.thing:
        save_atomically(stack(poses_of(args.thing)).save, args.out)
        print(f"wrote {args.out}: {args.thing}, a row for each color that it has in life, then for each of GenEval's ten")
        return
    world = (ThingsWorld if args.things else ShapesWorld)(args.split, args.seed, args.n)
    pictures = sources.CaptionedFolder(args.data, 128, cache=CACHE) if args.data else world
    items = [pictures[i] for i in range(min(args.n, len(pictures)))]
    side, columns, font = 128, 4, ImageFont.load_default(11)
    sheet = Image.new("RGB", (columns * 310, math.ceil(len(items) / columns) * (side + 24)), "white")
    for i, (picture, caption) in enumerate(items):
        x, y = i % columns * 310 + 4, i // columns * (side + 24)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y + 18))
        ImageDraw.Draw(sheet).text((x, y + 3), caption[:52], fill="black", font=font)
    save_atomically(sheet.save, args.out)
    print(f"wrote {args.out}: {len(items)} of {len(pictures)} pictures")


def parse_encode(argv=None):
    doc = "Encode a large data set once, before training: pictures to latents, captions to text states."
    p = Parser(doc, "python data.py encode /data/imagenet --out /data/imagenet-256 --resolution 256", prog="python data.py encode")
    p.add_argument("source", help="ImageNet's folder, one of .tar files, of captioned pictures; or the hub's owner/name")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the result goes")
    p.add_argument("--text", metavar="DIR", type=Path, help="where the text goes, or is, from another resolution; default: --out")
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder whose encoders are used")
    p.add_argument("--gemma", metavar="DIR", help="folder of google/gemma-2-2b, a third text encoder")
    p.add_argument("--resolution", type=integer(1), required=True, help="side in pixels of what is encoded: 256, 512, 1024")
    p.add_argument("--crop", choices=("center", "random"), default="center", help="of what the square leaves over")
    p.add_argument("--min-side", type=integer(0), help="leave out pictures whose shorter side has fewer; default: --resolution")
    p.add_argument("--max-aspect", type=real(1), default=2.0, help="leave out pictures longer than this times their width")
    p.add_argument("--per-part", type=integer(1), default=PER_PART, help="pictures a file: what a kill undoes at most")
    p.add_argument("--batch", type=integer(1), default=16, help="pictures at once through the encoders")
    p.add_argument("--workers", type=integer(1), default=8, help="threads that open pictures")
    p.add_argument("--seed", type=integer(0), default=0, help="of random crops")
    arguments.add_device(p)
    return p.parse_args(argv)


def encode_source(args):
    device = pick_device(args.device)
    encoders = FrozenEncoders(args.teacher, device, half(device), gemma=args.gemma)
    if args.resolution % (4 * encoders.factor):
        raise SystemExit(f"--resolution must be a multiple of {4 * encoders.factor}, not {args.resolution}.")
    min_side = args.resolution if args.min_side is None else args.min_side
    crop = sources.Crop(args.resolution, args.crop, min_side, args.max_aspect, args.seed)
    source = sources.open_source(args.source, args.out)
    settings = {"name": source.name, **crop._asdict()}
    encode(source.rows, functools.partial(source.load, crop=crop), encoders, args.out, settings, args.source, args.text,
           args.per_part, args.batch, args.workers)  # fmt: skip


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["encode"]:
        encode_source(parse_encode(argv[1:]))
    else:
        draw_sheet(argv)


if __name__ == "__main__":
    parallel.launch(main)
