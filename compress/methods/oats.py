"""OATS: outlier-aware pruning through sparse and low-rank decomposition (Zhang and Papyan, ICLR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods.linalg import input_norms, low_rank, low_rank_again
from compress.methods.masks import top_per_row
from compress.methods.solution import Solution
from compress.rules import MaskRule

ITERATIONS = 80  # The paper's N.


def solve(
    W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, iterations: int = ITERATIONS
) -> Solution:
    """Alternates a rank-r SVD and a row-wise hard threshold on W·D, D = diag(XXᵀ)^½ (the paper's algorithm 1).

    Each SVD starts from the directions of the one before (`low_rank_again`). With rank 0 this is Wanda.
    """
    d = input_norms(H)
    A = W * d
    S, mask = torch.zeros_like(A), torch.zeros_like(A, dtype=torch.bool)
    (U, V), basis = low_rank(A, 0), None
    for _ in range(iterations if rank else 1):
        U, V, basis = low_rank_again(A - S, rank, basis)
        rest = A - U @ V
        mask = top_per_row(rest.abs(), nnz, rule)
        S = rest * mask
    return Solution(mask, S / d, U, V / d)
