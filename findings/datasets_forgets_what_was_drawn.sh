#!/usr/bin/env bash
# datasets stores a picture that was opened from a file as that file: what was drawn on it since is lost.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$folder"
venv/bin/python - <<'PY'
import inspect

import datasets
import PIL
from datasets import Dataset, Features
from datasets.features import image
from PIL import Image, ImageDraw

print(f"datasets {datasets.__version__}, Pillow {PIL.__version__}")
print("guess: map() with a function that paints a black bar over each picture gives pictures with a bar.")
datasets.disable_progress_bars()
Image.new("RGB", (32, 32), "white").save("a.png")
rows = Dataset.from_dict({"image": ["a.png"]}, features=Features({"image": datasets.Image()}))


def paint(row):
    ImageDraw.Draw(row["image"]).rectangle((0, 0, 31, 9), fill="black")
    return row


def paint_a_copy(row):
    return paint({"image": row["image"].copy()})


painted, copied = (rows.map(f)[0]["image"].getpixel((5, 5)) for f in (paint, paint_a_copy))
opened = Image.open("a.png")
paint({"image": opened})
given = Dataset.from_dict({"image": [opened]}, features=rows.features)[0]["image"].getpixel((5, 5))
print(f"a pixel of the bar, which should be (0, 0, 0): by map {painted}, by map on a copy {copied}")
print(f"opened, painted, given to Dataset.from_dict: {given}; the picture itself has {opened.getpixel((5, 5))}")
print("where: datasets/features/image.py, encode_pil_image: Image.open() leaves a filename, and that is stored:")
print(inspect.getsource(image.encode_pil_image))
assert copied == opened.getpixel((5, 5)) == (0, 0, 0), "nothing was painted"
assert painted == given == (255, 255, 255), "it has changed: what was painted is stored"
PY
