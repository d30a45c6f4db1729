"""Large data sets: pictures and captions -> shards of latents and text states, encoded once and streamed in training.

To encode a picture and its caption is slow, and training sees each many times. So it is done once, here, and training reads the
result:

    python data.py encode /data/imagenet --out /data/imagenet-256 --resolution 256 --min-side 64 --teacher SD3.5 --crop center
    python data.py encode "/data/t2i/{00000..00999}.tar" --out /data/t2i-1024 --resolution 1024 --teacher SD3.5 --gemma GEMMA
    python data.py encode ... --out /data/t2i-512 --resolution 512 --text /data/t2i-1024    # the same pictures: their text is there
    torchrun --nproc_per_node 8 data.py encode ...                     # every rank encodes other shards
    python train_fm.py --size t2i --data /data/t2i-1024 --teacher SD3.5 ...

Three kinds of source, told apart by what is there (common/sources.py):

    ImageNet    the folder as Kaggle and image-net.org give it: ILSVRC/Data/CLS-LOC/train/n01440764/*.JPEG (or train/n..., or n...)
                and the class names, LOC_synset_mapping.txt (or synset_words.txt); caption "a photo of <first name>" (Sec. 4)
    WebDataset  .tar files with 000.jpg (png, webp) and 000.txt or 000.json ({"caption": ...}) side by side
    folder      x.png beside x.txt, or metadata.jsonl: see sources.list_captions

Pictures of several captions (a list in metadata.jsonl or 000.json) keep all of them, and training takes one by chance.

What is written: 00000.safetensors, ... (latents, caption ids), text-00000.safetensors, ... (the captions and their states) and,
when all are there, index.json. A shard that is there is not made again: stop it at any moment and run the same command.

Text does not depend on the resolution, so it is encoded and stored once: a text shard holds all captions of its part of the source,
whichever pictures are left out, and --text names the folder in which shards of another resolution have theirs. Of Gemma the real
tokens are stored. CLIP's states are stored whole: the teacher attends to their padding, which differs from caption to caption.
"""

import concurrent.futures
import functools
import io
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import parallel
from common.arguments import Parser, add_device, integer, real
from common.checkpoint import save_atomically, save_json
from common.device import half, pick_device
from common.encoders import FrozenEncoders, join_text, pad_text
from common.pictures import cut_square, open_picture, to_tensor
from common.seeds import batch_indices, choose_one, pad_choices, rng
from common.sources import NO_CAPTION, UNREADABLE, LeftOut, clean, open_source

# ------------------------------------------------------------------------------------------------------------------
# Encoding


def fit(picture, args, generator):
    """An RGB picture -> (resolution, resolution): scaled by its shorter side, then cropped. Or the reason to leave it out."""
    short, long = sorted(picture.size)
    if short < args.min_side:
        return "too small"
    if long > args.max_aspect * short:
        return "too long or wide"
    across, down = torch.rand(2, generator=generator).tolist() if args.crop == "random" else (0.5, 0.5)
    return cut_square(picture, args.resolution, across, down)


