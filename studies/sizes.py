"""How large the UNet is: the ladder of Fig. 2 and 3 and Table 1, parameters and MACs beside the paper's figures.

    python -m studies.sizes              # the ladder, Table 1, the presets
    python -m studies.sizes --parts      # and each part of the UNet
    python -m studies.sizes --json       # the same as one JSON object

"FLOPs" in the paper are multiply-accumulates: it lists DiT-XL/2 with 119 G, which is that model's MAC count. We say MACs.
"""

import functools
import json

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.arguments import Parser
from model import LADDER, PRESETS, UNet, ladder

# From the paper: what each step does to parameters and MACs (Sec. 3.1), and Table 1 (ImageNet, 256 px).
PAPER_LADDER = {
    "a": "FID 3.76", "b": "MACs -17 %, latency -24 %, FID 3.12", "c1": "params -24 %, latency -62 %, FID 3.38",
    "c2": "against b: params -15 %, MACs -27 %, 2.4x faster", "d1": "params -12 %, MACs -12 %",
    "d2": "params -16 %, MACs -6 %, latency -9 %", "e": "smaller, faster, better FID", "f": "negligible cost, better FID",
}  # fmt: skip
TABLE_1 = (("LDM-4", 400, 104, 3.60), ("U-ViT-L", 287, 77, 3.40), ("U-ViT-H", 501, 133, 2.29), ("DiT-XL/2", 675, 119, 2.27),
           ("SiT-XL", 675, 119, 2.06), ("SnapGen", 372, 38, 2.06))  # fmt: skip
SIDES = {"imagenet": 32, "tiny": 8}  # of the latents whose MACs --parts counts


def one_forward(cfg, side, tokens):
    """(a UNet, the FlopCounterMode of its forward) at a (side, side) latent; no weight is allocated."""
    with torch.device("meta"):
        net = UNet(cfg)
        inputs = (torch.empty(1, cfg.latent_channels, side, side), torch.empty(1), torch.empty(1, tokens, cfg.text_dim))
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        net(*inputs)
    return net, counter


@functools.cache
def count(cfg, side, tokens=77):
    """(parameters, MACs of one forward) at a (side, side) latent and 77 text tokens; no weight is allocated."""
    net, counter = one_forward(cfg, side, tokens)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


def count_parts(cfg, side, tokens=77):
    """{"down.0": (parameters, MACs of one forward), ...} of a UNet at a (side, side) latent; no weight is allocated."""
    net, counter = one_forward(cfg, side, tokens)
    macs = {name.removeprefix("UNet."): sum(kinds.values()) // 2 for name, kinds in counter.get_flop_counts().items()}
    parts = {}
    for name, part in net.named_modules():
        if name.rstrip("0123456789") in ("conv_in", "time_mlp", "down.", "mid.", "up.", "conv_out"):
            inside = {n for n in macs if n == name or n.startswith(f"{name}.")}
            outermost = [n for n in inside if not any(n.startswith(f"{other}.") for other in inside)]
            parts[name] = (sum(p.numel() for p in part.parameters()), sum(macs[n] for n in outermost))
    return parts


def print_ladder(rows):
    print("The ladder of Fig. 2 and 3: text width 768, 77 tokens, time embedding 1024, mid depth 4 [A]. MACs of one forward.")
    print("step   params M  GMACs 32x32  GMACs 128x128   params    MACs   the paper says")
    by_step = {row["step"]: row for row in rows}
    for before, row in zip([None, *rows], rows, strict=False):
        before = by_step["b"] if row["step"] == "c2" else before  # the paper compares c as a whole with b
        change = [f"{100 * (row[k] / before[k] - 1):+.1f} %" for k in ("params", "macs_128")] if before else ["", ""]
        print(f"{row['step']:5}{row['params'] / 1e6:10.1f}{row['macs_32'] / 1e9:13.1f}{row['macs_128'] / 1e9:15.0f}"
              f"{change[0]:>9}{change[1]:>8}   {PAPER_LADDER[row['step']]}")  # fmt: skip


def print_table_1(presets):
    print("\nTable 1: ImageNet 256 px (32x32 latents). FID is the paper's; ours has not been trained.")
    print("model                     params M   GMACs    FID")
    for name, params, macs, fid in TABLE_1:
        print(f"{name:24}{params:10}{macs:8}{fid:7.2f}")
    for name, row in presets.items():
        print(f"{'ours, --size ' + name:24}{row['params'] / 1e6:10.1f}{row['macs_32'] / 1e9:8.1f}")
    print("t2i is the same UNet with text states 2304 wide; the paper's text-to-image model has 379 M.")


def print_parts(parts):
    for name, side in SIDES.items():
        print(f"\n--size {name} at a {side}x{side} latent, {PRESETS[name]}")
        for part, (params, macs) in parts[name].items():
            print(f"{part:12}{params / 1e6:10.3f} M{macs / 1e6:12.1f} MMACs")


def main(argv=None):
    p = Parser(__doc__, "python -m studies.sizes --parts")
    p.add_argument("--parts", action="store_true", help="also each part of the UNet")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    args = p.parse_args(argv)

    def measure(cfg):
        return {"params": count(cfg, 32)[0], "macs_32": count(cfg, 32)[1], "macs_128": count(cfg, 128)[1]}

    report = {"ladder": [{"step": step, **measure(ladder(step))} for step in LADDER],
              "presets": {name: measure(cfg) for name, cfg in PRESETS.items()}}  # fmt: skip
    if args.parts:
        report["parts"] = {name: count_parts(PRESETS[name], side) for name, side in SIDES.items()}
    if args.json:
        print(json.dumps(report))
        return
    print_ladder(report["ladder"])
    print_table_1(report["presets"])
    if args.parts:
        print_parts(report["parts"])


if __name__ == "__main__":
    main()
