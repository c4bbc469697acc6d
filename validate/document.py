"""verdict.json: a verdict as plain data, in the shape that verdict.schema.json describes.

JSON has no NaN and no infinity. They become null, and so does what was not measured; `nulls` says why, by path.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from validate.accuracy import Accuracy, Perplexity
from validate.attribution import Attribution
from validate.harness import Harness
from validate.latency import Latency
from validate.sampler import COMPRESSED, DENSE, PhaseLatency
from validate.size import Bytes, SizeLedger
from validate.statistics import Summary
from validate.verdict import Results, Verdict

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).with_name("verdict.schema.json")

_NOT_FINITE = "an output was NaN or infinite"
_WHY_NOT_FINITE = {
    "standard_error": "needs two chunks or more, all with finite logits",
    "greedy_agreement": "nothing was generated",
}


def schema() -> dict[str, Any]:
    """The JSON schema of verdict.json."""
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def to_document(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON-ready data: only dicts, lists, strings, booleans, None and finite numbers."""
    results = verdict.results
    document = {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict.verdict,
        "exit_code": verdict.exit_code,
        "created": results.created,
        "engine": asdict(results.engine),
        "size": _size(results.size),
        "numerics": asdict(results.numerics) if results.numerics else None,
        "attribution": _attribution(results.attribution) if results.attribution else None,
        "accuracy": _accuracy(results.accuracy) if results.accuracy else None,
        "harness": _harness(results.harness) if results.harness else None,
        "latency": _latency(results.latency) if results.latency else None,
        "limits": [asdict(limit) for limit in verdict.limits],
        "skipped": [{"what": what, "reason": reason} for what, reason in results.skipped.items()],
        "layers": [asdict(layer) for layer in results.layers],
        "baseline": [asdict(change) for change in results.baseline],
        "environment": asdict(results.environment),
        "seconds": results.seconds,
    }
    nulls = _missing(results)
    document = _finite(document, "", nulls)
    return document | {"nulls": nulls}


def _size(size: SizeLedger) -> dict[str, Any]:
    def pair(both: Bytes) -> dict[str, Any]:
        return asdict(both) | {"ratio": both.ratio}

    return {
        "ratio": size.ratio,
        "engine": pair(size.engine),
        "layers": pair(size.layers),
        "checkpoint": pair(size.checkpoint),
        "memory": pair(size.memory),
        "mapped": pair(size.mapped),
        "kv_cache": pair(size.kv_cache),
        "gpu": pair(size.gpu),
    }


def _attribution(attribution: Attribution) -> dict[str, Any]:
    return {
        "first": asdict(attribution.first) if attribution.first else None,
        "worst_alone": attribution.worst_alone,
        "no_kernel": attribution.no_kernel,
        "limit": attribution.limit,
        "layers": [asdict(layer) for layer in attribution.layers],
    }


def _accuracy(accuracy: Accuracy) -> dict[str, Any]:
    def of(perplexity: Perplexity | None, name: str) -> Any:
        return getattr(perplexity, name) if perplexity else None

    compressed, dense, ratio = accuracy.compressed, accuracy.dense, accuracy.ratio
    return {
        "perplexity": compressed.perplexity,
        "perplexity_standard_error": compressed.standard_error,
        "perplexity_dense": of(dense, "perplexity"),
        "perplexity_dense_standard_error": of(dense, "standard_error"),
        "perplexity_ratio": ratio.ratio if ratio else None,
        "perplexity_ratio_standard_error": ratio.standard_error if ratio else None,
        "tokens": compressed.tokens,
        "chunks": len(compressed.chunk_nll),
        "chunk_tokens": compressed.chunk_tokens,
        "chunk_nll": list(compressed.chunk_nll),
        "chunk_nll_dense": of(dense, "chunk_nll"),
        "non_finite": compressed.non_finite + (of(dense, "non_finite") or 0),
        "text_sha256": compressed.text_sha256,
    }


def _harness(harness: Harness) -> dict[str, Any]:
    return asdict(harness) | {"worst_recovery": harness.worst_recovery}


def _latency(latency: Latency) -> dict[str, Any]:
    return {
        "prefill": _phase(latency.prefill),
        "decode": _phase(latency.decode),
        "sweep": [{"batch": batch} | _phase(measured) for batch, measured in latency.sweep.items()],
        "options": asdict(latency.options),
        "threads": latency.threads,
    }


def _phase(phase: PhaseLatency) -> dict[str, Any]:
    return {
        "tokens": phase.tokens,
        "speedup": asdict(phase.speedup) if phase.speedup else None,
        "engines": {
            name: _milliseconds(summary) | {"tokens_per_second": phase.tokens_per_second(name)}
            for name, summary in phase.engines.items()
        },
        "host": {name: _milliseconds(summary) for name, summary in phase.host.items()},
        "stable": phase.gate.stable,
        "unstable_because": list(phase.gate.reasons),
        "load": asdict(phase.gate.load),
        "clocks": asdict(phase.gate.clocks),
        "attempts": phase.attempts,
        "repeated_because": list(phase.repeated_because),
    }


def _milliseconds(summary: Summary) -> dict[str, Any]:
    return {
        "median_ms": summary.median * 1e3,
        "p5_ms": summary.p5 * 1e3,
        "p95_ms": summary.p95 * 1e3,
        "mean_ms": summary.mean * 1e3,
        "variation": summary.variation,
        "drift": summary.drift,
        # Rounded to 0.1 µs, the noise of the clock, to keep the file readable.
        "samples_ms": [round(sample * 1e3, 4) for sample in summary.samples],
    }


def _missing(results: Results) -> dict[str, str]:
    """Why main values are null although nothing went wrong."""
    nulls = {}
    for stage in ("numerics", "attribution", "accuracy", "harness", "latency"):
        if getattr(results, stage) is None:
            nulls[stage] = results.why_missing(stage)
    if results.size.ratio is None:
        nulls["size.ratio"] = results.why_missing("size")
    if results.accuracy and results.accuracy.dense is None:
        for name in ("perplexity_dense", "perplexity_ratio"):
            nulls[f"accuracy.{name}"] = results.why_missing("accuracy.dense")
    if results.latency and not {DENSE, COMPRESSED} <= results.latency.decode.engines.keys():
        for phase in ("prefill", "decode"):
            nulls[f"latency.{phase}.speedup"] = results.why_missing("latency.dense")
    return nulls


def _finite(value: Any, path: str, nulls: dict[str, str]) -> Any:
    """Copies plain data, with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item, f"{path}.{key}" if path else key, nulls) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}.{index}", nulls) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        name = next((name for name in _WHY_NOT_FINITE if path.endswith(name)), None)
        nulls[path] = _WHY_NOT_FINITE[name] if name else _NOT_FINITE
        return None
    return value
