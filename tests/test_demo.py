"""The page that draws: its drawings against sample.py's, what it says, and the page itself in a browser where there is one."""

import base64
import io
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flow
import sample
from common.checkpoint import load_student
from common.encoders import FrozenEncoders
from common.seeds import rng
from common.shapes import family_of
from course import demo

ROOT = Path(__file__).parent.parent
FM, FEW = "assets/zoo/fm", "assets/zoo/step_distill"
PROMPTS = ["a photo of a red circle", "a photo of two blue stars"]


@pytest.fixture(scope="module")
def shelf():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield demo.Shelf([FM, FEW], "cpu")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def drawn_by_sample(folder, prompt, seed, **settings):
    model, config = load_student(folder)
    return sample.draw_pictures(model, config, FrozenEncoders(config["encoders"]), [prompt], [seed], **settings)[0]


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_the_last_frame_is_the_picture_of_sample_py_bit_for_bit(shelf):
    recommended, seen = shelf.sampling[FEW], []
    rounds = []
    for films in demo.draw(shelf, PROMPTS[0], 5, [(FM, 3, 2.0), (FEW, *recommended.values())]):
        rounds.append([len(film.frames) for film in films])
    guided, few = films
    steps = recommended["steps"]
    assert rounds == [[min(k, 4), min(k, steps + 1)] for k in range(1, max(4, steps + 1) + 1)]  # a step of each in turn
    assert same(guided.frames[-1][2], drawn_by_sample(FM, PROMPTS[0], 5, steps=3, guidance=2.0))
    assert same(few.frames[-1][2], drawn_by_sample(FEW, PROMPTS[0], 5, callback=lambda t, *_: seen.append(t)))
    assert [t for t, _, _ in few.frames] == seen
    assert (guided.forwards, few.forwards) == (6, steps if recommended["guidance"] == 1 else 2 * steps)
    assert guided.seconds > 0


def test_frames_are_the_noise_the_way_and_the_prediction(shelf):
    """x_t begins as the seed's noise, the first predicted x_0 is what a single step draws, and at t = 0 both are the picture."""
    *_, (film,) = demo.draw(shelf, PROMPTS[1], 7, [(FM, 2, 1.0)])
    model, config = load_student(FM)
    noise = torch.randn((model.cfg.latent_channels, *config["latent_size"]), generator=rng(7))[None]
    assert same(film.frames[0][1], sample.decode(FrozenEncoders(config["encoders"]), noise)[0])
    assert same(film.frames[0][2], drawn_by_sample(FM, PROMPTS[1], 7, steps=1, guidance=1.0))
    assert not same(film.frames[0][2], film.frames[-1][2])
    assert film.frames[-1][0] == 0 and same(film.frames[-1][1], film.frames[-1][2])


