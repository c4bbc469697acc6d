"""OWL: blocks with more outliers keep more.

Yin, Wu, Zhang et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity", ICML 2024.

    D[b] = share of the entries of block b whose |W|·d is more than M times the block's mean (section 3.2)
    density[b] = density + λ·(2(D[b] − min D)/(max D − min D) − 1), less what makes the mean the budget's

Where blocks have layers of several sizes, or one is at a limit, the mean here is the one over values, so that the
budget is kept; the paper's is over blocks. Layers that stay dense are left out of D.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from compress.allocation.exact import at_threshold
from compress.allocation.problem import Problem, Shares

M = 5.0  # The paper's for LLaMA; it takes 5 to 10.
SPREAD = 0.08  # The paper's λ.


def share(problem: Problem) -> Shares:
    """The same density for all layers of a block."""
    members = problem.block_members()
    outliers = np.array([_outlier_ratio(problem, [problem.names[i] for i in layers]) for layers in members.values()])
    extent = outliers.max() - outliers.min()
    offsets = np.zeros(len(problem.names))
    for ratio, layers in zip(outliers, members.values(), strict=True):
        offsets[layers] = SPREAD * (2 * (ratio - outliers.min()) / extent - 1) if extent else 0.0

    def wanted(removed: float) -> np.ndarray:
        return (1 - removed + offsets) * problem.sizes

    return Shares(at_threshold(problem, wanted, -1.0, 2.0)[0])


def _outlier_ratio(problem: Problem, names: list[str]) -> float:
    """D of one block, its layers read one at a time, twice."""
    entries = sum(problem.shapes[name][0] * problem.shapes[name][1] for name in names)
    mean = sum(float(_scores(problem, name).double().sum()) for name in names) / entries
    return sum(int((_scores(problem, name) > M * mean).sum()) for name in names) / entries


def _scores(problem: Problem, name: str) -> Tensor:
    """Wanda's |W|·d [N, K]."""
    return problem.weight(name).float().abs() * problem.importance[name].inputs.sqrt()
