import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.budget import dense_bytes, factor_cost, parameters, plan_layer, stored_bytes
from compress.int4 import pack_int4
from compress.layer import pack
from compress.options import METHODS, VALUE_BITS, CompressOptions, parse_budget
from sslc_common.errors import InputError


@pytest.mark.parametrize("value", [0, 1.5, "abc", math.nan, math.inf, -0.5, None, "", "nan", [0.5]])
def test_a_budget_that_is_no_share_is_the_users_error(value):
    with pytest.raises(InputError, match="budget") as error:
        CompressOptions(budget=value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("value", "budget"), [(1, 1.0), (1.0, 1.0), ("0.5", 0.5), (1e-9, 1e-9)])
def test_a_budget_may_be_a_text_and_may_be_all(value, budget):
    assert parse_budget(value) == budget
    assert CompressOptions(budget=value).budget == budget


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "magic"},
        {"budget_in": "stones"},
        {"values_dtype": "f64"},
        {"rank_share": -0.1},
        {"rank_share": math.nan},
        {"rank": -1},
        {"rank": 8, "method": "wanda"},
        {"sequence_length": 1},
        {"calibration_tokens": 512, "sequence_length": 512},
    ],
)
def test_options_out_of_range_are_the_users_error(wrong):
    with pytest.raises(InputError):
        CompressOptions(**wrong)


@settings(max_examples=300, deadline=None)
@given(
    N=st.integers(1, 3000),
    K=st.integers(1, 3000),
    budget=st.floats(0.001, 1.0),
    unit=st.sampled_from(["bytes", "params"]),
    dtype=st.sampled_from(list(VALUE_BITS)),
    share=st.floats(0, 1),
    rank=st.sampled_from([None, 0, 16, 5000]),
    bias_bytes=st.sampled_from([0, 4]),
    method=st.sampled_from(sorted(METHODS)),
)
def test_a_plan_never_exceeds_its_budget_nor_wastes_it(N, K, budget, unit, dtype, share, rank, bias_bytes, method):
    if not METHODS[method].low_rank:
        rank = None
    options = CompressOptions(
        method=method, budget=budget, budget_in=unit, values_dtype=dtype, rank_share=share, rank=rank
    )
    size, bias = VALUE_BITS[dtype], bias_bytes * N
    plan = plan_layer(N, K, options, dtype, bias)
    dense = dense_bytes(N, K, size, bias)
    if plan.dense_reason:
        assert (plan.rank, plan.nnz) == (0, 0)
        return
    stored = stored_bytes(N, K, plan.nnz, plan.rank, size, bias)
    assert stored < dense_bytes(N, K, max(size, 16), bias)
    assert 0 <= plan.rank <= min(N, K)
    assert 0 <= plan.nnz <= N * K
    assert METHODS[method].low_rank or plan.rank == 0
    used, room = (
        (stored, budget * dense) if unit == "bytes" else (parameters(N, K, plan.nnz, plan.rank), budget * N * K)
    )
    assert used <= room
    # Nothing is left over but what is smaller than one value, or than one byte, unless S is full.
    assert plan.nnz == N * K or room - used < (max(size // 8, 1) if unit == "bytes" else 1) + 1e-6 * room


def test_stored_bytes_are_the_bytes_of_the_tensors():
    S = torch.randn(7, 100)
    bitmap, values = pack(S, torch.rand(7, 100) < 0.5)
    tensors = (bitmap, values, torch.zeros(7, 3), torch.zeros(3, 100), torch.zeros(7))
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert stored_bytes(7, 100, len(values), 3, 32, bias_bytes=28) == size


@pytest.mark.parametrize(
    ("N", "K", "options", "reason"),
    [
        (64, 8, {"budget": 0.2}, "says where they are"),
        (64, 64, {"budget": 1.0}, "no fewer bytes"),
        (64, 64, {"budget": 0.99, "budget_in": "params"}, "no fewer bytes"),
        (64, 64, {"budget": 0.5, "rank": 60}, "rank 60"),
    ],
)
def test_a_layer_that_cannot_pay_stays_dense_and_says_why(N, K, options, reason):
    assert reason in plan_layer(N, K, CompressOptions(**options), "f32").dense_reason


def test_the_rank_share_splits_the_room_for_values():
    plan = plan_layer(1000, 1000, CompressOptions(budget=0.5, budget_in="params", rank_share=0.2), "f32")
    assert plan.rank == 50
    assert plan.nnz == 500_000 - 50 * 2000


def test_stored_bytes_with_int8_values_count_scales_and_factors_of_two_bytes():
    S = torch.randn(7, 100).to(torch.int8)
    bitmap, values = pack(S, torch.rand(7, 100) < 0.5)
    factors = (torch.zeros(7, 3).bfloat16(), torch.zeros(3, 100).bfloat16(), torch.zeros(7, 2).half())
    size = sum(tensor.numel() * tensor.itemsize for tensor in (bitmap, values, *factors))
    assert stored_bytes(7, 100, len(values), 3, 8) == size


@settings(max_examples=100, deadline=None)
@given(N=st.integers(1, 40), K=st.integers(1, 200), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_int4_values_take_no_more_bytes_than_planned_and_little_less(N, K, density, seed):
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < density
    bitmap, values = pack(torch.ones(N, K, dtype=torch.int8), mask)
    tensors = (bitmap, pack_int4(bitmap, values), torch.zeros(N, -(-K // 64)).half())
    factors = (torch.zeros(N, 3).bfloat16(), torch.zeros(3, K).bfloat16())
    size = sum(tensor.numel() * tensor.itemsize for tensor in (*tensors, *factors))
    blocks = N * -(-K // 64)
    assert size <= stored_bytes(N, K, len(values), 3, 4) <= size + blocks / 2 + 1


def test_a_number_of_a_factor_costs_as_many_values_as_its_bits_hold():
    assert [factor_cost(bits, "bytes") for bits in VALUE_BITS.values()] == [1, 1, 2, 4]
    assert factor_cost(4, "params") == 1