def test_two_visitors_at_once_get_their_own_pictures(shelf):
    made = {}

    def visit(prompt, seed):
        *_, made[prompt] = demo.draw(shelf, prompt, seed, [(FM, 4, 3.0)])

    visitors = [threading.Thread(target=visit, args=(prompt, seed)) for seed, prompt in enumerate(PROMPTS)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    for seed, prompt in enumerate(PROMPTS):
        assert made[prompt][0].forwards == 8
        assert same(made[prompt][0].frames[-1][2], drawn_by_sample(FM, prompt, seed, steps=4, guidance=3.0))


def copy_student(target, **changes):
    """The zoo's student with another config.json."""
    shutil.copytree(FM, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return target


def test_times_that_a_config_names_count_until_the_steps_are_changed(tmp_path):
    times = [1.0, 0.4, 0.0]  # no shift gives these
    folder = copy_student(tmp_path / "run", sampling={"steps": 2, "guidance": 1.0, "shift": 3.0, "times": times}).as_posix()
    shelf = demo.Shelf([folder], "cpu")
    for steps, expected in ((2, times), (1, [1.0, 0.0]), (3, flow.sampling_timesteps(3, 3.0).tolist())):
        *_, (film,) = demo.draw(shelf, PROMPTS[0], 0, [(folder, steps, 1.0)])
        assert [t for t, _, _ in film.frames] == pytest.approx(expected)


def test_what_is_offered_and_what_is_not(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    copy_student(runs / "mine", sampling={"steps": 9, "guidance": 1.5, "shift": 1.0})
    (copy_student(runs / "lab" / "cut") / "model.safetensors").write_bytes(b"cut")
    copy_student(runs / "mute", sampling={"steps": 9})
    copy_student(runs / "elsewhere", scaling_factor=9.0)
    shutil.copytree("assets/zoo/decoder", runs / "decoder")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    found = demo.find_students(["runs/nowhere", "runs/mine"])
    assert found[:2] == ["runs/nowhere", "runs/mine"] and found.index(FEW) < found.index(FM) and "runs/decoder" not in found
    own = [folder for folder in found if folder.startswith("runs")]
    shelf = demo.Shelf(own, "cpu")
    assert shelf.sampling == {"runs/mine": {"steps": 9, "guidance": 1.5}}
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" is not offered: ")[0] for line in lines] == [folder for folder in own if folder != "runs/mine"]
    assert "no config.json" in lines[0] and "scaled by 9.0" in capture(lines, "elsewhere") and "guidance" in capture(lines, "mute")
    with pytest.raises(SystemExit, match="no student to draw with"):
        demo.Shelf(["runs/nowhere"], "cpu")


def capture(lines, name):
    return next(line for line in lines if name in line)


def test_a_run_that_went_on_is_read_again(tmp_path):
    folder = copy_student(tmp_path / "run").as_posix()
    shelf = demo.Shelf([folder], "cpu")
    first = shelf.load(folder)[0]
    assert shelf.load(folder)[0] is first
    os.utime(Path(folder) / "model.safetensors", ns=(1, 1))
    assert shelf.load(folder)[0] is not first
    shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="is not a student"):
        next(demo.draw(shelf, PROMPTS[0], 0, [(folder, 2, 1.0)]))


@pytest.mark.parametrize(("prompt", "seed", "steps", "guidance", "said"), [
    ("", 0, 4, 1.0, "Type what you would like to see"),
    (" \n", 0, 4, 1.0, "Type what you would like to see"),
    (None, 0, 4, 1.0, "Type what you would like to see"),
    ("x" * 5001, 0, 4, 1.0, "5,001 characters"),
    ("a star", None, 4, 1.0, "The seed is a whole number"),
    ("a star", -1, 4, 1.0, "The seed is a whole number"),
    ("a star", 0, None, 1.0, "The number of steps"),
    ("a star", 0, 0, 1.0, "The number of steps"),
    ("a star", 0, 4, None, "Guidance is a number"),
    ("a star", 0, 4, float("nan"), "Guidance is a number"),
    ("🐈" * 2000, 0, 4, 3, ""),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said(prompt, seed, steps, guidance, said):
    complaint = demo.complaint(prompt, seed, [(FM, steps, guidance)])
    assert complaint.startswith(said) if not said.startswith("5") else said in complaint
    assert bool(complaint) == bool(said)


@pytest.mark.filterwarnings("ignore:1 captions cut")
def test_absurd_prompts_are_drawn_and_commented(shelf):
    assert demo.remarks(shelf, PROMPTS[0], [FM, FEW]) == ""
    assert "it guesses" in demo.remarks(shelf, "zxqv 🐈", [FM])
    long = "a photo of a red circle " * 80
    limit = shelf.load(FM)[2].max_tokens
    assert f"read {limit}: the rest is not drawn" in demo.remarks(shelf, long, [FM])
    for prompt in ("zxqv 🐈", "🐈" * 2000, long):
        *_, (film,) = demo.draw(shelf, prompt, 0, [(FM, 1, 1.0)])
        assert film.frames[-1][2].size == film.frames[0][2].size and np.asarray(film.frames[-1][2]).std() > 0


def test_examples_are_two_of_each_family():
    assert len(set(demo.EXAMPLES)) == 12
    assert sorted(map(family_of, demo.EXAMPLES)) == sorted(2 * demo.FAMILIES)


def images_of(page):
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]


def test_the_page_shows_the_step_that_is_asked_for(shelf):
    *_, films = demo.draw(shelf, PROMPTS[0], 3, [(FM, 5, 1.0), (FEW, 2, 1.0)])
    shown = demo.show(films, 3)
    long, short = films
    assert f"t = {long.frames[3][0]:.3f}" in shown and "step 3 of 5" in shown and "5 forwards" in shown and "seed 3" in shown
    assert "step 2 of 2" in shown and "2 forwards" in shown  # a shorter film stays at its end
    expected = [*long.frames[3][1:], *short.frames[2][1:]]
    assert all(same(a, b) for a, b in zip(images_of(shown), expected, strict=True))
    films[0].name = "<script>"
    assert "<script>" not in demo.show(films, 0)
    assert "Nothing is drawn yet" in demo.show([], 0)


def test_without_gradio_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements-demo\.txt$"):
        demo.main([])


# ------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture
def browser():
    install = f"{demo.INSTALL} playwright==1.65.2 && playwright install chromium"
    pytest.importorskip("gradio", reason=f"needs Gradio: {install}")
    playwright = pytest.importorskip("playwright.sync_api", reason=f"needs playwright: {install}")
    with playwright.sync_playwright() as running:
        try:
            browser = demo.open_browser(running)
        except playwright.Error as error:
            pytest.skip(f"no browser starts ({str(error).splitlines()[0]}): {install}")
        yield browser
        browser.close()


def set_number(page, label, value, nth=0):
    page.get_by_label(f"number input for {label}").nth(nth).fill(str(value))
    page.get_by_label(f"number input for {label}").nth(nth).press("Enter")


def shown_pictures(page):
    sources = page.eval_on_selector_all("#view img", "images => images.map(image => image.src)")
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]


