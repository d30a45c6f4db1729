"""The pieces of a page that is one file: elements, tables, curves as SVG, pictures as data. course/report.py puts them together.

What is text stays text: a string inside an element is escaped by the standard library's ElementTree, so nothing that a file says
can become markup. Nothing is fetched: style and script stand in the page, and its own policy forbids every address but data:.
"""

import base64
import hashlib
import io
import math
from pathlib import Path
from xml.etree import ElementTree

from matplotlib.ticker import LogLocator, MaxNLocator

from common.figures import stack

HERE = Path(__file__).parent
DASH = "–"
WIDTH, HEIGHT = 340, 190  # of a chart, in units of its text: on a phone one unit is one pixel
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 8, 20
MOST_POINTS = 300  # of a curve


def h(tag, *inside, **attributes):
    """An element. `inside`: elements, strings, lists of them; None is left out. class_ stands for class, x_y for x-y."""
    element = ElementTree.Element(tag, {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()})
    waiting = list(inside)
    while waiting:
        child = waiting.pop(0)
        if isinstance(child, list | tuple):
            waiting[:0] = child
        elif isinstance(child, ElementTree.Element):
            element.append(child)
        elif child is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + str(child)
        elif child is not None:
            element.text = (element.text or "") + str(child)
    return element


def document(title, *body):
    """The whole page as text."""
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8-sig") for kind in ("css", "js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # this script and no other
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    page = h("html",
             h("head", h("meta", charset="utf-8"), h("meta", name="viewport", content="width=device-width, initial-scale=1"),
               h("meta", http_equiv="Content-Security-Policy", content=policy), h("title", title), h("style", style)),
             h("body", h("main", *body), h("script", script)), lang="en")  # fmt: skip
    return "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def table(label, head, rows, numeric=()):
    """A table that scrolls within itself. `rows`: lists of cells, or (class, list of cells); `numeric`: columns aligned right."""

    def cells(tag, row):
        found = [h(tag, cell, class_="n" if i in numeric else "t") for i, cell in enumerate(row)]
        if tag == "td":
            found[0].tag = "th"
            found[0].set("scope", "row")
        return found

    rows = [row if isinstance(row, tuple) else ("", row) for row in rows]
    body = [h("tr", cells("td", row), class_=kind) if kind else h("tr", cells("td", row)) for kind, row in rows]
    return h("div", h("table", h("caption", label, class_="hidden"), h("thead", h("tr", cells("th", head))), h("tbody", body)),
             class_="scroll", tabindex="0", role="region", aria_label=label)  # fmt: skip


def path_name(path):
    """A path that may break after each slash."""
    first, *others = str(path).split("/")
    return h("b", first, [["/", h("wbr"), part] for part in others])


def hint(*inside):
    """What an empty section says; text between backticks is a command."""
    parts = "".join(inside).split("`")
    return h("p", [h("code", part) if i % 2 else part for i, part in enumerate(parts)], class_="hint")


def problem(text):
    return h("p", text, class_="problem")


# ------------------------------------------------------------------------------------------------------------------
# Curves


def number(value):
    return f"{value:.4g}"


def thin(points):
    """At most MOST_POINTS of the points (step, value): means of neighbours, at the step of their last."""
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts] or points


def chart(title, series, ramp=False):
    """A figure with the curves {label: [(step, value), ...]}: logarithmic where the values are positive and span a factor of 4.

    A curve of few points, measured now and then, has dots. With `ramp` the curves are an ordered row, from light to dark.
    None when there is no point at all.
    """
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    xs, ys = ([point[k] for points in series.values() for point in points] for k in (0, 1))
    log = min(ys) > 0 and max(ys) > 4 * min(ys)
    scale = math.log if log else float
    low, high, left, right = scale(min(ys)), scale(max(ys)), min(xs), max(xs)
    room = 0.05 * (high - low) or 0.5
    low, high = low - room, high + room

    def at(x, y):
        return (LEFT + (WIDTH - LEFT - RIGHT) * ((x - left) / (right - left) if right > left else 0.5),
                TOP + (HEIGHT - TOP - BOTTOM) * (high - scale(y)) / (high - low))  # fmt: skip

    inside = []
    for y in ticks(min(ys), max(ys), log):
        _, height = at(left, y)
        inside += [h("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{height:.1f}", y2=f"{height:.1f}", class_="grid"),
                   h("text", f"{y:.6g}", x=LEFT - 6, y=f"{height + 3.5:.1f}", text_anchor="end")]  # fmt: skip
    for x in (x for x in MaxNLocator(4, integer=True).tick_values(left, right) if left <= x <= right):
        inside.append(h("text", f"{x:,.0f}", x=f"{at(x, ys[0])[0]:.1f}", y=HEIGHT - 5, text_anchor="middle"))
    most, legend = max(map(len, series.values())), []
    for k, (label, points) in enumerate(series.items()):
        look = {"class_": f"curve ramp{k}" if ramp else f"curve s{k}"}
        places = [at(*point) for point in thin(points)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dots = [h("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.2) for x, y in places] if len(points) < most / 2 or most < 3 else []
        inside.append(h("g", h("path", d=path), dots, **look))
        swatch = h("svg", h("g", h("path", d="M0 5H18"), **look), viewBox="0 0 18 10", width=18, height=10, aria_hidden="true")
        legend.append(h("li", swatch, f"{label} ", h("b", number(points[-1][1]))))
    said = [f"{label} {number(p[0][1])} at step {p[0][0]}, {number(p[-1][1])} at step {p[-1][0]}" for label, p in series.items()]
    drawing = h("svg", inside, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}, over steps: {'; '.join(said)}")
    return h("figure", h("figcaption", title), drawing, h("ul", legend, class_="legend"), class_="chart")


def ticks(low, high, log):
    """Round numbers between low and high, four or five of them."""
    for locator in (LogLocator(subs=(1, 2, 5)), LogLocator(), MaxNLocator(4)) if log else (MaxNLocator(4),):
        found = [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]
        if 2 <= len(found) < 7:
            break
    return found


# ------------------------------------------------------------------------------------------------------------------
# Pictures


def image(picture, alt, most_bytes, side=1024):
    """An <img> of a picture (PIL) at most `side` pixels wide and high: a PNG, or a JPEG where that is above `most_bytes`, smaller
    and smaller until it is not."""
    picture = picture.copy()
    picture.thumbnail((side, side))
    data, kind = encoded(picture, "PNG"), "png"
    while len(data) > most_bytes and max(picture.size) > 32:
        if kind == "jpeg":
            picture = picture.resize([max(1, side * 3 // 4) for side in picture.size])
        data, kind = encoded(picture, "JPEG", quality=85), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return h("img", src=source, alt=alt, width=picture.width, height=picture.height)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, optimize=True, **options)
    return file.getvalue()


def folded(strip, columns=4):
    """A row of square pictures (PIL), as the runs write them, in rows of `columns`; any other picture as it is."""
    side, (n, rest) = strip.height, divmod(strip.width, strip.height)
    if rest or n <= columns or n % columns:
        return strip
    tiles = [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(n)]
    return stack([tiles[i : i + columns] for i in range(0, n, columns)])


def evenly(items, most):
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
