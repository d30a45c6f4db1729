"""What a run folder holds, and how its files are written and read.

    runs/NAME/
        model.safetensors     EMA weights of the student, all that sampling needs beside config.json
        config.json           the UNet's shape, the encoders' folder, how it was trained and how it likes to be sampled
        train_state/          weights, EMA and optimizer at the last saved step; `--resume` goes on from there
        log.csv  loss.png     what was measured on the way
        samples/              the same prompts and noise, drawn again and again

Weights are safetensors, the rest is JSON: nothing here can run code when it is loaded. Every file is written beside its
place and renamed, so a kill or a full disk leaves the last good one.

    python -m common.checkpoint runs/fm assets/zoo/fm     # a copy in half precision: half the megabytes
"""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from common import parallel
from common.arguments import Parser
from model import UNet, UNetConfig


def save_atomically(save, path):
    """Call `save(temporary_path)`, then rename to `path`. A full disk ends in one sentence, with the old file intact."""
    path = Path(path)
    # The name keeps its ending, by which savers choose the format.
    beside = path.with_name(f".{parallel.rank()}.{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(beside)
        beside.chmod(0o644)  # safetensors makes files that only their owner may read
        os.replace(beside, path)
    except Exception as error:
        # safetensors reports a full disk as an error of its own, with the system's words in it
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "os error 28" in str(error):
            raise SystemExit(f"the disk is full: could not write {path}. What was saved before is intact.") from error
        if isinstance(error, OSError | safetensors.SafetensorError):
            raise SystemExit(f"cannot write {path}: {getattr(error, 'strerror', None) or error}.") from error
        raise
    finally:
        beside.unlink(missing_ok=True)


def save_json(value, path):
    save_atomically(lambda p: p.write_text(json.dumps(value, indent=2) + "\n"), path)


def save_network(folder, model, config, kind="unet"):
    """Write model.safetensors and config.json. `config` is a dict; the network's shape, model.cfg, is added as `kind`."""
    weights = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
    save_atomically(lambda p: safetensors.torch.save_file(weights, p), Path(folder) / "model.safetensors")
    save_json({**config, kind: asdict(model.cfg)}, Path(folder) / "config.json")


def latest(stage):
    """Where a later stage begins without --init: your own runs/STAGE, or else the zoo's, and a line that says so."""
    own, zoo = Path("runs") / stage, Path("assets/zoo") / stage
    if (own / "model.safetensors").is_file():
        return str(own)
    if parallel.rank() == 0:
        print(f"there is no {own} yet: taking {zoo}, which was trained before")
    return str(zoo)


def load_student(folder, device="cpu"):
    """A student folder -> (UNet in eval mode, float32; its config). Raises SystemExit with one sentence if it cannot."""

    def build(config):
        for name in ("encoders", "latent_size", "scaling_factor", "shift_factor"):  # what sampling needs must be there
            config[name]
        config["sampling"]["steps"]
        return UNet(UNetConfig(**config["unet"]))

    return load_network(
        folder,
        build,
        "student",
        "Train one with train_fm.py (stage 1), distill.py (2) or step_distill.py (3), or use one of assets/zoo",
        device,
    )


def load_network(folder, build, what, advice, device="cpu"):
    """A folder with config.json and model.safetensors -> (network in eval mode, its config).

    build(config) makes the network; `what` and `advice` fill the one sentence of the SystemExit that a bad folder raises.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise SystemExit(f"{folder} is not a {what}: it has no {name}. {advice}.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        model = build(config)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except (
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        safetensors.SafetensorError,
    ) as error:
        raise SystemExit(f"{folder} cannot be read as a {what} ({error!r}); copy or train it again.") from error
    load_weights(model, weights, folder)
    return model.to(device).eval(), config


def check_encoders(config, encoders):
    """Students and decoders live in the latent space they were trained in. Raises SystemExit when the encoders' is another."""
    theirs = (encoders.scaling_factor, encoders.shift_factor)
    if (config["scaling_factor"], config["shift_factor"]) != theirs:
        raise SystemExit(
            f"this model was trained with latents scaled by {config['scaling_factor']} and shifted by "
            f"{config['shift_factor']}; the autoencoder in {encoders.folder} has {theirs}. Give its own --teacher."
        )


def load_weights(model, weights, source):
    """model.load_state_dict that says what is wrong in one sentence: another size, another ladder step, a strange file."""
    own = model.state_dict()
    missing, extra = own.keys() - weights.keys(), weights.keys() - own.keys()
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or extra or shapes:
        what = (
            f"{sorted(shapes)[0]} is {tuple(weights[sorted(shapes)[0]].shape)}, not {tuple(own[sorted(shapes)[0]].shape)}"
            if shapes
            else f"{len(missing)} weights are missing and {len(extra)} unknown"
        )
        raise SystemExit(f"{source} holds a model of another size: {what}. Give the --size it was trained with.")
    model.load_state_dict({name: w.to(own[name].dtype) for name, w in weights.items()})


def save_state(folder, step, settings, optimizers, **models):
    """Everything that training needs to go on as if it had never stopped, in one file: train_state/state.safetensors.

    `optimizers` is a list; every network is given by name.
    """
    tensors = {f"{key}.{n}": w.detach().contiguous() for key, m in models.items() for n, w in m.state_dict().items()}
    for k, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{k}.{index}.{name}": value.contiguous() for name, value in values.items()})
    metadata = {"step": str(step), "settings": json.dumps(settings)}
    path = Path(folder) / "train_state" / "state.safetensors"
    save_atomically(lambda p: safetensors.torch.save_file(tensors, p, metadata), path)


def read_config(folder):
    """config.json of a run; {} if there is none yet. Raises SystemExit when it is damaged."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{path} is damaged ({error}); delete the run and start again.") from error


def state_settings(folder):
    """The settings that a run was started with, {} if the folder holds none. Raises SystemExit when its state is damaged."""
    path = Path(folder) / "train_state" / "state.safetensors"
    if not path.is_file():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads(file.metadata()["settings"])
    except (LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise SystemExit(f"{path} is damaged ({error!r}); delete the run and start again.") from error


HASHES = {"teacher": "teacher", "vae": "vae", "turbo_weights": "turbo", "contents": "data"}  # setting: flag of what is hashed


def changes(old, new):
    """What differs between the settings of a run and those it is to go on with, in words; [] if nothing does."""
    words = []
    for name, value in new.items():
        if name == "contents" and old.get("pictures") != new.get("pictures"):
            continue  # more or fewer pictures of the class world are said by their number
        if old.get(name) != value and name in HASHES:
            words.append(f"what --{HASHES[name]} holds is not what the run began with")
        elif old.get(name) != value:
            words.append(f"--{name} was {old.get(name)}, is {value}")
    return words


def load_state(folder, settings, optimizers, **models):
    """The inverse of save_state: returns the step to go on with, 0 if the folder holds no run yet.

    Raises SystemExit when the run was made with other settings (another size, batch, seed, ...), since going on would
    not be the same run.
    """
    path = Path(folder) / "train_state" / "state.safetensors"
    if not path.is_file():
        return parallel.agree(0)
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        old, step = json.loads(metadata["settings"]), int(metadata["step"])
    except (LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise SystemExit(f"{path} is damaged ({error!r}); delete the run and start again.") from error
    if changed := changes(old, settings):
        raise SystemExit(f"cannot resume {folder} with other settings: {'; '.join(changed)}. Give what it began with, or another "
                         "--out for a new run.")  # fmt: skip
    for key, model in models.items():
        load_weights(model, {n.removeprefix(f"{key}."): w for n, w in tensors.items() if n.startswith(f"{key}.")}, path)
    for k, optimizer in enumerate(optimizers):
        state = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{k}."):
                index, field = name.split(".")[2:]
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for weight, values in optimizer.state.items():  # in the weight's own memory format: fused AdamW takes it for granted
            values.update({n: torch.empty_like(weight).copy_(v) for n, v in values.items() if v.shape == weight.shape})
    return parallel.agree(step)


def main(argv=None):
    doc = "Copy a student's or decoder's folder in half precision: half the megabytes."
    parser = Parser(doc, "python -m common.checkpoint runs/fm assets/zoo/fm")
    parser.add_argument("source", type=Path, help="a run's folder")
    parser.add_argument("target", type=Path, help="where the copy goes: model.safetensors and config.json")
    args = parser.parse_args(argv)
    try:
        config = json.loads((args.source / "config.json").read_text(encoding="utf-8-sig"))
        weights = safetensors.torch.load_file(args.source / "model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise SystemExit(f"{args.source} holds no trained network: {error}") from error
    weights = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
    save_atomically(lambda p: safetensors.torch.save_file(weights, p), args.target / "model.safetensors")
    save_json(config, args.target / "config.json")
    print(f"{args.target}: {(args.target / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
