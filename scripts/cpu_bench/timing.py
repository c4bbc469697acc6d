"""Timing in turns: every engine meets the same slow moments, and the bandwidth is measured among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plugins_ort import library

_AREA_BYTES = 256 << 20
_PASSES = 3  # over that area in each round, of which the best counts
_REST = 0.02  # seconds before each run: idle OpenMP threads (PyTorch, ggml) look for work for 8 ms before they sleep


@dataclass(frozen=True)
class Times:
    """What was measured in some rounds.

    Attributes:
        seconds: [rounds, runs].
        bandwidth: [rounds], bytes per second that a loop reads that only reads.
    """

    seconds: NDArray[np.float64]
    bandwidth: NDArray[np.float64]

    def median(self, run: int) -> float:
        """Seconds of a run."""
        return float(np.median(self.seconds[:, run]))

    def ratio(self, run: int) -> float:
        """How many times as fast as the first run; by round, then the median."""
        return float(np.median(self.seconds[:, 0] / self.seconds[:, run]))

    def share_of_bandwidth(self, run: int, size: int) -> float:
        """Bytes per second of a run that reads so many, over what the loop reads; by round, then the median."""
        return float(np.median(size / self.seconds[:, run] / self.bandwidth))


def turns(runs: Sequence[Callable[[], object]], rounds: int, threads: int) -> Times:
    """Times runs, in random order in each round, after one that does not count.

    With one thread it is the process's CPU time, so that waiting for other programs does not count; with more it is
    wall time.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    area = np.ones(_AREA_BYTES // 8, np.int64)
    seconds, bandwidth = np.empty((rounds, len(runs))), np.empty(rounds)
    order = np.random.default_rng(0)
    for run in runs:
        run()
    for round_ in range(rounds):
        # In random order: whoever comes after another finds the caches as that one left them.
        for i in order.permutation(len(runs)):
            time.sleep(_REST)
            start = clock()
            runs[i]()
            seconds[round_, i] = clock() - start
        passes = []
        for _ in range(_PASSES):
            start = clock()
            library.read_memory(area.ctypes.data, area.nbytes, threads)
            passes.append(clock() - start)
        bandwidth[round_] = area.nbytes / min(passes)
    return Times(seconds, bandwidth)
