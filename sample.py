"""Draw pictures from text with a trained student: noise -> Euler steps along the velocity -> latent -> picture.

    python sample.py "a photo of a red circle above a blue square" --model assets/zoo/fm --seed 0 --out out.png
    python sample.py "a photo of a star" "a photo of two blue squares" --n 4 --out grid.png     # a captioned grid
    python sample.py "a photo of a star" --trajectory path.gif                                  # the denoising, step by step
    python sample.py --prompts prompts.txt --out drawn/                                         # one PNG a line, for evaluate.py

The last form writes metadata.jsonl (file_name, text) beside the pictures, which evaluate.py and train_fm.py --data read. It goes
on where it was stopped, runs on several GPUs by torchrun, and knows GenEval's, DPG-Bench's and ImageNet's prompts:

    torchrun --nproc_per_node 8 -- sample.py --prompts evaluation_metadata.jsonl --n 4 --model runs/t2i --out geneval
    torchrun --nproc_per_node 8 -- sample.py --prompts LOC_synset_mapping.txt --n 50 --model runs/imagenet --out adm --npz adm.npz
"""

import json
import math
import warnings
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import flow
from common import arguments, benchmarks, parallel
from common.arguments import integer
from common.checkpoint import check_encoders, load_student, save_atomically, save_json
from common.device import autocast, pick_device
from common.encoders import FrozenEncoders, hash_folders
from common.figures import captioned_grid
from common.pictures import to_pictures
from common.seeds import rng
from decoder import load_decoder


def denoise(model, config, encoders, prompts, seeds, steps=None, guidance=None, shift=None):
    """Draw one batch and let the caller look on: yields what flow.euler_steps does. The arguments are draw_pictures()'s."""
    sampling = config["sampling"]
    times = sampling.get("times") if steps is None and shift is None else None
    steps = sampling["steps"] if steps is None else steps
    guidance = sampling["guidance"] if guidance is None else guidance
    shift = sampling["shift"] if shift is None else shift
    device, width, shape = encoders.device, model.cfg.text_dim, (model.cfg.latent_channels, *config["latent_size"])
    noise = torch.stack([torch.randn(shape, generator=rng(seed)) for seed in seeds]).to(device)
    text, empty = (encoders.student_text(captions, width) for captions in (prompts, [""] * len(prompts)))
    interval = sampling.get("guidance_interval", (0, 1))
    states = flow.euler_steps(model, noise, text, empty, steps, guidance, shift, times, interval)
    while True:
        with autocast(device):  # around the step, not the yield: what the caller does in between is not our business
            state = next(states, None)
        if state is None:
            return
        yield state


@torch.no_grad()
def draw_pictures(model, config, encoders, prompts, seeds, steps=None, guidance=None, shift=None, batch=64, callback=None,
                  decoder=None):  # fmt: skip
    """One picture (PIL) per prompt. `seeds` holds one integer a prompt: a picture depends on its prompt and seed alone.

    steps, guidance and shift default to the sampling settings in the student's config, with the very times if it names them
    (stage 3 does) and its interval of guidance; `decoder` (anything with decode_latents, such as decoder.TinyDecoder) to the
    encoders' own. `callback` is called with each (t, x_t, predicted x_0) of denoise(), for the first `batch` prompts. On a GPU
    the UNet runs in bfloat16.
    """
    pictures = []
    bar = tqdm(range(0, len(prompts), batch), desc="drawing", disable=True if len(prompts) <= batch else None)
    for start in bar:
        some = slice(start, start + batch)
        for t, latents, x0 in denoise(model, config, encoders, prompts[some], seeds[some], steps, guidance, shift):
            if callback is not None and start == 0:
                callback(t, latents, x0)
        pictures += decode(decoder or encoders, latents)
    return pictures


