"""The lowered ONNX model as TensorRT should see it: 16-bit activations, and weights packed for the plugin.

TensorRT 11 and TensorRT-RTX are strongly typed: they compute in the types that the graph says. The lowered graph says
float32, so this module writes a second graph in which

- every activation and dense weight is float16 or bfloat16, except what is computed from token positions alone (rotary
  angles reach the thousands, where float16 has whole numbers only), which is rounded where it meets the rest;
- each of our nodes has the plugin's inputs (packed weights) and attributes instead of the checkpoint's, and layers of
  the same input (q, k and v; gate and up) are one node with an output for each;
- the cache is appended to outside of Attention;
- logits are float32.

Weights are read, packed and written node by node: memory holds one node's layers, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from compress.int4 import unpack_int4
from plugins_trt import pack
from plugins_trt.library import NAME, NAMESPACE, VERSION
from sslc_export.lowering import names
from sslc_export.lowering.attention import expose_cache

_TYPES = {"f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ALIGNMENT = 256


@dataclass(frozen=True)
class PluginNode:
    """One compressed layer in the rewritten graph.

    Attributes:
        name: The layer's name.
        node: The node that computes it, with others of the same input.
        output: Which of the node's outputs is its own.
        layout: How its sparse part is packed.
        reason: Why in this layout.
        out_features: N.
        in_features: K.
        rank: r.
        nbytes: Bytes of its packed weights and bias.
    """

    name: str
    node: str
    output: int
    layout: str
    reason: str
    out_features: int
    in_features: int
    rank: int
    nbytes: int


def load(model: Path) -> ir.Model:
    """The .onnx file that `sslc_export.lowering` wrote, without its weights."""
    return ir.load(model)


def choose_layouts(model: ir.Model, progress: Callable[[Iterable[Any], str], Iterable[Any]]) -> dict[str, pack.Choice]:
    """The packed layout of each plugin node to be, by its name. Reads the bitmaps."""
    choices = {}
    for nodes in progress(_groups(model), "Choosing layouts"):
        bitmaps = [_array(node, "bitmap") for node in nodes]
        in_features = _array(nodes[0], "V").shape[1]
        choices[_name_of(nodes)] = pack.choose_layout(bitmaps, in_features, int8=_has_scales(nodes[0]))
    return choices


def rewrite(
    model: ir.Model,
    out: Path,
    choices: Mapping[str, pack.Choice],
    *,
    type: str,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> tuple[PluginNode, ...]:
    """Writes the TensorRT variant of a lowered model.

    Args:
        model: From `load`; it is changed on the way.
        out: The .onnx file to write; its weights go beside it, with the suffix .bin.
        choices: From `choose_layouts`.
        type: "f16" or "bf16".
        progress: Shows the packing.

    Raises:
        InputError: a weight does not fit the type.
    """
    expose_cache(model)
    graph = model.graph
    for function in list(model.functions):  # the plugin takes the place of the operator's body
        del model.functions[function]
    float32 = _position_values(graph)
    weights = out.with_suffix(".bin")
    packed = []
    with weights.open("wb") as file:
        writer = _Weights(file, weights)
        for nodes in progress(_groups(model), "Packing layers"):
            packed.extend(_pack(graph, nodes, choices[_name_of(nodes)], type, writer))
        _to_half(graph, _TYPES[type], float32, writer)
    for node in graph:
        if node.op_type == "Attention":
            # TensorRT has fused kernels for some head sizes only, and takes others apart if this says that it may. The
            # attribute is TensorRT's own: onnx.checker refuses it, so that it can be added no earlier than here.
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    ir.save(model, out)
    return tuple(packed)


class _Weights:
    """Appends arrays to the weight file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def add(self, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
        offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(offset)
        array = np.ascontiguousarray(array)
        self._file.write(array.data)
        return ir.ExternalTensor(
            self._path.name,
            offset,
            array.nbytes,
            dtype,
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._path.parent,
        )


def _groups(model: ir.Model) -> list[list[ir.Node]]:
    """Our nodes in the order of the graph, those of the same input together."""
    groups: dict[tuple[int, bool], list[list[ir.Node]]] = {}
    for node in model.graph:
        if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE):
            same = groups.setdefault((id(node.inputs[0]), _has_scales(node)), [[]])
            if len(same[-1]) == pack.MOST_STACKED:
                same.append([])
            same[-1].append(node)
    return [group for same in groups.values() for group in same]


def _name_of(nodes: list[ir.Node]) -> str:
    """For example "model.layers.0.self_attn.q_proj+k_proj+v_proj"."""
    return "+".join([str(nodes[0].name), *(str(node.name).rpartition(".")[2] for node in nodes[1:])])


def _array(node: ir.Node, name: str) -> np.ndarray:
    value = node.inputs[names.INPUTS.index(name)]
    return value.const_value.numpy()  # type: ignore[union-attr]


