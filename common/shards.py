"""Large data sets: pictures and captions -> shards of latents and text states, encoded once and streamed in training.

A picture of 1024 pixels takes the autoencoder and the text encoders longer than a training step takes the UNet's first stage, and
is seen many times. So they are run once, here, and training reads what they said:

    python data.py encode /data/imagenet --out /data/imagenet-256 --resolution 256 --min-side 64 --teacher SD3.5 --crop center
    python data.py encode "/data/t2i/{00000..00999}.tar" --out /data/t2i-1024 --resolution 1024 --teacher SD3.5 --gemma GEMMA
    torchrun --nproc_per_node 8 data.py encode ...                     # every rank encodes other shards
    python train_fm.py --size t2i --data /data/t2i-1024 --teacher SD3.5 ...

Three kinds of source, told apart by what is there:

    ImageNet    the folder as Kaggle and image-net.org give it: ILSVRC/Data/CLS-LOC/train/n01440764/*.JPEG (or train/n..., or n...)
                and the class names, LOC_synset_mapping.txt (or synset_words.txt); caption "a photo of <first name>" (Sec. 4)
    WebDataset  .tar files with 000.jpg (png, webp) and 000.txt or 000.json ({"caption": ...}) side by side
    folder      x.png beside x.txt, or metadata.jsonl: see pictures.list_captions

What is written: 00000.safetensors, ... (latents, caption ids, text states, the captions) and, when all are there, index.json.
A shard that is there is not made again: stop it at any moment and run the same command.
"""

import collections
import concurrent.futures
import functools
import glob
import io
import json
import re
import tarfile
import threading
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from PIL import Image
from tqdm import tqdm

from common import parallel
from common.arguments import Parser, add_device, integer, real
from common.checkpoint import save_atomically, save_json
from common.device import half, pick_device
from common.encoders import FrozenEncoders, join_text, pad_text
from common.pictures import list_captions, open_picture, to_tensor
from common.seeds import batch_indices, rng

IMAGE_KEYS, TEXT_KEYS = ("jpg", "jpeg", "png", "webp"), ("caption", "text", "TEXT", "prompt")
KINDS = ("too small", "too long or wide", "unreadable", "without a caption")  # why pictures are left out


# ------------------------------------------------------------------------------------------------------------------
# Sources: a list of parts, each of which becomes one shard. A part yields (name, bytes or path, caption).


def open_source(source, per_shard):
    """(kind, [part, ...]): a part is a function without arguments that yields (name, path or bytes of a picture, caption).

    Raises SystemExit with one sentence when there is nothing, or no class names beside ImageNet's folders.
    """
    folder = Path(source)
    tars = sorted(str(p) for p in folder.glob("*.tar")) if folder.is_dir() else expand_braces(source)
    if tars:
        missing = [path for path in tars if not Path(path).is_file()]
        if missing:
            raise SystemExit(f"{len(missing)} of {len(tars)} shards are not there, such as {missing[0]}.")
        return "webdataset", [functools.partial(read_tar, path) for path in tars]
    if not folder.is_dir():
        raise SystemExit(
            f"no such folder: {source}. Give ImageNet's folder, .tar files, or a folder of captioned pictures."
        )
    imagenet = list_imagenet(folder)
    items = (
        imagenet if imagenet is not None else [(str(path), path, caption) for path, caption in list_captions(folder)]
    )
    # In an order drawn once, so that a shard holds a bit of everything, and every class is in the first ones already.
    order = torch.randperm(len(items), generator=rng(0, len(items))).tolist()
    parts = [[items[i] for i in order[start : start + per_shard]] for start in range(0, len(items), per_shard)]
    return "folder" if imagenet is None else "imagenet", [functools.partial(iter, part) for part in parts]


def expand_braces(pattern):
    """ "a/{000..002}.tar" -> the three names; "a/*.tar" -> what is there; "a/1.tar" -> itself. [] for anything else."""
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*\.tar)", pattern)
    if match:
        head, first, last, tail = match.groups()
        return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]
    return sorted(glob.glob(pattern)) if "*" in pattern else [pattern] if pattern.endswith(".tar") else []


