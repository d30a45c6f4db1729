"""The student in a web page: networks as ONNX, each checked beside PyTorch, tokenizers, page and runtime in one folder.

    python -m web.export                               # runs/step_distill, runs/decoder (or the zoo's) -> build/web/, verified
    python -m web.export --model assets/zoo/fm         # any student: a guided one reads the empty caption too
    python -m web.export --serve 8000                  # the same, then serves it, and prints the addresses

The folder works from any static host: put it there as it is. Weights are float16 in the files and float32 in the browser. Two
bars for every network, as ONNX Runtime computes it here: in float32 at most 1e-4 off PyTorch, from float16 weights at least 45 dB.
Then a whole picture, from tokens to pixels, beside sample.py's: at least 40 dB. The page's own code (tokens, noise, steps) is held
against Python in a browser by tests/test_web.py.
"""

import functools
import gzip
import hashlib
import http.server
import json
import logging
import re
import shutil
import socket
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

import flow
from common.arguments import Parser, integer
from common.checkpoint import check_encoders, latest, load_student, save_atomically, save_json
from common.device import describe_machine
from common.pictures import to_pictures
from common.seeds import rng
from coreml.layers import PhoneText
from coreml.texts import EXAMPLE, open_encoders, tokens_of
from coreml.verify import decibels
from data import PROMPTS
from decoder import load_decoder
from evaluate import prompts_of
from latency import PAPER
from sample import draw_pictures
from web.networks import WebDecoder, WebText, WebUNet

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web"
RUNTIMES = {"WebAssembly": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
            "WebGPU": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify")}  # fmt: skip
NAMES = {"text_encoder": "text encoder", "unet": "UNet, one step", "decoder": "decoder"}
FLOAT32_BAR, FLOAT16_BAR, PICTURE_BAR = 1e-4, 45.0, 40.0  # largest error; decibels of a network; of a whole picture
MOST_BYTES, SMALL_UNET = 12e6, 4e6  # the networks of a UNet of at most so many parameters have to stay below
SMALLEST = 256  # numbers in a tensor that is worth halving


# ------------------------------------------------------------------------------------------------------------------
# Networks


def make_networks(unet, decoder, encoders, tail, side):
    """{part: (module, {input: example}, {output: what is expected}, unit of the outputs, the original network's call)}"""
    channels, width = unet.cfg.latent_channels, unet.cfg.text_dim
    tokens = dict(zip(("tokens", "tokens_2"), tokens_of(encoders, [EXAMPLE]), strict=True))
    latent, t = torch.randn(1, channels, side, side, generator=rng(0, side)), torch.full((1,), 0.9)
    text = WebText(PhoneText(encoders.text_encoders, width, encoders.tokenizers[0].eos_token_id, tail), unet).eval()
    read = functools.partial(encoders.student_text, [EXAMPLE], width)
    with torch.no_grad():
        call_unet, call_decoder = functools.partial(unet, latent, t, *read()), functools.partial(decoder.decode_latents, latent)
        states = dict(zip(("keys", "values", "mask"), text(**tokens), strict=True))
        velocity, picture = call_unet(), (call_decoder() + 1) * 127.5
    return {  # states are checked where the original UNet, which reads its own text, says the same
        "text_encoder": (text, tokens, states, 1.0, read),
        "unet": (WebUNet(unet).eval(), {"latent": latent, "t": t} | states, {"velocity": velocity}, 1.0, call_unet),
        "decoder": (WebDecoder(decoder).eval(), {"latent": latent}, {"picture": picture}, 127.5, call_decoder),
    }


def to_onnx(module, inputs, outputs):
    """An ONNX model (in memory) of a module at fixed sizes, in float32."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not installed
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, tuple(inputs.values()), dynamo=True, input_names=list(inputs),
                                    output_names=list(outputs), opset_version=20, verbose=False)  # fmt: skip
    model = program.model_proto
    for node in model.graph.node:  # where each came from in Python: a third of the file
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    return model


def halve(model):
    """The same model with its large tensors in float16, and a Cast behind each: a runtime computes these once, when it loads."""
    small = onnx.ModelProto()
    small.CopyFrom(model)
    casts = []
    for tensor in small.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= SMALLEST:
            name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *small.graph.node]
    del small.graph.node[:]
    small.graph.node.extend(nodes)
    return small


def open_session(model):
    """What runs an ONNX model (or its bytes) on one thread: call it with {input: array}, get {output: tensor}."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs):
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        return dict(zip(names, map(torch.from_numpy, session.run(None, arrays)), strict=True))

    return run


def verify(name, model, small, inputs, expected, unit):
    """(largest error of the float32 model, smallest decibels of the float16 one). Raises SystemExit when a bar is missed."""
    exact, halved = (open_session(some)(inputs) for some in (model, small))
    error = max(((exact[out] - value).abs().max() / unit).item() for out, value in expected.items())
    worst = min(decibels(value, halved[out]) for out, value in expected.items())
    if not error <= FLOAT32_BAR or not worst >= FLOAT16_BAR:
        raise SystemExit(f"{NAMES[name]}: ONNX Runtime is {error:.1e} off PyTorch in float32 (at most {FLOAT32_BAR}) and has "
                         f"{worst:.1f} dB from float16 weights (at least {FLOAT16_BAR}), so the page was not written. Train on, "
                         "or export another student.")  # fmt: skip
    return error, worst


def milliseconds(call, n=20):
    """Median of the processor time of a call, after three."""
    times = []
    with torch.no_grad():
        for _ in range(n + 3):
            start = time.process_time()
            call()
            times.append(1000 * (time.process_time() - start))
    return statistics.median(times[3:])


def draw(models, about, encoders, prompt, seed):
    """One picture (PIL) by the exported networks, with the loop that web/app.js has."""
    run = {name: open_session(model) for name, model in models.items()}

    def read(caption):
        return run["text_encoder"](dict(zip(("tokens", "tokens_2"), tokens_of(encoders, [caption]), strict=True)))

    text, empty = read(prompt), read("") if about["guidance"] != 1 else None
    x = torch.randn(1, about["latent_channels"], about["side"], about["side"], generator=rng(seed))
    for t, s in zip(about["times"][:-1], about["times"][1:], strict=True):
        now = {"latent": x, "t": torch.tensor([t])}
        v = run["unet"](now | text)["velocity"]
        if empty and about["interval"][0] <= t <= about["interval"][1]:
            v = flow.guide(v, run["unet"](now | empty)["velocity"], about["guidance"])
        x = x + (s - t) * v
    return to_pictures(run["decoder"]({"latent": x})["picture"] / 127.5 - 1)[0]


def picture_decibels(expected, found):
    """Of two pictures: signal 255, as PSNR counts."""
    error = (np.asarray(expected, float) - np.asarray(found, float)) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-10)))


