"""Stage 4: Core ML packages for a phone, each checked op by op before it is called done.

    text_encoder.mlpackage    both CLIPs: tokens -> text states, mask
    unet.mlpackage            the student: latent, t, text, mask -> velocity
    decoder.mlpackage         the tiny decoder: latent -> picture, 0 to 255
    pipeline.json             steps, times, guidance, sizes, tokenizers: all else that an app needs
    verification.json         how far each package is from PyTorch

    python export_coreml.py                                               # assets/zoo/step_distill, zoo/decoder -> build/
    python export_coreml.py --nbits 6 --out build6 --score 10             # 6-bit palettes; mini-GenEval through the packages
    python export_coreml.py --model assets/zoo/distill --batch 2    # guidance: caption and empty caption in one batch
    python export_coreml.py --random t2i --parts unet decoder --latent 128     # the paper's sizes, random weights

How one part is made: torch.export captures the module of coreml/layers.py at fixed sizes -> coremltools converts it to a float16
program -> it is saved, read back from disk and interpreted (coreml/mil_interpreter.py) beside PyTorch. Two questions, two bars:
is it the right program (converted in float32: at most 1e-4 off) and does it survive float16 (at least 50 dB)? On a Mac the same
inputs also go through Core ML itself.
"""

import argparse
import contextlib
import errno
import functools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import flow
from common.checkpoint import HelpFormatter, check_encoders, describe_machine, load_student, save_atomically, save_json
from common.encoders import GEMMA_TOKENS, FrozenAutoencoder, FrozenEncoders, hash_folders
from common.figures import captioned_grid
from common.pictures import to_pictures
from common.seeds import rng
from coreml import mil_interpreter as mil
from coreml.layers import PhoneDecoder, PhoneText, PhoneUNet
from coreml.mil_interpreter import ct  # coremltools, with its warnings about this machine silenced
from decoder import PRESETS as DECODERS
from decoder import TinyDecoder, load_decoder
from evaluate import prompts_of, score
from model import PRESETS, UNet

PARTS = ("text_encoder", "unet", "decoder")
FLOAT32_BAR, FLOAT16_BAR = 1e-4, 50.0  # largest error of the program in float32; decibels of the one in float16
EXAMPLE = "a photo of a red circle left of a blue star"


@dataclass
class Part:
    """One network to export: a module, an example of every input, and what each input and output is."""

    module: torch.nn.Module
    reference: object  # the network as the other stages run it, called with the same inputs
    inputs: dict  # name -> example tensor, whose shape is the only one the package will take
    outputs: tuple  # names
    descriptions: dict  # of inputs and outputs
    summary: str
    unit: float = 1.0  # size of the outputs' numbers: errors are counted in it
    float32: tuple = ()  # inputs and outputs kept in float32

    def expected(self):
        """What the original network says to the example: {name: tensor}."""
        with torch.no_grad():
            out = self.reference(*self.inputs.values())
        return dict(zip(self.outputs, out if isinstance(out, tuple) else (out,), strict=True))


# ------------------------------------------------------------------------------------------------------------------
# The parts


def tokens_of(encoders, captions):
    """(tokens, tokens_2), each (B, T) int32, as the phone's tokenizer has to make them."""
    how = dict(padding="max_length", max_length=encoders.max_tokens, truncation=True, return_tensors="pt")
    return [tokenizer(captions, **how).input_ids.int() for tokenizer in encoders.tokenizers]


def text_part(encoders, width):
    tokens, tokens_2 = tokens_of(encoders, [EXAMPLE])
    clips, end = encoders.text_encoders, encoders.tokenizers[0].eos_token_id

    def reference(*tokens):
        text, mask = encoders.student_text([EXAMPLE], width)
        return text, mask.float()

    return Part(
        PhoneText(clips, width, end).eval(), reference, {"tokens": tokens, "tokens_2": tokens_2}, ("text", "mask"),
        {"tokens": f"token ids of the first tokenizer, (1, {tokens.shape[1]}), padded",
         "tokens_2": "token ids of the second tokenizer, the same shape",
         "text": f"text states, (1, {tokens.shape[1]}, {width}); an input of the UNet",
         "mask": "1 up to the end of the text, 0 for padding; an input of the UNet"},
        "SnapGen: both CLIP text models up to their last layer but one",
    )  # fmt: skip


