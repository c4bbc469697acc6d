"""Our side of the comparisons, in the form that `theirs` has: W [N, K] as S + U·V, summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.methods import alps, cap
from compress.methods.linalg import damped, input_norms, least_squares_on_support
from compress.solve import SOLVERS
from published.problem import Problem, Setting


def by_method(method: str, problem: Problem, setting: Setting, **arguments: Any) -> Tensor:
    """What the pipeline calls, as it calls it."""
    N, K = problem.W.shape
    nnz = 0 if method == "svd_llm" else setting.nnz(N, K)
    _, S, U, V = SOLVERS[method](problem.W, problem.H, nnz, setting.rank, setting.rule, **arguments)
    return S + U @ V


def hassle_free_in_their_order(problem: Problem, setting: Setting, turns: int) -> Tensor:
    """HASSLE-free of our parts as the authors' code has it: from L = 0, S first, nothing after the last L.

    Their randomized SVD has five directions more than the rank; ours has more, and leaves less.
    """
    W, H = problem.W, damped(problem.H)
    root, L = torch.linalg.cholesky(H), torch.zeros_like(W)
    for _ in range(turns):
        S, mask = alps.admm(W - L, H, setting.nnz(*W.shape), alps.ITERATIONS, setting.rule)
        S = least_squares_on_support(W - L, mask, S, H, alps.LEAST_SQUARES)
        left, s, right = (part[..., : setting.rank] for part in torch.svd_lowrank((W - S) @ root, setting.rank + 5))
        L = torch.linalg.solve_triangular(root, (left * s) @ right.T, upper=False, left=False)
    return S + L


def robust_pca(problem: Problem, _: Setting, iterations: int = cap.ITERATIONS) -> Tensor:
    """The low-rank part that CAP's first stage makes of W·d."""
    d = input_norms(problem.H)
    left, s, right = cap.robust_pca(problem.W * d, iterations)
    return (left * s) @ right / d