# ------------------------------------------------------------------------------------------------------------------
# The folder


def describe(folder, unet, decoder, config, side):
    """What student.json says: all that the page has to know about this student."""
    sampling = config["sampling"]
    own = config.get("settings", {}).get("data")  # a student of somebody's own pictures: their words are not the world's
    captions = [] if own else prompts_of("train", 500, 0)
    words = {word for caption in captions for word in re.findall(r"[^\W\d_]+", caption.lower())}
    sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (unet, decoder)]
    about = (f"The student: {folder}, a UNet of {sizes[0]:.1f} M parameters and a decoder of {sizes[1]:.2f} M, for "
             f"{side}x{side} latents and pictures of {8 * side} pixels. The paper's: 379 M and 1.38 M, for 128x128 latents and "
             "1024 pixels, by Core ML on a phone's neural engine.")  # fmt: skip
    return {
        "about": about, "latent_channels": unet.cfg.latent_channels, "side": side, "steps": sampling["steps"],
        "times": sampling.get("times") or flow.sampling_timesteps(sampling["steps"], sampling["shift"]).tolist(),
        "shift": sampling["shift"], "guidance": sampling["guidance"], "interval": sampling.get("guidance_interval", (0, 1)),
        "examples": [] if own else list(PROMPTS), "words": sorted(words), "paper": PAPER,
    }  # fmt: skip


def pack(data, path):
    """Write bytes compressed. Returns {"file": name, "bytes", "packed", "hash"}; the same bytes give the same file."""
    packed = gzip.compress(data, 9, mtime=0)
    save_atomically(lambda p: p.write_bytes(packed), path)
    return {"file": path.name, "bytes": len(data), "packed": len(packed), "hash": hashlib.sha256(data).hexdigest()[:16]}


