"""Cases on which the phone's Swift and this Python must agree: tokens, times, noise, Euler steps, a picture's bytes.

    python -m coreml.cases      # writes those that coreml/app's tests read, from assets/toy-sd3's tokenizers

export_coreml.py leaves the same for its own tokenizers as cases.json beside the packages. `swift test` in coreml/app runs them all
(its README tells how), and tests/test_app.py keeps the committed ones equal to what Python computes today.
"""

import json
from pathlib import Path

import torch
from transformers import CLIPTokenizer

import flow
from common.arguments import Parser
from common.checkpoint import save_atomically
from common.pictures import to_pictures
from common.seeds import rng

COMMITTED = Path(__file__).parent / "app/Tests/SnapGenPipelineTests/Resources/cases.json"
TOY, NAMES = Path(__file__).parent.parent / "assets/toy-sd3", ("tokenizer", "tokenizer_2")
PROMPTS = (
    "a photo of a red circle left of a blue star",
    "A PHOTO of Two BLUE Squares",
    "",
    " \t\n ",
    "stars, circles & squares... (3.14 of them)! #1, 50%?!",  # "!" is the padding of the second tokenizer, and a token of its own
    "it's mine; they're his, isn't it? we'll 's'll ''s 're'd",
    "an emoji 🙂 and a family 👩‍👩‍👧 here",
    "a photo of a " + "very " * 100 + "red circle",  # longer than any text model takes
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "ÜBER cafe\u0301 naïve ΣΑΣ İstanbul ﬁx Ǆ",  # decomposed, and lower case of more than one character
    "日本の赤い丸, नमस्ते, ٣٤ Ⅻ ½, שלום",
    "x\u00a0y\u3000z\u2028w\x85v\u200bu\x0bt\ufeffs",  # white space, and what looks like it
    "a <|endoftext|>b<|ENDOFTEXT|>!! <<|startoftext|> <|StartOfText|>.",
)


def token_cases(tokenizers, length):
    """Every prompt by every tokenizer: {"tokenizer": name, "text", "ids": all of them, "padded": cut and padded to `length`}."""
    how_padded = dict(padding="max_length", max_length=length, truncation=True)

    def case(name, text):
        ids, padded = (tokenizers[name](text, verbose=False, **how).input_ids for how in ({}, how_padded))
        return {"tokenizer": name, "text": text, "ids": ids, "padded": padded}

    return [case(name, text) for name in tokenizers for text in PROMPTS]


def times_case(steps, shift):
    return {"steps": steps, "shift": shift, "times": flow.sampling_timesteps(steps, shift).tolist()}


def noise_case(seed, count=1024):
    """sample.py's noise: `generator` is the number that seeds torch's, of which it reads the lower 32 bits."""
    noise = torch.randn(count, generator=rng(seed))
    return {"seed": seed, "generator": rng(seed).initial_seed() % 2**32, "count": count, "first": noise[:16].tolist(),
            "last": noise[-16:].tolist()}  # fmt: skip


def euler_case(guidance, times):
    """flow.euler_steps on given velocities: x after every step. With guidance: the caption's, then the empty one's."""
    g, steps, texts = rng(len(times)), len(times) - 1, 1 if guidance == 1 else 2
    noise, velocities, seen = torch.randn(1, 2, 2, 2, generator=g), torch.randn(steps, texts, 2, 2, 2, generator=g), []
    given, text = iter(velocities), (torch.zeros(1, 1, 1), torch.ones(1, 1))
    for _, x, _ in flow.euler_steps(lambda *inputs: next(given), noise, text, text, guidance=guidance, times=times):
        seen.append(x.flatten().tolist())
    return {"guidance": guidance, "times": times, "noise": noise.flatten().tolist(),
            "velocities": velocities.flatten(1).tolist(), "latents": seen[1:]}  # fmt: skip


def picture_case(height=3, width=4):
    """What the decoder's package gives, some of it beyond 0 and 255, and the bytes of its picture, row by row."""
    values = torch.rand(1, 3, height, width, generator=rng(0)) * 300 - 20
    (picture,) = to_pictures(values / 127.5 - 1)
    return {"height": height, "width": width, "values": values.flatten().tolist(), "rgb": list(picture.tobytes())}


def cases(tokenizers, length):
    """All cases. tokenizers: {name of the folder: CLIPTokenizer}; length: tokens that the text models take."""
    return {
        "length": length,
        "tokens": token_cases(tokenizers, length),
        "times": [times_case(*case) for case in ((4, 3.0), (28, 1.0), (1, 3.0), (7, 1.7))],
        "noise": [noise_case(seed) for seed in (0, 1, 12345)],
        "euler": [euler_case(1.0, [1.0, 0.9, 0.75, 0.5, 0.0]), euler_case(3.0, flow.sampling_timesteps(2, 3.0).tolist())],
        "picture": picture_case(),
    }


def write(path, tokenizers, length):
    save_atomically(lambda p: p.write_text(json.dumps(cases(tokenizers, length)) + "\n", encoding="utf-8"), path)


def toy_tokenizers():
    return {name: CLIPTokenizer.from_pretrained(TOY / name) for name in NAMES}


def main(argv=None):
    Parser(__doc__, "python -m coreml.cases").parse_args(argv)
    tokenizers = toy_tokenizers()
    write(COMMITTED, tokenizers, tokenizers["tokenizer"].model_max_length)
    print(f"wrote {COMMITTED}")


if __name__ == "__main__":
    main()
