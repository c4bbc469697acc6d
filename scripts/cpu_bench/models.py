"""One model in ONNX Runtime: dense, with ONNX Runtime's own 8-bit and 4-bit weights, and ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from compress.options import CompressOptions
from compress.pipeline import compress_model
from cpu_bench.timing import turns
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.lowering.lower import lower

_BLOCK = 128  # of MatMulNBits; the fastest
_CONTEXT = 128  # tokens before the one that is decoded
_STEPS = 8  # tokens decoded in one run


@dataclass(frozen=True)
class ModelRecord:
    """One engine of one model.

    Attributes:
        engine: "sslc" for ours.
        values: Class of the weights: f32, bf16, int8 or int4.
        how: What else there is to say.
        model: The folder's name.
        phase: "prefill" or "decode".
        m: Tokens in one call.
        threads: Threads.
        bytes: Of all weights.
        milliseconds: Median of one call.
        ratio: Median over the rounds of the dense engine's time / this one's.
        share_of_bandwidth: Median over the rounds of bytes per second over what a loop reaches that only reads.
        bandwidth: That, in bytes per second; median.
    """

    engine: str
    values: str
    how: str
    model: str
    phase: str
    m: int
    threads: int
    bytes: int
    milliseconds: float
    ratio: float
    share_of_bandwidth: float
    bandwidth: float


@dataclass(frozen=True)
class Built:
    """An engine on disk."""

    engine: str
    values: str
    how: str
    path: Path


def build_models(source: Path, work: Path, values: Sequence[str], note: Callable[[str], None]) -> list[Built]:
    """Builds what is not in `work` yet; the dense engine first.

    Ours keep half of the parameters of the blocks by magnitude: speed does not depend on which ones.

    Args:
        source: A dense Hugging Face folder.
        work: Where the engines are kept for the next time.
        values: Classes of ours.
        note: Told what is being built.
    """
    work.mkdir(parents=True, exist_ok=True)
    built = [Built("onnxruntime", "f32", "dense", work / "dense" / "engine.onnx")]
    if not built[0].path.is_file():
        note("building the dense engine")
        built[0].path.parent.mkdir(exist_ok=True)
        lower(source, built[0].path)
    for bits in (8, 4):
        path = work / f"int{bits}" / "engine.onnx"
        if not path.is_file():
            note(f"building ONNX Runtime's {bits}-bit engine")
            _n_bits(built[0].path, path, bits)
        built.append(Built("onnxruntime", f"int{bits}", f"MatMulNBits, blocks of {_BLOCK}, lm_head too", path))
    for dtype, head in [("f32", "keep"), *((dtype, "int8") for dtype in values)]:
        path = work / f"sslc-{dtype}-{head}" / "engine.onnx"
        if not path.is_file():
            note(f"building ours with {dtype} values, head: {head}")
            options = CompressOptions("magnitude", 0.5, "params", "uniform", values_dtype=dtype, head=head)
            compress_model(source, path.with_suffix(""), options)
            lower(path.with_suffix(""), path)
        built.append(Built("sslc", dtype, "lm_head in int8" if head == "int8" else "lm_head dense", path))
    return built


def bench_model(
    name: str, built: Sequence[Built], prefill: int, threads: Sequence[int], rounds: int
) -> Iterator[list[ModelRecord]]:
    """Yields the records of prefill and of decode for one number of threads after the other."""
    ids = np.random.default_rng(0).integers(0, 1000, (1, prefill))
    for count in threads:
        engines = [OnnxRuntimeEngine(one.path, threads=count) for one in built]
        caches = [engine.run(ids[:, :_CONTEXT])[1] for engine in engines]

        def prompt(engine: OnnxRuntimeEngine) -> None:
            engine.run(ids)

        def decode(pair: tuple[OnnxRuntimeEngine, object]) -> None:
            engine, cache = pair
            for step in range(_STEPS):
                _, cache = engine.run(ids[:, step : step + 1], None, cache)

        phases = {
            "decode": ([partial(decode, pair) for pair in zip(engines, caches, strict=True)], _STEPS, 1, rounds),
            "prefill": ([partial(prompt, engine) for engine in engines], 1, prefill, max(3, rounds // 3)),
        }
        for phase, (runs, calls, m, times) in phases.items():
            measured = turns(runs, times, count)
            yield [
                ModelRecord(
                    one.engine,
                    one.values,
                    one.how,
                    name,
                    phase,
                    m,
                    count,
                    bytes=(size := _bytes(one.path)),
                    milliseconds=measured.median(i) / calls * 1e3,
                    ratio=measured.ratio(i),
                    share_of_bandwidth=measured.share_of_bandwidth(i, size * calls),
                    bandwidth=float(np.median(measured.bandwidth)),
                )
                for i, one in enumerate(built)
            ]


def _n_bits(dense: Path, out: Path, bits: int) -> None:
    """ONNX Runtime's own quantizer over the dense engine, after its own folding of the transposed weights."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # it tells of every node
    out.parent.mkdir(exist_ok=True)
    folded = out.parent / "folded.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.data")
    onnxruntime.InferenceSession(dense, options, providers=["CPUExecutionProvider"])
    quantizer = MatMulNBitsQuantizer(
        onnx.load(folded), bits=bits, block_size=_BLOCK, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)
    for file in (folded, folded.with_name("folded.data")):
        file.unlink()


def _bytes(engine: Path) -> int:
    """Of the weights that an engine reads for a token: embeddings that are only looked up are not among them."""
    model = onnx.load(engine, load_external_data=False)
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    used = {name for node in model.graph.node if node.op_type != "Gather" for name in node.input}
    return sum(
        int({entry.key: entry.value for entry in tensor.external_data}["length"])
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name not in looked_up - used
    )