def copy_page(out):
    """The page and the runtime, its WebAssembly compressed. Returns (version, {backend: packed bytes})."""
    packed = {}
    for name in ("index.html", "app.js", "student.js", "sw.js"):
        shutil.copyfile(HERE / name, out / name)
    for backend, (script, binary) in RUNTIMES.items():
        for file in (script, f"{binary}.mjs"):
            shutil.copyfile(RUNTIME / "dist" / file, out / "ort" / file)
        wasm = pack((RUNTIME / "dist" / f"{binary}.wasm").read_bytes(), out / "ort" / f"{binary}.wasm.gz")
        packed[backend] = wasm["packed"]
    return json.loads((RUNTIME / "package.json").read_text(encoding="utf-8-sig"))["version"], packed


def check_size(files, parameters):
    """Prints what the networks weigh. Raises SystemExit when those of a small UNet weigh too much."""
    total = sum(files[name]["bytes"] for name in NAMES)
    sizes, unet = f"the networks weigh {total / 1e6:.1f} MB, ", f"a UNet of {parameters / 1e6:.1f} M parameters"
    if total <= MOST_BYTES:
        print(f"{sizes}within the {MOST_BYTES / 1e6:.0f} MB that a phone is to be sent")
    elif parameters <= SMALL_UNET:
        raise SystemExit(f"{sizes}and those of {unet} have to stay within {MOST_BYTES / 1e6:.0f} MB: something is stored twice.")
    else:
        print(f"{sizes}more than the {MOST_BYTES / 1e6:.0f} MB that a phone is to be sent: {unet} does not fit")


def export(model_folder, decoder_folder, out, teacher=None, latent=None, drop_gemma=None):
    """Everything into the folder `out`, or a SystemExit and nothing. See parse_arguments() for the others."""
    (unet, config), (decoder, decoder_config) = load_student(model_folder), load_decoder(decoder_folder)
    encoders, *_ = open_encoders(config, unet.cfg.text_dim, model_folder, teacher, drop_gemma)
    check_encoders(config, encoders), check_encoders(decoder_config, encoders)
    side, step = latent or config["latent_size"][0], 2 ** (len(unet.cfg.channels) - 1)
    if side % step:
        raise SystemExit(f"--latent must be a multiple of {step}, not {side}.")
    if out.exists() and any(out.iterdir()) and not (out / "student.json").is_file():
        raise SystemExit(f"{out} holds other files, which would be lost: give another --out.")
    if not (RUNTIME / "package.json").is_file():
        raise SystemExit("onnxruntime-web is not installed: npm ci --prefix web")
    about = describe(model_folder, unet, decoder, config, side)
    torch.set_num_threads(1)  # as a page has
    networks = make_networks(unet, decoder, encoders, getattr(encoders.gemma, "states", None), side)
    models, report = {}, {}
    print("network         float32 error  float16 dB  operations      MB  sent MB   ms of one thread: PyTorch  ONNX Runtime")
    for name, (module, inputs, expected, unit, original) in networks.items():
        model = to_onnx(module, inputs, expected)
        small = halve(model)
        report[name] = verify(name, model, small, inputs, expected, unit)
        models[name], operations = small.SerializeToString(), len(model.graph.node)
        sent, there = len(gzip.compress(models[name], 9)), milliseconds(functools.partial(open_session(model), inputs))
        print(f"{NAMES[name]:16}{report[name][0]:13.1e}{report[name][1]:12.1f}{operations:12}{len(models[name]) / 1e6:8.2f}"
              f"{sent / 1e6:9.2f}{milliseconds(original):28.2f}{there:14.2f}")  # fmt: skip
    prompt = (about["examples"] or [EXAMPLE])[0]
    config = {**config, "latent_size": [side, side]}
    whole = picture_decibels(draw_pictures(unet, config, encoders, [prompt], [0], decoder=decoder)[0],
                             draw(models, about, encoders, prompt, 0))  # fmt: skip
    if not whole >= PICTURE_BAR:
        raise SystemExit(f"a whole picture is {whole:.1f} dB from sample.py's (at least {PICTURE_BAR}), and was not written.")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".") as scratch:
        new = Path(scratch) / "web"
        (new / "ort").mkdir(parents=True)
        version, packed = copy_page(new)
        files = {name: pack(data, new / f"{name}.onnx.gz") for name, data in models.items()}
        check_size(files, sum(p.numel() for p in unet.parameters()))
        tokenizers = [read_tokenizer(tokenizer) for tokenizer in encoders.tokenizers]
        files["tokenizers"] = pack(json.dumps(tokenizers).encode(), new / "tokenizers.json.gz")
        sent = sum(file["packed"] for file in files.values())
        about |= {
            "runtime": version, "tokens": encoders.max_tokens, "files": files, "verified": report, "picture_decibels": whole,
            "packed": {backend: some + sent for backend, some in packed.items()}, "machine": describe_machine(torch.device("cpu")),
        }  # fmt: skip
        save_json(about, new / "student.json")
        if out.exists():
            out.rename(Path(scratch) / "old")
        new.rename(out)
    print(f"a whole picture: {whole:.1f} dB of sample.py's. Sent to a browser: "
          + ", ".join(f"{size / 1e6:.1f} MB with {backend}" for backend, size in about["packed"].items()))
    print(f"wrote {out}/: put it on any static host, or look at it here: python -m web.export --serve 8000")


