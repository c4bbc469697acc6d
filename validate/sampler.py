"""Takes latency samples of several engines in turns, and does it once more if that did not settle the question."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import psutil

from validate.environment import clock_frequency, cpu_clock, throttle_count
from validate.progress import Progress, silent
from validate.stability import Clocks, Gate, judge, load_between
from validate.statistics import Interval, Summary, median_interval, summarize

DENSE = "dense"
COMPRESSED = "compressed"

# Does the work and gives back (what it made, which is freed outside the timing; seconds on a GPU or None).
Call = Callable[[], tuple[object, float | None]]
Clock = Callable[[], float]

_CLOCK_SECONDS = 1.0  # between two readings of the cores' frequency


@dataclass(frozen=True)
class PhaseLatency:
    """Prefill, or decode at one batch size.

    Attributes:
        tokens: Tokens of one forward pass, batch included: what tokens per second count.
        engines: Summary of each engine, by name.
        speedup: Dense over compressed time; None without a dense engine.
        gate: Whether the (last) measurement was stable.
        attempts: 2 if it was repeated.
        repeated_because: Why.
        host: The same samples by the clock of the host, where `engines` has times on the GPU; else empty.
    """

    tokens: int
    engines: dict[str, Summary]
    speedup: Interval | None
    gate: Gate
    attempts: int = 1
    repeated_because: tuple[str, ...] = ()
    host: dict[str, Summary] = field(default_factory=dict)

    def tokens_per_second(self, name: str) -> float:
        """Of the engine called `name`, from its median."""
        return self.tokens / self.engines[name].median


@dataclass(frozen=True)
class _Run:
    """One measurement: samples [rounds] in seconds by engine, the host's beside those of a GPU, and what to think."""

    samples: dict[str, np.ndarray]
    host: dict[str, np.ndarray]
    gate: Gate

    def joined(self, other: _Run) -> _Run:
        """The samples of both, in order."""
        samples, host = (
            {name: np.concatenate([one[name], two[name]]) for name in one}
            for one, two in ((self.samples, other.samples), (self.host, other.host))
        )
        return _Run(samples, host, other.gate)


