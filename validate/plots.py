"""Plots as inline SVG, coloured by the page's style sheet. Each is as wide as the page lets it be."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 480, 150, 38, 20


def distributions(title: str, samples: Mapping[str, Sequence[float]]) -> str:
    """Histograms of several samples over one axis, each with its median; 1 % at both ends is left out."""
    everything = np.concatenate([np.asarray(values) for values in samples.values()])
    bins = int(np.clip(3 * math.sqrt(len(everything)), 12, 60))
    low, high = (float(x) for x in np.quantile(everything, (0.01, 0.99)))
    if high <= low:
        low, high = low * 0.99, low * 1.01 + 1e-9
    edges = np.linspace(low, high, bins + 1)
    counts = {name: np.histogram(values, edges)[0] for name, values in samples.items()}
    tallest = max(1, max(int(count.max()) for count in counts.values()))
    drawn = []
    for index, (name, values) in enumerate(samples.items()):
        step = (_WIDTH - _LEFT) / bins
        for at, count in enumerate(counts[name]):
            if count:
                height = (_HEIGHT - 14) * count / tallest
                drawn.append(_rect(_LEFT + at * step, _HEIGHT - height, step, height, f"s{index}"))
        median = float(np.median(values))
        x = _LEFT + (_WIDTH - _LEFT) * (median - low) / (high - low)
        drawn.append(f'<line class="s{index} median" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{_HEIGHT}"/>')
    for tick in _ticks(low, high):
        x = _LEFT + (_WIDTH - _LEFT) * (tick - low) / (high - low)
        drawn.append(f'<text x="{x:.1f}" y="{_HEIGHT + 15}" text-anchor="middle">{tick:g}</text>')
    legend = {f"{name}, median {np.median(values):.2f}": f"s{i}" for i, (name, values) in enumerate(samples.items())}
    return _figure(title, drawn, legend)


def bars(title: str, names: Sequence[str], values: Sequence[float]) -> str:
    """One bar per layer, from 0."""
    top = max([*values, 1e-12])
    step = (_WIDTH - _LEFT) / len(values)
    drawn = [_label(f"{top:.3g}", 12), _label("0", _HEIGHT)]
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        height = (_HEIGHT - 8) * value / top
        # The whole column answers to the mouse, so that a small value can be read too.
        column = _rect(_LEFT + index * step, 0, step, _HEIGHT, "column")
        bar = _rect(_LEFT + index * step, _HEIGHT - height, max(step - 0.6, 0.6), height, "s1")
        drawn.append(f"<g><title>{html.escape(name)}: {value:.4g}</title>{column}{bar}</g>")
    return _figure(title, drawn)


def scatter(title: str, names: Sequence[str], series: Mapping[str, Sequence[float | None]], limit: float) -> str:
    """Points per layer over a logarithmic axis, and a line at the limit. Infinite values lie on the upper edge."""
    known = [v for values in series.values() for v in values if v is not None and math.isfinite(v) and v > 0]
    low, high = math.floor(math.log10(min([*known, limit]))), math.ceil(math.log10(max([*known, limit])) + 1e-9)

    def y(value: float) -> float:
        if value <= 0:
            return float(_HEIGHT)
        where = high if math.isinf(value) else math.log10(value)
        return _HEIGHT - (_HEIGHT - 8) * (where - low) / (high - low)

    step = (_WIDTH - _LEFT) / len(names)
    drawn = [_label(f"1e{power}", y(10.0**power) + 4) for power in range(low, high + 1, 2)]
    drawn += [f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>']
    for index, values in enumerate(series.values()):
        for at, (name, value) in enumerate(zip(names, values, strict=True)):
            if value is not None:
                x = _LEFT + (at + 0.5) * step
                dot = f'<circle class="s{index}" cx="{x:.1f}" cy="{y(value):.1f}" r="2.2">'
                drawn.append(f"{dot}<title>{html.escape(name)}: {value:.2e}</title></circle>")
    legend = {name: f"s{index}" for index, name in enumerate(series)} | {f"limit {limit:g}": "limit"}
    return _figure(title, drawn, legend)


def _figure(title: str, drawn: Sequence[str], legend: Mapping[str, str] | None = None) -> str:
    keys = " ".join(f'<span class="{kind}">{html.escape(name)}</span>' for name, kind in (legend or {}).items())
    axis = f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
    return (
        f'<figure><figcaption>{html.escape(title)} <span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _BOTTOM}" role="img" aria-label="{html.escape(title)}">'
        f"{axis}{''.join(drawn)}</svg></figure>\n"
    )


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"/>'


def _label(text: str, y: float) -> str:
    return f'<text x="{_LEFT - 4}" y="{y:.1f}" text-anchor="end">{text}</text>'


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return [round(step * index, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
