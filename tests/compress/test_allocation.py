import itertools

import pytest
import torch

from compress.allocation import allocate
from compress.allocation.farms import hill, tail_exponent
from compress.allocation.knapsack import Option, lower_hull
from compress.allocation.problem import SLACK, Problem
from compress.allocation.ranks import paying_rank
from compress.budget import LayerPlan, factor_cost, kept_dense_bytes, parameters, plan_layer, stored_bytes
from compress.importance import Importance
from compress.options import VALUE_BITS, CompressOptions
from compress.rules import MaskRule

SHAPES = {"a": (40, 64), "b": (64, 100), "c": (8, 16), "d": (64, 64)}
# Those that need no whole model; `cap_reinforce` has a file of tests of its own.
ONE_LAYER_AT_A_TIME = ("fisher", "owl", "farms", "welore", "knapsack", "cap")


def room(plans, name, factor_cost=1):
    return parameters(*SHAPES[name], plans[name].nnz, factor_cost * plans[name].rank)


def share(plans, name):
    return parameters(*SHAPES[name], plans[name].nnz, plans[name].rank) / (SHAPES[name][0] * SHAPES[name][1])


def shared_by(name, plans, weights, importance, value_bits=32, **rest):
    """Plans of the allocation of that name, with every layer in a block of its own."""
    blocks = {layer: layer for layer in SHAPES}
    return allocate(name, Problem(plans, SHAPES, blocks, weights.__getitem__, importance, value_bits, **rest))


def problem(budget=0.5, rank=0):
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    plans = {
        name: LayerPlan(rank, int(budget * N * K) - rank * (N + K)) for name, (N, K) in SHAPES.items() if name != "d"
    } | {"d": LayerPlan(dense_reason="excluded")}
    even = {name: Importance(torch.ones(N), torch.ones(K)) for name, (N, K) in SHAPES.items()}
    return plans, weights, even


@pytest.mark.parametrize("name", ONE_LAYER_AT_A_TIME)
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("value_bits", [16, 32])
def test_the_total_is_kept_and_no_layer_is_larger_than_dense(name, budget, rank, value_bits):
    plans, weights, importance = problem(budget, rank if budget > 0.2 else 0)
    importance["a"] = Importance(torch.full((40,), 1e3), torch.ones(64))
    shared = shared_by(name, plans, weights, importance, value_bits)
    assert shared["d"] == plans["d"]
    before, after = (sum(parameters(*SHAPES[n], p[n].nnz, p[n].rank) for n in "abc") for p in (plans, shared))
    assert after == before
    for layer in "abc":
        N, K = SHAPES[layer]
        stored, planned = (stored_bytes(N, K, p[layer].nnz, p[layer].rank, value_bits) for p in (shared, plans))
        assert stored < N * K * value_bits / 8 or stored <= planned
        assert shared[layer].nnz >= 0


def test_the_more_important_layer_keeps_more_within_the_limits():
    plans, weights, importance = problem()
    importance["a"] = Importance(torch.full((40,), 4.0), torch.ones(64))
    shared = shared_by("fisher", plans, weights, importance)
    assert share(shared, "a") > 0.55
    assert share(shared, "b") < 0.5
    importance["a"] = Importance(torch.full((40,), 1e9), torch.ones(64))
    shared = shared_by("fisher", plans, weights, importance)
    # One value more or less, where shares are rounded to whole values.
    assert share(shared, "a") == pytest.approx(1 - SLACK / 4, abs=1e-3)
    assert share(shared, "b") >= SLACK / 2


def test_no_layer_gets_more_values_than_the_mask_rule_allows():
    plans, weights, importance = problem(budget=0.4)
    importance["a"] = Importance(torch.full((40,), 1e9), torch.ones(64))
    shared = shared_by("fisher", plans, weights, importance, rule=MaskRule(32, 64))
    assert share(shared, "a") == 0.5
    assert sum(shared[n].nnz for n in "abc") == sum(plans[n].nnz for n in "abc")


def test_what_the_mask_rule_leaves_no_place_for_goes_to_the_factors():
    plans, weights, importance = problem(rank=3)
    importance["a"] = Importance(torch.full((40,), 1e9), torch.ones(64))
    shared = shared_by("fisher", plans, weights, importance, rule=MaskRule(32, 64))
    assert share(shared, "a") > 0.65
    assert shared["a"].nnz <= 40 * 64 // 2
    assert 2 * plans["a"].rank >= shared["a"].rank * share(plans, "a") / share(shared, "a") > plans["a"].rank
    assert sum(room(shared, n) for n in "abc") == sum(room(plans, n) for n in "abc")


