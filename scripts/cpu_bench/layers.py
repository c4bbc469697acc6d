"""One layer in every engine."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cpu_bench import ggml_cpu, onnx_runtime, peers
from cpu_bench.contender import Contender
from cpu_bench.layer import Layer, Shape
from cpu_bench.timing import turns
from plugins_ort import library

# The README's shapes; r is what the paper and its successors take for layers of such sizes.
SHAPES = (
    Shape(4864, 896, 32, 0.5),
    Shape(8192, 2048, 64, 0.5),
    Shape(4096, 4096, 128, 0.5),
    Shape(11008, 4096, 128, 0.5),
)
TOKENS = (1, 4, 16, 32, 128, 512)
_FEW = 16  # tokens up to which a run is short
_CSR_TOKENS = 16  # beyond, it only takes time


@dataclass(frozen=True)
class Record:
    """One engine on one layer.

    Attributes:
        engine: "sslc" for ours.
        values: Class of the weights: f32, bf16, int8 or int4.
        how: The operator, kernel or group size.
        n: Outputs.
        k: Inputs.
        r: Rank of our U·V; the others have W = S + U·V.
        m: Tokens.
        threads: Threads.
        bytes: Of weights, read once per run.
        milliseconds: Median.
        ratio: Median over the rounds of ONNX Runtime's dense float32 time / this one's.
        share_of_bandwidth: Median over the rounds of bytes per second over what a loop reaches that only reads.
        bandwidth: That, in bytes per second; median.
        error: ‖Y − X·Wᵀ‖ / ‖X·Wᵀ‖ in float64, the rounding of the weights included; None where W is not all there.
    """

    engine: str
    values: str
    how: str
    n: int
    k: int
    r: int
    m: int
    threads: int
    bytes: int
    milliseconds: float
    ratio: float
    share_of_bandwidth: float
    bandwidth: float
    error: float | None


def bench_layers(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    threads: Sequence[int],
    rounds: int,
    values: Sequence[str],
    kernels: Sequence[str],
    others: bool,
    note: Callable[[str], None],
) -> Iterator[list[Record]]:
    """Yields the records of one shape, number of threads and number of tokens after the other.

    Args:
        shapes: The layers.
        tokens: Numbers of tokens, M.
        threads: Numbers of threads.
        rounds: How often each engine runs with up to 16 tokens; with more, a third of that.
        values: Classes of ours.
        kernels: Instruction sets of ours.
        others: Whether peers run too, besides ONNX Runtime's dense float32.
        note: Told what is left out and why.
    """
    for shape in shapes:
        layer = Layer(shape)
        for count in threads:
            contenders = list(_contenders(layer, count, values, kernels, others, note))
            for m in tokens:
                now = [c for c in contenders if "CSR" not in c.how or m <= _CSR_TOKENS]
                yield _measure(layer, now, m, count, rounds if m <= _FEW else max(3, rounds // 3))
            del contenders
            gc.collect()


def _contenders(
    layer: Layer,
    threads: int,
    values: Sequence[str],
    kernels: Sequence[str],
    others: bool,
    note: Callable[[str], None],
) -> Iterator[Contender]:
    """The dense one first."""
    yield onnx_runtime.dense(layer, threads)
    for kernel in kernels or [library.kernel_name()]:
        for dtype in values:
            yield onnx_runtime.ours(layer, dtype, threads, kernel)
            if dtype in ("int8", "int4"):
                yield onnx_runtime.ours(layer, dtype, threads, kernel, activation_bits=8)
    if not others:
        return
    yield onnx_runtime.dynamic_int8(layer, threads)
    for bits, block in ((8, 128), (4, 32), (4, 128)):
        yield onnx_runtime.n_bits(layer, threads, bits, block)
    yield peers.torch_dense(layer, threads, "f32")
    yield peers.torch_dense(layer, threads, "bf16")
    yield peers.torch_csr(layer, threads)
    classes = ("f32", "bf16", "int8", "int4")
    if importlib.util.find_spec("openvino") is None:
        note("OpenVINO is left out: it is not installed (pip install openvino)")
    else:
        yield from map(partial(peers.openvino, layer, threads), classes)
    if importlib.util.find_spec("ggml") is None:
        note("ggml is left out: it is not installed (scripts/cpu_bench/ggml_cpu.py says how)")
    else:
        yield from map(partial(ggml_cpu.ggml_dense, layer, threads), classes)


def _measure(layer: Layer, contenders: Sequence[Contender], m: int, threads: int, rounds: int) -> list[Record]:
    x = np.random.default_rng(1).standard_normal((m, layer.shape.k), dtype=np.float32)
    exact = x.astype(np.float64) @ layer.W.T.astype(np.float64)
    runners = [contender.prepare(x) for contender in contenders]
    times = turns([runner.run for runner in runners], rounds, threads)
    records = []
    for i, (contender, runner) in enumerate(zip(contenders, runners, strict=True)):
        error = float(np.linalg.norm(runner.result() - exact) / np.linalg.norm(exact))
        records.append(
            Record(
                contender.engine,
                contender.values,
                contender.how,
                **{name: getattr(layer.shape, name) for name in ("n", "k", "r")},
                m=m,
                threads=threads,
                bytes=contender.bytes,
                milliseconds=times.median(i) / contender.copies * 1e3,
                ratio=times.ratio(i) * contender.copies / contenders[0].copies,
                share_of_bandwidth=times.share_of_bandwidth(i, contender.bytes * contender.copies),
                bandwidth=float(np.median(times.bandwidth)),
                error=None if "CSR" in contender.how else error,
            )
        )
    return records
