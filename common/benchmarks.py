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

from common import parallel
from common.checkpoint import save_atomically, save_json
from common.encoders import hash_folders
from common.texts import class_names, lines_of

GRID = 4  # pictures a prompt in DPG-Bench


def read_prompts(path):
    """The lines of a text file that are not empty; a byte order mark is no part of them. Only "\\n" and "\\r\\n" end a line:
    a prompt may hold what str.splitlines() cuts at as well, such as U+2028."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read prompts from {path}: {error}") from error
    prompts = [line.strip() for line in lines_of(text) if line.strip()]
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
            prompts = [json.loads(line)["prompt"] for line in lines]
            for prompt in prompts:
                prompt.encode()  # JSON can hold half a surrogate pair, "\\ud83d", which no tokenizer takes
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"{path} is no evaluation_metadata.jsonl: each line needs a prompt ({error!r})."
            raise SystemExit(problem) from error
        return "geneval", prompts, lines
    if all(re.match(r"n\d{8}\s+\S", line) for line in lines):  # ImageNet: the captions that training saw
        return "folder", [f"a photo of {name}" for name in class_names(lines).values()], None
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


def draw_files(draw, what, n, seed, batch, settings, out, npz=None):
    """Draw every prompt of `what` into the folder `out`, in the layout that plan() finds. What is there stays.

    Args: draw, a function (prompts, seeds) -> pictures; batch, how many are drawn before they are saved;
    settings, what else the pictures depend on: a folder with other settings is refused; npz, a file or None.
    """
    layout, pictures, names = plan(what, n, seed)
    settings = {**settings, "captions": hash_folders([Path(what).absolute()])}
    with parallel.first_alone():
        path = out / "settings.json"
        if path.is_file() and (old := json.loads(path.read_text(encoding="utf-8-sig"))) != settings:
            changed = [f"{k} was {old.get(k)}, is {v}" for k, v in settings.items() if old.get(k) != v]
            told = "; ".join(changed)
            raise SystemExit(f"{out} holds other pictures: {told}. Give another --out, or delete it.")
        if parallel.rank() == 0:
            save_json(settings, path)
    mine = pictures[parallel.rank() :: parallel.world()]
    todo = [(out / path, prompt, seed) for path, prompt, seed in mine if not (out / path).is_file()]
    quiet = None if parallel.rank() == 0 else True
    bar = tqdm(total=len(todo), desc="drawing", unit=" pictures", disable=quiet)
    for start in range(0, len(todo), batch):
        paths, prompts, seeds = zip(*todo[start : start + batch], strict=True)
        for path, picture in zip(paths, draw(prompts, seeds), strict=True):
            save_atomically(picture.save, path)
        bar.update(len(paths))
    bar.close()
    parallel.wait()
    if parallel.rank() == 0:
        finish(out, layout, pictures, names)
        if npz:
            write_npz(out, pictures, npz)
        print(f"wrote {len(pictures)} pictures to {out}" + (f", and {npz}" if npz else ""))


def finish(out, layout, pictures, names):
    """What belongs beside the pictures: GenEval's metadata, DPG-Bench's grids, metadata.jsonl of a plain folder."""
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
    """All pictures as ADM's evaluator reads them: arr_0, (N, H, W, 3) uint8, in a fixed random order: its
    Inception Score is the mean over blocks of 5,000 pictures, and far too low in a block of 100 classes."""
    first = np.asarray(Image.open(out / pictures[0][0]))
    arr = np.empty((len(pictures), *first.shape), dtype=np.uint8)
    order = np.random.default_rng(0).permutation(len(pictures))
    for i, k in enumerate(tqdm(order, desc="packing", disable=None)):
        arr[i] = np.asarray(Image.open(out / pictures[k][0]))

    def write(p):
        with open(p, "wb") as file:
            np.savez(file, arr_0=arr)

    save_atomically(write, path)
