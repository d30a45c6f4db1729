"""What fewer bits a weight cost: size of the packages against decibels and mini-GenEval, mixes of 8 and 4 bits among them.

    python -m studies.bits                                                # runs/step_distill, runs/decoder, or the zoo's
    python -m studies.bits --bits 16 6 --mixed 4.25 4.5 --per-family 100  # other rows, more prompts
    python -m studies.bits --model assets/zoo/fm --decoder assets/zoo/decoder

A row is what export_coreml.py --nbits N or --mixed N writes: text encoder, UNet and decoder, all in so many bits. The packages of
16 bits are exported and verified, the others compressed from them. Every row is read back from disk and interpreted, 64 pictures
at once (mil_interpreter.run_many): decibels of each part beside PyTorch, on what it gets to see while the student draws, and
mini-GenEval of the pictures that the packages draw. Nothing here was measured on a phone.

A mix gives 8 bits to the weights whose 4 would cost most, measured one by one (coreml/compress.py). `random` is the control: as
many bits, to weights that are drawn by lot. Finished rows are kept: call again to go on. Writes bits.json, bits.png and, in --out,
a folder of packages for every row, which an app can take.
"""

import json
import random
import shutil
from pathlib import Path

import torch

import export_coreml
from common.arguments import Parser, integer, real
from common.checkpoint import latest, save_json
from common.device import describe_machine
from common.encoders import hash_folders
from common.figures import pyplot, save_figure
from coreml import mil_interpreter as mil
from coreml.compress import HIGH, LOW, average_bits, choose, compress, decibels, price_of_each, relative_error
from coreml.package import save_package, weight_bytes
from coreml.pipeline import PARTS, Packages, real_inputs
from data import PROMPTS
from evaluate import prompts_of, score


def rows_of(args, prices):
    """{name of a row: what its weights have, {part: bits, or {weight: bits}}}"""
    rows = {str(bits): dict.fromkeys(PARTS, bits) for bits in args.bits}
    lot = random.Random(args.seed)
    by_lot = {part: {name: price | {"error": lot.random() * price["numbers"]} for name, price in some.items()}
              for part, some in prices.items()}  # fmt: skip
    for average in args.mixed:
        rows[f"mixed {average:g}"] = {part: choose(prices[part], average) for part in PARTS}
    for average in args.random:
        rows[f"random {average:g}"] = {part: choose(by_lot[part], average) for part in PARTS}
    return rows


def load(path):
    """A package as coremltools has it in memory."""
    return mil.ct.models.MLModel(str(path), skip_model_load=True)


def measure_prices(args, seen):
    """{part: compress.price_of_each() of its package}, kept in prices.json, one part after the other."""
    path = args.out / "prices.json"
    prices = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    for part in PARTS:
        if part not in prices:
            prices[part] = price_of_each(load(args.out / "16" / f"{part}.mlpackage"), seen[part])
            save_json(prices, path)
    return prices


def make_packages(args, name, bits):
    """The folder of a row: packages of so many bits, and all else that pipeline.Packages and an app read."""
    whole, folder = args.out / "16", args.out / name.replace(" ", "-")
    if folder == whole:
        return whole
    for part in PARTS:
        save_package(compress(load(whole / f"{part}.mlpackage"), bits[part]), folder / f"{part}.mlpackage")
    plan = json.loads((whole / "pipeline.json").read_text(encoding="utf-8-sig"))
    for tokenizer in plan["tokenizers"]:
        shutil.copytree(whole / tokenizer, folder / tokenizer, dirs_exist_ok=True)
    save_json(plan | {"nbits": bits["unet"] if isinstance(bits["unet"], int) else name}, folder / "pipeline.json")
    return folder


def expected_of(parts, seen):
    """{part: {output: (N, *shape)}}: what PyTorch says to all that the parts see, in float32."""
    found = {}
    for name, sizes in parts.items():
        (part,) = sizes.values()
        with torch.no_grad():
            outputs = [part.module(*row) for row in zip(*seen[name].values(), strict=True)]
        outputs = [out if isinstance(out, tuple) else (out,) for out in outputs]
        found[name] = {key: torch.stack(some) for key, some in zip(part.outputs, zip(*outputs, strict=True), strict=True)}
    return found


