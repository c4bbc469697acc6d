"""The records of bench_quality as Markdown tables, and as a plot of bytes against perplexity."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from itertools import cycle
from math import log
from pathlib import Path
from statistics import fmean
from textwrap import wrap
from typing import Any

from validate.accuracy import paired_ratio

MOST_SHOWN = 3.2  # perplexity over dense
TITLE_WIDTH = 80  # characters
LABELS_APART = 1.025  # the least factor between two labels
COLUMNS = (0.3, 0.52)  # of labels: below, between, where they are left of their points, and above
SHORT = {"values_dtype=": "", "mask_rule=": "", "allocation=": "", "tuning_minutes=": "tuned ", "tuning_of=": ""}
PEER = "ort_int"  # what ONNX Runtime's quantization is called, before the number of bits
PEER_NAME = "dense, fewer bits (ONNX Runtime)"
COLOURS = ("C0", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "navy", "teal", "gray")  # C1 is the default's
MARKERS = "sPXvpd*<>h8"
THIN = {"arrowstyle": "-", "linewidth": 0.4, "alpha": 0.6}


def line(record: dict[str, Any], default: dict[str, Any] | None = None) -> str:
    """A row of the table; `default` is the record of the default on the same text, with the same budget."""
    error = "" if record["layer_error"] is None else f"{record['layer_error']:.4f}"
    return (
        f"| {record['method']} | {record['budget']:.3f} | {record['budget_in']} | {record['bytes'] / 1e6:.1f} | "
        f"{record['text']} | {record['perplexity']:.2f} ± {record['standard_error']:.2f} | "
        f"{record['ratio']:.3f} ± {record['ratio_standard_error']:.3f} | {_over(record, default)} | {error} | "
        f"{record['seconds']:.0f} |"
    )


def _over(record: dict[str, Any], default: dict[str, Any] | None) -> str:
    """Its perplexity over the default's on the same chunks; chunks differ far more than methods do on one of them."""
    if default is None or default is record or not (record.get("chunk_nll") and default.get("chunk_nll")):
        return ""
    found = paired_ratio(record["chunk_nll"], default["chunk_nll"])
    return f"{found.ratio:.3f} ± {found.standard_error:.3f}"


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table, the best first within a text and a budget, and what the texts are."""
    yield "| method | budget | of | MB | text | perplexity | over dense | over the default | layer error | seconds |"
    yield "|---|---:|---|---:|---|---:|---:|---:|---:|---:|"
    defaults = {(r["budget"], r["budget_in"], r["text"]): r for r in records if r["method"] == "default"}
    for record in sorted(records, key=lambda r: (r["text"], r["budget_in"], -r["budget"], r["ratio"])):
        yield line(record, defaults.get((record["budget"], record["budget_in"], record["text"])))
    for text in sorted({r["text"] for r in records}):
        first = next(r for r in records if r["text"] == text)
        yield f"\n{text}: {first['tokens']} tokens, dense perplexity {first['perplexity_dense']:.2f}"


def overview(records: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table for each text: methods as published over budgets, perplexity over the dense model's."""
    published = [r for r in records if _series_of(r["method"]) == r["method"]]
    plain = {(r["text"], r["method"], r["budget_in"], r["budget"]): r for r in published}
    budgets = sorted({key[2:] for key in plain}, key=lambda budget: (budget[0] == "bytes", -budget[1]))
    for text in sorted({key[0] for key in plain}):
        yield f"\n| {text} | {' | '.join(f'{100 * share:g} % of the {unit}' for unit, share in budgets)} |"
        yield f"|---|{'---:|' * len(budgets)}"
        methods = {method for other, method, *_ in plain if other == text}
        rows = {method: [plain.get((text, method, *budget)) for budget in budgets] for method in methods}
        for method in sorted(rows, key=lambda method: fmean(log(r["ratio"]) for r in rows[method] if r)):
            yield f"| {method} | {' | '.join(map(_ratio, rows[method]))} |"


