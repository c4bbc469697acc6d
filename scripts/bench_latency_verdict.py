"""Does the latency verdict cry wolf, or sleep? An unchanged engine and one that is a tenth slower, on a busy machine.

    python scripts/bench_latency_verdict.py FOLDER --runs 70      results are added to FOLDER/runs.jsonl, one line each
    python scripts/bench_latency_verdict.py FOLDER                shows them

Real engines and real clocks: a random LLaMA of ten blocks in ONNX Runtime is "dense", and what is judged is the same
file opened a second time (unchanged: a true speed-up of 1), or the model with an eleventh block (a tenth slower: a true
speed-up of 10/11 and a little, for what both spend outside the blocks). Both must keep the same limit, 0.95. Beside
them a process keeps one core busy. Half of the runs use one thread, which leaves a core for that process, and half use
all cores, so that the measurement is disturbed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.lowering.lower import lower
from validate.baseline import changes
from validate.latency import LatencyOptions, measure
from validate.limits import Limit, check_interval

_LIMIT = Limit(value=0.95)
_BLOCKS = {"unchanged": 10, "slower": 11}
_OPTIONS = LatencyOptions(
    prefill_tokens=64, decode_context=64, warm_up_seconds=0.3, prefill_seconds=1.5, decode_seconds=2.5
)


def main() -> int:
    """Entry point; returns 1 if a run ended as it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=0, help="further runs: of seven, five unchanged and two slower")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = arguments.folder / "runs.jsonl"
    done = results.read_text().splitlines() if results.is_file() else []
    for index in range(len(done), len(done) + arguments.runs):
        with results.open("a") as file:
            print(json.dumps(_run(arguments.folder, index)), file=file)
    return _show([json.loads(line) for line in results.read_text().splitlines()])


def _run(folder: Path, index: int) -> dict[str, Any]:
    kind = "slower" if index % 7 in (2, 5) else "unchanged"
    threads = 1 if index // 7 % 2 == 0 else None
    engines = {
        name: OnnxRuntimeEngine(_engine(folder, _BLOCKS[which]), threads=threads, name=name)
        for name, which in (("dense", "unchanged"), ("compressed", kind))
    }
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        thresholds = {"prefill": _LIMIT.value, "decode": _LIMIT.value}
        latency = measure(engines, options=_OPTIONS, thresholds=thresholds)
    finally:
        load.kill()
        load.wait()
    found: dict[str, Any] = {"index": index, "kind": kind, "threads": threads}
    for phase in ("prefill", "decode"):
        measured = getattr(latency, phase)
        assert measured.speedup is not None
        judged = check_interval(phase, "", measured.speedup, _LIMIT, measured.gate.reasons)
        found[phase] = {
            "outcome": judged.outcome,
            "reason": judged.reason,
            "speedup": vars(measured.speedup),
            "stable": measured.gate.stable,
            "attempts": measured.attempts,
            "others": measured.gate.load.others,
        }
    return found


def _engine(folder: Path, blocks: int) -> Path:
    path = folder / f"{blocks}-blocks.onnx"
    if not path.is_file():
        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=blocks,
            hidden_size=512,
            intermediate_size=1536,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=1024,
            max_position_embeddings=256,
        )
        LlamaForCausalLM(config).save_pretrained(path.with_suffix(""))
        lower(path.with_suffix(""), path)
    return path


def _show(runs: list[dict[str, Any]]) -> int:
    wrong = 0
    for kind, forbidden in (("unchanged", "regression"), ("slower", "passed")):
        for phase in ("prefill", "decode"):
            of_kind = [run for run in runs if run["kind"] == kind]
            outcomes = Counter(run[phase]["outcome"] for run in of_kind)
            medians = sorted(run[phase]["speedup"]["median"] for run in of_kind)
            wrong += outcomes[forbidden]
            spread = f"{medians[0]:.3f} to {medians[-1]:.3f}" if medians else "-"
            twice = sum(run[phase]["attempts"] == 2 for run in of_kind)
            print(f"{kind}, {phase}: {dict(outcomes)}; speed-ups {spread}; {twice} of {len(of_kind)} measured twice")
    steady = [{"latency": run} for run in runs if run["kind"] == "unchanged"]
    found = Counter(change.outcome for now in steady[1:] for change in changes(steady[0], now))
    print(f"against the first run as a baseline: {dict(found)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
