#!/usr/bin/env python3
"""Peak memory of compression and export on random blocks of LLaMA-7B's shape: over their number, and for every method.

    python scripts/bench_memory.py                             4 and 8 blocks: compression by wanda, then export
    python scripts/bench_memory.py --steps compress --method sslc --folder /large/disk
    python scripts/bench_memory.py --methods all --blocks 4 --json memory.json --kill      a table of all methods
    python scripts/bench_memory.py --methods wanda oats --blocks 2 --shape 256 688 4 1000  of another shape

Each step runs in a fresh process, which reports the highest resident memory it had (pages of mapped weight files
count). Needs about 7 GB of disk for 8 blocks, all of which is removed at the end. Exit code 1 if a step needs more than
10 % more memory for the largest model than for the smallest.

With --methods: seconds per block and peak memory of each, as published and with the same budget, "default" being what
sslc-compress does when nothing is chosen. With --kill each is run a second time, killed with SIGKILL in the middle of a
block, resumed, and its files compared with those of the run that was let be. Records are added to the JSON file method
by method, and what is there already is not run again. Exit code 1 beyond --limit, or where files differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the packages importable without installation

from memory_bench.methods import line, read_records, run_methods
from memory_bench.steps import STEPS, Job, Shape, fresh_process, make_model, measured

ALLOWED_GROWTH = 1.10


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; see the module's text."""
    options = _options(argv)
    return tabled(options) if options.methods else grown(options)


def grown(options: argparse.Namespace) -> int:
    """Runs the steps for each number of blocks and compares their memory."""
    peaks: dict[str, list[float]] = {step: [] for step in options.steps}
    for blocks in sorted(options.blocks or [4, 8]):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            job = Job(Path(name), options.method, options.sequences, options.length)
            with fresh_process() as process:
                process.submit(make_model, job.folder / "dense", Shape(*options.shape), blocks).result()
            for step in options.steps:
                with fresh_process() as process:
                    found = process.submit(measured, step, job).result()
                peaks[step].append(found.peak_bytes)
                print(
                    f"{blocks} blocks  {step:8}  peak {found.peak_bytes / 1e9:.2f} GB  {found.seconds:.0f} s",
                    flush=True,
                )
    beyond = False
    for step, (smallest, *_, largest) in peaks.items():
        beyond |= largest > ALLOWED_GROWTH * smallest
        print(f"{step:8}  largest over smallest model: {largest / smallest:.3f}")
    return int(beyond)


def tabled(options: argparse.Namespace) -> int:
    """Runs the methods on one model and prints their table."""
    from compress.options import METHODS

    methods = ["default", *METHODS] if options.methods == ["all"] else options.methods
    blocks, shape = (options.blocks or [4])[0], Shape(*options.shape)
    model = f"{blocks} × {shape.hidden_size} × {shape.intermediate_size}, {options.sequences} × {options.length} tokens"
    records = read_records(options.json)
    print(f"{model}\n\n| method | s per block | s in all | peak GiB | killed and resumed |\n|---|---:|---:|---:|---|")
    for record in records:
        if record.model == model and record.method in methods:
            print(line(record, options.limit))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        job = Job(Path(name), sequences=options.sequences, length=options.length)
        with fresh_process() as process:
            process.submit(make_model, job.folder / "dense", shape, blocks).result()
        for record in run_methods(methods, model, job, options.kill, records, options.json):
            print(line(record, options.limit), flush=True)
    asked = [record for record in records if record.model == model and record.method in methods]
    return int(any(record.peak_gib > options.limit or record.same_after_kill is False for record in asked))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", help="numbers of blocks (default: 4 8; with --methods 4)")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument(
        "--method", default="wanda", help="of the compression, without --methods (default: %(default)s)"
    )
    parser.add_argument("--methods", nargs="+", help="table these on one model; all, or names")
    parser.add_argument("--kill", action="store_true", help="with --methods: kill, resume and compare, too")
    parser.add_argument("--limit", type=float, default=6.0, help="GiB that a method may need (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="records of --methods, added to")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        metavar=("HIDDEN", "INTERMEDIATE", "HEADS", "VOCABULARY"),
        default=list(vars(Shape()).values()),
        help="of the model (default: LLaMA-7B's)",
    )
    parser.add_argument("--sequences", type=int, default=Job.sequences, help="of calibration (default: %(default)s)")
    parser.add_argument("--length", type=int, default=Job.length, help="tokens in each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the models go (default: the system's temporary folder)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
