#!/usr/bin/env bash
# FlowMatchEulerDiscreteScheduler(shift=3) and set_shift(3) give other times, and neither is the shifted even grid.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 torch==2.13.0 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PY'
import diffusers
import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

print(f"diffusers {diffusers.__version__}")
print("guess: shift=3 at the start and set_shift(3) afterwards are one schedule: 28 even steps from 1 to 0, shifted once,")
print("t' = 3 t / (1 + 2 t).")
even = np.linspace(1, 0, 29)
once = 3 * even / (1 + 2 * even)
built, set_later, given = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(), None
set_later.set_shift(3.0)
built.set_timesteps(28)
set_later.set_timesteps(28)
given = FlowMatchEulerDiscreteScheduler(shift=3.0)
given.set_timesteps(sigmas=even[:-1].tolist())
rows = {"shifted once": once, "shift=3": built.sigmas.numpy(), "set_shift(3)": set_later.sigmas.numpy(),
        "shift=3, even sigmas given": given.sigmas.numpy()}
for name, sigmas in rows.items():
    print(f"{name:28}" + " ".join(f"{s:.4f}" for s in sigmas[:3]) + " ... " + " ".join(f"{s:.4f}" for s in sigmas[-4:]))
print("where: diffusers/schedulers/scheduling_flow_match_euler_discrete.py: __init__ shifts the 1000 training times and")
print("keeps the first and last as sigma_max, sigma_min (1/1000 becomes 0.0030); set_timesteps spaces times evenly between")
print("these two and shifts again (0.0089). set_shift leaves sigma_min at 1/1000. So a 28-step picture takes its last step")
print("from 0.009, where a step from 0.1 was meant, and the steps before it are longer.")
assert np.abs(rows["shift=3, even sigmas given"] - once).max() < 1e-6, "given sigmas are shifted otherwise"
assert abs(rows["shift=3"][-2] - 0.0089) < 1e-3 and abs(rows["set_shift(3)"][-2] - 0.0030) < 1e-3, "it has changed"
assert abs(once[-2] - 0.1) < 1e-9
PY
