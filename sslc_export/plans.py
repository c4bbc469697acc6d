"""What the commands do for engine.plan beyond what they do for engine.onnx: build it with TensorRT, and judge it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.format import Checkpoint
from plugins_trt import library
from sslc_common.errors import InputError
from sslc_export import console
from sslc_export.engines import tensorrt
from sslc_export.engines.triton import write_repository
from validate import run
from validate.limits import Limit, Limits
from validate.size import Bytes, SizeLedger
from validate.verdict import EngineRecord, Verdict

if TYPE_CHECKING:
    from sslc_export.lowering.lower import LoweringReport
    from sslc_export.recipe import PlanRecipe
    from sslc_export.record import Opened

_CONTEXT = 2048

# Between a float32 reference and an engine that rounds activations to 11 (8) bits some ten times per block. Wide, since
# no GPU has measured it: a fault in a layer is far above it all the same.
_RELATIVE_L2 = {"f16": 0.02, "bf16": 0.15}


def shapes_for(recipe: PlanRecipe, longest: int) -> tensorrt.Shapes:
    """What the plan must take, and that it can be built here: all that can be checked before hours of compression.

    Args:
        recipe: How it is built.
        longest: Most tokens that the model can take.

    Raises:
        InputError: a target is not supported, or the context too long.
        MissingError: TensorRT or the plugin is not here.
    """
    tensorrt.require_backend(recipe.target)
    context = recipe.max_context or min(_CONTEXT, longest)
    if context > longest:
        raise InputError("--max-context is longer than the model can take", got=context, allowed=f"at most {longest}")
    return tensorrt.Shapes(batch=recipe.max_batch, prefill=min(recipe.max_prompt, context), context=context)


def build(lowered: LoweringReport, out: Path, recipe: PlanRecipe, shapes: tensorrt.Shapes) -> tensorrt.BuildReport:
    """Builds the plan, and the Triton repository if it is asked for; says what it came to."""
    with console.stage(f"build {out}"):
        built = tensorrt.build(
            lowered.path, out, targets=recipe.target, type=recipe.activations, shapes=shapes, progress=console.progress
        )
    if recipe.triton:
        folder, plugin = Path(recipe.triton), library.library_path()
        write_repository(out, lowered.path, folder, type=recipe.activations, plugin=plugin)
        console.note(f"{folder} is a model repository for Triton; its README.md says how to serve it")
    size = built.size
    console.note(
        f"{out}: {len(built.layers)} of {len(lowered.kernel_layers)} compressed layers in the plugin; "
        f"{size.total / 1e6:.1f} MB, predicted {built.predicted.total / 1e6:.1f} (weights {size.weights / 1e6:.1f}, "
        f"plugin {size.plugin / 1e6:.1f}, source of TensorRT's kernels {size.kernel_source / 1e6:.1f}); packed in "
        f"{built.seconds['pack']:.0f} s, built in {built.seconds['build']:.0f} s with at most "
        f"{built.peak_bytes / 2**30:.1f} GiB of memory"
    )
    return built


def describe(built: tensorrt.BuildReport, lowered: LoweringReport, report: dict[str, Any]) -> dict[str, Any]:
    """The `tensorrt` part of a build record.

    Args:
        built: What was built.
        lowered: From what.
        report: The compression report, as JSON.
    """
    reasons = {row["name"]: row["dense_reason"] for row in report["layers"]}
    return {
        "version": built.version,
        "targets": list(built.targets),
        "activations": built.type,
        "shapes": asdict(built.shapes),
        "profiles": built.profiles,
        "plugin": built.plugin,
        "repeatable": built.repeatable,
        "size": asdict(built.size),
        "predicted_size": asdict(built.predicted),
        "layers": [asdict(layer) for layer in built.layers],
        "dense_layers": {name: reasons.get(name) or "outside the blocks" for name in lowered.dense_layers},
    }


def why_not_executed() -> str | None:
    """Why plans cannot run here; None if they can."""
    import torch

    return None if torch.cuda.is_available() else "built, not executed: no CUDA device"


def limits_of(limits: Limits, described: dict[str, Any]) -> Limits:
    """The limits, with the tolerance of 16-bit activations where the user gave none."""
    if "max_relative_l2" in limits.model_fields_set:
        return limits
    type = described["activations"]
    reason = f"activations are {type}; the reference computes in float32"
    return limits.model_copy(update={"max_relative_l2": Limit(value=_RELATIVE_L2[type], reason=reason)})


def unexecuted(reason: str, path: Path, record: dict[str, Any], twin: LoweringReport | None, limits: Limits) -> Verdict:
    """The verdict on a plan that cannot run here: its structure is checked and its size compared, nothing else."""
    from sslc_export.record import layer_records

    _, sizes, about = _examine(path, record, twin)
    layers = layer_records(path.parent / record["checkpoint"])
    return run.unexecuted(reason, record=about, limits=limits, sizes=sizes, layers=layers)


def open_engines(path: Path, record: dict[str, Any], twin: LoweringReport | None, threads: int | None) -> Opened:
    """The plan and its dense twin on the GPU; `threads` are of CPUs, and not used."""
    import numpy as np
    import torch

    from sslc_export.engines.tensorrt_runtime import TensorRTEngine
    from sslc_export.record import Opened

    def opened(plan: Path, name: str) -> tuple[TensorRTEngine, int]:
        """An engine that has run one token, and the memory of the GPU that this took."""
        free = torch.cuda.mem_get_info()[0]
        engine = TensorRTEngine(plan, name=name)
        engine.run(np.zeros((1, 1), np.int64))
        return engine, max(0, free - torch.cuda.mem_get_info()[0])

    twin_plan, sizes, about = _examine(path, record, twin)
    engine, taken = opened(path, "compressed")
    dense, taken_dense = opened(twin_plan, "dense") if twin_plan else (None, None)
    sizes = replace(
        sizes,
        gpu=Bytes(taken_dense, taken),
        kv_cache=Bytes(dense.kv_cache_bytes if dense else None, engine.kv_cache_bytes),
    )
    return Opened(engine, dense, sizes, about, min(Opened.batch, record["tensorrt"]["shapes"]["batch"]))


def _examine(
    path: Path, record: dict[str, Any], twin: LoweringReport | None
) -> tuple[Path | None, SizeLedger, EngineRecord]:
    """Checks a plan's structure and builds its dense twin; returns the twin's plan, the sizes, the record's facts."""
    from sslc_export.record import build_facts, record_path

    described = record["tensorrt"]
    _require_structure(path, described, Checkpoint.open(path.parent / record["checkpoint"]))
    dense = _build_twin(twin.path, described) if twin else None
    layers = described["layers"]
    # Weight and bias dense, in 16 bits and in 32 as in the plan.
    dense_layers = sum(2 * layer["out_features"] * layer["in_features"] + 4 * layer["out_features"] for layer in layers)
    sizes = SizeLedger(
        engine=Bytes(dense.size.total if dense else None, described["size"]["total"]),
        layers=Bytes(dense_layers, sum(layer["nbytes"] for layer in layers)),
    )
    about = EngineRecord(
        path.name,
        len(layers),
        len(described["dense_layers"]),
        str(record_path(path)),
        build=build_facts(record, path.parent / record["checkpoint"]),
    )
    return dense.path if dense else None, sizes, about


