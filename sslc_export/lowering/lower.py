"""From a Hugging Face folder, dense or compressed, to an .onnx file beside its weights."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import onnxscript.optimizer
import onnxscript.rewriter.onnx_fusions

from compress.architectures import linears
from compress.format import Checkpoint, no_progress
from sslc_common.errors import InputError
from sslc_common.files import atomic_path, sha256
from sslc_export import __version__
from sslc_export.lowering import names, op
from sslc_export.lowering.attention import absorb_cache
from sslc_export.lowering.trace import empty_model, trace
from sslc_export.lowering.weights import attach, placed, require_known_types


@dataclass(frozen=True)
class LoweringReport:
    """What was written.

    Attributes:
        path: The .onnx file.
        op_counts: Number of nodes by operator, "sslc::LowRankSparseLinear" for ours.
        kernel_layers: Names of the layers that are one node of our operator.
        dense_layers: Names of the linear layers that are not, lm_head among them.
        external_files: The weight files that the .onnx file refers to.
        seconds: How long it took.
    """

    path: Path
    op_counts: dict[str, int]
    kernel_layers: tuple[str, ...]
    dense_layers: tuple[str, ...]
    external_files: tuple[Path, ...]
    seconds: float


def lower(
    folder: Path,
    out: Path,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = no_progress,
    *,
    int8_activations: bool = False,
) -> LoweringReport:
    """Writes the ONNX model of a Hugging Face folder. Weights stay in its .safetensors files.

    They are used in place if `folder` is inside the folder of `out`, and copied beside `out` otherwise: `out`'s folder
    can be moved as a whole. No weight passes through memory.

    Args:
        folder: A dense or compressed Hugging Face folder.
        out: The .onnx file to write.
        progress: Shows the steps.
        int8_activations: Allows kernels to round the activations of layers with int8 and int4 values to 8 bits.

    Raises:
        InputError: the folder is damaged or its architecture not supported, or `out` cannot be written.
    """
    start = time.perf_counter()
    folder, out = Path(folder), Path(out)
    if out.suffix != ".onnx":
        raise InputError(f"{out} is not a name for an ONNX model", got=out.suffix or "no suffix", allowed=".onnx")
    checkpoint = Checkpoint.open(folder)
    require_known_types(checkpoint)
    skeleton = empty_model(checkpoint)
    dense_layers = tuple(linears(skeleton))

    steps = iter(progress(("trace", "simplify"), "Lowering to ONNX"))
    next(steps)
    model = trace(skeleton, checkpoint)
    next(steps)
    _simplify(model)
    config = skeleton.config.get_text_config()
    heads = config.num_attention_heads
    absorb_cache(model, heads, getattr(config, "num_key_value_heads", None) or heads)
    next(steps, None)
    kernel_layers = _name_our_nodes(model)
    if sorted(kernel_layers) != sorted(checkpoint.layers):
        different = sorted(set(kernel_layers) ^ set(checkpoint.layers))
        raise RuntimeError(f"the graph does not have one {names.OP_TYPE} node per compressed layer: {different[:4]}")
    _describe(model, checkpoint, dense_layers)
    if int8_activations:
        _allow_int8_activations(model)

    files = {ref.file for ref in checkpoint.tensors.values()}
    with placed(files, out, progress) as locations, atomic_path(out) as temporary:
        attach(model, checkpoint, out.parent, locations)
        temporary.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        onnx.checker.check_model(temporary, full_check=True)
    return LoweringReport(
        path=out,
        op_counts=op_counts(model),
        kernel_layers=kernel_layers,
        dense_layers=dense_layers,
        external_files=tuple(out.parent / location for location in sorted(locations.values())),
        seconds=time.perf_counter() - start,
    )


def op_counts(model: ir.Model) -> dict[str, int]:
    """Number of nodes of the main graph by operator, most frequent first."""
    operators = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)
    return dict(Counter(operators).most_common())


def _simplify(model: ir.Model) -> None:
    """Folds what is constant, and finds the operators that the exporter took apart."""
    onnxscript.optimizer.optimize_ir(model)
    onnxscript.rewriter.onnx_fusions.fuse(model)
    # The rotary fusion writes the sines and cosines down anew for each use.
    ir.passes.common.CommonSubexpressionEliminationPass()(model)
    ir.passes.common.ClearMetadataAndDocStringPass()(model)


def _name_our_nodes(model: ir.Model) -> tuple[str, ...]:
    """Names each node of our operator after its layer, in the order of the graph."""
    layers = []
    for node in model.graph:
        if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE):
            node.name = str(node.inputs[names.INPUTS.index("bitmap")].name).removesuffix(".bitmap")  # type: ignore[union-attr]
            layers.append(node.name)
    return tuple(layers)


def _allow_int8_activations(model: ir.Model) -> None:
    for node in model.graph:
        if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE) and node.overload:  # those with scales
            node.attributes.add(ir.AttrInt64("activation_bits", 8))


def _describe(model: ir.Model, checkpoint: Checkpoint, dense_layers: tuple[str, ...]) -> None:
    """Adds the operator's body and says where the model comes from."""
    for node in model.graph:
        if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE):
            values = node.inputs[names.INPUTS.index("values")]
            assert values is not None
            node.overload = op.overload(values.dtype)
            if node.op_identifier() not in model.functions:
                body = ir.serde.deserialize_function(op.function_body(node.overload))
                model.functions[body.identifier()] = body
    model.opset_imports[names.DOMAIN] = names.VERSION
    model.graph.name = str(checkpoint.config["model_type"])
    model.producer_name, model.producer_version = "sslc-export", __version__
    model.metadata_props.update(
        {
            names.FORMAT_VERSION_KEY: names.FORMAT_VERSION,
            names.CONFIG_KEY: sha256(checkpoint.folder / "config.json"),
            names.MODEL_TYPE_KEY: str(checkpoint.config["model_type"]),
            names.DENSE_LAYERS_KEY: json.dumps(dense_layers),
        }
    )
