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

BLOCK = (
    128  # B and, without a rule, B_s of the paper: columns that are updated together, and whose mask is chosen at once.
)


def solve(W: Tensor, H: Tensor, nnz: int, rank: int, rule: MaskRule | None = None, block: int = BLOCK) -> Solution:
    """The paper's algorithm with adaptive mask selection; rank is not used.

    The mask is chosen for `block` columns at once, and under a rule for one of its groups, after the updates by all
    columns before it. Each choice keeps its share of nnz, so that the total is exact. An entry's score is
    w² / [H⁻¹]²cc (equation 4, with the Cholesky factor in place of the inverse of what is left).
    """
    N, K = W.shape
    # Row c of the upper Cholesky factor of H⁻¹ is, up to scale, the first row of the inverse of H[c:, c:]: what
    # removing column c needs when only the columns from c on may still change.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped(H))), upper=True)
    W, S, mask = W.clone(), torch.zeros_like(W), torch.zeros(N, K, dtype=torch.bool)
    span = min(rule.group, block) if rule else block
    for start in range(0, K, block):
        end = min(start + block, K)
        columns, local = W[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.zeros_like(columns)
        for c in range(end - start):
            if c % span == 0:
                first, last = start + c, min(start + c + span, end)
                kept = nnz * last // K - nnz * first // K
                scores = (columns[:, c : c + span] / local.diagonal()[c : c + span]).square()
                mask[:, first:last] = top_overall(scores, kept, rule)
            S[:, start + c] = columns[:, c] * mask[:, start + c]
            errors[:, c] = (columns[:, c] - S[:, start + c]) / local[c, c]
            columns[:, c:] -= errors[:, c, None] * local[c, c:]
        W[:, end:] -= errors @ factor[start:end, end:]
    return sparse_only(W, mask, S)
