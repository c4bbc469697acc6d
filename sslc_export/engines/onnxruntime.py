"""ONNX Runtime on CPUs, with our kernel where it is installed and with the operator's ONNX body where it is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import psutil
from google.protobuf.message import DecodeError

from plugins_ort import library as plugin
from sslc_common.errors import InputError, MissingError
from sslc_export.engines.inputs import model_inputs
from sslc_export.lowering import names

_FOLD_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"
# ONNX Runtime runs the operator's body once, when it opens the model, if its constant folding is left alone: then S
# is dense and runs as fast as a dense layer, but every intermediate of every layer is held until the end of the pass.
# Measured with onnxruntime 1.31 (docs/lowering.md).
_FOLDING_BYTES_PER_WEIGHT = 34


@dataclass(frozen=True)
class _Cache:
    """Keys and values [B, heads, length, head size] of each layer, in the order of the model's inputs."""

    values: tuple[ort.OrtValue, ...]
    length: int


class OnnxRuntimeEngine:
    """Runs an .onnx file that `sslc_export.lowering` wrote.

    Args:
        path: The .onnx file, its weights beside it.
        threads: None for one per physical core that this process may use.
        library: "auto" for the installed kernel library (plugins_ort.library says where it is looked for), or the
            operator's ONNX body if there is none; "none" for the body.
        name: How reports call it; None for the file's name.

    Attributes:
        name: How reports call it.
        vocab_size: Width of the logits.
        num_layers: Decoder blocks.
        kv_cache_bytes: Of one token of one sequence, in all layers.
        threads: Threads that one operator may use.
        kernel: What runs the compressed layers: one of `plugins_ort.library.KERNELS` for our kernel, "function" for the
            ONNX body, "none" if the model has no compressed layers.
        fallback_reason: Why `kernel` is "function", else None.
        kernel_layers: Layers that run in our kernel.
        dense_layers: Linear layers that are dense in the model, lm_head among them.

    Raises:
        InputError: there is no such file, it is damaged or not ours, or its weights are missing or cut off.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        threads: int | None = None,
        library: Literal["auto", "none"] = "auto",
        name: str | None = None,
    ) -> None:
        path = Path(path)
        model = _read(path)
        ours = [node for node in model.graph.node if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE)]
        self.name = name or path.stem
        self.threads = threads or usable_cores()
        self.kernel, self.fallback_reason, file = _choose_kernel(library) if ours else ("none", None, None)
        self.dense_layers = len(json.loads(_metadata(model)[names.DENSE_LAYERS_KEY]))

        options = _session_options(self.threads)
        if file is not None:
            options.register_custom_ops_library(str(file))
        elif ours and (reason := _no_room_to_fold(model, ours)):
            self.fallback_reason = f"{self.fallback_reason}; {reason}"
            options.add_session_config_entry(_FOLD_LIMIT, str(2**20))
        alive = plugin.layers_alive() if file is not None else 0
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            raise InputError(
                f"ONNX Runtime {ort.__version__} cannot open {path}",
                got=str(error).strip().splitlines()[0],
                do="The file may be damaged or of another version: lower the model again",
            ) from error
        self.kernel_layers = plugin.layers_alive() - alive if file is not None else 0
        if file is not None and self.kernel_layers != len(ours):
            raise RuntimeError(f"{self.kernel_layers} of {len(ours)} compressed layers run in {file}")

        self._past = [i for i in self._session.get_inputs() if i.name.startswith(names.PAST)]
        # By name, whatever the order in the graph.
        self._outputs = [names.LOGITS, *(names.present(past.name) for past in self._past)]
        shapes = {output.name: output.shape for output in self._session.get_outputs()}
        self.vocab_size: int = shapes[names.LOGITS][2]
        self.num_layers = len(self._past) // 2
        self.kv_cache_bytes = sum(past.shape[1] * past.shape[3] * 4 for past in self._past)  # float32

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, cache: Any = None
    ) -> tuple[np.ndarray, Any]:
        """One forward pass; see `validate.engine.Engine`. The logits are a view of ONNX Runtime's own memory."""
        cache = cache or self._empty_cache(len(input_ids))
        ids, mask, positions = model_inputs(input_ids, attention_mask, cache.length)
        feeds = {input_.name: value for input_, value in zip(self._past, cache.values, strict=True)}
        for name, array in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            feeds[name] = ort.OrtValue.ortvalue_from_numpy(array)
        # As OrtValues the cache stays in ONNX Runtime's memory from call to call; nothing is copied in or out.
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds)
        return logits.numpy(), _Cache(tuple(present), cache.length + ids.shape[1])

    def _empty_cache(self, batch: int) -> _Cache:
        empty = (np.zeros((batch, past.shape[1], 0, past.shape[3]), np.float32) for past in self._past)
        return _Cache(tuple(ort.OrtValue.ortvalue_from_numpy(array) for array in empty), 0)


