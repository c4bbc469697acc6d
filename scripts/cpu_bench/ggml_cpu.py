"""The layer in ggml, what llama.cpp runs, if its Python package is installed.

    CXXFLAGS="-fno-tree-dse -fno-dse" pip install ggml-python

GCC 12's header for AMX lets the compiler drop the shapes of the tiles, and ggml so built dies of an illegal instruction
where there is AMX; without these two optimizations it does not (ggml-python 0.0.45, ggml 0.15.3, GCC 12.2).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cpu_bench.contender import Contender, Runner, copies_of
from cpu_bench.layer import Floats, Layer

# It tells of every tensor that it packs.
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


def ggml_dense(layer: Layer, threads: int, values: str) -> Contender:
    """MUL_MAT with weights in F32, BF16, Q8_0 (int8) or Q4_0 (int4), laid out as llama.cpp would choose."""
    import ggml

    ggml.ggml_log_set(_SILENT, None)
    name = {"f32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}[values]
    kind = getattr(ggml, f"GGML_TYPE_{name}")
    n, k = layer.shape.n, layer.shape.k
    size = n * ggml.ggml_row_size(kind, k)
    copies = copies_of(size)
    # A thread of its own: ggml sets the shapes of AMX tiles once per thread, and other engines set theirs.
    thread = ThreadPoolExecutor(1)
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    context = _context(ggml, copies)
    weights = [ggml.ggml_new_tensor_2d(context, kind, k, n) for _ in range(copies)]
    layout, memory = _allocate(ggml, backend, context, weights[0])
    for i, weight in enumerate(weights):
        packed = np.empty(size, np.uint8)
        rows = np.ascontiguousarray(np.roll(layer.W, i, axis=0))
        source = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        ggml.ggml_quantize_chunk(kind, source, packed.ctypes.data, 0, n, k, None)
        ggml.ggml_backend_tensor_set(weight, packed.ctypes.data, 0, size)

    def prepare(x: Floats) -> Runner:
        graph_context = _context(ggml, 2 * copies + 1)
        X = ggml.ggml_new_tensor_2d(graph_context, ggml.GGML_TYPE_F32, k, len(x))
        products = [ggml.ggml_mul_mat(graph_context, weight, X) for weight in weights]
        graph = ggml.ggml_new_graph(graph_context)
        for product in products:
            ggml.ggml_build_forward_expand(graph, product)
        room = ggml.ggml_backend_alloc_ctx_tensors(graph_context, backend)
        ggml.ggml_backend_tensor_set(X, x.ctypes.data, 0, x.nbytes)

        def result() -> Floats:
            Y = np.empty((len(x), n), np.float32)
            ggml.ggml_backend_tensor_get(products[0], Y.ctypes.data, 0, Y.nbytes)
            return Y

        def run() -> None:
            thread.submit(ggml.ggml_backend_graph_compute, backend, graph).result()

        weakref.finalize(run, ggml.ggml_backend_buffer_free, room)
        return Runner(run, result)

    weakref.finalize(prepare, ggml.ggml_backend_buffer_free, memory)
    return Contender("ggml", values, f"{name}, {layout}", size, copies, prepare)


def _context(ggml: Any, tensors: int) -> Any:
    """Room to describe so many tensors and a graph; what they hold is allocated by a backend."""
    room = tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
    return ggml.ggml_init(ggml.ggml_init_params(mem_size=room, mem_buffer=None, no_alloc=True))


def _allocate(ggml: Any, backend: Any, context: Any, weight: Any) -> tuple[str, Any]:
    """Allocates the context's tensors in the first layout that can multiply by `weight`: its name, and the memory.

    As llama.cpp chooses: the processor's own layouts (AMX tiles, interleaved rows) before the plain one.
    """
    device = ggml.ggml_backend_get_device(backend)
    scratch = _context(ggml, 2)
    x = ggml.ggml_new_tensor_2d(scratch, ggml.GGML_TYPE_F32, weight.contents.ne[0], 1)
    product = ggml.ggml_mul_mat(scratch, weight, x)
    for layout in _layouts(ggml, device):
        # The question is asked of a product whose weight says where it lies.
        weight.contents.buffer = ggml.ggml_backend_buft_alloc_buffer(layout, 0)
        fits = ggml.ggml_backend_dev_supports_op(device, product)
        ggml.ggml_backend_buffer_free(weight.contents.buffer)
        weight.contents.buffer = None
        if fits:
            break
    ggml.ggml_free(scratch)
    memory = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, layout)
    return ggml.ggml_backend_buft_name(layout).decode(), memory


def _layouts(ggml: Any, device: Any) -> Iterator[Any]:
    registry = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        extra: Callable[..., Any] = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        yield from _until_null(extra(device))
    yield ggml.ggml_backend_dev_buffer_type(device)


def _until_null(pointers: Any) -> Iterator[int]:
    i = 0
    while pointers[i]:
        yield pointers[i]
        i += 1
