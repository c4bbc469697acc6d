"""Judging an engine: what the validator asks for, gathered from the engine's folder and the user's wishes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslc_common.errors import PASSED, InputError
from sslc_export import console
from sslc_export.model import longest_sequence, resolve
from sslc_export.recipe import ValidateCommand, ValidateRecipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sslc_export.engines.probes import OnnxRuntimeProbe, TorchProbe
    from sslc_export.lowering.lower import LoweringReport
    from sslc_export.record import Opened
    from validate.latency import LatencyOptions
    from validate.limits import Limits
    from validate.run import Scorer
    from validate.verdict import EngineRecord, Verdict

_HELD_OUT = Path(__file__).parent / "data" / "held_out.txt"
_LIMITS = (
    "max_perplexity_ratio",
    "min_harness_recovery",
    "min_decode_speedup",
    "min_prefill_speedup",
    "max_size_ratio",
)
_HARNESS_LENGTH = 2048  # tokens of a harness request, where the model can; what HFLM takes where it does not know
_EXPLAIN_TOKENS = 64
_HELD_OUT_LENGTH = 512  # tokens that a prediction may look back on, where the model can
_QUANTIZED_TOLERANCE = 1e-3  # 2e-5 were seen in a layer, 2e-4 in the logits of tiny models; a fault is far above it
_INT8_TOLERANCE = 8e-2  # 6e-3 were seen in a layer, 2.7e-2 in the logits of SmolLM2-135M
_BF16_TOLERANCE = 2e-2  # 1.7e-3 is what rounding to bfloat16 does to a layer


def validate_only(recipe: ValidateCommand) -> int:
    """Validates an engine that was built before; returns the exit code."""
    engine = Path(recipe.engine)
    if not engine.is_file():
        raise InputError(f"There is no engine {engine}", allowed="the .onnx or .plan file that sslc-export wrote")
    require_known(engine)
    from validate.baseline import read_baseline

    if recipe.baseline:
        read_baseline(Path(recipe.baseline))  # a wrong path is answered before minutes of measuring
    if recipe.explain:
        return _explain(engine, recipe.explain, recipe)
    dense = resolve(recipe.reference) if recipe.reference else None
    return judge(engine, dense, recipe)


def judge(engine: Path, dense: Path | None, recipe: ValidateRecipe) -> int:
    """Validates an engine, writes the report and says what it came to; returns the exit code.

    Args:
        engine: The .onnx or .plan file, its build record beside it.
        dense: The folder of the dense model to compare with; None for none.
        recipe: How.

    Raises:
        InputError: bad input.
        MissingError: the engine's backend is not here.
    """
    return _report(_validate(engine, dense, recipe), recipe, engine)


def _explain(path: Path, layer: str, recipe: ValidateCommand) -> int:
    """Writes one layer of an engine as a reproducer; returns the exit code."""
    if path.suffix != ".onnx":
        raise InputError("Only layers of .onnx engines can be taken out", got=path, do="Give the .onnx beside the plan")
    import numpy as np
    import torch

    import compress
    from compress.calibration import read_tokens
    from sslc_export.explain import explain
    from sslc_export.record import read_record

    console.quiet_transformers()
    checkpoint = path.parent / read_record(path)["checkpoint"]
    length = min(_EXPLAIN_TOKENS, longest_sequence(checkpoint))
    texts = recipe.held_out or [str(_HELD_OUT)]
    text = read_tokens(texts, checkpoint, tokens=length, length=length, seed=0, what="held-out")
    model = compress.load(checkpoint, dtype=torch.float32)
    out = (Path(recipe.report) if recipe.report else path.parent / "report") / "explain" / layer
    errors = explain(*_probes(path, model, None, recipe.threads), layer, np.asarray(text), out)
    console.note("; ".join(f"{name}: relative L2 {error:.1e}" for name, error in errors.items()))
    console.note(f"{out} holds {layer} as model.onnx with data.npz; run.py runs it")
    return PASSED


def require_known(engine: Path) -> None:
    """Refuses suffixes that name no engine."""
    if engine.suffix not in (".onnx", ".plan"):
        raise InputError(
            f"The suffix of {engine} names no engine",
            got=engine.suffix or "no suffix",
            allowed=".onnx for ONNX Runtime on CPUs, .plan for TensorRT",
        )


def _validate(path: Path, dense: Path | None, recipe: ValidateRecipe) -> Verdict:
    """Compares an engine with its own PyTorch model and, if there is one, with the dense model's engine."""
    import numpy as np
    import torch

    import compress
    from compress.calibration import read_tokens
    from compress.layer import keep_decoded
    from sslc_export import plans
    from sslc_export.engines.pytorch import TorchEngine
    from sslc_export.lowering.lower import lower
    from sslc_export.record import layer_records, read_record
    from validate.limits import load_limits
    from validate.numerics import NumericsOptions
    from validate.run import Options, validate

    console.quiet_transformers()
    limits = load_limits(Path(recipe.limits) if recipe.limits else None, recipe.model_dump(include=set(_LIMITS)))
    record = read_record(path)
    checkpoint = path.parent / record["checkpoint"]
    longest, largest_batch = longest_sequence(checkpoint), None
    if path.suffix == ".plan":
        longest = min(longest, record["tensorrt"]["shapes"]["prefill"])
        largest_batch = record["tensorrt"]["shapes"]["batch"]
    latency = _latency_options(longest, largest_batch, recipe)
    held_out = read_tokens(
        recipe.held_out or [str(_HELD_OUT)],
        checkpoint,
        tokens=recipe.held_out_tokens,
        length=min(_HELD_OUT_LENGTH, longest),
        seed=0,
        what="held-out",
    )
    if dense is not None:
        _require_same_tokenizer(checkpoint, dense, held_out)
    harness = _harness(checkpoint, min(_HARNESS_LENGTH, longest), recipe)
    # The dense twin is lowered where the engine is: there is space, and its weights may be large for /tmp.
    with tempfile.TemporaryDirectory(prefix=".dense-", dir=path.parent) as folder:
        twin = None
        if dense is not None:
            with console.stage(f"lower {dense} for comparison"):
                twin = lower(dense, Path(folder) / "dense.onnx", console.progress)
        if path.suffix == ".plan":
            limits = plans.limits_of(limits, record["tensorrt"])
            if reason := plans.why_not_executed():
                return plans.unexecuted(reason, path, record, twin, limits)
        with console.stage("validate"):
            model = compress.load(checkpoint, dtype=torch.float32)  # first: it verifies every tensor
            keep_decoded(model)
            opened = (plans.open_engines if path.suffix == ".plan" else _open_engines)(
                path, record, twin, recipe.threads
            )
            if path.suffix != ".plan":
                limits = _limits_of_values(
                    limits, checkpoint, opened.about.kernel, record.get("int8_activations", False)
                )
            return validate(
                opened.engine,
                dense=opened.dense,
                reference=TorchEngine(model),
                probes=None if path.suffix == ".plan" else partial(_probes, path, model, dense, recipe.threads),
                held_out=np.asarray(held_out),
                harness=harness,
                text=np.asarray(held_out)[: opened.batch],
                limits=limits,
                options=Options(NumericsOptions(padded_rows=opened.batch), latency),
                sizes=opened.sizes,
                record=opened.about if twin is None else _with_prediction(opened.about, checkpoint, recipe.threads),
                layers=layer_records(checkpoint),
                skip=_left_out(latency, largest_batch, recipe),
                progress=console.progress,
            )


