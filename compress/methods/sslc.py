"""SSLC: a reconstruction of "1+1>2: A Synergistic Sparse and Low-Rank Compression Method for LLMs" (arXiv 2510.26446).

No code and no hyper-parameters of the paper are public. What is known: min ‖(W − L − S)X‖ over rank(L) = r and a given
sparsity of S; pruning and randomized SVD in turns; the most salient 1 % of the weights always kept. The scaling by the
inputs' norms, the number of turns and the least squares at the end are ours (docs/methods.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.methods.linalg import damped, input_norms, least_squares_on_support, low_rank
from compress.methods.masks import top_overall, top_per_row
from compress.methods.solution import Solution
from compress.rules import MaskRule

ITERATIONS = 20
PROTECTED = 0.01  # Share of the weights that is always kept, by |W|·d.
LEAST_SQUARES = 10  # Steps of conjugate gradients at the end; our addition.


def solve(
    W: Tensor,
    H: Tensor,
    nnz: int,
    rank: int,
    rule: MaskRule | None = None,
    iterations: int = ITERATIONS,
    least_squares: int = LEAST_SQUARES,
) -> Solution:
    """Turns of L ← SVD_r(A − S) and S ← top-k of A − L per row, on A = W·d, d = √diag(XXᵀ), protected entries first.

    A row keeps its k even if more of its entries are protected.
    """
    d = input_norms(H)
    A = W * d
    protected = top_overall(A.abs(), min(math.floor(PROTECTED * A.numel()), nnz), rule)
    S, mask = torch.zeros_like(A), protected
    U, V = low_rank(A, 0)
    for _ in range(iterations if rank else 1):
        U, V = low_rank(A - S, rank)
        rest = A - U @ V
        mask = top_per_row(rest.abs().masked_fill_(protected, math.inf), nnz, rule)
        S = rest * mask
    S, V = S / d, V / d
    if least_squares:
        S = least_squares_on_support(W - U @ V, mask, S, damped(H), least_squares)
    return Solution(mask, S, U, V)
