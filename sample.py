"""Draw pictures from text with a trained student: noise -> Euler steps along the velocity -> latent -> picture.

    python sample.py "a photo of a red circle above a blue square" --model assets/zoo/fm --seed 0 --out out.png
    python sample.py "a photo of a star" "a photo of two blue squares" --n 4 --out grid.png # a captioned grid
    python sample.py "a photo of a star" --trajectory path.gif              # the denoising, step by step
    python sample.py --prompts prompts.txt --out drawn/                     # one PNG a line, for evaluate.py

Pictures of fewer than 256 pixels are scaled up to be looked at. The last form keeps the pixels as they are,
and writes metadata.jsonl (file_name, text) beside them, which evaluate.py and train_fm.py --data read. It goes
on where it was stopped, runs on several GPUs by torchrun, and knows the prompts of GenEval, DPG-Bench, ImageNet:

    torchrun --nproc_per_node 8 -- sample.py --prompts evaluation_metadata.jsonl --n 4 --model runs/t2i \
        --out geneval
    torchrun --nproc_per_node 8 -- sample.py --prompts LOC_synset_mapping.txt --n 50 --model runs/imagenet \
        --out adm --npz adm.npz
"""

import math
import warnings
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import flow
from common import arguments, benchmarks, parallel
from common.arguments import integer
from common.checkpoint import check_encoders, load_student, save_atomically
from common.device import autocast, pick_device
from common.encoders import FrozenEncoders, hash_folders
from common.figures import captioned_grid, enlarge, save_trajectory
from common.pictures import to_pictures
from common.seeds import rng
from decoder import load_decoder


def load(folder, device, teacher=None, decoder=None):
    """(student, its config, encoders, decoder). `teacher`: an SD3 folder, if not the one in the config."""
    model, config = load_student(folder, device)
    encoders = FrozenEncoders.of(config, device, teacher)
    check_encoders(config, encoders)
    return model, config, encoders, pick_decoder(decoder, encoders)


def pick_decoder(folder, encoders):
    """The tiny decoder in `folder`; without one the encoders, whose decoder is the teacher's."""
    if folder is None:
        return encoders
    decoder, config = load_decoder(folder, encoders.device)
    check_encoders(config, encoders)
    return decoder


def denoise(model, config, encoders, prompts, seeds, steps=None, guidance=None, shift=None, interval=None):
    """Draw one batch and let the caller look on: yields what flow.euler_steps does. See draw_pictures()."""
    sampling = config["sampling"]
    times = sampling.get("times") if steps is None and shift is None else None
    steps = sampling["steps"] if steps is None else steps
    guidance = sampling["guidance"] if guidance is None else guidance
    shift = sampling["shift"] if shift is None else shift
    interval = interval or sampling.get("guidance_interval", (0, 1))
    device, shape = encoders.device, (model.cfg.latent_channels, *config["latent_size"])
    noise = torch.stack([torch.randn(shape, generator=rng(seed)) for seed in seeds]).to(device)  # (B, C, h, w)
    text = encoders.student_text(prompts, model.cfg.text_dim)
    empty = encoders.student_text([""] * len(prompts), model.cfg.text_dim)
    states = flow.euler_steps(model, noise, text, empty, steps, guidance, shift, times, interval)
    while True:
        with autocast(device):  # around the step, not the yield: what the caller does is not our business
            state = next(states, None)
        if state is None:
            return
        yield state


@torch.no_grad()
def draw_pictures(model, config, encoders, prompts, seeds, steps=None, guidance=None, shift=None, batch=64,
                  callback=None, decoder=None, interval=None):  # fmt: skip
    """One picture (PIL) per prompt. `seeds` holds one integer a prompt: a picture depends on these two alone.

    steps, guidance, shift and interval (of guidance) default to the sampling settings in the student's config,
    with the very times if it names them (stage 3 does); `decoder` (anything with decode_latents, such as
    decoder.TinyDecoder) to the encoders' own. `callback` is called with each (t, x_t, predicted x_0) of
    denoise(), for the first `batch` prompts. On a GPU the UNet runs in bfloat16.
    """
    pictures = []
    bar = tqdm(range(0, len(prompts), batch), desc="drawing", disable=True if len(prompts) <= batch else None)
    for start in bar:
        some = slice(start, start + batch)
        how = steps, guidance, shift, interval
        for t, latents, x0 in denoise(model, config, encoders, prompts[some], seeds[some], *how):
            if callback is not None and start == 0:
                callback(t, latents, x0)
        pictures += decode(decoder or encoders, latents)
    return pictures


