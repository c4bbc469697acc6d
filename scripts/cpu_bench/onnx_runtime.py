"""The layer in ONNX Runtime: ours, and what it has itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime
from onnx import NodeProto, TensorProto, helper

from cpu_bench.contender import Contender, Runner, copies_of
from cpu_bench.layer import Floats, Layer, bf16, grouped
from plugins_ort import library

# Inputs of one node after X: name → (array, its ONNX type).
Weights = Mapping[str, tuple[np.ndarray, int]]
_FLOAT = TensorProto.FLOAT


def ours(layer: Layer, values: str, threads: int, kernel: str, activation_bits: int = 16) -> Contender:
    """Our op. `values` is f32, bf16, int8 or int4; `kernel` an instruction set; `activation_bits` is for integers."""
    stored: Callable[[Floats], Any] = (lambda array: array) if values == "f32" else bf16
    factor = _FLOAT if values == "f32" else TensorProto.BFLOAT16
    S: tuple[np.ndarray, int] = (stored(layer.S), factor)
    scales: Weights = {}
    if values in ("int8", "int4"):
        rounded, steps = layer.integers(int(values.removeprefix("int")))
        S = (rounded, TensorProto.INT8 if values == "int8" else TensorProto.UINT8)
        scales = {"scales": (steps, TensorProto.FLOAT16)}
    weights = {
        "bitmap": (layer.bitmap, TensorProto.INT32),
        "values": S,
        "U": (stored(layer.U), factor),
        "V": (stored(layer.V), factor),
        "bias": (np.zeros(layer.shape.n, np.float32), _FLOAT),
        **scales,
    }
    attributes = {"domain": "sslc", "version": 1, "layout": "rows64"}
    how = kernel
    if activation_bits == 8:
        attributes["activation_bits"], how = 8, f"{kernel}, 8-bit activations"
    with _environment("SSLC_KERNEL", kernel):
        return _contender("sslc", values, how, layer, weights, threads, "LowRankSparseLinear", **attributes)


def dense(layer: Layer, threads: int) -> Contender:
    """MatMul in float32: what everything is compared with."""
    weights = {"W": (np.ascontiguousarray(layer.W.T), _FLOAT)}
    return _contender("onnxruntime", "f32", "MatMul", layer, weights, threads, "MatMul")


def dynamic_int8(layer: Layer, threads: int) -> Contender:
    """Weights and activations in 8 bits, one scale per output and per call."""
    scales = (np.abs(layer.W).max(axis=1) / 127).astype(np.float32)
    W = np.rint(layer.W / scales[:, None]).astype(np.int8)
    weights = {"W": (np.ascontiguousarray(W.T), TensorProto.INT8), "scales": (scales, _FLOAT)}
    op = "DynamicQuantizeMatMul"
    return _contender("onnxruntime", "int8", op, layer, weights, threads, op, domain="com.microsoft")


def n_bits(layer: Layer, threads: int, bits: int, block: int) -> Contender:
    """MatMulNBits with accuracy_level 4: activations in 8 bits, a scale per block of weights."""
    W, scales = grouped(layer.W, bits, block)
    codes = (W.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    weights = {"W": (codes, TensorProto.UINT8), "scales": (scales.reshape(-1), _FLOAT)}
    attributes = {"K": layer.shape.k, "N": layer.shape.n, "bits": bits, "block_size": block, "accuracy_level": 4}
    how = f"MatMulNBits, blocks of {block}"
    return _contender(
        "onnxruntime", f"int{bits}", how, layer, weights, threads, "MatMulNBits", domain="com.microsoft", **attributes
    )


def _contender(
    engine: str, values: str, how: str, layer: Layer, weights: Weights, threads: int, op: str, **attributes: Any
) -> Contender:
    size = sum(array.nbytes for array, _ in weights.values())
    copies, shape = copies_of(size), layer.shape
    nodes, tensors = [], []
    for i in range(copies):
        for name, (array, kind) in weights.items():
            # Other weights in each copy: ONNX Runtime shares equal ones.
            rolled = (
                np.roll(array, i, axis=1) if name == "W" and array.shape[0] == shape.k else np.roll(array, i, axis=0)
            )
            tensors.append(helper.make_tensor(f"{name}{i}", kind, array.shape, rolled.tobytes(), raw=True))
        nodes.append(helper.make_node(op, ["X", *(f"{name}{i}" for name in weights)], [f"Y{i}"], **attributes))
    session = _open(_model(nodes, tensors, shape.n, shape.k), threads, ours=engine == "sslc")

    def prepare(x: Floats) -> Runner:
        outputs = [np.zeros((len(x), shape.n), np.float32) for _ in range(copies)]
        binding = session.io_binding()
        binding.bind_ortvalue_input("X", onnxruntime.OrtValue.ortvalue_from_numpy(x))
        values_out = [onnxruntime.OrtValue.ortvalue_from_numpy(y) for y in outputs]
        for i, y in enumerate(values_out):
            binding.bind_ortvalue_output(f"Y{i}", y)
        return Runner(lambda: session.run_with_iobinding(binding), lambda: values_out[0].numpy())

    return Contender(engine, values, how, size, copies, prepare)


def _model(nodes: Sequence[NodeProto], weights: Sequence[TensorProto], n: int, k: int) -> bytes:
    x = helper.make_tensor_value_info("X", _FLOAT, ["tokens", k])
    outputs = [helper.make_tensor_value_info(node.output[0], _FLOAT, ["tokens", n]) for node in nodes]
    graph = helper.make_graph(nodes, "layers", [x], outputs, weights)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 23), ("sslc", 1), ("com.microsoft", 1))]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())


def _open(model: bytes, threads: int, ours: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Otherwise the threads of the session that just ran spin while the other one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    if ours:
        options.register_custom_ops_library(str(library.library_path()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
