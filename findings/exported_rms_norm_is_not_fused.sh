#!/usr/bin/env bash
# torch.onnx.export writes torch's own rms_norm so that ONNX Runtime keeps seven operations; written by hand it becomes one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
venv/bin/python - 2> errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
import statistics
import time

import onnx
import onnxruntime
import torch
import torch.nn.functional as F

print(f"torch {torch.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}")
print("guess: F.rms_norm, which names what it computes, is exported at least as well as the same formula written out.")


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64))

    def forward(self, x):
        return F.rms_norm(x, (64,), self.weight, 1e-6)


class ByHand(Own):
    def forward(self, x):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def look(module):
    """(what is exported, what ONNX Runtime makes of it, its output, median microseconds)"""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    model = torch.onnx.export(module, (x,), dynamo=True, verbose=False).model_proto
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = "optimized.onnx"
    session, times = onnxruntime.InferenceSession(model.SerializeToString(), options), []
    inputs = {session.get_inputs()[0].name: x.numpy()}
    for _ in range(2000):
        start = time.perf_counter()
        (out,) = session.run(None, inputs)
        times.append(time.perf_counter() - start)
    names = [[node.op_type for node in some.graph.node] for some in (model, onnx.load("optimized.onnx"))]
    return *names, torch.from_numpy(out), 1e6 * statistics.median(times)


found = {}
for module in (Own(), ByHand()):
    exported, kept, found[type(module)], micros = look(module)
    name = "F.rms_norm" if type(module) is Own else "x / sqrt(mean(x^2) + eps) * weight"
    print(f"{name}:\n  exported {' '.join(exported)}\n  ONNX Runtime keeps {' '.join(kept)}: {micros:.1f} us for (64, 64)")
    assert len(kept) == (7 if type(module) is Own else 1), "it has changed"
assert torch.allclose(found[Own], found[ByHand], atol=1e-6)
print("where: torch decomposes rms_norm by rsqrt, which the exporter writes as Sqrt and Reciprocal, with a Mul behind them;")
print("onnxruntime/core/optimizer/layer_norm_fusion.cc, SimplifiedLayerNormFusion, looks for Sqrt and Div. From opset 23")
print("on (not the default) RMSNormalization is exported.")
PY
