"""The drawings: valid SVG whose numbers are the code's, and whose words do not lie on each other."""

import dataclasses
import io
import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

import decoder
import flow
from course import figures
from course.figures import DRAWINGS
from model import PRESETS

ROOT = Path(__file__).parent.parent


def words_of(svg):
    """The lines of text in an SVG file of ours. They stand in it as comments, since letters are paths."""
    tree = ElementTree.fromstring(svg, ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True)))
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    return sorted(node.text.strip() for node in tree.iter() if node.tag is ElementTree.Comment)


@pytest.fixture(scope="module")
def drawn():
    """{name: (words of the SVG, places of the texts, [(box, those in it)], canvas)}, each drawn once."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, draw in DRAWINGS.items():
            figure, file = draw(), io.BytesIO()
            figure.savefig(file, format="svg")
            texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
            places = {text: text.get_window_extent() for text in texts}
            boxes = [p.get_window_extent() for p in figure.findobj(FancyBboxPatch) if p.get_visible()]
            found[name] = words_of(file.getvalue()), places, boxes, figure.bbox
            figures.pyplot().close(figure)
    return found


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_committed_drawing_says_what_the_code_says(name, drawn):
    svg = (ROOT / "assets" / "readme" / f"drawing_{name}.svg").read_bytes()
    assert words_of(svg) == drawn[name][0], f"make it anew: python -m course.figures {name}"
    assert b"<image" not in svg and b"fill: #ffffff" in svg  # drawn, on a ground of its own


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_words_lie_on_each_other_or_leave_their_box(name, drawn):
    _, places, boxes, canvas = drawn[name]
    assert len(places) > 5
    for (a, here), (b, there) in itertools.combinations(places.items(), 2):
        assert not here.padded(-1).overlaps(there.padded(-1)), f"{a.get_text()!r} lies on {b.get_text()!r}"
    for text, place in places.items():
        assert canvas.x0 <= place.x0 and place.x1 <= canvas.x1 and canvas.y0 <= place.y0 and place.y1 <= canvas.y1, text.get_text()
        middle = (place.x0 + place.x1) / 2, (place.y0 + place.y1) / 2
        for box in boxes:
            if box.contains(*middle):
                assert box.x0 <= place.x0 and place.x1 <= box.x1, f"{text.get_text()!r} is wider than its box"
                assert box.y0 <= place.y0 and place.y1 <= box.y1, f"{text.get_text()!r} is higher than its box"


def test_another_preset_makes_another_drawing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(PRESETS, "t2i", dataclasses.replace(PRESETS["t2i"], channels=(192, 384, 704), depth=(1, 2, 5)))
    monkeypatch.setitem(decoder.PRESETS, "sd3", dataclasses.replace(decoder.PRESETS["sd3"], channels=(256, 128, 96, 32)))
    figures.main(["unet", "decoder", "--out", str(tmp_path)])
    unet, tiny = (" ".join(words_of((tmp_path / f"drawing_{name}.svg").read_bytes())) for name in ("unet", "decoder"))
    assert "704 channels, 32 x 32" in unet and "ResBlock, 5 x [SA, CA, FFN]" in unet and "896 channels" not in unet
    assert "128: 3 blocks, up" in tiny and "1.37 M" not in tiny and "5236 GMACs" in tiny  # SD3's stays as it is


def test_the_numbers_are_those_of_the_pages(drawn):
    """What the drawings say of the paper's sizes, beside README's table and page 1's."""
    words = {name: " ".join(lines) for name, (lines, *_) in drawn.items()}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    million = re.search(r"`--size t2i` \| ([\d.]+) M", readme)[1]
    assert f"{million} M" in words["phone"] and "1.37 M" in words["phone"]
    ladder = (ROOT / "course" / "1_unet.md").read_text(encoding="utf-8")
    for step in figures.PANELS:
        params, macs = re.search(rf"^{step} +([\d.]+) +[\d.]+ +(\d+)", ladder, flags=re.M).groups()
        assert f"{float(params):.0f} M parameters, {macs} GMACs" in words["ladder"]


def test_the_world_of_two_pictures_has_the_velocity_that_flow_matching_learns():
    """The average of eps - x_0 over lines through x_t, from a million of them."""
    g = torch.Generator().manual_seed(0)
    x0, eps = 2.0 * torch.randint(2, (10**6,), generator=g) - 1, torch.randn(10**6, generator=g)
    for t, x in ((0.9, 0.4), (0.6, -0.7), (0.3, 0.1)):
        x_t = flow.interpolate(x0, eps, torch.full((10**6,), t))
        near = (x_t - x).abs() < 0.02
        found = figures.two_pictures(torch.full((1, 1, 1, 1), x), torch.tensor([t])).item()
        assert found == pytest.approx(flow.velocity(x0, eps)[near].mean().item(), abs=0.05)


def test_a_name_that_is_none_ends_in_one_sentence():
    with pytest.raises(SystemExit, match="there is no drawing 'unit'; there are unet, ladder"):
        figures.main(["unit"])


# ------------------------------------------------------------------------------------------------------------------
# Every figure on a page


PAGES = [ROOT / "README.md", *sorted((ROOT / "course").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [(page, name) for page in PAGES
         for name in re.findall(r"assets/readme/([\w.-]+)\)", page.read_text(encoding="utf-8"))]  # fmt: skip


def command_of(name):
    kind, rest = name.split("_", 1) if "_" in name else ("", "")
    if kind == "drawing":
        return f"python -m course.figures {rest.removesuffix('.svg')}"
    if kind == "failure":
        return f"python -m studies.failures {rest.removesuffix('.png')}"
    return figures.MEASURED[name]


@pytest.mark.parametrize(("page", "name"), SHOWN, ids=lambda value: getattr(value, "stem", value))
def test_the_command_of_every_figure_stands_on_its_page(page, name):
    text = " ".join(page.read_text(encoding="utf-8").split())
    if page.name == "0_plan.md":  # it lists the pages' own figures
        assert any(name == other and elsewhere != page for elsewhere, other in SHOWN)
    else:
        assert command_of(name) in text, f"{page.name} shows {name}, and does not say that {command_of(name)} makes it"


def test_no_figure_lies_about_that_no_page_shows():
    there = {path.name for path in (ROOT / "assets" / "readme").iterdir()}
    assert there == {name for _, name in SHOWN}
    assert {name for name in there if name.startswith("drawing_")} == {f"drawing_{name}.svg" for name in DRAWINGS}
