"""Pictures in the layouts that the field's own evaluation tools read, so that nobody has to trust ours.

`sample.py --prompts WHAT --out DIR` looks at WHAT and lays out DIR accordingly; the tools themselves are run on DIR afterwards:

    WHAT                                 DIR                                             who reads it
    a text file, a prompt a line         00000.png, ..., metadata.jsonl                  evaluate.py, train_fm.py --data
    GenEval's evaluation_metadata.jsonl  00000/metadata.jsonl, 00000/samples/0000.png    geneval/evaluation/evaluate_images.py
    DPG-Bench's folder of .txt files     NAME.png, a grid of 2 x 2 pictures of a prompt  ELLA/dpg_bench/compute_dpg_bench.py
    ImageNet's LOC_synset_mapping.txt    00000.png, ..., and samples.npz with --npz      guided-diffusion/evaluations/evaluator.py

Every picture depends on its prompt and seed alone; under torchrun each rank draws its share; what is there is not drawn again.
"""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.checkpoint import save_atomically

GRID = 4  # pictures a prompt in DPG-Bench


def read_prompts(path):
    """The non-empty lines of a text file."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read prompts from {path}: {error}") from error
    if not prompts:
        raise SystemExit(f"{path} holds no prompt: write one a line.")
    return prompts


def read_what(path):
    """(layout, prompts, names): "geneval" (names are the lines of its metadata), "dpg" (names of files), or "folder"."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise SystemExit(f"{path} holds no .txt files: DPG-Bench has one a prompt.")
        return "dpg", [" ".join(read_prompts(file)) for file in files], [file.stem for file in files]
    lines = read_prompts(path)
    if path.suffix == ".jsonl":
        try:
            return "geneval", [json.loads(line)["prompt"] for line in lines], lines
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path} is no evaluation_metadata.jsonl: each line needs a prompt ({error!r})."
            ) from error
    synsets = [re.fullmatch(r"n\d{8}\s+(.*)", line) for line in lines]
    if all(synsets):  # the captions that training saw
        return "folder", [f"a photo of {match[1].split(',')[0].strip()}" for match in synsets], None
    return "folder", lines, None


def plan(what, n, seed):
    """[(path within --out, prompt, seed), ...] of every picture: n of each prompt, and 4 for DPG-Bench."""
    layout, prompts, names = read_what(what)
    n = max(n, GRID) if layout == "dpg" else n
    pictures = []
    for i, prompt in enumerate(prompts):
        for k in range(n):
            number = i * n + k
            path = {"geneval": f"{i:05d}/samples/{k:04d}.png", "dpg": f"single/{names[i] if names else ''}_{k}.png",
                    "folder": f"{number:05d}.png"}[layout]  # fmt: skip
            pictures.append((path, prompt, seed + number))
    return layout, pictures, names


def finish(out, layout, pictures, names):
    """What belongs beside the pictures: GenEval's metadata, DPG-Bench's grids, metadata.jsonl of a plain folder."""
    out = Path(out)
    if layout == "geneval":
        for i, line in enumerate(names):
            save_atomically(
                lambda p, line=line: p.write_text(line + "\n", encoding="utf-8"), out / f"{i:05d}" / "metadata.jsonl"
            )
    elif layout == "dpg":
        n = len(pictures) // len(names)
        for i, name in enumerate(names):
            four = [Image.open(out / path) for path, _, _ in pictures[i * n : i * n + GRID]]
            width, height = four[0].size
            grid = Image.new("RGB", (2 * width, 2 * height))
            for k, picture in enumerate(four):
                grid.paste(picture, (k % 2 * width, k // 2 * height))
            save_atomically(grid.save, out / f"{name}.png")
    else:
        write_metadata(out, [(path, prompt) for path, prompt, _ in pictures])


def write_metadata(out, pairs):
    """metadata.jsonl: (file name, caption) of each picture, as Hugging Face's imagefolder has it."""
    text = "".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in pairs)
    save_atomically(lambda p: p.write_text(text, encoding="utf-8"), Path(out) / "metadata.jsonl")


def write_folder(out, pictures, captions):
    """00000.png, 00001.png, ... and metadata.jsonl."""
    names = [f"{i:05d}.png" for i in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        save_atomically(picture.save, Path(out) / name)
    write_metadata(out, zip(names, captions, strict=True))


def write_npz(out, pictures, path):
    """All pictures as ADM's evaluator reads them: arr_0, (N, H, W, 3) uint8."""
    first = np.asarray(Image.open(Path(out) / pictures[0][0]))
    arr = np.empty((len(pictures), *first.shape), dtype=np.uint8)
    for i, (name, _, _) in enumerate(tqdm(pictures, desc="packing", disable=None)):
        arr[i] = np.asarray(Image.open(Path(out) / name))

    def write(p):
        with open(p, "wb") as file:
            np.savez(file, arr_0=arr)

    save_atomically(write, path)