def _ratio(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    ratio, error = record["ratio"], record["ratio_standard_error"]
    return f"{ratio:.3f} ± {error:.3f}" if ratio < 10 else f"{ratio:.3g} ± {error:.2g}"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Bytes against perplexity, both over dense float32, a panel for each text. What is far off is only named.

    A line for each method as published, over its budgets; rows with options are triangles of its colour, with a label.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import patheffects, pyplot, ticker

    halo = [patheffects.withStroke(linewidth=1.5, foreground="white")]  # of labels, where lines cross them
    texts, dense = sorted({r["text"] for r in records}), max(r["dense_bytes"] for r in records)
    series = _series([r for r in records if r["ratio"] <= MOST_SHOWN])
    figure, axes = pyplot.subplots(1, len(texts), figsize=(5.5 * len(texts), 6.6), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        rows = [r for r in records if r["text"] == text]
        shown = [r for r in rows if r["ratio"] <= MOST_SHOWN]
        for name, style in series.items():
            plain = sorted((r["bytes"] / dense, r["ratio"]) for r in shown if _series_of(r["method"]) == name)
            axis.plot([x for x, _ in plain], [y for _, y in plain], label=name, **style)
        labelled = [r for r in shown if _series_of(r["method"]) in (None, PEER_NAME)]
        for r in labelled:
            if " " in r["method"]:
                style = series.get(r["method"].split()[0], {"color": "C7"})
                axis.plot(r["bytes"] / dense, r["ratio"], "^", markersize=5, color=style["color"])
        axis.set(xlim=(0, 1), xlabel="share of the bytes of the float32 model's layers", ylim=(0.98, MOST_SHOWN))
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.FixedLocator([1, 1.1, 1.2, 1.3, 1.5, 2, 2.5]))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.grid(alpha=0.3)
        lowest = [0.0] * (len(COLUMNS) + 1)
        for r in sorted(labelled, key=lambda r: r["ratio"]):  # one above the other, each at its point or higher
            at = r["bytes"] / dense
            column = bisect(COLUMNS, at)
            left, height = column == 1, max(lowest[column] * LABELS_APART, r["ratio"])
            beside = (at + (-0.03 if left else 0.03), height)
            aligned = {"va": "center", "ha": "right" if left else "left"}
            axis.annotate(
                _label(r), (at, r["ratio"]), beside, fontsize=7, arrowprops=THIN, path_effects=halo, **aligned
            )
            lowest[column] = height
        beyond = ", ".join(sorted({r["method"] for r in rows if r not in shown}))
        heading = [text, *wrap(beyond and f"beyond {MOST_SHOWN:g}: {beyond}", TITLE_WIDTH)]
        axis.set_title("\n".join(heading), fontsize=9)
    axes[0][0].set_ylabel("perplexity over the dense model's")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=7, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=120)


def _series(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The lines of the plot by what the legend calls them, and how they are drawn."""
    names = sorted({name for r in records if (name := _series_of(r["method"]))} - {"default", PEER_NAME})
    published = {
        name: {"color": colour, "marker": marker, "markersize": 5, "linewidth": 0.8}
        for name, colour, marker in zip(names, cycle(COLOURS), cycle(MARKERS), strict=False)
    }
    return {
        "default": {"color": "C1", "marker": "o", "markersize": 6, "linewidth": 2},
        **published,
        PEER_NAME: {"color": "black", "marker": "D", "markersize": 5, "linestyle": ""},
    }


def _series_of(method: str) -> str | None:
    """The line that a record belongs to; None for one with options, which stands alone."""
    return PEER_NAME if method.startswith(PEER) else None if " " in method else method


def _label(record: dict[str, Any]) -> str:
    if record["method"].startswith(PEER):
        return f"{record['method'].removeprefix(PEER)} bits"
    label = record["method"].removeprefix("default ")
    for option, short in SHORT.items():
        label = label.replace(option, short)
    return f"{label}, {record['budget']:g}" + " of bytes" * (record["budget_in"] == "bytes")
