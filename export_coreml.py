"""Stage 4: Core ML packages for a phone, each checked op by op before it is called done.

    text_encoder.mlpackage    both CLIPs: tokens -> text states, mask (of a student with Gemma: --gemma none, coreml/texts.py)
    unet.mlpackage            the student: latent, t, text, mask -> velocity
    decoder.mlpackage         the tiny decoder: latent -> picture, 0 to 255
    pipeline.json             steps, times, guidance, sizes, tokenizers: all else that an app needs
    cases.json                prompts with their tokens, times, noise: what an app's own code must agree with (coreml/cases.py)
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
from common.figures import captioned_grid
from common.seeds import rng
from coreml import cases
from coreml import mil_interpreter as mil
from coreml.compress import HIGH, LOW, choose, compress, price_of_each
from coreml.layers import PhoneDecoder, PhoneText, PhoneUNet
from coreml.lines import beside, lines_of, mark
from coreml.mil_interpreter import ct, without_bars  # coremltools, with its warnings about this machine silenced
from coreml.package import check_company, clear_errors, function_name, join, save_package, settings_of, size_of
from coreml.pipeline import PARTS, Packages, real_inputs
from coreml.texts import EXAMPLE, open_encoders, tokens_of
from coreml.verify import FLOAT16_BAR, check, on_this_mac
from data import PROMPTS
from decoder import PRESETS as DECODERS
from decoder import TinyDecoder, Upsample, load_decoder
from evaluate import prompts_of, score
from model import PRESETS, UNet


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

    def captured(self):
        """The module as an exported program: plain operations on tensors of fixed shapes."""
        with torch.no_grad():
            return torch.export.export(self.module, tuple(self.inputs.values())).run_decompositions({})


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
        PhoneText(clips, width, end, tail).eval(), reference, {"tokens": tokens, "tokens_2": tokens_2}, ("text", "mask"),
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
        PhoneUNet(unet, layout).eval(), lambda latent, t, text, mask: unet(latent, t, text, mask.bool()), inputs, ("velocity",),
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
        PhoneDecoder(decoder, Upsample if layout == "ane" else None).eval(),
        lambda latent: (decoder(latent).clamp(-1, 1) + 1) * 127.5,
        {"latent": torch.randn(1, channels, latent, latent, generator=rng(0, latent))}, ("picture",),
        {"latent": f"x_0, (1, {channels}, {latent}, {latent}), as the UNet leaves it",
         "picture": f"red, green and blue from 0 to 255, (1, 3, {8 * latent}, {8 * latent})"},
        f"SnapGen: the tiny decoder, {sum(p.numel() for p in decoder.parameters()) / 1e6:.2f} M parameters",
        unit=127.5, float32=("latent",),
    )  # fmt: skip


def make_parts(args):
    """({part: {latent size: Part}}, what pipeline.json says, encoders, see): the text encoder has no latent and is under 0.

    see() gives what the parts get to see while the student draws, see pipeline.real_inputs.
    """
    torch.manual_seed(0)
    encoders = tokenizers = None
    if args.random:
        sampling, sizes = {"guidance": 1.0}, args.latent or [128 if args.random != "tiny" else 8]
        unet = UNet(PRESETS[args.random]).eval()
        decoder = TinyDecoder(DECODERS["tiny" if args.random == "tiny" else "sd3"]).eval()
        text, mask = torch.randn(1, 77, unet.cfg.text_dim, generator=rng(0)), torch.ones(1, 77)
        pipeline = {"weights": "random"}
        if "text_encoder" in args.parts:
            raise SystemExit("--random has no text encoder: give --parts unet decoder.")
    else:
        (unet, config), (decoder, decoder_config) = load_student(args.model), load_decoder(args.decoder)
        encoders, tokenizers, text, mask = open_encoders(args, unet.cfg, config)
        check_encoders(config, encoders), check_encoders(decoder_config, encoders)
        sampling, sizes = config["sampling"], args.latent or [config["latent_size"][0]]
        times = sampling.get("times") or flow.sampling_timesteps(sampling["steps"], sampling["shift"]).tolist()
        pipeline = {
            "model": str(args.model), "steps": sampling["steps"], "times": times, "shift": sampling["shift"],
            "scaling_factor": encoders.scaling_factor, "shift_factor": encoders.shift_factor,
            "latents": "already scaled and shifted: the decoder takes what the UNet leaves",
            "tokenizers": tokenizers, "tokens": getattr(encoders, "max_tokens", mask.shape[1]), "gemma": args.gemma,
        }  # fmt: skip
    check_sizes(args, unet.cfg, sizes)
    batch = 1 if sampling["guidance"] == 1 else 2  # the caption, and the empty caption beside it
    parts = {}
    if "text_encoder" in args.parts:
        parts["text_encoder"] = {0: text_part(encoders, unet.cfg.text_dim)}
    if "unet" in args.parts:
        parts["unet"] = {size: unet_part(unet, size, text, mask, batch, args.layout) for size in sizes}
    if "decoder" in args.parts:
        parts["decoder"] = {size: decoder_part(decoder, size, args.layout) for size in sizes}
    pipeline |= {"guidance": sampling["guidance"], "batch": batch, "nbits": args.nbits,
                 "functions": {size: function_name(size, sizes) for size in sizes},
                 "latent_channels": unet.cfg.latent_channels, "latent_sizes": sizes}  # fmt: skip
    return parts, pipeline, encoders, functools.partial(real_inputs, unet, pipeline, encoders, PROMPTS, text, mask)


def check_sizes(args, cfg, sizes):
    """Raises SystemExit for latent sizes that cannot be."""
    if len(sizes) > 1 and args.target == "iOS17":
        raise SystemExit("one package for several latent sizes needs iOS 18: leave --target iOS17 out, or export one size.")
    step = 2 ** (len(cfg.channels) - 1)
    if any(size % step for size in sizes):
        raise SystemExit(f"--latent must be multiples of {step}, not {sizes}.")


# ------------------------------------------------------------------------------------------------------------------
# Convert, read back, verify, keep


def feeds_sine(op):
    """True for the time embedding's operations from t to sin and cos: 1000 t radians need float32."""
    if op.op_type in ("sin", "cos"):
        return True
    passes_on = op.op_type in ("const", "expand_dims", "mul", "reshape", "cast")
    return passes_on and any(feeds_sine(child) for var in op.outputs for child in var.child_ops)


