"""ALPS: the mask by ADMM, the values by least squares on it.

Meng, Behdin, Wang and Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", NeurIPS 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods.linalg import damped, least_squares_on_support
from compress.methods.masks import top_overall
from compress.methods.solution import Solution, sparse_only
from compress.rules import MaskRule

ITERATIONS = 24
RHO = 0.1  # The paper's first ρ, for a Gram matrix with a unit diagonal.
LEAST_SQUARES = 10  # The paper's steps of conjugate gradients.


def solve(
    W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, iterations: int = ITERATIONS
) -> Solution:
    """The paper's algorithm on min ‖(W − S)X‖² with nnz values in S; rank is not used."""
    H = damped(H)
    S, mask = admm(W, H, nnz, iterations, rule)
    return sparse_only(W, mask, least_squares_on_support(W, mask, S, H, LEAST_SQUARES))


def admm(W: Tensor, H: Tensor, nnz: int, iterations: int, rule: MaskRule | None = None) -> tuple[Tensor, Tensor]:
    """S [N, K] with nnz values, and its mask, by ADMM: B is dense, S is sparse, both are pulled together.

    Args:
        W: [N, K].
        H: [K, K], positive definite (see `damped`).
        nnz: Values of S.
        iterations: Each costs one [N, K]·[K, K] product.
        rule: Of the mask.
    """
    d, A, G = scaled(W, H)
    eigenvalues, Q = torch.linalg.eigh(G)
    del G
    mask = top_overall(A.abs(), nnz, rule)
    S, dual, before, rho = A * mask, torch.zeros_like(A), mask, RHO
    inverse = (Q / (eigenvalues + rho)) @ Q.T
    for iteration in range(iterations):
        B = A + (rho * (S - A) - dual) @ inverse  # G(G + ρ)⁻¹ = 1 − ρ(G + ρ)⁻¹
        target = B + dual / rho
        mask = top_overall(target.abs(), nnz, rule)
        S = target * mask
        dual += rho * (B - S)
        if iteration % 3 == 2:
            rho = faster(rho, int((mask ^ before).sum()) / max(nnz, 1))
            inverse, before = (Q / (eigenvalues + rho)) @ Q.T, mask
    return S / d, mask


def scaled(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scale that ρ is for: d [K] = √diag(H), W·d [N, K], and H/d/dᵀ [K, K], whose diagonal is 1."""
    d = H.diagonal().sqrt()
    return d, W * d, H / d / d[:, None]


def faster(rho: float, changed: float) -> float:
    """The paper's schedule: ρ grows faster while a larger share of the mask still changes."""
    return rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1)