def unet_part(unet, latent, text, mask, batch, layout):
    g, channels = rng(0, latent), unet.cfg.latent_channels
    text, mask = text.expand(batch, -1, -1).contiguous(), mask.float().expand(batch, -1).contiguous()
    inputs = {"latent": torch.randn(batch, channels, latent, latent, generator=g), "t": torch.full((batch,), 0.9),
              "text": text, "mask": mask}  # fmt: skip
    shape = f"({batch}, {channels}, {latent}, {latent})"
    return Part(
        PhoneUNet(unet, layout).eval(), lambda latent, t, text, mask: unet(latent, t, text, mask.bool()), inputs, ("velocity",),
        {"latent": f"x_t, {shape}: noise at t = 1, the picture's latent at t = 0", "t": "time, 1 to 0",
         "text": "text states of the text encoder" + (", the caption's and the empty caption's" if batch == 2 else ""),
         "mask": "mask of the text encoder", "velocity": f"v, {shape}: x_s = x_t + (s - t) v"},
        f"SnapGen: the UNet, {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters, layout {layout}",
        float32=("latent", "t", "velocity"),  # so that the sum of the Euler steps is kept in float32
    )  # fmt: skip


def decoder_part(decoder, latent):
    channels = decoder.cfg.latent_channels
    return Part(
        PhoneDecoder(decoder).eval(), lambda latent: (decoder.decode_latents(latent) + 1) * 127.5,
        {"latent": torch.randn(1, channels, latent, latent, generator=rng(0, latent))}, ("picture",),
        {"latent": f"x_0, (1, {channels}, {latent}, {latent}), as the UNet leaves it",
         "picture": f"red, green and blue from 0 to 255, (1, 3, {8 * latent}, {8 * latent})"},
        f"SnapGen: the tiny decoder, {sum(p.numel() for p in decoder.parameters()) / 1e6:.2f} M parameters",
        unit=127.5, float32=("latent",),
    )  # fmt: skip