def _session_options(threads: int) -> ort.SessionOptions:
    """All graph optimizations, the default, and what differs from the defaults, for every engine alike."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    # Idle threads stop looking for work when a run ends, or two engines that take turns would disturb each other.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # No limit. By default an lm_head above 1 GiB (128256 × 4096) would keep its Transpose, and run it for each token.
    options.add_session_config_entry(_FOLD_LIMIT, "0")
    options.log_severity_level = 3  # errors; ONNX Runtime warns about each fold that it leaves out
    return options


def _choose_kernel(library: Literal["auto", "none"]) -> tuple[str, str | None, Path | None]:
    """(what runs the compressed layers, why it is the ONNX body, the library to load)."""
    if library == "none":
        return "function", "the kernel library was switched off", None
    try:
        file = plugin.library_path()
    except MissingError as error:
        return "function", str(error), None
    return plugin.kernel_name(), None, file


def _no_room_to_fold(model: onnx.ModelProto, ours: list[onnx.NodeProto]) -> str | None:
    """Why S is decoded on every run rather than once, or None if it is decoded once."""
    U, V = names.INPUTS.index("U"), names.INPUTS.index("V")
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    weights = sum(shapes[node.input[U]][0] * shapes[node.input[V]][1] for node in ours)  # U [N, r], V [r, K]
    needed, available = weights * _FOLDING_BYTES_PER_WEIGHT, psutil.virtual_memory().available
    if needed <= available:
        return None
    return f"S is decoded on every run: once would take {needed / 1e9:.0f} GB, of which {available / 1e9:.0f} are free"


def usable_cores() -> int:
    """Physical cores that this process may use."""
    process = psutil.Process()
    usable = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _read(path: Path) -> onnx.ModelProto:
    """The graph without its weights, after checking that they are all there."""
    lower_again = "Lower the model again with sslc-export"
    if not path.is_file():
        raise InputError(f"There is no engine {path}", got="a folder" if path.is_dir() else None, do="Check the path")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX model, or damaged", got=error, do=lower_again) from error
    version = _metadata(model).get(names.FORMAT_VERSION_KEY)
    if version is None:
        raise InputError(
            f"{path} was not made by sslc-export",
            got=f"a model of {model.producer_name or 'an unknown tool'}",
            do="Make the engine with sslc-export --out engine.onnx",
        )
    if version != names.FORMAT_VERSION:
        raise InputError(
            f"{path} has an unknown format version", got=version, allowed=names.FORMAT_VERSION, do=lower_again
        )
    for name, file, end in _external_ranges(model, path.parent):
        if not file.is_file():
            raise InputError(
                f"{path} needs the weights in {file}, which is not there",
                do="Move the .onnx file together with the folder of its weights",
            )
        if file.stat().st_size < end:
            raise InputError(
                f"{file} is cut off: tensor {name} of {path} ends behind its end",
                got=f"{file.stat().st_size} bytes",
                allowed=f"at least {end} bytes",
                do=f"Copy the file again. {lower_again}",
            )
    return model


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _external_ranges(model: onnx.ModelProto, folder: Path) -> Iterator[tuple[str, Path, int]]:
    """(tensor, file, end of its bytes) of every external initializer."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            yield tensor.name, folder / entry["location"], int(entry["offset"]) + int(entry["length"])
