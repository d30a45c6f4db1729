"""A package on the disk: what it depends on, written beside its place and renamed, its size, several latent sizes in one."""

import contextlib
import errno
import os
import shutil

from common.encoders import hash_folders
from coreml.mil_interpreter import ct


def function_name(size, sizes):
    """Of a package's function for a latent of this side: a package for one size has only one."""
    return "main" if len(sizes) == 1 or not size else f"latent{size}"


def settings_of(name, args, encoders):
    """What an exported part depends on: its weights, by their hash, and the flags."""
    texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    folder = {"unet": args.model, "decoder": args.decoder}.get(name)
    weights = args.random or (hash_folders([folder]) if folder else encoders.fingerprint(*texts))
    if name == "text_encoder" and args.gemma:
        weights += f"-{encoders.gemma.fingerprint()}"
    return {"weights": weights, **{flag: getattr(args, flag) for flag in ("latent", "nbits", "layout", "target", "gemma")}}


def check_company(name, recorded, settings, args):
    """pipeline.json speaks for all parts in the folder: they must have been exported for the same sizes, bits and student."""
    for other, part in recorded.items():
        if other != name and any(part["settings"].get(flag) != settings[flag] for flag in ("latent", "gemma", "nbits")):
            raise SystemExit(f"{args.out} holds a {other} for another --latent, --gemma or --nbits: give the same, another "
                             "--out, or all parts and --force.")  # fmt: skip
    theirs = recorded.get("unet", {}).get("settings", {}).get("weights")
    if name != "unet" and not args.random and theirs not in (None, hash_folders([args.model])):
        raise SystemExit(f"{args.out} holds the UNet of another student than {args.model}: give its --model, or another --out.")


def save_package(package, path):
    """Write a package beside its place and rename it, so that a kill or a full disk leaves the last good one."""
    beside, old = (path.with_name(f".{os.getpid()}{what}.{path.name}") for what in ("", ".old"))
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            (package.save if hasattr(package, "save") else package)(str(beside))
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(beside, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def clear_errors(path):
    """A full disk or a place that cannot be written to, in one sentence. shutil and coremltools hide the number in the text."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "Errno 28" in str(error):
            raise SystemExit(f"the disk is full: could not write {path}. What was exported before is intact.") from error
        if isinstance(error, OSError):
            raise SystemExit(f"cannot write {path}: {error}.") from error
        raise


def size_of(path):
    """Bytes of a package."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def join(halves, sizes, path):
    """One package with a function for each latent size, which share their weights, and the description that each had."""
    descriptor = ct.utils.MultiFunctionDescriptor()
    for size, half in halves.items():
        descriptor.add_function(str(half), src_function_name="main", target_function_name=function_name(size, sizes))
    descriptor.default_function_name = function_name(sizes[0], sizes)
    raw = path.with_name(f"raw-{path.name}")
    ct.utils.save_multifunction(descriptor, str(raw))
    joined, first = (ct.models.MLModel(str(p), skip_model_load=True) for p in (raw, halves[sizes[0]]))
    spec = joined.get_spec()  # coremltools leaves licence, version and author behind
    spec.description.metadata.CopyFrom(first.get_spec().description.metadata)
    ct.models.utils.save_spec(spec, str(path), weights_dir=joined.weights_dir)
