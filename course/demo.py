"""A page in the browser that draws: type a prompt, watch noise become a picture step by step, compare two models.

    pip install -r requirements-demo.txt
    python -m course.demo                                  # http://127.0.0.1:7860, with all of assets/zoo and runs/
    python -m course.demo runs/fm --device cuda            # your own student first
    python -m course.demo --host 0.0.0.0 --port 8000       # for a class: everyone in the network may draw
    python -m course.demo --screenshot assets/readme/demo.png

The pictures are those of sample.py, bit for bit: the same prompt, seed, steps and guidance give the same picture there. The page
shows every state that the sampler goes through, x_t and the x_0 that the network predicts from it, and counts forwards: a guided
step costs two. Milliseconds are those of the text encoders and the UNet, without the decoder that makes each step visible.
Everything comes from this computer, and nothing is sent anywhere.
"""

import base64
import functools
import html
import io
import json
import os
import random
import re
import shutil
import sys
import textwrap
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from common.arguments import Parser, add_device, integer
from common.checkpoint import check_encoders, load_student, save_atomically
from common.device import pick_device
from common.encoders import FrozenEncoders
from common.shapes import FAMILIES, ShapesWorld, parse_caption
from sample import decode, denoise, pick_decoder

INSTALL = "pip install -r requirements-demo.txt"
EXAMPLES = [ShapesWorld("val", 3, 12, family).caption(2 * k + i) for k, family in enumerate(FAMILIES) for i in range(2)]
LONGEST = 5000  # characters of a prompt; the encoders read far less
NOBODY = "none"
WELCOME = "Every drawing begins with noise, t = 1, and ends with a picture, t = 0. Type a prompt or click an example."

# ------------------------------------------------------------------------------------------------------------------
# Models and drawings, without Gradio


class Shelf:
    """The students that can be drawn from, loaded once for everybody.

    Args: folders, of students, in the order in which they are offered; device; decoder, a tiny decoder's folder or None.
    A folder that cannot be drawn from is left out, with a line on stderr. `lock` is held around whatever uses a network or a
    tokenizer, so that several drawings take turns, a step at a time. Raises SystemExit when no folder is left.
    """

    def __init__(self, folders, device, decoder=None):
        self.device, self.decoder, self.lock = device, decoder, threading.Lock()
        self.encoders = functools.cache(lambda folder, gemma: FrozenEncoders(folder, device, gemma=gemma))
        self.decoders = functools.cache(pick_decoder)
        self.read = functools.lru_cache(maxsize=4)(self._read)  # the paper's sizes take 1.5 GB each
        self.sampling = {}  # folder: {"steps", "guidance"} as its config recommends
        for folder in folders:
            try:
                _, config, _, _ = self.load(folder)
                self.sampling[folder] = recorded(config)
            except (SystemExit, Exception) as error:  # whatever is wrong with one folder, the others are offered
                print(f"{folder} is not offered: {sentence(error)}", file=sys.stderr)
        if not self.sampling:
            raise SystemExit("there is no student to draw with: train one with train_fm.py, or name a student's folder.")

    def load(self, folder):
        """(UNet, config, encoders, decoder) of a student's folder, read again when its weights have changed."""
        weights = Path(folder) / "model.safetensors"
        with self.lock:
            return self.read(folder, weights.stat().st_mtime_ns if weights.is_file() else None)

    def _read(self, folder, _):
        model, config = load_student(folder, self.device)
        encoders = self.encoders(config["encoders"], config.get("gemma"))
        check_encoders(config, encoders)
        return model, config, encoders, self.decoders(self.decoder, encoders)


def find_students(first=()):
    """Folders that may hold students: those in `first`, then the zoo's, then runs/NAME and runs/*/NAME, without decoders.

    In each of these places, who needs the fewest forwards for a picture comes first: nobody waits for the first one.
    """
    found = []
    for root in ("assets/zoo/*", "runs/*", "runs/*/*"):
        folders = [path.parent for path in sorted(Path().glob(f"{root}/config.json"))]
        found += sorted((f for f in folders if (f / "model.safetensors").is_file() and not is_decoder(f)), key=forwards)
    return list(dict.fromkeys(Path(folder).as_posix() for folder in (*first, *found)))


