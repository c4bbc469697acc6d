"""report.html: the report with plots, in one file that needs no network, by day and by night, on a phone too."""

from __future__ import annotations

import html
import re
from importlib import resources

from validate.blocks import Block, Table
from validate.latency import Latency
from validate.plots import bars, distributions, scatter
from validate.sampler import COMPRESSED, DENSE
from validate.sections import Section, sections
from validate.summary import headline
from validate.verdict import Results, Verdict

# A number stays on one line with its unit.
_UNIT, _TIED = re.compile(r"(?<=\d) (?=MB|kB|ms)|(?<=±) "), "\N{NO-BREAK SPACE}"

_OPEN = ("", "Limits", "Since the baseline", "Not measured")  # sections that are not folded away


def render_html(verdict: Verdict) -> str:
    """report.html as text."""
    style = resources.files("validate").joinpath("report.css").read_text(encoding="utf-8")
    word, _, facts = headline(verdict).partition(": ")
    parts = [
        f'<header class="{verdict.verdict}"><h1>{word}</h1><p>{_inline(facts)}</p></header>',
        _tiles(verdict.results),
        *(_section(section, verdict.results) for section in sections(verdict)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{word}: {html.escape(verdict.results.engine.name)}</title>\n<style>\n{style}</style>\n"
        f"<main>\n{chr(10).join(part for part in parts if part)}\n</main>\n</html>\n"
    )


def _tiles(results: Results) -> str:
    """Size, speed and accuracy, side by side."""
    tiles = []
    if results.size.ratio is not None:
        tiles.append(("size", f"{results.size.ratio:.2f}×", "of the dense engine"))
    if results.latency:
        for name, phase in (("decode", results.latency.decode), ("prefill", results.latency.prefill)):
            if phase.speedup:
                interval = f"{phase.speedup.low:.2f}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{phase.speedup.high:.2f}"
                note = f"as fast ({interval})" + ("" if phase.gate.stable else ", unstable")
                tiles.append((name, f"{phase.speedup.median:.2f}×", note))
    if results.accuracy and results.accuracy.ratio:
        ratio = results.accuracy.ratio
        error = f"±\N{NO-BREAK SPACE}{ratio.standard_error:.3f}"
        tiles.append(("perplexity", _number(f"{ratio.ratio:.3f}×"), f"of dense, {error}"))
    if results.numerics:
        tiles.append(("logits", _number(f"{results.numerics.relative_l2:.1e}"), "relative L2 to PyTorch"))
    cells = (
        f"<div><span>{name}</span><strong>{value}</strong><small>{note}</small></div>" for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>' if tiles else ""


def _number(text: str) -> str:
    return "not a number" if "nan" in text else text


def _section(section: Section, results: Results) -> str:
    plots = {"Latency": _latency_plots, "Layers": _layer_plots, "Where errors come from": _error_plots}
    drawn = plots[section.title](results) if section.title in plots else ""
    blocks = "\n".join(_block(block) for block in section.blocks)
    if section.title not in _OPEN:
        folded = drawn or section.title == "Build record"
        blocks = f"<details{'' if folded else ' open'}><summary>all figures</summary>\n{blocks}\n</details>"
    drawn = f'<div class="plots">{drawn}</div>\n' if drawn else ""
    title = f"<h2>{html.escape(section.title)}</h2>\n" if section.title else ""
    return f"<section>\n{title}{drawn}{blocks}\n</section>"


def _block(block: Block) -> str:
    if not isinstance(block, Table):
        return f"<p>{_inline(block)}</p>"
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_UNIT.sub(_TIED, _inline(cell))}</td>" for cell in row) + "</tr>" for row in block.rows
    )
    kind = ' class="figures"' if block.right else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _inline(text: str) -> str:
    """Escapes, then marks `code` and **strong** words; outcomes get their colour."""
    text = html.escape(text)
    if text in ("passed", "regression", "inconclusive", "better", "same", "worse", "unclear"):
        return f'<span class="{text}">{text}</span>'
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", re.sub(r"`(.+?)`", r"<code>\1</code>", text))


def _latency_plots(results: Results) -> str:
    latency = results.latency
    assert isinstance(latency, Latency)
    return "".join(
        distributions(
            f"{name}, milliseconds",
            {
                engine: [sample * 1e3 for sample in phase.engines[engine].samples]
                for engine in (DENSE, COMPRESSED)
                if engine in phase.engines
            },
        )
        for name, phase in (("prefill", latency.prefill), ("decode", latency.decode))
    )


def _layer_plots(results: Results) -> str:
    names = [layer.name for layer in results.layers]
    errors = [layer.error for layer in results.layers]
    plots = bars("density of S", names, [layer.density for layer in results.layers])
    plots += bars("rank of U·V", names, [float(layer.rank) for layer in results.layers])
    if any(error is not None for error in errors):
        plots += bars("held-out error of the layer's output", names, [error or 0.0 for error in errors])
    return plots


def _error_plots(results: Results) -> str:
    attribution = results.attribution
    assert attribution is not None
    if not attribution.layers:
        return ""
    names = [layer.name for layer in attribution.layers]
    series: dict[str, list[float | None]] = {
        "compression": [layer.compression for layer in attribution.layers],
        "lowering": [layer.lowering for layer in attribution.layers],
        "kernel": [layer.kernel for layer in attribution.layers],
        "in place": [layer.output for layer in attribution.layers],
    }
    return scatter("relative L2 error by layer, in the order of the graph", names, series, limit=attribution.limit)
