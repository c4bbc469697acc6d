"""What the commands show: progress bars on a terminal, plain lines in a log, tables at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from compress.forecast import Forecast
    from compress.report import CompressReport

T = TypeVar("T")

# Progress goes to stderr: stdout carries results only, so that they can be piped.
_stderr = Console(stderr=True, highlight=False)
_LOG_SECONDS = 15.0  # at most one plain line in this many seconds, so that a CI log stays readable


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields the items, showing how far the work is: a bar on a terminal, now and then a line elsewhere."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _bar(items, description, total) if _stderr.is_terminal else _lines(items, description, total)


def _bar(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_stderr, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= _LOG_SECONDS:
            last = now
            print(f"{description}: {done}/{total or '?'} after {now - start:.0f} s", file=sys.stderr, flush=True)
        yield item


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Announces a step of the pipeline, and how long it took."""
    start = time.monotonic()
    _stderr.print(f"[bold]{name}[/bold] …", soft_wrap=True)
    yield
    _stderr.print(f"[bold]{name}[/bold]: done in {time.monotonic() - start:.0f} s", soft_wrap=True)


def quiet_transformers() -> None:
    """Silences transformers' own bars and warnings, which would mix with ours; its errors stay."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; the GGUF reader has a bar of its own
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def note(text: str) -> None:
    """One line for the person who watches."""
    _stderr.print(text, markup=False, soft_wrap=True)


def forecast(expected: Forecast, tuning_minutes: float) -> None:
    """What a compression is going to take."""
    minutes = expected.seconds / 60 + tuning_minutes
    note(f"predicted for an idle machine: {minutes:.1f} minutes and {expected.memory / 2**30:.1f} GiB of memory")


def compression(report: CompressReport) -> None:
    """What a compression took and came to."""
    note(f"took {report.seconds / 60:.1f} minutes and {report.peak_memory / 2**30:.1f} GiB of memory")
    if report.tuning_steps:
        note(f"tuned in {report.tuning_steps} steps")
    kept = [layer for layer in report.layers if not layer.dense_reason]
    note(
        f"{len(kept)} of {len(report.layers)} layers compressed by {report.method}: "
        f"{report.budget_in_bytes:.3f} of their bytes, {report.budget_in_params:.3f} of their parameters; "
        f"checkpoint {report.checkpoint_bytes / 1e6:.1f} MB, dense {report.source_bytes / 1e6:.1f} MB"
    )
    if report.head is not None:
        note(f"{report.head.name} in int8: {report.head.bytes / 1e6:.1f} of {report.head.dense_bytes / 1e6:.1f} MB")
    if report.mask_cost is not None:
        note(f"the mask rule leaves out {report.mask_cost:.1%} more energy than a free mask of as many values")
    for reason in sorted({layer.dense_reason for layer in report.layers if layer.dense_reason}):
        note(f"dense: {sum(layer.dense_reason == reason for layer in report.layers)} layers, {reason}")


def out(text: str) -> None:
    """One line of results, on stdout."""
    print(text, flush=True)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table of results to stdout."""
    sheet = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        sheet.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        sheet.add_row(*row)
    Console(highlight=False, markup=False).print(sheet)
