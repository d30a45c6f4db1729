"""Pictures with captions -> the latents and text states that training reads.

Pictures come from the shapes world (`common/shapes.py`), from a folder of your own (x.png beside x.txt, or
Hugging Face's metadata.jsonl), from ImageNet's folder, WebDataset's .tar files, or the hub
(`common/sources.py`). All of them pass once through the frozen encoders (`common/encoders.py`): the paper
trains in the latent space of SD3's autoencoder (Sec. 3.2), so no stage but the decoder's sees a pixel.

    python data.py --out shapes.png         # a captioned contact sheet of the shapes world python data.py
    --data DIR --out my.png  # the same for your own folder: does it load as you think? python data.py encode
    SOURCE --out DIR  # large data sets (ImageNet, WebDataset): encoded once, before training

What is encoded lies in Arrow files (`common/tables.py`). A step reads its rows from the disk
(`common/latents.py`), and a million pictures take no memory. A folder that was encoded holds

    source-*.arrow       what was found in .tar files pictures-*.arrow     of each picture its name, captions
    and latent, or the reason why it was left out captions.arrow       every caption once, the empty one first
    caption_ids.arrow    which of them each picture has text-*.arrow         of each caption the states of
    both CLIPs and their pooled states, and of Gemma the real tokens index.json           written last: sizes,
    settings, and how many pictures were left out
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
from common.latents import PICTURES, TEXTS, begin, number_captions, open_latents, text_columns
from common.pictures import CACHE, to_tensor
from common.shapes import SPLITS, ShapesWorld
from common.tables import column, map_in_parts
from common.world import ThingsWorld, poses_of

PER_PART = 4096  # pictures, or captions, in a file: what a kill undoes at most

# ------------------------------------------------------------------------------------------------------------
# Encoding


def encode(rows, load, encoders, folder, settings, source, text=None, per_part=PER_PART, batch=64, workers=8):
    """Pass pictures and captions through the frozen encoders, into `folder`; what is there is not made again.

    Args:
        rows: a datasets.Dataset. load: (row, its number) -> (name, [caption, ...], picture (PIL) or why it is
        left out). settings: what the result depends on besides the encoders: "name" stands for the pictures,
        "side" is theirs. source: what the pictures are called in a message. text: where the text goes, or is
        from another resolution; None: into `folder`.
    """
    if not len(rows):
        raise SystemExit(sources.nothing_left(source, "nothing"))
    text = text or folder
    gemma = encoders.gemma and encoders.gemma.fingerprint()
    made_by = {"encoders": encoders.fingerprint(*encoders.parts), "gemma": gemma, "per_part": per_part}
    of_text = {**made_by, "encoders": encoders.fingerprint(*encoders.parts[1:])}
    begin({folder / "settings.json": {**settings, **made_by}, text / "text-settings.json": of_text})

    def encode_pictures(columns, numbers):
        """A batch of rows -> PICTURES."""
        by_row = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        names, captions, found = zip(*pool.map(load, by_row, numbers), strict=True)
        reasons = [picture if isinstance(picture, str) else None for picture in found]
        pictures = [picture for picture in found if not isinstance(picture, str)]
        latents = encoders.encode_pictures(to_tensor(pictures)).half().cpu().numpy() if pictures else ()
        latents = (latent.tobytes() for latent in latents)
        kept = [None if reason else next(latents) for reason in reasons]
        return {"name": names, "captions": captions, "reason": reasons, "latent": kept}

    def encode_text(columns, numbers):
        """A batch of captions -> TEXTS."""
        captions = columns["caption"]
        of_gemma = encoders.gemma.encode(captions, batch) if encoders.gemma else ()
        return text_columns(*encoders.encode_captions(captions, batch), *of_gemma)

    side = settings["side"] // encoders.factor
    latent, sizes = (encoders.latent_channels, side, side), {"per_part": per_part, "batch": batch}
    n, k = 2 * math.prod(latent), 2 * encoders.max_tokens * encoders.text_dim  # bytes of a row
    with ThreadPoolExecutor(workers) as pool:
        pictures = map_in_parts(rows, encode_pictures, PICTURES, folder, "pictures", row_bytes=n, **sizes)
    captions = number_captions(pictures, folder, text)
    texts = map_in_parts(captions, encode_text, TEXTS, text, "text", row_bytes=k, **sizes)

    left_out = sources.LeftOut(column(pictures, "name"), column(pictures, "reason"))
    taken = len(pictures) - left_out.total()
    if not taken:
        raise SystemExit(sources.nothing_left(source, left_out))
    if left_out and parallel.rank() == 0:
        print(f"{source}: {taken} pictures; left out: {left_out}")
    longest, gemma_longest = (pc.max(column(texts, name)).as_py() for name in ("tokens", "gemma_tokens"))
    gemma_width = encoders.gemma.net.config.hidden_size if encoders.gemma else None
    index = {**settings, **made_by, "text": Path(os.path.relpath(text, folder)).as_posix(), "latent": latent,
             "longest": longest, "gemma_longest": gemma_longest, "gemma_width": gemma_width,
             "first_clip": encoders.first_clip, "pictures": taken, "left_out": left_out}  # fmt: skip
    with parallel.first_alone():
        if parallel.rank() == 0:
            save_json(index, folder / "index.json")


def encode_dataset(world, encoders, cache=CACHE, batch=None):
    """A world (anything with len() whose [i] is (picture, caption), and a name) through the encoders, once:
    Latents."""

    def load(row, number):
        picture, caption = world[row["index"]]
        return "", [caption], picture

    rows = Dataset.from_dict({"index": range(len(world))})
    settings = {"name": world.name, "side": world[0][0].width}
    return encode_cached(rows, load, encoders, settings, world.name, cache, batch)


def encode_folder(folder, resolution, encoders, cache=CACHE):
    """A folder of pictures with captions through the encoders, once: Latents."""
    source, crop = sources.open_source(folder), sources.Crop(resolution)
    settings = {**crop._asdict(), "name": f"folder-{resolution}-{source.name}"}
    load = functools.partial(source.load, crop=crop)
    return encode_cached(source.rows, load, encoders, settings, folder, cache)


def encode_cached(rows, load, encoders, settings, source, cache, batch=None):
    """encode() into a folder whose name is a hash of the pictures and of the encoders' weights."""
    gemma = encoders.gemma and encoders.gemma.fingerprint()
    key = json.dumps([settings["name"], encoders.fingerprint(*encoders.parts), gemma])
    folder = Path(cache) / f"encoded-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    batch = batch or max(1, 64 * 128**2 // settings["side"] ** 2)  # as many as make 64 of 128 x 128 pixels
    encode(rows, load, encoders, folder, settings, source, per_part=PER_PART, batch=batch)
    return open_latents(folder, streamed=False)


