"""Token ids and logits as the validator takes them: checked against the model."""

from __future__ import annotations

import numpy as np

from sslc_common.errors import InputError


def check_token_ids(ids: np.ndarray, vocab_size: int, what: str, min_length: int = 1) -> np.ndarray:
    """Gives token ids [B, L] back as int64, or says what is wrong with them.

    Args:
        ids: What the caller gave.
        vocab_size: Of the model that will read them.
        what: How an error calls them.
        min_length: Smallest L.

    Raises:
        InputError: not integers, not two-dimensional, too short, or out of the vocabulary.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(f"Cannot use {what}", got=f"{ids.dtype} {list(ids.shape)}", allowed="integers [rows, tokens]")
    if ids.shape[0] == 0 or ids.shape[1] < min_length:
        raise InputError(
            f"There is too little of {what}",
            got=f"{ids.shape[0]} rows of {ids.shape[1]} tokens",
            allowed=f"at least 1 row of {min_length} tokens",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"A token of {what} is not in the model's vocabulary",
            got=high if high >= vocab_size else low,
            allowed=f"0 to {vocab_size - 1}",
            do="Check that the tokenizer belongs to this model",
        )
    return ids.astype(np.int64)


def check_logits(logits: np.ndarray, shape: tuple[int, int, int], name: str) -> np.ndarray:
    """Gives logits back if they have the promised shape [B, S, V].

    Raises:
        InputError: they do not; `name` is the engine's.
    """
    if logits.shape != shape:
        raise InputError(
            f"{name} returns logits of a wrong shape",
            got=list(logits.shape),
            allowed=f"[batch, tokens, vocabulary] = {list(shape)}",
            do="Check that the engine was built from this model",
        )
    return logits


def left_padded(text: np.ndarray, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows from whole to half length (a single row: half), filled up on the left.

    Args:
        text: Token ids [B, L].
        split: Length of the prefill; the last row begins with `split` // 2 positions of padding.

    Returns:
        Token ids and mask, both [B, L].
    """
    rows, tokens = text.shape
    # Any token will do as padding; 0 is in every vocabulary.
    padded, mask = np.zeros_like(text), np.ones_like(text)
    for row in range(rows):
        padding = (split // 2) * row // (rows - 1) if rows > 1 else split // 2
        padded[row, padding:] = text[row, : tokens - padding]
        mask[row, :padding] = 0
    return padded, mask