def make_parts(args):
    """({part: {latent size: Part}}, what pipeline.json says): the text encoder has no latent and is under 0."""
    torch.manual_seed(0)
    encoders = None
    if args.random:
        sizes, guidance = args.latent or [128 if args.random != "tiny" else 8], 1.0
        unet = UNet(PRESETS[args.random]).eval()
        decoder = TinyDecoder(DECODERS["tiny" if args.random == "tiny" else "sd3"]).eval()
        text, mask = torch.randn(1, 77, unet.cfg.text_dim, generator=rng(0)), torch.ones(1, 77)
        pipeline = {"weights": "random"}
        if "text_encoder" in args.parts:
            raise SystemExit("--random has no text encoder: give --parts unet decoder.")
    else:
        unet, config = load_student(args.model)
        folder = Path(args.teacher or config["encoders"])
        if config.get("gemma") and "text_encoder" in args.parts:
            raise SystemExit(f"{args.model} reads its captions with Gemma too, and only CLIP text models are exported: run a "
                             "language model elsewhere, and give --parts unet decoder.")  # fmt: skip
        speaks_clip = is_clip(folder, "text_encoder" in args.parts)
        encoders = FrozenEncoders(folder) if speaks_clip else FrozenAutoencoder(folder)
        check_encoders(config, encoders)
        decoder, decoder_config = load_decoder(args.decoder)
        check_encoders(decoder_config, encoders)
        sizes, habits = args.latent or [config["latent_size"][0]], config["sampling"]
        guidance = habits["guidance"]
        if speaks_clip and "text_encoder" in args.parts and unet.cfg.text_dim < encoders.text_dim:
            raise SystemExit(
                f"{args.model} reads the first CLIP alone, and the text package has both: give --parts unet decoder."
            )
        if speaks_clip:
            text, mask = encoders.student_text([EXAMPLE], unet.cfg.text_dim)
        else:  # states of the right size will do to check a program with
            text, mask = torch.randn(1, 77, unet.cfg.text_dim, generator=rng(0)), torch.ones(1, 77)
        if config.get("gemma"):  # its tokens stand behind CLIP's
            text, mask = (torch.cat([x, x[:, -1:].expand(-1, GEMMA_TOKENS, *x.shape[2:])], 1) for x in (text, mask))
        times = habits.get("times") or flow.sampling_timesteps(habits["steps"], habits["shift"]).tolist()
        pipeline = {
            "model": str(args.model), "steps": habits["steps"], "times": times, "shift": habits["shift"], "guidance": guidance,
            "scaling_factor": encoders.scaling_factor, "shift_factor": encoders.shift_factor,
            "latents": "already scaled and shifted: the decoder takes what the UNet leaves",
            "tokenizers": ["tokenizer", "tokenizer_2"] if speaks_clip else [], "tokens": mask.shape[1],
        }  # fmt: skip
    batch = args.batch or (1 if guidance == 1 else 2)
    if guidance != 1 and batch == 1:
        raise SystemExit(
            f"{args.model} draws with guidance {guidance}, which takes the caption and the empty caption in one batch: "
            "give --batch 2, or a student of stage 3 such as assets/zoo/step_distill."
        )
    if guidance == 1 and batch == 2:
        raise SystemExit(
            f"{args.model or args.random} draws without guidance, one forward a step: leave --batch 2 out."
        )
    if len(sizes) > 1 and args.target == "iOS17":
        raise SystemExit(
            "one package for several latent sizes needs iOS 18: leave --target iOS17 out, or export one size."
        )
    step = 2 ** (len(unet.cfg.channels) - 1)
    if any(size < step or size % step for size in sizes):
        raise SystemExit(f"--latent must be multiples of {step}, not {sizes}.")
    parts = {}
    if "text_encoder" in args.parts:
        parts["text_encoder"] = {0: text_part(encoders, unet.cfg.text_dim)}
    if "unet" in args.parts:
        parts["unet"] = {size: unet_part(unet, size, text, mask, batch, args.layout) for size in sizes}
    if "decoder" in args.parts:
        parts["decoder"] = {size: decoder_part(decoder, size) for size in sizes}
    functions = {"functions": {size: function_name(size, sizes) for size in sizes}}
    pipeline |= functions | {
        "batch": batch,
        "nbits": args.nbits,
        "latent_channels": unet.cfg.latent_channels,
        "latent_sizes": sizes,
    }
    return parts, pipeline, encoders


def function_name(size, sizes):
    """Of a package's function for a latent of this side: a package for one size has only one."""
    return "main" if len(sizes) == 1 or not size else f"latent{size}"


def is_clip(folder, wanted):
    """True if both text encoders of the folder are CLIPs; False, or an error if the text encoder is `wanted`, if not."""
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        if path.is_file() and (kind := json.loads(path.read_text()).get("model_type")) != "clip_text_model":
            if wanted:  # billions of weights do not belong on a phone, and the layers are not CLIP's
                raise SystemExit(
                    f"{folder / name} is a {kind}, and only CLIP text models are exported: run a language model elsewhere, and "
                    "give its states to the UNet (--parts unet decoder)."
                )
            return False
    return True


# ------------------------------------------------------------------------------------------------------------------
# Conversion


def feeds_sine(op):
    """True for the time embedding's operations from t to sin and cos: 1000 t radians need float32."""
    if op.op_type in ("sin", "cos"):
        return True
    passes_on = op.op_type in ("const", "expand_dims", "mul", "reshape", "cast")
    return passes_on and any(feeds_sine(child) for var in op.outputs for child in var.child_ops)


def capture(part):
    """The module as an exported program: plain operations on tensors of fixed shapes."""
    with torch.no_grad():
        return torch.export.export(part.module, tuple(part.inputs.values())).run_decompositions({})


