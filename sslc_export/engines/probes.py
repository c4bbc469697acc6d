"""PyTorch model and ONNX engine opened layer by layer, for `validate.attribution`.

The engine's own graph is what is looked into: it gets the activations of the compressed layers as further outputs, and
single layers are cut out of it with their weights still byte ranges of the engine's files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import nn
from transformers import PreTrainedModel

from compress.architectures import output_rows
from compress.layer import LowRankSparseLinear, decode
from compress.source import Source
from plugins_ort import library as plugin
from sslc_common.errors import MissingError
from sslc_export.engines.inputs import model_inputs
from sslc_export.engines.pytorch import TorchEngine
from sslc_export.lowering import names
from validate.attribution import LOGITS, Activations

_WEIGHTS = tuple(name for name in names.INPUTS if name != "X")


class TorchProbe:
    """See `validate.attribution.ReferenceProbe`.

    Args:
        model: The compressed model, float32.
        dense: Folder of the dense one; None if it is not known.
    """

    def __init__(self, model: PreTrainedModel, dense: Path | None = None) -> None:
        self._engine = TorchEngine(model)
        self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankSparseLinear)}
        self._source = Source.open(dense) if dense is not None else None

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, cache: Any
    ) -> tuple[dict[str, Activations], Any]:
        """A forward pass that gives the activations of each compressed layer, and the logits."""
        seen: dict[str, Activations] = {}

        def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
            def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                X, Y = (tensor.float().cpu().numpy() for tensor in (inputs[0], output))
                seen[name] = Activations(X, Y)

            return hook

        hooks = [layer.register_forward_hook(note(name)) for name, layer in self._layers.items()]
        try:
            logits, cache = self._engine.run(input_ids, attention_mask, cache)
        finally:
            for hook in hooks:
                hook.remove()
        batch = len(input_ids)
        # OPT flattens [batch, tokens] before its feed-forward layers.
        seen = {name: Activations(_batched(both.X, batch), _batched(both.Y, batch)) for name, both in seen.items()}
        return seen | {LOGITS: Activations(logits, logits)}, cache

    def exact(self, layer: str, X: np.ndarray) -> np.ndarray:
        """Y [n, N] of X [n, K], in float64."""
        module = self._layers[layer]
        S = decode(module.bitmap, module.values, module.scales, module.in_features, torch.float64)
        return self._times(X, S + module.U.double() @ module.V.double(), module.bias)

    def dense(self, layer: str, X: np.ndarray) -> np.ndarray | None:
        """The same with W in place of S + U·V."""
        if self._source is None:
            return None
        W = output_rows(self._source.model.get_submodule(layer), self._source.read(f"{layer}.weight"))
        return self._times(X, W.double(), self._layers[layer].bias)

    def tensors(self, layer: str) -> dict[str, np.ndarray]:
        """The checkpoint's tensors of a layer as float32 or int32; a layer without bias has none."""
        module = self._layers[layer]
        tensors = {name: getattr(module, name) for name in _WEIGHTS}
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
            for name, tensor in tensors.items()
            if tensor is not None
        }

    @staticmethod
    def _times(X: np.ndarray, W: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
        Y = torch.from_numpy(X).double() @ W.T
        return (Y if bias is None else Y + bias.double()).detach().numpy()


class OnnxRuntimeProbe:
    """See `validate.attribution.EngineProbe`.

    Args:
        path: The .onnx file, its weights beside it.
        reference: What its weights are compared with.
        threads: None for ONNX Runtime's choice.
    """

    def __init__(self, path: Path, reference: TorchProbe, threads: int | None = None) -> None:
        self.path, self._reference, self._threads = path.resolve(), reference, threads
        self._model = ir.load(path)
        self._nodes = {
            str(node.name): node
            for node in self._model.graph
            if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE)
        }
        self.layers: Sequence[str] = list(self._nodes)
        self.no_kernel: str | None = None
        self._library: Path | None = None
        try:
            self._library = plugin.library_path()
        except MissingError as error:
            self.no_kernel = str(error)
        self._whole: ort.InferenceSession | None = None
        self._alone: tuple[tuple[str, bool], ort.InferenceSession] | None = None

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, cache: Any
    ) -> tuple[dict[str, Activations], Any]:
        """A forward pass of the whole graph that gives the activations of each compressed layer, and the logits."""
        if self._whole is None:
            self._whole = self._session(self._model_with_activations(), self._library)
        session, batch = self._whole, len(input_ids)
        pasts = [value for value in session.get_inputs() if value.name.startswith(names.PAST)]
        cache = cache or [np.zeros((batch, past.shape[1], 0, past.shape[3]), np.float32) for past in pasts]
        inputs = model_inputs(input_ids, attention_mask, cache[0].shape[2])
        feeds = dict(zip(("input_ids", "attention_mask", "position_ids"), inputs, strict=True))
        feeds |= {past.name: array for past, array in zip(pasts, cache, strict=True)}
        wanted = [value.name for value in session.get_outputs()]
        values = dict(zip(wanted, session.run(wanted, feeds), strict=True))
        seen = {
            name: Activations(_batched(values[X], batch), _batched(values[Y], batch))
            for name, (X, Y) in self._activations().items()
        }
        logits = values[names.LOGITS]
        return seen | {LOGITS: Activations(logits, logits)}, [values[names.present(past.name)] for past in pasts]

    def function(self, layer: str, X: np.ndarray) -> np.ndarray:
        """Y [n, N] of X [n, K] by the operator's ONNX body."""
        return self._run_alone(layer, None, X)

    def kernel(self, layer: str, X: np.ndarray) -> np.ndarray:
        """The same by the kernel."""
        assert self._library is not None
        return self._run_alone(layer, self._library, X)

    def different_weights(self, layer: str) -> list[str]:
        """Which of the layer's tensors are not those of the checkpoint."""
        there = self._reference.tensors(layer)
        different = []
        for name, value in zip(names.INPUTS[1:], self._nodes[layer].inputs[1:], strict=False):  # scales may be missing
            tensor = ir.convenience.get_const_tensor(value)  # type: ignore[arg-type]
            if tensor is None:  # cast from its stored type
                continue
            found = tensor.numpy()
            if name != "bitmap":
                found = found.astype(np.float32)
            expected = there.get(name, np.zeros(found.shape, np.float32))
            if found.shape != expected.shape or not np.array_equal(found, expected):
                different.append(name)
        return different

    def model_of(self, layer: str) -> onnx.ModelProto:
        """The layer as a model of one node, X [n, K] to Y [n, N], its weights as the engine holds them."""
        node = self._nodes[layer]
        X, Y = node.inputs[0], node.outputs[0]
        assert X is not None
        graph = ir.convenience.extract(self._model.graph, [X], [Y])
        graph.name = layer
        model = ir.Model(graph, ir_version=self._model.ir_version, functions=list(self._model.functions.values()))
        graph.opset_imports.update(self._model.graph.opset_imports)
        shapes = dict(zip(names.INPUTS, (value and value.shape for value in node.inputs), strict=False))
        N, K = (shapes[name].numpy()[axis] for name, axis in (("U", 0), ("V", 1)))  # type: ignore[union-attr]
        for value, name, width in ((graph.inputs[0], "X", K), (graph.outputs[0], "Y", N)):
            value.name, value.shape, value.type = name, ir.Shape(["rows", width]), ir.TensorType(ir.DataType.FLOAT)
        return ir.to_proto(model)

    def _run_alone(self, layer: str, library: Path | None, X: np.ndarray) -> np.ndarray:
        key = layer, library is not None
        if self._alone is None or self._alone[0] != key:
            self._alone = key, self._session(self.model_of(layer), library)
        return np.asarray(self._alone[1].run(["Y"], {"X": X})[0])

    def _activations(self) -> dict[str, tuple[str, str]]:
        return {
            name: (str(node.inputs[0].name), str(node.outputs[0].name))  # type: ignore[union-attr]
            for name, node in self._nodes.items()
        }

    def _model_with_activations(self) -> onnx.ModelProto:
        model = ir.load(self.path)
        values = {str(value.name): value for node in model.graph for value in (*node.inputs, *node.outputs) if value}
        wanted = dict.fromkeys(name for pair in self._activations().values() for name in pair)
        model.graph.outputs.extend(values[name] for name in wanted if values[name] not in model.graph.outputs)
        return ir.to_proto(model)

    def _session(self, model: onnx.ModelProto, library: Path | None) -> ort.InferenceSession:
        options = ort.SessionOptions()
        if self._threads:
            options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.path.parent))
        # The body of a layer is run a few times: not worth the memory of folding S.
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(2**20))
        if library is not None:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _batched(array: np.ndarray, batch: int) -> np.ndarray:
    return array.reshape(batch, -1, array.shape[-1])
