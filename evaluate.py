"""mini-GenEval: does the picture show what the caption says? GenEval's rules on the shapes world.

Find the objects in the pixels, then ask whether the caption holds: the right objects, how many, which color, which side,
and nothing else. Six families, as in GenEval; the score is the mean of the six. It measures composition in a world of
four shapes and says nothing about photographs: it is called mini-GenEval everywhere, and never GenEval.

    python evaluate.py assets/zoo/fm                 # a student: draws 100 prompts a family, then looks
    python evaluate.py assets/toy-sd3                # a diffusers pipeline, drawn by diffusers: the teacher
    python evaluate.py assets/zoo/fm --kid           # also: distance to the world's own pictures (KID), and diversity
    python evaluate.py drawn/                        # a folder of pictures with captions (from sample.py --prompts)
    python evaluate.py drawn/ --fid real/            # FID and KID of two folders of pictures of one size, by torch-fidelity
    python evaluate.py --detector                    # the detector itself, on 1,000 pictures whose truth is known

Beside each score stands its chance level: the same pictures judged by the other captions of their family. `novel` are
prompts with color-shape pairs that training never contained.
"""

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

import flow
from common import arguments, parallel
from common.arguments import integer
from common.benchmarks import write_folder
from common.checkpoint import save_atomically, save_json
from common.device import describe_machine, pick_device
from common.distances import FEATURES, Perceptual, diversity, fid_and_kid, kid, picture_features
from common.shapes import COLORS, FAMILIES, SHAPES, SIDE, ShapesWorld, family_of, parse_caption, shape_outline
from common.sources import CaptionedFolder
from sample import draw_pictures, load

NOVEL_FAMILIES = ("counting", "colors", "position", "attribution")  # those whose captions name a color and a shape

# ------------------------------------------------------------------------------------------------------------------
# The detector


@dataclass(frozen=True)
class Detection:
    """A found object: centre (x, y) of its box and the box's size, in pixels; overlap with its template, 0..1; purity, 0..1:
    the share of its pixels, without the outline, whose nearest color is the object's."""

    shape: str
    color: str
    x: float
    y: float
    width: float
    height: float
    overlap: float
    purity: float = 1.0


def _templates(size=32):
    """Each shape as a boolean mask that fills a (size, size) box, as any detection is scaled to."""
    masks = {}
    for shape in SHAPES:
        points = np.array(shape_outline(shape, 0.0, 0.0, 1.0))
        points = (points - points.min(0)) / (points.max(0) - points.min(0)) * size * 8
        big = Image.new("L", (size * 8, size * 8))
        ImageDraw.Draw(big).polygon([tuple(p) for p in points], fill=255)
        masks[shape] = np.asarray(big.reduce(8)) > 127
    return masks


TEMPLATES = _templates()
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)


def detect(picture):
    """All objects in an RGB picture (PIL) of the shapes world, largest first."""
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)  # (64, 64, 3)
    background = np.median(pixels.reshape(-1, 3), axis=0)  # objects never cover half of the picture
    distance = np.linalg.norm(pixels - background, axis=-1)
    nearest = np.linalg.norm(pixels[:, :, None] - PALETTE, axis=-1).argmin(-1)  # (64, 64)
    full = np.linalg.norm(PALETTE - background, axis=-1)
    labels, n = ndimage.label(distance > 0.5 * full.min())
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[box] == index
        if inside.sum() < 16:
            continue  # a speck
        core = ndimage.binary_erosion(inside, iterations=1)
        core = core if core.sum() >= 6 else inside
        votes = np.bincount(nearest[box][core], minlength=len(PALETTE))
        color = int(votes.argmax())
        one_color = votes[color] >= 0.6 * votes.sum()
        # How much of each pixel is object, 0 to 1; the outline is where it is half, found to a quarter of a pixel.
        y0, x0 = max(box[0].start - 1, 0), max(box[1].start - 1, 0)
        y1, x1 = min(box[0].stop + 1, SIDE), min(box[1].stop + 1, SIDE)
        near = ndimage.binary_dilation(labels == index, iterations=1)[y0:y1, x0:x1]
        coverage = np.where(near, np.clip(distance[y0:y1, x0:x1] / full[color], 0, 1), 0)
        mask = ndimage.zoom(coverage, 4, order=1, grid_mode=True, mode="nearest") > 0.5
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        crop = Image.fromarray((mask[top:bottom, left:right] * 255).astype(np.uint8))
        crop = np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR)) > 127
        overlaps = {shape: (crop & t).sum() / (crop | t).sum() for shape, t in TEMPLATES.items()}
        shape = max(overlaps, key=overlaps.get)
        width, height = (right - left) / 4, (bottom - top) / 4
        good = overlaps[shape] > 0.7 and 0.6 < width / height < 1.6
        found.append(Detection(
            shape if good else "unknown", list(COLORS)[color] if one_color else "mixed",
            float(x0 + (left + right) / 8), float(y0 + (top + bottom) / 8), float(width), float(height), float(overlaps[shape]),
            float(votes[color] / votes.sum()),
        ))  # fmt: skip
    return sorted(found, key=lambda d: -d.width * d.height)


