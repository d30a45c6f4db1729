"""The report: what the page says is what the files hold, it needs no network, and no file can break it or become markup."""

import base64
import hashlib
import html.parser
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops

import flow
import latency
import sample
from course import page, report
from data import PROMPTS
from studies import decoder, sizes

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"
LOG = """step,pictures,loss,loss_t0.0,loss_t0.2,loss_t0.4,loss_t0.6,loss_t0.8,grad_norm,lr,pictures_per_second,val_loss
50,3200,1.9978,2.03,1.97,2.002,1.99,1.96,0.17,0.001,32,nan
100,6400,1.2528,1.1,1.2,1.3,1.4,1.5,0.27,0.001,64,1.3728
"""


class Page(html.parser.HTMLParser):
    """What a browser would see: elements with attributes, text by section, rows of cells, pictures."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.sections, self.rows, self.script = [], {}, [], ""
        self.section, self.tag = "top", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag, attributes = tag, dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.tag = ""
        if tag == "table":
            self.rows.append([])  # what comes after is not its last cell's

    def handle_data(self, data):
        self.script += data if self.tag == "script" else ""
        if self.tag not in ("script", "style"):
            self.sections[self.section] = self.sections.get(self.section, "") + data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data + "|"

    def row(self, start):
        (row,) = (row for row in self.rows if row and row[0].replace("|", "").startswith(start))
        return [cell.strip("|").split("|") for cell in row]

    def all(self, tag, attribute):
        return [attributes.get(attribute) for name, attributes in self.elements if name == tag]


def make_run(folder, stage="fm", step=100, log=LOG, **settings):
    """A run's folder with config.json, log.csv and weights of 12 numbers."""
    folder.mkdir(parents=True)
    config = {
        "stage": stage, "size": "tiny", "machine": {"device": "cpu, 1 threads", "commit": "abc"}, "step": step,
        "latent_size": [8, 8], "sampling": {"steps": 28, "guidance": 3.0, "shift": 3.0}, "unet": {},
        "settings": {"steps": 100, "lr": 0.003, **settings},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "log.csv").write_text(log, encoding="utf-8")
    safetensors.torch.save_file({"a": torch.zeros(3, 4)}, folder / "model.safetensors")
    return folder


def make_samples(folder, steps, side=8):
    """A row of eight squares for each step, the k-th of grey 10 k + step % 7."""
    (folder / "samples").mkdir()
    for step in steps:
        strip = np.repeat(10 * np.arange(8, dtype=np.uint8) + step % 7, side)[None].repeat(side, 0)
        Image.fromarray(strip).convert("RGB").save(folder / "samples" / f"{step:07d}.png")


def build(*flags):
    report.main([*map(str, flags), "--device", "cpu", "--no-draw", "--out", "page.html"])
    return Page(Path("page.html").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pictures(seen):
    """The pictures of a page (PIL), with their alt texts."""
    sources = zip(seen.all("img", "src"), seen.all("img", "alt"), strict=True)
    return [(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))), alt) for source, alt in sources]


def test_the_numbers_are_those_of_the_files():
    run = make_run(Path("runs/mine"))
    (run / "mini-geneval-40.json").write_text(json.dumps({"overall": 0.4627, "interval": [0.4, 0.525], "pictures": 240}))
    seen = build()
    name, parameters, steps, minutes, forwards, validation, score = seen.row("runs/mine")
    assert name[-1] == "1 flow matching" and "".join(name[:-1]) == "runs/mine"
    assert parameters == ["0.00 M"] and steps == ["100"] and forwards == ["56"]
    assert minutes == ["2.5", "log.csv"]  # 3,200 pictures at 32 a second and 3,200 at 64: 150 s
    assert validation == ["1.373", "step 100"] and score == ["0.463", "0.400 to 0.525, 240 pictures"]
    loss, bins = (label for label in seen.all("svg", "aria-label") if label)
    assert "training 1.998 at step 50, 1.253 at step 100" in loss and "validation, EMA 1.373 at step 100" in loss
    assert re.search(r"t 0\.8–1\.0 1\.96 at step 50, 1\.5 at step 100", bins) and "t 0.0–0.2 2.03 at step 50" in bins
    assert ["lr|", "0.003|"] in seen.rows


