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
EVERY = 3  # iterations, ρ is renewed
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
    before = mask = top_overall(A.abs(), nnz, rule)
    rho = RHO
    S, dual, at_rho = A * mask, torch.zeros_like(A), inverse(G, rho)
    for iteration in range(iterations):
        if iteration and iteration % EVERY == 0:
            rho, dual = faster(rho, dual, changed=int((mask ^ before).sum()) / max(nnz, 1))
            del at_rho  # before the next one is there: with 11008 inputs each takes half a gigabyte
            at_rho, before = inverse(G, rho), mask
        mask = step(A, S, dual, rho, at_rho, nnz, rule)[1]
    return S / d, mask


def step(
    A: Tensor, S: Tensor, dual: Tensor, rho: float, inverse: Tensor, nnz: int, rule: MaskRule | None
) -> tuple[Tensor, Tensor]:
    """One iteration of ADMM on min ‖(A − S)X‖² with nnz values in S.

    Args:
        A: [N, K].
        S: [N, K], sparse; updated in place.
        dual: [N, K], that of B = S, over ρ; updated in place.
        rho: ρ.
        inverse: (G + ρ)⁻¹ [K, K] for G = XXᵀ.
        nnz: Values of S.
        rule: Of the mask.

    Returns:
        B, dense; the mask of S.
    """
    # In place: with 11008 inputs and 4096 outputs each such matrix takes 180 MB.
    B = torch.addmm(A, (S - A).sub_(dual), inverse, alpha=rho)  # since G(G + ρ)⁻¹ = 1 − ρ(G + ρ)⁻¹
    target = dual.add_(B)
    mask = top_overall(target.abs(), nnz, rule)
    torch.mul(target, mask, out=S)  # masked_fill_ takes four times as long
    dual.sub_(S)  # target − S
    return B, mask


def scaled(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scale that ρ is for: d [K] = √diag(H), W·d [N, K], and H/d/dᵀ [K, K], whose diagonal is 1."""
    d = H.diagonal().sqrt()
    return d, W * d, H / d / d[:, None]


def inverse(G: Tensor, rho: float) -> Tensor:
    """(G + ρ)⁻¹ [K, K], by Cholesky: no slower than from the eigenvectors of G, which need not be found then."""
    G = G.clone()
    G.diagonal().add_(rho)
    G = torch.linalg.cholesky(G)
    return torch.cholesky_inverse(G)


def faster(rho: float, dual: Tensor, changed: float) -> tuple[float, Tensor]:
    """The paper's schedule: ρ grows faster while a larger share of the mask still changes. The dual is over ρ."""
    growth = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
    return rho * growth, dual / growth
