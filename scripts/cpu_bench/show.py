"""The records as text, as a Markdown table, and as a plot."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_bench.layers import Record
from cpu_bench.models import ModelRecord


def processor() -> str:
    """Family and model as well as the name: clouds sell different processors under one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{fields.get('model name')}, family {fields.get('cpu family')} model {fields.get('model')}"


def record(row: dict[str, Any]) -> Record | ModelRecord:
    """A record from a row of a --json file."""
    kind = ModelRecord if "model" in row else Record
    return kind(**{name: row[name] for name in kind.__dataclass_fields__})


def lines(records: Sequence[Record | ModelRecord]) -> str:
    """One line per engine, the fastest first, under a heading."""
    first = records[0]
    what = f"{first.n} x {first.k}" if isinstance(first, Record) else f"{first.model}, {first.phase}"
    head = f"{what}, M = {first.m}, {first.threads} thread(s), read bandwidth {first.bandwidth / 1e9:.1f} GB/s"
    rows = [head]
    for row in sorted(records, key=lambda record: -record.ratio):
        error = f"  error {row.error:.1e}" if isinstance(row, Record) and row.error is not None else ""
        rows.append(
            f"  {row.engine:12} {row.values:5} {row.how:36} {row.milliseconds:9.3f} ms {row.ratio:6.2f} x dense "
            f"{row.share_of_bandwidth:5.0%} of bandwidth{error}"
        )
    return "\n".join(rows)


def markdown(records: Sequence[Record | ModelRecord]) -> str:
    """A table: a row per engine, a column per layer or phase, tokens and threads. The best of a column is bold."""
    columns = list(dict.fromkeys(map(_column, records)))
    engines = list(dict.fromkeys((row.engine, row.values, row.how) for row in records))
    cells = {((row.engine, row.values, row.how), _column(row)): row.ratio for row in records}
    best = {column: max(ratio for (_, there), ratio in cells.items() if there == column) for column in columns}
    table = ["| engine | values | | " + " | ".join(columns) + " |", "|---|---|---|" + "---:|" * len(columns)]
    for engine in engines:
        shown = []
        for column in columns:
            ratio = cells.get((engine, column))
            text = "" if ratio is None else f"{ratio:.2f}"
            shown.append(f"**{text}**" if ratio == best[column] else text)
        table.append("| " + " | ".join([*engine, *shown]) + " |")
    return "\n".join(table)


def _column(row: Record | ModelRecord) -> str:
    what = f"{row.n}×{row.k} M={row.m}" if isinstance(row, Record) else row.phase
    return f"{what}, {row.threads}T"


def plot(records: Sequence[Record | ModelRecord], path: Path) -> None:
    """Ratios: of layers lines over the tokens, a panel for each class of values and layer; of a model bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    layers = [row for row in records if isinstance(row, Record)]
    figure = _layer_lines(layers) if layers else _bars(records)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _layer_lines(records: Sequence[Record]) -> Any:
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    places = list(dict.fromkeys((row.n, row.k, row.threads) for row in records))
    classes = list(dict.fromkeys(row.values for row in records))
    tokens = sorted({row.m for row in records})
    peers = [engine for engine in dict.fromkeys(row.engine for row in records) if engine != "sslc"]
    colours = {"sslc": "#d1495b"} | dict(zip(peers, ("C0", "C2", "C1", "C4"), strict=False))
    size = (2.9 * len(places) + 1.8, 2.3 * len(classes) + 0.4)
    figure, axes = pyplot.subplots(len(classes), len(places), figsize=size, squeeze=False, sharex=True, sharey="row")
    for row_of_axes, values in zip(axes, classes, strict=True):
        engines = list(dict.fromkeys((row.engine, row.how) for row in records if row.values == values))
        for axis, place in zip(row_of_axes, places, strict=True):
            for engine, how in engines:
                here = [r for r in records if (r.engine, r.how, r.values) == (engine, how, values)]
                points = sorted((r.m, r.ratio) for r in here if (r.n, r.k, r.threads) == place)
                nth = [other for name, other in engines if name == engine].index(how)
                axis.plot(
                    *zip(*points, strict=True),
                    ("-", "--", ":", "-.")[nth % 4],
                    color=colours[engine],
                    linewidth=2 if engine == "sslc" else 1,
                    marker="o",
                    markersize=3,
                    label=f"{engine}: {how}",
                )
            axis.set(xscale="log", yscale="log")
            axis.set_title(f"{values}, {place[0]}×{place[1]}, {place[2]}T", fontsize=8)
            axis.axhline(1, color="black", linewidth=0.6)
            axis.set_xticks(tokens, list(map(str, tokens)))
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(labelsize=6, which="both")
            axis.grid(alpha=0.3)
        row_of_axes[0].set_ylabel("times dense f32", fontsize=7)
        row_of_axes[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.supxlabel("tokens", fontsize=8)
    return figure


def _bars(records: Sequence[Record | ModelRecord]) -> Any:
    from matplotlib import pyplot

    columns = list(dict.fromkeys(map(_column, records)))
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    most = max(sum(_column(row) == column for row in records) for column in columns)
    figure, axes = pyplot.subplots(down, across, figsize=(5.2 * across, (0.24 * most + 0.8) * down), squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=False):
        rows = sorted((row for row in records if _column(row) == column), key=lambda row: row.ratio)
        colours = ["#d1495b" if row.engine == "sslc" else "#8d99ae" for row in rows]
        labels = [f"{row.engine} {row.values}, {row.how}" for row in rows]
        bars = axis.barh(range(len(rows)), [row.ratio for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axis.set_yticks(range(len(rows)), labels, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.6)
        axis.set_title(f"{column}: times as fast as dense f32", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_visible(False)
    return figure
