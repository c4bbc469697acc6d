"""Ours: one threshold for the whole model on what removing an entry of W costs.

Removing an entry of W raises the loss, to second order and with everything else left alone, by F_n·(W[n, k]·d_k)²/2
nats per token: F is the Fisher information of the layer's outputs, d² the mean square of its inputs (Optimal Brain
Damage, LeCun et al. 1990, with a Kronecker-factored Fisher). One threshold on that score for the whole model therefore
decides how many values each layer keeps.
"""

from __future__ import annotations

import numpy as np

from compress.allocation.exact import at_threshold
from compress.allocation.problem import Problem, Shares
from compress.allocation.scores import sampled_logarithms, scaled_weight, share_above


def share(problem: Problem) -> Shares:
    """As many values for a layer as it has entries above the threshold."""
    weights = ((problem.weight(name), problem.importance[name]) for name in problem.names)
    scores = [sampled_logarithms(scaled_weight(*pair).square()) for pair in weights]

    def wanted(threshold: float) -> np.ndarray:
        return np.array([share_above(layer, threshold) for layer in scores]) * problem.sizes

    below, above = min(layer[0] for layer in scores) - 1, max(layer[-1] for layer in scores) + 1
    return Shares(at_threshold(problem, wanted, below, above)[0])
