"""What the commands do: compress → lower → record → judge, each step resumable or repeatable by itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sslc_common.errors import PASSED, InputError, MissingError
from sslc_common.files import atomic_path
from sslc_export import console
from sslc_export.model import longest_sequence, resolve
from sslc_export.recipe import CompressCommand, CompressRecipe, ExportRecipe, save_recipe
from sslc_export.validation import judge, require_known

if TYPE_CHECKING:
    from compress.options import CompressOptions
    from compress.report import CompressReport

HEAD = "lm_head"  # in every supported architecture
_CALIBRATION = Path(__file__).parent / "data" / "calibration.txt"


def export(recipe: ExportRecipe) -> int:
    """Builds an engine and validates it; returns the exit code.

    Raises:
        InputError: bad input.
        MissingError: the engine's backend is not here.
    """
    out = Path(recipe.out)
    require_known(out)
    graph = out.with_suffix(".onnx")  # a plan's too: it stays beside the plan, and runs on CPUs
    for path in (out, graph):
        if path.exists() and not recipe.overwrite:
            raise InputError(f"{path} exists already", do="Choose another --out, or pass --overwrite")
    if out.suffix != ".plan" and (recipe.target or recipe.triton):
        raise InputError("--target and --triton are for TensorRT", got=out, allowed="an --out that ends in .plan")
    source = resolve(recipe.model)
    if out.suffix == ".plan":
        _require_kept_head(source, recipe)
    if recipe.int8_activations:
        _require_integer_values(source, recipe)
    if recipe.predict_only:
        return _predict(source, recipe)
    # Only now what takes seconds to import: a wrong path is answered at once.
    from sslc_export import plans
    from sslc_export.lowering.lower import lower
    from sslc_export.record import write_record

    shapes = plans.shapes_for(recipe, longest_sequence(source)) if out.suffix == ".plan" else None
    checkpoint, dense = _compressed(source, recipe, out)
    with console.stage(f"lower {checkpoint} to {graph}"):
        lowered = lower(checkpoint, graph, console.progress, int8_activations=recipe.int8_activations)
    plan = plans.build(lowered, out, recipe, shapes) if shapes else None
    write_record(out, checkpoint, lowered, recipe, plan)
    save_recipe(recipe, out.with_suffix(".recipe.yaml"))
    if recipe.skip_validation:
        console.note(f"{out} was built; nothing was validated")
        return PASSED
    return judge(out, dense, recipe)


def compress_only(recipe: CompressCommand) -> int:
    """Compresses a model; returns the exit code."""
    source = resolve(recipe.model)
    from compress.format import Checkpoint

    if Checkpoint.open(source).layers:
        raise InputError(f"{recipe.model} is compressed already", do="Start from the dense model")
    _compress(source, Path(recipe.out), recipe)
    return PASSED


def _predict(source: Path, recipe: ExportRecipe) -> int:
    """Prints what a build would bring on this machine; returns the exit code."""
    if Path(recipe.out).suffix != ".onnx":
        raise InputError("Only engines for CPUs are predicted", got=recipe.out, allowed="an --out that ends in .onnx")
    from compress.format import Checkpoint
    from sslc_export.machine import measure_machine
    from sslc_export.prediction import HEADER, predict_build, predict_checkpoint

    console.quiet_transformers()
    machine = measure_machine(recipe.threads)
    if Checkpoint.open(source).layers:
        predicted = predict_checkpoint(source, machine)
    else:
        predicted = predict_build(source, _options(recipe), machine, compress_slower=recipe.compress_slower)
    console.table(
        f"{recipe.model} on this machine: {machine.threads} threads, {machine.bandwidth / 1e9:.1f} GB/s read, "
        f"{machine.peak / 1e9:.0f} dense f32 GFLOP/s, {machine.kernel} kernel; times as fast as dense",
        HEADER,
        predicted.table(),
    )
    for reason, count in predicted.reasons().items():
        console.note(f"dense: {count} layers, {reason}")
    return PASSED


def _slower(source: Path, recipe: ExportRecipe) -> dict[str, str]:
    """Layers that our kernel on this machine is predicted to run slower than dense ones, and why."""
    from plugins_ort import library
    from sslc_export.machine import Machine
    from sslc_export.prediction import predict_build

    try:
        kernel = library.kernel_name()
    except MissingError:
        return {}  # the ONNX body decodes S once and is then as fast as dense
    # Which of two ways is slower depends neither on the bandwidth nor on the peak.
    machine = Machine(bandwidth=1, peak=1, threads=1, kernel=kernel)
    return predict_build(source, _options(recipe), machine, compress_slower=True).slower()


def _require_kept_head(source: Path, recipe: ExportRecipe) -> None:
    """Refuses an int8 head for TensorRT, whether asked for or in a model that is compressed already."""
    from compress.format import Checkpoint

    blocks = Checkpoint.open(source)
    if recipe.head != "keep" or blocks.embeddings or HEAD in blocks.layers:
        raise InputError(
            "TensorRT plans take no int8 head",
            got="--head int8" if recipe.head != "keep" else f"{recipe.model}, which has one",
            allowed="a dense head, which the plan stores in 16 bits",
            do="Leave --head out, or build an engine.onnx",
        )


def _require_integer_values(source: Path, recipe: ExportRecipe) -> None:
    """Refuses 8-bit activations where no layer could use them."""
    from compress.format import Checkpoint
    from compress.options import QUANTIZED

    layers = Checkpoint.open(source).layers.values()
    stored = {layer.dtype for layer in layers}
    if not stored & {"I8", "U8"} and (stored or _options(recipe).values_dtypes.isdisjoint(QUANTIZED)):
        raise InputError(
            "8-bit activations are for layers with int8 or int4 values",
            got=f"{', '.join(sorted(stored))} in {recipe.model}" if stored else f"--values-dtype {recipe.values_dtype}",
            do="Leave --int8-activations out, or store the values as int8 or int4",
        )


def _compressed(source: Path, recipe: ExportRecipe, out: Path) -> tuple[Path, Path | None]:
    """The compressed folder to lower, below the engine's folder, and the dense folder if there is one.

    It is made now if `--model` is dense, and copied if it lies elsewhere: engine and weights move together.
    """
    from compress.format import Checkpoint

    dense = resolve(recipe.reference) if recipe.reference else None
    checkpoint = out.with_suffix("")
    if not Checkpoint.open(source).layers:
        slower = {} if out.suffix == ".plan" or recipe.compress_slower else _slower(source, recipe)
        _compress(source, checkpoint, recipe, slower)
        return checkpoint, dense or source
    if source.resolve().is_relative_to(out.parent.resolve()):
        return source, dense
    if checkpoint.exists() and not recipe.overwrite:
        raise InputError(f"{checkpoint} exists already", do="Choose another --out, or pass --overwrite")
    with console.stage(f"copy {source} to {checkpoint}"), atomic_path(checkpoint) as temporary:
        shutil.copytree(source, temporary)
    return checkpoint, dense


def _options(recipe: CompressRecipe) -> CompressOptions:
    from compress.options import CompressOptions

    fields = recipe.model_dump(include=set(CompressRecipe.model_fields))
    fields["calibration"] = tuple(fields["calibration"]) or (str(_CALIBRATION),)
    fields |= {name: tuple(fields[name]) for name in ("exclude", "values_of")}
    return CompressOptions(**fields)


def _compress(
    source: Path, out: Path, recipe: CompressRecipe, kept_dense: dict[str, str] | None = None
) -> CompressReport:
    from compress.forecast import forecast
    from compress.pipeline import compress_model
    from compress.source import Source

    console.quiet_transformers()
    options = _options(recipe)
    if reason := (kept_dense or {}).pop(HEAD, None):
        console.note(f"{HEAD} is kept as it is: {reason}")
        options = replace(options, head="keep")
    console.forecast(forecast(Source.open(source), options), options.tuning_minutes)
    with console.stage(f"compress {source} to {out}"):
        report = compress_model(source, out, options, kept_dense=kept_dense, progress=console.progress)
    console.compression(report)
    return report
