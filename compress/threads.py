"""Two pieces of work side by side, each on half of PyTorch's threads.

Products of matrices use all threads well, but small QR factors, eigenproblems and the choice of a mask use one. Side by
side, the other thread has work meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

SMALL = 4 << 20  # Entries of a layer's largest matrix up to which it pays.

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
        torch.set_num_threads(threads // 2)  # MKL's are the whole process's, OpenMP's this thread's
        with torch.set_grad_enabled(gradients):
            return work(item)

    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(on_half, items))
    finally:
        torch.set_num_threads(threads)  # which MKL has forgotten