def test_the_papers_numbers_are_those_of_the_studies():
    said = {stage: json.dumps(numbers) for stage, numbers in report.PAPER.items()}
    (ours,) = (row for row in sizes.TABLE_1 if row[0] == "SnapGen")
    assert f"{ours[1]} M" in said["fm"] and f"FID {ours[3]:.2f}" in said["fm"]
    psnr, params, _, _ = decoder.TABLE_2["SnapGen"]
    assert f"{psnr} dB" in said["decoder"] and f"{params} M" in said["decoder"]
    for part in ("unet", "decoder"):
        assert latency.PAPER[part].startswith(f"{report.PAPER['latency'][part][0]} (iPhone 16 Pro Max)")
    make_run(Path("runs/mine"))
    text = build().sections["stages"]
    assert all(said in text for said in ("379 M", "GenEval 0.66", "GenEval 0.61", "8 steps: 0.63", "Sec. 3.4", "Table 2"))


@pytest.mark.parametrize("interval", [None, (0.2, 0.8)])
@pytest.mark.parametrize("sampling", [
    {"steps": 28, "guidance": 3.0, "shift": 3.0},
    {"steps": 5, "guidance": 1.0, "shift": 1.0},
    {"steps": 4, "guidance": 2.0, "shift": 3.0, "times": [1.0, 0.9, 0.75, 0.5, 0.0]},
])  # fmt: skip
def test_forwards_are_those_that_the_sampler_takes(sampling, interval):
    taken, noise, text = [], torch.zeros(1, 2, 2, 2), (torch.zeros(1, 1, 1), torch.ones(1, 1))
    if interval:
        sampling = {**sampling, "guidance_interval": interval}

    def model(x, t, states, mask):
        taken.append(len(x))
        return x

    flow.euler_sample(model, noise, text, text, sampling["steps"], sampling["guidance"], sampling["shift"],
                      times=sampling.get("times"), interval=interval or (0, 1))  # fmt: skip
    assert report.forwards({"sampling": sampling}) == sum(taken)


