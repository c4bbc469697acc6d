"""CAP's second stage as published: what to keep is drawn, and the model's own loss says how good the draw was.

"Large Language Model Compression with Global Rank and Sparsity Optimization" (arXiv 2505.03801, ICLR 2026). Every
direction of L and every entry of S = A − L (robust PCA of A = √F·W·d, see `cap`) has a probability p of being kept, at
a cost c of N + K values for a direction (more with int8 values) and 1 for an entry. For each batch of calibration text:

    m ~ Bernoulli(p);   reward: the loss on the batch of the model with the candidates m and no others
    p ← p − η·(loss − baseline)·∇ ln P(m),  ∇ ln P(m) = (m − p)/(p(1 − p));   then p ← clip(p − v, 0, 1)

with the least v ≥ 0 such that Σ c·p is within the budget. The baseline is the mean of the losses before, five at most;
η = 0.05, three passes over up to 128 sequences. At last the largest p of the whole model that the budget pays for are
kept: that is each layer's rank and number of values.

**The reward is a loss on the calibration text itself**, the only one that decides anything in this package.

What differs, or is open in the paper as we know it: p starts at score/(score + t) with the scores of `cap` and one t
for the budget; a batch has 8 sequences; p(1 − p) is kept from zero; all p are lowered by the same v, whatever the cost;
Σ c·p is estimated on a sample of the entries. Which candidates a layer keeps, the method decides.

Holds the whole model in memory, with L, S and p.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.allocation.cap import by_rank, decompose
from compress.allocation.problem import LOOP, Problem, Shares
from compress.allocation.scores import evenly_spaced, logarithms, sampled_logarithms
from compress.architectures import linears, output_rows
from compress.methods.masks import project
from sslc_common.errors import InputError

LEARNING_RATE = 0.05
PASSES = 3
SEQUENCES = 128
BASELINE = 5  # losses
BATCH = 8  # sequences of one draw
_LEAST_VARIANCE = 0.01  # of p(1 − p) in the gradient
_HALVINGS = 30


@dataclass
class _Layer:
    """A layer of the model in memory and its candidates.

    Attributes:
        weight: [N, K], a view of the model's own parameter.
        scale: √F and d as [N, 1] and [K], the two factors of A over W, kept away from zero.
        left: [N, m], the directions of L times their singular values.
        right: [m, K].
        rest: [N, K], S.
        directions: [m], p of each direction.
        entries: [N, K], p of each entry.
    """

    weight: Tensor
    scale: tuple[Tensor, Tensor]
    left: Tensor
    right: Tensor
    rest: Tensor
    directions: Tensor
    entries: Tensor

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws candidates and makes the weight of them alone; bool [m] and [N, K]."""
        chosen = torch.rand(self.directions.shape, generator=generator) < self.directions
        kept = torch.rand(self.entries.shape, generator=generator) < self.entries
        A = torch.addmm(self.rest * kept, self.left[:, chosen], self.right[chosen])
        self.weight.copy_(A / self.scale[0] / self.scale[1])
        return chosen, kept

    def learn(self, drawn: tuple[Tensor, Tensor], advantage: float) -> None:
        """One step against the gradient of the expected loss."""
        for p, m in zip((self.directions, self.entries), drawn, strict=True):
            p.sub_((m.to(p.dtype) - p).div_((p * (1 - p)).clamp_min_(_LEAST_VARIANCE)), alpha=LEARNING_RATE * advantage)


def share(problem: Problem) -> Shares:
    """Rooms and ranks by the largest probabilities.

    Raises:
        InputError: the memory does not hold the model and its candidates.
    """
    assert problem.model is not None
    assert problem.tokens is not None
    require_memory(problem)
    model = problem.model()
    layers = learnable(problem, model)
    reinforce(problem, layers, lambda rows: _loss(model, rows))
    directions = [np.sort(logarithms(layer.directions).numpy()) for layer in layers]
    return by_rank(problem, directions, [sampled_logarithms(layer.entries) for layer in layers])


def require_memory(problem: Problem) -> None:
    """Checks that the model and its candidates fit into what memory is free.

    Raises:
        InputError: they do not.
    """
    needed = sum(4 * N * K for N, K in problem.shapes.values())
    for N, K in (problem.shapes[name] for name in problem.names):
        needed += 9 * N * K + 4 * min(N, K) * (N + K)  # S, p and one drawn mask; left and right
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            "The allocation cap_reinforce holds the whole model and its candidates in memory, more than is free",
            got=f"{needed / 2**30:.1f} GiB needed",
            allowed=f"{free / 2**30:.1f} GiB",
            do="Choose the allocation cap, its closed form, which holds one layer",
        )


