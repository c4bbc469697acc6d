"""How fast is the engine, and how much faster than the dense one? By trtexec's rules, as far as they fit a CPU.

All engines are measured in one run, one sample of each per round, and the order turns with every round (A B, B A, …),
so that whatever the machine does meanwhile happens to all of them. Prefill and decode are measured apart; warm-up comes
first; decode steps always start from the same cache, so every sample does the same work. The speed-up is the median of
the rounds' ratios dense / compressed, with a bootstrap interval. An unstable measurement, and one that leaves a limit
inside the interval, is repeated once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil

from sslc_common.errors import InputError
from validate.engine import Engine
from validate.environment import cpu_clock
from validate.progress import Progress, silent
from validate.stability import Gate, judge, load_between
from validate.statistics import Interval, Summary, median_interval, summarize

DENSE = "dense"
COMPRESSED = "compressed"

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class LatencyOptions:
    """What is measured and for how long.

    With the defaults the two engines of a 135 M parameter model take about 50 s on two cores, at most twice that if
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


@dataclass(frozen=True)
class PhaseLatency:
    """Prefill or decode.

    Attributes:
        tokens: Tokens of one forward pass, batch included: what tokens per second count.
        engines: Summary of each engine, by name.
        speedup: Dense over compressed time; None without a dense engine.
        gate: Whether the (last) measurement was stable.
        attempts: 2 if it was repeated.
        repeated_because: Why.
    """

    tokens: int
    engines: dict[str, Summary]
    speedup: Interval | None
    gate: Gate
    attempts: int = 1
    repeated_because: tuple[str, ...] = ()

    def tokens_per_second(self, name: str) -> float:
        """Of the engine called `name`, from its median."""
        return self.tokens / self.engines[name].median


