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

PARTS = ("text_encoder", "unet", "decoder")


class Packages:
    """The exported folder as something that draws: text -> tokens -> states -> Euler steps -> picture, all interpreted."""

    def __init__(self, folder):
        folder = Path(folder)
        self.plan = json.loads((folder / "pipeline.json").read_text())
        self.programs = {name: mil.read_package(folder / f"{name}.mlpackage") for name in PARTS}
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in self.plan["tokenizers"]]
        self.size = self.plan["latent_sizes"][0]
        self.function = function_name(self.size, self.plan["latent_sizes"])

    def encode(self, caption):
        """(text, mask) of one caption."""
        how = dict(padding="max_length", max_length=self.plan["tokens"], truncation=True, return_tensors="pt")
        tokens = [tokenizer([caption], **how).input_ids.int() for tokenizer in self.tokenizers]
        out = mil.run(self.programs["text_encoder"], dict(zip(("tokens", "tokens_2"), tokens, strict=True)))
        return out["text"], out["mask"]

    def draw(self, prompts, seeds):
        """One picture (PIL) per prompt, from the noise that sample.py would take for the same seed."""
        pictures, times, guidance = [], self.plan["times"], self.plan["guidance"]
        empty = self.encode("")
        for prompt, seed in zip(tqdm(prompts, desc="interpreting", disable=True if len(prompts) < 8 else None), seeds, strict=True):
            text, mask = self.encode(prompt)
            if guidance != 1:
                text, mask = torch.cat([text, empty[0]]), torch.cat([mask, empty[1]])
            x = torch.randn(1, self.plan["latent_channels"], self.size, self.size, generator=rng(seed))
            for t, s in zip(times[:-1], times[1:], strict=True):
                inputs = {"latent": x.expand(len(text), -1, -1, -1), "t": torch.full((len(text),), t), "text": text, "mask": mask}
                v = mil.run(self.programs["unet"], inputs, function=self.function)["velocity"]
                v = v if guidance == 1 else flow.guide(*v.chunk(2), guidance)
                x = x + (s - t) * v
            picture = mil.run(self.programs["decoder"], {"latent": x}, function=self.function)["picture"]
            pictures += to_pictures(picture / 127.5 - 1)
        return pictures
