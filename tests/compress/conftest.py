import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.options import CompressOptions
from compress.pipeline import compress_model
from tests.compress.models import VOCABULARY, save_tiny


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Words w0 ... w96 are tokens 0 ... 96; everything else is w0."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _tiny_llama(tmp_path_factory, tokenizer_folder):
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def _compressed(tmp_path_factory, _tiny_llama, tokens):
    out = tmp_path_factory.mktemp("compressed") / "out"
    compress_model(_tiny_llama, out, CompressOptions(method="oats", budget=0.6, rank_share=0.2), tokens=tokens)
    return out


@pytest.fixture(scope="session")
def tokens():
    """Eight sequences of 32 tokens."""
    return torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny_llama(_tiny_llama, tmp_path):
    """A dense tiny model with a tokenizer; a copy that the test may damage."""
    return shutil.copytree(_tiny_llama, tmp_path / "tiny_llama")


@pytest.fixture
def compressed(_compressed, tmp_path):
    """The tiny model compressed; a copy that the test may damage."""
    return shutil.copytree(_compressed, tmp_path / "compressed")
