"""The report's section on latency."""

from __future__ import annotations

from collections.abc import Mapping

from validate.blocks import MISSING, Block, Table
from validate.latency import Latency
from validate.statistics import Summary


def latency_blocks(latency: Latency) -> list[Block]:
    """Both phases, what to think of them, and the sweep."""
    header = ("", "median", "p5", "p95", "mean", "variation", "drift", "samples")
    rows, notes = [], []
    for name, phase in (("prefill", latency.prefill), ("decode", latency.decode)):
        rows += [_times(f"{name}, {engine}", summary) for engine, summary in phase.engines.items()]
        rows += [_times(f"{name}, {engine}, host", summary) for engine, summary in phase.host.items()]
        load, clocks = phase.gate.load, phase.gate.clocks
        state = "stable" if phase.gate.stable else "**unstable**: " + "; ".join(phase.gate.reasons)
        notes.append(f"{name.capitalize()}: {state}. Other processes used {load.others:.2f} of {load.cores} cores.")
        if clocks.median is not None:
            notes[-1] += f" Clock {clocks.median:.0f} MHz ({clocks.low:.0f} to {clocks.high:.0f})."
        if phase.repeated_because:
            notes[-1] += f" Measured twice, because at first {'; '.join(phase.repeated_because)}."
    threads = ", ".join(f"{name} {count}" for name, count in latency.threads.items() if count is not None)
    if threads:
        notes.append(f"Threads: {threads}.")
    blocks: list[Block] = [Table(header, rows, right=True), *notes]
    if latency.sweep:
        context = latency.options.decode_context
        blocks += [f"Decode after {context} tokens by batch size, measured once and briefly:", _sweep(latency)]
    return blocks


def _times(name: str, summary: Summary) -> tuple[str, ...]:
    figures = [f"{seconds * 1e3:.2f} ms" for seconds in (summary.median, summary.p5, summary.p95, summary.mean)]
    return name, *figures, f"{summary.variation:.1%}", f"{summary.drift:+.1%}", str(len(summary.samples))


def _sweep(latency: Latency) -> Table:
    sizes = {latency.options.batch: latency.decode} | latency.sweep
    engines = list(latency.decode.engines)
    header = ("batch", *(f"{name}, {unit}" for name in engines for unit in ("ms", "tokens/s")), "speed-up", "")
    rows = []
    for batch, phase in sorted(sizes.items()):
        figures = [
            figure
            for name in engines
            for figure in (f"{phase.engines[name].median * 1e3:.2f}", f"{phase.tokens_per_second(name):.1f}")
        ]
        speedup = phase.speedup
        ratio = f"{speedup.median:.2f}× ({speedup.low:.2f} to {speedup.high:.2f})" if speedup else MISSING
        rows.append((str(batch), *figures, ratio, "" if phase.gate.stable else "unstable"))
    return Table(header, rows, right=True)


def prediction_table(latency: Latency, predicted: Mapping[str, float]) -> Table:
    """The speed that was expected before the build, by phase, beside the measured one."""
    rows: list[tuple[str, ...]] = []
    for name, phase in (("prefill", latency.prefill), ("decode", latency.decode)):
        measured = phase.speedup
        off = f"{predicted[name] / measured.median - 1:+.0%}" if measured else MISSING
        rows.append((name, f"{predicted[name]:.2f}×", f"{measured.median:.2f}×" if measured else MISSING, off))
    return Table(("", "predicted", "measured", "off by"), rows, right=True)