def convert(part, precision, args, about):
    """A Core ML model (not saved) of a Part, with every input and output named, typed and described."""
    half = precision == "float16"

    def kind(name, tensor=None):
        if tensor is not None and not tensor.is_floating_point():
            return np.int32
        return np.float16 if half and name not in part.float32 else np.float32

    package = ct.convert(
        capture(part),
        minimum_deployment_target=getattr(ct.target, args.target),
        compute_precision=ct.transform.FP16ComputePrecision(lambda op: not feeds_sine(op)) if half else ct.precision.FLOAT32,
        inputs=[ct.TensorType(name, tuple(x.shape), dtype=kind(name, x)) for name, x in part.inputs.items()],
        outputs=[ct.TensorType(name, dtype=kind(name)) for name in part.outputs],
        skip_model_load=True,
    )  # fmt: skip
    package.short_description, package.license, package.version = part.summary, "MIT", about["commit"]
    package.author = "made by export_coreml.py"
    package.user_defined_metadata.update({name: str(value) for name, value in about.items()})
    for name in part.inputs:
        package.input_description[name] = part.descriptions[name]
    for name in part.outputs:
        package.output_description[name] = part.descriptions[name]
    return package


def compress(package, nbits):
    """Weights in fewer bits: 8 as integers with a scale for each channel, 6 and 4 as palettes found by k-means."""
    optimize = ct.optimize.coreml
    if nbits == 8:
        how, compress_weights = (
            optimize.OpLinearQuantizerConfig(mode="linear_symmetric"),
            optimize.linear_quantize_weights,
        )
    else:
        how = optimize.OpPalettizerConfig(mode="kmeans", nbits=nbits, num_kmeans_workers=1)
        compress_weights = optimize.palettize_weights
    how.weight_threshold = 512
    # Matrices and kernels by their own names: not the tables of RoPE, and not gains and offsets. By the kind of operation it
    # fails where one vector of zeros is the offset of a linear layer and of a norm.
    kinds, found = {"conv", "linear", "matmul", "gather"}, optimize.get_weights_metadata(package, weight_threshold=512)
    names = [name for name, weight in found.items()
             if weight.val.ndim > 1 and {op.op_type for op in weight.child_ops} <= kinds]  # fmt: skip
    return compress_weights(package, optimize.OptimizationConfig(op_name_configs=dict.fromkeys(names, how)))


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
        if (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or "No space left" in str(error)
            or "Errno 28" in str(error)
        ):
            raise SystemExit(
                f"the disk is full: could not write {path}. What was exported before is intact."
            ) from error
        if isinstance(error, OSError):
            raise SystemExit(f"cannot write {path}: {error}.") from error
        raise


def size_of(path):
    return sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())


# ------------------------------------------------------------------------------------------------------------------
# Verification


def decibels(expected, found):
    """Signal to error, 10 log10(mean expected^2 / mean error^2): infinity without error, minus infinity for NaN or overflow."""
    error = (expected - found).double().square().mean()
    if error == 0:
        return math.inf
    return (10 * torch.log10(expected.double().square().mean() / error)).item() if torch.isfinite(error) else -math.inf


def compare(part, program, precision, function="main"):
    """(largest error in units of the part, smallest decibels) over all outputs of the interpreted program. NaN stays NaN."""
    found, expected = mil.run(program, part.inputs, precision, function), part.expected()
    errors = torch.stack([(expected[name] - found[name]).abs().max() / part.unit for name in part.outputs])
    return errors.max().item(), min(decibels(expected[name], found[name]) for name in part.outputs)


def bisect(part, program, precision, bar, function="main"):
    """The first operation whose value is worse than `bar` decibels, and the one before it, as text.

    In float16, each value beside that of the same program in float32. In float32, beside PyTorch: coremltools names an operation
    after the node of the exported program that it came from; where both have the name, their values are compared.
    """
    steps, seen = mil.step_by_step(program, part.inputs, precision, function), []
    if precision == "exact":
        values = part.expected()

        class Recorder(torch.fx.Interpreter):
            def run_node(self, node):
                values[node.name] = result = super().run_node(node)
                return result

        with torch.no_grad():
            Recorder(capture(part).module()).run(*part.inputs.values())
        pairs = ((op, values.get(name), found) for op, name, found in steps)
    else:
        exact = mil.step_by_step(program, part.inputs, "exact", function)
        pairs = ((op, reference, found) for (op, _, found), (_, _, reference) in zip(steps, exact, strict=True))
    for op, reference, found in pairs:
        if isinstance(reference, torch.Tensor) and reference.shape == found.shape and reference.is_floating_point():
            seen.append((decibels(reference, found), mil.describe(op)))
            if seen[-1][0] < bar:
                before = f"the last good one, {seen[-2][0]:.1f} dB: {seen[-2][1]}\n    " if len(seen) > 1 else ""
                return f"{before}the first bad one, {seen[-1][0]:.1f} dB: {seen[-1][1]}"
    return f"all {len(seen)} operations that can be compared are above {bar:.0f} dB"


