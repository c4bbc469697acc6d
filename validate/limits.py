"""What an engine must keep to be accepted: from flags, from a YAML file, or from both.

    max_perplexity_ratio: 1.4
    min_decode_speedup: {value: 1.4, reason: "the voice product answers within 300 ms"}

Each limit is a number, or a value with the reason for it. Only `max_relative_l2` has a default: an engine that
disagrees with its own PyTorch model is always a failure, so this limit cannot be removed, and loosening it needs a
reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sslc_common.errors import InputError
from validate.statistics import Interval

# Rounding of float32 through the layers of a transformer gives 1e-7 to 2e-6; faults are far above 1e-5.
DEFAULT_RELATIVE_L2 = 1e-5

Outcome = Literal["passed", "regression", "inconclusive"]
Comparison = Literal["<=", ">="]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limit(_Checked):
    """A number, and why it is this number."""

    value: float = Field(gt=0, allow_inf_nan=False)
    reason: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, given: object) -> object:
        return given if isinstance(given, Limit | Mapping) else {"value": given}

    @field_validator("value", mode="before")
    @classmethod
    def _no_bool(cls, given: object) -> object:
        # YAML reads "yes" and "on" as true, which pydantic would take for 1.0.
        if isinstance(given, bool):
            raise ValueError("Input should be a number, not yes or no")
        return given


class Limits(_Checked):
    """All limits; None means that nothing is demanded.

    Attributes:
        max_relative_l2: Of the logits against the compressed PyTorch model, in the worst phase.
        min_top1_agreement: Share of positions with the same most likely token, near-ties forgiven.
        max_layer_error: Relative L2 of a compressed layer alone, in lowering or kernel, in the worst layer.
        max_perplexity_ratio: Held-out perplexity over the dense model's.
        min_harness_recovery: Score over the dense engine's in lm-evaluation-harness, for the worst of its metrics.
        min_prefill_speedup: Dense over compressed time of a prefill.
        min_decode_speedup: Dense over compressed time of a decode step.
        max_size_ratio: Engine bytes over the dense engine's.
    """

    max_relative_l2: Limit = Limit(value=DEFAULT_RELATIVE_L2)
    min_top1_agreement: Limit | None = None
    max_layer_error: Limit = Limit(value=DEFAULT_RELATIVE_L2)
    max_perplexity_ratio: Limit | None = None
    min_harness_recovery: Limit | None = None
    min_prefill_speedup: Limit | None = None
    min_decode_speedup: Limit | None = None
    max_size_ratio: Limit | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Limits:
        for name, what in (("max_relative_l2", "the logits"), ("max_layer_error", "the outputs")):
            limit: Limit = getattr(self, name)
            if limit.value >= 1:
                raise ValueError(f"{name} must be below 1: an error of 1 is as large as {what} themselves")
            if limit.value > DEFAULT_RELATIVE_L2 and not limit.reason:
                raise ValueError(
                    f"{name} above {DEFAULT_RELATIVE_L2:g} needs a reason in the limits file: "
                    f"{name}: {{value: ..., reason: ...}}"
                )
        if self.min_top1_agreement and self.min_top1_agreement.value > 1:
            raise ValueError("min_top1_agreement is a share, at most 1")
        return self


def load_limits(file: Path | None = None, flags: Mapping[str, float | None] | None = None) -> Limits:
    """Reads limits from a YAML file, then from flags, which win; a flag that is None was not given.

    Raises:
        InputError: the file is missing or not YAML, a limit is unknown or not a sensible number.
    """
    given = _read(file) if file else {}
    given |= {name: value for name, value in (flags or {}).items() if value is not None}
    source = f"the limits file {file}" if file else "the limits"
    try:
        return Limits.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]).removesuffix(".value")
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"There is an unknown limit in {source}", got=name, allowed=", ".join(Limits.model_fields)
            ) from error
        if not name:
            raise InputError(
                f"There is a limit in {source} that makes no sense", allowed=first["msg"].removeprefix("Value error, ")
            ) from error
        raise InputError(
            f"The limit {name} in {source} is not a sensible number",
            got=first["input"],
            allowed=first["msg"].removeprefix("Value error, "),
        ) from error


def _read(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise InputError(f"There is no limits file {file}", do="Check the path given to --limits")
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The limits file {file} is not valid YAML", got=error) from error
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise InputError(
            f"The limits file {file} holds no limits",
            got=type(given).__name__,
            allowed="lines of the form name: number",
        )
    return given


@dataclass(frozen=True)
class LimitResult:
    """A limit, what was measured, and what follows.

    Attributes:
        name: Of the limit, for example "max_perplexity_ratio".
        metric: Where the value stands in verdict.json, for example "accuracy.perplexity_ratio".
        value: What was measured (a median for latency); None if it was not.
        low: Lower end of the value's interval, where it has one.
        high: Upper end.
        limit: The number to keep.
        comparison: How value and limit must stand to each other.
        outcome: "passed", "regression" or "inconclusive".
        reason: Why, in words.
        limit_reason: Why the limit is what it is, if its author said so.
    """

    name: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    limit: float
    comparison: Comparison
    outcome: Outcome
    reason: str
    limit_reason: str | None = None


def _digits(value: float, limit: float) -> str:
    """A number with as many digits as it takes to see on which side of a limit it is, at least three."""
    texts = [f"{value:.{digits}g}" for digits in (3, 6, 17)]
    return next((text for text in texts if float(text) != limit or value == limit), texts[-1])


def check_value(name: str, metric: str, value: float, limit: Limit, comparison: Comparison) -> LimitResult:
    """Judges a value without noise: equal to the limit still passes; NaN never does."""
    kept = value <= limit.value if comparison == "<=" else value >= limit.value
    if math.isnan(value):
        reason = "not a number: an output was NaN or infinite"
    else:
        reason = f"{_digits(value, limit.value)} {'' if kept else 'is not '}{comparison} {limit.value:g}"
    outcome: Outcome = "passed" if kept else "regression"
    return LimitResult(name, metric, value, None, None, limit.value, comparison, outcome, reason, limit.reason)


def check_interval(name: str, metric: str, value: Interval, limit: Limit, unstable: tuple[str, ...]) -> LimitResult:
    """Judges a noisy value that must reach a limit: by its interval, and not at all if the measurement was unstable."""
    interval = f"{value.confidence:.0%} interval {value.low:.3f} to {value.high:.3f}"
    outcome: Outcome
    if unstable:
        outcome, reason = "inconclusive", "the measurement was unstable: " + "; ".join(unstable)
    elif value.low >= limit.value:
        outcome, reason = "passed", f"{interval} is not below {limit.value:g}"
    elif value.high < limit.value:
        outcome, reason = "regression", f"{interval} is below {limit.value:g}"
    else:
        outcome, reason = "inconclusive", f"{limit.value:g} lies inside the {interval}"
    return LimitResult(
        name, metric, value.median, value.low, value.high, limit.value, ">=", outcome, reason, limit.reason
    )


def not_measured(name: str, metric: str, limit: Limit, comparison: Comparison, reason: str) -> LimitResult:
    """A limit that could not be checked: never passed, however good the rest."""
    text = f"not measured: {reason}"
    return LimitResult(name, metric, None, None, None, limit.value, comparison, "inconclusive", text, limit.reason)