def holds(caption, detections):
    """True if the detections are exactly what the caption says, and nothing else is there."""
    phrases, relation = parse_caption(caption)
    wanted = [phrase for phrase in phrases for _ in range(phrase.count)]
    if len(detections) != len(wanted):
        return False
    return any(  # some way to tell which object is which
        all(d.shape == p.shape and p.color in (None, d.color) for d, p in zip(order, wanted, strict=True))
        and (relation is None or is_on_side(order[0], order[1], relation))
        for order in itertools.permutations(detections)
    )


def is_on_side(first, second, relation):
    """GenEval's rule: a small overlap along an axis does not count, and 60 degrees to either side of an axis do."""
    offset = np.array([first.x - second.x, first.y - second.y])
    slack = 0.1 * np.array([first.width + second.width, first.height + second.height])
    offset = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0)
    if not offset.any():
        return False
    x, y = offset / np.linalg.norm(offset)
    return bool({"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}[relation])


def falsify(caption, rng):
    """The caption with one word exchanged so that it is false of its picture: a shape, color, number or side."""
    words = caption.split()
    kinds = [tuple(SHAPES), tuple(COLORS), ("two", "three", "four"), ("left", "right"), ("above", "below")]
    kinds.append(tuple(f"{shape}s" for shape in SHAPES))
    places = [(i, kind) for i, word in enumerate(words) for kind in kinds if word in kind]
    i, kind = places[rng.integers(len(places))]
    others = [word for word in kind if word != words[i]]
    return " ".join([*words[:i], others[rng.integers(len(others))], *words[i + 1 :]])


def check_detector(n=1000, seed=1):
    """Shares of n pictures (a fifth of them novel) whose caption, and whose falsified caption, the detector accepts."""
    rng, right, fooled = np.random.default_rng(0), 0, 0
    for i in range(n):
        picture, caption = ShapesWorld("novel" if i % 5 == 0 else "val", seed, n)[i]
        found = detect(picture)
        right += holds(caption, found)
        fooled += holds(falsify(caption, rng), found)
    return right / n, fooled / n


# ------------------------------------------------------------------------------------------------------------------
# The score


def interval(right, n):
    """Wilson's 95 % interval of a share."""
    p, z = right / n, 1.96
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def score(pictures, captions):
    """mini-GenEval of pictures with captions: {"families": {...}, "overall", "chance", "interval", "pictures", "purity"}.

    Each family has score, interval (95 %, Wilson), chance and n. Overall is the mean of the families that occur; its interval is
    the normal one, to which a family at 0 or 1 adds nothing. Purity is the mean of all found objects: below 1 where an object has
    corners or patches of another color.
    """
    found = [detect(picture) for picture in pictures]
    families = {}
    for family in FAMILIES:
        members = [i for i, caption in enumerate(captions) if family_of(caption) == family]
        if not members:
            continue
        right = sum(holds(captions[i], found[i]) for i in members)
        other = [holds(captions[j], found[i]) for i in members for j in members if i != j]
        families[family] = {
            "score": right / len(members), "interval": [float(v) for v in interval(right, len(members))],
            "chance": float(np.mean(other)) if other else 0.0, "n": len(members),
        }  # fmt: skip
    overall = float(np.mean([f["score"] for f in families.values()]))
    objects = [thing.purity for things in found for thing in things]
    error = np.sqrt(sum(f["score"] * (1 - f["score"]) / f["n"] for f in families.values())) / len(families)
    return {
        "overall": overall, "interval": [max(0.0, float(overall - 1.96 * error)), min(1.0, float(overall + 1.96 * error))],
        "chance": float(np.mean([f["chance"] for f in families.values()])), "families": families, "pictures": len(pictures),
        "purity": float(np.mean(objects)) if objects else 0.0,
    }  # fmt: skip


def prompts_of(split, per_family, seed):
    """per_family captions of every family that `split` has, from the shapes world."""
    families = NOVEL_FAMILIES if split == "novel" else FAMILIES
    return [ShapesWorld(split, seed, per_family, family).caption(i) for family in families for i in range(per_family)]


def table(result, title):
    """The families and the overall score as text."""
    lines = [title, f"{'':14}{'score':>7}   {'95 % interval':15}{'chance':>7}{'n':>6}"]
    overall = {**result, "score": result["overall"], "n": result["pictures"]}
    for name, f in [*result["families"].items(), ("overall", overall)]:
        low, high = f["interval"]
        lines.append(f"{name:14}{f['score']:7.3f}   {low:.3f} to {high:.3f} {f['chance']:7.3f}{f['n']:6}")
    lines.append(f"{'color purity':14}{result['purity']:7.3f}   share of an object's pixels that have its main color")
    return "\n".join(lines)


def likeness(pictures, draw, args, device):
    """{"kid", "kid_of_real", "diversity"}: do they look like the world's pictures, and differ from each other? A model that drew
    one good circle every time would have the best score: KID and diversity notice. `kid_of_real` is that of another draw."""
    perceptual = Perceptual("effnet").to(device)

    def world(seed):
        return [ShapesWorld("val", seed, args.per_family, f)[i][0] for f in FAMILIES for i in range(args.per_family)]

    sets = (world(args.seed), world(args.seed + 1), pictures)
    real, other, drawn = (picture_features(p, perceptual.net, device) for p in sets)
    spread = diversity(draw, prompts_of("val", 3, 2), perceptual, device)
    return {"kid": kid(drawn, real), "kid_of_real": kid(other, real), "diversity": spread}


# ------------------------------------------------------------------------------------------------------------------
# Who draws


def draw_with_diffusers(folder, device, steps=None, guidance=None, shift=None):
    """diffusers' own StableDiffusion3Pipeline as a function prompts -> pictures: its networks, loop and noise.

    Two of its habits would make it another experiment than a student's: times and guidance are flow.py's.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline  # seconds to import

    class Pipeline(StableDiffusion3Pipeline):
        """Guides at every scale but 1. diffusers guides above 1 alone: with 0 and 0.5 it draws as with 1."""

        do_classifier_free_guidance = property(lambda self: self.guidance_scale != 1)

    try:
        pipe = Pipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    except Exception as error:  # each library has its own for a damaged file
        raise SystemExit(f"diffusers cannot load {folder}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    # Left alone, the scheduler of diffusers 0.42 shifts twice: it spaces its times evenly between shifted ends,
    # shift_timesteps(1) and shift_timesteps(1/1000), and shifts them again. With a shift of 3 the last of 28 steps
    # begins at t = 0.009, a student's at 0.1. One that shifts nothing visits the times that it is given.
    steps, shift = steps or 28, shift or pipe.scheduler.config.shift
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    times = flow.sampling_timesteps(steps, shift)[:-1].tolist()  # it adds the 0 itself
    guidance = 3.0 if guidance is None else guidance

    def draw(prompts, seed):
        pictures = []
        for start in range(0, len(prompts), 50):
            some = prompts[start : start + 50]
            generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(some))]
            pictures += pipe(some, num_inference_steps=steps, sigmas=times, guidance_scale=guidance,
                             generator=generators).images  # fmt: skip
            print(f"\rdrew {len(pictures)} of {len(prompts)}", end="", flush=True)
        print()
        return pictures

    return draw


def draw_with_student(folder, device, steps=None, guidance=None, shift=None, interval=None, teacher=None, decoder=None):
    """A student folder as a function prompts -> pictures: the arguments are sample.py's flags."""
    model, config, encoders, decoder = load(folder, device, teacher, decoder)

    def draw(prompts, seed):
        seeds = [seed * 100_003 + i for i in range(len(prompts))]
        return draw_pictures(model, config, encoders, prompts, seeds, steps, guidance, shift, decoder=decoder,
                             interval=interval)  # fmt: skip

    return draw


def parse_arguments(argv=None):
    p = arguments.Parser(__doc__, "python evaluate.py assets/zoo/fm --no-novel --per-family 40")
    p.add_argument("target", metavar="DIR", nargs="?", help="a student, a diffusers SD3 pipeline, or pictures with captions")
    p.add_argument("--per-family", type=integer(1), default=100, help="prompts a family")
    arguments.add_sampling(p)
    p.add_argument("--no-novel", action="store_true", help="leave the novel split out (it adds two thirds of the time)")
    p.add_argument("--teacher", metavar="DIR", help="SD3 folder with the encoders, if not the one in the student's config")
    p.add_argument("--seed", type=integer(0), default=0, help="of the prompts and the noise")
    p.add_argument("--kid", action="store_true", help="also print KID to the world's own pictures, and diversity")
    p.add_argument("--fid", metavar="DIR", help="instead: FID and KID of the folder to this folder of real pictures")
    p.add_argument("--inception", metavar="FILE", help="Inception's weights for --fid; default: torch-fidelity fetches them")
    p.add_argument("--detector", action="store_true", help="check the detector instead, on 1,000 pictures")
    p.add_argument("--out", metavar="DIR", help="keep the pictures with their captions, table.txt and report.json here")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments.add_device(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.detector:
        right, fooled = check_detector()
        print(f"the detector accepts {right:.3f} of 1000 true captions, and {fooled:.3f} with one word exchanged")
        return
    if args.target is None:
        raise SystemExit("nothing to evaluate: give a student, a diffusers pipeline, or a folder of captioned pictures.")
    target, device, start = Path(args.target), pick_device(args.device), time.time()
    report = {"target": str(target), "seed": args.seed, "machine": describe_machine(device)}
    if not target.is_dir():
        raise SystemExit(f"no such folder: {target}. Give a student, a diffusers pipeline, or a folder of captioned pictures.")
    if args.fid:
        report["fid"] = fid_and_kid(target, args.fid, args.inception, device)
        print("FID {fid:.3f}, KID {kid:.5f}, of {pictures} pictures or more".format(**report["fid"]))
        if args.json:
            print(json.dumps(report))
        return
    if (target / "model_index.json").is_file() or (target / "model.safetensors").is_file():
        how = args.steps, args.guidance, args.shift
        if (target / "model_index.json").is_file():
            if args.guidance_interval or args.decoder:
                raise SystemExit("a diffusers pipeline has its own decoder, and guides at all times: leave out "
                                 "--decoder and --guidance-interval.")  # fmt: skip
            draw = draw_with_diffusers(target, device, *how)
        else:
            draw = draw_with_student(target, device, *how, args.guidance_interval, args.teacher, args.decoder)
        for split in ("val",) if args.no_novel else ("val", "novel"):
            prompts = prompts_of(split, args.per_family, args.seed)
            pictures = draw(prompts, args.seed + (split == "novel"))
            report[split] = score(pictures, prompts)
            if args.kid and split == "val":
                report["likeness"] = likeness(pictures, draw, args, device)
            if args.out:
                write_folder(Path(args.out) / split, pictures, prompts)
    elif args.kid:
        raise SystemExit("--kid needs a model that draws, not a folder of pictures.")
    else:
        folder = CaptionedFolder(target, SIDE)
        captions = [folder.caption(i) for i in range(len(folder))]
        try:
            report["val"] = score([folder[i][0] for i in range(len(folder))], captions)
        except ValueError as error:
            raise SystemExit(f"mini-GenEval reads captions of the shapes world only: {error}") from error
    report["seconds"] = round(time.time() - start, 1)
    title = f"mini-GenEval of {target}, seed {args.seed}, {report['machine']}, {report['seconds']} s"
    text = table(report["val"], title)
    if "novel" in report:
        text += "\n\n" + table(report["novel"], "novel: color-shape pairs that never occur in training")
    if args.kid:
        text += ("\n\nKID to the world's own pictures: {kid:.4f} (another draw of the world: {kid_of_real:.4f}); diversity, the "
                 "mean perceptual distance between 8 pictures of one prompt: {diversity:.3f}\nfeatures: {features}"
                 .format(**report["likeness"], features=FEATURES))  # fmt: skip
    print("\n" + text)
    if args.out:
        save_atomically(lambda p: p.write_text(text + "\n", encoding="utf-8"), Path(args.out) / "table.txt")
        save_json(report, Path(args.out) / "report.json")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    parallel.launch(main)
