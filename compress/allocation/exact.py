"""From shares to plans that spend the budget to the value: the step that all allocations have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from compress.allocation.problem import Problem, Shares
from compress.allocation.ranks import paying_rank
from compress.allocation.scores import scaled_weight
from compress.budget import LayerPlan

_HALVINGS = 60


def at_threshold(
    problem: Problem, wanted: Callable[[float], np.ndarray], below: float, above: float, joint: bool = False
) -> tuple[np.ndarray, float]:
    """The rooms at the one threshold at which all layers, each within its limits, spend the budget and no more.

    Args:
        problem: Whose budget and limits.
        wanted: The rooms at a threshold, falling as it rises.
        below: A threshold that is too low.
        above: One at which no more than the budget is spent.
        joint: See `Problem.limits`.

    Returns:
        Rooms, which may fall short of the budget where `wanted` has steps, and the threshold.
    """
    low, high = problem.limits(joint)

    def rooms(threshold: float) -> np.ndarray:
        return np.clip(wanted(threshold).astype(np.int64), low, high)

    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        if rooms(middle).sum() > problem.planned.sum():
            below = middle
        else:
            above = middle
    return rooms(above), above


def exact_plans(problem: Problem, shares: Shares) -> dict[str, LayerPlan]:
    """Plans with the total of the problem's plans.

    What the shares leave over goes to the largest layers, within their limits. The mask rule can leave values without a
    place, with ranks of the shares' own or where bytes bound the rank; the total is then smaller.
    """
    joint = shares.ranks is not None and problem.choose_ranks
    _, high = problem.limits(joint)
    if joint:
        high = np.minimum(high, problem.most_entries + shares.ranks * problem.directions)
    rooms = np.minimum(shares.rooms, high)
    left = int(problem.planned.sum() - rooms.sum())
    if left < 0:
        raise AssertionError(f"{-left} values more than the budget")
    for index in np.argsort(-problem.sizes):
        more = min(left, int(high[index] - rooms[index]))
        rooms[index] += more
        left -= more
    return problem.plans | {
        name: _plan(problem, index, int(rooms[index]), int(shares.ranks[index]) if joint else None)  # type: ignore[index]
        for index, name in enumerate(problem.names)
    }


def _plan(problem: Problem, index: int, room: int, rank: int | None) -> LayerPlan:
    """A plan of that room: with the rank given, else with the rank that pays, or else with the rank in proportion.

    In proportion, or more where S cannot hold the rest under the mask rule.
    """
    name, direction = problem.names[index], int(problem.directions[index])
    old, shape, most = problem.plans[name], problem.shapes[name], problem.most_rank(index, room)
    if rank is None and problem.choose_ranks:
        A = scaled_weight(problem.weight(name), problem.importance[name])
        rank = paying_rank(A, room, problem.factor_cost, problem.rule, most)
    elif rank is None:
        rank = old.rank * room // max(int(problem.planned[index]), 1)
        if rank:
            rank = max(rank, -(-(room - int(problem.most_entries[index])) // direction))
    rank = min(rank, most)
    nnz = min(room - rank * direction, max(int(problem.most_entries[index]), old.nnz))
    if not 0 <= nnz <= problem.sizes[index]:
        raise AssertionError(f"{nnz} values in a layer of {shape}")
    return replace(old, rank=rank, nnz=nnz)