@pytest.mark.parametrize("choose_ranks", [False, True])
@pytest.mark.parametrize("value_bits", [8, 4])
def test_ranks_that_cost_more_bytes_than_they_count_make_no_layer_larger_than_if_it_stayed_dense(
    value_bits, choose_ranks
):
    shapes = dict.fromkeys("ab", (512, 640))
    g = torch.Generator().manual_seed(0)
    # Almost nothing but a few directions: a rank pays.
    weights = {name: torch.randn(512, 60, generator=g) @ torch.randn(60, 640, generator=g) for name in shapes}
    options = CompressOptions(budget=0.5, budget_in="params", rank_share=0.1, values_dtype=f"int{value_bits}")
    plans = {name: plan_layer(*shape, options, options.values_dtype) for name, shape in shapes.items()}
    importance = {name: Importance(torch.full((512,), f), torch.ones(640)) for name, f in (("a", 4.0), ("b", 1.0))}
    blocks = dict.fromkeys(shapes, "block")
    problem = Problem(plans, shapes, blocks, weights.__getitem__, importance, value_bits, choose_ranks)
    shared = allocate("fisher", problem)
    assert max(plan.rank for plan in shared.values()) > 0
    for name, plan in shared.items():
        assert stored_bytes(*shapes[name], plan.nnz, plan.rank, value_bits) < kept_dense_bytes(
            *shapes[name], value_bits
        )
    assert sum(p.nnz + p.rank * 1152 for p in shared.values()) == sum(p.nnz + p.rank * 1152 for p in plans.values())


@pytest.mark.parametrize("budget_in", ["params", "bytes"])
def test_int4_values_leave_room_to_move_at_budgets_of_which_dense_int4_would_leave_none(budget_in):
    shapes = dict.fromkeys("ab", (512, 640))
    budget = 0.7 if budget_in == "params" else 1.0
    options = CompressOptions(budget=budget, budget_in=budget_in, values_dtype="int4", rank_share=0.0)
    plans = {name: plan_layer(*shape, options, options.values_dtype) for name, shape in shapes.items()}
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    importance = {name: Importance(torch.full((512,), f), torch.ones(640)) for name, f in (("a", 4.0), ("b", 1.0))}
    blocks = dict.fromkeys(shapes, "block")
    cost = factor_cost(VALUE_BITS[options.values_dtype], options.budget_in)
    shared = allocate("fisher", Problem(plans, shapes, blocks, weights.__getitem__, importance, 4, factor_cost=cost))
    assert shared["a"].nnz > 1.1 * plans["a"].nnz > 1.1 * shared["b"].nnz
    assert sum(p.nnz for p in shared.values()) == sum(p.nnz for p in plans.values())


def test_equal_layers_keep_about_the_same():
    plans, weights, importance = problem()
    shared = shared_by("fisher", plans, weights, importance)
    # Shares of 2560 and 6400 normal numbers above one threshold.
    assert share(shared, "a") == pytest.approx(share(shared, "b"), abs=0.03)


def test_the_rank_follows_the_share():
    plans, weights, importance = problem(rank=4)
    importance["b"] = Importance(torch.full((64,), 100.0), torch.ones(100))
    shared = shared_by("fisher", plans, weights, importance)
    assert shared["b"].rank > 4 > shared["a"].rank


def test_inputs_count_as_much_as_outputs():
    plans, weights, importance = problem()
    by_outputs = importance | {"a": Importance(torch.full((40,), 9.0), torch.ones(64))}
    by_inputs = importance | {"a": Importance(torch.ones(40), torch.full((64,), 9.0))}
    one, other = (shared_by("fisher", plans, weights, i) for i in (by_outputs, by_inputs))
    assert one == other


@pytest.mark.parametrize("name", [*ONE_LAYER_AT_A_TIME, "cap_reinforce"])
def test_nothing_to_share_is_no_problem(name):
    plans = {"d": LayerPlan(dense_reason="excluded")}
    assert shared_by(name, plans, {}, {}) == plans


@pytest.mark.parametrize("name", ONE_LAYER_AT_A_TIME)
def test_layers_of_zeros_are_no_problem(name):
    plans, weights, importance = problem()
    shared = shared_by(name, plans, {key: torch.zeros_like(W) for key, W in weights.items()}, importance)
    assert sum(shared[n].nnz for n in "abc") == sum(plans[n].nnz for n in "abc")