def is_raw(folder):
    """Whether a folder is ImageNet's or one of .tar files: too large to be encoded at the start of each run."""
    return any(folder.glob("*.tar")) or find_synsets(folder) is not None


def read_tar(path):
    """The samples of one WebDataset shard."""
    import webdataset

    try:
        files = webdataset.WebDataset(path, shardshuffle=False, empty_check=False, nodesplitter=lambda urls: urls)
        for sample in files:  # every sample of this one file: encode() gives each rank its own
            picture = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
            caption = sample["txt"].decode(errors="replace").strip() if "txt" in sample else ""
            if not caption and "json" in sample:
                described = json.loads(sample["json"])
                caption = next((str(described[key]).strip() for key in TEXT_KEYS if described.get(key)), "")
            if picture is not None:
                yield sample["__key__"], picture, caption
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise SystemExit(
            f"{path} is damaged ({error}): fetch it again or take it away. Finished shards stay."
        ) from error


def find_synsets(folder):
    """The class folders n01440764, ... of ILSVRC's training pictures; None if there are none."""
    for inner in ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "train", "."):
        synsets = sorted(p for p in (folder / inner).glob("n*") if re.fullmatch(r"n\d{8}", p.name) and p.is_dir())
        if synsets:
            return synsets
    return None


def list_imagenet(folder):
    """[(name, path, caption), ...] of ILSVRC's training pictures; None if the folder holds none of its class folders."""
    synsets = find_synsets(folder)
    if synsets is None:
        return None
    lists = [folder / name for name in ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise SystemExit(f"{folder} holds ImageNet's classes but not their names: put LOC_synset_mapping.txt there.")
    lines = (line.split(None, 1) for line in found.read_text(encoding="utf-8").splitlines() if line.strip())
    names = {synset: rest.split(",")[0].strip() for synset, rest in lines}
    unnamed = [p.name for p in synsets if p.name not in names]
    if unnamed:
        raise SystemExit(f"{found} has no name for {len(unnamed)} classes, such as {unnamed[0]}.")
    return [(f"{p.name}/{picture.name}", picture, f"a photo of {names[p.name]}") for p in synsets
            for picture in sorted(p.iterdir()) if picture.suffix.lower() in (".jpeg", ".jpg", ".png")]  # fmt: skip


def fit(picture, args, generator):
    """An RGB picture -> (resolution, resolution): scaled by its shorter side, then cropped. Or the reason to leave it out."""
    short, long = sorted(picture.size)
    if short < args.min_side:
        return "too small"
    if long > args.max_aspect * short:
        return "too long or wide"
    side = args.resolution
    size = [max(side, round(length * side / short)) for length in picture.size]
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    room = [size[0] - side, size[1] - side]
    where = [int(torch.randint(r + 1, (), generator=generator)) for r in room]
    left, top = where if args.crop == "random" else [r // 2 for r in room]
    return picture.crop((left, top, left + side, top + side))


# ------------------------------------------------------------------------------------------------------------------
# Encoding


def encode_part(part, number, encoders, args, bar, pool):
    """One part of the source as one shard: (tensors, captions, names, how many were left out and why)."""
    captions, ids, latents, names, left_out, waiting = {"": 0}, [], [], [], collections.Counter(), []

    def load(item):
        i, (_, picture, caption) = item
        if not caption:
            return "without a caption"
        try:
            opened = open_picture(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
        except OSError:
            return "unreadable"
        return fit(opened, args, rng(args.seed, number, i))

    def flush():
        for (_, (name, _, caption)), picture in zip(waiting, pool.map(load, waiting), strict=True):
            if isinstance(picture, str):
                left_out[picture] += 1
                continue
            batch.append(picture), names.append(name), ids.append(captions.setdefault(caption, len(captions)))
        if batch:
            latents.append(encoders.encode_pictures(to_tensor(batch)).half().cpu())
        bar.update(len(waiting))
        batch.clear(), waiting.clear()

    batch = []
    for item in enumerate(part()):
        waiting.append(item)
        if len(waiting) == args.batch:
            flush()
    flush()
    texts = list(captions)
    states, mask, pooled = encoders.encode_captions(texts, args.batch)
    none = torch.zeros(0, encoders.latent_channels, *[args.resolution // encoders.factor] * 2).half()
    tensors = {"latents": torch.cat(latents or [none]), "caption_ids": torch.tensor(ids, dtype=torch.int64),
               "states": states, "mask": mask, "pooled": pooled}  # fmt: skip
    if encoders.gemma is not None:
        tensors["gemma"], tensors["gemma_mask"] = encoders.gemma.encode(texts, args.batch)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, texts, names, left_out


def encode(args):
    """Write --out: a shard for each part of the source, and index.json when all are there."""
    kind, parts = open_source(args.source, args.per_shard)
    device = pick_device(args.device)
    encoders = FrozenEncoders(args.teacher, device, half(device), gemma=args.gemma)
    if args.resolution % (4 * encoders.factor):
        raise SystemExit(f"--resolution must be a multiple of {4 * encoders.factor}, not {args.resolution}.")
    settings = {
        name: getattr(args, name)
        for name in ["source", "resolution", "crop", "min_side", "max_aspect", "per_shard", "seed"]
    }
    settings |= {
        "parts": len(parts),
        "encoders": encoders.fingerprint(*encoders.parts),
        "gemma": args.gemma and encoders.gemma.fingerprint(),
    }
    with parallel.first_alone():
        path = args.out / "settings.json"
        if path.is_file() and (old := json.loads(path.read_text())) != settings:
            changed = [
                f"{name} was {old.get(name)}, is {value}" for name, value in settings.items() if old.get(name) != value
            ]
            raise SystemExit(
                f"{args.out} was begun otherwise: {'; '.join(changed)}. Use the same settings or another --out."
            )
        if parallel.rank() == 0:
            save_json(settings, path)

    missing = [k for k in range(len(parts)) if not (args.out / f"{k:05d}.safetensors").is_file()]
    parallel.wait()  # all have looked before the first one writes
    todo = missing[parallel.rank() :: parallel.world()]
    bar = tqdm(desc=f"{kind}, {len(missing)} of {len(parts)} shards to encode", unit=" pictures", mininterval=1,
               disable=None if parallel.rank() == 0 else True)  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        for number in todo:
            tensors, captions, names, left_out = encode_part(parts[number], number, encoders, args, bar, pool)
            metadata = {"captions": json.dumps(captions), "names": json.dumps(names), "left_out": json.dumps(left_out)}
            write = functools.partial(safetensors.torch.save_file, tensors, metadata=metadata)
            save_atomically(write, args.out / f"{number:05d}.safetensors")
    bar.close()
    parallel.wait()
    if parallel.rank() == 0:
        write_index(args.out, len(parts), settings, encoders)
    parallel.wait()


def write_index(out, parts, settings, encoders):
    """index.json: what is in each shard, and what was left out."""
    shards, left_out, longest, gemma_longest = [], collections.Counter(), 0, 0
    for number in range(parts):
        path = out / f"{number:05d}.safetensors"
        with open_shard(path) as file:
            metadata, caption_mask = file.metadata(), file.get_tensor("mask")
            shards.append({"file": path.name, "bytes": path.stat().st_size, "pictures": len(json.loads(metadata["names"])),
                           "captions": len(json.loads(metadata["captions"]))})  # fmt: skip
            left_out.update(json.loads(metadata["left_out"]))
            longest = max(longest, int(caption_mask.any(0).sum()))
            if settings["gemma"]:
                gemma_longest = max(gemma_longest, int(file.get_tensor("gemma_mask").any(0).sum()))
    n = sum(shard["pictures"] for shard in shards)
    if not n:
        raise SystemExit(f"no picture was left: {dict(left_out)}. Look at --min-side and --max-aspect.")
    side = settings["resolution"] // encoders.factor
    index = {
        "settings": settings, "latent": [encoders.latent_channels, side, side], "first_clip": encoders.first_clip,
        "longest": longest, "gemma_longest": gemma_longest, "pictures": n, "left_out": dict(left_out), "shards": shards,
    }  # fmt: skip
    save_json(index, out / "index.json")
    why = ", ".join(f"{left_out[kind]} {kind}" for kind in KINDS if left_out[kind]) or "none"
    print(
        f"{out}: {n} pictures in {len(shards)} shards, {sum(s['bytes'] for s in shards) / 1e9:.2f} GB; left out: {why}"
    )


# ------------------------------------------------------------------------------------------------------------------
# Reading


def open_shard(path):
    try:
        return safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise SystemExit(
            f"{path} is damaged ({error}): delete it and run data.py encode again, which makes it alone."
        ) from error


class ShardedLatents:
    """data.Latents that stay on the disk: training asks for the pictures and captions of a batch, in any order.

    The order is that of Latents, a function of (seed, step), so a resumed run sees what it would have seen. Caption ids count
    through all shards; 0 is the empty caption. The text states read last stay in memory (`keep` captions).

    Args:
        folder: what data.py encode wrote. encoders: the FrozenEncoders of the run, which must be those that encoded it.
        held_out: the pictures of the validation set (every 20th; of many pictures some 256) instead of all others.

    Raises:
        SystemExit: no index, a shard missing or damaged, or encoded by other encoders.
    """

    streamed, text_dim = True, None  # as of data.Latents

    def __init__(self, folder, encoders, held_out=False, keep=2048):
        self.folder, self.keep, self.read, self.lock = Path(folder), keep, collections.OrderedDict(), threading.Lock()
        path = self.folder / "index.json"
        if not path.is_file():
            raise SystemExit(
                f"{folder} has no index.json: data.py encode has not finished; run the same command again."
            )
        self.index = json.loads(path.read_text())
        used = self.index["settings"]
        if used["encoders"] != encoders.fingerprint(*encoders.parts):
            raise SystemExit(
                f"{folder} was encoded by other encoders than those in {encoders.folder}: give their --teacher."
            )
        if used["gemma"] != (encoders.gemma and encoders.gemma.fingerprint()):
            raise SystemExit(
                f"{folder} was encoded {'with another' if used['gemma'] else 'without'} Gemma: give --gemma as then."
            )
        for shard in self.index["shards"]:
            file = self.folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise SystemExit(f"{file} is missing or of another size: delete it and run data.py encode again.")
        self.first_picture, self.first_caption = (
            torch.tensor([0] + [shard[name] for shard in self.index["shards"]]).cumsum(0)
            for name in ("pictures", "captions")
        )
        numbers, n = torch.arange(self.index["pictures"]), self.index["pictures"]
        every = max(20, n // 256)
        of_validation = numbers % every == every - 1 if n >= 20 else torch.full((n,), held_out)
        self.numbers = numbers[of_validation if held_out else ~of_validation]
        self.first_clip = self.index["first_clip"]
        self.open = functools.cache(self._open)  # all of them stay open: a batch takes its pictures from anywhere
        self.captions_in = functools.lru_cache(8)(lambda k: json.loads(self.open(k)[0].metadata()["captions"]))

    name = property(lambda self: f"shards-{self.index['settings']}")
    shape = property(lambda self: torch.Size(self.index["latent"]))
    longest = property(lambda self: self.index["longest"])
    several_encoders = property(lambda self: self.index["settings"]["gemma"] is not None)

    def __len__(self):
        return len(self.numbers)

    def _open(self, k):
        file = open_shard(self.folder / self.index["shards"][k]["file"])
        return file, file.get_tensor("caption_ids")

    def _find(self, number, first):
        """(shard, place within it) of a picture or caption number."""
        k = int(torch.searchsorted(first, number, right=True)) - 1
        return k, int(number - first[k])

    def pictures(self, index):
        latents, ids = [], []
        for number in self.numbers[index]:
            k, i = self._find(number, self.first_picture)
            file, caption_ids = self.open(k)
            latents.append(file.get_slice("latents")[i : i + 1])
            ids.append(int(self.first_caption[k] + caption_ids[i]))
        return torch.cat(latents).float(), torch.tensor(ids)

    def batch(self, seed, step, size, rows=slice(None)):
        return self.pictures(batch_indices(seed, step, size, len(self))[rows])

    def caption_of(self, i):
        return self.captions_of(self.pictures([i])[1])[0]

    def captions_of(self, ids):
        """The captions with these numbers, as strings."""
        places = [self._find(number, self.first_caption) for number in ids]
        return [self.captions_in(k)[i] for k, i in places]

    def rows(self, ids):
        """{name: (B, ...)} of the text of captions `ids` (B,): states, mask, pooled [, gemma, gemma_mask]."""
        found = []
        for number in ids.tolist():
            with self.lock:  # a thread makes the next batches while the teacher asks for this one's text
                if number not in self.read:
                    k, i = self._find(number, self.first_caption)
                    file = self.open(k)[0]
                    names = [name for name in file.keys() if name not in ("latents", "caption_ids")]  # noqa: SIM118
                    self.read[number] = {name: file.get_slice(name)[i] for name in names}
                    while len(self.read) > max(self.keep, 2 * len(ids)):
                        self.read.popitem(last=False)
                found.append(self.read[number])
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}

    def text(self, ids):
        large, giant, gemma = [self.rows(ids)] * 3 if ids.dim() == 1 else map(self.rows, ids.unbind(1))
        states, mask = giant["states"][:, : self.longest], (large["mask"] | giant["mask"])[:, : self.longest]
        states[..., : self.first_clip] = large["states"][:, : self.longest, : self.first_clip]
        if "gemma" in gemma:
            end = self.index["gemma_longest"]
            states, mask = join_text([(states, mask), (gemma["gemma"][:, :end], gemma["gemma_mask"][:, :end])])
        return pad_text(states, self.text_dim or states.shape[-1], self.first_clip), mask

    def clip(self, ids):
        rows = self.rows(ids if ids.dim() == 1 else ids.amax(1))
        return rows["states"], rows["pooled"]


def open_shards(folder, encoders):
    """(training pictures, validation pictures) of a folder that data.py encode wrote."""
    return ShardedLatents(folder, encoders), ShardedLatents(folder, encoders, held_out=True)


def parse_arguments(argv=None):
    example = "python data.py encode /data/imagenet --out /data/imagenet-256 --resolution 256"
    p = Parser(__doc__, example, prog="python data.py encode")
    p.add_argument("source", help="ImageNet's folder, a folder of .tar files or a pattern, or a folder of captioned pictures")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the shards go")
    p.add_argument("--teacher", metavar="DIR", default="assets/toy-sd3", help="SD3 folder whose encoders are used")
    p.add_argument("--gemma", metavar="DIR", help="folder of google/gemma-2-2b, a third text encoder")
    p.add_argument("--resolution", type=integer(1), required=True, help="side in pixels of what is encoded: 256, 512, 1024")
    p.add_argument("--crop", choices=("center", "random"), default="center", help="of what the square leaves over")
    p.add_argument("--min-side", type=integer(0), help="leave out pictures whose shorter side has fewer; default: --resolution")
    p.add_argument("--max-aspect", type=real(1), default=2.0, help="leave out pictures longer than this times their width")
    p.add_argument("--per-shard", type=integer(1), default=4096, help="pictures a shard; a .tar makes one shard, whatever it holds")
    p.add_argument("--batch", type=integer(1), default=16, help="pictures at once through the encoders")
    p.add_argument("--workers", type=integer(1), default=8, help="threads that open pictures")
    p.add_argument("--seed", type=integer(0), default=0, help="of random crops")
    add_device(p)
    args = p.parse_args(argv)
    args.min_side = args.resolution if args.min_side is None else args.min_side
    return args


def main(argv=None):
    encode(parse_arguments(argv))