# ------------------------------------------------------------------------------------------------------------
# What the stages ask for


def open_data(folder, encoders, resolution=64, pictures=20_000, text_dim=None):
    """(training data, validation data), Latents: of a folder, or without one of the class world.

    Args: folder, of pictures with captions, or what data.py encode wrote; resolution, of its pictures in
    pixels; pictures, how many of the world; text_dim, how wide the UNet takes its text states. Raises
    SystemExit with one sentence when the folder cannot be read.
    """
    if not folder:
        worlds = ShapesWorld("train", 0, pictures), ShapesWorld("val", 0, 256)
        parts = [encode_dataset(world, encoders) for world in worlds]
    elif any(Path(folder).glob("0*.safetensors")):
        raise SystemExit(f"{folder} was encoded by an earlier version: encode it again, with data.py encode.")
    elif any(Path(folder).glob("pictures-*.arrow")) or any(Path(folder).glob("source-*.arrow")):
        data = open_latents(folder, encoders)
        side = encoders.factor * data.shape[-1]
        if side != resolution:
            raise SystemExit(f"the latents in {folder} are of {side} pixels: give --resolution {side}, or "
                             "encode others.")  # fmt: skip
        parts = data.split()
    elif sources.kind_of(folder)[0] != "folder":
        raise SystemExit(f"{folder} is encoded once before training: python data.py encode {folder} "
                         f"--resolution {resolution} --teacher {encoders.folder} --out DIR.")  # fmt: skip
    else:
        parts = encode_folder(folder, resolution, encoders).split()
    for part in parts:
        part.text_dim = text_dim
    return parts