def measure(folder, seen, expected, prompts):
    """A row's numbers, of its packages on the disk."""
    packages = Packages(folder)
    quality = {part: decibels(relative_error(expected[part], mil.run_many(packages.programs[part], seen[part], function="main")))
               for part in PARTS}  # fmt: skip
    result = score(packages.draw(prompts, range(len(prompts))), prompts)
    return {
        "bytes": {part: weight_bytes(folder / f"{part}.mlpackage") for part in PARTS}, "decibels": quality,
        "score": result["overall"], "interval": result["interval"], "pictures": result["pictures"],
    }  # fmt: skip


def front(rows):
    """Names of the rows that no other beats: each smaller one has a lower score."""
    found, best = [], -1.0
    for name in sorted(rows, key=lambda name: (sum(rows[name]["bytes"].values()), -rows[name]["score"])):
        if rows[name]["score"] > best:
            found, best = [*found, name], rows[name]["score"]
    return found


def print_table(rows, prices, args):
    machine = describe_machine(torch.device("cpu"))
    print(f"\nInterpreted in torch {machine['torch']}, commit {machine['commit']}: {args.model}, {args.decoder}, {args.layout}")
    print(f"{'bits':14}{'MB':>8}{'UNet MB':>9}{'average':>9}{'text dB':>9}{'UNet dB':>9}{'decoder dB':>12}"
          f"   mini-GenEval, {rows[next(iter(rows))]['pictures']} prompts")  # fmt: skip
    best = front(rows)
    for name, row in rows.items():
        low, high = row["interval"]
        cells = "".join(f"{row['decibels'][part]:{width}.1f}" for part, width in zip(PARTS, (9, 9, 12), strict=True))
        print(f"{name:14}{sum(row['bytes'].values()) / 1e6:8.2f}{row['bytes']['unet'] / 1e6:9.2f}{row['average']:9.2f}{cells}"
              f"   {row['score']:.3f} ({low:.3f} to {high:.3f}){'  Pareto' if name in best else ''}")  # fmt: skip
    alone = sum(price["error"] for price in prices["unet"].values())
    print(f"\nThe UNet's {len(prices['unet'])} weights, each alone in {LOW} bits: their errors add up to {decibels(alone):.1f} dB.")
    print(f"{'most error for its size':58}{'numbers':>9}{'dB alone':>10}")
    for name in most_error(prices["unet"])[:10]:
        print(f"{short(name):58}{prices['unet'][name]['numbers']:9}{decibels(prices['unet'][name]['error']):10.1f}")


def most_error(prices):
    return sorted(prices, key=lambda name: -prices[name]["error"] / prices[name]["numbers"])


def short(name):
    return name.removeprefix("p_unet_").removesuffix("_to_fp16").removesuffix("_weight")