def _build_twin(dense: Path, described: dict[str, Any]) -> tensorrt.BuildReport:
    """Builds the dense model as the engine was built, beside its graph."""
    targets = [target for target in described["targets"] if target != tensorrt.DEFAULT_TARGET]
    with console.stage("build the dense engine for comparison"):
        return tensorrt.build(
            dense,
            dense.with_suffix(".plan"),
            targets=targets,
            type=described["activations"],
            shapes=tensorrt.Shapes(**described["shapes"]),
            progress=console.progress,
        )


def _require_structure(engine: Path, described: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Checks that the plan has one plugin layer for each compressed layer, of its shape.

    The builder has checked that TensorRT made them our plugin, with the right outputs; the record names these layers.

    Raises:
        InputError: the plan was built from another model.
    """
    there = {
        layer["name"]: (layer["out_features"], layer["in_features"], layer["rank"]) for layer in described["layers"]
    }
    wanted = {name: (layer.N, layer.K, layer.rank) for name, layer in checkpoint.layers.items()}
    different = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    if different:
        raise InputError(
            f"{engine} does not have the layers of its compressed model",
            got=f"{different[0]} with N, K, r = {there.get(different[0])}",
            allowed=str(wanted.get(different[0])),
            do="Build the engine again with sslc-export",
        )
    console.note(
        f"{engine}: all {len(wanted)} compressed layers are the plugin's, in {described['activations']}, shapes checked"
    )
