"""Builds TensorRT engines from lowered models.

TensorRT-RTX builds for GPUs that are not there (sm_80, 86, 89, 120); TensorRT builds for the GPU it finds. No timing
takes part in what TensorRT-RTX writes on a machine without a GPU, and the same model gives the same bytes. TensorRT
times kernels; what it measured is kept in the cache folder, so that the next build on the same GPU chooses the same.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from plugins_trt import library
from sslc_common.errors import InputError, MissingError
from sslc_common.files import atomic_path, require_space, sha256
from sslc_export.cache import cache_folder
from sslc_export.engines import tensorrt_builder
from sslc_export.engines.tensorrt_graph import PluginNode, choose_layouts, load, rewrite
from sslc_export.engines.tensorrt_size import PlanSize, count, predict

DEFAULT_TARGET = "default"

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Shapes:
    """What the engine must be able to take.

    Attributes:
        batch: Most sequences at a time.
        prefill: Most new tokens per sequence in one call.
        context: Most tokens in all, past and new.
    """

    batch: int = 1
    prefill: int = 512
    context: int = 2048


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Attributes:
        path: The .plan file.
        runtime: "tensorrt_rtx" or "tensorrt".
        version: The runtime's version.
        targets: GPU architectures, ("sm_86", ...), or (DEFAULT_TARGET,).
        plugin: SHA-256 of the plugin library inside the plan, and its headers' version; None if no layer needs it.
        layers: The layers that run in the plugin.
        shapes: What the engine takes.
        profiles: Least, usual and largest shape of each input, per optimization profile.
        type: "f16" or "bf16": activations and dense weights.
        size: Of the plan, in parts.
        predicted: The same, from the lowered model's shapes and masks before anything was packed or built.
        repeatable: Building again gives the same bytes.
        seconds: Seconds for packing, and for parsing and building.
        peak_bytes: Most memory that the building process had.
    """

    path: Path
    runtime: str
    version: str
    targets: tuple[str, ...]
    plugin: dict[str, str] | None
    layers: tuple[PluginNode, ...]
    shapes: Shapes
    profiles: list[dict[str, list[list[int]]]]
    type: str
    size: PlanSize
    predicted: PlanSize
    repeatable: bool
    seconds: dict[str, float]
    peak_bytes: int


