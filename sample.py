"""Draw pictures from text with a trained student: noise -> Euler steps along the velocity -> latent -> picture.

    python sample.py "a photo of a red circle above a blue square" --model assets/zoo/fm --seed 0 --out out.png
    python sample.py "a photo of a star" "a photo of two blue squares" --n 4 --out grid.png     # a captioned grid
    python sample.py "a photo of a star" --trajectory path.gif                                  # the denoising, step by step
    python sample.py --prompts prompts.txt --out drawn/                                         # one PNG a line, for evaluate.py

The last form writes metadata.jsonl (file_name, text) beside the pictures, which evaluate.py and train_fm.py --data read.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import flow
from checkpoint import HelpFormatter, check_encoders, load_student, pick_device, save_atomically
from data import captioned_grid, rng, to_pictures
from decoder import load_decoder
from encoders import FrozenEncoders


@torch.no_grad()
def draw_pictures(
    model,
    config,
    encoders,
    prompts,
    seeds,
    steps=None,
    guidance=None,
    shift=None,
    batch=64,
    callback=None,
    decoder=None,
):
    """One picture (PIL) per prompt. `seeds` holds one integer a prompt: a picture depends on its prompt and seed alone.

    steps, guidance and shift default to what the student's config says it was made for, with the very times if it names them
    (stage 3 does); `decoder` (anything with decode_latents, such as decoder.TinyDecoder) to the encoders' own. `callback` is
    passed on to flow.euler_sample.
    """
    habits = config["sampling"]
    times = habits.get("times") if steps is None and shift is None else None
    steps = habits["steps"] if steps is None else steps
    guidance = habits["guidance"] if guidance is None else guidance
    shift = habits["shift"] if shift is None else shift
    device, width = next(model.parameters()).device, model.cfg.text_dim
    pictures = []
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", disable=len(prompts) <= batch):
        some = prompts[start : start + batch]
        shape = (model.cfg.latent_channels, *config["latent_size"])
        noise = torch.stack([torch.randn(shape, generator=rng(seed)) for seed in seeds[start : start + batch]]).to(
            device
        )
        text, empty = (encoders.student_text(captions, width) for captions in (some, [""] * len(some)))
        latents = flow.euler_sample(model, noise, text, empty, steps, guidance, shift, callback, times)
        pictures += to_pictures((decoder or encoders).decode_latents(latents))
    return pictures


def pick_decoder(folder, encoders):
    """The tiny decoder in `folder`, on the encoders' device; without one the encoders, whose decoder is the teacher's."""
    if folder is None:
        return encoders
    decoder, config = load_decoder(folder, encoders.device)
    check_encoders(config, encoders)
    return decoder


def read_prompts(path):
    """The non-empty lines of a text file."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read prompts from {path}: {error}") from error
    if not prompts:
        raise SystemExit(f"{path} holds no prompt: write one a line.")
    return prompts


