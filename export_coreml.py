"""Stage 4: Core ML packages for a phone, each checked op by op before it is called done.

    text_encoder.mlpackage    both CLIPs: tokens -> text states, mask (of a student with Gemma: --gemma none, coreml/texts.py)
    unet.mlpackage            the student: latent, t, text, mask -> velocity
    decoder.mlpackage         the tiny decoder: latent -> picture, 0 to 255
    pipeline.json             steps, times, guidance, sizes, tokenizers: all else that an app needs
    cases.json                prompts with their tokens, times, noise: what an app's own code must agree with (coreml/pipeline.py)
    verification.json         how far each package is from PyTorch
    *.lines.json              which line of Python made which operation, for `python -m coreml.advise build/`

    python export_coreml.py                                         # runs/step_distill, runs/decoder (or the zoo's) -> build/
    python export_coreml.py --nbits 6 --out build6 --score 10       # 6-bit palettes; mini-GenEval through the packages
    python export_coreml.py --mixed 5 --out build5                  # 8 bits where 4 would cost most (coreml/compress.py)
    python export_coreml.py --model assets/zoo/distill              # guidance: caption and empty caption in one batch of 2
    python export_coreml.py --random t2i --parts unet decoder --latent 128     # the paper's sizes, random weights

How one part is made: it is wrapped in the form that a phone can take (coreml/layers.py), torch.export captures it at fixed sizes,
coremltools converts it to a float16 program, it is saved, read back from disk and interpreted beside PyTorch (coreml/verify.py,
mil_interpreter.py). Two questions, two bars: is it the right program (converted in float32: at most 1e-4 off) and does it survive
float16 (at least 50 dB; fewer bits and random weights have no bar, their decibels stand in verification.json)? On a Mac the same
inputs also go through Core ML itself.
"""

import functools
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import flow
from common.arguments import Parser, integer, real
from common.checkpoint import check_encoders, latest, load_student, save_atomically, save_json
from common.device import describe_machine
from common.encoders import hash_folders
from common.figures import captioned_grid
from common.seeds import rng
from coreml import mil_interpreter as mil
from coreml.compress import HIGH, LOW, choose, compress, price_of_each
from coreml.layers import PhoneDecoder, PhoneText, PhoneUNet
from coreml.mil_interpreter import ct, without_bars  # coremltools, with its warnings about this machine silenced
from coreml.package import (
    beside,
    check_company,
    clear_errors,
    function_name,
    give_back_memory,
    join,
    lines_of,
    mark,
    passes_to_float16,
    passes_to_float32,
    save_package,
    weight_bytes,
)  # fmt: skip
from coreml.pipeline import PARTS, Packages, real_inputs, save_cases
from coreml.texts import EXAMPLE, open_encoders, tokens_of
from coreml.verify import FLOAT16_BAR, check, on_this_mac
from data import PROMPTS
from decoder import PRESETS as DECODERS
from decoder import TinyDecoder, Upsample, load_decoder
from evaluate import prompts_of, score
from model import PRESETS, UNet


@dataclass
class Part:
    """One network to export: how to build it, an example of every input, and what each input and output is."""

    build: object  # makes the module in the form that a phone can take
    reference: object  # the network as the other stages run it, called with the same inputs
    inputs: dict  # name -> example tensor, whose shape is the only one the package will take
    outputs: tuple  # names
    descriptions: dict  # of inputs and outputs
    summary: str
    unit: float = 1.0  # size of the outputs' numbers: errors are counted in it
    float32: tuple = ()  # inputs and outputs kept in float32

    @functools.cached_property
    def expected(self):
        """What the original network says to the example: {name: tensor}."""
        with torch.no_grad():
            out = self.reference(*self.inputs.values())
        return dict(zip(self.outputs, out if isinstance(out, tuple) else (out,), strict=True))

    @functools.cached_property
    def module(self):
        return self.build()

    def captured(self):
        """The module as an exported program: plain operations on tensors of fixed shapes."""
        with torch.no_grad():
            return torch.export.export(self.module, tuple(self.inputs.values())).run_decompositions({})

    def prepare(self):
        """Ask the original network, then have the phone's form alone: both of 379 M parameters take 1.5 GB each."""
        self.expected, self.module  # noqa: B018  computed here and kept
        self.reference = self.build = None
        give_back_memory()


