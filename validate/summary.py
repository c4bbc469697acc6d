"""The verdict at a glance: one line, and one table for a terminal or the top of a report."""

from __future__ import annotations

import math

from validate.accuracy import Perplexity
from validate.blocks import MISSING
from validate.harness import TaskScore
from validate.sampler import COMPRESSED, DENSE, PhaseLatency
from validate.size import Bytes
from validate.verdict import Verdict

SUMMARY_HEADER = ("", "dense", "compressed", "compressed against dense")


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
            ("memory on the GPU", size.gpu),
        )
        if both.dense is not None or both.compressed is not None
    ]
    if size.mapped.compressed is not None:
        # No ratio: runtimes copy dense weights, and what is mapped costs less than what is copied.
        rows.append((*_bytes_row("of resident memory, mapped files", size.mapped)[:3], MISSING))
    if size.kv_cache.compressed is not None:
        rows.append(_bytes_row("key-value cache, per token", size.kv_cache, "kB", 1e3))
    if results.accuracy:
        ratio = results.accuracy.ratio
        against = f"{ratio.ratio:.3f}×{_plus_minus(ratio.standard_error, 3)}" if ratio else MISSING
        compressed = results.accuracy.compressed
        name = f"perplexity ({compressed.tokens} tokens)"
        rows.append((name, _perplexity(results.accuracy.dense), _perplexity(compressed), against))
    if results.harness:
        rows += [_score_row(score) for score in results.harness.scores if score.metric in ("acc", "exact_match")]
    if results.latency:
        options = results.latency.options
        rows += _speed_rows(
            f"first token, after a prompt of {options.prefill_tokens}", "prefill, tokens/s", results.latency.prefill
        )
        rows += _speed_rows(f"next token, after {options.decode_context}", "decode, tokens/s", results.latency.decode)
    return rows


def _bytes_row(name: str, both: Bytes, unit: str = "MB", scale: float = 1e6) -> tuple[str, str, str, str]:
    sizes = (both.dense, both.compressed)
    dense, compressed = (MISSING if size is None else f"{size / scale:.1f} {unit}" for size in sizes)
    return name, dense, compressed, MISSING if both.ratio is None else f"{both.ratio:.3f}×"


def _score_row(score: TaskScore) -> tuple[str, str, str, str]:
    dense = MISSING if score.dense is None else f"{score.dense:.3f}{_plus_minus(score.dense_standard_error, 3)}"
    against = MISSING
    if score.recovery is not None:
        against = f"{score.recovery:.3f}×{_plus_minus(score.recovery_standard_error, 3)}"
    compressed = f"{score.score:.3f}{_plus_minus(score.standard_error, 3)}"
    return f"{score.task}, {score.metric}", dense, compressed, against


def _perplexity(perplexity: Perplexity | None) -> str:
    if perplexity is None:
        return MISSING
    return f"{perplexity.perplexity:.2f}{_plus_minus(perplexity.standard_error, 2)}"


def _plus_minus(standard_error: float | None, digits: int) -> str:
    known = standard_error is not None and math.isfinite(standard_error)
    return f" ± {standard_error:.{digits}f}" if known else ""


def _speed_rows(name: str, rate_name: str, phase: PhaseLatency) -> list[tuple[str, str, str, str]]:
    def time(engine: str) -> str:
        return f"{phase.engines[engine].median * 1e3:.2f} ms" if engine in phase.engines else MISSING

    def rate(engine: str) -> str:
        return f"{phase.tokens_per_second(engine):.1f}" if engine in phase.engines else MISSING

    speedup = phase.speedup
    against = f"{speedup.median:.2f}× as fast ({speedup.low:.2f} to {speedup.high:.2f})" if speedup else MISSING
    if speedup and not phase.gate.stable:
        against += ", unstable"
    return [(name, time(DENSE), time(COMPRESSED), against), (rate_name, rate(DENSE), rate(COMPRESSED), "")]
