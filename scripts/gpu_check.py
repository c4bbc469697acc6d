"""The Python half of gpu_check.sh: builds an engine for this GPU, compares it with PyTorch, times it, writes a report.

Not run on a GPU yet: whoever runs it first is the first to know.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import compress
from sslc_export.engines.pytorch import TorchEngine
from sslc_export.engines.tensorrt import Shapes, build
from sslc_export.engines.tensorrt_runtime import TensorRTEngine
from sslc_export.lowering.lower import lower

PREFILL, WARM_UP, REPEATS = 512, 20, 200


def latency(engine: TensorRTEngine, tokens: int, past: int) -> dict[str, float]:
    """Milliseconds on the GPU (CUDA events, after a warm-up, as trtexec measures): median, 5th and 95th percentile."""
    ids = np.ones((1, past), np.int64)
    _, cache = engine.run(ids) if past else (None, None)
    times = []
    for i in range(WARM_UP + REPEATS):
        engine.run(np.ones((1, tokens), np.int64), cache=cache)
        if i >= WARM_UP:
            times.append(1000 * engine.gpu_seconds)
    cut = statistics.quantiles(times, n=20)
    return {"median": statistics.median(times), "p5": cut[0], "p95": cut[-1]}


def difference(engine: TensorRTEngine, reference: TorchEngine) -> dict[str, float]:
    """Logits against PyTorch in float32, in prefill and in the decoding steps that follow."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, engine.vocab_size, (1, 64))
    got, cache = engine.run(ids)
    expected, reference_cache = reference.run(ids)
    pairs = [(got, expected)]
    for _ in range(8):
        token = rng.integers(0, engine.vocab_size, (1, 1))
        got, cache = engine.run(token, cache=cache)
        expected, reference_cache = reference.run(token, cache=reference_cache)
        pairs.append((got, expected))
    worst = [float(np.abs(g - e).max() / np.abs(e).max()) for g, e in pairs]
    same = [float((g.argmax(-1) == e.argmax(-1)).mean()) for g, e in pairs]
    return {"prefill": worst[0], "decode": max(worst[1:]), "same_token": statistics.mean(same)}


def main() -> None:
    """Runs the checks and writes report.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a compressed folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dense", type=Path, help="the dense folder, to be timed beside it")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "python": platform.python_version()}
    for name, folder in (("compressed", arguments.model), ("dense", arguments.dense)):
        if folder is None:
            continue
        lowered = lower(folder, arguments.out / name / "model.onnx")
        built = build(lowered.path, arguments.out / f"{name}.plan", shapes=Shapes(prefill=PREFILL, context=2048))
        engine = TensorRTEngine(built.path)
        report[name] = {
            "build": {**asdict(built), "path": built.path.name, "layers": len(built.layers)},
            "difference": difference(engine, TorchEngine(compress.load(folder, dtype=torch.float32))),
            "decode_ms": latency(engine, 1, 512),
            "prefill_ms": latency(engine, PREFILL, 0),
        }
        del engine
    if "dense" in report:
        for kind in ("decode_ms", "prefill_ms"):
            report[f"speedup_{kind}"] = report["dense"][kind]["median"] / report["compressed"][kind]["median"]
    path = arguments.out / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{path} is the file to send back")


if __name__ == "__main__":
    main()