def read_tokenizer(tokenizer):
    """tokenizer.json and tokenizer_config.json, as one object."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file, settings = (json.loads((Path(folder) / name).read_text(encoding="utf-8-sig"))
                          for name in ("tokenizer.json", "tokenizer_config.json"))  # fmt: skip
    return {"file": file, "settings": settings}


# ------------------------------------------------------------------------------------------------------------------
# A static host for a classroom


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; texts are compressed on the way, as public hosts do. (Networks and WebAssembly are in their files.)"""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".js": "text/javascript",
                      ".gz": "application/octet-stream"}  # fmt: skip

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if path.suffix not in (".html", ".js", ".mjs", ".json") or "gzip" not in self.headers.get("Accept-Encoding", ""):
            super().do_GET()
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = gzip.compress(path.read_bytes())
        self.send_response(200)
        headers = {"Content-Type": self.guess_type(path), "Content-Encoding": "gzip", "Content-Length": len(data)}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def end_headers(self):
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_):
        pass


def open_server(folder, host, port):
    try:
        return http.server.ThreadingHTTPServer((host, port), functools.partial(Handler, directory=folder))
    except OSError as error:
        raise SystemExit(f"port {port} cannot be used ({error.strerror}): give another, such as --serve {port + 1}.") from error


def address_in_the_room():
    """This machine's address in its network, or None. (Nothing is sent: a UDP socket only looks up the way.)"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def serve(folder, port):
    server, there = open_server(folder, "", port), address_in_the_room()
    print(f"on this machine: http://localhost:{server.server_port}/")
    if there:
        print(f"on a phone in the same network: http://{there}:{server.server_port}/ (browsers give WebGPU and offline use to "
              "localhost and https alone, so a phone draws with WebAssembly here)")  # fmt: skip
    print("Ctrl-C ends it.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m web.export --model runs/step_distill --decoder runs/decoder --out build/web")
    p.add_argument("--model", metavar="DIR", help="the student; default: runs/step_distill, or the zoo's if there is none")
    p.add_argument("--decoder", metavar="DIR", help="the tiny decoder; default: runs/decoder, or the zoo's if there is none")
    p.add_argument("--teacher", metavar="DIR", help="SD3 folder with the text encoders, if not the one in the student's config")
    p.add_argument("--latent", type=integer(1), metavar="SIDE", help="side of the latent, if not the one trained on")
    p.add_argument("--gemma", choices=("none",), help="leave Gemma out of a student that was trained with it")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("build/web"),
                   help="where the page goes; an older one is replaced")  # fmt: skip
    p.add_argument("--serve", type=integer(0, 65535), metavar="PORT", help="then serve the page to this network")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    model, decoder = args.model or latest("step_distill"), args.decoder or latest("decoder")
    export(model, decoder, args.out, args.teacher, args.latent, args.gemma)
    if args.serve is not None:
        serve(args.out, args.serve)


if __name__ == "__main__":
    main()
