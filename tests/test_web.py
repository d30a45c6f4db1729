"""The student in a web page: the browser's forms of the networks, the export, and the page itself in a headless Chromium.

Where there is no Chromium with its driver, no selenium or no onnxruntime-web (npm ci --prefix web), the tests that need it are
skipped, and say so. Debian: apt-get install chromium chromium-driver.
"""

import base64
import functools
import gzip
import io
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import latency
from common.checkpoint import load_student
from common.encoders import FrozenEncoders
from coreml import pipeline
from coreml.layers import PhoneText
from coreml.texts import EXAMPLE, tokens_of
from decoder import PRESETS as DECODERS
from decoder import TinyDecoder, load_decoder
from model import PRESETS, UNet, ladder
from sample import draw_pictures
from web import export
from web.networks import WebDecoder, WebText, WebUNet

MODEL, DECODER = "assets/zoo/step_distill", "assets/zoo/decoder"
NEEDS_RUNTIME = pytest.mark.skipif(not export.RUNTIME.is_dir(), reason="onnxruntime-web is not there: npm ci --prefix web")


def close(found, expected, tolerance=2e-5):
    return (found - expected).abs().max().item() <= tolerance * max(1.0, expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("step", ["a", "d1", "f"])
@pytest.mark.parametrize("side", [8, 12])
def test_the_browsers_unet_gives_the_numbers_of_the_original(step, side):
    torch.manual_seed(0)
    config, encoders = ladder(step, PRESETS["tiny"]), FrozenEncoders()
    unet = UNet(config).eval()
    with torch.no_grad():
        for weight in unet.parameters():  # norms and biases begin as ones and zeros, which would hide mistakes
            weight.add_(0.1 * torch.randn_like(weight))
        x, t = torch.randn(1, 16, side, side), torch.tensor([0.7])
        expected = unet(x, t, *encoders.student_text([EXAMPLE], config.text_dim))
        text = WebText(PhoneText(encoders.text_encoders, config.text_dim, encoders.tokenizers[0].eos_token_id), unet)
        states = text(*tokens_of(encoders, [EXAMPLE]))
        assert close(WebUNet(unet)(x, t, *states), expected)
        other = text(*tokens_of(encoders, ["a photo of a star"]))
        assert not close(WebUNet(unet)(x, t, *other), expected)


@pytest.mark.parametrize("name", ["tiny", "sd3"])
def test_the_browsers_decoder_gives_the_numbers_of_the_original(name):
    torch.manual_seed(0)
    decoder, latent = TinyDecoder(DECODERS[name]).eval(), torch.randn(1, 16, 4, 6)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        assert close(WebDecoder(decoder)(latent), (decoder(latent).clamp(-1, 1) + 1) * 127.5)


def test_only_large_tensors_are_halved_and_a_bad_network_is_refused():
    layer, x = torch.nn.Linear(16, 32), torch.randn(1, 16)
    model = export.to_onnx(layer, {"x": x}, {"y": None})
    small = export.halve(model)
    kinds = {tuple(tensor.dims): tensor.data_type for tensor in small.graph.initializer}
    assert kinds == {(32, 16): export.onnx.TensorProto.FLOAT16, (32,): export.onnx.TensorProto.FLOAT}
    expected = {"y": layer(x).detach()}
    error, worst = export.verify("unet", model, small, {"x": x}, expected, 1.0)
    assert error < 1e-6 and 60 < worst < 90
    with pytest.raises(SystemExit, match="UNet, one step: ONNX Runtime is 2.0e-01 off PyTorch in float32"):
        export.verify("unet", model, small, {"x": x}, {"y": expected["y"] + 0.2}, 1.0)


def test_a_small_unet_must_fit_and_a_large_one_is_told(capsys):
    files = {name: {"bytes": 5_000_000} for name in export.NAMES}
    export.check_size(files, 6.6e6)
    assert "15.0 MB, more than the 12 MB that a phone is to be sent: a UNet of 6.6 M" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="15.0 MB, and those of a UNet of 3.0 M parameters have to stay within 12 MB"):
        export.check_size(files, 3e6)
    export.check_size({name: {"bytes": 1_000_000} for name in export.NAMES}, 3e6)
    assert "3.0 MB, within the 12 MB" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------
