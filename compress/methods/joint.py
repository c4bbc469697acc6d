"""Ours: sparse and low-rank parts in one ADMM of a few dozen iterations, then least squares on what it found.

The ADMM is 3BASiL's (Makni et al., NeurIPS 2025; see `three_basil`), in which S and L move together from the start.
That matters more than all else: in turns, as HASSLE-free has it, each part settles where the other has no use, and a
low-rank part then costs more than it gives (docs/methods.md). 3BASiL lets ρ grow slowly over some hundreds of
iterations and fits nothing afterwards; here ρ grows faster, and least squares in turns mend what that leaves, in a
fifth of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods import alps, svd_llm
from compress.methods.linalg import damped, least_squares_on_support, whitened_again
from compress.methods.masks import top_overall
from compress.methods.solution import Solution
from compress.rules import MaskRule

ITERATIONS = 60
EVERY = 6  # iterations, ρ is renewed
TURNS = 2  # of least squares: the best L for S, then the values of S on its mask for L
LEAST_SQUARES = 8  # steps of conjugate gradients in each


def solve(
    W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, iterations: int = ITERATIONS
) -> Solution:
    """Min ‖(W − S − L)X‖² over S with nnz values and L of rank r. With rank 0 this is ALPS, with nnz 0 SVD-LLM."""
    if rank == 0 or nnz == 0:
        return (svd_llm if rank else alps).solve(W, H, nnz, rank, rule)
    d, A, G = alps.scaled(W, damped(H))
    root = torch.linalg.cholesky(G)
    eigenvalues, Q = torch.linalg.eigh(G)
    mask, basis, rho = top_overall(A.abs(), nnz, rule), None, alps.RHO
    rest, D, dual, before = A, A * mask, torch.zeros_like(A), mask  # rest is A − L
    inverse = (Q / (eigenvalues + rho)) @ Q.T
    for iteration in range(1, iterations + 1):
        S = rest + (rho * (D - rest) - dual) @ inverse  # G(G + ρ)⁻¹ = 1 − ρ(G + ρ)⁻¹
        target = S + dual / rho
        mask = top_overall(target.abs(), nnz, rule)
        D = target * mask
        dual += rho * (S - D)
        U, V, basis = whitened_again(A - S, root, rank, basis)
        rest = A - U @ V
        if iteration % EVERY == 0:
            rho = alps.faster(rho, int((mask ^ before).sum()) / nnz)
            inverse, before = (Q / (eigenvalues + rho)) @ Q.T, mask
    for _ in range(TURNS):
        U, V, basis = whitened_again(A - D, root, rank, basis)
        D = least_squares_on_support(A - U @ V, mask, D, G, LEAST_SQUARES)
    return Solution(mask, D / d, U, V / d)