def decode(decoder, latents):
    """Model latents (B, 16, h, w) -> pictures (PIL), in parts: 64 of 64 pixels at once, or 1 of 512 and more."""
    parts = latents.split(max(1, 64**2 // math.prod(latents.shape[2:])))
    return [picture for part in parts for picture in to_pictures(decoder.decode_latents(part))]


def parse_arguments(argv=None):
    example = 'python sample.py "a photo of a red circle above a blue square" --seed 0 --out out.png'
    p = arguments.Parser(__doc__, example)
    p.add_argument("text", nargs="*", metavar="PROMPT", help="what to draw; several make a grid, one row each")
    p.add_argument("--prompts", metavar="FILE",
                   help="draw a file's lines, or a benchmark's prompts, into the folder --out")  # fmt: skip
    p.add_argument("--model", metavar="DIR", default="assets/zoo/fm", help="a student's folder")
    p.add_argument("--teacher", metavar="DIR", help="SD3 folder with the encoders, if not that of its config")
    arguments.add_sampling(p)
    p.add_argument("--n", type=integer(1), default=1,
                   help="pictures per prompt, from seeds seed, seed + 1, ...; --prompts counts on")  # fmt: skip
    p.add_argument("--batch", type=integer(1), default=64, help="pictures at once")
    p.add_argument("--seed", type=integer(0), default=0, help="of the noise")
    p.add_argument("--resolution", type=integer(1), help="side in pixels, if not the one trained on")
    p.add_argument("--true-size", action="store_true",
                   help="leave pictures as they are drawn, as --prompts always does; without it those of fewer "
                        "than 256 pixels are scaled up, each pixel to a square (nearest)")  # fmt: skip
    p.add_argument("--trajectory", metavar="FILE",
                   help="also save x_t and predicted x_0 of each step: .gif, or .png for a strip")  # fmt: skip
    p.add_argument("--npz", metavar="FILE", help="with --prompts: all pictures in one file, too, for ADM")
    p.add_argument("--out", metavar="PATH", help="picture (default: out.png), or folder (default: drawn)")
    arguments.add_device(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if not args.text and not args.prompts:
        raise SystemExit('nothing to draw: give a prompt ("a photo of a red circle") or --prompts FILE.')
    if args.prompts and (args.text or args.trajectory):
        raise SystemExit("--prompts FILE draws the file's: leave other prompts and --trajectory out.")
    if args.npz and not args.prompts:
        raise SystemExit("--npz is for --prompts FILE: give one, or leave it out.")
    if any(not prompt.strip() for prompt in args.text):
        warnings.warn("an empty prompt draws whatever the model likes best", stacklevel=2)
    out = args.out or ("drawn" if args.prompts else "out.png")
    for path in (args.trajectory, None if args.prompts else out):
        if path and Path(path).suffix.lower() not in Image.registered_extensions():
            raise SystemExit(f"cannot tell the kind of picture from {path!r}: end it in .png, .jpg or .gif.")
    device = pick_device(args.device)
    model, config, encoders, decoder = load(args.model, device, args.teacher, args.decoder)
    if args.resolution:
        step = encoders.factor * 2 ** (len(model.cfg.channels) - 1)
        if args.resolution < step or args.resolution % step:
            raise SystemExit(f"--resolution must be a multiple of {step} here, not {args.resolution}.")
        config = {**config, "latent_size": [args.resolution // encoders.factor] * 2}

    def draw(prompts, seeds, callback=None):
        return draw_pictures(model, config, encoders, prompts, seeds, args.steps, args.guidance, args.shift,
                             args.batch, callback, decoder, args.guidance_interval)  # fmt: skip

    if args.prompts:
        names = "model teacher prompts n steps guidance guidance_interval shift seed resolution decoder"
        settings = {name: getattr(args, name) for name in names.split()}
        weights = [Path(args.model) / name for name in ("model.safetensors", "config.json")]
        settings["weights"] = hash_folders([*weights, *([args.decoder] if args.decoder else [])])
        benchmarks.draw_files(draw, args.prompts, args.n, args.seed, args.batch, settings, Path(out), args.npz)
        return
    seen = []  # (t, x_t, predicted x_0) before each step and after the last, of the first prompt
    prompts = [prompt for prompt in args.text for _ in range(args.n)]
    seeds = [args.seed + i % args.n for i in range(len(prompts))]
    remember = (lambda t, x, x0: seen.append((t, x[:1], x0[:1]))) if args.trajectory else None
    pictures = draw(prompts, seeds, remember)
    if not args.true_size:
        pictures = [enlarge(picture) for picture in pictures]
    if args.trajectory:
        times, noisy, clean = zip(*seen, strict=True)
        save_trajectory(times, torch.cat(noisy), decode(decoder, torch.cat(clean)), args.trajectory)
        print(f"wrote {args.trajectory}")
    whole = pictures[0]
    if len(pictures) > 1:
        rows = [pictures[i : i + args.n] for i in range(0, len(pictures), args.n)]
        whole = captioned_grid(rows, args.text)
    save_atomically(whole.save, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    parallel.launch(main)
