"""Text from an engine, token by token with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sslc_common.errors import InputError
from validate.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """What `generate` produced.

    Attributes:
        tokens: The new tokens, an end-of-text token included if there was one.
        text: The new text, without special tokens; empty if there was no tokenizer.
        prompt_tokens: Length of the prompt.
        prefill_seconds: Time to the first token.
        decode_seconds: Time for all tokens after the first.
    """

    tokens: list[int]
    text: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding; None if there was only one token."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None


def generate(
    engine: Engine,
    prompt: str | Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_ids: Collection[int] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continues a prompt.

    Args:
        engine: Any engine.
        prompt: Text, taken as it is (apply a chat template first if the model wants one), or token ids.
        tokenizer: Needed for text, in or out.
        max_new_tokens: When to stop at the latest.
        temperature: 0 for the most likely token each time; else logits are divided by it before sampling.
        top_p: Samples from the most likely tokens that together have this probability.
        seed: Of the sampling.
        eos_token_ids: Tokens that end the text; None for the tokenizer's own.
        on_text: Called with each new piece of text; no character is split. Needs a tokenizer.

    Raises:
        InputError: an empty prompt or an option out of range.
    """
    ids = _prompt_ids(prompt, tokenizer)
    _check(ids, max_new_tokens, temperature, top_p)
    if eos_token_ids is None:
        own = None if tokenizer is None else tokenizer.eos_token_id
        eos_token_ids = [] if own is None else [own]
    stream = _TextStream(tokenizer, on_text) if tokenizer is not None and on_text is not None else None
    random = np.random.default_rng(seed)

    tokens: list[int] = []
    times = [time.perf_counter()]
    inputs, cache = np.array([ids], np.int64), None
    while len(tokens) < max_new_tokens:
        logits, cache = engine.run(inputs, cache=cache)
        token = _choose(logits[0, -1], temperature, top_p, random)
        tokens.append(token)
        times.append(time.perf_counter())
        if stream is not None:
            stream.put(token)
        if token in eos_token_ids:
            break
        inputs = np.array([[token]], np.int64)
    if stream is not None:
        stream.flush()
    return Generation(
        tokens=tokens,
        text="" if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True)),
        prompt_tokens=len(ids),
        prefill_seconds=times[1] - times[0],
        decode_seconds=times[-1] - times[1],
    )


def _prompt_ids(prompt: str | Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise ValueError("a prompt of text needs a tokenizer")
    return list(tokenizer(prompt)["input_ids"])


def _check(ids: list[int], max_new_tokens: int, temperature: float, top_p: float) -> None:
    if not ids:
        raise InputError("The prompt is empty", got="no tokens", allowed="at least one token")
    if max_new_tokens < 1:
        raise InputError("max_new_tokens is too small", got=max_new_tokens, allowed="1 or more")
    if not 0 <= temperature < np.inf:
        raise InputError("temperature is out of range", got=temperature, allowed="0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise InputError("top_p is out of range", got=top_p, allowed="above 0, up to 1")


def _choose(logits: np.ndarray, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """The next token from logits [vocabulary]."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
        probabilities /= probabilities.sum()
    return int(random.choice(len(probabilities), p=probabilities))


class _TextStream:
    """Turns tokens into pieces of text that add up to the whole.

    A token can be half a character, or take back a space that the one before seemed to end with. So new tokens are
    decoded together with the last piece, and nothing is given out while the text ends in a broken character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._last: list[int] = []  # tokens of the last piece
        self._new: list[int] = []  # tokens that were not given out yet

    def put(self, token: int) -> None:
        self._new.append(token)
        if not self._text().endswith("\N{REPLACEMENT CHARACTER}"):
            self.flush()

    def flush(self) -> None:
        if piece := self._text():
            self._on_text(piece)
            self._last, self._new = self._new, []

    def _text(self) -> str:
        return self._decode(self._last + self._new)[len(self._decode(self._last)) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