@without_bars()
def convert(part, precision, args, about):
    """A Core ML model (not saved) of a Part, with every input and output named, typed and described."""
    half = precision == "float16"

    def kind(name, tensor=None):
        if tensor is not None and not tensor.is_floating_point():
            return np.int32
        return np.float16 if half and name not in part.float32 else np.float32

    package = ct.convert(
        mark(part.captured()),
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


def export(name, parts, args, about, see=None):
    """Convert, save and verify one part at all its latent sizes: {latent size: report}, and out/NAME.mlpackage."""
    path, reports, start, sizes = args.out / f"{name}.mlpackage", {}, time.time(), list(parts)
    bar = FLOAT16_BAR if args.nbits == 16 and not args.random else None
    with clear_errors(path), tempfile.TemporaryDirectory(dir=args.out, prefix=".") as scratch:
        halves, lines, bits, mix = {}, {}, args.nbits, None
        for size, part in parts.items():
            exact = Path(scratch) / f"exact{size}.mlpackage"
            convert(part, "float32", args, about).save(str(exact))
            error, _ = check(part, mil.read_package(exact), "exact", show=args.bisect)
            shutil.rmtree(exact)
            package = convert(part, "float16", args, about)
            lines[function_name(size, sizes)] = lines_of(package)
            halves[size] = Path(scratch) / f"{name}{size}.mlpackage"
            if args.mixed and mix is None:  # measured at the first size, the same weights for all
                prices = price_of_each(package, see()[name])
                bits = choose(prices, args.mixed)
                mix = {weight: price | {"bits": bits[weight]} for weight, price in prices.items()}
            (package if bits == 16 else compress(package, bits)).save(str(halves[size]))
            reports[size] = {"float32_error": error} | ({"mix": mix} if mix else {})
        candidate = halves[sizes[0]]
        if len(sizes) > 1:
            candidate = Path(scratch) / f"{name}.mlpackage"
            join(halves, sizes, candidate)
        program = mil.read_package(candidate)
        for size, part in parts.items():
            function = function_name(size, sizes)
            _, value = check(part, program, "declared", function, bar, args.bisect)
            mac = on_this_mac(part, candidate, function if len(sizes) > 1 else None, bar)
            operations = len(mil.operations(program, function))
            reports[size] |= {"function": function, "decibels": value, "mac": mac, "operations": operations}
        beside(path).unlink(missing_ok=True)  # the lines of an older package
        save_package(functools.partial(shutil.copytree, candidate), path)
        save_json(lines, beside(path))
    for report in reports.values():
        report |= {"bytes": size_of(path), "seconds": round(time.time() - start, 1)}
    return reports


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


def print_table(report, args, about):
    weights = "random weights" if args.random else f"weights of {args.model}, {args.decoder}"
    print(f"\nInterpreted op by op in torch, beside PyTorch ({about['device']}, coremltools {about['coremltools']}, {weights}, "
          f"{args.nbits} bits):")  # fmt: skip
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
    if args.random and args.gemma:
        raise SystemExit("--random has no text encoder: leave --gemma out.")
    if args.score and (args.random or set(args.parts) != set(PARTS)):
        raise SystemExit("--score draws with all three packages of a trained student: leave --random and --parts out, or --score.")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if not args.random:
        args.model, args.decoder = args.model or latest("step_distill"), args.decoder or latest("decoder")
    torch.set_flush_denormal(False)  # float16's smallest numbers are such
    parts, pipeline, encoders, see = make_parts(args)
    about = describe_machine(torch.device("cpu")) | {"coremltools": ct.__version__}
    record, exported = args.out / "verification.json", False
    report = json.loads(record.read_text()) if record.is_file() else {"parts": {}}
    with clear_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    for name, sizes in parts.items():
        settings = settings_of(name, args, encoders)
        check_company(name, {k: v for k, v in report["parts"].items() if not (args.force and k in parts)}, settings, args)
        if (args.out / f"{name}.mlpackage").is_dir() and name in report["parts"] and not args.force:
            if report["parts"][name]["settings"] != settings:
                raise SystemExit(f"{args.out}/{name}.mlpackage has other settings or weights: --force, or another --out.")
            print(f"{name}: kept, exported before with these settings")
            continue
        print(f"{name}: converting and verifying")
        report["parts"].pop(name, None)  # until the new one is there and verified, nothing is said about it
        report.pop("mini_geneval", None)
        save_json(report, record)
        reports = export(name, sizes, args, about, see)
        report["parts"][name], exported = {"settings": settings, "sizes": reports}, True
        save_json(report | {"machine": about}, record)
    with clear_errors(args.out):
        tokenizers = dict(zip(pipeline.get("tokenizers", ()), getattr(encoders, "tokenizers", ()), strict=True))
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(args.out / name)
    if tokenizers:
        cases.write(args.out / "cases.json", tokenizers, encoders.max_tokens)
    save_json(pipeline, args.out / "pipeline.json")

    print_table(report, args, about)
    whole = pipeline.get("tokenizers") and all((args.out / f"{name}.mlpackage").is_dir() for name in PARTS)
    if whole and (exported or args.score):
        result = draw_and_score(args)
        print(f"wrote {args.out}/pictures.png, drawn by the interpreted packages")
        if result is not None:
            report["mini_geneval"] = result
            low, high = result["interval"]
            print(f"mini-GenEval through the packages: {result['overall']:.3f} ({low:.3f} to {high:.3f}), "
                  f"{result['pictures']} prompts")  # fmt: skip
    save_json(report | {"machine": about}, record)
    packages = ", ".join(f"{name}.mlpackage" for name in report["parts"])
    print(f"wrote {args.out}/: {packages}, pipeline.json, verification.json")
    if args.json:
        print(json.dumps(report | {"machine": about}))


if __name__ == "__main__":
    main()
