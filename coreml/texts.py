"""What a student's captions are read by, as far as a phone can have it: the two CLIPs, and a constant in Gemma's place.

Training drops each text encoder by itself (common.training.noisy_batch): a dropped encoder reads the empty
caption. Of the empty caption Gemma has one real token, its <bos>, and the rest is padding that nobody
attends to. So a student that was trained with Gemma is exported without it (--gemma none) by putting the
state of that token behind CLIP's, the same for all captions: exactly what the student saw whenever Gemma
was dropped. Gemma itself is read once, at export.
"""

import json
from pathlib import Path

import torch

from common.encoders import GEMMA_TOKENS, FrozenAutoencoder, FrozenEncoders, Gemma
from common.seeds import rng

# diffusers: without T5 its SD3 pipeline appends 256 states of zeros, which our students never see.
EXAMPLE = "a photo of a red circle left of a blue star"


class DroppedGemma:
    """In Gemma's place when it is dropped: every caption is the empty one. `states` (1, n, D) are those of its real tokens."""

    def __init__(self, gemma):
        states, mask = gemma.encode([""])
        self.states, self.name = states[:, mask[0]], f"{gemma.fingerprint()}-dropped"

    def encode(self, captions):
        """As Gemma.encode: (states (B, n, D) float16, mask (B, n) bool)."""
        return self.states.expand(len(captions), -1, -1), torch.ones(len(captions), self.states.shape[1], dtype=torch.bool)

    def fingerprint(self):
        return self.name


def tokens_of(encoders, captions):
    """(tokens, tokens_2), each (B, T) int32, as the phone's tokenizer has to make them."""
    how = dict(padding="max_length", max_length=encoders.max_tokens, truncation=True, return_tensors="pt")
    return [tokenizer(captions, **how).input_ids.int() for tokenizer in encoders.tokenizers]


def open_encoders(config, width, model, teacher=None, drop_gemma=None, wanted=True):
    """(encoders, names of their tokenizers, example text (1, T, width), mask (1, T)) of a student.

    Args:
        config: the student's; model: its folder, for messages; teacher: another SD3 folder than the one in the config.
        drop_gemma: "none" leaves Gemma out. wanted: whether the text encoder is exported.

    Raises SystemExit when its captions are read by something that is not exported: only CLIP text models are.
    """
    folder, gemma = Path(teacher or config["encoders"]), config.get("gemma")
    if drop_gemma and not gemma:
        raise SystemExit(f"{model} was trained without Gemma: leave --gemma out.")
    if gemma and wanted and not drop_gemma:
        raise SystemExit(f"{model} reads its captions with Gemma too, and only CLIP text models are exported: drop Gemma, as "
                         "training did now and then, by --gemma none; or run a language model elsewhere, and give --parts unet "
                         "decoder.")  # fmt: skip
    paths = [folder / name / "config.json" for name in ("text_encoder", "text_encoder_2")]
    kinds = {p.parent: json.loads(p.read_text(encoding="utf-8-sig")).get("model_type") for p in paths if p.is_file()}
    others = {path: kind for path, kind in kinds.items() if kind != "clip_text_model"}
    if others and wanted:  # billions of weights do not belong on a phone, and the layers are not CLIP's
        path, kind = next(iter(others.items()))
        raise SystemExit(f"{path} is a {kind}, and only CLIP text models are exported: run a language model elsewhere, and give "
                         "its states to the UNet (--parts unet decoder).")  # fmt: skip
    if others:
        encoders, tokenizers = FrozenAutoencoder(folder), []
        text, mask = torch.randn(1, 77, width, generator=rng(0)), torch.ones(1, 77)  # will do to check a program
    else:
        encoders, tokenizers = FrozenEncoders(folder), ["tokenizer", "tokenizer_2"]
        if wanted and width < encoders.text_dim:
            raise SystemExit(f"{model} reads the first CLIP alone, and the text package has both: give --parts unet decoder.")
        if drop_gemma:
            if not (Path(gemma) / "config.json").is_file():
                raise SystemExit(f"{gemma} is not there: {model} was trained with that Gemma, of which the export needs the "
                                 "state of one token. Put google/gemma-2-2b there.")  # fmt: skip
            encoders.gemma = DroppedGemma(Gemma(gemma))
        text, mask = encoders.student_text([EXAMPLE], width)
    if gemma and not drop_gemma:  # its tokens stand behind CLIP's
        text, mask = (torch.cat([x, x[:, -1:].expand(-1, GEMMA_TOKENS, *x.shape[2:])], 1) for x in (text, mask))
    return encoders, tokenizers, text, mask