def check(part, program, precision, args, function="main", bar=None):
    """compare(), and an error that names the first bad operation when a bar is missed."""
    error, value = compare(part, program, precision, function)
    failed = not error <= FLOAT32_BAR if precision == "exact" else not value >= (-300.0 if bar is None else bar)
    if failed:
        said = (
            f"{error:.1e} off PyTorch (at most {FLOAT32_BAR})"
            if precision == "exact"
            else f"{value:.1f} dB (at least {bar or 'a number'})"
        )
        hint = (
            f"\n    {bisect(part, program, precision, bar or 80.0, function)}"
            if args.bisect
            else " --bisect shows where."
        )
        raise SystemExit(f"{part.summary}: the package is {said}, and not kept.{hint}")
    return error, value


def on_this_mac(part, path, function, bar):
    """On macOS {compute unit: decibels of Core ML's own prediction}, and an error if its CPU misses the bar; None elsewhere."""
    if sys.platform != "darwin":
        return None  # no Core ML there
    found = {}
    for unit in ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"):
        model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[unit], function_name=function)
        out = model.predict({name: x.numpy() for name, x in part.inputs.items()})
        values = {name: torch.from_numpy(np.asarray(out[name])).float() for name in part.outputs}
        found[unit] = min(decibels(value, values[name]) for name, value in part.expected().items())
    if bar is not None and not found["CPU_ONLY"] >= bar:
        raise SystemExit(
            f"{part.summary}: {found['CPU_ONLY']:.1f} dB on this Mac's CPU (at least {bar}), and not kept."
        )
    return found


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


def export(name, parts, args, about):
    """Convert, save and verify one part at all its latent sizes: {latent size: report}, and out/NAME.mlpackage."""
    path, reports, start, sizes = args.out / f"{name}.mlpackage", {}, time.time(), list(parts)
    bar = FLOAT16_BAR if args.nbits == 16 and not args.random else None
    with clear_errors(path), tempfile.TemporaryDirectory(dir=args.out, prefix=".") as scratch:
        halves = {}
        for size, part in parts.items():
            exact = Path(scratch) / f"exact{size}.mlpackage"
            convert(part, "float32", args, about).save(str(exact))
            error, _ = check(part, mil.read_package(exact), "exact", args)
            shutil.rmtree(exact)
            package = convert(part, "float16", args, about)
            halves[size] = Path(scratch) / f"{name}{size}.mlpackage"
            (package if args.nbits == 16 else compress(package, args.nbits)).save(str(halves[size]))
            reports[size] = {"float32_error": error}
        candidate = halves[sizes[0]]
        if len(sizes) > 1:
            candidate = Path(scratch) / f"{name}.mlpackage"
            join(halves, sizes, candidate)
        program = mil.read_package(candidate)
        for size, part in parts.items():
            function = function_name(size, sizes)
            _, value = check(part, program, "declared", args, function, bar)
            mac = on_this_mac(part, candidate, function if len(sizes) > 1 else None, bar)
            operations = len(mil.operations(program, function))
            reports[size] |= {"function": function, "decibels": value, "mac": mac, "operations": operations}
        save_package(functools.partial(shutil.copytree, candidate), path)
    for report in reports.values():
        report |= {"bytes": size_of(path), "seconds": round(time.time() - start, 1)}
    return reports


# ------------------------------------------------------------------------------------------------------------------
# The whole chain, as an app would run it: pipeline.json and the packages, nothing else


