"""Choosing exactly k entries by score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def top_overall(scores: Tensor, k: int) -> Tensor:
    """Bool [N, K] with exactly k entries: the largest of the whole matrix; ties go to the first."""
    return _top(scores.reshape(1, -1), k).view(scores.shape)


def top_per_row(scores: Tensor, k: int) -> Tensor:
    """Bool [N, K] with exactly k entries: the largest of each row, every row having the same number, give or take one.

    Row n gets ⌊k(n+1)/N⌋ − ⌊kn/N⌋ of them, so that the rows with one more are spread evenly.
    """
    N = scores.shape[0]
    ends = torch.arange(N + 1) * k // N
    counts = ends[1:] - ends[:-1]
    mask = torch.empty(scores.shape, dtype=torch.bool)
    for count in counts.unique().tolist():
        rows = counts == count
        mask[rows] = _top(scores[rows], count)
    return mask


def _top(scores: Tensor, count: int) -> Tensor:
    """Bool like scores [R, K], exactly `count` in each row."""
    K = scores.shape[1]
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    # numpy's partition is vectorized and some twenty times as fast as torch.kthvalue or torch.topk here.
    threshold = torch.from_numpy(np.partition(scores.numpy(), K - count, axis=1)[:, K - count, None])
    mask, ties = scores > threshold, scores == threshold
    missing = count - mask.sum(1, keepdim=True)
    if (ties.sum(1, keepdim=True) != missing).any():
        ties &= ties.cumsum(1) <= missing
    return mask | ties
