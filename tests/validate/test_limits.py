import math
from pathlib import Path

import pytest

from sslc_common.errors import InputError
from validate.limits import DEFAULT_RELATIVE_L2, Limit, Limits, check_interval, check_value, load_limits, not_measured
from validate.statistics import Interval

DOCUMENTED = Path(__file__).parents[2] / "docs" / "verdict.md"


def write(tmp_path, text):
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    return file


def test_only_the_engine_against_its_own_model_is_limited_by_default():
    limits = load_limits()
    always = ("max_relative_l2", "max_layer_error")
    assert all(getattr(limits, name).value == DEFAULT_RELATIVE_L2 == 1e-5 for name in always)
    assert all(getattr(limits, name) is None for name in Limits.model_fields if name not in always)


def test_a_file_gives_numbers_or_numbers_with_reasons_and_flags_win(tmp_path):
    file = write(
        tmp_path,
        "max_perplexity_ratio: 1.4\nmin_decode_speedup: {value: 1.5, reason: voice}\nmax_relative_l2: 1e-6\n",
    )
    limits = load_limits(file, {"max_perplexity_ratio": 1.2, "max_size_ratio": None})
    assert limits.max_perplexity_ratio == Limit(value=1.2)
    assert limits.min_decode_speedup == Limit(value=1.5, reason="voice")
    # YAML 1.1 reads 1e-6, without a dot, as text.
    assert limits.max_relative_l2.value == 1e-6
    assert limits.max_size_ratio is None


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_limits(write(tmp_path, "# nothing yet\n")) == Limits()


def test_the_documented_limits_file_can_be_read(tmp_path):
    example = DOCUMENTED.read_text().split("```yaml\n")[1].split("```")[0]
    limits = load_limits(write(tmp_path, example))
    assert all(getattr(limits, name) is not None for name in Limits.model_fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_perplexty_ratio: 1.4", ["unknown limit", "max_perplexty_ratio", "max_perplexity_ratio, min_harness"]),
        ("max_size_ratio: {value: 1, why: x}", ["unknown limit", "max_size_ratio.why"]),
        ("max_size_ratio: {reason: x}", ["max_size_ratio"]),
        ("max_size_ratio: abc", ["max_size_ratio", "abc", "number"]),
        ("max_size_ratio: [1]", ["max_size_ratio", "number"]),
        ("max_size_ratio: yes", ["max_size_ratio", "not yes or no"]),
        ("max_size_ratio: 0", ["max_size_ratio", "greater than 0"]),
        ("max_size_ratio: -1", ["max_size_ratio", "greater than 0"]),
        ("max_size_ratio: .nan", ["max_size_ratio"]),
        ("max_size_ratio: .inf", ["max_size_ratio", "finite"]),
        ("min_top1_agreement: 1.5", ["min_top1_agreement", "at most 1"]),
        ("max_relative_l2:", ["max_relative_l2", "number"]),
        ("max_relative_l2: 0", ["max_relative_l2", "greater than 0"]),
        ("max_relative_l2: 1e-3", ["max_relative_l2", "reason"]),
        ("max_relative_l2: {value: 1e-3, reason: ''}", ["max_relative_l2.reason"]),
        ("max_relative_l2: {value: 2, reason: x}", ["max_relative_l2", "below 1"]),
        ("- 1\n- 2", ["holds no limits", "list"]),
        ("1: 2", ["holds no limits"]),
        ("a: {", ["not valid YAML"]),
    ],
)
def test_nonsense_in_a_file_is_refused_by_name(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        load_limits(write(tmp_path, text))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.exit_code == 2


def test_nonsense_in_a_flag_or_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="max_size_ratio"):
        load_limits(flags={"max_size_ratio": -0.5})
    with pytest.raises(InputError, match="no limits file"):
        load_limits(tmp_path / "absent.yaml")


def test_loosening_the_tolerance_needs_a_reason_and_is_then_allowed(tmp_path):
    file = write(tmp_path, "max_relative_l2: {value: 0.02, reason: int8 activations}")
    assert load_limits(file).max_relative_l2 == Limit(value=0.02, reason="int8 activations")


@pytest.mark.parametrize(
    ("value", "comparison", "outcome"),
    [
        (1.4, "<=", "passed"),
        (1.41, "<=", "regression"),
        (1.4, ">=", "passed"),
        (1.39, ">=", "regression"),
        (math.nan, "<=", "regression"),
        (math.nan, ">=", "regression"),
        (math.inf, "<=", "regression"),
    ],
)
def test_a_value_passes_up_to_its_limit_and_nan_never(value, comparison, outcome):
    result = check_value("name", "path", value, Limit(value=1.4, reason="why"), comparison)
    assert (result.outcome, result.limit, result.limit_reason) == (outcome, 1.4, "why")
    assert result.reason


@pytest.mark.parametrize(
    ("low", "high", "unstable", "outcome"),
    [
        (1.40, 1.60, (), "passed"),
        (1.39, 1.60, (), "inconclusive"),
        (1.20, 1.40, (), "inconclusive"),
        (1.20, 1.39, (), "regression"),
        (1.50, 1.60, ("load",), "inconclusive"),
        (1.10, 1.20, ("load",), "inconclusive"),
    ],
)
def test_an_interval_decides_only_if_the_limit_is_outside_and_the_machine_was_quiet(low, high, unstable, outcome):
    result = check_interval("name", "path", Interval((low + high) / 2, low, high), Limit(value=1.4), unstable)
    assert (result.outcome, result.low, result.high) == (outcome, low, high)
    assert all(reason in result.reason for reason in unstable)


def test_what_was_not_measured_is_inconclusive():
    result = not_measured("name", "path", Limit(value=1), "<=", "no dense engine was given")
    assert (result.outcome, result.value) == ("inconclusive", None)
    assert "no dense engine" in result.reason


def test_a_value_is_shown_with_the_digits_that_decide():
    reasons = [check_value("n", "p", value, Limit(value=1.4), "<=").reason for value in (1.3333333, 1.40001, 1.4)]
    assert reasons == ["1.33 <= 1.4", "1.40001 is not <= 1.4", "1.4 <= 1.4"]
