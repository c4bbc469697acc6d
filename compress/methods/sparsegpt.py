"""SparseGPT: prune column by column, and let the columns to the right make up for it.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods.linalg import damped
from compress.methods.masks import top_overall
from compress.methods.solution import Solution, sparse_only
from compress.rules import MaskRule

BLOCK = 128  # B and B_s of the paper: columns whose mask is chosen at once.


def solve(W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, block: int = BLOCK) -> Solution:
    """The paper's algorithm with adaptive mask selection; rank is not used.

    Each block of columns keeps its share of nnz, so that the total is exact. An entry's score is
    w² / [H⁻¹]²cc (equation 4, with the Cholesky factor in place of the inverse of what is left).
    """
    N, K = W.shape
    # Row c of the upper Cholesky factor of H⁻¹ is, up to scale, the first row of the inverse of H[c:, c:]: what
    # removing column c needs when only the columns from c on may still change.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped(H))), upper=True)
    W, S, mask = W.clone(), torch.zeros_like(W), torch.zeros(N, K, dtype=torch.bool)
    for start in range(0, K, block):
        end = min(start + block, K)
        kept = nnz * end // K - nnz * start // K
        columns, local = W[:, start:end].clone(), factor[start:end, start:end]
        mask[:, start:end] = top_overall((columns / local.diagonal()).square(), kept, rule)
        errors = torch.zeros_like(columns)
        for c in range(end - start):
            S[:, start + c] = columns[:, c] * mask[:, start + c]
            errors[:, c] = (columns[:, c] - S[:, start + c]) / local[c, c]
            columns[:, c:] -= errors[:, c, None] * local[c, c:]
        W[:, end:] -= errors @ factor[start:end, end:]
    return sparse_only(W, mask, S)