def encode_part(part, number, encoders, args, bar, pool):
    """One part of the source: ({"latents", "caption_ids"}, names, all its captions, how many pictures were left out and why)."""
    captions, ids, latents, names, left_out, waiting = {"": 0}, [], [], [], LeftOut(), []

    def load(numbered):
        i, item = numbered
        if item.reason or not item.captions:
            return item.reason or NO_CAPTION
        try:
            opened = open_picture(io.BytesIO(item.picture) if isinstance(item.picture, bytes) else item.picture)
        except OSError:
            return UNREADABLE
        return fit(opened, args, rng(args.seed, number, i))

    def flush():
        for (_, item), picture in zip(waiting, pool.map(load, waiting), strict=True):
            for caption in item.captions:  # also of a picture that is left out: at another resolution it may not be
                captions.setdefault(caption, len(captions))
            if isinstance(picture, str):
                left_out.note(picture, item.name)
                continue
            batch.append(picture)
            names.append(clean(item.name))
            ids.append([captions[caption] for caption in item.captions])
        if batch:
            latents.append(encoders.encode_pictures(to_tensor(batch)).half().cpu())
        bar.update(len(waiting))
        batch.clear()
        waiting.clear()

    batch = []
    for item in enumerate(part()):
        waiting.append(item)
        if len(waiting) == args.batch:
            flush()
    flush()
    none = torch.zeros(0, encoders.latent_channels, *[args.resolution // encoders.factor] * 2).half()
    tensors = {"latents": torch.cat(latents or [none]), "caption_ids": pad_choices(ids)}
    return tensors, names, list(captions), left_out


def encode_text(captions, encoders, batch):
    """{"states", "mask", "pooled"} of K captions, as of data.Latents, and with Gemma {"gemma": (tokens, D) the real tokens of all
    captions, one caption after the other, "gemma_end": (K,) where those of each end}."""
    tensors = dict(zip(("states", "mask", "pooled"), encoders.encode_captions(captions, batch), strict=True))
    if encoders.gemma is not None:
        states, counts = zip(*((s[mask], mask.sum(1)) for s, mask in encoders.gemma.batches(captions, batch)), strict=True)
        tensors |= {"gemma": torch.cat(states), "gemma_end": torch.cat(counts).cumsum(0)}
    return tensors


def begin(settings):
    """Write {file: what the shards beside it are made of}. Raises SystemExit when those begun there are made of something else."""
    for path, new in settings.items():
        old = json.loads(path.read_text()) if path.is_file() else new
        if "text" in new and "text" not in old:
            raise SystemExit(f"{path.parent} was begun by an earlier version, whose shards hold their text themselves: with an "
                             "index.json it is whole, and can be trained on; otherwise give another --out.")  # fmt: skip
        changed = [f"{name} was {old.get(name)}, is {value}" for name, value in new.items() if old.get(name) != value]
        if changed:
            raise SystemExit(f"{path.parent} was begun otherwise: {'; '.join(changed)}. Use the same settings or another folder.")
    if parallel.rank() == 0:
        for path, new in settings.items():
            save_json(new, path)


def encode(args):
    """Write --out: a shard for each part of the source, its text there or in --text, and index.json when all are there."""
    kind, parts, not_listed = open_source(args.source, args.per_shard)
    device = pick_device(args.device)
    encoders = FrozenEncoders(args.teacher, device, half(device), gemma=args.gemma)
    if args.resolution % (4 * encoders.factor):
        raise SystemExit(f"--resolution must be a multiple of {4 * encoders.factor}, not {args.resolution}.")
    # DIR/, ./DIR and its absolute path are one source
    of_source = {"source": os.path.abspath(args.source), "per_shard": args.per_shard, "parts": len(parts),
                 "gemma": args.gemma and encoders.gemma.fingerprint()}  # fmt: skip
    names = ["resolution", "crop", "min_side", "max_aspect", "seed"]
    out, text = args.out.absolute(), (args.text or args.out).absolute()
    settings = of_source | {name: getattr(args, name) for name in names} | {
        "encoders": encoders.fingerprint(*encoders.parts),
        "text": Path(os.path.relpath(text, out) if text.drive == out.drive else text).as_posix(),
    }  # fmt: skip
    of_text = of_source | {"encoders": encoders.fingerprint(*encoders.parts[1:])}
    with parallel.first_alone():
        begin({out / "settings.json": settings, text / "text-settings.json": of_text})

    def paths(k):
        return out / f"{k:05d}.safetensors", text / f"text-{k:05d}.safetensors"

    missing = [k for k in range(len(parts)) if not all(path.is_file() for path in paths(k))]
    parallel.wait()  # all have looked before the first one writes
    todo = missing[parallel.rank() :: parallel.world()]
    bar = tqdm(desc=f"{kind}, {len(missing)} of {len(parts)} shards to encode", unit=" pictures", mininterval=1,
               disable=None if parallel.rank() == 0 else True)  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        for number in todo:
            of_latents, of_text = paths(number)
            tensors, names, captions, left_out = encode_part(parts[number], number, encoders, args, bar, pool)
            if not of_text.is_file():
                save_shard(encode_text(captions, encoders, args.batch), of_text, captions=captions)
            elif kept(open_shard(of_text), "captions") != captions:
                raise SystemExit(f"{of_text} has other captions than {args.source} has now: give another --text.")
            save_shard(tensors, of_latents, names=names, left_out=left_out, examples=left_out.examples)
    bar.close()
    parallel.wait()
    if parallel.rank() == 0:
        write_index(out, [paths(k) for k in range(len(parts))], settings, encoders, not_listed)
    parallel.wait()


def save_shard(tensors, path, **lists):
    """The tensors, and each of `lists` as the bytes of its JSON: a safetensors header may hold no more than 100 MB."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    tensors |= {name: as_bytes(value) for name, value in lists.items()}
    save_atomically(lambda p: safetensors.torch.save_file(tensors, p), path)


def write_index(out, paths, settings, encoders, left_out):
    """index.json: what is in each shard, and what was left out. `paths`: (that of the latents, that of the text) of each."""
    shards, longest, gemma_longest = [], 0, 0
    for path, text in paths:
        pictures, file = open_shard(path), open_shard(text)
        counts = {"pictures": len(kept(pictures, "names")), "captions": len(kept(file, "captions"))}
        sizes = {"bytes": path.stat().st_size, "text_bytes": text.stat().st_size}
        shards.append({"file": path.name, "text": text.name, **sizes, **counts})
        left_out.update(kept(pictures, "left_out"))
        left_out.examples = kept(pictures, "examples") | left_out.examples
        longest = max(longest, int(file.get_tensor("mask").any(0).sum()))
        if settings["gemma"]:
            gemma_longest = max(gemma_longest, int(file.get_tensor("gemma_end").diff(prepend=torch.zeros(1).long()).max()))
    n = sum(shard["pictures"] for shard in shards)
    if not n:
        raise SystemExit(f"no picture was left: {left_out}. Look at --min-side and --max-aspect.")
    side = settings["resolution"] // encoders.factor
    index = {
        "settings": settings, "latent": [encoders.latent_channels, side, side], "first_clip": encoders.first_clip,
        "longest": longest, "gemma_longest": gemma_longest, "pictures": n, "left_out": dict(left_out), "shards": shards,
    }  # fmt: skip
    save_json(index, out / "index.json")
    size, of_text = (sum(shard[name] for shard in shards) / 1e9 for name in ("bytes", "text_bytes"))
    print(f"{out}: {n} pictures in {len(shards)} shards, {size:.2f} GB, and {of_text:.2f} GB of text in {paths[0][1].parent}; "
          f"left out: {left_out}")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# Reading


def open_shard(path):
    try:
        return safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise SystemExit(
            f"{path} is damaged ({error}): delete it and run data.py encode again, which makes it alone."
        ) from error


def as_bytes(value):
    """JSON as a tensor of bytes."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def kept(file, name):
    """A list that save_shard() has put into a file. Earlier shards have theirs in the header."""
    if name in file.keys():  # noqa: SIM118
        return json.loads(bytes(file.get_tensor(name).numpy()))
    return json.loads((file.metadata() or {}).get(name, "{}"))


class ShardedLatents:
    """data.Latents that stay on the disk: training asks for the pictures and captions of a batch, in any order.

    The order is that of Latents, a function of (seed, step), so a resumed run sees what it would have seen. Several threads may ask
    at once: those that make the next batches, and the teacher for the text of this one. Caption ids count through all shards; 0 is
    the empty caption. Shards of earlier versions, which hold their text themselves, are read as well.

    Args:
        folder: what data.py encode wrote. encoders: the FrozenEncoders of the run, which must be those that encoded it; None: do
            not check, for studies.speed.
        held_out: the pictures of the validation set (every 20th; of many pictures some 256) instead of all others.

    Raises:
        SystemExit: no index, a shard missing or damaged, or encoded by other encoders.
    """

    streamed, text_dim = True, None  # as of data.Latents

    def __init__(self, folder, encoders=None, held_out=False):
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise SystemExit(
                f"{folder} has no index.json: data.py encode has not finished; run the same command again."
            )
        self.index = json.loads(path.read_text())
        used = self.index["settings"]
        if encoders and used["encoders"] != encoders.fingerprint(*encoders.parts):
            raise SystemExit(
                f"{folder} was encoded by other encoders than those in {encoders.folder}: give their --teacher."
            )
        if encoders and used["gemma"] != (encoders.gemma and encoders.gemma.fingerprint()):
            raise SystemExit(
                f"{folder} was encoded {'with another' if used['gemma'] else 'without'} Gemma: give --gemma as then."
            )
        self.text_folder = self.folder / used.get("text", "")
        for shard in self.index["shards"]:
            for file, size in ((self.folder / shard["file"], shard["bytes"]), (self.text_path(shard), shard.get("text_bytes"))):
                if not file.is_file() or size not in (None, file.stat().st_size):
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
        self.open_text = functools.cache(self._open_text)
        self.captions_in = functools.lru_cache(8)(lambda k: kept(self.open_text(k)[0], "captions"))

    name = property(lambda self: f"shards-{self.index['settings']}")
    shape = property(lambda self: torch.Size(self.index["latent"]))
    longest = property(lambda self: self.index["longest"])
    several_encoders = property(lambda self: self.index["settings"]["gemma"] is not None)

    def __len__(self):
        return len(self.numbers)

    def _open(self, k):
        file = open_shard(self.folder / self.index["shards"][k]["file"])
        return file, file.get_tensor("caption_ids")

    def text_path(self, shard):
        return self.text_folder / shard["text"] if "text" in shard else self.folder / shard["file"]

    def _open_text(self, k):
        """(file, where the caption's tokens of Gemma end or None)"""
        file = open_shard(self.text_path(self.index["shards"][k]))
        return file, file.get_tensor("gemma_end").tolist() if "gemma_end" in file.keys() else None  # noqa: SIM118

    def _find(self, number, first):
        """(shard, place within it) of a picture or caption number."""
        k = int(torch.searchsorted(first, number, right=True)) - 1
        return k, int(number - first[k])

    def pictures(self, index, chance=None):
        latents, ids = [], []
        for n, number in enumerate(self.numbers[index]):
            k, i = self._find(number, self.first_picture)
            file, caption_ids = self.open(k)
            latents.append(file.get_slice("latents")[i : i + 1])
            chosen = choose_one(caption_ids[i : i + 1], None if chance is None else chance[n : n + 1])
            ids.append(int(self.first_caption[k] + chosen))
        return torch.cat(latents).float(), torch.tensor(ids)

    def batch(self, seed, step, size, rows=slice(None)):
        chance = torch.rand(size, generator=rng(seed, step, 7))
        return self.pictures(batch_indices(seed, step, size, len(self))[rows], chance[rows])

    def caption_of(self, i):
        return self.captions_of(self.pictures([i])[1])[0]

    def captions_of(self, ids):
        """The captions with these numbers, as strings."""
        places = [self._find(number, self.first_caption) for number in ids]
        return [self.captions_in(k)[i] for k, i in places]

    def row(self, number, gemma=True):
        """{name: tensor} of one caption; of Gemma the real tokens alone."""
        k, i = self._find(number, self.first_caption)
        file, ends = self.open_text(k)
        row = {name: file.get_slice(name)[i] for name in ("states", "mask", "pooled")}
        if not gemma:
            return row
        if ends is not None:
            row["gemma"] = file.get_slice("gemma")[ends[i - 1] if i else 0 : ends[i]]
        elif self.several_encoders:  # of an earlier version: padded
            row["gemma"] = file.get_slice("gemma")[i][file.get_slice("gemma_mask")[i]]
        return row

    def rows(self, ids, gemma=True):
        """{name: (B, ...)} of the text of captions `ids` (B,): states, mask, pooled [, gemma, gemma_mask]."""
        found = [self.row(number, gemma) for number in ids.tolist()]
        rows = {name: torch.stack([row[name] for row in found]) for name in ("states", "mask", "pooled")}
        if "gemma" in found[0]:
            lengths, longest = torch.tensor([len(row["gemma"]) for row in found]), self.index["gemma_longest"]
            gemma = pad_sequence([row["gemma"] for row in found], batch_first=True)
            rows["gemma"] = torch.nn.functional.pad(gemma, (0, 0, 0, longest - gemma.shape[1]))
            rows["gemma_mask"] = torch.arange(longest) < lengths[:, None]
        return rows

    def text(self, ids):
        different, where = ids.unique(return_inverse=True)  # each caption is read once, whichever encoders were dropped
        rows, (large, giant, gemma) = self.rows(different), [where] * 3 if where.dim() == 1 else where.unbind(1)
        states, mask = rows["states"][giant, : self.longest], (rows["mask"][large] | rows["mask"][giant])[:, : self.longest]
        states[..., : self.first_clip] = rows["states"][large, : self.longest, : self.first_clip]
        if "gemma" in rows:
            states, mask = join_text([(states, mask), (rows["gemma"][gemma], rows["gemma_mask"][gemma])])
        return pad_text(states, self.text_dim or states.shape[-1], self.first_clip), mask

    def clip(self, ids):
        different, where = (ids if ids.dim() == 1 else ids.amax(1)).unique(return_inverse=True)
        rows = self.rows(different, gemma=False)
        return rows["states"][where], rows["pooled"][where]


def open_shards(folder, encoders):
    """(training pictures, validation pictures) of a folder that data.py encode wrote."""
    return ShardedLatents(folder, encoders), ShardedLatents(folder, encoders, held_out=True)


def parse_arguments(argv=None):
    example = "python data.py encode /data/imagenet --out /data/imagenet-256 --resolution 256"
    p = Parser(__doc__, example, prog="python data.py encode")
    p.add_argument("source", help="ImageNet's folder, a folder of .tar files or a pattern, or a folder of captioned pictures")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the shards go")
    p.add_argument("--text", metavar="DIR", type=Path, help="where the text goes, or is, from another resolution; default: --out")
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
