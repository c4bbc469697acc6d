"""What is to be shared out, and what an allocation says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from compress.budget import LayerPlan, most_rank, most_values, parameters
from compress.format import Progress, no_progress
from compress.importance import Importance
from compress.rules import MaskRule

SLACK = 0.4  # A layer keeps between SLACK times the mean share, and 1 − SLACK/2 times the mean share removed.
# Under a mask rule, the most of a layer's room that goes to U·V: so many times what its plan gives, and so much in all.
_TIMES_PLANNED, _MOST_FACTORS = 2, 0.4

LOOP = "Sharing the budget out"  # what progress says of a loop over layers


class Shares(NamedTuple):
    """Who gets how much: one entry for each of `Problem.names`.

    Attributes:
        rooms: int64, values of S, U and V together, a number of U or V counted `factor_cost` times.
        ranks: int64, each of which fits into its room; None where the allocation says nothing of ranks.
    """

    rooms: np.ndarray
    ranks: np.ndarray | None = None


@dataclass(frozen=True)
class Problem:
    """Layers and their budget.

    A layer's bitmap and bias do not depend on its plan, so a total of values is a total of bytes, too. Where a number
    of U or V takes more bytes than the values that it displaces, `most_rank` keeps layers from growing above dense.

    Attributes:
        plans: The same share for every layer, by full name. Layers that stay dense are left out of everything.
        shapes: (N, K) of every layer.
        blocks: Name of every layer's decoder block.
        weight: Reads the dense weight [N, K] of a layer.
        importance: Of every layer that is not left dense; empty without calibration text.
        value_bits: Of a stored value.
        choose_ranks: Whether each layer gets the rank that pays rather than its share of the plan's.
        rule: No layer gets more values in S than it allows, unless its plan has more already.
        factor_cost: How many values a number of U or V displaces (`compress.budget.factor_cost`).
        tokens: int64 [n, L], the calibration sequences, for the allocation that runs the model.
        model: Loads the whole model, float32, likewise.
        seed: Of what is drawn.
        progress: Wraps loops over layers.
    """

    plans: dict[str, LayerPlan]
    shapes: Mapping[str, tuple[int, int]]
    blocks: Mapping[str, str]
    weight: Callable[[str], Tensor]
    importance: Mapping[str, Importance]
    value_bits: int
    choose_ranks: bool = False
    rule: MaskRule | None = None
    factor_cost: int = 1
    tokens: Tensor | None = None
    model: Callable[[], PreTrainedModel] | None = None
    seed: int = 0
    progress: Progress = no_progress

    @cached_property
    def names(self) -> list[str]:
        """The layers that share the budget."""
        return [name for name, plan in self.plans.items() if not plan.dense_reason]

    @cached_property
    def sizes(self) -> np.ndarray:
        """N·K of each."""
        return np.array([self.shapes[name][0] * self.shapes[name][1] for name in self.names])

    @cached_property
    def directions(self) -> np.ndarray:
        """Values that one direction of U·V displaces in each."""
        return np.array([sum(self.shapes[name]) * self.factor_cost for name in self.names])

    @cached_property
    def planned(self) -> np.ndarray:
        """The room of each in its plan; their sum is what is shared out."""
        ranks = [self.factor_cost * self.plans[name].rank for name in self.names]
        return np.array(
            [parameters(*self.shapes[n], self.plans[n].nnz, r) for n, r in zip(self.names, ranks, strict=True)]
        )

    @cached_property
    def _most_under_the_rule(self) -> np.ndarray:
        """The largest room of each where ranks follow the room: what S cannot hold goes to U·V, within bounds."""
        ranks = np.array([self.plans[name].rank for name in self.names])
        factors = ranks * self.directions / np.maximum(self.planned, 1)
        factors = np.clip(_TIMES_PLANNED * factors, 0, np.maximum(factors, _MOST_FACTORS))
        return np.where(factors < 1, self.most_entries / np.maximum(1 - factors, 1e-9), self.sizes)

    @cached_property
    def most_entries(self) -> np.ndarray:
        """Values that each may hold in S."""
        return np.array([self.rule.most(*self.shapes[n]) for n in self.names]) if self.rule else self.sizes

    def limits(self, joint: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest room of each layer.

        Args:
            joint: Whether ranks are chosen together with the rooms. The mask rule then bounds S, not the room.
        """
        mean = self.planned.sum() / self.sizes.sum()
        most = np.array([most_values(*self.shapes[name], self.value_bits) for name in self.names])
        if not joint:
            most = np.minimum(most, self._most_under_the_rule)
        # A layer whose plan passes the upper limit already (full rank, say) keeps what it has.
        high = np.maximum(np.minimum((1 - SLACK / 2 * (1 - mean)) * self.sizes, most), self.planned).astype(np.int64)
        return np.minimum(np.floor(SLACK * mean * self.sizes).astype(np.int64), high), high

    def most_rank(self, index: int, room: int) -> int:
        """The largest rank that a layer of that room may have."""
        return most_rank(*self.shapes[self.names[index]], room, self.value_bits, self.factor_cost)

    def block_members(self) -> dict[str, list[int]]:
        """For each block, its layers as indices of `names`."""
        members: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            members.setdefault(self.blocks[name], []).append(index)
        return members
