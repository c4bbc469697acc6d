"""What this machine can do at best, measured in about two seconds: read memory, and multiply dense float32 matrices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plugins_ort import library

_AREA_BYTES = 256 << 20  # beyond any cache
_SIZE, _TOKENS = 2048, 512
_SECONDS = 0.5  # for each of the two


@dataclass(frozen=True)
class Machine:
    """A machine as `sslc_export.prediction` sees it.

    Attributes:
        bandwidth: Bytes per second that a loop reads that only reads.
        peak: Operations per second of ONNX Runtime's dense float32 MatMul with 512 tokens.
        threads: With how many threads both were measured.
        kernel: The instruction set that our kernel uses, one of `plugins_ort.library.KERNELS`.
    """

    bandwidth: float
    peak: float
    threads: int
    kernel: str


def measure_machine(threads: int | None = None) -> Machine:
    """Measures this machine.

    Args:
        threads: None for one per physical core that this process may use.

    Raises:
        MissingError: The native library is not here.
    """
    from sslc_export.engines.onnxruntime import usable_cores

    threads = threads or usable_cores()
    kernel = library.kernel_name()
    area = np.ones(_AREA_BYTES // 8, np.int64)
    bandwidth = area.nbytes / _best(lambda: library.read_memory(area.ctypes.data, area.nbytes, threads))
    return Machine(bandwidth, 2 * _TOKENS * _SIZE**2 / _best(_product(threads)), threads, kernel)


def _best(run: Callable[[], object]) -> float:
    """Shortest time of a run, in seconds."""
    run()
    best, began = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) - began < _SECONDS:
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _product(threads: int) -> Callable[[], object]:
    """A MatMul in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    W = np.random.default_rng(0).standard_normal((_SIZE, _SIZE), dtype=np.float32)
    X, Y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [_TOKENS, _SIZE]) for name in ("X", "Y"))
    node = helper.make_node("MatMul", ["X", "W"], ["Y"])
    graph = helper.make_graph([node], "product", [X], [Y], [numpy_helper.from_array(W, "W")])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"X": np.ones((_TOKENS, _SIZE), np.float32)}
    return lambda: session.run(None, feeds)
