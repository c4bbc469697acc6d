#!/usr/bin/env python3
r"""Bytes against perplexity: every method at the same budgets, beside ONNX Runtime's own quantization.

    python scripts/bench_quality.py --model DIR --calibration wiki.train.txt --calibration speeches.train.txt \
        --held-out wiki=wiki.heldout.txt --held-out speeches=speeches.heldout.txt --json quality.json --plot quality.png
    python scripts/bench_quality.py ... --quick                one budget, few methods, few tokens
    python scripts/bench_quality.py ... --methods default --set allocation=owl --set mask_rule=2:4     more rows
    python scripts/bench_quality.py --show quality.json --plot quality.png             tables and plot of earlier runs

`default` is what sslc-compress does when nothing is chosen. The other methods run as published: the same budget for
every layer. All see the same calibration text. Perplexity ratios, over the dense model's and over the default's, are
paired over the same chunks; ± is one standard error. Records are appended to the JSON file as they come, and what is in
it already is not measured again.

Text of a third kind, of which the calibration saw nothing, comes with Python, its language reference:

    python -c "from pydoc_data.topics import topics; print(*(topics[t] for t in sorted(topics)))" > python.txt
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the packages importable without installation

from quality_bench import onnx_runtime, show

from validate.accuracy import Perplexity, perplexity, perplexity_ratio

# Share of the budget that goes to U and V, for the methods that make them. 1 is low rank alone.
RANK_SHARES = {
    "joint": 0.15,
    "oats": 0.25,
    "sslc": 0.1,
    "hassle_free": 0.1,
    "three_basil": 0.1,
    "cap": 0.1,
    "svd_llm": 1,
    "fwsvd": 1,
}
QUICK_METHODS = ("default", "magnitude", "wanda", "alps")


@dataclass(frozen=True)
class Record:
    """One method on one text.

    Attributes:
        method: Its name, followed by options that were set; "default", or "ort_int8" for ONNX Runtime's 8 bits.
        budget: What was asked for.
        budget_in: "params" or "bytes".
        text: Name of the held-out text.
        perplexity: On it.
        standard_error: Of `perplexity`.
        perplexity_dense: Of the dense model.
        ratio: Perplexity over the dense model's, paired.
        ratio_standard_error: Of `ratio`.
        tokens: Predicted.
        calibration_tokens: Solved on; 0 without calibration.
        bytes: Of the linear layers in the blocks.
        dense_bytes: Of the same layers, dense.
        layer_error: Mean over the layers of ‖(W − S − UV)X‖/‖WX‖ on calibration text not solved on; None without.
        seconds: Of the compression.
        tuning_steps: How many steps the tuning took; 0 without.
        chunk_nll: Mean negative log-likelihood of each chunk, in nats: what pairs two methods.
    """

    method: str
    budget: float
    budget_in: str
    text: str
    perplexity: float
    standard_error: float
    perplexity_dense: float
    ratio: float
    ratio_standard_error: float
    tokens: int
    calibration_tokens: int
    bytes: int
    dense_bytes: int
    layer_error: float | None
    seconds: float
    tuning_steps: int
    chunk_nll: tuple[float, ...]


def main() -> int:
    """Measures what is missing, prints the tables, writes the plot."""
    arguments = _arguments()
    path = arguments.show or arguments.json
    done = json.loads(path.read_text()) if path and path.is_file() else []
    if not arguments.show:
        _extend(done, arguments)
    if arguments.plot:  # before the table, whose reader may hang up
        show.plot(done, arguments.plot)
    print("\n" + "\n".join([*show.table(done), *show.overview(done)]))
    return 0


def _extend(done: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Adds the records that are missing, to the list and to the file."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        known = {(r["method"], r["budget"], r["budget_in"], r["text"]) for r in done}
        for record in _measure(arguments, Path(folder), known):
            done.append(asdict(record))
            print(show.line(done[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(done, indent=1) + "\n")


def _measure(arguments: argparse.Namespace, folder: Path, known: set[tuple[str, float, str, str]]) -> Iterator[Record]:
    import compress
    from compress.calibration import read_tokens
    from compress.layer import keep_decoded
    from compress.options import CompressOptions
    from compress.pipeline import compress_model
    from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
    from sslc_export.engines.pytorch import TorchEngine

    names = dict(text.split("=", 1) for text in arguments.held_out)
    texts = {
        name: read_tokens([file], arguments.model, tokens=arguments.tokens, length=512, seed=0, what="held-out").numpy()
        for name, file in names.items()
    }
    dense = _dense(arguments, texts)

    def missing(method: str, budget: float, unit: str) -> list[str]:
        return [text for text in texts if (method, budget, unit, text) not in known]

    def records(method: str, budget: float, unit: str, engine: Any, **rest: Any) -> Iterator[Record]:
        for text in missing(method, budget, unit):
            found: Perplexity = perplexity(engine, texts[text])
            ratio = perplexity_ratio(found, dense[text])
            values = (found.perplexity, found.standard_error, dense[text].perplexity)
            tail = (ratio.ratio, ratio.standard_error, found.tokens)
            yield Record(method, budget, unit, text, *values, *tail, **rest, chunk_nll=found.chunk_nll)

    for unit in arguments.budget_in:
        for budget in arguments.budgets:
            for method in arguments.methods:
                label = " ".join([method, *arguments.set])
                if not missing(label, budget, unit):
                    continue
                chosen: dict[str, Any] = {}
                if method != "default":
                    share = RANK_SHARES.get(method, 0.0)
                    chosen = {"method": method, "allocation": "uniform", "rank_share": share, "refinement": 0}
                if method == "fwsvd":
                    chosen["allocation"] = "fisher"  # where its weights come from
                options = CompressOptions(
                    budget=budget,
                    budget_in=unit,
                    calibration=tuple(arguments.calibration),
                    calibration_tokens=arguments.calibration_tokens,
                    **chosen | dict(map(_option, arguments.set)),
                )
                out = folder / "compressed"
                report = compress_model(arguments.model, out, options)
                model = compress.load(out)
                keep_decoded(model)
                errors = [layer.error for layer in report.layers if layer.error is not None]
                yield from records(
                    label,
                    budget,
                    unit,
                    TorchEngine(model),
                    calibration_tokens=report.calibration_tokens,
                    bytes=report.bytes,
                    dense_bytes=report.dense_bytes,
                    layer_error=sum(errors) / len(errors) if errors else None,
                    seconds=report.seconds,
                    tuning_steps=report.tuning_steps,
                )
                shutil.rmtree(out)
    for bits in arguments.ort_bits:
        if {text for method, *_, text in known if method == f"ort_int{bits}"} >= set(texts):
            continue
        began = time.perf_counter()
        path, size, dense_size = onnx_runtime.quantize(arguments.model, folder, bits)
        yield from records(
            f"ort_int{bits}",
            size / dense_size,
            "bytes",
            OnnxRuntimeEngine(path),
            calibration_tokens=0,
            bytes=size,
            dense_bytes=dense_size,
            layer_error=None,
            seconds=time.perf_counter() - began,
            tuning_steps=0,
        )


def _option(text: str) -> tuple[str, Any]:
    """The name and the value of "mask_rule=2:4"."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _dense(arguments: argparse.Namespace, texts: dict[str, Any]) -> dict[str, Perplexity]:
    """The dense model's perplexity on every text; kept in a file beside the records, as it takes minutes."""
    import compress
    from compress.format import Checkpoint
    from compress.work import source_hash
    from sslc_export.engines.pytorch import TorchEngine

    path = arguments.json and arguments.json.with_suffix(".dense.json")
    known = json.loads(path.read_text()) if path and path.is_file() else {}
    model, engine, found = source_hash(Checkpoint.open(arguments.model)), None, {}
    for name, chunks in texts.items():
        key = f"{model} {hashlib.sha256(chunks.tobytes()).hexdigest()}"
        if key not in known:
            engine = engine or TorchEngine(compress.load(arguments.model))
            known[key] = asdict(perplexity(engine, chunks))
            if path:
                path.write_text(json.dumps(known, indent=1) + "\n")
        found[name] = Perplexity(**known[key] | {"chunk_nll": tuple(known[key]["chunk_nll"])})
    return found


