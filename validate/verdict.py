"""From results and limits to a verdict: a pure function, nothing is measured here.

One missed limit makes a regression. Without one, a limit that could not be decided makes the verdict inconclusive: an
unstable latency, an interval with the limit inside, or a value that was not measured. Without limits there is always
`max_relative_l2`, so an engine that nobody compared with its PyTorch model never passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sslc_common import errors
from validate.accuracy import Accuracy
from validate.attribution import Attribution
from validate.baseline import Change
from validate.environment import Environment
from validate.harness import Harness
from validate.latency import Latency
from validate.limits import (
    Comparison,
    Limit,
    LimitResult,
    Limits,
    Outcome,
    check_interval,
    check_value,
    not_measured,
)
from validate.numerics import Numerics
from validate.size import SizeLedger

_EXIT_CODES = {"passed": errors.PASSED, "regression": errors.REGRESSION, "inconclusive": errors.INCONCLUSIVE}


@dataclass(frozen=True)
class EngineRecord:
    """What was judged.

    Attributes:
        name: Of the engine.
        kernel_layers: Linear layers that run in the sparse + low-rank kernel.
        dense_layers: Linear layers that stayed dense.
        build_record: Where engine.json is.
        kernel: What runs the compressed layers: "avx512", "function" (the operator's ONNX body), ...
        fallback_reason: Why it is not our kernel; None if it is.
        predicted_speedup: Dense time over the engine's that was expected on this machine, by phase ("prefill",
            "decode"); None without a prediction.
        build: The build record, as far as a report shows it; None without one.
    """

    name: str
    kernel_layers: int | None = None
    dense_layers: int | None = None
    build_record: str | None = None
    kernel: str | None = None
    fallback_reason: str | None = None
    predicted_speedup: Mapping[str, float] | None = None
    build: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class LayerRecord:
    """A line of the compression report.

    Attributes:
        name: Of the layer.
        rank: r, the width of U·V.
        density: Stored entries of S over all.
        bytes: Stored size.
        dense_bytes: Size of W in the same type.
        error: Relative error of the layer's output on held-out activations, if it was measured.
        dense_reason: Why it stayed dense; empty if it did not.
    """

    name: str
    rank: int
    density: float
    bytes: int
    dense_bytes: int
    error: float | None = None
    dense_reason: str = ""


@dataclass(frozen=True)
class Results:
    """Everything that was measured; None for a stage that was not run.

    Attributes:
        engine: What was judged.
        created: When, ISO 8601 in UTC.
        environment: Where.
        numerics: Against the compressed PyTorch model.
        attribution: Layer by layer: where errors come from.
        accuracy: On held-out text.
        harness: Zero-shot accuracy by lm-evaluation-harness.
        latency: Beside the dense engine.
        size: On disk and in memory.
        layers: The compression report.
        baseline: What changed since an accepted verdict.
        skipped: Why something is missing, by what it is: "numerics", "attribution", "accuracy", "accuracy.dense",
            "harness", "latency", "latency.dense", "size".
        seconds: How long each stage took.
    """

    engine: EngineRecord
    created: str
    environment: Environment
    numerics: Numerics | None = None
    attribution: Attribution | None = None
    accuracy: Accuracy | None = None
    harness: Harness | None = None
    latency: Latency | None = None
    size: SizeLedger = field(default_factory=SizeLedger)
    layers: tuple[LayerRecord, ...] = ()
    baseline: tuple[Change, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def why_missing(self, what: str) -> str:
        """Reason that `what` ("latency.dense") or all of its stage ("latency") is missing."""
        return self.skipped.get(what.partition(".")[0]) or self.skipped.get(what) or "it is not known"


@dataclass(frozen=True)
class Verdict:
    """The outcome, with all it rests on."""

    verdict: Outcome
    limits: tuple[LimitResult, ...]
    results: Results

    @property
    def exit_code(self) -> int:
        """0 passed, 1 regression, 4 inconclusive."""
        return _EXIT_CODES[self.verdict]


def judge(results: Results, limits: Limits) -> Verdict:
    """Holds the results against the limits."""
    checked = [
        *_numerics(results, limits),
        *_layers(results, limits),
        *_accuracy(results, limits),
        *_harness(results, limits),
        *_latency(results, limits),
        *_size(results, limits),
    ]
    outcomes = {limit.outcome for limit in checked}
    verdict: Outcome = "passed"
    if "regression" in outcomes:
        verdict = "regression"
    elif "inconclusive" in outcomes:
        verdict = "inconclusive"
    return Verdict(verdict, tuple(checked), results)


def _numerics(results: Results, limits: Limits) -> list[LimitResult]:
    demands: tuple[tuple[str, str, Comparison, Limit | None], ...] = (
        ("max_relative_l2", "relative_l2", "<=", limits.max_relative_l2),
        ("min_top1_agreement", "margin_top1_agreement", ">=", limits.min_top1_agreement),
    )
    checked = []
    for name, metric, comparison, limit in demands:
        path = f"numerics.{metric}"
        if limit is None:
            continue
        if results.numerics is None:
            checked.append(not_measured(name, path, limit, comparison, results.why_missing("numerics")))
        else:
            checked.append(check_value(name, path, getattr(results.numerics, metric), limit, comparison))
    return checked


def _layers(results: Results, limits: Limits) -> list[LimitResult]:
    name, metric, limit = "max_layer_error", "attribution.worst_alone", limits.max_layer_error
    if results.attribution is None:
        if name not in limits.model_fields_set:
            return []
        return [not_measured(name, metric, limit, "<=", results.why_missing("attribution"))]
    return [check_value(name, metric, results.attribution.worst_alone, limit, "<=")]


def _accuracy(results: Results, limits: Limits) -> list[LimitResult]:
    name, metric, limit = "max_perplexity_ratio", "accuracy.perplexity_ratio", limits.max_perplexity_ratio
    if limit is None:
        return []
    if results.accuracy is None or results.accuracy.ratio is None:
        return [not_measured(name, metric, limit, "<=", results.why_missing("accuracy.dense"))]
    return [check_value(name, metric, results.accuracy.ratio.ratio, limit, "<=")]


def _harness(results: Results, limits: Limits) -> list[LimitResult]:
    name, metric, limit = "min_harness_recovery", "harness.worst_recovery", limits.min_harness_recovery
    if limit is None:
        return []
    recovery = results.harness.worst_recovery if results.harness else None
    if recovery is None:
        return [not_measured(name, metric, limit, ">=", results.why_missing("harness.dense"))]
    return [check_value(name, metric, recovery, limit, ">=")]


def _latency(results: Results, limits: Limits) -> list[LimitResult]:
    checked = []
    for phase in ("prefill", "decode"):
        name, metric = f"min_{phase}_speedup", f"latency.{phase}.speedup"
        limit: Limit | None = getattr(limits, name)
        if limit is None:
            continue
        measured = getattr(results.latency, phase) if results.latency else None
        if measured is None or measured.speedup is None:
            checked.append(not_measured(name, metric, limit, ">=", results.why_missing("latency.dense")))
        else:
            checked.append(check_interval(name, metric, measured.speedup, limit, measured.gate.reasons))
    return checked


def _size(results: Results, limits: Limits) -> list[LimitResult]:
    name, metric, limit = "max_size_ratio", "size.ratio", limits.max_size_ratio
    if limit is None:
        return []
    if results.size.ratio is None:
        return [not_measured(name, metric, limit, "<=", results.why_missing("size"))]
    return [check_value(name, metric, results.size.ratio, limit, "<=")]
