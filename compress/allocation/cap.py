"""CAP's ranking in closed form: directions and entries of the whole model compete for one budget.

"Large Language Model Compression with Global Rank and Sparsity Optimization" (arXiv 2505.03801, ICLR 2026). Robust PCA
splits A = √F·W·d of every layer into L, with singular values σ, and S = A − L (ten iterations, the most that the paper
takes: after three L has nearly all, and each costs a singular value decomposition of the layer); then

    score = σ²/c of a direction, c the values it displaces (N + K, more with int8 values);   (A − L)² of an entry

and one threshold for the model, which decides on each layer's rank and number of values together, r = 0 included.

What differs: the paper splits W, weighs blocks by a sensitivity, and learns what to keep (`cap_reinforce`). Here the
Fisher information of the outputs and the inputs' mean squares are in A, so that all scores are losses of one unit.
Which directions and entries a layer then keeps, the method decides. Where ranks are not free, a layer's room is what
its directions and entries above the threshold come to.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from compress.allocation.exact import at_threshold
from compress.allocation.problem import LOOP, Problem, Shares
from compress.allocation.scores import logarithms, sampled_logarithms, scaled_weight, share_above
from compress.methods.cap import ITERATIONS, robust_pca
from compress.methods.masks import project


def share(problem: Problem) -> Shares:
    """Rooms and ranks by one threshold on the scores above."""
    directions, entries = [], []
    for index, name in enumerate(problem.progress(problem.names, LOOP)):
        _, sigma, _, rest = decompose(problem, name)
        directions.append(np.sort(logarithms(sigma.square() / float(problem.directions[index])).numpy()))
        entries.append(sampled_logarithms(project(rest.square(), problem.rule)))
    return by_rank(problem, directions, entries)


def decompose(problem: Problem, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L as left [N, m], σ [m] descending and right [m, K], and S = A − L [N, K]."""
    A = scaled_weight(problem.weight(name), problem.importance[name])
    left, sigma, right = robust_pca(A, ITERATIONS)
    return left, sigma, right, A - (left * sigma) @ right


def by_rank(problem: Problem, directions: list[np.ndarray], entries: list[np.ndarray]) -> Shares:
    """One threshold for all candidates, each worth its cost in values.

    Args:
        problem: Whose budget.
        directions: Logarithms of scores of each layer's directions, ascending.
        entries: Of its entries, ascending; a sample will do.
    """

    def ranks(threshold: float) -> np.ndarray:
        return np.array([len(d) - int(np.searchsorted(d, threshold, side="left")) for d in directions])

    def wanted(threshold: float) -> np.ndarray:
        counts = np.array([share_above(layer, threshold) for layer in entries]) * problem.sizes
        return np.minimum(counts, problem.most_entries) + ranks(threshold) * problem.directions

    everything = [scores for scores in (*directions, *entries) if len(scores)]
    below, above = min(scores[0] for scores in everything) - 1, max(scores[-1] for scores in everything) + 1
    rooms, threshold = at_threshold(problem, wanted, below, above, joint=problem.choose_ranks)
    return Shares(rooms, np.minimum(ranks(threshold), rooms // problem.directions))
