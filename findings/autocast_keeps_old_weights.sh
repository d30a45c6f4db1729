#!/usr/bin/env bash
# Inside one torch.autocast block a model never learns, not even when that block is disabled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PY'
import contextlib

import torch

print(f"torch {torch.__version__}")
print("guess: a training loop inside one `with torch.autocast(...)` learns as does one that enters it for each forward.")


def train(around):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 1), torch.randn(64, 8)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    with around:
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 4))
    return losses


anew = train(contextlib.nullcontext())
once = train(torch.autocast("cpu", torch.bfloat16))
disabled = train(torch.autocast("cpu", torch.bfloat16, enabled=False))
uncached = train(torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
print(f"losses, autocast around each forward:                {anew}")
print(f"losses, and another around the loop:                 {once}")
print(f"losses, and another, enabled=False, around the loop: {disabled}")
print(f"losses, and another, cache_enabled=False:            {uncached}")
print("where: aten/src/ATen/autocast_mode.cpp, cached_cast: the cast of a float32 leaf that requires a gradient is")
print("kept, whatever becomes of the weight. torch/amp/autocast_mode.py, autocast.__exit__, drops what is kept when")
print("the outermost block ends, and counts disabled ones. cache_enabled=False keeps nothing; inner blocks inherit it.")
assert anew[-1] < 0.3 * anew[0], "the loop does not learn at all"
assert len(set(once)) == len(set(disabled)) == 1, "it has changed: the loop in one block learns"
PY
