"""How long work is shown: the caller passes something that wraps a loop, a progress bar for example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps the items of a loop that takes long."""

    def __call__(self, items: Iterable[T], description: str) -> Iterable[T]:
        """Gives back the items, in order, and may show how far the loop is."""
        ...


def silent(items: Iterable[T], description: str) -> Iterable[T]:
    """Shows nothing."""
    return items
