#!/usr/bin/env bash
# datasets leaves pictures of a folder out in silence, and refuses a whole .tar for one sample.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" venv/bin/python - <<'PY'
import inspect
import io
import json
import tarfile
import tempfile
from pathlib import Path

import datasets
import PIL
from datasets.packaged_modules.webdataset import webdataset
from PIL import Image

print(f"datasets {datasets.__version__}, Pillow {PIL.__version__}")
print("guess: a builder takes every picture that has a caption, and says what it does not take.")
datasets.disable_progress_bars()
datasets.utils.logging.set_verbosity_error()
file = io.BytesIO()
Image.new("RGB", (8, 8)).save(file, "PNG")
PNG = file.getvalue()


def rows(kind, **files):
    """How many rows of which columns load_dataset() makes of these files, or its error."""
    with tempfile.TemporaryDirectory() as where:
        if kind == "imagefolder":
            for name, content in files.items():
                Path(where, name).write_bytes(content)
            given = {"data_dir": where}
        else:
            with tarfile.open(f"{where}/0.tar", "w") as tar:
                for name, content in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            given = {"data_files": f"{where}/0.tar"}
        try:
            found = datasets.load_dataset(kind, split="train", cache_dir=f"{where}/cache", **given)
            return len(found), [name for name in found.column_names if not name.startswith("__")]
        except Exception as error:
            return type(error.__cause__ or error).__name__, str(error.__cause__ or error)[:70]


def line(name, text):
    return json.dumps({"file_name": name, "text": text}).encode() + b"\n"


a, b = line("a.png", "a cat"), line("b.png", "a dog")
found = {
    "a.png beside a.txt": rows("imagefolder", **{"a.png": PNG, "a.txt": b"a cat"}),
    "3 pictures, 2 named": rows("imagefolder", **{"a.png": PNG, "b.png": PNG, "c.png": PNG, "metadata.jsonl": a + b}),
    "a text, and a list of texts": rows("imagefolder", **{"a.png": PNG, "b.png": PNG,
                                        "metadata.jsonl": a + line("b.png", ["a dog", "a pet"])}),
    "photo.v0.*, photo.v1.* in a .tar": rows("webdataset", **{"photo.v0.png": PNG, "photo.v0.txt": b"a cat",
                                             "photo.v1.png": PNG, "photo.v1.txt": b"a dog"}),
    "a cut .json in a .tar": rows("webdataset", **{"0.png": PNG, "0.json": b"{}", "1.png": PNG, "1.json": b'{"a'}),
    "no caption in a .tar": rows("webdataset", **{"0.png": PNG, "1.png": PNG, "1.txt": b"a cat"}),
    "captions behind in a .tar": rows("webdataset", **{"0.png": PNG, "1.png": PNG, "0.txt": b"a", "1.txt": b"b"}),
}
for what, (first, second) in found.items():
    print(f"{what:34}{first} {second}")
print("where: datasets/packaged_modules/webdataset/webdataset.py, base_plus_ext:")
print(inspect.getsource(webdataset.base_plus_ext))
values = list(found.values())
assert values[0] == (1, ["image"]), "captions beside pictures are read"
assert values[1] == (2, ["image", "text"]), "what metadata.jsonl does not name is told"
assert values[2][0] == "ArrowInvalid", "captions may be texts and lists"
assert values[3] == (1, ["v0.png", "v0.txt", "v1.png", "v1.txt"]), "names are cut at their last dot"
assert [value[0] for value in values[4:]] == ["JSONDecodeError", "ValueError", "ValueError"], "one sample is left out"
PY
