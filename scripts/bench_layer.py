#!/usr/bin/env python3
"""Times one compressed layer against ONNX Runtime's dense float32 MatMul: real sessions, interleaved in one run.

    python scripts/bench_layer.py                         4096 x 4096, 50 % of the parameters, r = 128, one thread
    python scripts/bench_layer.py --m 1 16 128 --threads 2 --values f32 bf16 --kernels avx512 avx2 --json out.json

How it measures: each session holds several copies of its layer with different weights (the runtime shares equal ones),
together larger than any cache, and one timed run goes through all of them; the engines take turns in random order, so
that a slow moment hits both; the ratio is the median over the turns of dense time / our time. With one thread, the time
is the CPU time of that thread, so that waiting for other processes does not count; with more it is wall time. The dense
layer has no bias, ours has. Read bandwidth is measured among the turns by a loop that only reads; the best pass counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plugins_ort import library  # the line above makes it importable without installation

ROTATED_BYTES = 160e6  # weights of one run, beyond the caches
BANDWIDTH_BYTES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """A layer: [N, K] with rank r, of which `budget` (nnz + r (N + K), over N K) is kept."""

    n: int
    k: int
    r: int
    budget: float

    @property
    def density(self) -> float:
        """Share of S that is stored."""
        return self.budget - self.r * (self.n + self.k) / (self.n * self.k)

    def stored_bytes(self, values: str) -> int:
        """Bytes read per pass: values, bitmap, scales, U, V and bias."""
        words = -(-self.k // 64)
        size, factor_size, scale_size = {"f32": (4, 4, 0), "bf16": (2, 2, 0), "int8": (1, 2, 2)}[values]
        stored = round(self.density * self.n * self.k) * size + self.r * (self.n + self.k) * factor_size
        return stored + self.n * words * (8 + scale_size) + self.n * 4


@dataclass(frozen=True)
class Engine:
    """A session with `copies` layers, and how many bytes each reads."""

    engine: str
    values: str
    kernel: str
    bytes: int
    copies: int
    binding: onnxruntime.IOBinding
    session: onnxruntime.InferenceSession

    def seconds(self, clock: Callable[[], float]) -> float:
        """Time of one layer."""
        start = clock()
        self.session.run_with_iobinding(self.binding)
        return (clock() - start) / self.copies


@dataclass(frozen=True)
class Record:
    """One row of the result."""

    engine: str
    values: str
    kernel: str
    n: int
    k: int
    r: int
    m: int
    threads: int
    bytes: int
    median_ms: float
    min_ms: float
    ratio: float
    gflops: float
    share_of_bandwidth: float


def tensor(name: str, array: np.ndarray, element: int) -> TensorProto:
    """An initializer with the bytes of `array`."""
    return helper.make_tensor(name, element, array.shape, np.ascontiguousarray(array).tobytes(), raw=True)


def model_of(nodes: Sequence[NodeProto], weights: Sequence[TensorProto], shape: Shape) -> bytes:
    """A graph that runs all nodes on one X [tokens, K]."""
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["tokens", shape.k])
    outputs = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, ["tokens", shape.n]) for n in nodes]
    graph = helper.make_graph(nodes, "layers", [x], outputs, weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sslc", 1)]
    model: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return bytes(model.SerializeToString())


def dense_model(shape: Shape, copies: int) -> bytes:
    """MatMuls with different weights."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(copies):
        W = rng.standard_normal((shape.k, shape.n), dtype=np.float32)
        weights.append(tensor(f"W{i}", W, TensorProto.FLOAT))
        nodes.append(helper.make_node("MatMul", ["X", f"W{i}"], [f"Y{i}"]))
    return model_of(nodes, weights, shape)


