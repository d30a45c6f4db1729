"""Fixtures that the tests of several stages share."""

import functools
import os
import sys

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # pytest runs several workers side by side (pyproject.toml), one core each

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with the project's assets, so that runs/ of the project stays as it is."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "assets").symlink_to(Path(__file__).parent.parent / "assets")
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture(autouse=True)
def short_saves(monkeypatch):
    """What takes most of a short run's time: the pictures that a training draws at each save take 2 steps, not 28, and its curves
    are left out. Runs of fixtures that several tests share are saved as they are, and looked at."""
    for name in ("train_fm", "distill", "step_distill", "decoder", "studies.peers"):
        module = sys.modules.get(name)
        if hasattr(module, "draw_pictures") and name != "step_distill":
            monkeypatch.setattr(module, "draw_pictures", functools.partial(module.draw_pictures, steps=2))
        if hasattr(module, "curves"):
            monkeypatch.setattr(module, "curves", lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A Gemma-2 folder of the public layout, with tiny random weights and the width of the tiny UNet's text."""
    import torch  # seconds, which most tests need not
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    words, folder = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "photo", "of", "red", "circle"], tmp_path_factory.mktemp("gemma")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>",
                            padding_side="left").save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=len(words), hidden_size=144, intermediate_size=16, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    Gemma2Model(config).save_pretrained(folder)
    return folder
