"""Results that a real run could have had, to build verdicts from without measuring."""

from __future__ import annotations

from dataclasses import replace

from validate.accuracy import Accuracy, Perplexity, PerplexityRatio
from validate.attribution import Attribution, Finding, LayerErrors
from validate.environment import Environment
from validate.harness import Harness, TaskScore
from validate.latency import Latency, LatencyOptions
from validate.metrics import PhaseNumerics
from validate.numerics import Divergence, Numerics
from validate.sampler import PhaseLatency
from validate.size import Bytes, SizeLedger
from validate.stability import Clocks, Gate, Load
from validate.statistics import Interval, Summary
from validate.verdict import EngineRecord, LayerRecord, Results

STABLE = Gate(True, (), Load(own=1.98, others=0.04, needed=2, cores=2), Clocks(2590.0, 2600.0, 2610.0, 0))
UNSTABLE = Gate(False, ("compressed varies by 31% (at most 20%)",), Load(1.5, 0.6, 2, 2))

BUILD = {
    "model": "SmolLM2-135M",
    "runtime": "onnxruntime",
    "op_counts": {"sslc::LowRankSparseLinear": 209, "Add": 62},
    "files": {"engine.onnx": {"bytes": 486236, "sha256": "7d02d181cd55f62b" + "0" * 48}},
    "versions": {"torch": "2.13.0"},
    "compression": {"method": "hassle_free", "budget_in_params": 0.5, "mask_cost": None},
}

HARNESS = Harness(
    (
        TaskScore("arc_easy", "acc", 200, 0.52, 0.035, 0.56, 0.035, 0.52 / 0.56, 0.02),
        TaskScore("wikitext", "word_perplexity", 10, 31.0, None, 24.0, None),
    ),
    "0.4.13",
)

ENVIRONMENT = Environment(
    machine="Linux 6.1 x86_64",
    cpu="A Processor",
    logical_cores=2,
    physical_cores=1,
    affinity=(0, 1),
    governor=None,
    load_average=(0.5, 0.25, 0.125),
    memory_bytes=24 * 2**30,
    versions={"python": "3.11.7", "numpy": "2.4.6"},
)

NUMERICS = Numerics(
    relative_l2=4e-7,
    cosine=1.0,
    max_error_over_rms=3e-6,
    kl=1e-12,
    top1_agreement=0.999,
    margin_top1_agreement=1.0,
    typical_relative_l2=3e-7,
    greedy_agreement=0.9375,
    greedy_tokens=64,
    divergences=(Divergence(1, 28, 17, 4, 2e-6, True),),
    non_finite=0,
    phases=(PhaseNumerics("prefill", 1008, 0, 4e-7, 9e-7, 3, 1.0, 3e-6, 1e-12, 2e-12, 0.999, 1.0),),
)


ATTRIBUTION = Attribution(
    (LayerErrors("model.layers.0.mlp.up_proj", 0.083, 2e-7, 1e-7, 3e-7, 4e-7, 1.0, 2e-6),), None, None, 1e-5
)


def perplexity(value: float) -> Perplexity:
    return Perplexity(value, 2.5, 0.61, 16352, (2.4, 2.6), 512, 0, "ab" * 32)


ACCURACY = Accuracy(perplexity(16.5), perplexity(12.4), PerplexityRatio(1.33, 0.012))


def summary(seconds: float) -> Summary:
    samples = (seconds, seconds * 1.01)
    return Summary(seconds, seconds * 0.98, seconds * 1.05, seconds * 1.01, 0.02, -0.004, samples)


def phase(dense: float, compressed: float, tokens: int, interval: Interval, gate: Gate = STABLE) -> PhaseLatency:
    return PhaseLatency(tokens, {"dense": summary(dense), "compressed": summary(compressed)}, interval, gate)


LATENCY = Latency(
    prefill=phase(0.6, 0.625, 512, Interval(0.96, 0.94, 0.98)),
    decode=phase(0.0225, 0.015, 1, Interval(1.5, 1.48, 1.52)),
    options=LatencyOptions(),
    threads={"dense": 2, "compressed": 2},
    sweep={4: phase(0.05, 0.04, 4, Interval(1.25, 1.2, 1.3))},
)

RESULTS = Results(
    engine=EngineRecord("engine.onnx", kernel_layers=209, dense_layers=1, build_record="engine.json", build=BUILD),
    created="2026-11-22T12:00:00+00:00",
    environment=ENVIRONMENT,
    numerics=NUMERICS,
    attribution=ATTRIBUTION,
    accuracy=ACCURACY,
    harness=HARNESS,
    latency=LATENCY,
    size=SizeLedger(
        engine=Bytes(538_000_000, 345_000_000),
        layers=Bytes(424_000_000, 231_000_000),
        checkpoint=Bytes(538_000_000, 345_100_000),
        memory=Bytes(compressed=400_000_000),
        mapped=Bytes(compressed=310_000_000),
        kv_cache=Bytes(46_080, 46_080),
    ),
    seconds={"numerics": 20.1, "latency": 60.4},
    layers=(LayerRecord("model.layers.0.mlp.up_proj", 32, 0.41, 1_900_000, 3_538_944, 0.083),),
)


def unstable_decode() -> Results:
    decode = replace(LATENCY.decode, gate=UNSTABLE, attempts=2, repeated_because=UNSTABLE.reasons)
    return replace(RESULTS, latency=replace(LATENCY, decode=decode))


def bare() -> Results:
    """Nothing but the compressed engine's speed: no reference, no text, no dense engine."""
    alone = {
        name: PhaseLatency(measured.tokens, {"compressed": measured.engines["compressed"]}, None, STABLE)
        for name, measured in (("prefill", LATENCY.prefill), ("decode", LATENCY.decode))
    }
    return Results(
        engine=EngineRecord("engine.onnx"),
        created=RESULTS.created,
        environment=ENVIRONMENT,
        latency=replace(LATENCY, **alone, threads={"compressed": None}),
        skipped={
            "attribution": "no way into the engine's layers was given",
            "numerics": "no PyTorch model was given",
            "harness": "no tasks were given",
            "accuracy": "no held-out text was given",
            "latency.dense": "no dense engine was given",
            "size": "no sizes were given",
        },
    )


def broken() -> Results:
    """An engine that gives NaN."""
    nan = float("nan")
    numerics = replace(
        NUMERICS,
        relative_l2=nan,
        cosine=nan,
        max_error_over_rms=nan,
        kl=nan,
        top1_agreement=nan,
        margin_top1_agreement=nan,
        greedy_agreement=nan,
        greedy_tokens=0,
        divergences=(),
        non_finite=12,
        phases=(PhaseNumerics("prefill", 1008, 12, nan, nan, 0, nan, nan, nan, nan, nan, nan),),
    )
    lost = Perplexity(nan, nan, nan, 16352, (nan, 2.5), 512, 12, "ab" * 32)
    accuracy = Accuracy(lost, perplexity(12.4), PerplexityRatio(nan, nan))
    layer = LayerErrors("model.layers.0.mlp.up_proj", 0.083, float("inf"), None, 3e-7, float("inf"))
    why = "its values in the engine are not the checkpoint's"
    found = Finding(layer.name, "lowering", float("inf"), "alone", None, why)
    attribution = Attribution((layer,), found, "the library is missing", 1e-5)
    return replace(RESULTS, numerics=numerics, attribution=attribution, accuracy=accuracy)