# The folder


@pytest.fixture(scope="module")
def site(home):
    """The zoo's student, exported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        export.main(["--model", MODEL, "--decoder", DECODER, "--out", "page"])
    return home / "page"


@NEEDS_RUNTIME
def test_what_is_exported(site):
    about = json.loads((site / "student.json").read_text())
    assert about["picture_decibels"] >= export.PICTURE_BAR and set(about["verified"]) == set(export.NAMES)
    for name, (error, worst) in about["verified"].items():
        assert error <= export.FLOAT32_BAR and worst >= export.FLOAT16_BAR, name
    for file in about["files"].values():
        packed = (site / file["file"]).read_bytes()
        assert (len(packed), len(gzip.decompress(packed))) == (file["packed"], file["bytes"])
    pinned = json.loads((export.HERE / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    assert about["runtime"] == pinned and {"star", "red", "left"} <= set(about["words"])
    lines = sum(len((site / name).read_text().splitlines()) for name in ("index.html", "app.js"))
    assert lines <= 350
    assert not [path for path in site.parent.iterdir() if path.name.startswith(".")]  # nothing half-made is left


@NEEDS_RUNTIME
def test_what_cannot_be_exported_is_told_and_nothing_is_lost(site, at_home, monkeypatch, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    arguments = ["--model", MODEL, "--decoder", DECODER, "--out"]
    for extra, told in (([str(tmp_path)], "holds other files"), (["page", "--latent", "6"], "multiple of 4, not 6"),
                        (["page", "--gemma", "none"], "trained without Gemma")):  # fmt: skip
        with pytest.raises(SystemExit, match=told):
            export.main([*arguments, *extra])
    monkeypatch.setattr(export, "to_onnx", lambda *_: pytest.fail("not to be reached"))
    monkeypatch.setattr(export, "RUNTIME", tmp_path)
    with pytest.raises(SystemExit, match="npm ci --prefix web"):
        export.main([*arguments, "page"])
    assert (site / "student.json").is_file() and (tmp_path / "mine.txt").read_text() == "mine"


@NEEDS_RUNTIME
def test_the_classrooms_host(site):
    server = start(site)
    try:
        for name, encoding in (("", "gzip"), ("app.js", "gzip"), ("unet.onnx.gz", None)):
            request = urllib.request.Request(address(server) + name, headers={"Accept-Encoding": "gzip"})
            with urllib.request.urlopen(request) as answer:
                assert answer.headers["Content-Encoding"] == encoding
                data = answer.read()
            expected = (site / (name or "index.html")).read_bytes()
            assert (gzip.decompress(data) if encoding else data) == expected
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(address(server) + "no.js", headers={"Accept-Encoding": "gzip"}))
        with pytest.raises(SystemExit, match="cannot be used .* --serve"):
            export.open_server(site, "127.0.0.1", server.server_port)
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------------------------
# The page in a browser


class Breaking(export.Handler):
    """A host whose line breaks in the middle of the files in `cut`."""

    cut = set()

    def do_GET(self):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        if name not in self.cut:
            super().do_GET()
            return
        data = open(self.translate_path(self.path), "rb").read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True


def start(site):
    server = export.open_server(site, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def address(server):
    return f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not export.RUNTIME.is_dir():
        pytest.skip("onnxruntime-web is not there: npm ci --prefix web")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome")]
    binary, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)")
    folder, options = tmp_path_factory.mktemp("chromium"), webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", f"user-data-dir={folder / 'profile'}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.set_script_timeout(120)
    browser.downloads = folder / "downloads"
    yield browser
    browser.quit()


class Page:
    """The page from a host of its own: every test has its own origin, and so its own cache."""

    def __init__(self, browser, site, script=None, cut=None):
        self.browser, self.server = browser, start(site)
        if cut is not None:
            broken = type("Broken", (Breaking,), {"cut": cut})
            self.server.RequestHandlerClass = functools.partial(broken, directory=site)
        self.scripts = []
        if script:  # before the page's own
            made = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
            self.scripts.append(made["identifier"])
        browser.get(address(self.server))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for identifier in self.scripts:
            self.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": identifier})
        self.browser.get("about:blank")
        self.stop()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    @property
    def status(self):
        return self.find("#status").text

    def wait(self, words, seconds=60):
        end = time.time() + seconds
        while words not in self.status:
            assert time.time() < end, f"no {words!r} in {self.status!r}"
            time.sleep(0.05)
        return self.status

    def run(self, code, *values):
        """The value of an asynchronous JavaScript function's body that sees app, student (the modules) and its arguments."""
        source = ("const given = [...arguments], done = given.pop();"
                  "Promise.all([import('./app.js'), import('./student.js')])"
                  f".then(async ([app, student]) => {{ {code} }}).then((value) => done([value]), (error) => done('' + error));")
        found = self.browser.execute_async_script(source, *values)
        assert isinstance(found, list), found
        return found[0]

    def draw(self, prompt, seed=0, steps=4, every=True):
        self.run("const $ = (id) => document.getElementById(id); $('prompt').value = given[0]; $('seed').value = given[1];"
                 "$('steps').value = given[2]; $('every').checked = given[3]; await app.draw()", prompt, seed, steps, every)
        return self.status

    def picture(self):
        data = self.run("return document.getElementById('picture').toDataURL()")
        return Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")


