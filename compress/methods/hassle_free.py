"""HASSLE-free: ALPS for the sparse part and a whitened SVD for the low-rank part, in turns.

Makni, Behdin, Xu, Ponomareva and Mazumder, "HASSLE-free: A unified framework for sparse plus low-rank matrix
decomposition for LLMs", CPAL 2025. The low-rank step is exact here, by whitening as in SVD-LLM (Wang et al., ICLR
2025), where the paper descends on U and V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods import alps
from compress.methods.linalg import damped, least_squares_on_support, whitened_low_rank
from compress.methods.solution import Solution
from compress.rules import MaskRule

TURNS = 2  # ADMM finds the mask anew in each.


def solve(W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, turns: int = TURNS) -> Solution:
    """Turns of S ← ALPS(W − L) and L ← the best rank-r part of W − S, both for min ‖(W − S − L)X‖².

    With rank 0 this is ALPS.
    """
    if rank == 0:
        return alps.solve(W, H, nnz, rank, rule)
    H = damped(H)

    def low_rank(rest: Tensor) -> tuple[Tensor, Tensor]:
        # The root is made each time: with 11008 inputs it would keep half a gigabyte beside the ADMM.
        return whitened_low_rank(rest, torch.linalg.cholesky(H), rank)

    U, V = low_rank(W)
    for _ in range(turns):
        S, mask = alps.admm(W - U @ V, H, nnz, alps.ITERATIONS, rule)
        S = least_squares_on_support(W - U @ V, mask, S, H, alps.LEAST_SQUARES)
        U, V = low_rank(W - S)
    return Solution(mask, least_squares_on_support(W - U @ V, mask, S, H, alps.LEAST_SQUARES), U, V)
