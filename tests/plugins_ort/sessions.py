"""ONNX models of one op, and sessions on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from plugins_ort.library import library_path

from .layers import RandomLayer

WEIGHTS = ("bitmap", "values", "U", "V", "bias")
ATTRIBUTES: Mapping[str, object] = {"version": 1, "layout": "rows64"}
_ELEMENTS = {
    "int32": TensorProto.INT32,
    "float32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "float16": TensorProto.FLOAT16,
    "uint16": TensorProto.BFLOAT16,
}


def model_of(
    layer: RandomLayer,
    *,
    attributes: Mapping[str, object] = ATTRIBUTES,
    replaced: Mapping[str, np.ndarray] | None = None,
    fed: Sequence[str] = (),
) -> onnx.ModelProto:
    """One node on X [batch, tokens, K]; weights named in `fed` are inputs of the graph instead of initializers."""
    stored = {**layer.stored, **(replaced or {})}
    tensors = {
        name: helper.make_tensor(name, _ELEMENTS[array.dtype.name], array.shape, array.tobytes(), raw=True)
        for name, array in stored.items()
    }
    weights = [*WEIGHTS, "scales"] if "scales" in tensors else WEIGHTS
    N = len(layer.S)
    inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", "tokens", None])]
    inputs += [helper.make_tensor_value_info(name, tensors[name].data_type, tensors[name].dims) for name in fed]
    graph = helper.make_graph(
        [helper.make_node("LowRankSparseLinear", ["X", *weights], ["Y"], "layer.7", domain="sslc", **attributes)],
        "one_layer",
        inputs,
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["batch", "tokens", N])],
        [tensor for name, tensor in tensors.items() if name not in fed],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sslc", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def open_session(model: onnx.ModelProto | Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session with the op library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are asserted, not printed
    options.register_custom_ops_library(str(library_path()))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