def forwards(folder):
    """Forwards a picture by a student's config; a damaged folder comes last, and the shelf says what is wrong with it."""
    try:
        own = recorded(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return float("inf")
    return own["steps"] * (1 if own["guidance"] == 1 else 2)


def is_decoder(folder):
    try:
        return "decoder" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # a damaged folder: the shelf will say so


def recorded(config):
    """The sampling settings that a student's config recommends, as the page shows them."""
    return {"steps": int(config["sampling"]["steps"]), "guidance": float(config["sampling"]["guidance"])}


def sentence(error):
    """What went wrong, on one line."""
    return " ".join((str(error) or type(error).__name__).split())


class Counted:
    """A network of which one drawing counts its forwards: a row of a batch is one."""

    def __init__(self, model):
        self.model, self.cfg, self.forwards = model, model.cfg, 0

    def __call__(self, x, *rest):
        self.forwards += len(x)
        return self.model(x, *rest)


@dataclass
class Film:
    """One model's way from noise to picture: frames are (t, x_t, predicted x_0) with pictures (PIL), from t = 1 to t = 0."""

    name: str
    seed: int
    steps: int
    frames: list = field(default_factory=list)
    forwards: int = 0
    seconds: float = 0.0  # text encoders and UNet, without the decoder that makes the steps visible


def draw(shelf, prompt, seed, choices):
    """Draw one prompt with several models from the same noise: yields [Film] after every step that they take in turn.

    choices: [(folder, steps, guidance)]. Steps that are the recommended number are taken at the very times of the config.
    Films are this drawing's own; nothing is shared but the networks. Raises SystemExit when a folder is no student (any more).
    """
    films, running = [], []
    for folder, steps, guidance in choices:
        model, config, encoders, decoder = shelf.load(folder)
        film, counted = Film(folder, seed, steps), Counted(model)
        own_times = None if steps == recorded(config)["steps"] else steps
        states = denoise(counted, config, encoders, [prompt], [seed], own_times, guidance)
        films.append(film)
        running.append((film, states, counted, decoder))
    while running:
        for job in tuple(running):
            film, states, counted, decoder = job
            with shelf.lock, torch.no_grad():
                start = time.perf_counter()
                t, x, x0 = next(states)
                x0.sum().item()  # waits for a GPU
                film.seconds += time.perf_counter() - start
                film.forwards = counted.forwards
                film.frames.append((t, decode(decoder, x)[0], decode(decoder, x0)[0]))
            if len(film.frames) > film.steps:
                running.remove(job)
        yield films


def complaint(prompt, seed, choices):
    """What keeps a drawing from being begun, as a sentence; or an empty string."""
    if not (prompt or "").strip():
        return f"Type what you would like to see, such as “{EXAMPLES[0]}”, or click an example."
    if len(prompt) > LONGEST:
        return f"That are {len(prompt):,} characters. The model reads a sentence: please stay below {LONGEST:,}."
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        return "The seed is a whole number, 0 or above: it picks the noise that the drawing begins with."
    for _, steps, guidance in choices:
        if not isinstance(steps, int) or not 1 <= steps <= 1000:
            return "The number of steps is a whole number from 1 to 1000."
        if not isinstance(guidance, int | float) or not 0 <= guidance <= 100:
            return "Guidance is a number from 0 to 100; 1 is none."
    return ""


def remarks(shelf, prompt, folders):
    """Sentences about a prompt that is drawn all the same: too long for the encoders, or not of the world they know."""
    loaded = [shelf.load(folder) for folder in folders]
    encoders, said = loaded[0][2], []
    with shelf.lock:
        tokens = len(encoders.tokenizers[0](prompt).input_ids)
    if tokens > encoders.max_tokens and not encoders.gemma:
        said.append(f"These are {tokens} tokens, and the text encoders read {encoders.max_tokens}: the rest is not drawn.")
    if all(config.get("size") == "tiny" and not config.get("settings", {}).get("data") for _, config, _, _ in loaded):
        try:
            parse_caption(prompt)
        except ValueError:
            said.append("The model has only seen captions of the shapes world, such as the examples: here it guesses.")
    return " ".join(said)


# ------------------------------------------------------------------------------------------------------------------
# The page


def picture(image, title):
    """An image (PIL) as HTML, with its bytes inside: no file is left behind, and nobody can ask for another's."""
    kind, file = "PNG" if image.width <= 256 else "JPEG", io.BytesIO()
    image.save(file, kind, quality=92)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{re.sub("<.*?>", "", title)}"><figcaption>{title}</figcaption></figure>'


def show(films, step):
    """The films at a step, as HTML; a film that has fewer steps stays at its last."""
    sections = []
    for film in films:
        k = min(step, len(film.frames) - 1)
        t, x, x0 = film.frames[k]
        name = "x<sub>0</sub>, the picture" if k == film.steps else "x<sub>0</sub>, predicted"
        pair = picture(x, f"x<sub>t</sub>, t = {t:.3f}, step {k} of {film.steps}") + picture(x0, name)
        told = f"{film.forwards} forwards · {1000 * film.seconds:.0f} ms · seed {film.seed}"
        sections.append((html.escape(film.name).replace("/", "/<wbr>"), pair, told))
    if not films:
        blank = '<figure><div class="blank"></div><figcaption>x<sub>{}</sub>, {}</figcaption></figure>'
        pair = blank.format("t", "from noise to picture") + blank.format(0, "as the network predicts it")
        sections.append(("&nbsp;", pair, "Nothing is drawn yet."))
    sections = [f'<section><h3>{a}</h3><div class="pair">{b}</div><p>{c}</p></section>' for a, b, c in sections]
    return f'<div class="films{" two" if len(films) > 1 else ""}">{"".join(sections)}</div>'


CSS = """
.films { display: grid; gap: 16px; max-width: 640px; }
.films h3 { margin: 0 0 4px; font-size: 1rem; overflow-wrap: anywhere; }
.films p { margin: 2px 0 0; font-variant-numeric: tabular-nums; opacity: .8; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; }
.two { grid-template-columns: 1fr 1fr; }
.two .pair { grid-template-columns: 1fr; }
.pair figure { margin: 0; }
.pair img, .blank { width: 100%; aspect-ratio: 1; border-radius: 6px; image-rendering: pixelated; display: block; }
.blank { background: var(--background-fill-secondary); border: 1px dashed var(--border-color-primary); }
.pair figcaption { font-size: .9rem; font-variant-numeric: tabular-nums; padding-top: 2px; }
.note { margin: 0; }
#heading h2 { margin: 0; }
#draw, #other { max-height: 56px; align-self: center; }
"""

# On a phone the examples stand below the pictures.
DRAW = """() => {
    document.getElementById("draw").click();
    document.getElementById("view").scrollIntoView({block: "nearest", behavior: "smooth"});
}"""


def build(gr, shelf):
    """The page as gradio.Blocks. What a visitor draws lives in the visitor's own gr.State."""
    names = list(shelf.sampling)

    def run(prompt, seed, *values):
        prompt = (prompt or "").encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        choices = [values[i : i + 3] for i in (0, 3) if values[i] != NOBODY]
        if said := complaint(prompt, seed, choices):
            yield {note: tell(said)}
            return
        yield {button: gr.Button("Drawing ...", interactive=False), note: tell("Reading the prompt ...")}
        made, last = [], max(steps for _, steps, _ in choices)
        try:
            said = f"“{textwrap.shorten(prompt, 80)}” {remarks(shelf, prompt, [folder for folder, _, _ in choices])}"
            for k, made in enumerate(draw(shelf, prompt, seed, choices)):
                yield {view: show(made, k), slider: gr.Slider(maximum=last, value=k, interactive=False), note: tell(said)}
        except (SystemExit, Exception) as error:  # a run that was deleted, memory that ran out: the page stays
            traceback.print_exc()
            made, said = [], f"This could not be drawn: {sentence(error)}"
            yield {view: show([], 0), note: tell(said)}
        yield {films: made, button: gr.Button("Draw", interactive=True), slider: gr.Slider(interactive=bool(made))}

    def tell(said):
        return f'<p class="note" role="status">{html.escape(said)}</p>'

    def settle(name):
        own = shelf.sampling.get(name)
        if own is None:
            return gr.Slider(visible=False), gr.Slider(visible=False)
        return (gr.Slider(maximum=max(50, own["steps"]), value=own["steps"], visible=True),
                gr.Slider(maximum=max(10, own["guidance"]), value=own["guidance"], visible=True))  # fmt: skip

    def model(label, options, value):
        box = gr.Dropdown(options, value=value, label=label)
        own = shelf.sampling.get(value, shelf.sampling[names[0]])
        with gr.Row():
            shown = dict(visible=value != NOBODY, min_width=130)
            steps = gr.Slider(1, max(50, own["steps"]), own["steps"], step=1, precision=0, label="steps", **shown)
            guidance = gr.Slider(0, max(10, own["guidance"]), own["guidance"], step=0.1, label="guidance", **shown)
        box.change(settle, box, [steps, guidance], show_progress="hidden", api_visibility="private")
        return box, steps, guidance

    with gr.Blocks(title="SnapGen: from noise to picture", analytics_enabled=False) as page:
        films = gr.State([], time_to_live=3600)
        gr.HTML("<h2>SnapGen: from noise to picture, step by step</h2>", elem_id="heading")
        with gr.Row():
            prompt = gr.Textbox(label="prompt", placeholder=EXAMPLES[0], scale=5, min_width=240, max_lines=3, elem_id="prompt")
            button = gr.Button("Draw", variant="primary", scale=1, min_width=100, elem_id="draw")
        note = gr.HTML(tell(WELCOME))
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                view = gr.HTML(show([], 0), elem_id="view")
                slider = gr.Slider(0, 1, 0, step=1, precision=0, interactive=False, label="step of the denoising", buttons=[],
                                   elem_id="step")  # fmt: skip
            with gr.Column(scale=3, min_width=320):
                examples = gr.Dataset(components=[prompt], samples=[[text] for text in EXAMPLES], label="examples",
                                      samples_per_page=len(EXAMPLES))  # fmt: skip
                first = model("model", names, names[0])
                second = model("second model, from the same noise", [NOBODY, *names], NOBODY)
                with gr.Row():
                    seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=120, elem_id="seed")
                    other = gr.Button("another seed", min_width=120, elem_id="other")
        quiet = dict(show_progress="hidden", api_visibility="private")
        gr.on([button.click, prompt.submit], run, [prompt, seed, *first, *second], [films, view, slider, note, button],
              trigger_mode="once", concurrency_limit=16, **quiet)  # fmt: skip
        slider.input(show, [films, slider], view, queue=False, **quiet)
        other.click(lambda: random.randrange(10**6), None, seed, queue=False, **quiet)
        chosen = examples.click(lambda row: row[0], examples, prompt, queue=False, **quiet)
        chosen.then(None, js=DRAW, **quiet)
    return page


