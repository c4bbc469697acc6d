"""Who gets how much of the budget: the values of the whole model shared out among its layers, one file per allocation.

Each allocation is a function from a `Problem` to `Shares`: the room of every layer and, where it chooses ranks
together with rooms, the ranks. `exact_plans` makes plans of them that spend the budget to the value.
"""

from __future__ import annotations

from collections.abc import Callable

from compress.allocation import cap, cap_reinforce, farms, fisher, knapsack, owl, welore
from compress.allocation.exact import exact_plans
from compress.allocation.problem import Problem, Shares
from compress.budget import LayerPlan

ALLOCATORS: dict[str, Callable[[Problem], Shares]] = {
    "fisher": fisher.share,
    "owl": owl.share,
    "farms": farms.share,
    "welore": welore.share,
    "knapsack": knapsack.share,
    "cap": cap.share,
    "cap_reinforce": cap_reinforce.share,
}


def allocate(name: str, problem: Problem) -> dict[str, LayerPlan]:
    """The problem's plans with their budget shared out by the allocation of that name."""
    return exact_plans(problem, ALLOCATORS[name](problem)) if problem.names else problem.plans
