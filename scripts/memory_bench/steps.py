"""A random model on disk, and compressing and exporting it, each in a process of its own whose memory is measured."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCKS = "Compressing blocks"  # as `compress.sequential` calls its loop


@dataclass(frozen=True)
class Shape:
    """A LLaMA but for the number of layers; the default is LLaMA-7B's."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    vocab_size: int = 32000


@dataclass(frozen=True)
class Job:
    """What a step works on.

    Attributes:
        folder: Holds the model, `dense`, and what is made of it.
        method: Of the compression; "default" for what sslc-compress does when nothing is chosen.
        sequences: Of calibration.
        length: Tokens in each.
    """

    folder: Path
    method: str = "wanda"
    sequences: int = 8
    length: int = 128


@dataclass
class Measured:
    """What a step took.

    Attributes:
        seconds: In all.
        block_seconds: Of each block; empty for an export.
        peak_bytes: The most resident memory of its process, pages of mapped weight files included.
    """

    seconds: float
    peak_bytes: int
    block_seconds: list[float] = field(default_factory=list)


def make_model(folder: Path, shape: Shape, blocks: int) -> None:
    """Writes a random bfloat16 model, one block in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from compress.architectures import skeleton
    from compress.folder import shard_name, write_index

    config = LlamaConfig(
        **vars(shape),
        num_key_value_heads=shape.num_attention_heads,
        num_hidden_layers=blocks,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
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


def chosen(method: str) -> dict[str, Any]:
    """The options of a method as published, as scripts/bench_quality.py has them; none for the default."""
    from bench_quality import RANK_SHARES

    if method == "default":
        return {}
    allocation = "fisher" if method == "fwsvd" else "uniform"
    return {"method": method, "allocation": allocation, "rank_share": RANK_SHARES.get(method, 0.0), "refinement": 0}


def compress(job: Job, told: Callable[[int], object] = lambda index: None) -> list[float]:
    """Compresses the model to `compressed`, calls `told` as each block begins, and returns the seconds of each."""
    import torch

    from compress.options import CompressOptions
    from compress.pipeline import compress_model
    from compress.source import Source

    began: list[float] = []

    def progress(items: Iterable[Any], description: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            if description == BLOCKS:
                began.append(time.perf_counter())
                told(index)
            yield item
        if description == BLOCKS:
            began.append(time.perf_counter())

    vocabulary = Source.open(job.folder / "dense").model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (job.sequences, job.length), generator=generator)
    options = CompressOptions(values_dtype="bf16", **chosen(job.method))
    compress_model(job.folder / "dense", job.folder / "compressed", options, tokens=tokens, progress=progress)
    return [round(end - start, 4) for start, end in itertools.pairwise(began)]


def export(job: Job) -> list[float]:
    """Lowers the compressed model; its weights stay where they are."""
    from sslc_export.lowering.lower import lower

    lower(job.folder / "compressed", job.folder / "model.onnx")
    return []


STEPS: dict[str, Callable[[Job], list[float]]] = {"compress": compress, "export": export}


def measured(step: str, job: Job) -> Measured:
    """Runs a step in this process and measures it."""
    began = time.perf_counter()
    blocks = STEPS[step](job)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return Measured(time.perf_counter() - began, peak * 1024, blocks)


def fresh_process() -> ProcessPoolExecutor:
    """A process that has done nothing before."""
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
