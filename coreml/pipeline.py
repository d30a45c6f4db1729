"""The whole chain, as an app would run it: pipeline.json and the packages, nothing else, interpreted. And its cases.

Cases are what the phone's Swift and this Python must agree on: tokens, times, noise, Euler steps, a picture's bytes.
export_coreml.py leaves them as cases.json beside the packages. `swift test` in coreml/app (its README tells how) runs those of
assets/toy-sd3's tokenizers, and tests/test_app.py keeps them equal to what Python computes today.

    python -m coreml.pipeline      # writes the cases that coreml/app's tests read
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CLIPTokenizer

import flow
from common.arguments import Parser
from common.checkpoint import save_atomically
from common.pictures import to_pictures
from common.seeds import rng
from coreml import mil_interpreter as mil
from coreml.package import function_name
from coreml.texts import tokens_of

PARTS = ("text_encoder", "unet", "decoder")
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


class Packages:
    """The exported folder as something that draws: text -> tokens -> states -> Euler steps -> picture, all interpreted."""

    def __init__(self, folder):
        folder = Path(folder)
        self.plan = json.loads((folder / "pipeline.json").read_text(encoding="utf-8-sig"))
        self.programs = {name: mil.read_package(folder / f"{name}.mlpackage") for name in PARTS}
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in self.plan["tokenizers"]]
        self.max_tokens = self.plan["tokens"]
        self.size = self.plan["latent_sizes"][0]
        self.function = function_name(self.size, self.plan["latent_sizes"])

    def encode(self, captions):
        """(text (N, 1, T, D), mask (N, 1, T)) of N captions, each a run of the package."""
        tokens = [ids[:, None] for ids in tokens_of(self, captions)]
        out = mil.run_many(self.programs["text_encoder"], dict(zip(("tokens", "tokens_2"), tokens, strict=True)))
        return out["text"], out["mask"]

    def draw(self, prompts, seeds):
        """One picture (PIL) per prompt, from the noise that sample.py would take for the same seed."""
        pictures, at_once = [], max(1, 64 * 8**2 // self.size**2)  # as many as have 64 latents of 8x8 together
        bar = tqdm(total=len(prompts), desc="interpreting", disable=True if len(prompts) < 8 else None)
        for start in range(0, len(prompts), at_once):
            some = slice(start, start + at_once)
            pictures += self.draw_some(prompts[some], seeds[some])
            bar.update(len(prompts[some]))
        bar.close()
        return pictures

    def draw_some(self, prompts, seeds):
        times, guidance, shape = self.plan["times"], self.plan["guidance"], (1, self.plan["latent_channels"], self.size, self.size)
        text, mask = self.encode(prompts)
        if guidance != 1:
            empty = self.encode([""])
            text, mask = (torch.cat([some, one.expand_as(some)], 1) for some, one in zip((text, mask), empty, strict=True))
        x = torch.stack([torch.randn(shape, generator=rng(seed)) for seed in seeds])  # (N, 1, C, h, w)
        for t, s in zip(times[:-1], times[1:], strict=True):
            inputs = {"latent": x.expand(-1, text.shape[1], -1, -1, -1), "t": torch.full(text.shape[:2], t), "text": text,
                      "mask": mask}  # fmt: skip
            v = mil.run_many(self.programs["unet"], inputs, function=self.function)["velocity"]
            v = v if guidance == 1 else flow.guide(*v.chunk(2, 1), guidance)
            x = x + (s - t) * v
        picture = mil.run_many(self.programs["decoder"], {"latent": x}, function=self.function)["picture"]
        return to_pictures(picture[:, 0] / 127.5 - 1)


def real_inputs(unet, plan, encoders, captions, text, mask):
    """What the packages get to see while a student draws captions, from PyTorch: {part: {input: (N, *its shape)}}.

    Every input of a UNet is an x_t of the student's own, at up to four of its times. `plan` is pipeline.json; text (1, T, D) and
    mask (1, T) serve where the captions' own states cannot be had: random weights, text encoders that are not exported.
    """
    side, batch, guidance = plan["latent_sizes"][0], plan["batch"], plan["guidance"]
    captions = captions[: max(1, len(captions) * 64**2 // max(64, side) ** 2)]  # large latents take long
    seen, given, empty = {}, [text, mask], [text, mask]
    if plan.get("tokenizers"):
        tokens = (ids[:, None] for ids in tokens_of(encoders, captions))
        seen["text_encoder"] = dict(zip(("tokens", "tokens_2"), tokens, strict=True))
        states = encoders.student_text([*captions, ""], text.shape[-1])
        if states[0].shape[1] == text.shape[1]:  # and not Gemma's, which are had elsewhere
            given, empty = ([some[:-1] for some in states], [some[-1:] for some in states])
    given, empty = ([some.expand(len(captions), *some.shape[1:]) for some in pair] for pair in (given, empty))
    noise = torch.stack([torch.randn(plan["latent_channels"], side, side, generator=rng(i)) for i in range(len(captions))])
    times = plan.get("times") or flow.sampling_timesteps(4).tolist()
    bool_masks = ((states, mask.bool()) for states, mask in (given, empty))
    *steps, (_, drawn, _) = flow.euler_steps(unet, noise, *bool_masks, guidance=guidance, times=times)
    steps = steps[:: -(-len(steps) // 4)]
    text, mask = (torch.stack(pair, 1)[:, :batch].float() for pair in zip(given, empty, strict=True))
    seen["unet"] = {
        "latent": torch.cat([x for _, x, _ in steps])[:, None].expand(-1, batch, -1, -1, -1),
        "t": torch.cat([torch.full((len(captions), batch), t) for t, _, _ in steps]),
        "text": text.repeat(len(steps), 1, 1, 1), "mask": mask.repeat(len(steps), 1, 1),
    }  # fmt: skip
    return seen | {"decoder": {"latent": drawn[:, None]}}


# ------------------------------------------------------------------------------------------------------------------
# Cases


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


def save_cases(path, tokenizers, length):
    save_atomically(lambda p: p.write_text(json.dumps(cases(tokenizers, length)) + "\n", encoding="utf-8"), path)


def toy_tokenizers():
    return {name: CLIPTokenizer.from_pretrained(TOY / name) for name in NAMES}


def main(argv=None):
    Parser(__doc__, "python -m coreml.pipeline").parse_args(argv)
    tokenizers = toy_tokenizers()
    save_cases(COMMITTED, tokenizers, tokenizers["tokenizer"].model_max_length)
    print(f"wrote {COMMITTED}")


if __name__ == "__main__":
    main()
