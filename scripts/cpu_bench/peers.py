"""The layer in other libraries: PyTorch, and OpenVINO if it is installed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from cpu_bench.contender import Contender, Runner, copies_of
from cpu_bench.layer import Floats, Layer, grouped

_OPENVINO_GROUP = 128


def torch_dense(layer: Layer, threads: int, values: str) -> Contender:
    """nn.functional.linear in float32, or in bfloat16 with bfloat16 activations."""
    import torch

    dtype = torch.float32 if values == "f32" else torch.bfloat16
    size = layer.W.size * dtype.itemsize
    weights = [torch.from_numpy(np.roll(layer.W, i, axis=0)).to(dtype) for i in range(copies_of(size))]
    how = "linear" if values == "f32" else "linear, bf16 activations"
    return _torch(values, how, weights, size, threads, lambda x, W: torch.nn.functional.linear(x.to(dtype), W))


def torch_csr(layer: Layer, threads: int) -> Contender:
    """S alone as a CSR matrix with 64-bit columns, what PyTorch has for unstructured sparsity; U·V is left out."""
    import torch

    S, size = layer.sparse, layer.S.size * (4 + 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "CSR support is in beta state"
        weights = [torch.from_numpy(np.roll(S, i, axis=0)).to_sparse_csr() for i in range(copies_of(size))]
    return _torch("f32", "CSR, without U·V", weights, size, threads, lambda x, W: (W @ x.T).T)


def _torch(values: str, how: str, weights: list[Any], size: int, threads: int, product: Any) -> Contender:
    import torch

    def prepare(x: Floats) -> Runner:
        X, last = torch.from_numpy(x), {}

        def run() -> None:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                for i, W in enumerate(weights):
                    Y = product(X, W)
                    if i == 0:
                        last["Y"] = Y

        return Runner(run, lambda: last["Y"].float().numpy())

    return Contender("torch", values, how, size, len(weights), prepare)


def openvino(layer: Layer, threads: int, values: str) -> Contender:
    """MatMul with f32 weights computed in f32 or bf16, or with int8 or int4 weights in groups of 128, as for LLMs."""
    import openvino as ov
    from openvino import opset13 as op

    n, k = layer.shape.n, layer.shape.k
    floats = values in ("f32", "bf16")
    bits = 32 if floats else int(values.removeprefix("int"))
    size = n * k * bits // 8 + (0 if floats else 2 * n * k // _OPENVINO_GROUP)
    copies = copies_of(size)
    W, scales = (layer.W, None) if floats else grouped(layer.W, bits, _OPENVINO_GROUP)

    def weight(i: int) -> Any:
        if scales is None:
            return op.constant(np.roll(W, i, axis=0))
        constant = op.constant(np.roll(W, i, axis=0), dtype=ov.Type.i4 if bits == 4 else ov.Type.i8)
        steps = op.constant(np.roll(scales, i, axis=0).astype(np.float16))
        wide = op.multiply(op.convert(constant, "f16"), steps)
        return op.convert(op.reshape(wide, op.constant(np.array([n, k])), False), "f32")

    def prepare(x: Floats) -> Runner:
        # Compiled for each number of tokens: OpenVINO is at its best with shapes that it knows.
        X = op.parameter(list(x.shape), np.float32, name="X")
        results = [op.result(op.matmul(X, weight(i), False, True)) for i in range(copies)]
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if values == "bf16" else "f32",
            "ENABLE_CPU_PINNING": False,
        }
        request = ov.Core().compile_model(ov.Model(results, [X], "layers"), "CPU", config).create_infer_request()
        request.set_input_tensor(ov.Tensor(x.copy()))
        return Runner(request.infer, lambda: np.array(request.get_output_tensor(0).data))

    how = {"f32": "MatMul", "bf16": "MatMul in bf16"}.get(values, f"groups of {_OPENVINO_GROUP}")
    return Contender("openvino", values, how, size if values != "bf16" else 2 * n * k, copies, prepare)
