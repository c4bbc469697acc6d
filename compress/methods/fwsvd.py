"""FWSVD: a truncated SVD of the weight with its rows weighted by Fisher information.

Hsu, Hua, Chang, Lou, Shen and Jin, "Language Model Compression with Weighted Low-Rank Factorization", ICLR 2022. Choose
a rank share of 1 and a Fisher allocation: the rows of W come weighted then, for every method alike.
"""

from __future__ import annotations

from torch import Tensor

from compress.methods.linalg import low_rank
from compress.methods.masks import top_overall
from compress.methods.solution import Solution
from compress.rules import MaskRule


def solve(W: Tensor, H: Tensor | None, nnz: int, rank: int, rule: MaskRule | None = None) -> Solution:
    """Truncates W; H is not used.

    Values that are left over, too few for one more direction, go to the largest entries of the rest.
    """
    U, V = low_rank(W, rank)
    rest = W - U @ V
    mask = top_overall(rest.abs(), nnz, rule)
    return Solution(mask, rest * mask, U, V)
