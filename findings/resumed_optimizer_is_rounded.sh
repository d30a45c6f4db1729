#!/usr/bin/env bash
# Optimizer.load_state_dict casts what an optimizer keeps to the weight's own precision: float32 master weights are lost.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PY'
import inspect

import torch

print(f"torch {torch.__version__}")
print("guess: load_state_dict(state_dict()) changes nothing, whatever an optimizer keeps in its state.")


class SGDWithMasterWeights(torch.optim.Optimizer):
    """bfloat16 weights, and a float32 copy of each in the state, on which the steps are taken."""

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                master = self.state[weight].setdefault("master", weight.detach().float())
                master -= group["lr"] * weight.grad.float()
                weight.data.copy_(master)


def train(steps, resume_at=None):
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = SGDWithMasterWeights([weight], lr=1e-3)
    for step in range(steps):
        if step == resume_at:
            before = optimizer.state[weight]["master"].clone()
            optimizer.load_state_dict(optimizer.state_dict())
            after = optimizer.state[weight]["master"]
            print(f"a master weight before: {before[0].item():.6f}, {before.dtype}")
            print(f"and after the resume:   {after[0].item():.6f}, {after.dtype}")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return optimizer.state[weight]["master"][0].item()


straight, resumed = train(11), train(11, resume_at=1)
print(f"after 11 steps of 0.001 from 1: never stopped {straight:.4f}, resumed after the first {resumed:.4f}")
print("where: torch/optim/optimizer.py, all but what is called \"step\":")
source = inspect.getsource(torch.optim.Optimizer._process_value_according_to_param_policy)
print("\n".join(source.rstrip().split("\n")[-5:]))
assert abs(straight - 0.989) < 1e-4 and abs(resumed - straight) > 5e-4, "it has changed: the state comes back as it was"
PY