@dataclass(frozen=True)
class Sampler:
    """How samples are taken.

    Attributes:
        warm_up_seconds: Before each measurement; at least two rounds.
        min_rounds: However long they take.
        max_rounds: However short they are.
        seed: Of the bootstrap.
        threads: The largest number of an engine, if any says it.
        progress: Wraps the loop over rounds.
        clock: Seconds; replaced in tests.
    """

    warm_up_seconds: float
    min_rounds: int
    max_rounds: int
    seed: int = 0
    threads: int | None = None
    progress: Progress = silent
    clock: Clock = time.perf_counter

    def phase(
        self,
        name: str,
        calls: Mapping[str, Call],
        *,
        seconds: float,
        tokens: int,
        threshold: float | None = None,
        repeat: bool = True,
    ) -> PhaseLatency:
        """Measures, with `repeat` once more if that did not settle it, and summarizes.

        Args:
            name: For the progress.
            calls: What each engine does, by its name.
            seconds: Time for all samples together.
            tokens: Of one call.
            threshold: A speed-up to decide about.
            repeat: Whether an undecided measurement is repeated.
        """
        run = self.run(name, calls, seconds)
        reasons = run.gate.reasons or _undecided(self.speedup(run.samples), threshold)
        attempts = 1
        if reasons and repeat:
            first, attempts = run, 2
            run = self.run(f"{name} again", calls, seconds)
            if first.gate.stable and run.gate.stable:
                contradiction = _contradiction(self.speedup(first.samples), self.speedup(run.samples), threshold)
                run = first.joined(run)
                if contradiction:
                    run = replace(run, gate=replace(run.gate, stable=False, reasons=(contradiction,)))
        return PhaseLatency(
            tokens=tokens,
            engines={engine: summarize(values) for engine, values in run.samples.items()},
            speedup=self.speedup(run.samples),
            gate=run.gate,
            attempts=attempts,
            repeated_because=reasons if attempts > 1 else (),
            host={engine: summarize(values) for engine, values in run.host.items()},
        )

    def run(self, name: str, calls: Mapping[str, Call], seconds: float) -> _Run:
        """Warms up, then takes one sample of every engine per round."""
        rounds, order = self.warm_up(calls, seconds), list(calls)
        host = {engine: np.empty(rounds) for engine in calls}
        device = {engine: np.full(rounds, np.nan) for engine in calls}
        frequencies: list[float | None] = []
        collecting = gc.isenabled()
        gc.disable()  # as timeit does: a collection can take as long as a decode step
        try:
            throttled, before, start = throttle_count(), cpu_clock(), self.clock()
            for index in self.progress(range(rounds), f"Measuring {name}"):
                if self.clock() - start >= _CLOCK_SECONDS * len(frequencies):
                    frequencies.append(clock_frequency())
                for engine in order if index % 2 == 0 else order[::-1]:
                    tick = self.clock()
                    result, on_device = calls[engine]()
                    host[engine][index] = self.clock() - tick
                    if on_device is not None:
                        device[engine][index] = on_device
                    del result  # freed now, not inside the next sample
            wall, after = self.clock() - start, cpu_clock()
        finally:
            if collecting:
                gc.enable()
        cores = psutil.cpu_count() or 1
        load = load_between(wall, after.own - before.own, after.everyone - before.everyone, cores, self.threads)
        clocks = Clocks.of(frequencies, throttled, throttle_count())
        on_gpu = all(np.isfinite(values).all() for values in device.values())
        samples = device if on_gpu else host
        summaries = {engine: summarize(values) for engine, values in samples.items()}
        return _Run(samples, host if on_gpu else {}, judge(summaries, _ratios(samples), load, clocks))

    def warm_up(self, calls: Mapping[str, Call], seconds: float) -> int:
        """Runs all until caches, clocks and thread pools have settled; says how many rounds fit into `seconds`."""
        durations: list[float] = []
        while len(durations) < 2 or sum(durations) < self.warm_up_seconds:
            start = self.clock()
            for call in calls.values():
                call()
            durations.append(self.clock() - start)
        rounds = round(seconds / max(float(np.median(durations[1:])), 1e-9))
        # An even number, so that each engine goes first equally often.
        return int(np.clip(rounds, self.min_rounds, self.max_rounds)) // 2 * 2

    def speedup(self, samples: Mapping[str, np.ndarray]) -> Interval | None:
        """Of the compressed engine over the dense one, if both are here."""
        ratios = _ratios(samples)
        return None if ratios is None else median_interval(ratios, self.seed)


def _ratios(samples: Mapping[str, np.ndarray]) -> np.ndarray | None:
    return samples[DENSE] / samples[COMPRESSED] if {DENSE, COMPRESSED} <= samples.keys() else None


def _undecided(speedup: Interval | None, threshold: float | None) -> tuple[str, ...]:
    """Why a stable measurement is repeated: the limit is inside its interval, or above it."""
    if speedup is None or threshold is None or speedup.low >= threshold:
        return ()
    interval = f"{speedup.low:.3f} to {speedup.high:.3f}"
    if speedup.high < threshold:
        return (f"the interval {interval} is below the limit {threshold}, and a regression has to show twice",)
    return (f"the limit {threshold} lies inside the interval {interval}",)


def _contradiction(first: Interval | None, second: Interval | None, threshold: float | None) -> str | None:
    """What is wrong if one measurement keeps a limit and the other misses it; None if nothing is.

    An interval knows the noise inside a measurement. What makes whole measurements differ shows only here.
    """
    if first is None or second is None or threshold is None:
        return None
    missed = [interval.high < threshold for interval in (first, second)]
    kept = [interval.low >= threshold for interval in (first, second)]
    if not (any(missed) and any(kept)):
        return None
    return (
        f"the two measurements contradict each other: {first.low:.3f} to {first.high:.3f}, "
        f"then {second.low:.3f} to {second.high:.3f}"
    )
