"""What every method returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """A weight W [N, K] as S + U·V.

    Attributes:
        mask: bool [N, K], exactly the number of values that was asked for. What is stored.
        S: float32 [N, K], zero outside the mask.
        U: float32 [N, r].
        V: float32 [r, K].
    """

    mask: Tensor
    S: Tensor
    U: Tensor
    V: Tensor


def sparse_only(W: Tensor, mask: Tensor, S: Tensor) -> Solution:
    """A solution with rank 0."""
    N, K = W.shape
    return Solution(mask, S, torch.zeros(N, 0), torch.zeros(0, K))
