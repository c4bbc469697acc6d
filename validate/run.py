"""The whole validation: every stage that can be run, in order, then the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Literal, get_args

import numpy as np

from validate import environment
from validate.accuracy import Accuracy, perplexity, perplexity_ratio
from validate.attribution import EngineProbe, ReferenceProbe, attribute
from validate.engine import Engine
from validate.harness import Harness
from validate.latency import LatencyOptions, measure
from validate.limits import DEFAULT_RELATIVE_L2, Limits
from validate.numerics import NumericsOptions, compare
from validate.progress import Progress, silent
from validate.sampler import COMPRESSED, DENSE
from validate.size import SizeLedger
from validate.verdict import EngineRecord, LayerRecord, Results, Verdict, judge

Stage = Literal["numerics", "attribution", "accuracy", "harness", "latency"]
STAGES: tuple[Stage, ...] = get_args(Stage)

Probes = Callable[[], tuple[ReferenceProbe, EngineProbe]]
Scorer = Callable[[Engine, Engine | None], Harness]

# Rows of held-out text to compare logits on, when no other text is given: two, so that a batch is a real one.
_TEXT_ROWS = 2


@dataclass(frozen=True)
class Options:
    """How thoroughly each stage looks."""

    numerics: NumericsOptions = field(default_factory=NumericsOptions)
    latency: LatencyOptions = field(default_factory=LatencyOptions)
    perplexity_batch: int = 1


def validate(
    engine: Engine,
    *,
    dense: Engine | None = None,
    reference: Engine | None = None,
    probes: Probes | None = None,
    held_out: np.ndarray | None = None,
    text: np.ndarray | None = None,
    prompts: Sequence[np.ndarray] | None = None,
    harness: Scorer | None = None,
    limits: Limits | None = None,
    options: Options | None = None,
    sizes: SizeLedger | None = None,
    record: EngineRecord | None = None,
    layers: Sequence[LayerRecord] = (),
    skip: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Verdict:
    """Judges an engine.

    Args:
        engine: The compressed engine.
        dense: The dense model on the same runtime; without it nothing is said about loss of accuracy or speed-up.
        reference: The compressed PyTorch model that the engine was built from; without it the verdict is inconclusive.
        probes: Opens reference and engine layer by layer; without it no layer can be named.
        held_out: Token ids [n, L] of text that nothing was calibrated on, for perplexity.
        text: Token ids [B, L] to compare logits on; by default the first rows of `held_out`.
        prompts: Token ids [P] to continue greedily; by default the beginnings of `text`.
        harness: Scores engine and dense engine by lm-evaluation-harness.
        limits: What the engine must keep.
        options: How thoroughly each stage looks.
        sizes: The size ledger.
        record: What the build record says about the engine.
        layers: The compression report.
        skip: Stages not to run, or parts of them that the caller left out ("latency.sweep"), each with the reason.
        progress: Wraps the loops that take long.

    Raises:
        InputError: the engines or the texts do not belong together.
    """
    limits, options, sizes = limits or Limits(), options or Options(), sizes or SizeLedger()
    skipped = dict(skip or {})
    if text is None and held_out is not None:
        text = held_out[:_TEXT_ROWS]

    numerics = attribution = accuracy = scores = latency = None
    times = [perf_counter()]
    if reference is None or text is None:
        missing = "no PyTorch model to compare with" if reference is None else "no text to compare logits on"
        skipped.setdefault("numerics", f"{missing} was given")
    if "numerics" not in skipped and reference is not None and text is not None:
        numerics = compare(reference, engine, text, prompts=prompts, options=options.numerics, progress=progress)
    times.append(perf_counter())

    if probes is None or text is None:
        missing = "no way into the engine's layers" if probes is None else "no text to run them on"
        skipped.setdefault("attribution", f"{missing} was given")
    if "attribution" not in skipped and probes is not None and text is not None:
        # Below the ordinary rounding of float32 a layer cannot be judged, however tight the limit on the logits is.
        limit = max(limits.max_layer_error.value, DEFAULT_RELATIVE_L2)
        attribution = attribute(*probes(), text, limit=limit, progress=progress)
    times.append(perf_counter())

    if held_out is None:
        skipped.setdefault("accuracy", "no held-out text was given")
    if "accuracy" not in skipped and held_out is not None:
        accuracy = _accuracy(engine, dense, held_out, options.perplexity_batch, progress)
        if dense is None:
            skipped["accuracy.dense"] = "no dense engine was given"
    times.append(perf_counter())

    if harness is None:
        skipped.setdefault("harness", "no tasks of lm-evaluation-harness were given")
    if "harness" not in skipped and harness is not None:
        scores = harness(engine, dense)
        if dense is None:
            skipped["harness.dense"] = "no dense engine was given"
    times.append(perf_counter())

    if "latency" not in skipped:
        engines = {COMPRESSED: engine} if dense is None else {DENSE: dense, COMPRESSED: engine}
        thresholds = {
            phase: limit.value
            for phase, limit in (("prefill", limits.min_prefill_speedup), ("decode", limits.min_decode_speedup))
            if limit is not None
        }
        latency = measure(engines, options=options.latency, thresholds=thresholds, progress=progress)
        if dense is None:
            skipped["latency.dense"] = "no dense engine was given"
    times.append(perf_counter())

    seconds = dict(zip(STAGES, np.diff(times).tolist(), strict=True))
    results = _results(record or EngineRecord(engine.name), sizes, layers, skipped)
    results = replace(
        results,
        numerics=numerics,
        attribution=attribution,
        accuracy=accuracy,
        harness=scores,
        latency=latency,
        seconds={stage: took for stage, took in seconds.items() if stage not in skipped},
    )
    return judge(results, limits)


def unexecuted(
    reason: str,
    *,
    record: EngineRecord,
    limits: Limits | None = None,
    sizes: SizeLedger | None = None,
    layers: Sequence[LayerRecord] = (),
) -> Verdict:
    """The verdict on an engine that cannot run here: its size, and `reason` for all that was not measured."""
    sizes = sizes or SizeLedger()
    skipped: dict[str, str] = dict.fromkeys(STAGES, reason)
    return judge(_results(record, sizes, layers, skipped), limits or Limits())


def _results(
    record: EngineRecord, sizes: SizeLedger, layers: Sequence[LayerRecord], skipped: dict[str, str]
) -> Results:
    """What is known before anything is measured."""
    if sizes.ratio is None:
        skipped["size"] = "the sizes of the engine and of a dense one were not both given"
    return Results(
        engine=record,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment.describe(),
        size=sizes,
        layers=tuple(layers),
        skipped=skipped,
    )


def _accuracy(engine: Engine, dense: Engine | None, chunks: np.ndarray, batch: int, progress: Progress) -> Accuracy:
    compressed = perplexity(engine, chunks, batch=batch, progress=progress)
    if dense is None:
        return Accuracy(compressed)
    beside = perplexity(dense, chunks, batch=batch, progress=progress)
    return Accuracy(compressed, beside, perplexity_ratio(compressed, beside))