class Packages:
    """The exported folder as something that draws: text -> tokens -> states -> Euler steps -> picture, all interpreted."""

    def __init__(self, folder):
        from transformers import CLIPTokenizer

        folder = Path(folder)
        self.plan = json.loads((folder / "pipeline.json").read_text())
        self.programs = {name: mil.read_package(folder / f"{name}.mlpackage") for name in PARTS}
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in self.plan["tokenizers"]]
        self.size = self.plan["latent_sizes"][0]
        self.function = function_name(self.size, self.plan["latent_sizes"])

    def encode(self, caption):
        """(text, mask) of one caption."""
        length = self.plan["tokens"]
        tokens = [
            tokenizer(
                [caption], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids.int()
            for tokenizer in self.tokenizers
        ]
        out = mil.run(self.programs["text_encoder"], dict(zip(("tokens", "tokens_2"), tokens, strict=True)))
        return out["text"], out["mask"]

    def draw(self, prompts, seeds):
        """One picture (PIL) per prompt, from the noise that sample.py would take for the same seed."""
        pictures, times, guidance = [], self.plan["times"], self.plan["guidance"]
        empty = self.encode("")
        for prompt, seed in zip(tqdm(prompts, desc="interpreting", disable=len(prompts) < 8), seeds, strict=True):
            text, mask = self.encode(prompt)
            if guidance != 1:
                text, mask = torch.cat([text, empty[0]]), torch.cat([mask, empty[1]])
            x = torch.randn(1, self.plan["latent_channels"], self.size, self.size, generator=rng(seed))
            for t, s in zip(times[:-1], times[1:], strict=True):
                inputs = {
                    "latent": x.expand(len(text), -1, -1, -1),
                    "t": torch.full((len(text),), t),
                    "text": text,
                    "mask": mask,
                }
                v = mil.run(self.programs["unet"], inputs, function=self.function)["velocity"]
                v = v if guidance == 1 else flow.guide(*v.chunk(2), guidance)
                x = x + (s - t) * v
            picture = mil.run(self.programs["decoder"], {"latent": x}, function=self.function)["picture"]
            pictures += to_pictures(picture / 127.5 - 1)
        return pictures


def draw_and_score(args):
    """pictures.png, and mini-GenEval of `--score` prompts a family, through the interpreted packages."""
    packages = Packages(args.out)
    prompts = prompts_of("val", 1, 0)
    pictures = packages.draw([p for p in prompts for _ in range(3)], [0, 1, 2] * len(prompts))
    rows = [pictures[i : i + 3] for i in range(0, len(pictures), 3)]
    save_atomically(captioned_grid(rows, prompts, scale=2).save, args.out / "pictures.png")
    if not args.score:
        return None
    prompts = prompts_of("val", args.score, 0)
    return score(packages.draw(prompts, range(len(prompts))), prompts)


# ------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    # what to export
    p.add_argument("--model", metavar="DIR", default="assets/zoo/step_distill", help="the student")
    p.add_argument("--decoder", metavar="DIR", default="assets/zoo/decoder", help="the tiny decoder")
    p.add_argument(
        "--teacher", metavar="DIR", help="SD3 folder with the text encoders, if not the one in the student's config"
    )
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which of the three")
    p.add_argument("--random", choices=PRESETS, help="a UNet of this size and its decoder with random weights instead")
    # how
    p.add_argument(
        "--latent", type=int, nargs="+", metavar="SIDE", help="sides of the latent; several: a function for each"
    )
    p.add_argument("--batch", type=int, choices=(1, 2), help="2 for guidance; default: what the student needs")
    p.add_argument(
        "--nbits", type=int, choices=(16, 8, 6, 4), default=16, help="bits a weight: 8 linear, 6 and 4 palettes"
    )
    p.add_argument(
        "--layout", choices=("standard", "ane"), default="standard", help="ane: (B, C, 1, S) and 1x1 convolutions"
    )
    p.add_argument("--target", choices=("iOS18", "iOS17"), default="iOS18", help="the oldest system that has to run it")
    # checks
    p.add_argument("--bisect", action="store_true", help="when a package misses its bar, name the first bad operation")
    p.add_argument(
        "--score", type=int, default=0, metavar="N", help="mini-GenEval of N prompts a family through the packages"
    )
    # writing
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("build"), help="where the packages go")
    p.add_argument("--force", action="store_true", help="export again what is there already")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return p.parse_args(argv)


def settings_of(name, args, encoders):
    """What an exported part depends on: its weights, by their hash, and the flags."""
    weights = args.random
    if not args.random:
        texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        folders = {"unet": args.model, "decoder": args.decoder}
        weights = encoders.fingerprint(*texts) if name == "text_encoder" else hash_folders([folders[name]])
    return {
        "weights": weights,
        **{flag: getattr(args, flag) for flag in ("latent", "batch", "nbits", "layout", "target")},
    }


