"""The figures that runs leave: curves of log.csv, and grids of pictures."""

import itertools
import math
import warnings

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


def enlarge(picture, side=256):
    """Small pictures for large screens: as often as the shorter side goes into `side`, each pixel a square. So
    nothing is invented, and reduce() by the same factor gives the true pixels back."""
    factor = max(1, side // min(picture.size))
    return picture.resize([factor * n for n in picture.size], Image.Resampling.NEAREST)


def font_for(text, size=12):
    """(font, letters it lacks): DejaVu Sans, which matplotlib brings along; or the first of the system's fonts
    that has every letter of the text, if there is one."""
    from matplotlib import font_manager

    letters = {letter for letter in text if letter.isprintable() and not letter.isspace()}

    def lacks(path):
        try:
            charmap = font_manager.get_font(path).get_charmap()
            ImageFont.truetype(path, size)  # fonts of bitmaps have other sizes
        except (OSError, RuntimeError):
            return letters
        return {letter for letter in letters if ord(letter) not in charmap}

    usual = font_manager.findfont("DejaVu Sans")
    fonts = font_manager.fontManager.ttflist
    others = sorted({font.fname for font in fonts if "Last Resort" not in font.name})  # that: boxes
    best = next((path for path in [usual, *others] if not lacks(path)), usual)
    return ImageFont.truetype(best, size), "".join(sorted(lacks(best)))


def wrap(text, font, width, most=3):
    """At most `most` lines of the text, none wider than `width` pixels; "..." where the rest is left out. A word
    that is too wide is cut, as are scripts that have no spaces."""
    lines = [""]
    for word in text.split():
        for k, piece in enumerate([word] if font.getlength(word) <= width else word):
            longer = lines[-1] + (" " if k == 0 and lines[-1] else "") + piece
            if font.getlength(longer) <= width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(piece)
        if len(lines) > most:
            break
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "..."]
    return lines


def captioned_grid(rows, captions, scale=1):
    """A picture of rows of equally large pictures, each row under its caption, which is no wider than the grid."""
    width, height = (side * scale for side in rows[0][0].size)
    whole = max(len(row) for row in rows) * (width + 4) + 8
    line, labels, lacking = 16, [], set()
    for caption in captions:
        font, missing = font_for(caption)
        labels.append((font, wrap(caption, font, whole - 12)))
        lacking |= {*missing}
    if lacking:
        boxes = "".join(sorted(lacking))
        warnings.warn(f"no font of this system has all letters of the labels: boxes stand for {boxes}", stacklevel=2)
    tops = list(itertools.accumulate((line * len(lines) + height + 10 for _, lines in labels), initial=4))
    grid = Image.new("RGB", (whole, tops[-1] + 2), "white")
    pen = ImageDraw.Draw(grid)
    for row, (font, lines), top in zip(rows, labels, tops, strict=False):
        for k, words in enumerate(lines):
            pen.text((6, top + line * k), words, fill="black", font=font)
        for c, picture in enumerate(row):
            scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
            grid.paste(scaled, (6 + c * (width + 4), top + line * len(lines) + 4))
    return grid


def save_trajectory(times, noisy, clean, path):
    """A denoising as a film (.gif) or a strip: x_t (S, C, h, w) of S times, S pictures of the predicted x_0.

    x_t is shown as it is, a cell a square: decoded, noise would look like some strange picture. Red, green and
    blue are the three directions in which the last x_t, the drawn one, varies most.
    """
    noisy = noisy.float().cpu()
    drawn = noisy[-1].flatten(1)  # (C, h * w)
    directions = torch.linalg.svd(drawn - drawn.mean(1, keepdim=True))[0][:, :3]  # (C, 3)
    colors = torch.einsum("schw,ck->skhw", noisy, directions)
    film = path.lower().endswith(".gif")
    clean = [enlarge(picture, 256 if film else 128) for picture in clean]
    noisy = to_pictures(colors / 3)  # noise is within -3 and 3
    noisy = [x.resize(clean[0].size, Image.Resampling.NEAREST) for x in noisy]
    if not film:
        labels = ["x_t: three directions in the latent as red, green, blue", "predicted x_0"]
        save_atomically(captioned_grid([noisy, clean], labels).save, path)
        return
    frames = [captioned_grid([pair], [f"t = {t:.2f}: x_t, the predicted x_0"])
              for t, *pair in zip(times, noisy, clean, strict=True)]  # fmt: skip
    how = dict(save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [1500], loop=0)
    save_atomically(lambda p: frames[0].save(p, **how), path)


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