def test_nothing_is_fetched_and_only_the_pages_own_script_may_run():
    run = make_run(Path("runs/mine"))
    make_samples(run, [50, 100])
    seen, text = build(), Path("page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", text) and "fetch" not in seen.script
    assert len(seen.all("img", "src")) == 2 and all(source.startswith("data:image/") for source in seen.all("img", "src"))
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in seen.elements}
    assert seen.all("script", "src") == [None] and all(alt for alt in seen.all("img", "alt"))
    assert all(target.startswith("#") for target in seen.all("a", "href"))
    (policy,) = (p for p in seen.all("meta", "content") if p and "default-src" in p)
    own = base64.b64encode(hashlib.sha256(seen.script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{own}'" in policy
    assert set(seen.all("nav", "id")) == {None} and {h[1:] for h in seen.all("a", "href")} <= set(seen.all("section", "id"))


def test_what_files_say_never_becomes_markup():
    name = "mine" if os.name == "nt" else HOSTILE.replace("/", "")  # Windows has no such names
    run = make_run(Path("runs") / name, log=LOG.replace("loss_t", f"{HOSTILE}_t"), data=HOSTILE)
    make_samples(run, [50])
    Path("build").mkdir()
    part = {"float32_error": 1e-6, "decibels": 60.0, "operations": 3, "bytes": 10, "mac": {HOSTILE: 50.0}}
    Path("build/verification.json").write_text(json.dumps({"parts": {HOSTILE: {"sizes": {"8": part}}}}))
    Path("build/latency.json").write_text(json.dumps({"programs": {HOSTILE: HOSTILE}}))
    seen = build()
    assert [tag for tag, _ in seen.elements].count("script") == 1
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    assert all(source.startswith("data:") for source in seen.all("img", "src"))
    assert HOSTILE in seen.sections["stages"] and HOSTILE in seen.sections["packages"] and HOSTILE in seen.sections["curves"]


def test_an_empty_section_names_the_command_that_fills_it():
    shutil.copytree(make_run(Path("elsewhere/mine"), log=LOG.splitlines()[0] + "\n"), "runs/mine")
    seen = build("runs/mine")
    for section, command in (("stages", "python distill.py"), ("curves", "python train_fm.py"),
                             ("samples", "python train_fm.py --save-every 100"), ("the-same-noise", "python -m course.report"),
                             ("packages", "python export_coreml.py"),
                             ("packages", "python latency.py build/ --out build/latency.json")):  # fmt: skip
        assert command in seen.sections[section]
    assert "No curves of runs/mine" in seen.sections["curves"] and "No samples of runs/mine" in seen.sections["samples"]
    latency.parse_arguments(["build/", "--out", "build/latency.json"])  # these flags exist


@pytest.mark.parametrize("file, content, said", [
    ("config.json", b'{"_class_name": "SD3"}', "config.json is of another format: it names no stage of this course (_class_name)"),
    ("config.json", b'{"stage": "fm", "step": 3', "config.json is of another format"),
    ("config.json", b'[1, 2]', "config.json is of another format"),
    ("config.json", b'{"stage": "fm", "step": "3", "settings": {}, "machine": {}}', "its step is missing or of another kind"),
    ("log.csv", b"\x00\xff\xfe\x01" * 40, "log.csv cannot be read"),
    ("log.csv", b"some,other\n1,2\n", "log.csv cannot be read"),
    ("log.csv", LOG.replace("1.2528", "oops").encode(), "log.csv cannot be read"),
    ("log.csv", LOG.encode()[:-30], "log.csv: 1 of its rows cannot be read, and are left out"),
    ("model.safetensors", b"\x10\x00", "model.safetensors is damaged"),
    ("samples/0000050.png", b"\x89PNG broken", "0000050.png is not a readable picture"),
])  # fmt: skip
def test_a_broken_file_costs_a_line_and_not_the_page(file, content, said):
    make_run(Path("runs/good"))
    bad = make_run(Path("runs/bad"))
    make_samples(bad, [50])
    (bad / file).write_bytes(content)
    seen = build()
    assert said in seen.sections["stages"] + seen.sections["samples"] and "runs/bad" in seen.sections["stages"]
    assert seen.row("runs/good")[1:3] == [["0.00 M"], ["100"]]
    assert "runs/good" in seen.sections["curves"]


def test_a_run_on_its_way_is_shown_as_far_as_it_came():
    make_run(Path("runs/on_its_way"), step=50)
    unsaved = make_run(Path("runs/unsaved"))
    for name in ("config.json", "model.safetensors"):
        (unsaved / name).unlink()
    seen = build()
    assert seen.row("runs/on_its_way")[2] == ["50 of 100", "log to 100"]
    assert "runs/unsaved: no config.json: the run has not saved anything yet." in seen.sections["stages"]
    assert "runs/unsaved" in seen.sections["curves"]


def test_minutes_and_scores_come_from_the_records_where_there_are_some():
    run = make_run(Path("runs/lab/fm"))
    score = {"overall": 0.5, "interval": [0.45, 0.55], "pictures": 240}
    Path("runs/lab/lab.json").write_text(json.dumps({"fm": {"seconds": 600}, "rows": {"1": {"run": "fm", "score": score}}}))
    for name, target, overall in (("fm-score", "runs/lab/fm", 0.7), ("distill-score", "runs/lab/distill", 0.9)):
        (run.parent / name).mkdir()
        report_of = {"target": target, "val": {**score, "overall": overall, "pictures": 600}}
        (run.parent / name / "report.json").write_text(json.dumps(report_of))
    row = build("runs/lab").row("runs/lab/fm")
    assert row[3] == ["10.0", "lab.json"] and row[6][0] == "0.700"  # of 600 pictures, and this run's
    shutil.rmtree("runs/lab/fm-score")
    assert build("runs/lab").row("runs/lab/fm")[6] == ["0.500", "0.450 to 0.550, 240 pictures"]


def test_samples_are_thinned_folded_and_whole():
    run = make_run(Path("runs/mine"))
    steps = list(range(50, 50 * 40, 50))
    make_samples(run, steps)
    shown = pictures(build())
    assert len(shown) == report.MOST_STEPS
    assert shown[0][1].endswith("step 50") and shown[-1][1].endswith(f"step {steps[-1]:,}")
    last = shown[-1][0].convert("RGB")
    assert last.size == (32, 16)
    greys = [last.getpixel((8 * (k % 4) + 4, 8 * (k // 4) + 4))[0] for k in range(8)]
    assert greys == [10 * k + steps[-1] % 7 for k in range(8)]


def test_a_large_picture_is_made_to_fit():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 1500, 3), dtype=np.uint8))
    source = page.image(noise, "noise", most_bytes=40_000).get("src")
    data = base64.b64decode(source.split(",")[1])
    assert source.startswith("data:image/jpeg") and len(data) <= 40_000
    width, height = Image.open(io.BytesIO(data)).size
    assert 64 <= width <= 1024 and abs(width / height - 1500 / 700) < 0.05


def test_a_curve_lies_where_its_values_are():
    figure = page.chart("title", {"wide": [(0, 1.0), (10, 10.0), (20, 100.0)]})
    numbers = [float(n) for n in re.findall(r"[\d.]+", figure.find("svg/g/path").get("d"))]
    xs, ys = numbers[::2], numbers[1::2]
    assert abs((xs[0] + xs[2]) / 2 - xs[1]) < 0.2 and abs((ys[0] + ys[2]) / 2 - ys[1]) < 0.2 and ys[0] > ys[2]  # logarithmic
    figure = page.chart("title", {"narrow": [(0, -1.0), (10, 0.0), (20, 3.0)]})
    ys = [float(n) for n in re.findall(r"[\d.]+", figure.find("svg/g/path").get("d"))][1::2]
    assert abs((ys[0] - ys[1]) / (ys[0] - ys[2]) - 0.25) < 0.01  # linear
    long = [(i, float(i % 2)) for i in range(10_001)]
    assert len(page.thin(long)) <= page.MOST_POINTS and page.thin(long)[-1][0] == 10_000
    assert abs(sum(y for _, y in page.thin(long)) / len(page.thin(long)) - 0.5) < 0.02


def test_packages_verified_and_timed():
    Path("build").mkdir()
    part = {"float32_error": 2.5e-6, "decibels": 61.25, "operations": 1234, "bytes": 3_500_000, "mac": None}
    Path("build/verification.json").write_text(json.dumps({"parts": {"unet": {"settings": {}, "sizes": {"8": part}}}}))
    counted = {"macs": 2_500_000, "operations": 1, "weight_bytes": 1_000_000, "peak_activation_bytes": 20_000, "latency_ms": None}
    Path("build/latency.json").write_text(json.dumps({"machine": {}, "programs": {"unet": counted}}))
    units = {"CPU": {"first_load": 9.0, "load": 8.5, "predict": 7.25, "predict_samples": []}, "GPU": {"error": "no such unit"}}
    Path("build/mac.json").write_text(json.dumps({"device": "this Mac", "os": "macOS 15", "parts": {"decoder": units}}))
    Path("build/pipeline.json").write_text(json.dumps({"steps": 4}))
    make_run(Path("runs/mine"))
    seen = build()
    rows = {tuple(cell.replace("|", "") for cell in row[:3]): [cell.strip("|") for cell in row[3:]] for row in seen.rows}
    assert rows["build", "unet", "8"] == ["2.5e-06", "61.2", "1,234", "3.50", "not run"]
    assert rows["build/latency.json", "unet", "program"] == ["0.003", "1.00", "0.02", "–", "not timed", "274|a step"]
    assert rows["build/mac.json", "decoder", "this Mac, macOS 15, CPU"] == ["–", "–", "–", "8.5", "7.25", "119"]
    assert rows["build/mac.json", "decoder", "this Mac, macOS 15, GPU"][3] == "no such unit"


def test_which_runs_are_taken():
    with pytest.raises(SystemExit, match="no such folder: nowhere"):
        build("nowhere")
    assert not Path("page.html").exists()
    assert "0 runs." in build().sections["top"] and "No curves yet" in build().sections["curves"]
    make_run(Path("assets/zoo/fm"))
    assert "1 run." in build().sections["top"] and "assets/zoo/fm" in build().sections["stages"]
    make_run(Path("runs/deep/er/distill"), stage="distill")
    make_run(Path("runs/z_fm"))
    text = build().sections["stages"]
    assert "assets/zoo" not in text and text.index("runs/z_fm") < text.index("runs/deep/er/distill")  # in the order of stages


def test_the_same_noise_is_that_of_sample_py():
    """The picture of a prompt on the page is what sample.py draws from the same seed."""
    Path("assets").symlink_to(Path(__file__).parent.parent / "assets")
    bad = make_run(Path("runs/bad"))
    report.main([str(bad), "assets/zoo/step_distill", "--device", "cpu", "--out", "page.html"])
    seen = Page(Path("page.html").read_text(encoding="utf-8"))
    shown = {alt: picture for picture, alt in pictures(seen)}
    assert len(shown) == len(PROMPTS) and "runs/bad was not drawn:" in seen.sections["the-same-noise"]
    model = ["--model", "assets/zoo/step_distill", "--device", "cpu"]
    sample.main([PROMPTS[3], *model, "--seed", "3", "--true-size", "--out", "one.png"])
    on_page = shown[f"assets/zoo/step_distill: {PROMPTS[3]}"].convert("RGB")
    difference = ImageChops.difference(on_page, Image.open("one.png").convert("RGB"))
    assert max(high for _, high in difference.getextrema()) <= 2