@pytest.mark.parametrize("name", ONE_LAYER_AT_A_TIME)
@pytest.mark.parametrize("rule", [None, MaskRule(32, 64), MaskRule(2, 4)])
@pytest.mark.parametrize("factor_cost", [1, 2])
@pytest.mark.parametrize("budget", [0.3, 0.5])
def test_free_ranks_keep_the_total_and_the_mask_rule(name, rule, factor_cost, budget):
    plans, weights, importance = problem(budget)
    weights["b"] = weights["b"] + 10 * torch.ones(64, 1) @ torch.randn(1, 100)
    importance["a"] = Importance(torch.full((40,), 30.0), torch.ones(64))
    options = {"rule": rule, "factor_cost": factor_cost, "choose_ranks": True}
    shared = shared_by(name, plans, weights, importance, **options)
    before, after = (sum(room(p, n, factor_cost) for n in "abc") for p in (plans, shared))
    assert after == before
    for layer in "abc":
        assert shared[layer].nnz <= (rule.most(*SHAPES[layer]) if rule else torch.inf)
        assert 0 <= shared[layer].rank <= min(SHAPES[layer])
    assert shared == shared_by(name, plans, weights, importance, **options)  # the same again


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
    shared = shared_by("fisher", plans, weights, importance, choose_ranks=True)
    assert shared["b"].rank > 0 == shared["a"].rank
    before, after = (sum(parameters(*SHAPES[n], p[n].nnz, p[n].rank) for n in "abc") for p in (plans, shared))
    assert before == after


def test_owl_gives_blocks_more_by_their_outliers_within_its_lambda():
    plans, weights, importance = problem()
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    weights["a"][:2] = 100.0  # 5 % of the entries, each 100 / 5.95 = 16.8 times the block's mean
    weights["b"][:1] = 100.0  # 1.6 %
    shared = shared_by("owl", plans, weights, importance)
    # λ from the middle to either end, less what the sizes shift; one value more or less, where shares are rounded.
    assert share(shared, "a") - share(shared, "c") == pytest.approx(0.16, abs=0.01)
    expected = 0.16 * (1 / 64) / (2 / 40)
    assert share(shared, "b") - share(shared, "c") == pytest.approx(expected, abs=0.01)


def test_owl_sees_inputs_and_compares_with_the_mean_of_the_block():
    plans, weights, importance = problem()
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    wide = torch.ones(100)
    wide[:3] = 100.0**2  # mean squares
    importance["b"] = Importance(torch.ones(64), wide)
    shared = shared_by("owl", plans, weights, importance)
    assert share(shared, "b") > share(shared, "a") + 0.15
    # In one block with a, whose entries are as large as b's outliers, b has none, and there is one density.
    weights["a"] *= 100.0
    blocks = {"a": "0", "b": "0", "c": "1"}
    together = allocate("owl", Problem(plans, SHAPES, blocks, weights.__getitem__, importance, 4))
    assert share(together, "a") == pytest.approx(share(together, "b"), abs=1e-3)


def test_the_tail_exponent_of_a_power_law_is_found_whatever_the_shape():
    g = torch.Generator().manual_seed(0)
    square, long = torch.randn(200, 200, generator=g), torch.randn(200, 800, generator=g)
    # Windows have one aspect ratio, so noise of either shape has one exponent: within 3 %, measured 0.4 %.
    assert tail_exponent(square) == pytest.approx(tail_exponent(long), rel=0.03)
    heavy = square * torch.linspace(1, 8, 200).exp()[:, None]
    assert tail_exponent(heavy) < tail_exponent(square) - 0.3
    # Pareto: P(λ > x) = (x₀/x)^(α − 1), so that quantiles are x₀·u^(−1/(α − 1)). One window: it is 2 × 2 of nothing.
    quantiles = (torch.arange(1, 401) / 400) ** (-1 / (2.5 - 1))
    found = hill(quantiles.sort().values.double())
    assert found == pytest.approx(2.5, abs=0.05)  # of 200 quantiles rather than of a density


def test_farms_removes_more_where_tails_are_light_within_tau():
    plans, weights, _ = problem()
    weights["b"] = weights["b"] * torch.linspace(0, 6, 64).exp()[:, None]
    exponents = {name: tail_exponent(weights[name]) for name in "abc"}
    shared = shared_by("farms", plans, weights, {})  # looks at no data
    assert sorted("abc", key=exponents.get) == sorted("abc", key=lambda n: -share(shared, n))
    removed = {name: 1 - share(shared, name) for name in "abc"}
    # The ends are at (1 + τ)/(1 − τ) of each other; c, of 128 entries, is rounded to 1/128.
    assert max(removed.values()) / min(removed.values()) == pytest.approx(1.3 / 0.7, rel=0.02)


