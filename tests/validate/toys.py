"""A one-layer language model in NumPy with learned positions and a cache, and ways to break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

VOCAB, WIDTH, POSITIONS = 61, 16, 256


@dataclass(frozen=True)
class Cache:
    keys: np.ndarray  # [B, P, WIDTH]
    values: np.ndarray  # [B, P, WIDTH]


class Toy:
    """Attention over all earlier tokens; what it says depends on each token, its position and the padding."""

    def __init__(self, name: str = "toy", dtype: type = np.float64, seed: int = 0, vocab_size: int = VOCAB) -> None:
        random = np.random.default_rng(seed)
        self.name, self.vocab_size, self.dtype = name, vocab_size, dtype
        shapes = {"tokens": (VOCAB, WIDTH), "places": (POSITIONS, WIDTH), "head": (WIDTH, vocab_size)}
        shapes |= dict.fromkeys(("q", "k", "v"), (WIDTH, WIDTH))
        self.weights = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}

    def run(self, input_ids, attention_mask=None, cache=None):
        past = cache.keys.shape[1] if cache else 0
        batch, new = input_ids.shape
        mask = np.ones((batch, past + new), np.int64) if attention_mask is None else attention_mask
        w = self.weights
        x = w["tokens"][input_ids] + w["places"][self.positions(mask)[:, past:]]
        keys, values = x @ w["k"] / WIDTH, x @ w["v"] / WIDTH
        if cache:
            keys, values = np.concatenate([cache.keys, keys], 1), np.concatenate([cache.values, values], 1)
        allowed = self.causal(past, new)[None] & self.visible(mask)[:, None, :]
        scores = np.where(allowed, (x @ w["q"] / WIDTH) @ keys.swapaxes(1, 2), self.dtype(-1e9))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        hidden = x + 2 * (scores / scores.sum(-1, keepdims=True)) @ values
        return self.out((hidden @ w["head"]).astype(np.float32), past), self.keep(Cache(keys, values), cache)

    def positions(self, mask):
        return np.maximum(mask.cumsum(1) - 1, 0)

    def causal(self, past, new):
        return np.arange(past + new)[None] <= past + np.arange(new)[:, None]

    def visible(self, mask):
        return mask.astype(bool)

    def out(self, logits, past):
        return logits

    def keep(self, cache, given):
        return cache


class ScaledLogits(Toy):
    def out(self, logits, past):
        return logits * np.float32(1.001)


class NanAfterManyTokens(Toy):
    def out(self, logits, past):
        if past >= 20:
            logits[0, -1, 3] = np.nan
        return logits


class InfiniteOnce(Toy):
    def out(self, logits, past):
        if past == 0:
            logits[0, 2, 5] = np.inf
        return logits


class NanInPadding(Toy):
    """Harmless: what attention over nothing gives is not defined."""

    def run(self, input_ids, attention_mask=None, cache=None):
        logits, cache = super().run(input_ids, attention_mask, cache)
        if attention_mask is not None:
            logits[attention_mask[:, -input_ids.shape[1] :] == 0] = np.nan
        return logits, cache


class StaleCache(Toy):
    """Forgets the newest token of a decode step: its slot keeps what was there before."""

    def keep(self, cache, given):
        if given is not None:
            cache.keys[:, -1] = given.keys[:, -1]
        return cache


class ShiftedPositions(Toy):
    """Position ids off by one once there is a cache."""

    def positions(self, mask):
        return super().positions(mask) + (mask.shape[1] > 30)


class PositionsCountPadding(Toy):
    def positions(self, mask):
        return np.broadcast_to(np.arange(mask.shape[1]), mask.shape)


class IgnoresPadding(Toy):
    def visible(self, mask):
        return np.ones(mask.shape, dtype=bool)


class NotCausalInChunks(Toy):
    """Aligns the causal mask of a chunk with the end of the sequence only for single tokens."""

    def causal(self, past, new):
        return super().causal(past, new) | (past > 0 and new > 1)


class WritesIntoGivenCache(Toy):
    """Right as long as nobody uses a cache twice: a step spoils the one it was given, as a static buffer would."""

    def keep(self, cache, given):
        if given is not None:
            given.keys[:, 0] += 0.01
        return cache


class Ticking:
    """An engine that takes a given time on a clock of its own, so that tests neither wait nor waver."""

    def __init__(self, name: str, seconds: Callable[[], float], threads: int | None = None) -> None:
        self.name, self.vocab_size, self.threads, self.seconds = name, VOCAB, threads, seconds
        self.calls: list[tuple[int, object]] = []

    def run(self, input_ids, attention_mask=None, cache=None):
        self.calls.append((input_ids.shape[1], cache))
        TIME.now += self.seconds() * (1 if cache is not None else 20)
        return np.zeros((*input_ids.shape, VOCAB), np.float32), f"{self.name} cache of {input_ids.shape[1]}"


class Time:
    now = 0.0


TIME = Time()


def clock() -> float:
    return TIME.now


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))
