"""The verdict at a glance: one line, and one table for a terminal or the top of a report."""

from __future__ import annotations

import math

from validate.accuracy import Perplexity
from validate.latency import COMPRESSED, DENSE, PhaseLatency
from validate.size import Bytes
from validate.verdict import Verdict

SUMMARY_HEADER = ("", "dense", "compressed", "compressed against dense")
MISSING = "–"


def headline(verdict: Verdict) -> str:
    """The verdict in one line."""
    blamed = [limit for limit in verdict.limits if limit.outcome == verdict.verdict]
    if verdict.verdict != "passed":
        line = f"{verdict.verdict.upper()}: " + "; ".join(f"{limit.name}: {limit.reason}" for limit in blamed)
        found = verdict.results.attribution and verdict.results.attribution.first
        return f"{line}; first wrong at {found.layer} ({found.stage}): {found.explanation}" if found else line
    results, facts = verdict.results, []
    if results.size.ratio is not None:
        facts.append(f"{results.size.ratio:.2f}× the size")
    if results.latency:
        for name, phase in (("decode", results.latency.decode), ("prefill", results.latency.prefill)):
            if phase.speedup:
                facts.append(f"{name} {phase.speedup.median:.2f}× as fast")
    if results.accuracy and results.accuracy.ratio:
        facts.append(f"{results.accuracy.ratio.ratio:.3f}× the perplexity")
    if results.numerics:
        facts.append(f"logits within {results.numerics.relative_l2:.1e} of PyTorch")
    return "PASSED: " + ", ".join(facts)


def summary_table(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    """Rows under SUMMARY_HEADER: size, perplexity and speed, dense beside compressed."""
    results = verdict.results
    size = results.size
    rows = [
        _bytes_row(name, both)
        for name, both in (
            ("engine", size.engine),
            ("compressed layers alone", size.layers),
            ("checkpoint", size.checkpoint),
            ("resident memory", size.memory),
        )
        if both.dense is not None or both.compressed is not None
    ]
    if results.accuracy:
        ratio = results.accuracy.ratio
        against = f"{ratio.ratio:.3f}×{_plus_minus(ratio.standard_error, 3)}" if ratio else MISSING
        compressed = results.accuracy.compressed
        name = f"perplexity ({compressed.tokens} tokens)"
        rows.append((name, _perplexity(results.accuracy.dense), _perplexity(compressed), against))
    if results.latency:
        options = results.latency.options
        rows += _speed_rows(f"prefill of {options.prefill_tokens} tokens", results.latency.prefill)
        rows += _speed_rows(f"decode after {options.decode_context} tokens", results.latency.decode)
    return rows


def _bytes_row(name: str, both: Bytes) -> tuple[str, str, str, str]:
    dense, compressed = (MISSING if size is None else f"{size / 1e6:.1f} MB" for size in (both.dense, both.compressed))
    return name, dense, compressed, MISSING if both.ratio is None else f"{both.ratio:.3f}×"


def _perplexity(perplexity: Perplexity | None) -> str:
    if perplexity is None:
        return MISSING
    return f"{perplexity.perplexity:.2f}{_plus_minus(perplexity.standard_error, 2)}"


def _plus_minus(standard_error: float, digits: int) -> str:
    return f" ± {standard_error:.{digits}f}" if math.isfinite(standard_error) else ""


def _speed_rows(name: str, phase: PhaseLatency) -> list[tuple[str, str, str, str]]:
    def time(engine: str) -> str:
        return f"{phase.engines[engine].median * 1e3:.2f} ms" if engine in phase.engines else MISSING

    def rate(engine: str) -> str:
        return f"{phase.tokens_per_second(engine):.1f} tokens/s" if engine in phase.engines else MISSING

    speedup = phase.speedup
    against = f"{speedup.median:.2f}× as fast ({speedup.low:.2f} to {speedup.high:.2f})" if speedup else MISSING
    if speedup and not phase.gate.stable:
        against += ", unstable"
    return [(name, time(DENSE), time(COMPRESSED), against), ("", rate(DENSE), rate(COMPRESSED), "")]
