"""Numbers of one layer that several allocations look at."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from compress.importance import Importance

_SAMPLES = 1 << 16  # entries of one layer that are looked at


def scaled_weight(W: Tensor, importance: Importance) -> Tensor:
    """A = √F·W·d [N, K]: its squared entries are twice the loss, in nats per token, of removing them one by one."""
    return W.float() * importance.inputs.sqrt() * importance.outputs.sqrt()[:, None]


def sampled_logarithms(scores: Tensor) -> np.ndarray:
    """Logarithms of scores [N, K] ≥ 0, ascending; of evenly spaced entries where there are many."""
    return np.sort(logarithms(evenly_spaced(scores)).numpy())


def evenly_spaced(scores: Tensor) -> Tensor:
    """Entries of [N, K] of all rows and columns, all of them where there are few; one dimension."""
    stride = max(1, scores.numel() // _SAMPLES)
    while math.gcd(stride, scores.shape[1]) > 1:  # else it would see some columns only
        stride += 1
    return scores.flatten()[::stride]


def logarithms(scores: Tensor) -> Tensor:
    """Logarithms of scores ≥ 0, finite at 0."""
    return scores.clamp_min(torch.finfo(torch.float32).tiny).log()


def share_above(ascending: np.ndarray, threshold: float) -> float:
    """Share of the scores that are at the threshold or above it."""
    return 1 - float(np.searchsorted(ascending, threshold, side="left")) / len(ascending)


def eigenvalues(A: Tensor) -> Tensor:
    """The squared singular values of A [N, K], ascending [min(N, K)]."""
    A = A.float()
    return torch.linalg.eigvalsh(A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A).clamp_min(0)
