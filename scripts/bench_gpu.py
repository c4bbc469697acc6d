"""The GPU kernels against cuBLAS, layer by layer of a transformer block, in one run.

    python scripts/bench_gpu.py --json build/gpu.json            LLaMA-2-7B's block, 1 to 2048 tokens
    python scripts/bench_gpu.py --quick

Ours: S + U·V packed for each layout, run by the plugin's own code (launch.h). Dense: torch's half-precision product
(cuBLAS), q, k and v as one matrix, gate and up as one. 2:4: torch's semi-structured matrix (cuSPARSELt), if it has one.
Weights are random; our results are compared with float64 before they are timed. Each engine is a CUDA graph over
several copies of the weights, together four times the L2 cache; the graphs take turns, and medians are reported.
`share` is the bytes that a layer must read, over its time, over the bandwidth with which this GPU read memory then.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from predict_gpu import SEARCH_PATH

from plugins_trt.pack import LAYOUTS, MOST_STACKED, TYPES, PackedLayer, pack_layer, stack

SOURCE = Path(__file__).with_name("gpu_bench") / "run_layer.cu"
# Layers of LLaMA-2-7B's block that read the same input: name, outputs of each, inputs.
BLOCK = {
    "q k v": ((4096, 4096, 4096), 4096),
    "o": ((4096,), 4096),
    "gate up": ((11008, 11008), 4096),
    "down": ((4096,), 11008),
}
ROUNDS, SECONDS = 7, 0.01
Run = Callable[[int], Any]  # of the number of a copy of the weights


@dataclass(frozen=True)
class Form:
    """How the layers are compressed: layout, type of values, share of entries kept, rank."""

    layout: str
    values: str
    density: float
    rank: int

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.layout} {self.values}, {100 * self.density:.1f} % + rank {self.rank}"


# Half of a 4096 x 4096 matrix's parameters is 43.75 % of its entries and rank 128.
FORMS = (
    Form("any", "f16", 0.4375, 128),
    Form("any", "f16", 0.5, 0),
    Form("bank32", "f16", 0.5, 0),
    Form("fixed8", "f16", 0.5, 0),
    Form("any", "int8", 0.4375, 128),
    Form("any", "int8", 0.5, 0),
    Form("fixed8", "int8", 0.5, 0),
)


@dataclass(frozen=True)
class Record:
    """One measurement: `ratio` is dense time over this one's; microseconds are medians."""

    engine: str
    layer: str
    form: str
    m: int
    microseconds: float
    dense_microseconds: float
    ratio: float
    share_of_bandwidth: float
    error: float


