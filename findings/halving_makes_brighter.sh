#!/usr/bin/env bash
# Pillow's resize(BOX) to a half rounds up twice: 0, 0, 0, 1 becomes 1, and six halvings add three levels of 255.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import PIL
from PIL import Image

print(f"Pillow {PIL.__version__}")
print("guess: resize(BOX) to a half is the mean of four pixels, rounded to the nearest: the same as reduce(2).")
corner = Image.fromarray(np.array([[0, 0], [0, 1]], dtype=np.uint8))
box, reduced = corner.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)), corner.reduce(2).getpixel((0, 0))
print(f"the mean of 0, 0, 0, 1: resize(BOX) {box}, reduce(2) {reduced}")
picture = Image.fromarray(np.random.default_rng(0).integers(100, 156, (512, 512), dtype=np.uint8))
ways = {
    "resize(BOX)": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.BOX),
    "resize(BICUBIC)": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.BICUBIC),
    "reduce(2)": lambda p: p.reduce(2),
}
means, now = {}, dict.fromkeys(ways, picture)
for halving in range(1, 7):
    now = {name: way(now[name]) for name, way in ways.items()}
    means[halving] = {name: np.asarray(p).mean() - np.asarray(picture).mean() for name, p in now.items()}
    rows = [f"{name} {mean:+.2f}" for name, mean in means[halving].items()]
    print(f"{halving} halvings, brighter by: {', '.join(rows)}")
different = (np.asarray(ways["resize(BOX)"](picture)) != np.asarray(ways["reduce(2)"](picture))).mean()
print(f"after one halving {100 * different:.0f} % of the pixels differ between resize(BOX) and reduce(2)")
print("where: src/libImaging/Resample.c resizes rows into 8 bits, where a half is rounded up, and then the columns of")
print("these; src/libImaging/Reduce.c adds all four first. Half of the sums of two are odd: +1/4 from each pass.")
assert (box, reduced) == (1, 0) and 0.3 < different < 0.45, "it has changed: one rounding"
assert means[1]["resize(BOX)"] > 0.4 and means[6]["resize(BOX)"] > 2.5 and means[1]["reduce(2)"] < 0.2, "it has changed"
PY