@pytest.mark.filterwarnings("ignore:1 captions cut")
def test_the_page_in_a_browser(shelf, browser):
    page_server, url = demo.serve(demo.import_gradio(), shelf, "127.0.0.1", None)
    done = "#step input[type=range]:enabled"
    try:
        visits, asked, wrong = [], [], []
        for _ in PROMPTS:
            page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
            page.set_default_timeout(120_000)
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.goto(url)
            visits.append(page)
        first, second = visits

        first.locator("#draw").click()
        first.get_by_text("Type what you would like to see").wait_for()
        assert not shown_pictures(first)

        first.get_by_label("second model").click()  # four steps without guidance beside it, as its config says
        first.get_by_role("option", name=FEW).click()
        few = shelf.sampling[FEW]["steps"]
        first.get_by_label("number input for steps").nth(1).wait_for()
        assert first.get_by_label("number input for steps").nth(1).input_value() == str(few)
        for page in visits:
            set_number(page, "steps", 3)
        for page, prompt in zip(visits, PROMPTS, strict=True):
            page.get_by_label("prompt").fill(prompt)
        for page in visits:  # both at once
            page.locator("#draw").click()
        for page in visits:
            page.wait_for_selector(done)
        settings = dict(steps=3, guidance=shelf.sampling[FM]["guidance"])
        pictures = shown_pictures(first)
        assert len(pictures) == 4 and np.asarray(pictures[1]).std() > 5
        assert same(pictures[1], drawn_by_sample(FM, PROMPTS[0], 0, **settings))
        assert same(pictures[3], drawn_by_sample(FEW, PROMPTS[0], 0))
        assert same(shown_pictures(second)[1], drawn_by_sample(FM, PROMPTS[1], 0, **settings))

        second.locator("#step input[type=range]").fill("0")
        second.get_by_text("step 0 of 3").wait_for()
        noise, predicted = shown_pictures(second)
        assert not same(noise, predicted) and "t = 1.000" in second.locator("#view").inner_text()
        assert "6 forwards" in second.locator("#view").inner_text()

        second.get_by_label("prompt").fill("zxqv 🐈 " * 290)
        second.locator("#draw").click()
        second.get_by_text("it guesses").wait_for()
        second.wait_for_selector(done)
        assert second.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
        assert not wrong and all(address.startswith((url, "data:")) for address in asked)
    finally:
        page_server.close()
