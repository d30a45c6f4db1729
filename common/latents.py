"""What data.py has encoded, as training reads it: latents and text states, from the disk, by (seed, step)."""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch.nn.utils.rnn import pad_sequence

from common import parallel
from common.checkpoint import save_json
from common.encoders import join_text, pad_text
from common.seeds import batch_indices, rng
from common.tables import column, is_whole, open_folder, open_tables, save_table

PICTURES = Features({"name": Value("string"), "captions": List(Value("string")), "reason": Value("string"),
                     "latent": Value("large_binary")})  # fmt: skip
CAPTIONS, IDS = Features({"caption": Value("string")}), Features({"ids": List(Value("int64"))})
TEXTS = Features({"states": Value("large_binary"), "mask": Value("binary"), "pooled": Value("binary"),
                  "gemma": Value("large_binary"), "tokens": Value("int64"), "gemma_tokens": Value("int64")})


def take(rows, numbers):
    """{column: list} of some rows of such a table, in any order; bytes as they are: numpy.frombuffer() reads
    them."""
    return rows[[int(number) for number in numbers]].to_pydict()


class Latents:
    """What training reads: N pictures, K distinct captions; caption 0 is the empty one (dropped captions use
    it).

    Which pictures a step sees is a function of (seed, step), the same on any number of ranks, so a resumed
    run sees what it would have seen. Several threads may ask at once.

    Args: pictures, ids, captions, texts, index, as they lie in a folder of data.py encode. streamed: there
    are so many captions that nothing can be computed for all of them at once.
    """

    text_dim = None  # width of the states that text() gives, if not their own

    def __init__(self, pictures, ids, captions, texts, index, streamed=False):
        self.index, self.streamed, self.name = index, streamed, index["name"]
        self.shape, self.first_clip = torch.Size(index["latent"]), index["first_clip"]
        self.several_encoders = index["gemma_width"] is not None  # each is dropped by itself
        self.latent_rows, self.ids, self.caption_rows = pictures.select_columns(["latent"]), ids, captions
        self.text_rows = {gemma: texts.select_columns(["states", "mask", "pooled"] + ["gemma"] * gemma)
                          for gemma in (False, True)}  # fmt: skip
        self.numbers = np.flatnonzero(column(pictures, "reason").is_null().to_numpy())  # rows that were taken

    def split(self):
        """(training part, validation part): every 20th picture is held out, of many pictures some 256. Of
        fewer than 20 both parts are everything."""
        n, parts = len(self), (object.__new__(Latents), object.__new__(Latents))
        held_out = np.arange(n) % max(20, n // 256) == max(20, n // 256) - 1
        for part, chosen in zip(parts, (~held_out, held_out), strict=True):
            vars(part).update(vars(self), numbers=self.numbers[chosen] if n >= 20 else self.numbers)
        return parts

    def __len__(self):
        return len(self.numbers)

    def batch(self, seed, step, size, rows=slice(None)):
        """(latents (B, 16, h, w) float32, caption_ids (B,)) of one training step; with `rows`, of a part of
        its batch."""
        chance = torch.rand(size, generator=rng(seed, step, 7))
        return self.pictures(batch_indices(seed, step, size, len(self))[rows], chance[rows])

    def pictures(self, index, chance=None):
        """(latents (B, 16, h, w) float32, caption ids (B,)) of these pictures: of several captions the one
        that `chance` (B,), numbers in [0, 1), picks; or the first."""
        rows = self.numbers[np.asarray(index)]
        ids = take(self.ids, rows)["ids"]
        chance = torch.zeros(len(rows)) if chance is None else chance
        picks = (chance * torch.tensor([len(own) for own in ids])).long()
        chosen = torch.tensor([own[pick] for own, pick in zip(ids, picks, strict=True)])
        latents = np.stack([np.frombuffer(x, np.float16) for x in take(self.latent_rows, rows)["latent"]])
        return torch.from_numpy(latents).view(-1, *self.shape).float(), chosen

    def captions_of(self, ids):
        """The captions with these numbers."""
        return take(self.caption_rows, ids)["caption"]

    def caption_of(self, i):
        """The (first) caption of picture i."""
        return self.captions_of(self.pictures([i])[1])[0]

    @functools.cached_property
    def captions(self):
        """All of them."""
        return column(self.caption_rows, "caption").to_pylist()

    def rows(self, ids, gemma=True):
        """{name: (B, ...)} of the text of captions `ids` (B,): states, mask, pooled [, gemma, gemma_mask]."""
        gemma = gemma and self.several_encoders
        found = take(self.text_rows[gemma], ids)
        mask = torch.from_numpy(np.stack([np.frombuffer(x, bool) for x in found["mask"]]))  # (B, T)
        states, pooled = (torch.from_numpy(np.stack([np.frombuffer(x, np.float16) for x in found[name]]))
                          for name in ("states", "pooled"))  # fmt: skip
        rows = {"states": states.view(*mask.shape, -1), "mask": mask, "pooled": pooled}
        if gemma:  # of each caption the real tokens are stored
            longest, width = self.index["gemma_longest"], self.index["gemma_width"]
            real = [np.frombuffer(x, np.float16).reshape(-1, width).copy() for x in found["gemma"]]
            real = [torch.from_numpy(x) for x in real]
            padded = pad_sequence(real, batch_first=True)
            rows["gemma"] = torch.nn.functional.pad(padded, (0, 0, 0, longest - padded.shape[1]))
            rows["gemma_mask"] = torch.arange(longest) < torch.tensor([len(x) for x in real])[:, None]
        return rows

    def text(self, ids):
        """(states (B, T, text_dim) float16, mask (B, T)) of captions, for the student.

        ids is (B,): a caption for each picture, 0 the empty one. With Gemma, training drops each encoder by
        itself; then ids is (B, 3), a column each for CLIP-L, CLIP-G and Gemma, and a dropped encoder reads
        caption 0. Whoever wants the caption of the picture takes the row's maximum: 0 only if all three have
        dropped it.
        """
        different, where = ids.unique(return_inverse=True)  # each caption is read once
        rows = self.rows(different)
        large, giant, gemma = [where] * 3 if where.dim() == 1 else where.unbind(1)
        # What lies behind the longest caption of all is padding for every one, and attention there would be
        # wasted.
        real = slice(self.index["longest"])
        states, mask = rows["states"][giant, real], (rows["mask"][large] | rows["mask"][giant])[:, real]
        states[..., : self.first_clip] = rows["states"][large, real, : self.first_clip]
        if "gemma" in rows:
            states, mask = join_text([(states, mask), (rows["gemma"][gemma], rows["gemma_mask"][gemma])])
        if self.text_dim not in (None, states.shape[-1]):
            states = pad_text(states, self.text_dim, self.first_clip)
        return states, mask

    def clip(self, ids):
        """(states (B, T, D), pooled (B, P)) float16 of captions, both CLIPs alone and padding included: for
        the teacher.

        With an id for each encoder, (B, 3), the teacher sees the caption unless all have dropped it.
        """
        different, where = (ids if ids.dim() == 1 else ids.amax(1)).unique(return_inverse=True)
        rows = self.rows(different, gemma=False)
        return rows["states"][where], rows["pooled"][where]


def open_latents(folder, encoders=None, streamed=True):
    """What encode() has written. Raises SystemExit when it is not whole, or made by other encoders than
    these."""
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise SystemExit(f"{folder} has no index.json: data.py encode has not finished; run it again.")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8-sig"))
    if encoders and index["encoders"] != encoders.fingerprint(*encoders.parts):
        raise SystemExit(f"{folder} was encoded by other encoders than {encoders.folder}: give --teacher.")
    if encoders and index["gemma"] != (encoders.gemma and encoders.gemma.fingerprint()):
        which = "with another" if index["gemma"] else "without"
        raise SystemExit(f"{folder} was encoded {which} Gemma: give --gemma as then.")
    text = folder / index["text"]
    ids, captions = open_tables([folder / "caption_ids.arrow"]), open_tables([text / "captions.arrow"])
    pictures, texts = open_folder(folder, "pictures"), open_folder(text, "text")
    if not (len(pictures) == len(ids) and len(texts) == len(captions)):
        raise SystemExit(f"a file of {folder} or {text} is missing: run data.py encode again.")
    return Latents(pictures, ids, captions, texts, index, streamed)


def begin(settings):
    """Write {file: what the tables beside it are made of}. Raises SystemExit when they were begun
    otherwise."""
    with parallel.first_alone():
        for path, new in settings.items():
            old = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else new
            changed = [key for key in new if old.get(key) != new[key]]
            told = "; ".join(f"{key} was {old.get(key)}, is {new[key]}" for key in changed)
            if "name" in changed:
                told = "the files of the source were others"
            if changed:
                raise SystemExit(f"{path.parent} was begun otherwise: {told}. Give another --out.")
        if parallel.rank() == 0:
            for path, new in settings.items():
                save_json(new, path)


def number_captions(pictures, folder, text):
    """The table of all captions, also of pictures that were left out: at another resolution they may not be.
    Rank 0 writes it, or finds it there from another resolution, and writes which captions each picture
    has."""
    path = text / "captions.arrow"
    with parallel.first_alone():
        if parallel.rank() == 0 and not is_whole(folder / "caption_ids.arrow"):
            there = is_whole(path)
            known = column(open_tables([path]), "caption").to_pylist() if there else [""]
            numbers = {caption: number for number, caption in enumerate(known)}
            ids = [[numbers.setdefault(caption, len(numbers)) for caption in own]
                   for chunk in column(pictures, "captions").chunks for own in chunk.to_pylist()]  # fmt: skip
            if there and len(numbers) > len(known):
                raise SystemExit(f"{path} has other captions than the source has now, such as "
                                 f"{list(numbers)[len(known)]!r}: give another --text or --out.")  # fmt: skip
            if not there:
                save_table({"caption": list(numbers)}, CAPTIONS, path)
            save_table({"ids": ids}, IDS, folder / "caption_ids.arrow")
    return open_tables([path]).with_format(None)


def text_columns(states, mask, pooled, gemma=None, gemma_mask=None):
    """TEXTS of what the encoders say of K captions: tensors (K, ...). Of Gemma the real tokens alone."""
    real = [x[m] for x, m in zip(gemma, gemma_mask, strict=True)] if gemma is not None else []
    tensors = {"states": states.half(), "mask": mask, "pooled": pooled.half(), "gemma": real}
    columns = {name: [x.numpy().tobytes() for x in rows] for name, rows in tensors.items()}
    columns |= {"tokens": mask.sum(1).tolist(), "gemma_tokens": [len(x) for x in real]}
    return {name: rows or [None] * len(mask) for name, rows in columns.items()}


def in_memory(latents, ids, captions, states, mask, pooled, gemma=None, gemma_mask=None, first_clip=None,
              text_dim=None):  # fmt: skip
    """Latents of tensors: latents (N, 16, h, w), ids (N,) into `captions`, and what text_columns() takes."""
    none, texts = [None] * len(latents), text_columns(states, mask, pooled, gemma, gemma_mask)
    index = {"name": "", "latent": latents.shape[1:], "first_clip": first_clip, "gemma_width": None,
             "longest": max(texts["tokens"])}  # fmt: skip
    if gemma is not None:
        index |= {"gemma_width": gemma.shape[-1], "gemma_longest": max(texts["gemma_tokens"])}
    stored = [x.half().numpy().tobytes() for x in latents]
    columns = [
        ({"name": none, "captions": none, "reason": none, "latent": stored}, PICTURES),
        ({"ids": [[i] for i in ids.tolist()]}, IDS), ({"caption": captions}, CAPTIONS), (texts, TEXTS),
    ]  # fmt: skip
    tables = (Dataset.from_dict(rows, features=features).with_format("arrow") for rows, features in columns)
    made = Latents(*tables, index)
    made.text_dim = text_dim
    return made
