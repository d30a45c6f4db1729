"""Text that other people wrote: captions, prompts, the names of ImageNet's classes."""

import collections
import json
import math
from pathlib import Path

TEXT_KEYS = ("caption", "text", "TEXT", "prompt")  # what captions are called elsewhere
NO_TEXT, NO_UTF8 = "with a caption that is no text", "with a caption that is no UTF-8"
# ImageNet has two classes of this one name and no other: a bird, and what stands on a building site [A].
CRANES = {"n02012849": "crane bird", "n03126707": "construction crane"}


def decode(content):
    """Bytes of UTF-8 -> str, without the byte order mark that some editors put first (CLIP reads three tokens
    in it).

    Raises ValueError (UnicodeDecodeError is one) when they are something else.
    """
    return content.decode("utf-8-sig")


def read_text(path):
    """A text file as str. Raises SystemExit when it is no UTF-8."""
    try:
        return decode(Path(path).read_bytes())
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def lines_of(text):
    """The lines of a text. Only "\\n" and "\\r\\n" end one: str.splitlines() also cuts at U+2028 and U+0085,
    which captions and the strings of a JSON line may hold."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def clean(text):
    """Without white space around, and without lone surrogates: halves of a character, which no tokenizer
    takes."""
    return text.encode("utf-8", "ignore").decode().strip()


def check_text(captions):
    """Raises SystemExit for text that no tokenizer takes, such as a Latin-1 byte at the command line."""
    for caption in captions:
        if caption.encode("utf-8", "ignore").decode() != caption:
            raise SystemExit(f"{ascii(caption)} holds a byte or half a character that is no UTF-8: mend it.")


def as_captions(value):
    """What stands where a caption should be -> the texts in it: of a text one, of a list of texts all of
    them, of null, NaN and blanks none. Raises ValueError with the reason when it is something else, such as a
    dictionary."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        return [clean(value)] if clean(value) else []
    if isinstance(value, list) and all(v is None or isinstance(v, str) for v in value):
        return list(dict.fromkeys(text for v in value for text in as_captions(v)))
    raise ValueError(NO_TEXT)


def captions_of_json(text):
    """The captions in a JSON object under one of TEXT_KEYS. Raises ValueError with the reason if it is
    none."""
    try:
        described = json.loads(text)
    except ValueError:
        raise ValueError("with a damaged .json") from None
    if not isinstance(described, dict):
        raise ValueError("with a .json that is no object")
    return next((found for key in TEXT_KEYS if (found := as_captions(described.get(key)))), [])


def class_names(lines):
    """{synset: name} of lines such as "n01440764 tench, Tinca tinca": the first name of each class, or the
    second where several classes share the first, whatever its capitals."""
    names = {synset: [name.strip() for name in rest.split(",")]
             for synset, rest in (line.split(None, 1) for line in lines)}  # fmt: skip
    shared = collections.Counter(first.lower() for first, *_ in names.values())
    told = {synset: others[0] if shared[first.lower()] > 1 and others else first
            for synset, (first, *others) in names.items()}  # fmt: skip
    shared = collections.Counter(name.lower() for name in told.values())
    return {synset: CRANES.get(synset, f"{name} ({synset})") if shared[name.lower()] > 1 else name
            for synset, name in told.items()}  # fmt: skip
