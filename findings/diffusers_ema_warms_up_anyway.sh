#!/usr/bin/env bash
# diffusers' EMAModel(decay=0.9999, use_ema_warmup=False) warms up, for 90,000 steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 torch==2.13.0 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PY'
import inspect

import diffusers
import torch
from diffusers.training_utils import EMAModel

print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
print("guess: with use_ema_warmup=False, the default, each step keeps 0.9999 of the average.")
model = torch.nn.Linear(1, 1)
ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=False)
decays = {}
for step in range(1, 100_001):
    ema.optimization_step = step
    decays[step] = ema.get_decay(step)
for step in (2, 10, 100, 1_000, 10_000, 100_000):
    print(f"step {step:7}: decay {decays[step]:.5f}, an average over the last {1 / (1 - decays[step]):8.0f} steps")
first = next(step for step, decay in decays.items() if decay >= 0.9999)
warm = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
print(f"0.9999 is reached at step {first}")
print(f"use_ema_warmup=True is another warm-up: {warm.get_decay(1_000):.5f} at step 1000")
print("where: diffusers/training_utils.py, EMAModel.get_decay:")
print("\n".join(inspect.getsource(EMAModel.get_decay).split("\n")[8:22]))
assert decays[1_000] < 0.995 and 80_000 < first < 100_000, "it has changed: use_ema_warmup=False means no warm-up"
PY