def import_gradio():
    """Gradio, without its statistics. Raises SystemExit with one sentence when it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise SystemExit(f"the page is made with Gradio, which cannot be imported ({error}): {INSTALL}") from error
    return gradio


def serve(gr, shelf, host, port):
    """Start the page in the background: (Blocks, its address). Raises SystemExit when the port is taken or the host not ours."""
    page = build(gr, shelf)
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # those of the system
    theme = gr.themes.Default(primary_hue="blue", **fonts)
    try:
        _, url, _ = page.launch(server_name=host, server_port=port, theme=theme, css=CSS, footer_links=[], share=False,
                                ssr_mode=False, prevent_thread_lock=True, quiet=True)  # fmt: skip
    except OSError as error:
        where = f"{host}, port {port or '7860 and above'}"
        raise SystemExit(f"cannot serve at {where}: taken, or not this computer's. Give another --port or --host.") from error
    return page, url


def open_browser(playwright):
    """playwright's own Chromium, or the system's."""
    own = Path(playwright.chromium.executable_path).is_file()
    return playwright.chromium.launch(executable_path=None if own else shutil.which("chromium") or shutil.which("google-chrome"))


def screenshot(url, path):
    """What the page looks like at 1280 pixels, half way through the drawings of the first and the last model, in 256 colors."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = open_browser(playwright).new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(120_000)
        page.goto(url)
        page.get_by_label("second model").click()
        page.get_by_role("option").last.click()
        page.get_by_label("number input for steps").nth(1).wait_for()
        page.get_by_text(EXAMPLES[-2]).click()  # fills the prompt and draws
        slider = page.locator("#step input[type=range]:enabled")
        slider.wait_for()
        half = int(slider.get_attribute("max")) // 2
        slider.fill(str(half))
        page.get_by_text(f"step {half} of").wait_for()
        file = io.BytesIO(page.screenshot(full_page=True, animations="disabled"))
    save_atomically(lambda p: Image.open(file).quantize(256).save(p, optimize=True), path)


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m course.demo runs/fm")
    p.add_argument("runs", nargs="*", metavar="RUN", help="students' folders to offer first; assets/zoo and runs/ are found")
    p.add_argument("--decoder", metavar="DIR", help="tiny decoder, such as assets/zoo/decoder; default: the teacher's own")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in the network draw")
    p.add_argument("--port", type=integer(1, 65535), help="default: the first free one from 7860")
    p.add_argument("--screenshot", metavar="FILE", type=Path, help="draw once, save what the page looks like (.png), and end")
    add_device(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore", message="1 captions cut")  # the page says it
    gr = import_gradio()
    shelf = Shelf(find_students(args.runs), pick_device(args.device), args.decoder)
    page, url = serve(gr, shelf, args.host, args.port)
    print(f"{len(shelf.sampling)} models, at {url}  (Ctrl-C ends)", flush=True)
    if args.screenshot:
        screenshot(url, args.screenshot)
        page.close()
    else:
        page.block_thread()


if __name__ == "__main__":
    main()
