"""Rounding S to int8 with one float16 scale per row and aligned 64 columns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.layer import SCALE_GROUP

# What the scale that maps the largest value of a group to 127 is multiplied with. Clipping more of it does not pay with
# 64 values of 8 bits; a slightly other grid may fit the large or the important values better.
_CANDIDATES = (1.0, 0.998, 0.996, 0.994, 0.992, 0.99, 1.002, 1.004, 1.006, 1.008, 1.01)
_LARGEST_HALF = 65504.0
_ENTRIES = 1 << 22  # rounded at a time: bounds the temporary tensors


def round_to_int8(S: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds S; of a few scales per group, the one with the least squared error is taken.

    Args:
        S: [N, K], finite, zero where nothing is stored.
        importance: [K], what the squared error of each column is weighted with: the mean square of its input. None
            for equal weights.

    Returns:
        int8 [N, K] and the scales, float16 [N, ⌈K/64⌉]. A group without values, or with smaller ones than float16
        has, has scale 0.

    Raises:
        ArithmeticError: A value is too large for a float16 scale (more than 65504 · 127).
    """
    N, K = S.shape
    words = -(-K // SCALE_GROUP)
    weights = torch.ones(K) if importance is None else importance.float()
    weights = functional.pad(weights, (0, words * SCALE_GROUP - K)).view(words, SCALE_GROUP)
    rounded = torch.empty(N, K, dtype=torch.int8)
    scales = torch.empty(N, words, dtype=torch.float16)
    step = max(1, _ENTRIES // max(K, 1))
    for first in range(0, N, step):
        rows = slice(first, first + step)
        groups = functional.pad(S[rows].float(), (0, words * SCALE_GROUP - K)).view(-1, words, SCALE_GROUP)
        best_values, best_scales = _round_groups(groups, weights)
        rounded[rows] = best_values.reshape(-1, words * SCALE_GROUP)[:, :K].to(torch.int8)
        scales[rows] = best_scales
    return rounded, scales


def _round_groups(groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Values [n, words, 64] as float32 integers and scales float16 [n, words] for groups of the same shape."""
    largest = groups.abs().amax(dim=2)
    if float(largest.max()) * _CANDIDATES[-1] / 127 > _LARGEST_HALF:
        raise ArithmeticError("values are too large for a float16 scale")
    best_error = torch.full_like(largest, torch.inf)
    best_scales = torch.zeros_like(largest, dtype=torch.float16)
    best_values = torch.zeros_like(groups)
    for candidate in _CANDIDATES:
        scales = (largest * (candidate / 127)).to(torch.float16)
        wide = scales.float()[:, :, None]
        values = torch.where(wide > 0, groups / wide, 0).round_().clamp_(-127, 127)
        error = ((values * wide - groups).square_() * weights).sum(dim=2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_values = torch.where(better[:, :, None], values, best_values)
    return best_values, best_scales
