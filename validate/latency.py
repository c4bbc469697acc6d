"""How fast is the engine, and how much faster than the dense one? By trtexec's rules, as far as they fit a CPU.

All engines are measured in one run, one sample of each per round, and the order turns with every round (A B, B A, …),
so that whatever the machine does meanwhile happens to all of them. Prefill and decode are measured apart; warm-up comes
first; decode steps always start from the same cache, so every sample does the same work. The speed-up is the median of
the rounds' ratios dense / compressed, with a bootstrap interval. A measurement is repeated once if it is unstable, if a
limit lies inside its interval, or if it misses a limit: a regression has to show twice.

A sample ends when the next token is chosen (the most likely one), so that a prefill is the time to the first token.
Where an engine knows its time on a GPU, from CUDA events, that is the sample, and the host's time stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sslc_common.errors import InputError
from validate.engine import Engine
from validate.progress import Progress, silent
from validate.sampler import Call, Clock, PhaseLatency, Sampler


@dataclass(frozen=True)
class LatencyOptions:
    """What is measured and for how long.

    With the defaults the two engines of a 135 M parameter model take about 60 s on two cores, at most twice that if
    both measurements have to be repeated.

    Attributes:
        prefill_tokens: Length of the prompt.
        decode_context: Tokens in the cache of each decode step.
        batch: Sequences at once.
        warm_up_seconds: Before each measurement; at least two rounds.
        prefill_seconds: Time for all prefill samples together.
        decode_seconds: Time for all decode samples together.
        min_rounds: However long they take.
        max_rounds: However short they are.
        seed: Of the token ids and of the bootstrap.
        sweep: Further batch sizes to decode with, measured once and briefly; nothing is decided about them.
        sweep_seconds: Time for all samples of one of them.
    """

    prefill_tokens: int = 512
    decode_context: int = 128
    batch: int = 1
    warm_up_seconds: float = 1.5
    prefill_seconds: float = 24.0
    decode_seconds: float = 16.0
    min_rounds: int = 12
    max_rounds: int = 1000
    seed: int = 0
    sweep: tuple[int, ...] = ()
    sweep_seconds: float = 3.0


@dataclass(frozen=True)
class Latency:
    """Both phases, what was asked for, the threads of each engine where it says so, and decoding by batch size."""

    prefill: PhaseLatency
    decode: PhaseLatency
    options: LatencyOptions
    threads: dict[str, int | None]
    sweep: dict[int, PhaseLatency]


def measure(
    engines: Mapping[str, Engine],
    *,
    options: LatencyOptions | None = None,
    thresholds: Mapping[str, float] | None = None,
    progress: Progress = silent,
    clock: Clock = time.perf_counter,
) -> Latency:
    """Measures prefill and decode of all engines, interleaved.

    Args:
        engines: By name. "dense" and "compressed" give the speed-up; either may be missing, others may take part.
        options: What is measured and for how long.
        thresholds: Speed-ups to decide about, by phase ("prefill", "decode"): a measurement that does not clearly keep
            one is repeated once and judged with both runs together.
        progress: Wraps the loop over rounds.
        clock: Seconds; replaced in tests.

    Raises:
        InputError: there is no engine, or an option leaves nothing to measure.
    """
    options, thresholds = options or LatencyOptions(), thresholds or {}
    _check(engines, options)
    vocab_size = min(engine.vocab_size for engine in engines.values())
    length, rows = max(options.prefill_tokens, options.decode_context + 1), max(options.batch, *options.sweep, 1)
    ids = np.random.default_rng(options.seed).integers(0, vocab_size, (rows, length), dtype=np.int64)
    threads = {name: getattr(engine, "threads", None) for name, engine in engines.items()}
    sampler = Sampler(
        options.warm_up_seconds,
        options.min_rounds,
        options.max_rounds,
        options.seed,
        max((n for n in threads.values() if n), default=None),
        progress,
        clock,
    )

    prompt = ids[: options.batch, : options.prefill_tokens]
    prefill = sampler.phase(
        "prefill",
        {name: partial(_forward, engine, prompt) for name, engine in engines.items()},
        seconds=options.prefill_seconds,
        tokens=prompt.size,
        threshold=thresholds.get("prefill"),
    )
    decode = sampler.phase(
        "decode",
        _steps(engines, ids[: options.batch], options.decode_context),
        seconds=options.decode_seconds,
        tokens=options.batch,
        threshold=thresholds.get("decode"),
    )
    sweep = {
        batch: sampler.phase(
            f"decode, batch {batch}",
            _steps(engines, ids[:batch], options.decode_context),
            seconds=options.sweep_seconds,
            tokens=batch,
            repeat=False,
        )
        for batch in options.sweep
    }
    return Latency(prefill, decode, options, threads, sweep)


def _forward(engine: Engine, ids: np.ndarray, cache: Any = None) -> tuple[object, float | None]:
    """A forward pass, up to the choice of the next tokens."""
    logits, new = engine.run(ids, None, cache)
    return (logits, new, logits[:, -1].argmax(axis=-1)), getattr(engine, "gpu_seconds", None)


def _steps(engines: Mapping[str, Engine], ids: np.ndarray, context: int) -> dict[str, Call]:
    """A decode step of each engine. The protocol promises that a cache stays valid, so all start from the same one."""
    token = ids[:, context : context + 1]
    return {name: partial(_forward, engine, token, engine.run(ids[:, :context])[1]) for name, engine in engines.items()}


def _check(engines: Mapping[str, Engine], options: LatencyOptions) -> None:
    if not engines:
        raise InputError("There is no engine to measure", allowed="one engine or more")
    for name, least in (
        ("prefill_tokens", options.prefill_tokens),
        ("decode_context", options.decode_context),
        ("batch", options.batch),
        ("sweep", min(options.sweep, default=1)),
    ):
        if least < 1:
            raise InputError(f"Latency option {name} leaves nothing to measure", got=least, allowed="≥ 1")
    if not 4 <= options.min_rounds <= options.max_rounds:
        raise InputError(
            "Latency options min_rounds and max_rounds do not fit",
            got=f"{options.min_rounds} and {options.max_rounds}",
            allowed="4 ≤ min_rounds ≤ max_rounds",
        )
