"""The figures that runs leave: curves of log.csv, and grids of pictures."""

import math

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont

from common.checkpoint import save_atomically
from common.distances import psnr
from common.pictures import to_pictures, to_tensor


def pyplot():
    """matplotlib, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def curves(log, path, *panels, histogram=None):
    """One figure with a panel for each of `panels`: (title, {label: column of log.csv}, "linear" or "log").

    Columns that are measured now and then (NaN in between) are drawn as dots; a panel of which nothing was measured is left out.
    `histogram` is (title, {label: values (N,)}).
    """
    plt = pyplot()
    panels = [p for p in panels if not all(math.isnan(v) for column in p[1].values() for v in log.column(column))] or panels[:1]
    n = len(panels) + (histogram is not None)
    figure, axes = plt.subplots(1, n, figsize=(8, 4.5) if n == 1 else (4.3 * n, 3.8), squeeze=False)
    steps = log.column("step")
    for axis, (title, columns, scale) in zip(axes[0], panels, strict=False):
        for label, column in columns.items():
            points = [(s, v) for s, v in zip(steps, log.column(column), strict=True) if not math.isnan(v)]
            if points:
                axis.plot(*zip(*points, strict=True), "o-" if len(points) < len(steps) / 2 else "-", label=label, ms=4)
        axis.set(title=title, xlabel="step", yscale=scale)
    if histogram is not None:
        for label, values in histogram[1].items():
            axes[0][-1].hist(values.numpy(), bins=40, alpha=0.5, label=label)
        axes[0][-1].set(title=histogram[0])
    save_figure(figure, path)


def save_figure(figure, path):
    """Legends, tight borders, written beside and renamed."""
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, framealpha=0.5)
    figure.tight_layout()
    save_atomically(figure.savefig, path)
    pyplot().close(figure)


def stack(rows):
    """Rows of equally large pictures as one picture."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            whole.paste(picture, (c * width, r * height))
    return whole


def captioned_grid(rows, captions, scale=1):
    """A picture of rows of equally large pictures, each row under its caption."""
    font = ImageFont.load_default(13)
    width, height = (side * scale for side in rows[0][0].size)
    text_width = max(int(font.getlength(caption)) for caption in captions)
    grid = Image.new("RGB", (max(text_width, len(rows[0]) * (width + 4)) + 12, len(rows) * (height + 26) + 6), "white")
    pen = ImageDraw.Draw(grid)
    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = r * (height + 26) + 4
        pen.text((6, top), caption, fill="black", font=font)
        for c, picture in enumerate(row):
            grid.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (6 + c * (width + 4), top + 20))
    return grid


def side_by_side(pictures, autoencoder, decoder, device, count, scale=2):
    """A grid, a row a picture: original | teacher's decoder | tiny decoder | difference of the two decoders x 4."""
    rows, captions = [], []
    for i in range(min(count, len(pictures))):
        x = to_tensor([pictures[i][0]]).to(device)
        latents = autoencoder.encode_pictures(x)
        restored = [autoencoder.decode_latents(latents), decoder.decode_latents(latents)]
        row = to_pictures(torch.cat([x, *restored]))
        difference = ImageChops.difference(row[1], row[2]).point(lambda v: min(255, 4 * v))
        rows.append([*row, difference])
        theirs, ours = (psnr(r, x).item() for r in restored)
        captions.append(f"original | teacher {theirs:.1f} dB | tiny {ours:.1f} dB | difference x 4")
    return captioned_grid(rows, captions, scale)
