from types import SimpleNamespace

import pytest
import torch

from compress.allocation import allocate, cap_reinforce
from compress.allocation.cap_reinforce import LEARNING_RATE, learnable, reinforce
from compress.allocation.problem import Problem
from compress.budget import LayerPlan
from compress.importance import Importance
from compress.rules import MaskRule
from sslc_common.errors import InputError

SHAPES = {"a": (40, 64), "b": (40, 64), "c": (16, 16)}


class Model(torch.nn.Module):
    """Linear layers side by side; its logits do not depend on them."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, (N, K) in SHAPES.items():
            layer = torch.nn.Linear(K, N, bias=False)
            layer.weight.data = torch.randn(N, K, generator=g)
            self.add_module(name, layer)

    def forward(self, rows, use_cache):
        return SimpleNamespace(logits=torch.zeros(*rows.shape, 10))


def problem(sequences=64, **rest):
    model, g = Model(), torch.Generator().manual_seed(1)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in SHAPES}
    plans = {name: LayerPlan(0, N * K // 2) for name, (N, K) in SHAPES.items()} | {"c": LayerPlan(dense_reason="left")}
    importance = {
        n: Importance(torch.rand(N, generator=g) + 0.5, torch.rand(K, generator=g) + 0.5)
        for n, (N, K) in SHAPES.items()
    }
    tokens = torch.randint(0, 10, (sequences, 8), generator=g)
    options = {"choose_ranks": True, "tokens": tokens, "model": lambda: model} | rest
    return Problem(plans, SHAPES, {n: n for n in SHAPES}, weights.__getitem__, importance, 4, **options), model, weights


def spent(chosen, layers):
    costs = zip(layers, chosen.directions, strict=True)
    return sum(float(layer.entries.sum()) + float(layer.directions.sum()) * cost for layer, cost in costs)


@pytest.mark.parametrize("rule", [None, MaskRule(2, 4)])
def test_probabilities_begin_at_the_budget_and_stay_within_it(rule):
    chosen, model, _ = problem(rule=rule)
    layers = learnable(chosen, model)
    # Half a layer's entries: few enough for sums to be over all of them.
    assert spent(chosen, layers) == pytest.approx(chosen.planned.sum(), rel=1e-3)
    losses = iter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist())
    reinforce(chosen, layers, lambda _: next(losses))
    assert spent(chosen, layers) <= chosen.planned.sum() * (1 + 1e-3)
    for layer in layers:
        for p in (layer.directions, layer.entries):
            assert float(p.min()) >= 0
            assert float(p.max()) <= 1
        if rule:
            assert int((layer.entries > 1e-6).sum()) <= rule.most(40, 64)


def test_a_draw_makes_the_weight_of_what_it_keeps():
    chosen, model, weights = problem()
    layers = learnable(chosen, model)
    g = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.directions.fill_(1)
        layer.entries.fill_(1)
        layer.draw(g)
    for name in "ab":  # float32, of sums of 40 products
        assert torch.allclose(model.get_submodule(name).weight, weights[name], atol=1e-4)
    layers[0].directions.fill_(0)
    layers[0].entries[0, :] = 0
    _, kept = layers[0].draw(g)
    assert not kept[0].any()
    assert not model.a.weight[0].any()
    assert torch.equal(model.c.weight, weights["c"])  # stays dense


def test_dead_inputs_and_outputs_are_no_problem():
    chosen, model, weights = problem()
    chosen.importance["a"].inputs[:3] = 0
    chosen.importance["a"].outputs[:3] = 0
    layer = learnable(chosen, model)[0]
    layer.directions.fill_(1)
    layer.entries.fill_(1)
    layer.draw(torch.Generator().manual_seed(0))
    assert torch.allclose(model.a.weight[3:, 3:], weights["a"][3:, 3:], atol=1e-4)
    assert float(model.a.weight.detach().abs().max()) < 10


def test_a_step_is_the_gradient_of_the_log_probability():
    chosen, model, _ = problem()
    layer = learnable(chosen, model)[0]
    layer.entries.fill_(0.25)
    drawn = layer.draw(torch.Generator().manual_seed(0))
    layer.learn(drawn, 0.1)
    expected = torch.where(drawn[1], 0.25 - LEARNING_RATE * 0.1 / 0.25, 0.25 + LEARNING_RATE * 0.1 / 0.75)
    assert torch.allclose(layer.entries, expected)


def test_the_layer_that_the_loss_depends_on_gets_more():
    chosen, model, weights = problem(sequences=128)
    layers = learnable(chosen, model)
    before = [float(layer.directions.mean()) for layer in layers]

    def loss(_):
        return 20 * float((model.a.weight.detach() - weights["a"]).norm() / weights["a"].norm())

    reinforce(chosen, layers, loss)
    gain = [float(layer.directions.mean()) - mean for layer, mean in zip(layers, before, strict=True)]
    # Of seeds 0, 1 and 2: 0.14 to 0.23 for a; −0.09 to −0.04 for b, which makes room.
    assert gain[0] > 0.1
    assert gain[1] < 0


def test_the_text_is_gone_through_three_times_and_no_more_than_128_sequences():
    chosen, model, _ = problem(sequences=200)
    seen = []
    reinforce(chosen, learnable(chosen, model), lambda rows: seen.append(rows) or 1.0)
    assert sum(len(rows) for rows in seen) == 3 * 128
    assert torch.equal(torch.cat(seen)[:128], chosen.tokens[:128])


def test_the_budget_is_spent_and_the_same_seed_gives_the_same():
    shared = [allocate("cap_reinforce", problem(seed=seed)[0]) for seed in (0, 0)]
    assert shared[0] == shared[1]
    assert sum(plan.nnz + plan.rank * 104 for plan in shared[0].values()) == 40 * 64
    assert shared[0]["c"].dense_reason


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(cap_reinforce.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    chosen, _, _ = problem(model=lambda: pytest.fail("loaded"))
    with pytest.raises(InputError, match="cap_reinforce holds the whole model"):
        allocate("cap_reinforce", chosen)
