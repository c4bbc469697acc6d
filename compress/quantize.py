"""Rounding S to int8 or int4 with one float16 scale per row and aligned 64 columns, every value for itself.

`compress.rounding` begins with it and does better where the inputs of the layer are known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.layer import SCALE_GROUP

LIMITS = {8: (-127, 127), 4: (-8, 7)}  # Smallest and largest value, by bits. −128 would be of little use.

# What the scale that just fits a group's values is multiplied with. Clipping more of it does not pay with 64 values of
# 8 bits; a slightly other grid may fit the large or the important values better. With 4 bits clipping pays.
_CANDIDATES = {
    8: (1.0, 0.998, 0.996, 0.994, 0.992, 0.99, 1.002, 1.004, 1.006, 1.008, 1.01),
    4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6),
}
_LARGEST_HALF = 65504.0
_ENTRIES = 1 << 22  # rounded at a time: bounds the temporary tensors


def round_to_nearest(S: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds S; of a few scales per group, the one with the least squared error is taken.

    Args:
        S: [N, K], finite, zero where nothing is stored.
        bits: 8 or 4.
        importance: [K], what the squared error of each column is weighted with: the mean square of its input. None
            for equal weights.

    Returns:
        int8 [N, K], within LIMITS, and the scales, float16 [N, ⌈K/64⌉]. A group without values, or with smaller ones
        than float16 has, has scale 0.

    Raises:
        ArithmeticError: A value is too large for a float16 scale.
    """
    N, K = S.shape
    groups = -(-K // SCALE_GROUP)
    weights = torch.ones(K) if importance is None else importance.float()
    weights = functional.pad(weights, (0, groups * SCALE_GROUP - K)).view(groups, SCALE_GROUP)
    rounded = torch.empty(N, K, dtype=torch.int8)
    scales = torch.empty(N, groups, dtype=torch.float16)
    step = max(1, _ENTRIES // max(K, 1))
    for first in range(0, N, step):
        rows = slice(first, first + step)
        grouped = functional.pad(S[rows].float(), (0, groups * SCALE_GROUP - K)).view(-1, groups, SCALE_GROUP)
        best_values, best_scales = _round_groups(grouped, bits, weights)
        rounded[rows] = best_values.reshape(-1, groups * SCALE_GROUP)[:, :K].to(torch.int8)
        scales[rows] = best_scales
    return rounded, scales


def per_column(scales: Tensor, K: int) -> Tensor:
    """Scales [N, ⌈K/64⌉] as float32 [N, K]."""
    return scales.float().repeat_interleave(SCALE_GROUP, dim=1)[:, :K]


def _round_groups(groups: Tensor, bits: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Values [n, groups, 64] as float32 integers and scales float16 [n, groups] for groups of the same shape."""
    low, high = LIMITS[bits]
    fitting = torch.maximum(groups.amax(dim=2) / high, groups.amin(dim=2) / low).abs()  # of an empty group 0, not −0
    if float(fitting.max()) * max(_CANDIDATES[bits]) > _LARGEST_HALF:
        raise ArithmeticError("values are too large for a float16 scale")
    best_error = torch.full_like(fitting, torch.inf)
    best_scales = torch.zeros_like(fitting, dtype=torch.float16)
    best_values = torch.zeros_like(groups)
    for candidate in _CANDIDATES[bits]:
        scales = (fitting * candidate).to(torch.float16)
        wide = scales.float()[:, :, None]
        values = torch.where(wide > 0, groups / wide, 0).round_().clamp_(low, high)
        error = ((values * wide - groups).square_() * weights).sum(dim=2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_values = torch.where(better[:, :, None], values, best_values)
    return best_values, best_scales