def build(
    model: Path,
    out: Path,
    *,
    targets: Iterable[str] = (),
    type: str = "f16",
    shapes: Shapes | None = None,
    plugin: Path | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> BuildReport:
    """Builds an engine from a lowered model, dense or compressed.

    Args:
        model: The .onnx file that `sslc_export.lowering` wrote.
        out: The .plan file to write.
        targets: GPU architectures such as "sm_86". Empty: what the library does by default; mainline TensorRT builds
            for the GPU of this machine.
        type: "f16" or "bf16".
        shapes: What the engine must take.
        plugin: The plugin library; None for the installed one.
        progress: Shows the steps.

    Raises:
        InputError: an unsupported target or type, a weight that does not fit the type, no space.
        MissingError: TensorRT, the plugin or a GPU is missing.
        RuntimeError: TensorRT refused a graph that it should take.
    """
    out, shapes, targets = Path(out), shapes or Shapes(), tuple(targets)
    if out.suffix != ".plan":
        raise InputError(f"{out} is not a name for a TensorRT engine", got=out.suffix or "no suffix", allowed=".plan")
    if not 0 < shapes.prefill <= shapes.context or shapes.batch < 1:
        raise InputError(
            "The engine's shapes do not make sense", got=shapes, allowed="1 ≤ prefill ≤ context, batch ≥ 1"
        )
    if type not in ("f16", "bf16"):
        raise InputError("TensorRT engines have no such type", got=type, allowed="f16 or bf16")
    trt, plugin = require_backend(targets, plugin)
    out.parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    lowered = load(model)
    choices = choose_layouts(lowered, progress)
    predicted = predict(lowered.graph, choices, runtime=trt.__name__, plugin=plugin.stat().st_size)
    require_space(out, predicted.weights + predicted.total)  # the weights are packed into a file beside the plan
    # Beside the engine: there is space, and its weights may be large for /tmp.
    folder = Path(tempfile.mkdtemp(prefix=f".{out.stem}-", dir=out.parent))
    try:
        with atomic_path(out) as temporary:
            layers = rewrite(lowered, folder / "model.onnx", choices, type=type, progress=progress)
            seconds["pack"] = time.perf_counter() - start
            start = time.perf_counter()
            job = {
                "plugin": str(plugin),
                "nodes": _outputs(layers),
                "type": type,
                "shapes": asdict(shapes),
                "targets": targets,
                "timing_cache": str(cache_folder() / "tensorrt-timing.cache"),
            }
            (folder / "job.json").write_text(json.dumps(job))
            steady, built = _run_builder(folder, trt.__name__)
            seconds["build"] = time.perf_counter() - start
            weights, plugin_bytes = (folder / "model.bin").stat().st_size, predicted.plugin
            size = count(folder / "engine.plan", weights=weights, plugin=plugin_bytes)
            (folder / "engine.plan").replace(temporary)
    finally:
        shutil.rmtree(folder)
    return BuildReport(
        path=out,
        runtime=trt.__name__,
        version=trt.__version__,
        targets=targets or (DEFAULT_TARGET,),
        plugin={"sha256": sha256(plugin), "headers": library.headers_version(plugin)} if layers else None,
        layers=layers,
        shapes=shapes,
        profiles=built["profiles"],
        type=type,
        size=size,
        predicted=predicted,
        repeatable=steady,
        seconds=seconds,
        peak_bytes=built["peak_bytes"],
    )


def require_backend(targets: Iterable[str] = (), plugin: Path | None = None) -> tuple[ModuleType, Path]:
    """TensorRT and the plugin library, checked before any work is done.

    Raises:
        InputError: a target is not supported.
        MissingError: TensorRT or the plugin is not here.
    """
    trt = tensorrt_builder.tensorrt()
    tensorrt_builder.capabilities(trt, list(targets))
    plugin = plugin or library.library_path()
    library.require_headers(trt, plugin)
    library.load_alias(trt, plugin.parent)
    return trt, plugin


def _outputs(layers: Iterable[PluginNode]) -> dict[str, list[int]]:
    """What `require_plugin_layers` expects: plugin node → out_features of its outputs."""
    nodes: dict[str, list[int]] = {}
    for layer in layers:
        nodes.setdefault(layer.node, []).append(layer.out_features)
    return nodes


def _run_builder(folder: Path, module: str) -> tuple[bool, dict[str, Any]]:
    """Builds in a fresh process.

    Returns:
        Whether the process had a repeatable memory layout, and so the plan has repeatable bytes; what it says it built.

    Some containers forbid to switch address randomisation off. The engine is as good without, but its bytes differ.
    """
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "SSLC_TENSORRT": module}
    # Memory must be laid out the same whatever the threads' timing: an arena for each thread, and blocks of any size
    # from the arenas. Counted on a busy machine: 34 of 34 builds alike so, but 7 of 14 with a single arena.
    environment |= {
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "64",
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TOP_PAD_": str(1 << 30),
    }
    command = [sys.executable, "-P", "-m", "sslc_export.engines.tensorrt_builder"]
    with _no_address_randomisation() as steady:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if (folder / "error.json").is_file():
        raise _error(json.loads((folder / "error.json").read_bytes()))
    if done.returncode != 0:
        raise RuntimeError(f"{module} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return steady, json.loads((folder / "built.json").read_bytes())


def _error(described: dict[str, Any]) -> Exception:
    kind = described.pop("kind")
    if kind == "OSError":
        return OSError(described["errno"], described["text"])
    if kind == "RuntimeError":
        return RuntimeError(described["text"])
    return (InputError if kind == "InputError" else MissingError)(described.pop("fact"), **described)


@contextmanager
def _no_address_randomisation() -> Iterator[bool]:
    """Processes started in the block have the same memory layout each time, if it yields True."""
    if sys.platform != "linux":
        yield False
        return
    personality = ctypes.CDLL(None).personality
    before = personality(0xFFFFFFFF)  # only asks
    allowed = before >= 0 and personality(before | 0x0040000) >= 0  # ADDR_NO_RANDOMIZE
    try:
        yield allowed
    finally:
        if allowed:
            personality(before)
