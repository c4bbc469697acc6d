"""Two pieces of work side by side, each on half of PyTorch's threads.

On small matrices two threads spend much of their time waiting for each other, at the end of every operation. Two pieces
of work with a thread each do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

SMALL = 4 << 20  # Entries of a layer's largest matrix up to which it pays, and costs little memory.

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def side_by_side(shapes: Iterable[tuple[int, int]]) -> bool:
    """Whether work on layers of these shapes [N, K] is done two at a time."""
    return torch.get_num_threads() > 1 and max((max(N, K) * K for N, K in shapes), default=0) <= SMALL


def two_at_a_time(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """The result of each item, in order. An exception of one of them ends the others that have not begun.

    Every item has half of the threads, and so the same result to the last bit, whichever ends first.
    """
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()

    def on_half(item: _Item) -> _Result:
        torch.set_num_threads(threads // 2)  # of the thread that calls it, as is the next
        with torch.set_grad_enabled(gradients):
            return work(item)

    futures = [_pool().submit(on_half, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
        torch.set_num_threads(threads)  # of threads that begin later


@cache
def _pool() -> ThreadPoolExecutor:
    """The same two threads for the whole process: what libraries keep for a thread they keep once."""
    return ThreadPoolExecutor(2)
