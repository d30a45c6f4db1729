"""assets/toy-sd3 is what it claims to be, and our encoders read it as diffusers does."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from assets.make_toy_sd3 import hard_negatives, make_tokenizers, object_map
from common.encoders import FrozenEncoders, pad_text
from common.pictures import to_pictures, to_tensor
from common.shapes import FAMILIES, ShapesWorld, family_of, make_scene
from evaluate import detect, holds
from teacher import WeightedTextAttention

TOY = Path(__file__).parent.parent / "assets" / "toy-sd3"


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusion3Pipeline.from_pretrained(TOY)  # nothing else: it must load and draw as it is
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encoders():
    return FrozenEncoders(TOY)


def test_size():
    assert sum(p.stat().st_size for p in TOY.rglob("*") if p.is_file()) < 15e6


def test_diffusers_draws_with_it(pipe):
    picture = pipe("a photo of a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[
        0
    ]
    assert picture.size == (64, 64)
    assert pipe.transformer.config.in_channels == 16 and pipe.vae_scale_factor == 8


def test_its_t5_is_silent(pipe):
    """With it or without it the pipeline gives the transformer the same: 24 tokens of CLIP and 256 zeros."""
    prompt = ["a photo of a red circle"]
    parts = {name: part for name, part in pipe.components.items() if name not in ("text_encoder_3", "tokenizer_3")}
    without = StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)
    states = [p.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)[0] for p in (pipe, without)]
    assert states[0].shape == (1, 24 + 256, 192) and torch.equal(*states) and states[0].any()


def test_our_text_states_are_the_pipelines(pipe, encoders):
    captions = ["a photo of a red circle above a blue square", "a photo of three stars", ""]
    states, mask, pooled = encoders.encode_text(captions)
    theirs, _, their_pooled, _ = pipe.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
    length, width = states.shape[1:]
    assert torch.allclose(theirs[:, :length, :width], states, atol=1e-5)
    assert not theirs[:, :length, width:].any() and not theirs[:, length:].any()  # padded with zeros in both directions
    assert torch.allclose(their_pooled, pooled, atol=1e-5)
    assert mask.sum(1).tolist() == [12, 7, 2]  # words, and the two tokens around them
    assert pad_text(states, width + 7).shape[-1] == width + 7 and not pad_text(states, width + 7)[..., width:].any()


def test_padding_does_not_leak_into_real_tokens(encoders):
    """CLIP is causal: the tokens that the mask keeps are the same whatever follows."""
    a, mask, _ = encoders.encode_text(["a photo of a star"])
    b, _, _ = encoders.encode_text(["a photo of a star and a red circle"])
    assert torch.allclose(a[0, :6], b[0, :6], atol=1e-5) and mask[0].sum() == 7


def test_autoencoder_reconstructs_validation_pictures(encoders):
    x = to_tensor([ShapesWorld("val", 0, 64)[i][0] for i in range(64)])
    latents = encoders.encode_pictures(x)
    assert latents.shape == (64, 16, 8, 8)
    assert latents.mean().abs() < 0.05 and latents.std().item() == pytest.approx(1, abs=0.05)
    error = ((encoders.decode_latents(latents) - x) ** 2).mean((1, 2, 3))
    assert (10 * torch.log10(4 / error)).mean() > 30
    assert to_pictures(encoders.decode_latents(latents[:1]))[0].size == (64, 64)


def test_the_tokenizers_are_always_the_same(tmp_path, encoders):
    """Merges that are equally frequent have one order, and the world's captions have the numbers that the encoders learned."""
    for folder in ("a", "b"):
        make_tokenizers(tmp_path / folder)
    files = [(tmp_path / folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in ("a", "b")]
    assert files[0] == files[1]
    captions = [ShapesWorld("train", 0, 300).caption(i) for i in range(300)]
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), encoders.tokenizers, strict=True):
        made = CLIPTokenizer.from_pretrained(tmp_path / "a" / name)
        assert made(captions).input_ids == tokenizer(captions).input_ids


def test_free_text_is_not_lost(encoders):
    states, mask, _ = encoders.encode_text(["Grinning cat face with smiling eyes", "日本語 — naïve Zebra!"])
    assert 5 < mask[0].sum() < 24 and mask[1].sum() > 8
    assert not torch.allclose(states[0], states[1])
    with pytest.warns(UserWarning, match="1 captions cut to 24 tokens"):
        encoders.encode_text(["word " * 40])


def test_one_weighted_token_is_256_equal_tokens():
    """The short cut of the teacher's training is exact."""
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=64, pooled_projection_dim=20, pos_embed_max_size=8,
    )  # fmt: skip
    x, text, pooled, t = (
        torch.randn(2, 16, 8, 8),
        torch.randn(2, 5, 48),
        torch.randn(2, 20),
        torch.tensor([10.0, 900.0]),
    )
    with torch.no_grad():
        long = net(x, torch.cat([text, torch.zeros(2, 256, 48)], 1), pooled, t).sample
        without = net(x, text, pooled, t).sample
        net.set_attn_processor(WeightedTextAttention(256))
        short = net(x, torch.cat([text, torch.zeros(2, 1, 48)], 1), pooled, t).sample
    assert torch.allclose(long, short, atol=1e-5) and not torch.allclose(long, without, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_negatives_are_false_of_the_picture(family):
    """The detector, which looks at the pixels, agrees."""
    rng, world = np.random.default_rng(0), ShapesWorld("val", 3, 20, family)
    for i in range(len(world)):
        picture, caption = world[i]
        wrong = hard_negatives(caption, rng)
        assert len(wrong) == 3 and caption not in wrong and all(family_of(text) for text in wrong)
        found = detect(picture)
        assert holds(caption, found) and not any(holds(text, found) for text in wrong)
    if family in ("position", "attribution"):
        assert sorted(wrong[0].split()) == sorted(caption.split())  # the same words in another order


def test_object_map_covers_the_objects():
    scene = make_scene("val", 0, 0, "attribution")
    target = object_map(scene)
    assert target.shape == (64, 24) and target.min() >= 0 and target.max() <= 1
    classes = set(target.sum(0).nonzero().flatten().tolist())
    assert len(classes) == 2
    area = sum((2 * thing.radius) ** 2 for thing in scene.things) / 64**2
    assert target.sum().item() / 64 == pytest.approx(area, rel=1e-3)


def test_a_wrong_folder_ends_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="it lacks vae, text_encoder"):
        FrozenEncoders(tmp_path)
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (tmp_path / part).mkdir()
    with pytest.raises(SystemExit, match="holds no autoencoder"):
        FrozenEncoders(tmp_path)
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="cannot read the autoencoder"):
        FrozenEncoders(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    (tmp_path / "vae").symlink_to(TOY / "vae")
    with pytest.raises(SystemExit, match="cannot read the text encoders"):
        FrozenEncoders(tmp_path)
