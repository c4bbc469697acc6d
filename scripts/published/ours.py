"""Our side of the comparisons, in the form that `theirs` has: W [N, K] as S + U·V, summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.methods import alps, cap
from compress.methods.hassle_free import whitened_low_rank
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
    """HASSLE-free of our parts in the order of the authors' code: from L = 0, S first, nothing after the last L."""
    W, H = problem.W, damped(problem.H)
    root, L = torch.linalg.cholesky(H), torch.zeros_like(W)
    for _ in range(turns):
        S, mask = alps.admm(W - L, H, setting.nnz(*W.shape), alps.ITERATIONS, setting.rule)
        S = least_squares_on_support(W - L, mask, S, H, alps.LEAST_SQUARES)
        U, V = whitened_low_rank(W - S, root, setting.rank)
        L = U @ V
    return S + L


def robust_pca(problem: Problem, _: Setting, iterations: int = cap.ITERATIONS) -> Tensor:
    """The low-rank part that CAP's first stage makes of W·d."""
    d = input_norms(problem.H)
    left, s, right = cap.robust_pca(problem.W * d, iterations)
    return (left * s) @ right / d