def _arguments() -> argparse.Namespace:
    from compress.options import METHODS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="dense Hugging Face folder")
    parser.add_argument("--calibration", action="append", default=[], help="text to calibrate on; repeat")
    parser.add_argument("--held-out", action="append", default=[], metavar="NAME=FILE", help="repeat")
    parser.add_argument("--methods", nargs="+", choices=["default", *METHODS], help="default: all")
    parser.add_argument("--budgets", nargs="+", type=float, help="default: 0.7 0.6 0.5 0.4")
    parser.add_argument("--budget-in", nargs="+", choices=["params", "bytes"], default=["params"])
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="for every method, an option of compress.options.CompressOptions, such as mask_rule=2:4; repeat",
    )
    parser.add_argument("--calibration-tokens", type=int, default=49152)
    parser.add_argument("--tokens", type=int, default=16384, help="of each held-out text")
    parser.add_argument("--folder", type=Path, help="for temporary files, some 2 GB for SmolLM2")
    parser.add_argument("--json", type=Path, help="records; what is in it is not measured again")
    parser.add_argument("--show", type=Path, metavar="JSON", help="only show these records")
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--ort-bits", nargs="*", type=int, choices=onnx_runtime.BITS, help="of ONNX Runtime's quantization"
    )
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if not arguments.show and not (arguments.model and arguments.calibration and arguments.held_out):
        parser.error("--model, --calibration and --held-out are needed, or --show")
    arguments.methods = arguments.methods or (QUICK_METHODS if arguments.quick else ("default", *METHODS))
    arguments.budgets = arguments.budgets or ([0.5] if arguments.quick else [0.7, 0.6, 0.5, 0.4])
    if arguments.ort_bits is None:
        arguments.ort_bits = () if arguments.quick else onnx_runtime.BITS
    if arguments.quick:
        arguments.calibration_tokens, arguments.tokens = 8192, 4096
    return arguments


if __name__ == "__main__":
    sys.exit(main())
