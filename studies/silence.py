"""Which parts of a trained UNet does it use? Each is silenced in turn, what it adds becomes 0, and L_task is measured.

    python -m studies.silence assets/zoo/fm                  # a line for each part, the most needed first
    python -m studies.silence runs/fm runs/distill --top 10

A part whose silence changes nothing is carried along for nothing, whatever its share of the parameters. What comes up from a stage
is all that the stages below say: silence it, and they are cut off.
"""

import torch
from torch import nn

from common.arguments import Parser, Path, add_device, integer
from common.checkpoint import load_student, save_json
from common.device import pick_device
from common.encoders import FrozenEncoders
from common.training import validate
from data import open_data
from model import Attention, FeedForward, ResBlock, Upsample


def parts(model):
    """{name in the model: (what it is, the module whose output is silenced)}; a ResBlock's shortcut goes on."""
    found = {}
    for name, module in model.named_modules():
        kind = {ResBlock: "ResBlock", FeedForward: "feed-forward", Upsample: "what comes up"}.get(type(module))
        if isinstance(module, Attention):
            kind = "self-attention" if name.endswith("attn1") else "cross-attention"
        if kind:
            found[name] = kind, module.conv2 if kind == "ResBlock" else module
    return found


@torch.no_grad()
def loss_without(model, module, val, shift, device):
    """L_task on validation pictures (fixed noise and times) while the module's output is 0. None: while all is as it was."""
    handle = (module or nn.Identity()).register_forward_hook(lambda _, inputs, out: torch.zeros_like(out))
    try:
        return validate(model, val, shift, device)
    finally:
        handle.remove()


def measure(folder, args, device):
    """{"val_loss", "parts": {name: {"kind", "parameters", "val_loss"}}} of a student."""
    model, config = load_student(folder, device)
    encoders = FrozenEncoders.of(config, device, args.teacher)
    _, val = open_data(args.data, encoders, encoders.factor * config["latent_size"][0], 64, model.cfg.text_dim)
    shift = config["sampling"]["shift"]
    found = {name: {"kind": kind, "parameters": sum(p.numel() for p in model.get_submodule(name).parameters()),
                    "val_loss": loss_without(model, module, val, shift, device)}
             for name, (kind, module) in parts(model).items()}  # fmt: skip
    return {"val_loss": loss_without(model, None, val, shift, device), "parts": found}


def main(argv=None):
    p = Parser(__doc__, "python -m studies.silence assets/zoo/fm")
    p.add_argument("students", metavar="DIR", nargs="+", help="folders of students")
    p.add_argument("--teacher", metavar="DIR", help="SD3 folder with the encoders; default: the student's own")
    p.add_argument("--data", metavar="DIR", help="as of train_fm.py, for students of the real sizes")
    p.add_argument("--top", type=integer(1), help="print so many parts only")
    p.add_argument("--out", metavar="FILE", type=Path, help="also write the numbers here, as JSON")
    add_device(p)
    args, report = p.parse_args(argv), {}
    for folder in args.students:
        found = report[str(folder)] = measure(folder, args, pick_device(args.device))
        print(f"{folder}: L_task {found['val_loss']:.4f} on 256 validation pictures; with a part silenced:")
        print(f"{'part':50}{'':18}{'parameters':>12}{'L_task':>9}{'change':>9}")
        for name, row in sorted(found["parts"].items(), key=lambda item: -item[1]["val_loss"])[: args.top]:
            change = 100 * (row["val_loss"] / found["val_loss"] - 1)
            print(f"{name:50}{row['kind']:18}{row['parameters']:12,}{row['val_loss']:9.4f}{change:+8.2f}%")
    if args.out:
        save_json(report, args.out)


if __name__ == "__main__":
    main()
