"""Where a plan's bytes are: predicted from the lowered model before anything is packed or built, and counted after."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from plugins_trt import pack
from sslc_export.lowering import names

# Source text of TensorRT-RTX 1.7's kernels: bytes once, and bytes per attention, by whether its output goes straight
# into the plugin (then less is fused). Counted in plans of LLaMA models with 3 to 30 blocks; others differ a little.
_SOURCE_ONCE = 1_150_000
_SOURCE_PER_ATTENTION = {True: 780_000, False: 513_000}


@dataclass(frozen=True)
class PlanSize:
    """Where a plan's bytes are.

    TensorRT-RTX compiles its own kernels on the user's GPU, when the engine is first run. A plan holds their source,
    each time with the same 140 KB of definitions before it, for about five kernels per transformer block (three if the
    model is dense: then more is fused). No option of the builder leaves it out.

    Attributes:
        total: Of the plan, in bytes.
        weights: Packed and dense weights, as they were given to TensorRT.
        plugin: The plugin library inside the plan; 0 if there is none.
        kernel_source: Source text of the kernels that TensorRT generated.
    """

    total: int
    weights: int
    plugin: int
    kernel_source: int

    @property
    def accounted(self) -> int:
        """What the total should be, from its counted parts."""
        return self.weights + self.plugin + self.kernel_source


def predict(graph: ir.Graph, choices: Mapping[str, pack.Choice], *, runtime: str, plugin: int) -> PlanSize:
    """The size of the plan of a lowered graph.

    Args:
        graph: As `sslc_export.lowering` wrote it; no weight is read.
        choices: The layout of each plugin node, with the bytes of its layers' sparse parts.
        runtime: "tensorrt_rtx" or "tensorrt". What mainline TensorRT adds to the weights is not known here and left
            out: machine code of its kernels, some MB.
        plugin: Bytes of the plugin library.
    """
    weights = sum(choice.nbytes for choice in choices.values())
    for node in graph:
        if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE):
            N, rank, K = (*_shape(node, "U"), _shape(node, "V")[1])
            weights += pack.factor_bytes(N, K, rank) + 4 * N
    packed = {id(v) for node in graph if node.domain == names.DOMAIN for v in node.inputs}
    for value in graph.initializers.values():
        if id(value) not in packed and value.const_value is not None:
            size = 2 if value.dtype in (ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16) else 0
            weights += value.const_value.size * size or value.const_value.nbytes
    source = 0
    if runtime == "tensorrt_rtx":
        attention = [node for node in graph if node.op_type == "Attention"]
        source = _SOURCE_ONCE + sum(_SOURCE_PER_ATTENTION[_meets_plugin(node.outputs[0])] for node in attention)
    plugin = plugin if choices else 0
    return PlanSize(weights + plugin + source, weights, plugin, source)


def count(plan: Path, *, weights: int, plugin: int) -> PlanSize:
    """The size of a plan that was built from so many bytes of weights and of the plugin library."""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Weights and machine code have no 256 printable characters in a row.
        source = sum(text.end() - text.start() for text in re.finditer(rb"[\t\n\r -~]{256,}", data))
        return PlanSize(len(data), weights, plugin, source)


def _meets_plugin(value: ir.Value) -> bool:
    """Whether the value goes into one of our nodes, perhaps reshaped on the way."""
    for use in value.uses():
        if use.node.domain == names.DOMAIN:
            return True
        if use.node.op_type in ("Reshape", "Transpose", "Cast") and _meets_plugin(use.node.outputs[0]):
            return True
    return False


def _shape(node: ir.Node, name: str) -> tuple[int, int]:
    value = node.inputs[names.INPUTS.index(name)]
    rows, columns = value.const_value.shape.numpy()  # type: ignore[union-attr]
    return rows, columns