def check_company(name, recorded, settings, args):
    """pipeline.json speaks for all parts in the folder: they must have been exported for the same sizes and student."""
    for other, part in recorded.items():
        if other != name and any(part["settings"][flag] != settings[flag] for flag in ("latent", "batch")):
            raise SystemExit(
                f"{args.out} holds a {other} for another --latent or --batch: give the same, or another --out."
            )
    theirs = recorded.get("unet", {}).get("settings", {}).get("weights")
    if name != "unet" and not args.random and theirs not in (None, hash_folders([args.model])):
        raise SystemExit(
            f"{args.out} holds the UNet of another student than {args.model}: give its --model, or another --out."
        )


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_flush_denormal(False)  # float16's smallest numbers are such
    parts, pipeline, encoders = make_parts(args)
    about = describe_machine(torch.device("cpu")) | {"coremltools": ct.__version__}
    record, exported = args.out / "verification.json", False
    report = json.loads(record.read_text()) if record.is_file() else {"parts": {}}
    with clear_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    for name, sizes in parts.items():
        settings = settings_of(name, args, encoders)
        check_company(
            name, {k: v for k, v in report["parts"].items() if not (args.force and k in parts)}, settings, args
        )
        if (args.out / f"{name}.mlpackage").is_dir() and name in report["parts"] and not args.force:
            if report["parts"][name]["settings"] != settings:
                raise SystemExit(
                    f"{args.out}/{name}.mlpackage has other settings or weights: --force, or another --out."
                )
            print(f"{name}: kept, exported before with these settings")
            continue
        print(f"{name}: converting and verifying")
        report["parts"].pop(name, None)  # until the new one is there and verified, nothing is said about it
        report.pop("mini_geneval", None)
        save_json(report, record)
        reports = export(name, sizes, args, about)
        report["parts"][name], exported = {"settings": settings, "sizes": reports}, True
        save_json(report | {"machine": about}, record)
    with clear_errors(args.out):
        for name, tokenizer in zip(pipeline.get("tokenizers", ()), getattr(encoders, "tokenizers", ()), strict=True):
            tokenizer.save_pretrained(args.out / name)
    save_json(pipeline, args.out / "pipeline.json")

    weights = "random weights" if args.random else f"weights of {args.model}, {args.decoder}"
    print(f"\nInterpreted op by op in torch, beside PyTorch ({about['device']}, coremltools {about['coremltools']}, {weights}, "
          f"{args.nbits} bits):")  # fmt: skip
    print(
        f"{'part':14}{'latent':>7}{'float32 error':>15}{'float16 dB':>12}{'ops':>7}{'MB':>9}{'seconds':>9}   on this Mac, dB"
    )
    for name, part in report["parts"].items():
        for size, r in part["sizes"].items():
            mac = (
                ", ".join(f"{unit} {value:.1f}" for unit, value in r["mac"].items()) if r["mac"] else "no Core ML here"
            )
            print(f"{name:14}{size if int(size) else '-':>7}{r['float32_error']:15.1e}{r['decibels']:12.1f}"
                  f"{r['operations']:7}{r['bytes'] / 1e6:9.2f}{r['seconds']:9.1f}   {mac}")  # fmt: skip
    whole = (
        not args.random and pipeline["tokenizers"] and all((args.out / f"{name}.mlpackage").is_dir() for name in PARTS)
    )
    if whole and (exported or args.score):
        result = draw_and_score(args)
        print(f"wrote {args.out}/pictures.png, drawn by the interpreted packages")
        if result is not None:
            report["mini_geneval"] = result
            low, high = result["interval"]
            print(f"mini-GenEval through the packages: {result['overall']:.3f} ({low:.3f} to {high:.3f}), "
                  f"{result['pictures']} prompts")  # fmt: skip
    save_json(report | {"machine": about}, record)
    print(
        f"wrote {args.out}/: {', '.join(f'{name}.mlpackage' for name in report['parts'])}, pipeline.json, verification.json"
    )
    if args.json:
        print(json.dumps(report | {"machine": about}))


if __name__ == "__main__":
    main()
