"""How well a model predicts held-out text: perplexity, and its ratio between two models on the same chunks.

Chunks are independent: each starts without context, and its first token is only context. They differ in difficulty far
more than two related models differ on one chunk, so the ratio's standard error comes from differences taken chunk by
chunk, and only perplexities of the very same chunks are ever divided.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sslc_common.errors import InputError
from validate.engine import Engine
from validate.metrics import log_softmax
from validate.progress import Progress, silent
from validate.tokens import check_logits, check_token_ids

# Rows of [positions, vocabulary] that are in float64 at once: 64 × 150 000 × 8 bytes = 77 MB.
_ROWS = 64


@dataclass(frozen=True)
class Perplexity:
    """Of one model on some chunks of text.

    Attributes:
        perplexity: exp(mean_nll); NaN if a logit was NaN or infinite.
        mean_nll: Mean negative log-likelihood of the predicted tokens, in nats.
        standard_error: Of `perplexity`, from the spread over chunks; NaN for a single chunk.
        tokens: Predicted tokens, L − 1 for each chunk.
        chunk_nll: Mean negative log-likelihood of each chunk.
        chunk_tokens: L.
        non_finite: NaN or infinite logits.
        text_sha256: Fingerprint of the chunks.
    """

    perplexity: float
    mean_nll: float
    standard_error: float
    tokens: int
    chunk_nll: tuple[float, ...]
    chunk_tokens: int
    non_finite: int
    text_sha256: str


@dataclass(frozen=True)
class PerplexityRatio:
    """Perplexity over the dense model's on the same chunks.

    Attributes:
        ratio: exp of the mean difference of the chunks' nll.
        standard_error: Of `ratio`, from the paired differences; NaN for a single chunk.
    """

    ratio: float
    standard_error: float


@dataclass(frozen=True)
class Accuracy:
    """What is known about prediction: of the compressed engine, and beside the dense one if there is one."""

    compressed: Perplexity
    dense: Perplexity | None = None
    ratio: PerplexityRatio | None = None


def perplexity(engine: Engine, chunks: np.ndarray, *, batch: int = 1, progress: Progress = silent) -> Perplexity:
    """Perplexity of an engine on chunks of text.

    Args:
        engine: What predicts.
        chunks: Token ids [n, L], L ≥ 2.
        batch: Chunks of one forward pass.
        progress: Wraps the loop over batches.

    Raises:
        InputError: there are no chunks, or they do not suit the model.
    """
    chunks = check_token_ids(chunks, engine.vocab_size, "the held-out text", min_length=2)
    nll: list[float] = []
    non_finite = 0
    for start in progress(range(0, len(chunks), batch), f"Perplexity of {engine.name}"):
        ids = chunks[start : start + batch]
        # Not longer in memory than needed: one chunk's logits are 100 MB for 512 tokens of a vocabulary of 49152.
        logits = check_logits(engine.run(ids)[0], (*ids.shape, engine.vocab_size), engine.name)
        for row, tokens in zip(logits, ids, strict=True):
            total, bad = negative_log_likelihood(row[:-1], tokens[1:])
            nll.append(total / (len(tokens) - 1))
            non_finite += bad
        del logits
    mean = float(np.mean(nll))
    value = _exp(mean)
    return Perplexity(
        perplexity=value,
        mean_nll=mean,
        standard_error=value * _standard_error(nll),  # d exp(x) = exp(x) dx
        tokens=chunks.shape[0] * (chunks.shape[1] - 1),
        chunk_nll=tuple(nll),
        chunk_tokens=chunks.shape[1],
        non_finite=non_finite,
        text_sha256=hashlib.sha256(chunks.tobytes()).hexdigest(),
    )


def perplexity_ratio(compressed: Perplexity, dense: Perplexity) -> PerplexityRatio:
    """Compares two perplexities of the same chunks, paired chunk by chunk.

    Raises:
        InputError: they were measured on different chunks.
    """
    if compressed.text_sha256 != dense.text_sha256:
        raise InputError(
            "Perplexities of different texts cannot be compared",
            got=f"{len(compressed.chunk_nll)} and {len(dense.chunk_nll)} chunks, with different tokens",
            allowed="the same chunks of token ids for both",
            do="Check that both models use the same tokenizer",
        )
    return paired_ratio(compressed.chunk_nll, dense.chunk_nll)


def paired_ratio(nll: Sequence[float], base: Sequence[float]) -> PerplexityRatio:
    """The ratio of two perplexities from the mean negative log-likelihoods of the same chunks."""
    differences = np.subtract(nll, base)
    ratio = _exp(float(differences.mean()))
    return PerplexityRatio(ratio, ratio * _standard_error(differences))


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """Sum over positions, in nats, of −log p(target), and how many logits were not finite.

    Args:
        logits: [n, V].
        targets: Token ids [n].

    Returns:
        The sum, NaN if a logit was not finite, and their number.
    """
    non_finite = int((~np.isfinite(logits)).sum())
    if non_finite:
        return math.nan, non_finite
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows, wanted = logits[start : start + _ROWS].astype(np.float64), targets[start : start + _ROWS]
        total -= float(log_softmax(rows)[np.arange(len(rows)), wanted].sum())
    return total, 0


def _exp(mean_nll: float) -> float:
    """e^x, with infinity rather than an error where a model is hopelessly wrong, and NaN for NaN."""
    with np.errstate(over="ignore"):
        return float(np.exp(mean_nll))


def _standard_error(values: np.ndarray | list[float]) -> float:
    """Of the mean; NaN for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
