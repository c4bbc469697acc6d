"""What the validator judges: anything that turns token ids and a cache into logits."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """A causal language model, however it runs.

    Attributes:
        name: How reports call it.
        vocab_size: Width of the logits.
    """

    name: str
    vocab_size: int

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, cache: Any = None
    ) -> tuple[np.ndarray, Any]:
        """One forward pass.

        Args:
            input_ids: int64 [B, S], the new tokens.
            attention_mask: int64 [B, P + S] over past and new tokens, 0 for (left) padding; None for all ones.
                Positions count the ones before a token, as transformers does.
            cache: What the previous call returned, or None before the first token (P = 0).

        Returns:
            Logits, float32 [B, S, vocab_size], and the cache that now holds P + S tokens. The given cache stays valid.
        """
        ...
