#!/usr/bin/env bash
# scikit-image's PSNR of float pictures in [-1, 1] loses 6 dB when the picture has no pixel below 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scikit-image==0.26.0 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PY'
import inspect

import numpy as np
import skimage
from skimage.metrics import peak_signal_noise_ratio, simple_metrics

print(f"scikit-image {skimage.__version__}")
print("guess: for float pictures the range is that of the type, -1 to 1 (as the docstring says: from the data-type), so")
print("the same error gives the same PSNR.")
picture = np.random.default_rng(0).uniform(0, 1, (64, 64)).astype(np.float32)  # a bright one, of pictures in [-1, 1]
dark = picture.copy()
dark[0, 0] = -0.001  # one pixel of 4096
values = [peak_signal_noise_ratio(p, p + np.float32(0.01)) for p in (picture, dark)]
print(f"every pixel is 0.01 off: {values[0]:.2f} dB; with one pixel at -0.001: {values[1]:.2f} dB")
set_of = np.stack([picture, dark])
together = peak_signal_noise_ratio(set_of, set_of + np.float32(0.01))
print(f"both as one batch: {together:.2f} dB; the mean of the two: {np.mean(values):.2f} dB")
print("where: skimage/metrics/simple_metrics.py, peak_signal_noise_ratio:")
source = inspect.getsource(simple_metrics.peak_signal_noise_ratio)
print(source[source.index("        if true_min >= 0:") : source.index("    image_true, image_test = _as_floats")])
assert abs(values[1] - values[0] - 20 * np.log10(2)) < 0.05, "it has changed: pixels no longer choose the range"
PY