def test_welore_keeps_a_share_by_the_singular_values_above_one_threshold():
    plans, weights, _ = problem()

    def spectrum(shape, values):
        g = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=g))[0] for n in shape)
        return (left * values) @ right.T

    for name, flat in (("a", 0.4), ("b", 0.6), ("c", 0.5)):  # share of values near 1; the others are near 0.1
        n = min(SHAPES[name])
        values = torch.linspace(0.1, 0.11, n)
        values[: round(flat * n)] = torch.linspace(1.0, 0.9, round(flat * n))
        weights[name] = spectrum(SHAPES[name], 7.0 * values if name == "a" else values)  # the scale does not count
    shared = shared_by("welore", plans, weights, {})
    # With all values near 1 the three come to 4928 values; the budget, 4544, takes the smallest of these from each.
    assert 0.36 < share(shared, "a") <= 0.4
    assert 0.54 < share(shared, "b") <= 0.6
    assert share(shared, "b") / share(shared, "a") == pytest.approx(1.5, rel=0.1)


def test_a_knapsack_of_sparse_layers_is_one_threshold():
    plans, weights, importance = problem()
    importance["a"] = Importance(torch.full((40,), 2.0), torch.ones(64))
    knapsack, fisher = (shared_by(name, plans, weights, importance) for name in ("knapsack", "fisher"))
    for name in "ab":  # to a step of the grid, (0.9 − 0.2)/8
        assert share(knapsack, name) == pytest.approx(share(fisher, name), abs=0.0875)
    assert share(knapsack, "a") > share(knapsack, "b")


def test_the_knapsack_finds_the_least_loss_on_its_options():
    g = torch.Generator().manual_seed(0)
    curves = [sorted((float(x) for x in torch.rand(5, generator=g)), reverse=True) for _ in range(3)]
    hulls = [lower_hull([Option(10 * i, 0, loss) for i, loss in enumerate(curve)]) for curve in curves]
    for hull, curve in zip(hulls, curves, strict=True):
        kept = {option.room // 10: option.loss for option in hull}
        assert kept[0] == curve[0]
        assert kept[4] == curve[4]
        steps = [b.loss - a.loss for a, b in itertools.pairwise(hull)]
        widths = [b.room - a.room for a, b in itertools.pairwise(hull)]
        slopes = [step / width for step, width in zip(steps, widths, strict=True)]
        assert slopes == sorted(slopes)
        for i, loss in enumerate(curve):  # nothing is below the hull
            before = max(k for k in kept if k <= i)
            after = min(k for k in kept if k >= i)
            level = kept[before] + (kept[after] - kept[before]) * (i - before) / max(after - before, 1)
            assert loss >= level - 1e-12


@pytest.mark.parametrize("name", ["knapsack", "cap"])
def test_ranks_and_rooms_are_chosen_together(name):
    plans, weights, importance = problem(budget=0.3)
    g = torch.Generator().manual_seed(1)
    weights["a"] *= 0.1
    weights["b"] = 0.1 * weights["b"] + torch.randn(64, 3, generator=g) @ torch.randn(3, 100, generator=g)
    shared = shared_by(name, plans, weights, importance, choose_ranks=True)
    assert shared["b"].rank >= 3
    dense = shared_by(name, plans, weights, importance)  # the same allocation, ranks not free
    assert all(dense[layer].rank == 0 for layer in "abc")
    if name == "knapsack":  # exact: noise gets no direction
        assert shared["a"].rank == shared["c"].rank == 0


def test_with_a_tight_rule_the_knapsack_buys_directions_beyond_the_mask():
    plans, weights, importance = problem(budget=0.6)
    rule = MaskRule(2, 4)
    shared = shared_by("knapsack", plans, weights, importance, choose_ranks=True, rule=rule)
    assert sum(room(shared, n) for n in "abc") > sum(rule.most(*SHAPES[n]) for n in "abc")
    assert all(shared[n].nnz <= rule.most(*SHAPES[n]) for n in "abc")
    assert any(shared[n].rank for n in "abc")


def test_cap_ranks_directions_beside_entries():
    """Robust PCA tells few large entries from few large directions; each kind is kept, and what is small is not."""
    g = torch.Generator().manual_seed(0)
    plans, weights, importance = problem(budget=0.3)
    spikes = 9 * weights["a"] * (torch.rand(40, 64, generator=g) < 0.06)
    weights["a"] = torch.randn(40, 1, generator=g) @ torch.randn(1, 64, generator=g) + spikes
    weights["b"] = 0.01 * weights["b"] + torch.randn(64, 6, generator=g) @ torch.randn(6, 100, generator=g)
    weights["c"] *= 0.01
    shared = shared_by("cap", plans, weights, importance, choose_ranks=True)
    assert shared["b"].rank >= 6
    assert shared["a"].nnz >= int((spikes != 0).sum()) > 100
    assert share(shared, "c") == pytest.approx(SLACK * 0.3, abs=0.02)  # the least that a layer gets, and a few
    # Twice the price of a number of U and V, and there are fewer of them.
    dear = shared_by("cap", plans, weights, importance, choose_ranks=True, factor_cost=2)
    assert sum(dear[n].rank for n in "abc") <= sum(shared[n].rank for n in "abc")
