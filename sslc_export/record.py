"""engine.json, the build record: what an engine was made of, by which versions, and how large it is."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslc_common.errors import InputError
from sslc_common.files import atomic_path, sha256
from sslc_export import __version__
from sslc_export.recipe import ExportRecipe

if TYPE_CHECKING:
    from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
    from sslc_export.engines.tensorrt import BuildReport
    from sslc_export.lowering.lower import LoweringReport
    from validate.engine import Engine
    from validate.size import SizeLedger
    from validate.verdict import EngineRecord, LayerRecord

RECORD_VERSION = 1


@dataclass(frozen=True)
class Opened:
    """An engine to validate, as it runs.

    Attributes:
        engine: The compressed one.
        dense: Its dense twin, if there is one.
        sizes: Of both.
        about: What the record says about the engine.
        batch: Sequences to give it at a time, so that its batches are tested if it takes any.
    """

    engine: Engine
    dense: Engine | None
    sizes: SizeLedger
    about: EngineRecord
    batch: int = 2


_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors")


def record_path(engine: Path) -> Path:
    """Where the record of an engine is: engine.onnx and engine.plan → engine.json."""
    return engine.with_suffix(".json")


def write_record(
    engine: Path, checkpoint: Path, lowered: LoweringReport, recipe: ExportRecipe, plan: BuildReport | None = None
) -> None:
    """Writes the record beside the engine. The same inputs and versions give the same bytes: it holds no date.

    With a plan the record describes two engines: the plan, and the .onnx beside it that it was built from.
    """
    folder = engine.parent
    files = [lowered.path, *lowered.external_files, *([plan.path] if plan else [])]
    record = {
        "record_version": RECORD_VERSION,
        "engine": engine.name,
        "runtime": plan.runtime if plan else "onnxruntime",
        "model": recipe.model,
        "checkpoint": _relative(checkpoint, folder),
        "int8_activations": recipe.int8_activations,
        "kernel_layers": list(lowered.kernel_layers),
        "dense_layers": list(lowered.dense_layers),
        "op_counts": lowered.op_counts,
        "files": {_relative(file, folder): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        "versions": {"sslc-export": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    if plan:
        from sslc_export import plans

        record["tensorrt"] = plans.describe(plan, lowered, _report(checkpoint))
    with atomic_path(record_path(engine)) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_record(engine: Path) -> dict[str, Any]:
    """Reads an engine's record and checks that it belongs to the engine beside it.

    Raises:
        InputError: it is missing, damaged, of another version, or of another engine.
    """
    path = record_path(engine)
    rebuild = "Build the engine again with sslc-export"
    if not path.is_file():
        raise InputError(f"{engine} has no build record {path.name} beside it", do=rebuild)
    try:
        record = json.loads(path.read_bytes())
        version, files = record["record_version"], record["files"]
        checkpoint, digest = record["checkpoint"], files.get(engine.name, {}).get("sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"The build record {path} is damaged", got=repr(error), do=rebuild) from error
    if version != RECORD_VERSION:
        raise InputError(
            f"The build record {path} has an unknown version", got=version, allowed=str(RECORD_VERSION), do=rebuild
        )
    if sha256(engine) != digest:
        raise InputError(f"{engine} is not the engine that {path.name} describes", got="another SHA-256", do=rebuild)
    for name, entry in files.items():
        file = engine.parent / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            raise InputError(
                f"{file}, a weight file of {engine.name}, is not the one it was built with",
                got="no such file" if size is None else f"{size} bytes",
                allowed=f"{entry['bytes']} bytes",
                do=f"Move the engine with its folder, or {rebuild[0].lower()}{rebuild[1:]}",
            )
    if not (engine.parent / checkpoint / "config.json").is_file():
        raise InputError(
            f"The compressed model of {engine} is missing",
            got=engine.parent / checkpoint,
            do=f"Move the engine with its folder, or {rebuild[0].lower()}{rebuild[1:]}",
        )
    return dict(record)


def engine_record(record: dict[str, Any], engine: OnnxRuntimeEngine, path: Path) -> EngineRecord:
    """The part of the record that a verdict repeats; layers in our kernel are those of the open session."""
    from validate.verdict import EngineRecord

    return EngineRecord(
        name=path.name,  # the record may be of a plan, too, that this graph stands beside
        kernel_layers=engine.kernel_layers,
        dense_layers=engine.dense_layers,
        build_record=str(record_path(path)),
        kernel=engine.kernel,
        fallback_reason=engine.fallback_reason,
        build=build_facts({**record, "runtime": "onnxruntime"}, path.parent / record["checkpoint"]),
    )


def build_facts(record: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What a report shows of the build record and of the compression: all but the lists of layers."""
    lists = ("kernel_layers", "dense_layers")
    facts = {name: value for name, value in record.items() if name not in (*lists, "record_version", "engine")}
    if "tensorrt" in facts:
        facts["tensorrt"] = {
            name: value for name, value in facts["tensorrt"].items() if name not in ("layers", "dense_layers")
        }
    return facts | {"compression": {name: value for name, value in _report(checkpoint).items() if name != "layers"}}


def layer_records(checkpoint: Path) -> list[LayerRecord]:
    """The compression report of a compressed folder, as the verdict's layer table."""
    from validate.verdict import LayerRecord

    report = _report(checkpoint)
    rows = report["layers"] + ([report["head"]] if report["head"] else [])
    names = ("name", "rank", "density", "bytes", "dense_bytes", "error", "dense_reason")
    return [LayerRecord(**{name: row[name] for name in names}) for row in rows]


def ledger(record: dict[str, Any], engine: Path, twin: LoweringReport | None, threads: int | None) -> SizeLedger:
    """Engine, checkpoint, layer and memory bytes, beside those of the dense twin."""
    from sslc_export.engines.memory import engine_memory
    from validate.size import Bytes, SizeLedger, file_bytes

    files = [engine.parent / name for name in record["files"] if not name.endswith(".plan")]
    layers = layer_records(engine.parent / record["checkpoint"])
    ours, theirs = engine_memory(engine, threads), engine_memory(twin.path, threads) if twin else None
    return SizeLedger(
        engine=Bytes(file_bytes([twin.path, *twin.external_files]) if twin else None, file_bytes(files)),
        layers=Bytes(sum(row.dense_bytes for row in layers), sum(row.bytes for row in layers)),
        checkpoint=Bytes(
            file_bytes(twin.external_files) if twin else None, file_bytes(f for f in files if f != engine)
        ),
        memory=Bytes(theirs.resident if theirs else None, ours.resident),
        mapped=Bytes(theirs.mapped if theirs else None, ours.mapped),
        kv_cache=Bytes(theirs.kv_cache if theirs else None, ours.kv_cache),
    )


def _report(checkpoint: Path) -> dict[str, Any]:
    from compress.pipeline import REPORT

    return dict(json.loads((checkpoint / REPORT).read_bytes()))


def _relative(path: Path, folder: Path) -> str:
    return path.resolve().relative_to(folder.resolve()).as_posix()
