"""What a report says, section by section: report.md and report.html differ only in how they show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from validate.attribution import Attribution
from validate.blocks import MISSING, Block, Table
from validate.harness import Harness
from validate.latency_section import latency_blocks, prediction_table
from validate.limits import LimitResult
from validate.numerics import Numerics
from validate.record_section import build_blocks, environment_table
from validate.summary import SUMMARY_HEADER, summary_table
from validate.verdict import Results, Verdict


@dataclass(frozen=True)
class Section:
    """A title, empty for what stands on top, and what is below it."""

    title: str
    blocks: Sequence[Block]


def sections(verdict: Verdict) -> list[Section]:
    """All of them, in order, without the headline."""
    results = verdict.results
    about = f"Engine `{results.engine.name}`{_layer_counts(results)}. Measured {results.created}."
    if results.engine.fallback_reason:
        about += f" **The kernel does not run: {results.engine.fallback_reason}.**"
    parts = [
        Section("", [about, Table(SUMMARY_HEADER, summary_table(verdict), right=True)]),
        Section("Limits", [Table(("limit", "demanded", "outcome", "why"), [_limit_row(x) for x in verdict.limits])]),
    ]
    if results.baseline:
        parts.append(Section("Since the baseline", [_baseline(results)]))
    if results.skipped:
        parts.append(Section("Not measured", [Table(("what", "why"), list(results.skipped.items()))]))
    if results.latency:
        parts.append(Section("Latency", latency_blocks(results.latency)))
    if results.latency and results.engine.predicted_speedup:
        parts.append(Section("Predicted speed", [prediction_table(results.latency, results.engine.predicted_speedup)]))
    if results.layers:
        parts.append(Section("Layers", [_layers(results)]))
    if results.attribution:
        parts.append(Section("Where errors come from", _attribution(results.attribution)))
    if results.numerics:
        parts.append(Section("Numerics", _numerics(results.numerics)))
    if results.harness:
        parts.append(Section("Zero-shot accuracy", _harness(results.harness)))
    if results.engine.build:
        parts.append(Section("Build record", build_blocks(results.engine.build)))
    parts.append(Section("Environment", [environment_table(results)]))
    return parts


def _baseline(results: Results) -> Table:
    rows = [
        (change.metric, f"{change.before:.4g}", f"{change.now:.4g}", change.outcome, change.reason)
        for change in results.baseline
    ]
    return Table(("metric", "before", "now", "outcome", "why"), rows)


def _layer_counts(results: Results) -> str:
    engine = results.engine
    if engine.kernel_layers is None or engine.dense_layers is None:
        return ""
    return f": {engine.kernel_layers} layers in the sparse + low-rank kernel, {engine.dense_layers} dense"


def _limit_row(limit: LimitResult) -> tuple[str, str, str, str]:
    why = limit.reason + (f" (the limit: {limit.limit_reason})" if limit.limit_reason else "")
    return f"`{limit.name}`", f"{limit.comparison} {limit.limit:g}", limit.outcome, why


def _numerics(numerics: Numerics) -> list[Block]:
    header = (
        "phase",
        "positions",
        "relative L2",
        "worst position",
        "cosine",
        "max error / rms",
        "KL",
        "top-1",
        "beyond noise",
    )
    rows = [
        (
            phase.phase,
            str(phase.positions),
            f"{phase.relative_l2:.1e}",
            f"{phase.worst_relative_l2:.1e}",
            f"{phase.cosine:.6f}",
            f"{phase.max_error_over_rms:.1e}",
            f"{phase.kl_mean:.1e}",
            f"{phase.top1_agreement:.2%}",
            f"{phase.margin_top1_agreement:.2%}",
        )
        for phase in numerics.phases
    ]
    parts: list[Block] = [
        "Logits against the compressed PyTorch model. “Beyond noise” is the share of equal top-1 tokens when near-ties "
        "that rounding explains are forgiven.",
        Table(header, rows, right=True),
    ]
    if numerics.non_finite:
        parts.append(f"**{numerics.non_finite} logits were NaN or infinite.**")
    if numerics.greedy_tokens:
        parts.append(f"Greedy generation: {numerics.greedy_agreement:.1%} of {numerics.greedy_tokens} tokens alike.")
    for parted in numerics.divergences:
        why = "a near-tie" if parted.explained else "**more than rounding explains**"
        parts.append(
            f"Prompt {parted.prompt} parts at token {parted.step}: {parted.reference_token} in PyTorch, "
            f"{parted.engine_token} in the engine, {parted.margin:.2g} apart: {why}."
        )
    return parts


def _attribution(attribution: Attribution) -> list[Block]:
    alone, place = ("compression", "lowering", "kernel"), ("input", "output", "max error / rms", "cosine")
    header = ("layer", *alone, *(f"{name} in place" for name in place))
    rows = [
        (
            layer.name,
            *(
                MISSING if error is None else f"{error:.1e}"
                for error in (
                    layer.compression,
                    layer.lowering,
                    layer.kernel,
                    layer.input,
                    layer.output,
                    layer.max_error_over_rms,
                )
            ),
            f"{layer.cosine:.6f}",
        )
        for layer in attribution.layers
    ]
    first = attribution.first
    said = f"First wrong: `{first.layer}`, {first.stage}: {first.explanation}." if first else "No layer is wrong."
    notes = [f"No kernel was compared: {attribution.no_kernel}."] if attribution.no_kernel else []
    return [f"**{said}**" if first else said, *notes, Table(header, rows, right=True)]


def _layers(results: Results) -> Table:
    header: tuple[str, ...] = ("layer", "rank", "density", "MB", "dense MB", "held-out error", "dense because")
    rows: list[tuple[str, ...]] = [
        (
            layer.name,
            str(layer.rank),
            f"{layer.density:.3f}",
            f"{layer.bytes / 1e6:.2f}",
            f"{layer.dense_bytes / 1e6:.2f}",
            MISSING if layer.error is None else f"{layer.error:.4f}",
            layer.dense_reason or MISSING,
        )
        for layer in results.layers
    ]
    if not any(layer.dense_reason for layer in results.layers):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(header, rows, right=True)


def _harness(harness: Harness) -> list[Block]:
    header = ("task", "metric", "dense", "compressed", "recovery", "samples")
    rows = [
        (
            score.task,
            score.metric,
            MISSING if score.dense is None else _with_error(score.dense, score.dense_standard_error),
            _with_error(score.score, score.standard_error),
            MISSING if score.recovery is None else _with_error(score.recovery, score.recovery_standard_error),
            str(score.samples),
        )
        for score in harness.scores
    ]
    note = f"lm-evaluation-harness {harness.version}, dense and compressed engine on the same samples."
    return [note, Table(header, rows, right=True)]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
