"""Was the machine quiet enough for a measurement to mean anything?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from validate.statistics import Summary, drift

# Where the lines are drawn, for CPUs that nobody reserved for the measurement. Seen while other processes used 1.4 to
# 1.7 of 2 cores: variation 0.05 to 0.31, drift 0.01 to 0.88, and one engine against itself between 0.87 and 1.01. Load
# is the surest sign of the three.
MAX_VARIATION = 0.20
MAX_DRIFT = 0.15
# The ratio of two interleaved engines cancels what slows both alike, so it must hold still better than either.
MAX_RATIO_DRIFT = 0.10
# Others may take a quarter of the cores that the engines need, beyond the cores that nobody needs.
MAX_TAKEN = 0.25


@dataclass(frozen=True)
class Load:
    """Who used the processor during a measurement, in cores (CPU seconds per second).

    Attributes:
        own: This process.
        others: All others, and what a hypervisor took away.
        needed: Cores that the engines wanted: their threads if known, else what this process got, rounded up.
        cores: Of the machine.
    """

    own: float
    others: float
    needed: int
    cores: int


@dataclass(frozen=True)
class Clocks:
    """What the cores did during a measurement; None for what the operating system does not say.

    Attributes:
        low: Lowest frequency that was seen, MHz, mean over the cores of this process.
        median: Half of the time below it.
        high: Highest.
        throttled: How often the processor slowed itself down for heat.
    """

    low: float | None = None
    median: float | None = None
    high: float | None = None
    throttled: int | None = None

    @classmethod
    def of(cls, frequencies: Sequence[float | None], before: int | None, after: int | None) -> Clocks:
        """From readings in MHz and from the counter of throttling at both ends."""
        known = [mhz for mhz in frequencies if mhz is not None]
        throttled = None if before is None or after is None else after - before
        if not known:
            return cls(throttled=throttled)
        return cls(min(known), float(np.median(known)), max(known), throttled)


@dataclass(frozen=True)
class Gate:
    """The verdict on a measurement itself: stable, or the reasons why not."""

    stable: bool
    reasons: tuple[str, ...]
    load: Load
    clocks: Clocks = Clocks()


def load_between(seconds: float, own: float, everyone: float, cores: int, threads: int | None) -> Load:
    """Load from the CPU seconds that passed during `seconds` of wall-clock time.

    Args:
        seconds: Wall-clock time.
        own: CPU seconds of this process.
        everyone: CPU seconds of all processes.
        cores: Of the machine.
        threads: Of an engine, if known.
    """
    used = own / seconds
    # Waiting threads use a little less than the cores they were given.
    needed = threads or max(1, math.ceil(used - 0.1))
    # The two clocks tick apart, so that a lone process may seem to use more than everyone.
    return Load(used, max(0.0, everyone - own) / seconds, min(needed, cores), cores)


def judge(summaries: dict[str, Summary], ratios: np.ndarray | None, load: Load, clocks: Clocks | None = None) -> Gate:
    """Checks variation, drift, load and throttling.

    Args:
        summaries: Of each engine, by name.
        ratios: Paired ratios in the order of measurement, if there are two engines to compare.
        load: During the measurement.
        clocks: During the measurement. Their frequency alone decides nothing: where it mattered, times drifted.
    """
    reasons, clocks = [], clocks or Clocks()
    for name, summary in summaries.items():
        if summary.variation > MAX_VARIATION:
            reasons.append(f"{name} varies by {summary.variation:.0%} (at most {MAX_VARIATION:.0%})")
        if abs(summary.drift) > MAX_DRIFT:
            reasons.append(f"{name} drifted by {summary.drift:+.0%} between the halves (at most ±{MAX_DRIFT:.0%})")
    if ratios is not None and abs(drift(ratios)) > MAX_RATIO_DRIFT:
        reasons.append(f"the speed-up drifted by {drift(ratios):+.0%} (at most ±{MAX_RATIO_DRIFT:.0%})")
    spare = load.cores - load.needed + MAX_TAKEN * load.needed
    if load.others > spare:
        reasons.append(f"other processes used {load.others:.1f} of {load.cores} cores (at most {spare:.1f})")
    if clocks.throttled:
        reasons.append(f"the processor slowed itself down for heat, {clocks.throttled} times")
    return Gate(not reasons, tuple(reasons), load, clocks)
