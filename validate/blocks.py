"""What a report is made of: paragraphs and tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; with `right`, all columns but the first are figures."""

    header: Sequence[str]
    rows: Iterable[Sequence[str]]
    right: bool = False


# A paragraph may have `code` and **strong** words.
Block = str | Table
