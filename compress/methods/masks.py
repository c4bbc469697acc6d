"""Choosing exactly k entries by score, under a mask rule."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from compress.rules import MaskRule


def top_overall(scores: Tensor, k: int, rule: MaskRule | None = None) -> Tensor:
    """Bool [N, K] with exactly k entries: the largest of the whole matrix under the rule; ties go to the first."""
    return _top(project(scores, rule).reshape(1, -1), k).view(scores.shape)


def top_per_row(scores: Tensor, k: int, rule: MaskRule | None = None) -> Tensor:
    """Bool [N, K] with exactly k entries: the largest of each row, every row having the same number, give or take one.

    Row n gets ⌊k(n+1)/N⌋ − ⌊kn/N⌋ of them, so that the rows with one more are spread evenly.
    """
    N, scores = scores.shape[0], project(scores, rule)
    ends = torch.arange(N + 1) * k // N
    counts = ends[1:] - ends[:-1]
    mask = torch.empty(scores.shape, dtype=torch.bool)
    for count in counts.unique().tolist():
        rows = counts == count
        mask[rows] = _top(scores[rows], count)
    return mask


def project(scores: Tensor, rule: MaskRule | None) -> Tensor:
    """Scores [N, K] with −∞ for all but the best `cap` of each group, ties going to the first.

    The best k of the result are the best k under the rule, for any k up to `rule.most`.
    """
    if rule is None:
        return scores
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[1] % rule.group), value=-math.inf)
    kept = _top(padded.reshape(-1, rule.group), rule.cap).view(padded.shape)[:, : scores.shape[1]]
    return scores.masked_fill(~kept, -math.inf)


def cost(scores: Tensor, k: int, rule: MaskRule) -> float:
    """Energy that the best k entries under the rule leave out, over what the best k of all leave out, less 1.

    Args:
        scores: [N, K], not negative; energy is their square.
        k: Entries kept; at most `rule.most`.
        rule: The rule.
    """
    energy = scores.double().square()
    free, ruled = (
        float(energy[~_top(project(scores, r).reshape(1, -1), k).view(scores.shape)].sum()) for r in (None, rule)
    )
    return ruled / free - 1 if free else 0.0


def _top(scores: Tensor, count: int) -> Tensor:
    """Bool like scores [R, K], exactly `count` in each row."""
    K = scores.shape[1]
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    # numpy's partition is vectorized and some twenty times as fast as torch.kthvalue or torch.topk here.
    # The copy lets go of the partition, which is as large as the scores.
    threshold = torch.from_numpy(np.partition(scores.numpy(), K - count, axis=1)[:, K - count, None].copy())
    mask = scores >= threshold
    # Over all rows, as no row has fewer than `count`, and a sum along rows would widen the mask to 64 bits first.
    if mask.count_nonzero() > count * len(scores):  # several are as large as the threshold
        mask, ties = scores > threshold, scores == threshold
        missing = count - mask.sum(1, keepdim=True, dtype=torch.int32)  # torch would count in 64 bits
        mask |= ties & (ties.cumsum(1, dtype=torch.int32) <= missing)
    return mask
