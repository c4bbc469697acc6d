#!/usr/bin/env python3
"""Ours against everything that one would use instead on a CPU: one layer, or a whole model; in turns, in one run.

    python scripts/bench_cpu.py --quick                        4096 x 4096, a few numbers of tokens; under five minutes
    python scripts/bench_cpu.py --json out.json --plot out.png all shapes, tokens and threads; half an hour
    python scripts/bench_cpu.py --model SmolLM2-135M/          decode, and prefill of 512 tokens, of a whole model
    python scripts/bench_cpu.py --alone --shape 1536 576 32 --tokens 1 16 --kernels avx512 avx2

How it measures: each engine holds several copies of its layer with different weights, together larger than any cache,
and one run goes through all of them. The engines take turns in random order, so that a slow moment hits all; the ratio
is the median over the turns of dense time / the engine's time, dense being ONNX Runtime's float32 MatMul. With one
thread, time is CPU time, so that waiting for other programs does not count; with more it is wall time. All weights are
in pages of the system's usual size. Read bandwidth is measured in every turn by a loop that only reads, the best of
three passes over 256 MiB. Ours keeps half of the parameters of W = S + U·V (--budget); the others have W dense.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # importable without installation

import onnxruntime
from cpu_bench import layers, show
from cpu_bench.layer import Shape
from cpu_bench.layers import Record
from cpu_bench.models import ModelRecord, bench_model, build_models

VALUES = ("f32", "bf16", "int8", "int4")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, measures and shows; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, M = 1, 16, 128, few rounds")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "K", "R"), help="one layer: outputs, inputs, rank")
    parser.add_argument("--budget", type=float, default=0.5, help="parameters kept: (nnz + r (N + K)) / (N K)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", help="numbers of tokens")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="how often each engine runs (default: 20, with --quick 7)")
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES), help="ours")
    parser.add_argument("--kernels", nargs="+", default=[], help="ours: avx512 avx2 portable (default: the best)")
    parser.add_argument("--alone", action="store_true", help="ours and the dense one only")
    parser.add_argument("--model", type=Path, help="a dense Hugging Face folder: time this model rather than layers")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where engines of --model are kept")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt, with --model")
    parser.add_argument("--show", type=Path, nargs="+", help="measure nothing: show these --json files of earlier runs")
    parser.add_argument("--json", type=Path, help="write the records here, as a list, as they come")
    parser.add_argument("--plot", type=Path, help="write a plot here (needs matplotlib)")
    options = parser.parse_args(argv)
    if options.show:
        records: list[Record | ModelRecord] = [
            show.record(row) for file in options.show for row in json.loads(file.read_text(encoding="utf-8"))
        ]
        print(show.markdown(records))
        if options.plot:
            show.plot(records, options.plot)
        return
    shapes = list(layers.SHAPES)
    if options.shape:
        n, k, r = options.shape
        shapes = [Shape(n, k, r, options.budget)]
    if options.quick and not options.shape:
        shapes = [shape for shape in shapes if (shape.n, shape.k) == (4096, 4096)]
    for shape in shapes:
        if not 0 <= shape.density <= 1:
            parser.error(f"rank {shape.r} alone needs more than a budget of {shape.budget} of {shape.n} x {shape.k}")
    rounds = options.rounds or (7 if options.quick else 20)

    began = time.monotonic()
    print(f"{show.processor()}; {os.cpu_count()} cores; onnxruntime {onnxruntime.__version__}; {rounds} rounds")
    about = {"processor": show.processor(), "onnxruntime": onnxruntime.__version__, "rounds": rounds}
    measured: Iterable[Sequence[Record | ModelRecord]]
    if options.model:
        built = build_models(options.model, options.work / options.model.name, options.values, _note)
        measured = bench_model(options.model.name, built, options.prefill, options.threads, rounds)
    else:
        tokens = options.tokens or ([1, 16, 128] if options.quick else layers.TOKENS)
        measured = layers.bench_layers(
            shapes, tokens, options.threads, rounds, options.values, options.kernels, not options.alone, _note
        )
    records = []
    for some in measured:
        records += some
        print(show.lines(some), flush=True)
        if options.json:  # as they come: an interrupted run keeps what it has measured
            rows = [asdict(record) | about for record in records]
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"\n{show.markdown(records)}\n\n{time.monotonic() - began:.0f} s")
    if options.plot:
        show.plot(records, options.plot)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
