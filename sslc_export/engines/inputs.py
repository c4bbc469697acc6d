"""What every engine derives from token ids and a padding mask."""

from __future__ import annotations

import numpy as np


def model_inputs(
    input_ids: np.ndarray, attention_mask: np.ndarray | None, past: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, mask and positions as a model takes them.

    Args:
        input_ids: [B, S], the new tokens.
        attention_mask: [B, past + S], 0 for padding; None for all ones.
        past: Tokens in the cache.

    Returns:
        input_ids int64 [B, S], attention_mask int64 [B, past + S], and position_ids int64 [B, S]: the number of
        unpadded tokens before each one, as transformers counts (padding itself gets 0; nobody looks at it).
    """
    ids = np.ascontiguousarray(input_ids, np.int64)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [B, S] with S > 0, got shape {ids.shape}")
    expected = (ids.shape[0], past + ids.shape[1])
    mask = np.ones(expected, np.int64) if attention_mask is None else np.ascontiguousarray(attention_mask, np.int64)
    if mask.shape != expected:
        raise ValueError(f"attention_mask must cover past and new tokens, {expected}, got shape {mask.shape}")
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
    return ids, mask, np.ascontiguousarray(positions)
