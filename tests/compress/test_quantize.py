"""Rounding every value for itself, with group scales."""

import pytest
import torch

from compress.quantize import round_to_nearest


def widened(rounded, scales):
    return rounded.double() * scales.double()[:, torch.arange(rounded.shape[1]) // 64]


@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 63), (7, 64), (3, 65), (33, 300)])
@pytest.mark.parametrize("size", [0.02, 1.0, 1000.0])
def test_no_int8_value_is_off_by_much_more_than_half_a_step_and_all_together_by_less(N, K, size):
    S = size * torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    rounded, scales = round_to_nearest(S, 8)
    assert (rounded.dtype, scales.dtype) == (torch.int8, torch.float16)
    assert scales.shape == (N, -(-K // 64))
    error = widened(rounded, scales) - S.double()
    largest = torch.nn.functional.pad(S.abs(), (0, -K % 64)).view(N, -1, 64).amax(2).double()
    # The scale of the largest value over 127, and what float16 rounds where it is subnormal (2^-25).
    step = (largest / 127 + 2.0**-25)[:, torch.arange(K) // 64]
    assert float(error.square().sum()) <= float((step**2).sum()) / 12 * 1.3 + 1e-12
    # A candidate scale is 1 % finer, which clips the largest values, or 1 % coarser.
    assert (error.abs() <= torch.maximum(0.51 * step, 0.011 * S.abs().double())).all()


def test_of_some_scales_the_one_with_the_least_error_is_taken():
    S = torch.randn(64, 640, generator=torch.Generator().manual_seed(0))
    rounded, scales = round_to_nearest(S, 8)
    largest = S.view(64, 10, 64).abs().amax(2)
    plain = (largest / 127).half()
    coarse = (S.view(64, 10, 64) / plain.float()[:, :, None]).round().clamp(-127, 127).view(64, 640)
    best, simple = (float((widened(r, s) - S).square().sum()) for r, s in [(rounded, scales), (coarse, plain)])
    assert best < 0.99 * simple


@pytest.mark.parametrize("bits", [8, 4])
def test_columns_that_matter_are_rounded_better(bits):
    S = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(64)
    importance[:8] = 1000

    def error(weights):
        return float((widened(*round_to_nearest(S, bits, weights)) - S)[:, :8].square().sum())

    assert error(importance) < 0.95 * error(None)


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_without_values_have_scale_zero(bits):
    S = torch.zeros(2, 130)
    S[0, 100] = 1
    rounded, scales = round_to_nearest(S, bits)
    assert scales[0, 0] == scales[0, 2] == 0
    assert not scales[1].any()
    assert widened(rounded, scales)[0, 100] == pytest.approx(1, rel=1e-3)
    assert not torch.signbit(scales).any()


def test_all_sixteen_int4_values_are_used_where_they_fit():
    S = torch.arange(-8.0, 8.0)[None] / 4
    rounded, scales = round_to_nearest(S, 4)
    assert rounded.tolist() == [list(range(-8, 8))]
    assert scales.tolist() == [[0.25]]
    assert round_to_nearest(-S, 4)[0].tolist() != rounded.neg().tolist()  # there is no 8


def test_int4_clips_where_that_lowers_the_error():
    S = torch.randn(64, 640, generator=torch.Generator().manual_seed(0))
    rounded, scales = round_to_nearest(S, 4)
    largest = S.view(64, 10, 64).amax(2)
    plain = (torch.maximum(largest, -S.view(64, 10, 64).amin(2) * 7 / 8) / 7).half()
    coarse = (S.view(64, 10, 64) / plain.float()[:, :, None]).round().clamp(-8, 7).view(64, 640)
    best, simple = (float((widened(r, s) - S).square().sum()) for r, s in [(rounded, scales), (coarse, plain)])
    assert best < 0.9 * simple


@pytest.mark.parametrize("bits", [8, 4])
def test_values_beyond_any_scale_are_an_error(bits):
    with pytest.raises(ArithmeticError, match="too large for a float16 scale"):
        round_to_nearest(torch.full((1, 1), 1e9), bits)
