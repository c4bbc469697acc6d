"""Generation: greedy and sampled, its end, its text and its figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sslc_common.errors import InputError
from sslc_export.engines.generate import generate
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from tests.tiny_models import lowered

END = 256


def byte_tokenizer():
    """One token per byte, so that every character beyond ASCII is split over tokens; 256 ends the text."""
    vocabulary = {character: code for code, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"eos_token": "<end>"})
    assert fast.eos_token_id == END
    return fast


TOKENIZER = byte_tokenizer()


class Recital:
    """An engine that says given tokens, whatever it hears, and remembers what it was asked."""

    name, vocab_size = "recital", 257

    def __init__(self, tokens):
        self.tokens, self.heard = tokens, []

    def run(self, input_ids, attention_mask=None, cache=None):
        self.heard.append(input_ids.tolist())
        position = cache or 0
        logits = np.full((1, input_ids.shape[1], self.vocab_size), -np.inf, np.float32)
        logits[0, -1, self.tokens[position]] = 0
        return logits, position + 1


class Dice:
    """An engine with fixed next-token probabilities."""

    name = "dice"

    def __init__(self, probabilities):
        self.logits = np.log(np.array(probabilities, np.float32))
        self.vocab_size = len(probabilities)

    def run(self, input_ids, attention_mask=None, cache=None):
        return np.tile(self.logits, (1, input_ids.shape[1], 1)), cache


def encode(text):
    return list(TOKENIZER(text)["input_ids"])


@given(st.text(min_size=1, max_size=40))
def test_streamed_pieces_add_up_to_the_text_and_split_no_character(text):
    pieces = []
    result = generate(Recital(encode(text)), "x", TOKENIZER, max_new_tokens=len(encode(text)), on_text=pieces.append)
    assert result.text == text
    assert "".join(pieces) == text
    assert all(piece for piece in pieces)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_is_streamed_as_it_comes():
    pieces = []
    generate(Recital(encode("ab€c")), "x", TOKENIZER, max_new_tokens=6, on_text=pieces.append)
    assert pieces == ["a", "b", "€", "c"]


def test_a_character_that_never_ends_is_given_out_at_the_end():
    pieces = []
    result = generate(Recital(encode("a€")[:-1]), "x", TOKENIZER, max_new_tokens=3, on_text=pieces.append)
    assert "".join(pieces) == result.text == "a\N{REPLACEMENT CHARACTER}"


def test_prompt_goes_in_once_and_then_token_by_token():
    engine = Recital([5, 6, 7])
    result = generate(engine, [1, 2, 3], max_new_tokens=3)
    assert engine.heard == [[[1, 2, 3]], [[5]], [[6]]]
    assert (result.tokens, result.prompt_tokens, result.text) == ([5, 6, 7], 3, "")
    assert result.prefill_seconds > 0
    assert result.decode_seconds > 0
    assert result.tokens_per_second == pytest.approx(2 / result.decode_seconds)


def test_one_token_has_no_decoding_speed():
    assert generate(Recital([5]), [1], max_new_tokens=1).tokens_per_second is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tokenizer": TOKENIZER}, [7, END]),
        ({"tokenizer": TOKENIZER, "eos_token_ids": [8]}, [7, END, 8]),
        ({"eos_token_ids": [END, 8]}, [7, END]),
        ({"eos_token_ids": []}, [7, END, 8, 9]),
        ({}, [7, END, 8, 9]),
    ],
)
def test_generation_ends_with_an_end_token(options, expected):
    assert generate(Recital([7, END, 8, 9]), [1], max_new_tokens=4, **options).tokens == expected


def test_special_tokens_are_not_in_the_text():
    pieces = []
    tokens = [*encode("hi"), END]
    result = generate(Recital(tokens), "x", TOKENIZER, on_text=pieces.append)
    assert (result.tokens, result.text, pieces) == (tokens, "hi", ["h", "i"])


def test_sampling_follows_the_probabilities_and_the_seed():
    engine = Dice([0.5, 0.3, 0.15, 0.05])
    options = {"max_new_tokens": 2000, "temperature": 1.0}
    drawn = generate(engine, [0], **options).tokens
    # Four standard deviations of a share over 2000 draws are at most 0.045.
    assert np.bincount(drawn, minlength=4) / 2000 == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.045)
    assert generate(engine, [0], **options).tokens == drawn
    assert generate(engine, [0], seed=1, **options).tokens != drawn


def test_top_p_leaves_the_unlikely_out():
    drawn = generate(Dice([0.05, 0.5, 0.15, 0.3]), [0], max_new_tokens=500, temperature=1.0, top_p=0.75).tokens
    assert set(drawn) == {1, 3}
    only = generate(Dice([0.05, 0.5, 0.15, 0.3]), [0], max_new_tokens=50, temperature=1.0, top_p=0.1).tokens
    assert set(only) == {1}


def test_low_temperature_approaches_greedy():
    engine = Dice([0.2, 0.35, 0.45])
    assert set(generate(engine, [0], max_new_tokens=100, temperature=0.01).tokens) == {2}
    assert set(generate(engine, [0], max_new_tokens=100).tokens) == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is too small. Got: 0"),
        ({"temperature": -1.0}, "temperature is out of range"),
        ({"temperature": float("nan")}, "temperature is out of range"),
        ({"top_p": 0.0}, "top_p is out of range"),
        ({"top_p": 1.5}, "top_p is out of range"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        generate(Recital([1]), **({"prompt": [1]} | options))


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        generate(Recital([1]), "text")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_tokens_are_the_same_in_pytorch_kernel_and_body(family):
    model = lowered(family)
    engines = [model.torch_engine(), OnnxRuntimeEngine(model.path), OnnxRuntimeEngine(model.path, library="none")]
    for seed in range(5):
        prompt = np.random.default_rng(seed).integers(0, 97, 7).tolist()
        expected, *others = (generate(engine, prompt, max_new_tokens=40).tokens for engine in engines)
        assert len(expected) == 40
        assert others == [expected, expected]