def plot(rows, prices, args):
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.3), width_ratios=(1, 1, 1.3))
    kinds = {"same": "o", "mixed": "s", "random": "x"}
    sizes = {name: sum(row["bytes"].values()) / 1e6 for name, row in rows.items()}
    for axis, value in ((axes[0], lambda row: row["score"]), (axes[1], lambda row: row["decibels"]["unet"])):
        for kind, marker in kinds.items():
            some = [name for name in rows if name.split()[0] == kind or (kind == "same" and name.isdigit())]
            label = {"same": "the same bits for all", "mixed": "8 where 4 cost most", "random": "8 by lot"}[kind]
            axis.plot([sizes[n] for n in some], [value(rows[n]) for n in some], marker, label=label if some else None)
            for n in some:
                place = (4, -10) if kind == "same" else (4, 4)
                axis.annotate(n.split()[-1], (sizes[n], value(rows[n])), place, textcoords="offset points", fontsize=8)
    for name, row in rows.items():
        axes[0].plot([sizes[name]] * 2, row["interval"], color="gray", lw=0.7, zorder=0)
    best = front(rows)
    axes[0].plot([sizes[name] for name in best], [rows[name]["score"] for name in best], "k--", lw=0.8, label="Pareto front")
    axes[0].set(title=f"mini-GenEval, {rows[best[0]]['pictures']} prompts, 95 %", xlabel="MB, all three packages")
    axes[1].set(title="the UNet beside PyTorch, dB", xlabel="MB, all three packages")
    average = args.mixed[len(args.mixed) // 2] if args.mixed else LOW
    bits, errors = choose(prices["unet"], average), [100 * price["error"] for price in prices["unet"].values()]
    colors = ["tab:orange" if bits[name] == HIGH else "tab:blue" for name in prices["unet"]]
    axes[2].bar(range(len(errors)), errors, width=1.0, color=colors)
    axes[2].set(title=f"a weight alone in {LOW} bits (orange: {HIGH} in mixed {average:g})", yscale="log",
                ylabel="error, % of the output's energy", xlabel="weights in the order of the program")  # fmt: skip
    save_figure(figure, args.out / "bits.png")


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m studies.bits --bits 16 8 6 4 --mixed 4.5 5 6")
    p.add_argument("--model", metavar="DIR", help="the student; default: runs/step_distill, or the zoo's if there is none")
    p.add_argument("--decoder", metavar="DIR", help="the tiny decoder; default: runs/decoder, or the zoo's if there is none")
    p.add_argument("--gemma", choices=("none",), help="leave Gemma out of a student that was trained with it")
    p.add_argument("--layout", choices=("ane", "standard"), default="ane", help="of the UNet, as in export_coreml.py")
    # rows
    p.add_argument("--bits", type=integer(), choices=(16, 8, 6, 4), nargs="+", default=[16, 8, 6, 4], help="the same for all")
    p.add_argument("--mixed", type=real(LOW, HIGH), nargs="*", default=[4.5, 5.0, 6.0], help="bits on average, 8 where 4 cost most")
    p.add_argument("--random", type=real(LOW, HIGH), nargs="*", default=[5.0], help="bits on average, 8 by lot: the control")
    # measuring
    p.add_argument("--per-family", type=integer(1), default=50, help="mini-GenEval prompts a family")
    p.add_argument("--seed", type=integer(0), default=0, help="of the lot")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/studies/bits"), help="packages, bits.json and bits.png")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    args.model, args.decoder = args.model or latest("step_distill"), args.decoder or latest("decoder")
    settings = {"weights": hash_folders([args.model, args.decoder]), "layout": args.layout, "gemma": args.gemma,
                "per_family": args.per_family, "seed": args.seed}  # fmt: skip
    kept = args.out / "settings.json"
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8-sig")) != settings:
        raise SystemExit(f"{args.out} holds rows of another student, or with other settings: give another --out, or delete it.")
    save_json(settings, kept)
    command = ["--model", args.model, "--decoder", args.decoder, "--layout", args.layout, "--out", str(args.out / "16")]
    command += ["--gemma", args.gemma] if args.gemma else []
    export_coreml.main(command)
    student = export_coreml.trained_student(args.model, args.decoder, gemma=args.gemma)
    plan = export_coreml.plan_of(student, [student.side], 16)
    seen = real_inputs(student.networks["unet"], plan, student.encoders, PROMPTS, student.text, student.mask)
    parts = {name: export_coreml.make_parts(student, name, [student.side], plan["batch"], args.layout) for name in PARTS}
    prices, expected, rows = measure_prices(args, seen), expected_of(parts, seen), {}
    for name, bits in rows_of(args, prices).items():
        path = args.out / name.replace(" ", "-") / "row.json"
        if not path.is_file():
            print(f"-- {name} bits", flush=True)
            folder = make_packages(args, name, bits)
            row = measure(folder, seen, expected, prompts_of("val", args.per_family, 0))
            own = bits["unet"]
            save_json(row | {"average": own if isinstance(own, int) else average_bits(prices["unet"], own)}, path)
        rows[name] = json.loads(path.read_text(encoding="utf-8-sig"))
    print_table(rows, prices, args)
    plot(rows, prices, args)
    machine = describe_machine(torch.device("cpu"))
    report = {"settings": settings, "machine": machine, "rows": rows, "front": front(rows), "prices": prices}
    save_json(report, args.out / "bits.json")
    print(f"\nwrote {args.out}/bits.json, bits.png")


if __name__ == "__main__":
    main()
