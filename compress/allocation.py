"""Who gets how much of the budget: the values of the whole model shared out among its layers by one threshold.

Removing an entry of W raises the loss, to second order and with everything else left alone, by F_n·(W[n, k]·d_k)²/2
nats per token: F is the Fisher information of the layer's outputs, d² the mean square of its inputs (Optimal Brain
Damage, LeCun et al. 1990, with a Kronecker-factored Fisher). One threshold on that score for the whole model therefore
decides how many values each layer keeps. Which ones, the method decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from compress.budget import LayerPlan, most_rank, most_values, parameters
from compress.importance import Importance
from compress.rules import MaskRule

SLACK = 0.4  # A layer keeps between SLACK times the mean share, and 1 − SLACK/2 times the mean share removed.
_MOST_DIRECTIONS = 256  # of one layer that are looked at
_SAMPLES = 1 << 16  # Scores of one layer that are looked at.


def allocate(
    plans: dict[str, LayerPlan],
    shapes: dict[str, tuple[int, int]],
    weight: Callable[[str], Tensor],
    importance: dict[str, Importance],
    value_bits: int,
    choose_ranks: bool = False,
    rule: MaskRule | None = None,
    factor_cost: int = 1,
) -> dict[str, LayerPlan]:
    """Plans with the same total of values, ranks scaled with them. Layers that stay dense are left out of it.

    A layer's bitmap and bias do not depend on its plan, so a total of values is a total of bytes, too. Where a number
    of U or V takes more bytes than the values that it displaces, ranks are limited so that no layer grows above dense.

    Args:
        plans: The same share for every layer, by full name.
        shapes: (N, K) of every layer.
        weight: Reads the dense weight [N, K] of a layer.
        importance: Of every layer that is not left dense.
        value_bits: Of a stored value.
        choose_ranks: Whether each layer gets the rank that pays (`paying_rank`) rather than its share of the plan's.
        factor_cost: How many values a number of U or V displaces (`compress.budget.factor_cost`).
        rule: No layer gets more values than it allows, unless its plan has more already.
    """
    names = [name for name, plan in plans.items() if not plan.dense_reason]
    if not names:
        return plans
    sizes = np.array([shapes[name][0] * shapes[name][1] for name in names])
    rooms = np.array([parameters(*shapes[name], plans[name].nnz, factor_cost * plans[name].rank) for name in names])
    mean = rooms.sum() / sizes.sum()
    most = np.array([most_values(*shapes[name], value_bits) for name in names])
    if rule:
        most = np.minimum(most, [rule.most(*shapes[name]) for name in names])
    low = np.floor(SLACK * mean * sizes).astype(np.int64)
    # A layer whose plan passes the upper limit already (full rank, say) keeps what it has.
    high = np.maximum(np.minimum((1 - SLACK / 2 * (1 - mean)) * sizes, most), rooms).astype(np.int64)
    quantiles = [_sorted_scores(weight(name), importance[name]) for name in names]

    def rooms_above(threshold: float) -> np.ndarray:
        shares = np.array([1 - np.searchsorted(q, threshold, side="left") / len(q) for q in quantiles])
        return np.clip((shares * sizes).astype(np.int64), np.minimum(low, high), high)

    below, above = min(q[0] for q in quantiles) - 1, max(q[-1] for q in quantiles) + 1
    for _ in range(60):
        middle = (below + above) / 2
        if rooms_above(middle).sum() > rooms.sum():
            below = middle
        else:
            above = middle
    shared = rooms_above(above)
    left = int(rooms.sum() - shared.sum())
    for index in np.argsort(-sizes):  # what the samples' steps leave over
        more = min(left, int(high[index] - shared[index]))
        shared[index] += more
        left -= more
    most_ranks = {
        name: most_rank(*shapes[name], room, value_bits, factor_cost)
        for name, room in zip(names, shared.tolist(), strict=True)
    }
    if choose_ranks:
        return plans | {
            name: _with_rank(
                plans[name],
                paying_rank(_scaled_weight(weight(name), importance[name]), room, factor_cost, most_ranks[name]),
                factor_cost * sum(shapes[name]),
                room,
            )
            for name, room in zip(names, shared.tolist(), strict=True)
        }
    return plans | {
        name: _scaled(plans[name], shapes[name], int(old), int(new), factor_cost, most_ranks[name])
        for name, old, new in zip(names, rooms, shared, strict=True)
    }


def _scaled(plan: LayerPlan, shape: tuple[int, int], old: int, new: int, factor_cost: int, most: int) -> LayerPlan:
    """A plan for `new` values in place of `old`, the rank in proportion and at most `most`."""
    N, K = shape
    rank = min(plan.rank * new // max(old, 1), most)
    nnz = new - rank * (N + K) * factor_cost
    if nnz > N * K:
        raise AssertionError(f"{nnz} values in a layer of {N}·{K}")
    return replace(plan, rank=rank, nnz=nnz)


def paying_rank(A: Tensor, room: int, factor_cost: int = 1, most: int = _MOST_DIRECTIONS) -> int:
    """The rank r, often 0, with the least loss where A = √F·W·d [N, K] gets r directions and the rest in values.

    That is room − r(N + K) of them, or more generally room − r(N + K)·factor_cost.

    The directions are the first of the SVD, the values the largest entries of the rest; the loss is the energy of what
    remains. r is 0 or a power of two, `most` at most, and takes half of the room at most.
    """
    N, K = A.shape
    most = min(most, _MOST_DIRECTIONS, min(N, K), room // (2 * (N + K) * factor_cost))
    ranks = [0] + [1 << i for i in range(most.bit_length())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, s, V = torch.svd_lowrank(A, min(ranks[-1] + 8, N, K), niter=2)

    def loss(r: int) -> float:
        rest = (A - (U[:, :r] * s[:r]) @ V[:, :r].T).square().flatten().numpy()
        removed = N * K - (room - r * (N + K) * factor_cost)
        return float(np.partition(rest, removed - 1)[:removed].sum(dtype=np.float64)) if removed > 0 else 0.0

    return min(ranks, key=loss)


def _with_rank(plan: LayerPlan, rank: int, direction: int, room: int) -> LayerPlan:
    return replace(plan, rank=rank, nnz=room - rank * direction)


def _scaled_weight(W: Tensor, importance: Importance) -> Tensor:
    """√F·W·d: its squared entries are the scores."""
    return W.float() * importance.inputs.sqrt() * importance.outputs.sqrt()[:, None]


def _sorted_scores(W: Tensor, importance: Importance) -> np.ndarray:
    """Logarithms of F_n·(W[n, k]·d_k)², ascending; of evenly spaced entries where there are many."""
    scores = _scaled_weight(W, importance).square()
    stride = max(1, W.numel() // _SAMPLES)
    while math.gcd(stride, W.shape[1]) > 1:  # else it would see some columns only
        stride += 1
    flat = scores.flatten()[::stride].clamp_min(torch.finfo(torch.float32).tiny)
    return np.sort(flat.log().numpy())
