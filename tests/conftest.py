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
def samples_in_two_steps(monkeypatch):
    """The pictures that a training draws at each save take 2 steps, not 28: half of a short run's time."""
    for name in ("train_fm", "distill", "studies.peers"):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "draw_pictures", functools.partial(sys.modules[name].draw_pictures, steps=2))


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
