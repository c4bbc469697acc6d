"""Wanda: keep the largest |W|·‖x‖ of each row.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
"""

from __future__ import annotations

from torch import Tensor

from compress.methods.linalg import input_norms
from compress.methods.masks import top_per_row
from compress.methods.solution import Solution, sparse_only
from compress.rules import MaskRule


def solve(W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None) -> Solution:
    """Keeps the nnz best entries by the paper's equation 1, compared within each output row; rank is not used."""
    mask = top_per_row(W.abs() * input_norms(H), nnz, rule)
    return sparse_only(W, mask, W * mask)