def _with_prediction(about: EngineRecord, checkpoint: Path, threads: int | None) -> EngineRecord:
    """What is known of an engine, with the speed that was to be expected of it on this machine."""
    from plugins_ort.library import KERNELS
    from sslc_export.machine import measure_machine
    from sslc_export.prediction import predict_checkpoint

    if about.kernel not in KERNELS:
        return about
    predicted = predict_checkpoint(checkpoint, measure_machine(threads))
    speedups = {"decode": predicted.decode_speedup, "prefill": predicted.prefill_speedup}
    return replace(about, predicted_speedup=speedups)


def _harness(checkpoint: Path, longest: int, recipe: ValidateRecipe) -> Scorer | None:
    """Loads the harness's tasks, so that what is missing is missed before minutes of measuring."""
    if not recipe.harness_tasks:
        return None
    from transformers import AutoTokenizer

    from validate.harness import evaluate, load_tasks

    with console.stage(f"load {', '.join(recipe.harness_tasks)}"):
        tasks = load_tasks(recipe.harness_tasks, recipe.harness_samples)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return partial(evaluate, tokenizer=tokenizer, tasks=tasks, max_length=longest, progress=console.progress)


def _limits_of_values(limits: Limits, checkpoint: Path, kernel: str | None, int8_activations: bool) -> Limits:
    """The limits, with the tolerance of a kernel that rounds activations where the user gave none."""
    from compress.format import Checkpoint
    from plugins_ort.library import ROUND_TO_BF16, ROUND_TO_BYTES
    from validate.limits import Limit

    types, found = {layer.dtype for layer in Checkpoint.open(checkpoint).layers.values()}, []
    if types & {"I8", "U8"} and int8_activations and kernel in ROUND_TO_BYTES:
        found.append(Limit(value=_INT8_TOLERANCE, reason="int8 activations were allowed"))
    elif types & {"I8", "U8"}:
        reason = "the kernels for int8 and int4 values round activations to 16 bits"
        found.append(Limit(value=_QUANTIZED_TOLERANCE, reason=reason))
    if "BF16" in types and kernel in ROUND_TO_BF16:
        reason = f"the kernel {kernel} rounds the activations of layers with bfloat16 values to bfloat16"
        found.append(Limit(value=_BF16_TOLERANCE, reason=reason))
    if not found:
        return limits
    loosest = max(found, key=lambda limit: limit.value)
    names = {"max_relative_l2", "max_layer_error"} - limits.model_fields_set
    return limits.model_copy(update=dict.fromkeys(names, loosest))


