"""A transformers model as an ONNX graph, traced with fake tensors: no weight is in memory.

The graph has the inputs `input_ids` and `position_ids` [batch, sequence], `attention_mask` [batch, total] and
`past_key_values.N.key/.value` [batch, heads, past, head size], and the outputs `logits` [batch, sequence, vocabulary]
and `present.N.key/.value`, the cache with the new tokens: the names that the field uses. total = past + sequence.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from compress.architectures import skeleton
from compress.format import Checkpoint
from compress.hf import replace_layers
from sslc_common.errors import InputError
from sslc_export.lowering import names, op
from sslc_export.lowering.exportable import ATTENTION, WRAPPED, FlatCache

_FETCH_AGAIN = "Copy or download the whole folder again, or compress the model again"


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint, its compressed layers in place, without weights (meta device).

    Raises:
        InputError: the architecture is not supported, or the checkpoint does not fit it.
    """
    model = skeleton(checkpoint.folder)
    replace_layers(model, checkpoint, torch.float32)
    model.tie_weights()
    model.set_attn_implementation(ATTENTION)
    return model.eval()


def trace(model: PreTrainedModel, checkpoint: Checkpoint) -> ir.Model:
    """Traces a model into ONNX as it comes from the exporter.

    Weights become inputs of the graph, named as the checkpoint's tensors, until `weights.attach`: whoever simplifies
    the graph can neither read them, nor fold them (into a transposed copy of a tied lm_head, for example), nor merge
    equal ones.

    Args:
        model: From `empty_model`.
        checkpoint: What `model` was made from.

    Raises:
        InputError: the exporter cannot trace this model, or a tensor is missing or has a wrong shape.
    """
    stored = _tensor_names(model, checkpoint)
    layers = model.config.get_text_config().num_hidden_layers
    cache = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    with _quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        _fake_weights(model)
        inputs, dynamic_shapes = _example(model, layers)
        try:
            program = torch.onnx.export(
                FlatCache(model).eval(),
                inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=op.OPSET,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table={torch.ops.sslc.low_rank_sparse_linear.default: _translate},
                input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{x}" for x in cache)],
                output_names=["logits", *(f"present.{x}" for x in cache)],
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise InputError(
                f"{checkpoint.folder}: this {type(model).__name__} cannot be traced",
                got=str(error.__cause__ or error).strip().splitlines()[0],
                allowed="options that do not make the graph depend on the values or lengths of its inputs",
                do="Look for unusual options in config.json, such as a dynamic rope_type",
            ) from error
    assert program is not None
    _weights_to_inputs(program.model, stored)
    _share_zero_biases(program.model)
    _name_dimensions(program.model)
    return program.model


def _translate(x: Any, bitmap: Any, values: Any, U: Any, V: Any, bias: Any = None, scales: Any = None) -> Any:
    inputs = (x, bitmap, values, U, V, bias) + (() if scales is None else (scales,))
    return op.node(*inputs, version=names.VERSION, layout=names.LAYOUT)


def _fake_weights(model: nn.Module) -> None:
    """Puts fake CPU tensors in place of meta ones; tied parameters stay tied.

    Floating parameters become float32, the type of the activations, except those that our operator takes as stored.
    """
    fakes: dict[int, nn.Parameter | Tensor] = {}
    for module in model.modules():
        compressed = hasattr(module, "bitmap")
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in fakes:
                    as_stored = compressed and name != "bias"
                    dtype = torch.float32 if tensor.is_floating_point() and not as_stored else tensor.dtype
                    fake = torch.empty(tensor.shape, dtype=dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
                table[name] = fakes[id(tensor)]  # type: ignore[assignment]


def _example(model: PreTrainedModel, layers: int) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs to trace with, and the names of their dimensions. Sizes differ so that no two are taken for one."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, sequence, past = 2, 3, 5
    inputs = (
        torch.zeros(batch, sequence, dtype=torch.long),
        torch.ones(batch, past + sequence, dtype=torch.long),
        torch.arange(past, past + sequence).expand(batch, sequence).contiguous(),
        *(torch.zeros(batch, heads, past, head_size) for _ in range(2 * layers)),
    )
    tokens, cache = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    return inputs, (tokens, {0: "batch", 1: "total"}, tokens, (cache,) * (2 * layers))


def _tensor_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name of each parameter and buffer that it must hold, by its name in the model.

    A tied tensor is stored under one of its names. Some folders on the hub (GPT-2, OPT) were saved from the base
    model and lack its prefix.
    """
    tied: dict[int, list[str]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            tied.setdefault(id(tensor), []).append(name)
    prefix = f"{model.base_model_prefix}."
    names_of = {}
    for name, tensor in tensors:
        if not tensor.is_meta:
            continue
        candidates = [*tied[id(tensor)], *(alias.removeprefix(prefix) for alias in tied[id(tensor)])]
        stored = next((candidate for candidate in candidates if candidate in checkpoint.tensors), None)
        if stored is None:
            raise InputError(f"Tensor {name} is missing from {checkpoint.folder}", do=_FETCH_AGAIN)
        ref = checkpoint.tensors[stored]
        if tuple(tensor.shape) != ref.shape:
            raise InputError(
                f"Tensor {stored} in {ref.file} does not fit the architecture",
                got=list(ref.shape),
                allowed=str(list(tensor.shape)),
                do=_FETCH_AGAIN,
            )
        names_of[name] = stored
    return names_of


def _weights_to_inputs(model: ir.Model, stored: dict[str, str]) -> None:
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = stored.get(str(value.name).removeprefix(f"{WRAPPED}."))
        if name is None:  # a buffer that is computed from the config, such as the rotary frequencies: real already
            continue
        del graph.initializers[value.name]  # type: ignore[arg-type]
        value.name, value.const_value = name, None
        graph.inputs.append(value)


def _share_zero_biases(model: ir.Model) -> None:
    """Gives our operator its bias where the layer has none: zeros, shared between layers with the same N."""
    bias = names.INPUTS.index("bias")
    for node in model.graph:
        if (node.domain, node.op_type) != (names.DOMAIN, names.OP_TYPE):
            continue
        if len(node.inputs) <= bias:
            node.resize_inputs(bias + 1)
        if node.inputs[bias] is None:
            U = node.inputs[names.INPUTS.index("U")]
            assert U is not None
            assert U.shape is not None
            node.replace_input_with(bias, _zeros(model.graph, U.shape.numpy()[0]))


def _zeros(graph: ir.Graph, n: int) -> ir.Value:
    name = f"{names.DOMAIN}.zero_bias.{n}"
    if name not in graph.initializers:
        tensor = ir.tensor(torch.zeros(n).numpy(), name=name)
        value = ir.Value(name=name, shape=ir.Shape([n]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _name_dimensions(model: ir.Model) -> None:
    """Calls past + sequence of the cache outputs "total", as it is called in attention_mask."""
    for value in model.graph.outputs:
        if str(value.name).startswith("present."):
            batch, heads, _, head_size = value.shape  # type: ignore[misc]
            value.shape = ir.Shape([batch, heads, "total", head_size])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about itself away from the user. Errors come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