def decode(decoder, latents):
    """Model latents (B, 16, h, w) -> pictures (PIL), in parts that fit in memory: 64 of 64 pixels, or one of 512 and more."""
    at_once = max(1, 64**2 // math.prod(latents.shape[2:]))
    return [picture for part in latents.split(at_once) for picture in to_pictures(decoder.decode_latents(part))]


def pick_decoder(folder, encoders):
    """The tiny decoder in `folder`, on the encoders' device; without one the encoders, whose decoder is the teacher's."""
    if folder is None:
        return encoders
    decoder, config = load_decoder(folder, encoders.device)
    check_encoders(config, encoders)
    return decoder


def draw_files(model, config, encoders, args, decoder):
    """Draw every prompt of --prompts into --out, in the layout that common/benchmarks.py finds for it. What is there stays."""
    layout, pictures, names = benchmarks.plan(args.prompts, args.n, args.seed)
    names_of_flags = "model teacher prompts n steps guidance guidance_interval shift seed resolution decoder"
    settings = {name: getattr(args, name) for name in names_of_flags.split()}
    files = [Path(args.model) / name for name in ("model.safetensors", "config.json")]
    settings |= {"weights": hash_folders([*files, *([args.decoder] if args.decoder else [])]),
                 "captions": hash_folders([Path(args.prompts).absolute()])}  # fmt: skip
    out = Path(args.out)
    with parallel.first_alone():
        path = out / "settings.json"
        if path.is_file() and (old := json.loads(path.read_text())) != settings:
            changed = [f"{k} was {old.get(k)}, is {v}" for k, v in settings.items() if old.get(k) != v]
            raise SystemExit(f"{out} holds other pictures: {'; '.join(changed)}. Give another --out, or delete it.")
        if parallel.rank() == 0:
            save_json(settings, path)
    mine = pictures[parallel.rank() :: parallel.world()]
    todo = [(out / path, prompt, seed) for path, prompt, seed in mine if not (out / path).is_file()]
    bar = tqdm(total=len(todo), desc="drawing", unit=" pictures", disable=None if parallel.rank() == 0 else True)
    for start in range(0, len(todo), args.batch):
        paths, prompts, seeds = zip(*todo[start : start + args.batch], strict=True)
        drawn = draw_pictures(model, config, encoders, prompts, seeds, args.steps, args.guidance, args.shift, args.batch,
                              decoder=decoder)  # fmt: skip
        for path, picture in zip(paths, drawn, strict=True):
            save_atomically(picture.save, path)
        bar.update(len(paths))
    bar.close()
    parallel.wait()
    if parallel.rank() == 0:
        benchmarks.finish(out, layout, pictures, names)
        if args.npz:
            benchmarks.write_npz(out, pictures, args.npz)
        print(f"wrote {len(pictures)} pictures to {out}" + (f", and {args.npz}" if args.npz else ""))


def save_trajectory(steps, decoder, path):
    """The denoising as a film (.gif) or a strip: x_t and the predicted x_0 of [(t, x_t (1, C, h, w), x_0), ...]."""
    noisy, clean = (decode(decoder, torch.cat(xs)) for xs in zip(*((x, x0) for _, x, x0 in steps), strict=True))
    if not path.lower().endswith(".gif"):
        save_atomically(captioned_grid([noisy, clean], ["x_t, from noise to picture", "predicted x_0"]).save, path)
        return
    pairs = zip(steps, noisy, clean, strict=True)
    frames = [captioned_grid([[a, b]], [f"t = {t:.2f}"], 3) for (t, _, _), a, b in pairs]
    film = dict(save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [1500], loop=0)
    save_atomically(lambda p: frames[0].save(p, **film), path)


def parse_arguments(argv=None):
    p = arguments.Parser(__doc__, 'python sample.py "a photo of a red circle above a blue square" --seed 0 --out out.png')
    p.add_argument("text", nargs="*", metavar="PROMPT", help="what to draw; several make a grid, one row each")
    p.add_argument("--prompts", metavar="FILE", help="draw a file's lines, or a benchmark's prompts, into the folder --out")
    p.add_argument("--model", metavar="DIR", default="assets/zoo/fm", help="a student's folder")
    p.add_argument("--teacher", metavar="DIR", help="SD3 folder with the encoders, if not the one named in the student's config")
    arguments.add_sampling(p)
    p.add_argument("--n", type=integer(1), default=1,
                   help="pictures per prompt, from seeds seed, seed + 1, ...; --prompts counts on")  # fmt: skip
    p.add_argument("--batch", type=integer(1), default=64, help="pictures at once")
    p.add_argument("--seed", type=integer(0), default=0, help="of the noise")
    p.add_argument("--resolution", type=integer(1), help="side of the picture in pixels, if not the one trained on")
    p.add_argument("--trajectory", metavar="FILE", help="also save x_t and predicted x_0 of each step: .gif, or .png for a strip")
    p.add_argument("--npz", metavar="FILE", help="with --prompts: also all pictures in one file, for ADM's FID")
    p.add_argument("--out", metavar="PATH", help="picture (default: out.png), or folder with --prompts (default: drawn)")
    arguments.add_device(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    prompts = args.text
    if not prompts and not args.prompts:
        raise SystemExit('nothing to draw: give a prompt, such as "a photo of a red circle", or --prompts FILE.')
    if args.prompts and (prompts or args.trajectory):
        raise SystemExit("--prompts FILE draws the prompts of the file: leave other prompts and --trajectory out.")
    if args.npz and not args.prompts:
        raise SystemExit("--npz is for --prompts FILE: give one, or leave it out.")
    if any(not prompt.strip() for prompt in prompts):
        warnings.warn("an empty prompt draws whatever the model likes best", stacklevel=2)
    args.out = args.out or ("drawn" if args.prompts else "out.png")
    for path in (args.trajectory, None if args.prompts else args.out):
        if path and Path(path).suffix.lower() not in Image.registered_extensions():
            raise SystemExit(f"cannot tell the kind of picture from {path!r}: end it in .png, .jpg or .gif.")
    device = pick_device(args.device)
    model, config = load_student(args.model, device)
    encoders = FrozenEncoders.of(config, device, args.teacher)
    check_encoders(config, encoders)
    if args.guidance_interval:
        config["sampling"]["guidance_interval"] = args.guidance_interval
    decoder = pick_decoder(args.decoder, encoders)
    if args.resolution:
        step = encoders.factor * 2 ** (len(model.cfg.channels) - 1)
        if args.resolution < step or args.resolution % step:
            raise SystemExit(f"--resolution must be a multiple of {step} for this model, not {args.resolution}.")
        config = {**config, "latent_size": [args.resolution // encoders.factor] * 2}

    if args.prompts:
        draw_files(model, config, encoders, args, decoder)
        return
    seen = []  # (t, x_t, predicted x_0) before each step and after the last, of the first prompt
    remember = (lambda t, x, x0: seen.append((t, x[:1], x0[:1]))) if args.trajectory else None
    everything = [prompt for prompt in prompts for _ in range(args.n)]
    seeds = [args.seed + i % args.n for i in range(len(everything))]
    pictures = draw_pictures(model, config, encoders, everything, seeds, args.steps, args.guidance, args.shift, args.batch,
                             remember, decoder)  # fmt: skip
    if len(everything) == 1:
        save_atomically(pictures[0].save, args.out)
    else:
        rows = [pictures[i * args.n : (i + 1) * args.n] for i in range(len(prompts))]
        save_atomically(captioned_grid(rows, prompts, scale=2).save, args.out)
    if args.trajectory:
        save_trajectory(seen, decoder, args.trajectory)
        print(f"wrote {args.trajectory}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    parallel.launch(main)