def reinforce(problem: Problem, layers: list[_Layer], loss: Callable[[Tensor], float]) -> None:
    """Learns the layers' probabilities, in place.

    Args:
        problem: Its budget, its text, its seed.
        layers: Of `Problem.names`.
        loss: Of the model as it is, on sequences [n, L].
    """
    assert problem.tokens is not None
    generator = torch.Generator().manual_seed(problem.seed)
    before: deque[float] = deque(maxlen=BASELINE)
    batches = problem.tokens[:SEQUENCES].split(BATCH) * PASSES
    for rows in problem.progress(batches, "Learning what to keep"):
        drawn = [layer.draw(generator) for layer in layers]
        found = loss(rows)
        if not math.isfinite(found):
            raise ArithmeticError("cap_reinforce drew a model whose loss is not finite")
        if before:
            for layer, masks in zip(layers, drawn, strict=True):
                layer.learn(masks, found - sum(before) / len(before))
            _within_budget(problem, layers)
        before.append(found)


def learnable(problem: Problem, model: nn.Module) -> list[_Layer]:
    """Robust PCA of every layer, and the probabilities to begin with."""
    layers, linear = [], linears(model)
    for name in problem.progress(problem.names, LOOP):
        module, importance = linear[name], problem.importance[name]
        scale = _divisor(importance.outputs)[:, None], _divisor(importance.inputs)
        left, sigma, right, rest = decompose(problem, name)
        nonzero = sigma > 0
        sigma, cost = sigma[nonzero], sum(rest.shape) * problem.factor_cost
        left, right = left[:, nonzero] * sigma, right[nonzero].contiguous()
        entries = logarithms(project(rest.square(), problem.rule))
        weight = output_rows(module, module.weight.data)  # type: ignore[arg-type]
        layers.append(_Layer(weight, scale, left, right, rest, logarithms(sigma.square() / cost), entries))
    samples = [(layer.directions.clone(), evenly_spaced(layer.entries)) for layer in layers]
    lowest = min(float(entries.min()) for _, entries in samples)
    highest = max(float(part.max()) for pair in samples for part in pair if len(part))
    t = _least(lambda t: _spent(problem, samples, lambda s: (s - t).sigmoid()), problem, lowest, highest + 20)
    for layer in layers:
        for scores in (layer.directions, layer.entries):
            scores.sub_(t).sigmoid_()
    return layers


def _divisor(squares: Tensor) -> Tensor:
    """Square roots, at least 1e-4 of their root mean square: where inputs are dead, A is rounding errors."""
    return squares.clamp_min(1e-8 * squares.mean()).clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _within_budget(problem: Problem, layers: list[_Layer]) -> None:
    for layer in layers:
        layer.directions.clamp_(0, 1)
        layer.entries.clamp_(0, 1)
    samples = [(layer.directions.clone(), evenly_spaced(layer.entries)) for layer in layers]
    v = _least(lambda v: _spent(problem, samples, lambda p: (p - v).clamp_min(0)), problem, 0.0, 1.0)
    for layer in layers:
        layer.directions.sub_(v).clamp_min_(0)
        layer.entries.sub_(v).clamp_min_(0)


def _least(spent: Callable[[float], float], problem: Problem, low: float, high: float) -> float:
    """The least argument at which no more than the budget is spent; `spent` falls."""
    if spent(low) <= problem.planned.sum():
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > problem.planned.sum() else (low, middle)
    return high


def _spent(problem: Problem, samples: list[tuple[Tensor, Tensor]], p: Callable[[Tensor], Tensor]) -> float:
    """Σ c·p over all candidates, the entries by a sample of them."""
    costs = zip(samples, problem.directions.tolist(), problem.sizes.tolist(), strict=True)
    return sum(float(p(d).sum()) * cost + float(p(e).mean()) * size for (d, e), cost, size in costs)


def _loss(model: nn.Module, rows: Tensor) -> float:
    """Mean cross-entropy over sequences [n, L], in nats per token, a sequence at a time."""
    with torch.no_grad():
        logits = (model(row[None], use_cache=False).logits[0].float() for row in rows)
        found = [functional.cross_entropy(z[:-1], row[1:]) for z, row in zip(logits, rows, strict=True)]
    return float(torch.stack(found).mean())
