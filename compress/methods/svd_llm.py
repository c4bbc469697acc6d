"""SVD-LLM: a truncated SVD that costs the least on the calibration inputs.

Wang, Zheng, Wan and Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
Compression", ICLR 2025. The paper's later update of U and V by tuning is left out. Choose a rank share of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods.linalg import damped, input_norms, whitened_low_rank
from compress.methods.masks import top_overall
from compress.methods.solution import Solution
from compress.rules import MaskRule


def solve(W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None) -> Solution:
    """The best rank-r part of W for the outputs on X: whiten by the Cholesky factor of XXᵀ, truncate (section 3.1).

    Values that are left over, too few for one more direction, go to the largest entries of the rest.
    """
    U, V = whitened_low_rank(W, torch.linalg.cholesky(damped(H)), rank)
    rest = W - U @ V
    mask = top_overall(rest.abs() * input_norms(H), nnz, rule)
    return Solution(mask, rest * mask, U, V)