def _require_same_tokenizer(checkpoint: Path, dense: Path, held_out: Tensor) -> None:
    """Refuses a dense model that reads text otherwise: perplexities over different tokens say nothing."""
    from transformers import AutoTokenizer

    if not (dense / "tokenizer.json").is_file():
        return  # nothing to compare; the tokens of the checkpoint are given to both
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, dense))
    text = ours.decode(held_out[0][:_EXPLAIN_TOKENS])
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (ours, theirs))
    if a != b:
        raise InputError(
            "The compressed and the dense model have different tokenizers",
            got=f"{a[:6]} and {b[:6]} for {text[:30]!r}",
            allowed="the same token ids for the same text",
            do="Give the dense model that this one was compressed from as --reference",
        )


def _probes(
    path: Path, model: PreTrainedModel, dense: Path | None, threads: int | None
) -> tuple[TorchProbe, OnnxRuntimeProbe]:
    from sslc_export.engines.probes import OnnxRuntimeProbe, TorchProbe

    reference = TorchProbe(model, dense)
    return reference, OnnxRuntimeProbe(path, reference, threads)


def _open_engines(path: Path, record: dict[str, Any], twin: LoweringReport | None, threads: int | None) -> Opened:
    """The .onnx engine and its dense twin in ONNX Runtime."""
    from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
    from sslc_export.record import Opened, engine_record, ledger

    sizes = ledger(record, path, twin, threads)
    engine = OnnxRuntimeEngine(path, threads=threads, name="compressed")
    if engine.fallback_reason:
        console.note(f"the kernel does not run: {engine.fallback_reason}")
    dense = OnnxRuntimeEngine(twin.path, threads=threads, name="dense") if twin else None
    return Opened(engine, dense, sizes, engine_record(record, engine, path))


def _latency_options(longest: int, largest_batch: int | None, recipe: ValidateRecipe) -> LatencyOptions:
    from validate.latency import LatencyOptions

    prefill = recipe.prefill_tokens or min(LatencyOptions.prefill_tokens, longest)
    if prefill > longest:
        raise InputError("The prompt is longer than the engine can take", got=prefill, allowed=f"at most {longest}")
    return LatencyOptions(
        prefill_tokens=prefill,
        decode_context=min(LatencyOptions.decode_context, longest - 1),
        warm_up_seconds=min(LatencyOptions.warm_up_seconds, recipe.latency_seconds / 20),
        sweep_seconds=recipe.latency_seconds / 15,
        sweep=tuple(batch for batch in recipe.batches if largest_batch is None or batch <= largest_batch),
        prefill_seconds=0.6 * recipe.latency_seconds,
        decode_seconds=0.4 * recipe.latency_seconds,
    )


def _left_out(latency: LatencyOptions, largest_batch: int | None, recipe: ValidateRecipe) -> dict[str, str]:
    """Why batch sizes that were asked for are not measured."""
    if len(latency.sweep) == len(recipe.batches):
        return {}
    return {"latency.sweep": f"the engine takes at most {largest_batch} sequences at a time (--max-batch)"}


def _report(verdict: Verdict, recipe: ValidateRecipe, engine: Path) -> int:
    from validate.baseline import changes, read_baseline
    from validate.document import to_document
    from validate.report import write_report
    from validate.summary import SUMMARY_HEADER, headline, summary_table

    if recipe.baseline:
        now = to_document(verdict)
        found = changes(read_baseline(Path(recipe.baseline)), now)
        verdict = replace(verdict, results=replace(verdict.results, baseline=found))
    folder = Path(recipe.report) if recipe.report else engine.parent / "report"
    _, report = write_report(verdict, folder)
    console.table(f"{engine}", SUMMARY_HEADER, summary_table(verdict))
    console.note(f"{headline(verdict)}\n{report} has the rest")
    return verdict.exit_code
