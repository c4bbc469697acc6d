"""3BASiL: sparse and low-rank parts in one ADMM, rather than in turns.

Makni, Behdin, Xu, Ponomareva and Mazumder, "3BASiL: An Algorithmic Framework for Sparse plus Low-Rank Compression of
LLMs", NeurIPS 2025. Only its first stage, the three-block ADMM, is here; the transformer-level matching that follows in
the paper is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods import alps, svd_llm
from compress.methods.linalg import damped, low_rank_again
from compress.methods.masks import top_overall
from compress.methods.solution import Solution
from compress.rules import MaskRule

# The authors' settings: at most so many iterations, ρ renewed every so many of them; after so many the ADMM ends where
# less than this share of the mask changed in the last ten.
ITERATIONS, EVERY, AT_LEAST, SETTLED = 2000, 10, 100, 3e-4


def solve(
    W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, iterations: int = ITERATIONS
) -> Solution:
    """Min ‖(W − S − L)X‖² with a copy D of S that has nnz values; S, D and L are updated in every iteration.

    S ← (H + ρ)⁻¹ of H(W − L) − dual + ρD;  D ← the nnz largest of S + dual/ρ;  L ← the best rank-r part of W − S.
    At the end the nnz largest of S. With rank 0 this is ALPS, with nnz 0 SVD-LLM.
    """
    if rank == 0 or nnz == 0:
        return (svd_llm if rank else alps).solve(W, H, nnz, rank, rule)
    d, A, G = alps.scaled(W, damped(H))
    mask, basis, rho = top_overall(A.abs(), nnz, rule), None, alps.RHO
    rest, D, dual, before = A, A * mask, torch.zeros_like(A), mask  # rest is A − L
    inverse = alps.inverse(G, rho)
    for iteration in range(1, iterations + 1):
        S, mask = alps.step(rest, D, dual, rho, inverse, nnz, rule)
        U, V, basis = low_rank_again(A - S, rank, basis, G)
        rest = A - U @ V
        if iteration % EVERY == 0:
            changed = int((mask ^ before).sum()) / nnz
            if changed == 0 or (iteration > AT_LEAST and changed < SETTLED):
                break
            growth = 1.1 if changed > 0.1 else 1.05 if changed > 0.005 else 1.02
            rho, dual = rho * growth, dual / growth
            del inverse  # before the next one is there, as in `alps`
            inverse, before = alps.inverse(G, rho), mask
    mask = top_overall(S.abs(), nnz, rule)
    return Solution(mask, S * mask / d, U, V / d)
