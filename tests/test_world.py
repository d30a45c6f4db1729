"""The class world: the same picture for the same item, captions that read back, contrast, speed; the detector
on known truth."""

import json
import time

import numpy as np
import pytest

from common import detector
from common.detector import check_detector, detect, falsify, holds
from common.things import THINGS, Kind, shade
from common.world import (
    COLORS,
    CONTRAST,
    FAMILIES,
    NOVEL_PAIRS,
    SIDE,
    Look,
    ThingsWorld,
    check_things,
    draw,
    family_of,
    make_scene,
    parse_caption,
    read_geneval,
    sprite,
    unknown_words,
    write_caption,
)  # fmt: skip


def test_an_item_is_always_the_same_picture():
    first, again = ThingsWorld("train", 3, 100), ThingsWorld("train", 3, 100)
    assert [first[i][1] for i in (7, 3)] == [again[7][1], again[3][1]]
    assert first[5][0].tobytes() == again[5][0].tobytes() and first[5][0].size == (SIDE, SIDE)
    assert ThingsWorld("train", 4, 100)[5][0].tobytes() != first[5][0].tobytes()


@pytest.mark.parametrize("split", ["train", "val", "novel"])
def test_captions_read_back_and_pairs_are_kept_apart(split):
    for i in range(400):
        scene = make_scene(split, 0, i)
        phrases, relation = parse_caption(scene.caption)
        assert write_caption(phrases, relation) == scene.caption and family_of(scene.caption) == scene.family
        pairs = {(thing.color, thing.look.name) for thing in scene.things}
        assert bool(pairs & NOVEL_PAIRS) == (split == "novel")
        assert not unknown_words(scene.caption)


def test_colors_in_life_are_no_novel_pair():
    for color, name in NOVEL_PAIRS:
        for rgb in THINGS[name].colors:
            nearest = min(COLORS, key=lambda c: np.linalg.norm(np.subtract(COLORS[c], rgb)))
            assert nearest != color, f"an ordinary {name} is {color}, which no training picture may show"


@pytest.mark.parametrize("caption", [
    "a photo of a cat", "a photo of a red apple", "a photo of three dogs", "a photo of a cat and a clock",
    "a photo of a giraffe left of a car", "a photo of a purple dog and a black chair", "a photo of an orange",
    "a photo of an orange orange", "a photo of two potted plants", "a photo of four buses",
])  # fmt: skip
def test_genevals_captions_are_read(caption):
    assert write_caption(*parse_caption(caption)) == caption


@pytest.mark.parametrize(
    "text", ["a photo of a red dinosaur", "a photo", "", "two cats and a dog", "a photo of five cats"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a caption of the class world"):
        parse_caption(text)


def test_unknown_words_are_named():
    assert unknown_words("a photo of a red dinosaur above a cup") == ["dinosaur"]


def test_genevals_own_file_is_read_and_what_is_left_out_is_named(tmp_path):
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [{"class": "bus", "count": 3}], "prompt": "a photo of three buses"},
        {"tag": "position", "prompt": "a photo of a dog right of a teddy bear"},
        {"tag": "color_attr", "prompt": "a photo of a purple dog and a black chair"},
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows), "utf-8")
    known, left_out = read_geneval(path)
    assert known == [("counting", rows[1]["prompt"]), ("color_attr", rows[3]["prompt"])]
    assert left_out == {"bench": 1, "teddy": 1}
    path.write_text(json.dumps(rows[0]), "utf-8")
    with pytest.raises(SystemExit, match="names only things of the class world"):
        read_geneval(path)
    path.write_text("no json", "utf-8")
    with pytest.raises(SystemExit, match="is not GenEval's"):
        read_geneval(path)


def test_what_the_caption_does_not_tell_apart_looks_alike():
    for i in range(40):
        scene = make_scene("val", 0, i, "counting")
        assert len({thing.look for thing in scene.things}) == 1 and len(scene.things) > 1


def test_things_stand_out_from_the_ground():
    near = []
    for i in range(300):
        scene = make_scene("train", 0, i)
        ends = np.array(scene.ground[:2])
        near += [np.linalg.norm(ends - np.array(thing.look.rgb), axis=1).min() for thing in scene.things]
    assert np.mean(np.array(near) >= CONTRAST[0]) > 0.97 and min(near) > 0.5 * CONTRAST[0]


@pytest.mark.parametrize("name", THINGS)
def test_a_thing_fills_its_box_and_is_whole(name):
    from scipy import ndimage

    for pose in ((0.0,) * 4, (0.99,) * 4, (0.3, 0.7, 0.2, 0.8)):
        _, cover = sprite(Look(name, (200, 40, 40), pose, False, 40.0))
        mask = cover[..., 0] > 0.5
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 66 <= extent <= 84, f"{name} should fill the box [-1, 1], 80 pixels here: it has {extent}"
        assert 0.08 < mask.mean() < 0.95
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1, f"{name} falls into pieces"


@pytest.mark.parametrize(("draw_it", "says"), [
    (lambda p, c, u: None, "draws nothing"),
    (lambda p, c, u: p.box(-1.4, -1.4, 1.4, 1.4, c), "fills the picture"),
])  # fmt: skip
def test_a_thing_that_draws_nothing_or_too_much_is_named(draw_it, says, monkeypatch):
    monkeypatch.setitem(THINGS, "blob", Kind(draw_it, ((200, 40, 40),)))
    sprite.cache_clear()
    with pytest.raises(SystemExit, match=f"the thing 'blob' {says}"):
        check_things.__wrapped__()


def test_shades_are_affine_in_the_color():
    for k in (0.6, 0.85, 1.3, 1.55):
        dark, light, other = shade((0, 0, 0), k), shade((255, 255, 255), k), shade((100, 150, 50), k)
        expected = [d + (w - d) * v / 255 for d, w, v in zip(dark, light, (100, 150, 50), strict=True)]
        np.testing.assert_allclose(other, expected, atol=1)


def test_drawing_is_fast_enough():
    world = ThingsWorld("train", 9, 1000)
    start = time.process_time()
    for i in range(200):
        world[i]
    assert 200 / (time.process_time() - start) > 250  # 500 a second and more on a quiet core


def test_the_detector_sees_what_is_there():
    accepted = check_detector(n=60)
    assert accepted["true"] >= 0.98
    assert max(share for what, share in accepted.items() if what != "true") <= 0.02, accepted


def test_a_thing_of_two_colors_is_not_accepted_by_a_caption_without_a_color():
    scene = make_scene("val", 0, 4, "single")
    picture = detector.spoil(scene, "mixed", np.random.default_rng(1))
    assert holds(scene.caption, detect(draw(scene))) and not holds(scene.caption, detect(picture))


def test_falsify_changes_the_caption_and_keeps_it_a_caption():
    rng = np.random.default_rng(0)
    for family in FAMILIES:
        for i in range(20):
            caption = make_scene("val", 2, i, family).caption
            assert falsify(caption, rng) != caption and parse_caption(falsify(caption, rng))