def _int8(bitmap: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Packed int4 values as int8 ones: the plugin has no kernel for fewer bits, and the scales are the same."""
    return unpack_int4(*(torch.from_numpy(np.array(array)) for array in (bitmap, packed))).numpy()


def _has_scales(node: ir.Node) -> bool:
    return len(node.inputs) > names.INPUTS.index("scales")


def _pack(graph: ir.Graph, nodes: list[ir.Node], choice: pack.Choice, type: str, writer: _Weights) -> list[PluginNode]:
    """Puts one node with the plugin's inputs and attributes in the place of nodes that have the same input."""
    name, layers = _name_of(nodes), []
    for node in nodes:
        given = names.INPUTS[1 : len(node.inputs)]
        array = {name: _array(node, name) for name in given}
        if array["values"].dtype == np.uint8:
            array["values"] = _int8(array["bitmap"], array["values"])
        layers.append(
            pack.pack_layer(
                array["bitmap"],
                array["values"],
                array["U"],
                array["V"],
                array["bias"],
                in_features=array["V"].shape[1],
                type=type,
                layout=choice.layout,
                scales=array.get("scales"),
                name=str(node.name),
            )
        )
    packed = pack.stack(layers)
    inputs = [nodes[0].inputs[0]]
    for part, data in (("S", packed.S), ("U", packed.U), ("V", packed.V), ("bias", packed.bias)):
        dtype = ir.DataType.FLOAT if part == "bias" else ir.DataType.INT32
        inputs.append(_initializer(graph, writer.add(f"{name}.packed.{part}", data, dtype)))
    plugin = ir.node(
        NAME,
        inputs,
        {
            "plugin_version": VERSION,
            "plugin_namespace": NAMESPACE,
            "out_features": packed.out_features,
            "in_features": packed.in_features,
            "rank": packed.rank,
            "slot": packed.slot,
            "layout": packed.layout,
            "type": packed.type,
            "values": "int8" if packed.int8 else "float",
        },
        domain=names.DOMAIN,
        name=name,
        num_outputs=len(nodes),
    )
    old = [node.outputs[0] for node in nodes]
    weights = [value for node in nodes for value in node.inputs[1:] if value is not None]
    ir.convenience.replace_nodes_and_values(graph, nodes[0], nodes, [plugin], old, list(plugin.outputs))
    for value in weights:
        if value.is_initializer() and not value.uses():
            graph.initializers.pop(str(value.name), None)
    return [
        PluginNode(
            str(node.name), name, i, choice.layout, choice.reason, len(layer.bias), layer.in_features, layer.rank[0],
            layer.nbytes,
        )
        for i, (node, layer) in enumerate(zip(nodes, layers, strict=True))
    ]  # fmt: skip


def _position_values(graph: ir.Graph) -> set[ir.Value]:
    """Float values that come from integers alone: positions, and the rotary angles made of them."""
    found: set[ir.Value] = set()
    for node in graph:
        flowing = [v for v in node.inputs if v is not None and v.dtype in _FLOATS and not v.is_initializer()]
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype not in _FLOATS:
            made_of_integers = node.attributes["to"].as_int() in _FLOATS
        else:
            made_of_integers = bool(flowing) and all(v in found for v in flowing)
        if made_of_integers:  # the exporter does not know every value's type
            found.update(v for v in node.outputs if v.dtype is None or v.dtype in _FLOATS)
    return found


def _to_half(graph: ir.Graph, half: ir.DataType, float32: set[ir.Value], writer: _Weights) -> None:
    """Turns float32 into `half` everywhere but in `float32` and what only it uses."""
    for value in list(graph.initializers.values()):
        if value.dtype not in _FLOATS or all(_stays_float32(use.node, float32) for use in value.uses()):
            continue
        if any(use.node.domain == names.DOMAIN for use in value.uses()):
            continue  # the plugin's bias
        bits = pack.to_bits(value.const_value.numpy(), _name(half), f"Weight {value.name}")  # type: ignore[union-attr]
        value.const_value = writer.add(str(value.name), bits, half)
        value.type = ir.TensorType(half)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(half)
    for node in list(graph):
        if node.op_type == "Cast" and node.outputs[0] not in float32 and node.attributes["to"].as_int() in _FLOATS:
            node.attributes["to"] = ir.AttrInt64("to", int(half))
        mixes = not _stays_float32(node, float32)
        for i, given in enumerate(node.inputs):
            if mixes and given is not None and given in float32:
                node.replace_input_with(i, _cast(graph, given, half, before=node))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value not in float32:
                value.type = ir.TensorType(half)
    for i, value in enumerate(list(graph.outputs)):
        if value.name == "logits":
            _float32_output(graph, i, value)


def _stays_float32(node: ir.Node, float32: set[ir.Value]) -> bool:
    return any(v in float32 for v in node.outputs)


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
    """`value` as `dtype`; one Cast for all its users."""
    for use in value.uses():
        if use.node.op_type == "Cast" and use.node.attributes["to"].as_int() == dtype:
            return use.node.outputs[0]
    node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}.half")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = node.name, value.shape, ir.TensorType(dtype)
    graph.insert_before(before, node)
    return node.outputs[0]


def _float32_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    name, value.name = value.name, f"{value.name}.half"
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}.float32")
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs[index] = output


def _initializer(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _name(dtype: ir.DataType) -> str:
    return next(name for name, known in _TYPES.items() if known == dtype)
