"""The whole chain, as an app would run it: pipeline.json and the packages, nothing else, interpreted."""

import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CLIPTokenizer

import flow
from common.pictures import to_pictures
from common.seeds import rng
from coreml import mil_interpreter as mil
from coreml.package import function_name
from coreml.texts import tokens_of

PARTS = ("text_encoder", "unet", "decoder")


class Packages:
    """The exported folder as something that draws: text -> tokens -> states -> Euler steps -> picture, all interpreted."""

    def __init__(self, folder):
        folder = Path(folder)
        self.plan = json.loads((folder / "pipeline.json").read_text())
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