@dataclass(frozen=True)
class Latency:
    """Both phases, what was asked for, and the threads of each engine where it says so."""

    prefill: PhaseLatency
    decode: PhaseLatency
    options: LatencyOptions
    threads: dict[str, int | None]


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
        thresholds: Speed-ups to decide about, by phase ("prefill", "decode"): a measurement whose interval holds one
            is repeated once and judged with both runs together.
        progress: Wraps the loop over rounds.
        clock: Seconds; replaced in tests.

    Raises:
        InputError: there is no engine, or an option leaves nothing to measure.
    """
    options, thresholds = options or LatencyOptions(), thresholds or {}
    _check(engines, options)
    vocab_size = min(engine.vocab_size for engine in engines.values())
    length = max(options.prefill_tokens, options.decode_context + 1)
    ids = np.random.default_rng(options.seed).integers(0, vocab_size, (options.batch, length), dtype=np.int64)
    prompt, context = ids[:, : options.prefill_tokens], ids[:, : options.decode_context]
    token = ids[:, options.decode_context : options.decode_context + 1]
    threads = {name: getattr(engine, "threads", None) for name, engine in engines.items()}
    sampler = _Sampler(options, max((n for n in threads.values() if n), default=None), progress, clock)

    prefill = sampler.phase(
        "prefill",
        {name: partial(engine.run, prompt) for name, engine in engines.items()},
        seconds=options.prefill_seconds,
        tokens=prompt.size,
        threshold=thresholds.get("prefill"),
    )
    # The protocol promises that a cache stays valid, so all steps can start from the same one.
    caches = {name: engine.run(context)[1] for name, engine in engines.items()}
    decode = sampler.phase(
        "decode",
        {name: partial(engine.run, token, None, caches[name]) for name, engine in engines.items()},
        seconds=options.decode_seconds,
        tokens=token.size,
        threshold=thresholds.get("decode"),
    )
    return Latency(prefill, decode, options, threads)


@dataclass(frozen=True)
class _Sampler:
    """Takes samples; `threads` is the largest number of an engine, if any says it."""

    options: LatencyOptions
    threads: int | None
    progress: Progress
    clock: Clock

    def phase(
        self, name: str, calls: Mapping[str, Call], *, seconds: float, tokens: int, threshold: float | None
    ) -> PhaseLatency:
        """Measures, once more if that did not settle it, and summarizes."""
        samples, gate = self.run(name, calls, seconds)
        speedup = self.speedup(samples)
        reasons, attempts = gate.reasons, 1
        if gate.stable and speedup and threshold and speedup.low < threshold <= speedup.high:
            reasons = (f"the limit {threshold} lies inside the interval {speedup.low:.3f} to {speedup.high:.3f}",)
        if reasons:
            first, was_stable, attempts = samples, gate.stable, 2
            samples, gate = self.run(f"{name} again", calls, seconds)
            if was_stable and gate.stable:
                samples = {engine: np.concatenate([first[engine], samples[engine]]) for engine in samples}
            speedup = self.speedup(samples)
        summaries = {engine: summarize(values) for engine, values in samples.items()}
        return PhaseLatency(tokens, summaries, speedup, gate, attempts, reasons)

    def run(self, name: str, calls: Mapping[str, Call], seconds: float) -> tuple[dict[str, np.ndarray], Gate]:
        """Warms up, then takes one sample [rounds], in seconds, of every engine per round."""
        rounds, order = self.warm_up(calls, seconds), list(calls)
        samples = {engine: np.empty(rounds) for engine in calls}
        collecting = gc.isenabled()
        gc.disable()  # as timeit does: a collection can take as long as a decode step
        try:
            before, start = cpu_clock(), self.clock()
            for index in self.progress(range(rounds), f"Measuring {name}"):
                for engine in order if index % 2 == 0 else order[::-1]:
                    tick = self.clock()
                    result = calls[engine]()
                    samples[engine][index] = self.clock() - tick
                    del result  # freed now, not inside the next sample
            wall, after = self.clock() - start, cpu_clock()
        finally:
            if collecting:
                gc.enable()
        cores = psutil.cpu_count() or 1
        load = load_between(wall, after.own - before.own, after.everyone - before.everyone, cores, self.threads)
        summaries = {engine: summarize(values) for engine, values in samples.items()}
        return samples, judge(summaries, _ratios(samples), load)

    def warm_up(self, calls: Mapping[str, Call], seconds: float) -> int:
        """Runs all until caches, clocks and thread pools have settled; says how many rounds fit into `seconds`."""
        durations: list[float] = []
        while len(durations) < 2 or sum(durations) < self.options.warm_up_seconds:
            start = self.clock()
            for call in calls.values():
                call()
            durations.append(self.clock() - start)
        rounds = seconds / max(float(np.median(durations[1:])), 1e-9)
        # An even number, so that each engine goes first equally often.
        return int(np.clip(rounds, self.options.min_rounds, self.options.max_rounds)) // 2 * 2

    def speedup(self, samples: Mapping[str, np.ndarray]) -> Interval | None:
        """Of the compressed engine over the dense one, if both are here."""
        ratios = _ratios(samples)
        return None if ratios is None else median_interval(ratios, self.options.seed)


def _ratios(samples: Mapping[str, np.ndarray]) -> np.ndarray | None:
    return samples[DENSE] / samples[COMPRESSED] if {DENSE, COMPRESSED} <= samples.keys() else None


def _check(engines: Mapping[str, Engine], options: LatencyOptions) -> None:
    if not engines:
        raise InputError("There is no engine to measure", allowed="one engine or more")
    for name in ("prefill_tokens", "decode_context", "batch"):
        if getattr(options, name) < 1:
            raise InputError(
                f"Latency option {name} leaves nothing to measure", got=getattr(options, name), allowed="≥ 1"
            )
    if not 4 <= options.min_rounds <= options.max_rounds:
        raise InputError(
            "Latency options min_rounds and max_rounds do not fit",
            got=f"{options.min_rounds} and {options.max_rounds}",
            allowed="4 ≤ min_rounds ≤ max_rounds",
        )
