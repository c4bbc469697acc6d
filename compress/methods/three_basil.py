"""3BASiL: sparse and low-rank parts in one ADMM, rather than in turns.

Makni, Behdin, Xu, Ponomareva and Mazumder, "3BASiL: An Algorithmic Framework for Sparse plus Low-Rank Compression of
LLMs", NeurIPS 2025. Only its first stage, the three-block ADMM, is here; the transformer-level matching that follows in
the paper is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods import alps
from compress.methods.hassle_free import whitened_low_rank
from compress.methods.linalg import damped, least_squares_on_support
from compress.methods.masks import top_overall
from compress.methods.solution import Solution
from compress.rules import MaskRule

ITERATIONS = 24


def solve(
    W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, iterations: int = ITERATIONS
) -> Solution:
    """Min ‖(W − S − L)X‖² with a copy D of S that has nnz values; S, L and D are updated in every iteration.

    S ← (H + ρ)⁻¹ of H(W − L) − dual + ρD;  L ← the best rank-r part of W − S;  D ← the nnz largest of S + dual/ρ.
    Then least squares on the mask of D. With rank 0 this is ALPS.
    """
    if rank == 0:
        return alps.solve(W, H, nnz, rank, rule)
    H = damped(H)
    d = H.diagonal().sqrt()
    A, scaled = W * d, H / d / d[:, None]  # unit diagonal, as in ALPS
    root = torch.linalg.cholesky(scaled)
    eigenvalues, Q = torch.linalg.eigh(scaled)
    U, V = whitened_low_rank(A, root, rank)
    mask = top_overall((A - U @ V).abs(), nnz, rule)
    D, dual, before, rho = (A - U @ V) * mask, torch.zeros_like(A), mask, alps.RHO
    for iteration in range(iterations):
        image = (((A - U @ V) @ Q) * eigenvalues) @ Q.T
        S = (((image - dual + rho * D) @ Q) / (eigenvalues + rho)) @ Q.T
        U, V = whitened_low_rank(A - S, root, rank)
        target = S + dual / rho
        mask = top_overall(target.abs(), nnz, rule)
        D = target * mask
        dual += rho * (S - D)
        if iteration % 3 == 2:
            rho = alps.faster(rho, int((mask ^ before).sum()) / max(nnz, 1))
            before = mask
    D, V = D / d, V / d
    S = least_squares_on_support(W - U @ V, mask, D, H, alps.LEAST_SQUARES)
    return Solution(mask, S, U, V)
