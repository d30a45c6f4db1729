"""The detector on pictures whose truth is known, and the score's arithmetic."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import evaluate
from common.distances import kid
from common.shapes import COLORS, FAMILIES, ShapesWorld, draw, make_scene
from evaluate import NOVEL_FAMILIES, check_detector, detect, falsify, holds, interval, is_on_side, score


def test_detector_on_1000_true_and_falsified_captions():
    right, fooled = check_detector(1000)
    assert right >= 0.99 and fooled <= 0.05


def test_detector_measures_what_was_drawn():
    for i in range(50):
        scene = make_scene("val", 2, i, "two")
        for thing in scene.things:
            found = [d for d in detect(draw(scene)) if d.shape == thing.shape]
            assert len(found) == 1 and found[0].color == thing.color
            assert abs(found[0].x - thing.x) < 1.5 and abs(found[0].y - thing.y) < 1.5


def test_falsified_captions_differ_in_one_word():
    rng = np.random.default_rng(1)
    for i in range(200):
        caption = make_scene("val", 0, i).caption
        wrong = falsify(caption, rng)
        assert sum(a != b for a, b in zip(caption.split(), wrong.split(), strict=True)) == 1


def test_empty_and_strange_pictures_hold_nothing():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for picture in (Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "black"), noise):
        assert not holds("a photo of a circle", detect(picture))


def test_something_more_is_something_wrong():
    scene = make_scene("val", 0, 3, "counting")
    found = detect(draw(scene))
    assert holds(scene.caption, found)
    assert not holds(scene.caption, found[1:]) and not holds(scene.caption, [*found, found[0]])


def test_two_phrases_need_two_objects():
    one_of_each = detect(draw(make_scene("val", 0, 0, "two")))
    shape = one_of_each[0].shape
    assert not holds(f"a photo of a {shape} and a {shape}", one_of_each)


@pytest.mark.parametrize(("dx", "dy", "sides"), [(-20, 0, {"left of"}), (20, 2, {"right of"}), (0, -20, {"above"}),
                                                 (3, 20, {"below"}), (-20, -20, {"left of", "above"}), (1, 1, set())])  # fmt: skip
def test_sides_are_genevals(dx, dy, sides):
    a, b = (evaluate.Detection("circle", "red", 30 + x, 30 + y, 10, 10, 1.0) for x, y in ((dx, dy), (0, 0)))
    assert {r for r in ("left of", "right of", "above", "below") if is_on_side(a, b, r)} == sides


def test_score_of_true_pictures_and_of_shuffled_ones():
    items = [ShapesWorld("val", 0, 12, family)[i] for family in FAMILIES for i in range(12)]
    pictures, captions = [list(x) for x in zip(*items, strict=True)]
    result = score(pictures, captions)
    assert result["overall"] == 1.0 and set(result["families"]) == set(FAMILIES)
    assert 0 < result["chance"] < 0.3 and result["families"]["single"]["chance"] == pytest.approx(0.25, abs=0.15)
    shifted = score(pictures[12:] + pictures[:12], captions)  # every picture under a caption of another family
    assert shifted["overall"] < 0.2


def test_purity_is_the_share_of_the_main_color():
    picture = Image.new("RGB", (64, 64), (240, 240, 240))
    picture.paste(COLORS["red"], (20, 20, 40, 40))
    picture.paste(COLORS["blue"], (20, 20, 25, 40))  # without the outline 4 of 18 columns
    (found,) = detect(picture)
    assert found.color == "red" and found.purity == pytest.approx(14 / 18, abs=0.01)
    result = score([picture, draw(make_scene("val", 0, 0))], ["a photo of a red square", "a photo of a star"])
    assert 14 / 18 < result["purity"] < 1 and f"color purity  {result['purity']:7.3f}" in evaluate.table(result, "")
    assert score([Image.new("RGB", (64, 64), "white")], ["a photo of a star"])["purity"] == 0  # nothing found


def test_wilson_interval():
    low, high = interval(50, 100)
    assert (low, high) == (pytest.approx(0.404, abs=0.001), pytest.approx(0.596, abs=0.001))
    assert interval(0, 100)[0] == pytest.approx(0) and interval(100, 100)[1] == pytest.approx(1)


def test_prompts_are_balanced_and_novel_ones_name_a_color():
    assert len(evaluate.prompts_of("val", 3, 0)) == 18
    assert len(evaluate.prompts_of("novel", 3, 0)) == 3 * len(NOVEL_FAMILIES)


def test_kid_by_its_definition():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=g).double(), torch.randn(4, 3, generator=g).double() + 1
    k = lambda x, y: float((x @ y) / 3 + 1) ** 3  # noqa: E731
    within = [
        sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    between = sum(k(x, y) for x in a for y in b) / 20
    assert kid(a, b) == pytest.approx(within[0] + within[1] - 2 * between)


def test_kid_and_diversity_tell_a_world_from_its_blurred_and_its_collapsed_version():
    """The world's own pictures have a KID near 0; blurred ones do not; one picture for all prompts has no diversity."""
    args = evaluate.parse_arguments(["x", "--per-family", "8"])
    world = [ShapesWorld("val", 7, 8, family)[i][0] for family in FAMILIES for i in range(8)]
    blurred = [picture.filter(ImageFilter.GaussianBlur(2)) for picture in world]

    def various(prompts, seed):
        return [world[(seed + i) % len(world)] for i in range(len(prompts))]

    def collapsed(prompts, seed):
        return [world[0]] * len(prompts)

    good = evaluate.likeness(world, various, args, torch.device("cpu"))
    bad = evaluate.likeness(blurred, collapsed, args, torch.device("cpu"))
    assert good["kid"] < 0.5 * bad["kid"] and abs(good["kid_of_real"]) < 0.5 * bad["kid"]
    assert bad["diversity"] == pytest.approx(0, abs=1e-5) and good["diversity"] > 0.5


def test_evaluates_a_folder_of_pictures(tmp_path, capsys):
    rows = []
    for i in range(6):
        picture, caption = ShapesWorld("val", 0, 6)[i]
        picture.save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    evaluate.main([str(tmp_path), "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["val"]["overall"] == 1.0
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a cat"}))
    with pytest.raises(SystemExit, match="captions of the shapes world only"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="--kid needs a model"):
        evaluate.main([str(tmp_path), "--kid"])
    with pytest.raises(SystemExit, match="no such folder"):
        evaluate.main([str(tmp_path / "nowhere")])