# ------------------------------------------------------------------------------------------------------------------
# Wrap: the three parts, in the form that a phone can take


def text_part(encoders, width):
    tokens, tokens_2 = tokens_of(encoders, [EXAMPLE])
    clips, end, tail = encoders.text_encoders, encoders.tokenizers[0].eos_token_id, getattr(encoders.gemma, "states", None)
    length = tokens.shape[1] + (0 if tail is None else tail.shape[1])

    def reference(*tokens):
        text, mask = encoders.student_text([EXAMPLE], width)
        return text, mask.float()

    return Part(
        lambda: PhoneText(clips, width, end, tail).eval(), reference, {"tokens": tokens, "tokens_2": tokens_2}, ("text", "mask"),
        {"tokens": f"token ids of the first tokenizer, (1, {tokens.shape[1]}), padded",
         "tokens_2": "token ids of the second tokenizer, the same shape",
         "text": f"text states, (1, {length}, {width}); an input of the UNet",
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
        lambda: PhoneUNet(unet, layout).eval(), lambda latent, t, text, mask: unet(latent, t, text, mask.bool()),
        inputs, ("velocity",),
        {"latent": f"x_t, {shape}: noise at t = 1, the picture's latent at t = 0", "t": "time, 1 to 0",
         "text": "text states of the text encoder" + (", the caption's and the empty caption's" if batch == 2 else ""),
         "mask": "mask of the text encoder", "velocity": f"v, {shape}: x_s = x_t + (s - t) v"},
        f"SnapGen: the UNet, {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters, layout {layout}",
        float32=("latent", "t", "velocity"),  # so that the sum of the Euler steps is kept in float32
    )  # fmt: skip


def decoder_part(decoder, latent, layout="ane"):
    channels = decoder.cfg.latent_channels
    decoder.to(memory_format=torch.contiguous_format)  # torch's GroupNorm of channels_last loses digits over a million pixels
    return Part(
        lambda: PhoneDecoder(decoder, Upsample if layout == "ane" else None).eval(),
        lambda latent: (decoder(latent).clamp(-1, 1) + 1) * 127.5,
        {"latent": torch.randn(1, channels, latent, latent, generator=rng(0, latent))}, ("picture",),
        {"latent": f"x_0, (1, {channels}, {latent}, {latent}), as the UNet leaves it",
         "picture": f"red, green and blue from 0 to 255, (1, 3, {8 * latent}, {8 * latent})"},
        f"SnapGen: the tiny decoder, {sum(p.numel() for p in decoder.parameters()) / 1e6:.2f} M parameters",
        unit=127.5, float32=("latent",),
    )  # fmt: skip


@dataclass
class Student:
    """What is to be exported, with all that the other stages know of it."""

    networks: dict  # {"unet", "decoder"}
    weights: dict  # {part: hash of what its numbers come from}
    text: torch.Tensor  # an example caption's states (1, T, D)
    mask: torch.Tensor  # (1, T)
    side: int  # of its latents
    sampling: dict  # at least "guidance"
    plan: dict  # the student's own share of pipeline.json
    encoders: object = None


def random_student(size):
    """A UNet of this size and its decoder with random weights."""
    torch.manual_seed(0)
    unet, decoder = UNet(PRESETS[size]).eval(), TinyDecoder(DECODERS["tiny" if size == "tiny" else "sd3"]).eval()
    text, mask = torch.randn(1, 77, unet.cfg.text_dim, generator=rng(0)), torch.ones(1, 77)
    return Student({"unet": unet, "decoder": decoder}, dict.fromkeys(PARTS, size), text, mask, 8 if size == "tiny" else 128,
                   {"guidance": 1.0}, {"weights": "random"})  # fmt: skip


def trained_student(model, decoder, teacher=None, gemma=None, with_text=True):
    """The student and the decoder of two run folders. gemma, with_text: see texts.open_encoders."""
    torch.manual_seed(0)
    (unet, config), (decoder_net, decoder_config) = load_student(model), load_decoder(decoder)
    encoders, tokenizers, text, mask = open_encoders(config, unet.cfg.text_dim, model, teacher, gemma, with_text)
    check_encoders(config, encoders), check_encoders(decoder_config, encoders)
    sampling = config["sampling"]
    plan = {
        "model": str(model), "steps": sampling["steps"], "shift": sampling["shift"],
        "times": sampling.get("times") or flow.sampling_timesteps(sampling["steps"], sampling["shift"]).tolist(),
        "scaling_factor": encoders.scaling_factor, "shift_factor": encoders.shift_factor,
        "latents": "already scaled and shifted: the decoder takes what the UNet leaves",
        "tokenizers": tokenizers, "tokens": getattr(encoders, "max_tokens", mask.shape[1]), "gemma": gemma,
    }  # fmt: skip
    weights = {"unet": hash_folders([model]), "decoder": hash_folders([decoder])}
    if with_text:
        weights["text_encoder"] = encoders.fingerprint("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        weights["text_encoder"] += f"-{encoders.gemma.fingerprint()}" if gemma else ""
    networks = {"unet": unet, "decoder": decoder_net}
    return Student(networks, weights, text, mask, config["latent_size"][0], sampling, plan, encoders)


def plan_of(student, sizes, nbits):
    """pipeline.json: all that an app needs to know beside the packages."""
    check_sizes(student.networks["unet"].cfg, sizes)
    guidance = student.sampling["guidance"]
    batch = 1 if guidance == 1 else 2  # the caption, and the empty caption beside it
    return student.plan | {
        "guidance": guidance, "batch": batch, "nbits": nbits, "functions": {size: function_name(size, sizes) for size in sizes},
        "latent_channels": student.networks["unet"].cfg.latent_channels, "latent_sizes": sizes,
    }  # fmt: skip


def check_sizes(cfg, sizes):
    """Raises SystemExit for latent sizes that cannot be."""
    step = 2 ** (len(cfg.channels) - 1)
    if any(size % step for size in sizes):
        raise SystemExit(f"--latent must be multiples of {step}, not {sizes}.")


def make_parts(student, name, sizes, batch, layout):
    """{latent size: Part} of one of the three; the text encoder has no latent, and is under 0.

    Takes the network out of `student`, so that nobody else holds it.
    """
    if name == "text_encoder":
        return {0: text_part(student.encoders, student.text.shape[-1])}
    network = student.networks.pop(name)
    if name == "unet":
        return {size: unet_part(network, size, student.text, student.mask, batch, layout) for size in sizes}
    return {size: decoder_part(network, size, layout) for size in sizes}


# ------------------------------------------------------------------------------------------------------------------
# Convert, read back, verify, keep


def feeds_sine(op):
    """True for the time embedding's operations from t to sin and cos: 1000 t radians need float32."""
    if op.op_type in ("sin", "cos"):
        return True
    passes_on = op.op_type in ("const", "expand_dims", "mul", "reshape", "cast")
    return passes_on and any(feeds_sine(child) for var in op.outputs for child in var.child_ops)


@without_bars()
def program_of(part, target="iOS18"):
    """The MIL program of a Part in float32, before anything is rounded: where every conversion begins."""

    def kind(name, tensor=None):
        if tensor is not None and not tensor.is_floating_point():
            return np.int32
        return np.float32 if name in part.float32 else np.float16

    exported = mark(part.captured())
    return ct.convert(
        exported, convert_to="milinternal", minimum_deployment_target=getattr(ct.target, target),
        compute_precision=ct.precision.FLOAT32, pass_pipeline=passes_to_float32(),
        # by position, not by name: the names are given to whatever stands there, so the order has to be forward()'s
        inputs=[ct.TensorType(name, tuple(x.shape), dtype=kind(name, x)) for name, x in part.inputs.items()],
        outputs=[ct.TensorType(name, dtype=kind(name)) for name in part.outputs],
    )  # fmt: skip


@without_bars()
def package_of(program, part, precision, target="iOS18", about=None, path=None):
    """A Core ML model of a program: as it is, or with all but the time embedding in float16. In memory, or at `path` at once.

    The program is used up by float16, and not by float32.
    """
    half = precision == "float16"
    package = ct.convert(
        program, source="milinternal", convert_to="mlprogram", minimum_deployment_target=getattr(ct.target, target),
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32, skip_model_load=True,
        pass_pipeline=passes_to_float16((lambda op: not feeds_sine(op)) if half else None), package_dir=path and str(path),
    )  # fmt: skip
    about = about or {}
    package.short_description, package.license, package.version = part.summary, "MIT", about.get("commit", "")
    package.author = "made by export_coreml.py"
    package.user_defined_metadata.update({name: str(value) for name, value in about.items()})
    came_from = {"source": f"torch=={torch.__version__}", "source_dialect": "TorchExport::ATEN"}  # coremltools: "milinternal"
    package.user_defined_metadata.update({f"com.github.apple.coremltools.{name}": value for name, value in came_from.items()})
    for name in part.inputs:
        package.input_description[name] = part.descriptions[name]
    for name in part.outputs:
        package.output_description[name] = part.descriptions[name]
    return package


def convert(part, precision="float16", target="iOS18", about=None):
    """A Core ML model (not saved) of a Part, with every input and output named, typed and described."""
    return package_of(program_of(part, target), part, precision, target, about)


def export(name, parts, out, nbits=16, mixed=None, seen=None, target="iOS18", about=None, bar=FLOAT16_BAR, show=False):
    """Convert, save and verify one part at all its latent sizes: {latent size: report}, and out/NAME.mlpackage.

    Args:
        parts: {latent size: Part}; their networks are given up on the way, to make room.
        nbits: 16, 8, 6 or 4 bits a weight; or mixed: so many on average, by what the part gets to see (pipeline.real_inputs).
        bar: decibels of the float16 package, or None. show: name the first bad operation.
    """
    path, reports, start, sizes = out / f"{name}.mlpackage", {}, time.time(), list(parts)
    with clear_errors(path), tempfile.TemporaryDirectory(dir=out, prefix=".") as scratch:
        scratch = Path(scratch)
        halves, lines, bits, mix = {}, {}, nbits, None
        for size, part in parts.items():
            halves[size], exact = scratch / f"{name}{size}.mlpackage", scratch / f"exact{size}.mlpackage"
            part.prepare()
            program = program_of(part, target)
            if not show:
                part.module = None
            give_back_memory()
            package_of(program, part, "float32", target, path=exact)
            package = package_of(program, part, "float16", target, about)
            del program
            lines[function_name(size, sizes)] = lines_of(package)
            if mixed and mix is None:  # measured at the first size, the same weights for all
                prices = price_of_each(package, seen)
                bits = choose(prices, mixed)
                mix = {weight: price | {"bits": bits[weight]} for weight, price in prices.items()}
            (package if bits == 16 else compress(package, bits)).save(str(halves[size]))
            del package
            give_back_memory()
            error, _ = check(part, mil.read_package(exact), "exact", show=show)
            shutil.rmtree(exact)
            reports[size] = {"float32_error": error} | ({"mix": mix} if mix else {})
        candidate = halves[sizes[0]]
        if len(sizes) > 1:
            candidate = scratch / f"{name}.mlpackage"
            join(halves, sizes, candidate)
        program = mil.read_package(candidate)
        for size, part in parts.items():
            function = function_name(size, sizes)
            _, value = check(part, program, "declared", function, bar, show)
            mac = on_this_mac(part, candidate, function if len(sizes) > 1 else None, bar)
            operations = len(mil.operations(program, function))
            reports[size] |= {"function": function, "decibels": value, "mac": mac, "operations": operations}
        beside(path).unlink(missing_ok=True)  # the lines of an older package
        save_package(candidate.rename, path)
        save_json(lines, beside(path))
    for report in reports.values():
        report |= {"bytes": weight_bytes(path), "seconds": round(time.time() - start, 1)}
    return reports


def draw_and_score(out, per_family):
    """pictures.png, and mini-GenEval of so many prompts a family (0: none), through the interpreted packages."""
    packages = Packages(out)
    prompts = prompts_of("val", 1, 0)
    pictures = packages.draw([p for p in prompts for _ in range(3)], [0, 1, 2] * len(prompts))
    rows = [pictures[i : i + 3] for i in range(0, len(pictures), 3)]
    save_atomically(captioned_grid(rows, prompts, scale=2).save, out / "pictures.png")
    print(f"wrote {out}/pictures.png, drawn by the interpreted packages")
    if not per_family:
        return None
    prompts = prompts_of("val", per_family, 0)
    result = score(packages.draw(prompts, range(len(prompts))), prompts)
    low, high = result["interval"]
    print(f"mini-GenEval through the packages: {result['overall']:.3f} ({low:.3f} to {high:.3f}), {result['pictures']} prompts")
    return result


def print_table(report, weights, nbits):
    about = report["machine"]
    print(f"\nInterpreted op by op in torch, beside PyTorch ({about['device']}, coremltools {about['coremltools']}, {weights}, "
          f"{nbits} bits):")  # fmt: skip
    print("part           latent  float32 error  float16 dB    ops       MB  seconds   on this Mac, dB")
    for name, part in report["parts"].items():
        for size, r in part["sizes"].items():
            mac = ", ".join(f"{unit} {value:.1f}" for unit, value in r["mac"].items()) if r["mac"] else "no Core ML here"
            print(f"{name:14}{size if int(size) else '-':>7}{r['float32_error']:15.1e}{r['decibels']:12.1f}"
                  f"{r['operations']:7}{r['bytes'] / 1e6:9.2f}{r['seconds']:9.1f}   {mac}")  # fmt: skip


def parse_arguments(argv=None):
    p = Parser(__doc__, "python export_coreml.py --model runs/step_distill --decoder runs/decoder --out build")
    # what to export
    p.add_argument("--model", metavar="DIR", help="the student; default: runs/step_distill, or the zoo's if there is none")
    p.add_argument("--decoder", metavar="DIR", help="the tiny decoder; default: runs/decoder, or the zoo's if there is none")
    p.add_argument("--teacher", metavar="DIR", help="SD3 folder with the text encoders, if not the one in the student's config")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which of the three")
    p.add_argument("--random", choices=PRESETS, help="a UNet of this size and its decoder with random weights instead")
    # how
    p.add_argument("--latent", type=integer(1), nargs="+", metavar="SIDE", help="sides of the latent; several: a function for each")
    bits = p.add_mutually_exclusive_group()
    bits.add_argument("--nbits", type=integer(), choices=(16, 8, 6, 4), default=16, help="bits a weight: 8 linear, 6, 4 palettes")
    bits.add_argument("--mixed", type=real(LOW, HIGH), metavar="BITS", help="8 bits where 4 cost most: so many on average")
    p.add_argument("--gemma", choices=("none",), help="leave Gemma out of a student that was trained with it")
    p.add_argument("--layout", choices=("ane", "standard"), default="ane", help="ane: the neural engine's; standard: the scripts'")
    p.add_argument("--target", choices=("iOS18", "iOS17"), default="iOS18", help="the oldest system that has to run it")
    # checks
    p.add_argument("--bisect", action="store_true", help="when a package misses its bar, name the first bad operation")
    p.add_argument("--score", type=integer(0), default=0, metavar="N", help="mini-GenEval of N prompts a family, by the packages")
    # writing
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("build"), help="where the packages go")
    p.add_argument("--force", action="store_true", help="export again what is there already")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = p.parse_args(argv)
    args.nbits = f"mixed {args.mixed:g}" if args.mixed else args.nbits
    args.latent = args.latent and list(dict.fromkeys(args.latent))  # a size that is named twice is one function
    if args.latent and len(args.latent) > 1 and args.target == "iOS17":
        raise SystemExit("one package for several latent sizes needs iOS 18: leave --target iOS17 out, or export one size.")
    if args.random and (args.gemma or "text_encoder" in args.parts):
        raise SystemExit("--random has no text encoder: give --parts unet decoder, and leave --gemma out.")
    if args.score and (args.random or set(args.parts) != set(PARTS)):
        raise SystemExit("--score draws with all three packages of a trained student: leave --random and --parts out, or --score.")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    out, record = args.out, args.out / "verification.json"
    torch.set_flush_denormal(False)  # float16's smallest numbers are such
    if args.random:
        student, weights = random_student(args.random), "random weights"
    else:
        model, decoder = args.model or latest("step_distill"), args.decoder or latest("decoder")
        student = trained_student(model, decoder, args.teacher, args.gemma, "text_encoder" in args.parts)
        weights = f"weights of {model}, {decoder}"
    sizes = args.latent or [student.side]
    plan, encoders, seen = plan_of(student, sizes, args.nbits), student.encoders, {}
    if args.mixed:
        seen = real_inputs(student.networks["unet"], plan, encoders, PROMPTS, student.text, student.mask)

    report = json.loads(record.read_text(encoding="utf-8-sig")) if record.is_file() else {"parts": {}}
    about, exported = describe_machine(torch.device("cpu")) | {"coremltools": ct.__version__}, False
    with clear_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for name in (part for part in PARTS if part in args.parts):
        settings = {flag: getattr(args, flag) for flag in ("latent", "nbits", "layout", "target", "gemma")}
        settings["weights"] = student.weights[name]
        others = {part: r for part, r in report["parts"].items() if not (args.force and part in args.parts)}
        check_company(out, name, others, settings, plan.get("model"), None if args.random else student.weights["unet"])
        if (out / f"{name}.mlpackage").is_dir() and name in report["parts"] and not args.force:
            if report["parts"][name]["settings"] != settings:
                raise SystemExit(f"{out}/{name}.mlpackage has other settings or weights: --force, or another --out.")
            print(f"{name}: kept, exported before with these settings")
            continue
        print(f"{name}: converting and verifying")
        report["parts"].pop(name, None)  # until the new one is there and verified, nothing is said about it
        report.pop("mini_geneval", None)
        save_json(report, record)
        bar = FLOAT16_BAR if args.nbits == 16 and not args.random else None
        reports = export(name, make_parts(student, name, sizes, plan["batch"], args.layout), out, args.nbits, args.mixed,
                         seen.get(name), args.target, about, bar, args.bisect)  # fmt: skip
        report["parts"][name], exported = {"settings": settings, "sizes": reports}, True
        save_json(report | {"machine": about}, record)
    tokenizers = dict(zip(plan.get("tokenizers", ()), getattr(encoders, "tokenizers", ()), strict=True))
    with clear_errors(out):
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(out / name)
    if tokenizers:
        save_cases(out / "cases.json", tokenizers, encoders.max_tokens)
    save_json(plan, out / "pipeline.json")

    report["machine"] = about
    print_table(report, weights, args.nbits)
    if tokenizers and all((out / f"{name}.mlpackage").is_dir() for name in PARTS) and (exported or args.score):
        result = draw_and_score(out, args.score)
        report |= {"mini_geneval": result} if result else {}
    save_json(report, record)
    packages = ", ".join(f"{name}.mlpackage" for name in report["parts"])
    print(f"wrote {out}/: {packages}, pipeline.json, verification.json")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
