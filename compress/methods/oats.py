"""OATS: outlier-aware pruning through sparse and low-rank decomposition (Zhang and Papyan, ICLR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods.linalg import input_norms, low_rank
from compress.methods.masks import top_per_row
from compress.methods.solution import Solution
from compress.rules import MaskRule

ITERATIONS = 80  # The paper's N.


def solve(
    W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, iterations: int = ITERATIONS
) -> Solution:
    """Alternates a rank-r SVD and a row-wise hard threshold on W·D, D = diag(XXᵀ)^½ (the paper's algorithm 1).

    The SVD is randomized. With rank 0 this is Wanda.
    """
    d = input_norms(H)
    A = W * d
    S, mask = torch.zeros_like(A), torch.zeros_like(A, dtype=torch.bool)
    U, V = low_rank(A, 0)
    for _ in range(iterations if rank else 1):
        U, V = low_rank(A - S, rank)
        rest = A - U @ V
        mask = top_per_row(rest.abs(), nnz, rule)
        S = rest * mask
    return Solution(mask, S / d, U, V / d)