def sparse_model(shape: Shape, values: str, copies: int) -> bytes:
    """Ours, with different weights: `values` is f32, bf16 or int8."""
    element = {"f32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16, "int8": TensorProto.INT8}[values]
    factor = TensorProto.FLOAT if values == "f32" else TensorProto.BFLOAT16
    rng = np.random.default_rng(0)

    def stored(array: np.ndarray) -> np.ndarray:
        return array if values == "f32" else (array.view(np.uint32) >> 16).astype(np.uint16)

    nodes, weights = [], []
    for i in range(copies):
        kept = np.zeros((shape.n, -(-shape.k // 64) * 64), dtype=bool)
        kept[:, : shape.k] = rng.random((shape.n, shape.k), dtype=np.float32) < shape.density
        S = rng.standard_normal(int(kept.sum()), dtype=np.float32)
        layer = {
            "bitmap": (np.packbits(kept, axis=1, bitorder="little").view(np.int32), TensorProto.INT32),
            "values": ((S * 30).clip(-127, 127).astype(np.int8) if values == "int8" else stored(S), element),
            "U": (stored(rng.standard_normal((shape.n, shape.r), dtype=np.float32)), factor),
            "V": (stored(rng.standard_normal((shape.r, shape.k), dtype=np.float32)), factor),
            "bias": (rng.standard_normal(shape.n, dtype=np.float32), TensorProto.FLOAT),
        }
        if values == "int8":
            scales = rng.uniform(0.02, 0.05, (shape.n, -(-shape.k // 64))).astype(np.float16)
            layer["scales"] = (scales, TensorProto.FLOAT16)
        weights += [tensor(f"{name}{i}", array, kind) for name, (array, kind) in layer.items()]
        inputs = ["X", *(f"{name}{i}" for name in layer)]
        nodes.append(
            helper.make_node("LowRankSparseLinear", inputs, [f"Y{i}"], domain="sslc", version=1, layout="rows64")
        )
    return model_of(nodes, weights, shape)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def open_session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session with our op library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Otherwise the threads of the session that just ran spin while the other one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(library.library_path()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def bound(session: onnxruntime.InferenceSession, shape: Shape, m: int) -> onnxruntime.IOBinding:
    """Input and outputs that stay where they are, so that a run allocates nothing."""
    binding = session.io_binding()
    x = np.random.default_rng(1).standard_normal((m, shape.k), dtype=np.float32)
    binding.bind_ortvalue_input("X", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    for output in session.get_outputs():
        y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((m, shape.n), np.float32))
        binding.bind_ortvalue_output(output.name, y)
    return binding


def engines(shape: Shape, values: Sequence[str], kernels: Sequence[str], threads: int) -> list[Engine]:
    """The dense engine first. Bindings are made per number of tokens."""
    made = []
    size = 4 * shape.n * shape.k
    copies = max(2, round(ROTATED_BYTES / size + 0.5))
    session = open_session(dense_model(shape, copies), threads)
    made.append(Engine("ort", "f32", "dense", size, copies, session.io_binding(), session))
    for dtype in values:
        size = shape.stored_bytes(dtype)
        copies = max(2, round(ROTATED_BYTES / size + 0.5))
        model = sparse_model(shape, dtype, copies)
        for kernel in kernels:
            with environment("SSLC_KERNEL", kernel):
                session = open_session(model, threads)
            made.append(Engine("sslc", dtype, kernel, size, copies, session.io_binding(), session))
    return made


def measure(
    shape: Shape, found: Sequence[Engine], m: int, threads: int, repeats: int, area: np.ndarray
) -> list[Record]:
    """Times all engines in turns, with the read bandwidth among them."""
    ready = [Engine(**{**vars(e), "binding": bound(e.session, shape, m)}) for e in found]
    clock = time.thread_time if threads == 1 else time.perf_counter
    for engine in ready:
        engine.seconds(clock)
    times = np.empty((repeats, len(ready)))
    bandwidth = 0.0
    order = np.random.default_rng(0)
    for turn in range(repeats):
        # In random order: whoever comes after another finds the caches as that one left them.
        for i in order.permutation(len(ready) + 1):
            if i < len(ready):
                times[turn, i] = ready[i].seconds(clock)
                continue
            start = clock()
            library.read_memory(area.ctypes.data, area.nbytes, threads)
            bandwidth = max(bandwidth, area.nbytes / (clock() - start))
    return [
        Record(
            **{key: getattr(engine, key) for key in ("engine", "values", "kernel", "bytes")},
            **{key: getattr(shape, key) for key in ("n", "k", "r")},
            m=m,
            threads=threads,
            median_ms=float(np.median(times[:, i]) * 1e3),
            min_ms=float(times[:, i].min() * 1e3),
            ratio=float(np.median(times[:, 0] / times[:, i])),
            gflops=float(2 * m * shape.n * shape.k / np.median(times[:, i]) / 1e9),
            share_of_bandwidth=float(engine.bytes / np.median(times[:, i]) / bandwidth),
        )
        for i, engine in enumerate(ready)
    ]


def processor() -> str:
    """Family and model as well as the name: clouds sell different processors under one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{fields.get('model name')}, family {fields.get('cpu family')} model {fields.get('model')}"


def report(records: Sequence[Record]) -> None:
    """Prints one line per engine; the first is the dense one."""
    dense = records[0]
    for row in records:
        bound_text = "" if row.engine == "ort" else f"byte bound {dense.bytes / row.bytes:.2f}"
        print(
            f"M {row.m:4d}  {row.engine:4} {row.values:4} {row.kernel:8}  median {row.median_ms:8.3f} ms  "
            f"min {row.min_ms:8.3f} ms  {row.ratio:5.2f} x dense  {row.gflops:6.1f} GFLOP/s  "
            f"{row.share_of_bandwidth:4.0%} of bandwidth  {bound_text}",
            flush=True,
        )


def main() -> None:
    """Reads the command line, measures and prints; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="outputs")
    parser.add_argument("--k", type=int, default=4096, help="inputs")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--budget", type=float, default=0.5, help="parameters kept: (nnz + r (N + K)) / (N K)")
    parser.add_argument("--m", type=int, nargs="+", default=[1], help="tokens")
    parser.add_argument("--values", nargs="+", choices=["f32", "bf16", "int8"], default=["f32", "bf16"])
    parser.add_argument("--kernels", nargs="+", default=[library.kernel_name()], help="avx512 avx2 portable")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30, help="turns")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    shape = Shape(arguments.n, arguments.k, arguments.rank, arguments.budget)
    if not 0 <= shape.density <= 1:
        parser.error(f"rank {shape.r} alone needs more than a budget of {shape.budget} of {shape.n} x {shape.k}")

    print(f"{processor()}; {os.cpu_count()} cores, {arguments.threads} used; onnxruntime {onnxruntime.__version__}")
    print(
        f"N {shape.n}, K {shape.k}, r {shape.r}, {shape.density:.2%} of S stored; {arguments.repeats} turns", flush=True
    )
    area = np.ones(BANDWIDTH_BYTES // 8, np.int64)
    found = engines(shape, arguments.values, arguments.kernels, arguments.threads)
    records: list[Record] = []
    for m in arguments.m:
        rows = measure(shape, found, m, arguments.threads, arguments.repeats, area)
        report(rows)
        records += rows
    bandwidth = records[0].bytes / records[0].median_ms / 1e6 / records[0].share_of_bandwidth
    print(f"read bandwidth {bandwidth:.1f} GB/s with {arguments.threads} thread(s)")
    if arguments.json:
        rows_json = [asdict(record) for record in records]
        about = {"processor": processor(), "onnxruntime": onnxruntime.__version__, "turns": arguments.repeats}
        arguments.json.write_text(json.dumps({"about": about, "rows": rows_json}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
