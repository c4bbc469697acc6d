"""Attention with the cache and the splitting into heads inside (ONNX Runtime) or outside of it (TensorRT).

The exporter writes what transformers computes: reshape and transpose to heads, append to the cache, attend, transpose
and reshape back. ONNX `Attention` does all of that itself, given 3-D inputs and the past keys and values. For one token
these small nodes cost more than the attention: without them a decode step of SmolLM2-135M takes 10 % less time (ONNX
Runtime 1.31, two threads). But TensorRT refuses Attention's cache outputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_SWAP = [0, 2, 1, 3]  # [batch, sequence, heads, size] to [batch, heads, sequence, size], and back


def absorb_cache(model: ir.Model, heads: int, key_value_heads: int) -> None:
    """Changes each Attention node whose keys and values are Concat(past, new), and are the outputs present.*.

    Args:
        model: Simplified.
        heads: Of the queries.
        key_value_heads: Of keys and values.
    """
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        query, keys, values, mask = node.inputs
        append_key, append_value = _made_by(keys, "Concat"), _made_by(values, "Concat")
        if append_key is None or append_value is None:
            continue
        past_key, key = append_key.inputs
        past_value, value = append_value.inputs
        output, attributes = node.outputs[0], list(node.attributes.values())
        joined = _after_heads(output)
        # Where queries and keys are normalized head by head (Qwen3), they stay split.
        if joined is not None and all(_before_heads(x) is not None for x in (query, key, value)):
            query, key, value = (_with_heads_joined(x) for x in (query, key, value))
            output = joined
            attributes += [ir.AttrInt64("q_num_heads", heads), ir.AttrInt64("kv_num_heads", key_value_heads)]
        inputs = (query, key, value, mask, past_key, past_value)
        fused = ir.Node("", "Attention", inputs, attributes, num_outputs=3)
        model.graph.insert_before(node, fused)
        for old, new in zip((output, keys, values), fused.outputs, strict=True):
            assert old is not None
            new.name, new.type = old.name, old.type
            new.shape = None if old is joined else old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def expose_cache(model: ir.Model) -> None:
    """Undoes `absorb_cache`: Attention gets 4-D inputs with the past in them, and has one output."""
    for node in [node for node in model.graph if node.op_type == "Attention" and len(node.inputs) == 6]:
        query, key, value, mask, past_key, past_value = node.inputs
        output, present_key, present_value = node.outputs
        attributes = dict(node.attributes)
        split = "q_num_heads" in attributes
        if split:
            heads, key_value_heads = (attributes.pop(name).as_int() for name in ("q_num_heads", "kv_num_heads"))
            query = _with_heads_split(model.graph, query, heads, node)
            key, value = (_with_heads_split(model.graph, x, key_value_heads, node) for x in (key, value))
        appends = [ir.node("Concat", pair, {"axis": -2}) for pair in ((past_key, key), (past_value, value))]
        keys, values = (append.outputs[0] for append in appends)
        attention = ir.Node("", "Attention", (query, keys, values, mask), attributes.values())
        added, result = [*appends, attention], attention.outputs[0]
        if split:
            transpose = ir.node("Transpose", [result], {"perm": _SWAP})
            shape = _shape(model.graph, [0, 0, -1])
            added += [transpose, ir.node("Reshape", [transpose.outputs[0], shape])]
            result = added[-1].outputs[0]
        model.graph.insert_before(node, added)
        for old, new in ((output, result), (present_key, keys), (present_value, values)):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _with_heads_split(graph: ir.Graph, value: ir.Value | None, heads: int, before: ir.Node) -> ir.Value | None:
    """`value` [batch, sequence, heads * size] as [batch, heads, sequence, size], before it is rotated if it is."""
    rotary = _made_by(value, "RotaryEmbedding")
    reshape = ir.node("Reshape", [value if rotary is None else rotary.inputs[0], _shape(graph, [0, 0, heads, -1])])
    transpose = ir.node("Transpose", reshape.outputs, {"perm": _SWAP})
    for node in (reshape, transpose):
        node.outputs[0].type = None if value is None else value.type
    graph.insert_before(before if rotary is None else rotary, [reshape, transpose])
    if rotary is None:
        return transpose.outputs[0]
    rotary.replace_input_with(0, transpose.outputs[0])
    rotary.outputs[0].shape = None
    return rotary.outputs[0]


def _shape(graph: ir.Graph, dimensions: list[int]) -> ir.Value:
    name = f"shape.{'.'.join(map(str, dimensions))}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(dimensions, np.int64), name=name)
        type, shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(dimensions)])
        graph.register_initializer(ir.Value(name=name, shape=shape, type=type, const_value=tensor))
    return graph.initializers[name]


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _before_heads(value: ir.Value | None) -> ir.Value | None:
    """The [batch, sequence, heads * size] that was split into `value` [batch, heads, sequence, size], maybe rotated."""
    if (rotary := _made_by(value, "RotaryEmbedding")) is not None:
        value = rotary.inputs[0]
    transpose = _made_by(value, "Transpose")
    reshape = None if transpose is None else _made_by(transpose.inputs[0], "Reshape")
    whole = None if reshape is None else reshape.inputs[0]
    return whole if whole is not None and whole.shape is not None and len(whole.shape) == 3 else None


def _with_heads_joined(value: ir.Value | None) -> ir.Value | None:
    """What `value` was split from; RotaryEmbedding, in between, takes it as well, as it knows the number of heads."""
    whole = _before_heads(value)
    if whole is None or (rotary := _made_by(value, "RotaryEmbedding")) is None:
        return whole
    rotary.replace_input_with(0, whole)
    rotary.outputs[0].shape = whole.shape
    return rotary.outputs[0]


def _after_heads(value: ir.Value) -> ir.Value | None:
    """What `value` [batch, heads, sequence, size] becomes, and nothing else, when its heads are joined again.

    Either [batch, sequence, heads * size], or [batch, sequence, heads, size] if that is reshaped to something else.
    """
    if (transpose := _only_user(value, "Transpose")) is None:
        return None
    if (reshape := _only_user(transpose.outputs[0], "Reshape")) is None:
        return None
    shape = reshape.outputs[0].shape
    return reshape.outputs[0] if shape is not None and len(shape) == 3 else transpose.outputs[0]


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = value.consumers()
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None