# Drawn from the same noise over and over while a student trains: easy families once, hard ones more often.
PROMPTS = (
    "a photo of a star", "a photo of a red circle", "a photo of a square and a triangle",
    "a photo of three stars", "a photo of two blue squares", "a photo of a triangle left of a circle",
    "a photo of a red star above a green square", "a photo of a purple circle and a yellow star",
)  # fmt: skip


def sample_prompts(folder, data):
    """Eight captions to draw while training: PROMPTS, or some of the folder's own."""
    return [data.caption_of(i * len(data) // 8) for i in range(8)] if folder else list(PROMPTS)


# ------------------------------------------------------------------------------------------------------------
# The command line


def draw_sheet(argv):
    doc = "Draw a captioned contact sheet of a data set. `data.py encode --help`: encode a large one."
    p = Parser(doc, "python data.py --out sheet.png")
    p.add_argument("--data", metavar="DIR", help="pictures with captions; default: the shapes world")
    p.add_argument("--split", choices=SPLITS, default="train", help="of the shapes world")
    p.add_argument("--seed", type=integer(0), default=0, help="of the shapes world")
    p.add_argument("--n", type=integer(1), default=24, help="pictures")
    p.add_argument("--things", action="store_true", help="drawn things (common/world.py), no shapes")
    p.add_argument("--thing", metavar="NAME", help="one drawn thing, such as cat, in its poses and colors")
    p.add_argument("--out", metavar="FILE", default="data.png", help="where to write the sheet")
    args = p.parse_args(argv)
    if args.thing:
        save_atomically(stack(poses_of(args.thing)).save, args.out)
        print(f"wrote {args.out}: {args.thing}, a row for each color of its own, then of GenEval's ten")
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
    example = "python data.py encode /data/imagenet --out /data/imagenet-256 --resolution 256"
    p = Parser(doc, example, prog="python data.py encode")
    p.add_argument("source", help="folder of ImageNet, .tar files, captioned pictures; or owner/name")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the result goes")
    p.add_argument("--text", metavar="DIR", type=Path,
                   help="where the text goes, or is from another resolution; default: --out")  # fmt: skip
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder with the encoders")
    p.add_argument("--gemma", metavar="DIR", help="folder of google/gemma-2-2b, a third text encoder")
    p.add_argument("--resolution", type=integer(1), required=True, help="side in pixels: 256, 512, 1024")
    p.add_argument("--crop", choices=("center", "random"), default="center", help="where a square is cut out")
    p.add_argument("--min-side", type=integer(0), help="leave out what is smaller; default: --resolution")
    p.add_argument("--max-aspect", type=real(1), default=2.0, help="leave out what is longer, in widths")
    p.add_argument("--per-part", type=integer(1), default=PER_PART, help="pictures a file")
    p.add_argument("--batch", type=integer(1), default=16, help="pictures at once through the encoders")
    p.add_argument("--workers", type=integer(1), default=8, help="threads that open pictures")
    p.add_argument("--seed", type=integer(0), default=0, help="of random crops")
    arguments.add_device(p)
    return p.parse_args(argv)


def encode_source(argv):
    args = parse_encode(argv)
    device = pick_device(args.device)
    encoders = FrozenEncoders(args.teacher, device, half(device), gemma=args.gemma)
    if args.resolution % (4 * encoders.factor):
        raise SystemExit(f"--resolution must be a multiple of {4 * encoders.factor}, not {args.resolution}.")
    min_side = args.resolution if args.min_side is None else args.min_side
    crop = sources.Crop(args.resolution, args.crop, min_side, args.max_aspect, args.seed)
    source = sources.open_source(args.source, args.out)
    load, settings = functools.partial(source.load, crop=crop), {**crop._asdict(), "name": source.name}
    encode(source.rows, load, encoders, args.out, settings, args.source, args.text, args.per_part, args.batch,
           args.workers)  # fmt: skip


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["encode"]:
        encode_source(argv[1:])
    else:
        draw_sheet(argv)


if __name__ == "__main__":
    parallel.launch(main)