def weights(name: str, form: Form) -> tuple[PackedLayer, list[np.ndarray]]:
    """The packed layers, and S + U·V of each in float32 as the kernel sees it."""
    outs, K = BLOCK[name]
    rng = np.random.default_rng(sum(outs) + K)
    packed, dense = [], []
    for N in outs:
        if form.layout == "any":
            mask = rng.random((N, K), np.float32) < form.density
        else:
            of = 64 if form.layout == "bank32" else 16
            score = rng.random((N, K // of, of), np.float32)
            mask = (np.argsort(np.argsort(score, -1), -1) < round(form.density * of)).reshape(N, K)
        values = (0.05 * rng.standard_normal(int(mask.sum()), np.float32)).astype(np.float16)
        scales, S = None, np.zeros((N, K), np.float32)
        if form.values == "int8":
            scales = np.full((N, -(-K // 64)), 0.001, np.float16)
            values = np.clip(np.round(values.astype(np.float32) * 1000), -127, 127).astype(np.int8)
            S[mask] = values * np.float32(scales[0, 0])
        else:
            S[mask] = values
        U = (0.05 * rng.standard_normal((N, form.rank), np.float32)).astype(np.float16).astype(np.float32)
        V = (0.05 * rng.standard_normal((form.rank, K), np.float32)).astype(np.float16).astype(np.float32)
        bits = np.packbits(mask, axis=1, bitorder="little").view("<i4")
        bias = np.zeros(N, np.float32)
        kind = form.layout
        packed.append(pack_layer(bits, values, U, V, bias, in_features=K, type="f16", layout=kind, scales=scales))
        dense.append(S + U @ V)
    return stack(packed), dense


class Kernels:
    """The library of run_layer.cu on PyTorch's memory and current stream."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.layer_workspace.restype = ctypes.c_size_t
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self.shared = self.library.shared_bytes_of(0)
        self.early = torch.cuda.get_device_capability()[0] >= 9

    def layer(self, packed: PackedLayer, x: torch.Tensor, copies: int) -> Run:
        """Multiplies x [M, K] with a copy of the weights; the next call overwrites its result [ΣN·M]."""
        M = len(x)
        pad = [0] * (MOST_STACKED - len(packed.out_features))
        fields = [len(packed.out_features), packed.in_features, *packed.out_features, *pad, *packed.rank, *pad]
        fields += [LAYOUTS.index(packed.layout), TYPES.index(packed.type), packed.int8, packed.slot]
        header = (ctypes.c_int32 * len(fields))(*fields)
        S, U, V, bias = (torch.from_numpy(a).cuda() for a in (packed.S, packed.U, packed.V, packed.bias))
        sets = [(S.clone(), U.clone(), V.clone(), bias) for _ in range(copies)]
        workspace = torch.empty(max(self.library.layer_workspace(header, M), 16), dtype=torch.uint8, device="cuda")
        y = torch.full((M * sum(packed.out_features),), torch.nan, dtype=torch.float16, device="cuda")

        def run(copy: int) -> torch.Tensor:
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, *sets[copy], y, workspace)]
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            error = self.library.layer_run(header, *pointers, M, self.multiprocessors, self.shared, self.early, stream)
            if error:
                raise RuntimeError(f"CUDA error {error} at {fields}, M = {M}")
            return y

        return run

    def bandwidth(self) -> float:
        """Bytes per second with which this GPU reads 2 GiB."""
        memory, sink = torch.ones(2**29, dtype=torch.int32, device="cuda"), torch.zeros(4, device="cuda")
        blocks = 8 * self.multiprocessors

        def read(_: int) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            at, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)
            self.library.read_memory(at, size, ctypes.c_void_p(sink.data_ptr()), blocks, stream)

        return memory.nbytes / time({"read": (read, 1)})["read"]


def time(engines: dict[str, tuple[Run, int]]) -> dict[str, float]:
    """Median seconds of one call of each engine, given with how many copies there are."""
    graphs = {}
    for name, (run, copies) in engines.items():
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(copies):
                run(copy)
        graphs[name] = graph
    replays: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(ROUNDS + 1):
        for name, graph in graphs.items():
            count = replays.get(name, 3)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                graph.replay()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000 / count
            if number == 0:
                replays[name] = max(1, round(SECONDS / seconds))
            else:
                times[name].append(seconds / engines[name][1])
    return {name: statistics.median(values) for name, values in times.items()}


def semi_structured(W: torch.Tensor, copies: int) -> list[Any] | None:
    """2:4 of W, or None if this torch cannot."""
    try:
        from torch.sparse import to_sparse_semi_structured

        groups = W.view(-1, 4)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
        return [to_sparse_semi_structured((groups * mask).view_as(W)) for _ in range(copies)]
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        print(f"2:4: not here: {str(error).splitlines()[0][:100]}", flush=True)
        return None


def dense(x: torch.Tensor, W: list[torch.Tensor], out: torch.Tensor, copy: int) -> None:
    """X·Wᵀ by cuBLAS."""
    torch.mm(x, W[copy].t(), out=out)


def linear(x: torch.Tensor, W: list[torch.Tensor], copy: int) -> torch.Tensor:
    """X·Wᵀ by whatever torch has for this kind of W."""
    return torch.nn.functional.linear(x, W[copy])


def measure(kernels: Kernels, packed: dict[tuple[str, Form], Any], tokens: list[int]) -> list[Record]:
    """Records of every layer, form and number of tokens."""
    bandwidth, l2, records = kernels.bandwidth(), torch.cuda.get_device_properties(0).L2_cache_size, list[Record]()
    forms = list(dict.fromkeys(form for _, form in packed))
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e9:.0f} GB/s, L2 {l2 >> 20} MiB", flush=True)
    for name, (outs, K) in BLOCK.items():
        N = sum(outs)
        copies = -(-4 * l2 // (N * K)) + 1
        W = [0.02 * torch.randn(N, K, dtype=torch.float16, device="cuda") for _ in range(copies)]
        halves = semi_structured(W[0], copies)
        for M in tokens:
            x = torch.randn(M, K, dtype=torch.float16, device="cuda")
            out = torch.empty(M, N, dtype=torch.float16, device="cuda")

            engines: dict[str, tuple[Run, int]] = {"dense": (partial(dense, x, W, out), copies)}
            if halves:
                padded = torch.zeros(max(16, -(-M // 8) * 8), K, dtype=torch.float16, device="cuda")
                engines["2:4"] = (partial(linear, padded, halves), copies)
            sizes, errors = {"dense": N * K * 2, "2:4": N * K * 9 // 8}, {"dense": 0.0, "2:4": 0.0}
            for form in forms:
                layers, matrices = packed[name, form]
                run = kernels.layer(layers, x, copies)
                y, at, worst = run(0).double(), 0, 0.0
                for matrix in matrices:
                    expected = x.double() @ torch.from_numpy(matrix).cuda().double().t()
                    found = y[at : at + expected.numel()].view_as(expected)
                    worst = max(worst, float((found - expected).norm() / expected.norm()))
                    at += expected.numel()
                if not worst < 2e-3:
                    raise RuntimeError(f"{form.name}, {name}, M = {M}: wrong by {worst}")
                engines[form.name] = (run, copies)
                sizes[form.name], errors[form.name] = layers.nbytes, worst
            seconds = time(engines)
            for engine, taken in seconds.items():
                kind, share = engine if engine in ("dense", "2:4") else "sslc", sizes[engine] / taken / bandwidth
                times = 1e6 * taken, 1e6 * seconds["dense"], seconds["dense"] / taken
                records.append(Record(kind, name, engine, M, *times, share, errors[engine]))
                line = (
                    f"{name:8} M={M:<5}{engine:30}{times[0]:9.2f} us{times[2]:7.2f}x{100 * share:6.0f} % of bandwidth"
                )
                print(line, flush=True)
            del engines
        W.clear()
        torch.cuda.empty_cache()
    return records


def block_table(records: list[Record]) -> str:
    """Ratio to dense of the whole block, by form and tokens."""
    tokens, forms = sorted({r.m for r in records}), list(dict.fromkeys(r.form for r in records))
    lines = [f"{'block, ratio to dense':36}" + "".join(f"{'M=' + str(m):>8}" for m in tokens)]
    for form in forms:
        cells = []
        for m in tokens:
            chosen = [r for r in records if r.form == form and r.m == m]
            cells.append(sum(r.dense_microseconds for r in chosen) / sum(r.microseconds for r in chosen))
        lines.append(f"{form:36}" + "".join(f"{c:8.2f}" for c in cells))
    return "\n".join(lines)


def build() -> Path:
    """Compiles run_layer.cu for this machine's GPU."""
    compiler = shutil.which("nvcc", path=SEARCH_PATH)
    if compiler is None:
        raise SystemExit("nvcc was not found: `make plugin` fetches it")
    path = Path(tempfile.mkdtemp()) / "librun_layer.so"
    flags = ["-std=c++17", "-arch=native", "-shared", "-Xcompiler=-fPIC"]
    subprocess.run([compiler, *flags, SOURCE, "-o", path], check=True)
    return path


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="librun_layer.so, built before; else it is built now")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--forms", type=int, nargs="+", default=list(range(len(FORMS))), help="numbers, from 0")
    parser.add_argument("--quick", action="store_true", help="two forms, four numbers of tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no GPU; an NVIDIA GPU of compute capability 8.0 or later is needed. "
            "Install its driver and a CUDA build of torch"
        )
    forms = [FORMS[i] for i in ([0, 2] if arguments.quick else arguments.forms)]
    tokens = [1, 16, 64, 512] if arguments.quick else arguments.tokens
    library = arguments.library or build()
    pairs = [(name, form) for name in BLOCK for form in forms]
    with ProcessPoolExecutor() as pool:
        packed = dict(zip(pairs, pool.map(weights, *zip(*pairs, strict=True)), strict=True))
    records = measure(Kernels(library), packed, tokens)
    print(block_table(records))
    if arguments.json:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        report = {"machine": machine, "records": [asdict(record) for record in records]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
