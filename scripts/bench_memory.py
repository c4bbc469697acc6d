#!/usr/bin/env python3
"""Shows that peak memory does not grow with the number of layers: 4 and 8 random blocks of LLaMA-7B's shape.

    python scripts/bench_memory.py                             compression by wanda, then export
    python scripts/bench_memory.py --steps compress --method sslc --folder /large/disk

Each step runs in a fresh process, which reports the highest resident memory it had (pages of mapped weight files
count). Needs about 7 GB of disk for 8 blocks, all of which is removed at the end. Exit code 1 if a step needs more than
10 % more memory for the largest model than for the smallest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the packages importable without installation

# LLaMA-7B but for the number of layers.
SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
ALLOWED_GROWTH = 1.10
SEQUENCES, LENGTH = 8, 128


def make_model(folder: Path, blocks: int) -> None:
    """Writes a random bfloat16 model, one block in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from compress.architectures import skeleton
    from compress.folder import shard_name, write_index

    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    shapes = {name: parameter.shape for name, parameter in skeleton(folder).named_parameters()}
    shards = [shard_name(index, blocks + 1) for index in range(blocks + 1)]
    for index, shard in enumerate(shards):
        inside = [name for name in shapes if name.startswith(f"model.layers.{index}.")]
        names = inside if index < blocks else [name for name in shapes if ".layers." not in name]
        torch.manual_seed(index)
        tensors = {name: (0.02 * torch.randn(shapes[name])).to(torch.bfloat16) for name in names}
        save_file(tensors, folder / shard, {"format": "pt"})
    write_index(folder, shards)


def compress(folder: Path, method: str) -> None:
    """Compresses the model in `folder`/dense to `folder`/compressed."""
    import torch

    from compress.options import CompressOptions
    from compress.pipeline import compress_model

    tokens = torch.randint(SHAPE["vocab_size"], (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    options = CompressOptions(method=method, values_dtype="bf16")
    compress_model(folder / "dense", folder / "compressed", options, tokens=tokens)


def export(folder: Path, method: str) -> None:
    """Lowers the compressed model; its weights stay where they are."""
    from sslc_export.lowering.lower import lower

    lower(folder / "compressed", folder / "model.onnx")


STEPS: dict[str, Callable[[Path, str], None]] = {"compress": compress, "export": export}


def measured(step: str, folder: Path, method: str) -> tuple[float, float]:
    """Runs a step in this process; returns its seconds and the process's peak resident memory in GB."""
    began = time.perf_counter()
    STEPS[step](folder, method)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return time.perf_counter() - began, peak * 1024 / 1e9


def main() -> int:
    """Runs the steps for each number of blocks and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--method", default="wanda", help="of the compression (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the models go (default: the system's temporary folder)")
    arguments = parser.parse_args()

    peaks: dict[str, list[float]] = {step: [] for step in arguments.steps}
    for blocks in sorted(arguments.blocks):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            with _fresh_process() as process:
                process.submit(make_model, folder / "dense", blocks).result()
            for step in arguments.steps:
                with _fresh_process() as process:
                    seconds, peak = process.submit(measured, step, folder, arguments.method).result()
                peaks[step].append(peak)
                print(f"{blocks} blocks  {step:8}  peak {peak:.2f} GB  {seconds:.0f} s", flush=True)
    grown = False
    for step, (smallest, *_, largest) in peaks.items():
        grown |= largest > ALLOWED_GROWTH * smallest
        print(f"{step:8}  {max(arguments.blocks)} over {min(arguments.blocks)} blocks: {largest / smallest:.3f}")
    return int(grown)


def _fresh_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


if __name__ == "__main__":
    sys.exit(main())
