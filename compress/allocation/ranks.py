"""What directions of U·V are worth beside values of S, by the energy that both leave of A = √F·W·d [N, K].

The directions are the first of A's SVD, the values the largest entries of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compress.methods.linalg import randomized_svd
from compress.methods.masks import project
from compress.rules import MaskRule

_MOST_DIRECTIONS = 256  # of one layer that are looked at
_OVERSAMPLING = 8


def paying_rank(
    A: Tensor, room: int, factor_cost: int = 1, rule: MaskRule | None = None, most: int = _MOST_DIRECTIONS
) -> int:
    """The rank r, often 0, with the least loss where A gets r directions and room − r(N + K)·factor_cost values.

    r is 0 or a power of two, `most` at most, and takes half of the room at most. The tighter the mask rule, the sooner
    it pays.
    """
    ranks = [rank for rank in candidate_ranks(A, room, factor_cost) if rank <= most]
    parts = leading(A, ranks[-1])

    def loss(rank: int) -> float:
        return losses(A, parts, rank, [room - rank * sum(A.shape) * factor_cost], rule)[0]

    return min(ranks, key=loss)


def candidate_ranks(A: Tensor, room: int, factor_cost: int) -> list[int]:
    """0 and the powers of two that take half of the room at most."""
    N, K = A.shape
    most = min(_MOST_DIRECTIONS, min(N, K), room // (2 * (N + K) * factor_cost))
    return [0] + [1 << i for i in range(most.bit_length())]


def leading(A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, q], s [q], V [K, q]: q ≥ rank leading directions of A, by a randomized SVD of a fixed seed."""
    return randomized_svd(A, min(rank + _OVERSAMPLING, *A.shape))


def losses(
    A: Tensor, parts: tuple[Tensor, Tensor, Tensor], rank: int, counts: Sequence[int], rule: MaskRule | None = None
) -> list[float]:
    """The energy that `rank` directions of `parts` and each number of values, the largest of the rest, leave of A.

    Args:
        A: [N, K].
        parts: Of `leading`.
        rank: How many of its directions.
        counts: Numbers of values; those beyond what the rule allows find no place.
        rule: Of the mask.
    """
    U, s, V = parts
    rest = (A - (U[:, :rank] * s[:rank]) @ V[:, :rank].T).square()
    always = 0.0
    if rule:
        allowed = torch.isfinite(project(rest, rule))
        always, rest = float(rest[~allowed].sum(dtype=torch.float64)), rest[allowed]
    flat = rest.flatten().numpy()
    removed = [max(flat.size - max(count, 0), 0) for count in counts]
    if any(removed):
        flat = np.partition(flat, sorted({count - 1 for count in removed if count}))
    return [always + float(flat[:count].sum(dtype=np.float64)) for count in removed]
