from dataclasses import replace

import pytest

from tests.validate import results as given
from validate.limits import Limit, Limits
from validate.statistics import Interval
from validate.verdict import judge


def limits(**values):
    return Limits(**{name: Limit(value=value) for name, value in values.items()})


def test_numerics_alone_decide_by_default():
    verdict = judge(given.RESULTS, Limits())
    assert (verdict.verdict, verdict.exit_code) == ("passed", 0)
    assert [limit.name for limit in verdict.limits] == ["max_relative_l2", "max_layer_error"]


@pytest.mark.parametrize(
    ("name", "kept", "missed", "metric"),
    [
        ("max_relative_l2", 5e-7, 1e-7, "numerics.relative_l2"),
        ("min_top1_agreement", 1.0, None, "numerics.margin_top1_agreement"),
        ("max_perplexity_ratio", 1.4, 1.3, "accuracy.perplexity_ratio"),
        ("min_prefill_speedup", 0.9, 1.0, "latency.prefill.speedup"),
        ("min_decode_speedup", 1.4, 1.6, "latency.decode.speedup"),
        ("max_size_ratio", 0.7, 0.6, "size.ratio"),
    ],
)
def test_each_limit_decides_on_its_own(name, kept, missed, metric):
    verdict = judge(given.RESULTS, limits(**{name: kept}))
    assert verdict.verdict == "passed"
    assert {limit.name: limit.metric for limit in verdict.limits}[name] == metric
    if missed is not None:
        verdict = judge(given.RESULTS, limits(**{name: missed}))
        assert (verdict.verdict, verdict.exit_code) == ("regression", 1)
        assert [limit.name for limit in verdict.limits if limit.outcome == "regression"] == [name]


def test_a_wrong_token_beyond_noise_misses_the_agreement_limit():
    wrong = replace(given.RESULTS, numerics=replace(given.NUMERICS, margin_top1_agreement=0.999))
    assert judge(wrong, limits(min_top1_agreement=1.0)).verdict == "regression"


def test_a_limit_inside_the_interval_is_inconclusive():
    verdict = judge(given.RESULTS, limits(min_decode_speedup=1.5))
    assert (verdict.verdict, verdict.exit_code) == ("inconclusive", 4)
    narrow = replace(given.LATENCY.decode, speedup=Interval(1.51, 1.50, 1.52))
    verdict = judge(
        replace(given.RESULTS, latency=replace(given.LATENCY, decode=narrow)), limits(min_decode_speedup=1.5)
    )
    assert verdict.verdict == "passed"


@pytest.mark.parametrize("limit", [1.0, 1.6])
def test_an_unstable_measurement_neither_passes_nor_fails(limit):
    verdict = judge(given.unstable_decode(), limits(min_decode_speedup=limit))
    assert verdict.verdict == "inconclusive"
    assert "varies by 31%" in verdict.limits[-1].reason


def test_an_unstable_measurement_without_a_limit_on_it_changes_nothing():
    assert judge(given.unstable_decode(), limits(min_prefill_speedup=0.9)).verdict == "passed"


def test_a_regression_outweighs_what_is_inconclusive():
    verdict = judge(given.unstable_decode(), limits(min_decode_speedup=1.0, max_size_ratio=0.5))
    assert verdict.verdict == "regression"


def test_nothing_passes_that_was_not_compared_with_its_model():
    verdict = judge(given.bare(), Limits())
    assert verdict.verdict == "inconclusive"
    assert verdict.limits[0].reason == "not measured: no PyTorch model was given"


def test_limits_on_what_was_not_measured_are_inconclusive_with_the_reason():
    everything = limits(
        min_top1_agreement=1.0,
        max_perplexity_ratio=1.4,
        min_prefill_speedup=0.9,
        min_decode_speedup=1.4,
        max_size_ratio=0.7,
    )
    verdict = judge(given.bare(), everything)
    assert {limit.name: limit.reason.removeprefix("not measured: ") for limit in verdict.limits} == {
        "max_relative_l2": "no PyTorch model was given",
        "min_top1_agreement": "no PyTorch model was given",
        "max_perplexity_ratio": "no held-out text was given",
        "min_prefill_speedup": "no dense engine was given",
        "min_decode_speedup": "no dense engine was given",
        "max_size_ratio": "no sizes were given",
    }
    assert {limit.outcome for limit in verdict.limits} == {"inconclusive"}


def test_nan_is_a_regression():
    verdict = judge(given.broken(), limits(max_perplexity_ratio=1.4))
    assert verdict.verdict == "regression"
    assert [limit.outcome for limit in verdict.limits] == ["regression"] * 3