@pytest.fixture(scope="module")
def page(browser, site):
    with Page(browser, site) as page:
        page.wait("ms with WebAssembly")
        yield page


@pytest.fixture(scope="module")
def student():
    (unet, config), (decoder, _) = load_student(MODEL), load_decoder(DECODER)
    encoders = FrozenEncoders(config["encoders"])
    return lambda *args, **kwargs: draw_pictures(unet, config, encoders, *args, decoder=decoder, **kwargs)


def test_tokens_times_and_noise_are_pythons(page):
    tokenizers = pipeline.toy_tokenizers()
    expected = pipeline.cases(tokenizers, tokenizers["tokenizer"].model_max_length)
    names = list(tokenizers)
    found = page.run("return given[0].map((c) => { const t = app.state.tokenizers[given[1].indexOf(c.tokenizer)];"
                     "return [t.encode(c.text), [...t.padded(c.text, given[2])]] })",
                     expected["tokens"], names, expected["length"])  # fmt: skip
    for case, (ids, padded) in zip(expected["tokens"], found, strict=True):
        assert (ids, padded) == (case["ids"][1:-1], case["padded"]), case["text"]
    for case in expected["times"]:
        assert page.run("return student.timesOf(...given)", case["steps"], case["shift"]) == pytest.approx(case["times"], abs=1e-6)
    for case in expected["noise"]:
        assert page.run("return student.generatorOf(given[0])", case["seed"]) == case["generator"]
        found = page.run("return [...student.noise(...given)]", case["generator"], case["count"])
        assert found[:16] + found[-16:] == pytest.approx(case["first"] + case["last"], abs=1e-5)
    for case in expected["euler"]:
        x = case["noise"]
        for v, latent, t, s in zip(case["velocities"], case["latents"], case["times"][:-1], case["times"][1:], strict=True):
            if case["guidance"] != 1:
                v = page.run("return student.guide(...given)", v[: len(x)], v[len(x) :], case["guidance"])
            x = page.run("return student.euler(...given)", x, v, t, s)
            assert x == pytest.approx(latent, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_pictures_are_pythons(page, student, steps):
    prompt, seed = "a photo of a red star above a green square", 3
    assert page.draw(prompt, seed, steps, every=steps == 8).startswith(f"“{prompt}”, seed {seed}: ")
    expected = student([prompt], [seed], steps=None if steps == 4 else steps)[0]
    assert export.picture_decibels(expected, page.picture()) >= 40
    assert export.picture_decibels(student([prompt], [seed + 1])[0], page.picture()) < 25
    assert page.find("#picture").accessible_name == f"Picture of “{prompt}”, seed {seed}"


def test_a_guided_student_draws_pythons_pictures(page, student):
    prompt = "a photo of two blue squares"
    page.run("Object.assign(app.state.student, { guidance: 2.5, interval: [0, 0.92] })")
    page.draw(prompt)
    found = page.picture()
    page.run("Object.assign(app.state.student, { guidance: 1, interval: [0, 1] })")
    unet, config = load_student(MODEL)
    config["sampling"]["guidance_interval"] = [0, 0.92]
    encoders, (decoder, _) = FrozenEncoders(config["encoders"]), load_decoder(DECODER)
    expected = draw_pictures(unet, config, encoders, [prompt], [0], guidance=2.5, decoder=decoder)[0]
    assert export.picture_decibels(expected, found) >= 40
    assert export.picture_decibels(student([prompt], [0])[0], found) < 40


def test_what_the_page_says(page):
    assert "Type what you would like to see, such as “a photo of" in page.draw("  ")
    assert "The seed is a whole number" in page.draw("a photo of a star", seed="-1")
    assert "The seed is a whole number" in page.draw("a photo of a star", seed="")
    assert "Not among the words it has learned: zxqv, naïve. There" in page.draw("a photo of a ZXQV, naïve")
    assert "it reads 24: the rest is not drawn" in page.draw("a photo of a red circle " * 10)
    assert page.draw("a photo of a red circle").endswith("with WebAssembly.")
    page.run("const first = app.draw(); await app.draw(); await first")
    assert "A tap while it was drawing has been left out." in page.status
    assert page.draw("a photo of a red circle").endswith("with WebAssembly.")


def test_every_step_is_shown(page):
    page.run("window.seen = []; new MutationObserver(() => seen.push(document.getElementById('status').textContent))"
             ".observe(document.getElementById('status'), { childList: true })")  # fmt: skip
    page.draw("a photo of a star", steps=4)
    seen = page.run("return seen")
    assert [f"step {i} of 4" in said for i, said in enumerate(seen, 1)] == [True, True, True, False]
    page.run("const shown = []; await app.sample('a photo of a star', 0, 4, true, (picture, step) => shown.push(picture.data[0]));"
             "window.shown = shown")  # fmt: skip
    assert len(set(page.run("return shown"))) > 1


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_follows_the_scheme(page, width, scheme, tmp_path):
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        page.draw("a photo of a red star above a green square")
        assert page.run("return document.documentElement.scrollWidth") <= width
        shot = page.browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    folder = os.environ.get("SNAPGEN_SCREENSHOTS", tmp_path)  # to look at them: SNAPGEN_SCREENSHOTS=folder
    image = Image.open(io.BytesIO(base64.b64decode(shot)))
    image.save(f"{folder}/{width}-{scheme}.png")
    ground = np.asarray(image.convert("L"))[4, 4]
    assert ground > 200 if scheme == "light" else ground < 60


def test_it_works_by_keyboard_and_says_what_everything_is(page):
    from selenium.webdriver.common.keys import Keys

    names = [page.find(selector).accessible_name for selector in ("#prompt", "#seed", "#steps", "#every", "#draw", "#report")]
    assert names == ["Prompt", "Seed", "Steps", "Show every step", "Draw", "Measure and save a report"]
    assert page.find("#status").get_attribute("aria-live") == "polite" and page.find("#progress").get_attribute("aria-label")
    page.find("#prompt").clear()
    page.find("#prompt").send_keys("a photo of a blue star", Keys.ENTER)
    page.wait("“a photo of a blue star”, seed")
    order = []
    for _ in range(5):
        order.append(page.browser.switch_to.active_element.get_attribute("id"))
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
    assert order == ["prompt", "draw", "seed", "steps", "every"]
    example = page.browser.switch_to.active_element
    example.send_keys(Keys.SPACE)
    page.wait(f"“{example.text}”, seed")


def test_the_report_is_one_that_latency_compares(page, capsys, monkeypatch):
    page.find("#report").click()
    page.wait("browser.json is saved")
    file = page.browser.downloads / "browser.json"
    end = time.time() + 10
    while not file.is_file() and time.time() < end:
        time.sleep(0.1)
    report = json.loads(file.read_text())
    latency.main(["--compare", str(file)])
    said = capsys.readouterr().out
    assert "onnxruntime-web" in said and "20 predictions, 3 loads" in said and "8x8 latents" in said
    for part, times in report["parts"].items():
        times = times["WebAssembly"]
        assert times["predict"] > 0 and times["load"] > 0 and len(times["load_samples"]) == 3
        assert len(times["predict_samples"]) == 20 * (4 if part == "unet" else 1)
    line = next(line for line in said.splitlines() if line.startswith("unet") and "predict" in line)
    assert line.endswith("274 (iPhone 16 Pro Max)") and "the paper's numbers are for 128x128 latents" in said


def test_a_lost_gpu_is_told_and_webassembly_draws_the_same_picture(page):
    """Nothing here has a GPU: the page is told that it draws with one, and is handed a device that is lost."""
    page.draw("a photo of a red circle")
    expected = page.picture()
    page.run("app.state.backend = 'WebGPU'; app.watch({ lost: Promise.resolve({ message: 'unplugged' }) })")
    assert "The GPU cannot be used (it was lost: unplugged), so WebAssembly draws." in page.draw("a photo of a red circle")
    assert page.picture().tobytes() == expected.tobytes()
    assert page.draw("a photo of a red circle").endswith("ms with WebAssembly.")


def test_it_draws_offline_after_the_first_visit(browser, site):
    with Page(browser, site) as page:
        page.wait("ms with WebAssembly")
        page.run("await navigator.serviceWorker.ready")
        browser.refresh()  # now by way of the service worker, which keeps what is small
        page.wait("ms with WebAssembly")
        page.stop()
        page.stop = lambda: None
        browser.refresh()
        page.wait("ms with WebAssembly")
        page.draw("a photo of a red circle")
        page.wait("“a photo of a red circle”, seed 0")


@pytest.mark.parametrize("name", ["unet.onnx.gz", "ort-wasm-simd-threaded.wasm.gz", "tokenizers.json.gz"])
def test_a_download_that_breaks_is_told_and_tried_again(browser, site, name):
    with Page(browser, site, cut=(cut := {name})) as page:
        assert "broke off" in page.wait(name) and page.status.endswith("check the connection and tap Draw to try again.")
        cut.clear()
        page.find("#draw").click()
        page.wait("ms with WebAssembly")


GPU = "Object.defineProperty(navigator, 'gpu', { configurable: true, value: %s });"


def test_without_a_gpu_that_works_webassembly_draws(browser, site):
    with Page(browser, site, script=GPU % "undefined") as page:
        assert page.wait("ms with").endswith("with WebAssembly.")
    with Page(browser, site, script=GPU % "{ requestAdapter: async () => null }") as page:
        assert page.wait("ms with").endswith("with WebAssembly.")
    with Page(browser, site, script=GPU % "{ requestAdapter: async () => ({}) }") as page:  # an adapter that gives no device
        assert "The GPU cannot be used (" in page.wait("ms with WebAssembly") and page.status.endswith("so WebAssembly draws.")


def test_it_is_fast(browser, site, student):
    """Processor time of the page's thread and of PyTorch's, which a busy machine disturbs less than the clock does.

    The aim is half of PyTorch's time. Seen were 0.43 to 0.56, by what else the machine did, so the bar stands above that.
    """
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})

    def ticks(name="TaskDuration"):
        metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == name)

    prompt, pairs = "a photo of a red star above a green square", []
    with Page(browser, site) as page:
        page.wait("ms with WebAssembly")
        first = ticks("ProcessTime")  # of all threads of the page
        for _ in range(5):
            begin = ticks()
            page.run("document.getElementById('every').checked = false; for (let i = 0; i < 15; i++) await app.draw()")
            in_page, begin = (ticks() - begin) / 15, time.process_time()
            for _ in range(10):
                student([prompt], [0])[0].save(io.BytesIO(), "png")  # as sample.py does
            pairs.append((1000 * in_page, 100 * (time.process_time() - begin)))
    ratios = [in_page / in_torch for in_page, in_torch in pairs[1:]]  # the first warms both
    told = ", ".join(f"{in_page:.1f} / {in_torch:.1f} = {in_page / in_torch:.2f}" for in_page, in_torch in pairs)
    print(f"seconds from opening to the first picture: {first:.1f}; milliseconds of a picture, page / PyTorch: {told}")
    assert min(ratios) <= 0.6 and first <= 4