def write_folder(folder, pictures, prompts):
    """00000.png, 00001.png, ... and metadata.jsonl."""
    rows = []
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        save_atomically(picture.save, Path(folder) / f"{i:05d}.png")
        rows.append(json.dumps({"file_name": f"{i:05d}.png", "text": prompt}))
    save_atomically(lambda p: p.write_text("\n".join(rows) + "\n", encoding="utf-8"), Path(folder) / "metadata.jsonl")


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    p.add_argument("text", nargs="*", metavar="PROMPT", help="what to draw; several make a grid, one row each")
    p.add_argument("--prompts", metavar="FILE", help="draw every line of this file; --out is then a folder")
    p.add_argument("--model", metavar="DIR", default="assets/zoo/fm", help="a student's folder")
    p.add_argument(
        "--teacher", metavar="DIR", help="SD3 folder with the encoders, if not the one named in the student's config"
    )
    p.add_argument(
        "--decoder", metavar="DIR", help="tiny decoder, such as assets/zoo/decoder; default: the teacher's own"
    )
    p.add_argument("--n", type=int, default=1, help="pictures per prompt, from seeds seed, seed + 1, ...")
    p.add_argument("--steps", type=int, help="Euler steps; default: what the student was made for")
    p.add_argument("--guidance", type=float, help="classifier-free guidance, 1 = none; default: the student's")
    p.add_argument("--shift", type=float, help="timestep shift; default: the student's")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--resolution", type=int, help="side of the picture in pixels, if not the one trained on")
    p.add_argument(
        "--trajectory",
        metavar="FILE",
        help="also save x_t and the predicted x_0 of every step: .gif, or .png for a strip",
    )
    p.add_argument(
        "--out", metavar="PATH", help="picture (default: out.png), or folder with --prompts (default: drawn)"
    )
    p.add_argument("--device", help="cuda, mps or cpu; chosen by itself if not given")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    prompts = read_prompts(args.prompts) if args.prompts else args.text
    if not prompts:
        raise SystemExit('nothing to draw: give a prompt, such as "a photo of a red circle", or --prompts FILE.')
    if any(not prompt.strip() for prompt in prompts):
        warnings.warn("an empty prompt draws whatever the model likes best", stacklevel=2)
    for name, low in (("n", 1), ("steps", 1), ("guidance", 0), ("shift", 1e-3)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise SystemExit(f"--{name} must be at least {low}, not {getattr(args, name)}.")
    args.out = args.out or ("drawn" if args.prompts else "out.png")
    for path in (args.trajectory, None if args.prompts else args.out):
        if path and Path(path).suffix.lower() not in Image.registered_extensions():
            raise SystemExit(f"cannot tell the kind of picture from {path!r}: end it in .png, .jpg or .gif.")
    device = pick_device(args.device)
    model, config = load_student(args.model, device)
    encoders = FrozenEncoders(args.teacher or config["encoders"], device, gemma=config.get("gemma"))
    check_encoders(config, encoders)
    decoder = pick_decoder(args.decoder, encoders)
    if args.resolution:
        step = encoders.factor * 2 ** (len(model.cfg.channels) - 1)
        if args.resolution < step or args.resolution % step:
            raise SystemExit(f"--resolution must be a multiple of {step} for this model, not {args.resolution}.")
        config = {**config, "latent_size": [args.resolution // encoders.factor] * 2}

    steps_seen = []
    remember = (lambda i, t, x, x0: steps_seen.append((t, x[:1], x0[:1]))) if args.trajectory else None
    everything = [prompt for prompt in prompts for _ in range(args.n)]
    seeds = [args.seed + i % args.n for i in range(len(everything))]
    if args.prompts:  # a file's lines are different drawings, not one drawing in different words
        seeds = [args.seed + i for i in range(len(everything))]
    pictures = draw_pictures(
        model,
        config,
        encoders,
        everything,
        seeds,
        args.steps,
        args.guidance,
        args.shift,
        callback=remember,
        decoder=decoder,
    )

    if args.prompts:
        write_folder(args.out, pictures, everything)
    elif len(everything) == 1:
        save_atomically(pictures[0].save, args.out)
    else:
        rows = [pictures[i * args.n : (i + 1) * args.n] for i in range(len(prompts))]
        save_atomically(captioned_grid(rows, prompts, scale=2).save, args.out)
    if args.trajectory:
        steps_seen = steps_seen[: len(steps_seen) // -(-len(everything) // 64)]  # the first batch only
        noisy = to_pictures(decoder.decode_latents(torch.cat([x for _, x, _ in steps_seen])))
        clean = to_pictures(decoder.decode_latents(torch.cat([x0 for _, _, x0 in steps_seen])))
        if args.trajectory.lower().endswith(".gif"):
            frames = [
                captioned_grid([[a, b]], [f"t = {t:.2f}"], 3)
                for (t, _, _), a, b in zip(steps_seen, noisy, clean, strict=True)
            ]
            durations = [120] * (len(frames) - 1) + [1500]
            save_atomically(
                lambda p: frames[0].save(p, save_all=True, append_images=frames[1:], duration=durations, loop=0),
                args.trajectory,
            )
        else:
            save_atomically(
                captioned_grid([noisy, clean], ["x_t, from noise to picture", "predicted x_0"]).save, args.trajectory
            )
        print(f"wrote {args.trajectory}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
