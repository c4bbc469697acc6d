"""Magnitude pruning: keep the largest |W| of the matrix. The baseline that looks at no data (Han et al. 2015)."""

from __future__ import annotations

from torch import Tensor

from compress.methods.masks import top_overall
from compress.methods.solution import Solution, sparse_only
from compress.rules import MaskRule


def solve(W: Tensor, H: Tensor | None, nnz: int, rank: int, rule: MaskRule | None = None) -> Solution:
    """Keeps the nnz largest entries; H and rank are not used."""
    mask = top_overall(W.abs(), nnz, rule)
    return sparse_only(W, mask, W * mask)
