import pytest
import torch

from compress.allocation import SLACK, allocate, paying_rank
from compress.budget import LayerPlan, parameters, plan_layer, stored_bytes
from compress.importance import Importance
from compress.options import CompressOptions
from compress.rules import MaskRule

SHAPES = {"a": (40, 64), "b": (64, 100), "c": (8, 16), "d": (64, 64)}


def share(plans, name):
    return parameters(*SHAPES[name], plans[name].nnz, plans[name].rank) / (SHAPES[name][0] * SHAPES[name][1])


def problem(budget=0.5, rank=0):
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    plans = {
        name: LayerPlan(rank, int(budget * N * K) - rank * (N + K)) for name, (N, K) in SHAPES.items() if name != "d"
    } | {"d": LayerPlan(dense_reason="excluded")}
    even = {name: Importance(torch.ones(N), torch.ones(K)) for name, (N, K) in SHAPES.items()}
    return plans, weights, even


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("value_bits", [16, 32])
def test_the_total_is_kept_and_no_layer_is_larger_than_dense(budget, rank, value_bits):
    plans, weights, importance = problem(budget, rank if budget > 0.2 else 0)
    importance["a"] = Importance(torch.full((40,), 1e3), torch.ones(64))
    shared = allocate(plans, SHAPES, weights.__getitem__, importance, value_bits)
    assert shared["d"] == plans["d"]
    before, after = (sum(parameters(*SHAPES[n], p[n].nnz, p[n].rank) for n in "abc") for p in (plans, shared))
    assert after == before
    for name in "abc":
        N, K = SHAPES[name]
        stored = stored_bytes(N, K, shared[name].nnz, shared[name].rank, value_bits)
        assert stored < N * K * value_bits / 8 or shared[name] == plans[name]
        assert shared[name].nnz >= 0


def test_the_more_important_layer_keeps_more_within_the_limits():
    plans, weights, importance = problem()
    importance["a"] = Importance(torch.full((40,), 4.0), torch.ones(64))
    shared = allocate(plans, SHAPES, weights.__getitem__, importance, 32)
    assert share(shared, "a") > 0.55
    assert share(shared, "b") < 0.5
    importance["a"] = Importance(torch.full((40,), 1e9), torch.ones(64))
    shared = allocate(plans, SHAPES, weights.__getitem__, importance, 32)
    # One value more or less, where shares are rounded to whole values.
    assert share(shared, "a") == pytest.approx(1 - SLACK / 4, abs=1e-3)
    assert share(shared, "b") >= SLACK / 2


def test_no_layer_gets_more_values_than_the_mask_rule_allows():
    plans, weights, importance = problem(budget=0.4)
    importance["a"] = Importance(torch.full((40,), 1e9), torch.ones(64))
    shared = allocate(plans, SHAPES, weights.__getitem__, importance, 32, rule=MaskRule(32, 64))
    assert share(shared, "a") == 0.5
    assert sum(shared[n].nnz for n in "abc") == sum(plans[n].nnz for n in "abc")


@pytest.mark.parametrize("choose_ranks", [False, True])
@pytest.mark.parametrize("value_bits", [8, 4])
def test_ranks_that_cost_more_bytes_than_they_count_make_no_layer_larger_than_dense(value_bits, choose_ranks):
    shapes = dict.fromkeys("ab", (512, 640))
    g = torch.Generator().manual_seed(0)
    # Almost nothing but a few directions: a rank pays.
    weights = {name: torch.randn(512, 60, generator=g) @ torch.randn(60, 640, generator=g) for name in shapes}
    options = CompressOptions(budget=0.5, budget_in="params", rank_share=0.1, values_dtype=f"int{value_bits}")
    plans = {name: plan_layer(*shape, options) for name, shape in shapes.items()}
    importance = {name: Importance(torch.full((512,), f), torch.ones(640)) for name, f in (("a", 4.0), ("b", 1.0))}
    shared = allocate(plans, shapes, weights.__getitem__, importance, value_bits, choose_ranks)
    assert max(plan.rank for plan in shared.values()) > 0
    for name, plan in shared.items():
        assert stored_bytes(*shapes[name], plan.nnz, plan.rank, value_bits) < 512 * 640 * value_bits / 8
    assert sum(p.nnz + p.rank * 1152 for p in shared.values()) == sum(p.nnz + p.rank * 1152 for p in plans.values())


def test_equal_layers_keep_about_the_same():
    plans, weights, importance = problem()
    shared = allocate(plans, SHAPES, weights.__getitem__, importance, 32)
    # Shares of 2560 and 6400 normal numbers above one threshold.
    assert share(shared, "a") == pytest.approx(share(shared, "b"), abs=0.03)


def test_the_rank_follows_the_share():
    plans, weights, importance = problem(rank=4)
    importance["b"] = Importance(torch.full((64,), 100.0), torch.ones(100))
    shared = allocate(plans, SHAPES, weights.__getitem__, importance, 32)
    assert shared["b"].rank > 4 > shared["a"].rank


def test_inputs_count_as_much_as_outputs():
    plans, weights, importance = problem()
    by_outputs = importance | {"a": Importance(torch.full((40,), 9.0), torch.ones(64))}
    by_inputs = importance | {"a": Importance(torch.ones(40), torch.full((64,), 9.0))}
    one, other = (allocate(plans, SHAPES, weights.__getitem__, i, 4) for i in (by_outputs, by_inputs))
    assert one == other


def test_nothing_to_share_is_no_problem():
    plans = {"d": LayerPlan(dense_reason="excluded")}
    assert allocate(plans, SHAPES, lambda name: torch.zeros(SHAPES[name]), {}, 4) == plans


def test_directions_are_taken_where_they_are_worth_more_than_the_values_they_cost():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 100, generator=g)
    assert paying_rank(noise, 3200) == 0
    low_rank = torch.randn(64, 4, generator=g) @ torch.randn(4, 100, generator=g)
    assert paying_rank(noise + 5 * low_rank, 3200) == 4
    assert paying_rank(noise + 5 * low_rank, 150) == 0  # not even room for one
    assert paying_rank(noise * (noise.abs() > 2.5) + low_rank, 1800) == 4


def test_ranks_that_pay_keep_the_total():
    plans, weights, importance = problem()
    weights["b"] = weights["b"] + 10 * torch.ones(64, 1) @ torch.randn(1, 100)
    shared = allocate(plans, SHAPES, weights.__getitem__, importance, 32, choose_ranks=True)
    assert shared["b"].rank > 0 == shared["a"].rank
    before, after = (sum(parameters(*SHAPES[n], p[n].nnz, p[n].rank) for n in "abc") for p in (plans, shared))
    assert before == after
