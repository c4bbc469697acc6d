"""Knapsack: every layer takes one of its measured options, such that the losses of all add up to the least.

After the allocation of ROCKET (Ali, Mohammad, Makhov et al., "ROCKET: Rapid Optimization via Calibration-guided
Knapsack Enhanced Truncation for Efficient Model Compression", 2026, arXiv 2602.11008), a multiple-choice knapsack:

    min Σ loss[l](room[l], r[l])   over one option (room, r) per layer,   Σ room[l] = budget

loss[l] is the energy that r leading directions of A = √F·W·d and the largest entries of the rest, under the mask rule,
leave of A: what a mask by the diagonal metric costs, in nats per token times two. Solved on the lower convex hull of
each layer's options by taking the steepest steps first, the last one in part, which is exact on the hull.

What differs: ROCKET's options are ranks and sparsities of a dictionary, its loss is the layers' reconstruction error
with no weight between layers, and it solves by dynamic programming. Without ranks and a mask rule the outcome is that
of `fisher`, on a grid: the least of a sum of sorted scores is one threshold.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from compress.allocation.problem import LOOP, Problem, Shares
from compress.allocation.ranks import candidate_ranks, leading, losses
from compress.allocation.scores import scaled_weight

ROOMS = 9  # of a layer that are measured, from its least to its largest


class Option(NamedTuple):
    """What a layer can take.

    Attributes:
        room: Values of S, U and V together.
        rank: r.
        loss: Of the layer.
    """

    room: int
    rank: int
    loss: float


def share(problem: Problem) -> Shares:
    """The options of the steepest steps that the budget pays for."""
    hulls = [lower_hull(_options(problem, index)) for index in problem.progress(range(len(problem.names)), LOOP)]
    taken = [hull[0] for hull in hulls]
    rooms, ranks = (np.array(column, dtype=np.int64) for column in list(zip(*taken, strict=True))[:2])
    left = int(problem.planned.sum() - rooms.sum())
    steps = [(_slope(*pair), i, pair[1]) for i, hull in enumerate(hulls) for pair in pairwise(hull)]
    for _, index, option in sorted(steps, key=lambda step: step[:2]):  # stable: a layer's steps stay in their order
        more = min(left, int(option.room - rooms[index]))
        rooms[index] += more
        left -= more
        if rooms[index] < option.room:  # in part: more values beside the directions of the option before
            break
        ranks[index] = option.rank
    return Shares(rooms, ranks)


def lower_hull(options: list[Option]) -> list[Option]:
    """The options that are the least for some price of a value, by room: their steps get flatter and flatter."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.room, o.loss)):
        if hull and option.room == hull[-1].room:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    """Loss per value that a step saves, negative."""
    return (after.loss - before.loss) / (after.room - before.room)


def _options(problem: Problem, index: int) -> list[Option]:
    low, high = (int(limit[index]) for limit in problem.limits(joint=problem.choose_ranks))
    name, direction = problem.names[index], int(problem.directions[index])
    rooms = np.unique(np.linspace(low, high, ROOMS).astype(np.int64)).tolist()
    A = scaled_weight(problem.weight(name), problem.importance[name])
    ranks = candidate_ranks(A, high, problem.factor_cost) if problem.choose_ranks else [0]
    parts = leading(A, ranks[-1])
    options = []
    for rank in ranks:
        counts = [room - rank * direction for room in rooms]
        found = zip(rooms, counts, losses(A, parts, rank, counts, problem.rule), strict=True)
        options += [Option(room, rank, loss) for room, count, loss in found if count >= 0]
    return options
