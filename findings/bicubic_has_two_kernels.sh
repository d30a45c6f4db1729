#!/usr/bin/env bash
# F.interpolate enlarges by another bicubic kernel when antialias=True, though nothing can alias.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 pillow==13.0.0
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image

print(f"torch {torch.__version__}, Pillow {PIL.__version__}")
print("guess: antialias=True widens the kernel when a picture gets smaller; one that gets larger stays the same.")
picture = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
large = {}
for mode in ("bilinear", "bicubic"):
    large[mode] = [F.interpolate(picture, scale_factor=4, mode=mode, antialias=a)[0, 0].numpy() for a in (False, True)]
    difference = np.abs(large[mode][0] - large[mode][1]).max()
    print(f"{mode}, 32 to 128 pixels, antialias off and on: at most {255 * difference:.3f} of 255 levels apart")
pillow = np.asarray(Image.fromarray(picture[0, 0].numpy()).resize((128, 128), Image.Resampling.BICUBIC))
off, on = (np.abs(pillow - x).max() for x in large["bicubic"])
print(f"Pillow's bicubic is {255 * on:.4f} levels from the one with antialias, {255 * off:.1f} from the one without")
print("where: aten/src/ATen/native/UpSample.h, get_cubic_upsample_coefficients: A = -0.75 (OpenCV's); with antialias")
print("aten/src/ATen/native/cpu/UpSampleKernel.cpp, HelperInterpCubic::aa_filter: a = -0.5 (Pillow's, Keys').")
assert np.abs(large["bilinear"][0] - large["bilinear"][1]).max() < 1e-3, "bilinear differs as well now"
assert off > 5 / 255 and on < 1e-3, "it has changed: one bicubic kernel"
PY
