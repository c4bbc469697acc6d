"""Timing in turns: every engine meets the same slow moments, and the bandwidth is measured among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from plugins_ort import library

_AREA_BYTES = 256 << 20
_REST = 0.002  # seconds before each run, in which idle threads of the last one go to sleep


class Bandwidth:
    """Reads memory, and remembers how fast that was at best.

    Attributes:
        best: Bytes per second.
    """

    def __init__(self, threads: int) -> None:
        self.best, self._threads = 0.0, threads
        self._area = np.ones(_AREA_BYTES // 8, np.int64)

    def measure(self) -> None:
        """Reads once."""
        clock = _clock(self._threads)
        start = clock()
        library.read_memory(self._area.ctypes.data, self._area.nbytes, self._threads)
        self.best = max(self.best, self._area.nbytes / (clock() - start))


def turns(runs: Sequence[Callable[[], object]], rounds: int, threads: int, bandwidth: Bandwidth) -> NDArray[np.float64]:
    """Seconds [rounds, len(runs)] of each run, in random order in each round after one that does not count."""
    clock = _clock(threads)
    seconds = np.empty((rounds, len(runs)))
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
        bandwidth.measure()
    return seconds


def _clock(threads: int) -> Callable[[], float]:
    """With one thread the process's CPU time, so that waiting for other programs does not count; else wall time."""
    return time.process_time if threads == 1 else time.perf_counter
