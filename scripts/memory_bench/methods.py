"""Every method on one model: seconds per block, peak memory, and whether a killed run ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from memory_bench.steps import Job, Measured, compress, fresh_process, measured

GIB = 1 << 30
_REPORT = "compression_report.json"  # holds times, which no two runs share


@dataclass(frozen=True)
class Record:
    """One method.

    Attributes:
        method: Its name.
        model: The shape and number of blocks, as text.
        seconds: In all, importance included.
        block_seconds: Of each block.
        peak_gib: Peak resident memory.
        files: SHA-256 of the files of the result, but for the report.
        killed_in: Block, from 0, in whose middle a second run was killed; None if there was none.
        same_after_kill: Whether that run, resumed, ended with the same files; None if there was none.
    """

    method: str
    model: str
    seconds: float
    block_seconds: list[float]
    peak_gib: float
    files: dict[str, str]
    killed_in: int | None = None
    same_after_kill: bool | None = None


def run_methods(
    methods: Sequence[str], model: str, job: Job, kill: bool, records: list[Record], file: Path | None
) -> Iterator[Record]:
    """Measures what is missing from the records, adds to them and to the file, and yields what is new.

    Args:
        methods: Their names.
        model: What the model in `job.folder` is called in the records.
        job: All but the method.
        kill: Whether each is run again, killed, and resumed.
        records: Of earlier runs.
        file: Where the records are written after each measurement.
    """
    for method in methods:
        of_method = replace(job, method=method)
        known = [record for record in records if (record.method, record.model) == (method, model)]
        if known and (known[0].same_after_kill is not None or not kill):
            continue
        record = known[0] if known else _uninterrupted(of_method, model)
        if not known:
            _write(records, record, file)
        if kill:
            record = _killed(of_method, record)
            _write(records, record, file)
        yield record


def read_records(file: Path | None) -> list[Record]:
    """The records of earlier runs; none if there is no file yet."""
    return [Record(**row) for row in json.loads(file.read_text())] if file and file.is_file() else []


def line(record: Record, limit: float) -> str:
    """A row of the table; `limit` in GiB."""
    block = statistics.mean(record.block_seconds)
    killed = {None: "", True: "same bytes", False: "**other bytes**"}[record.same_after_kill]
    beyond = "" if record.peak_gib <= limit else f" (limit {limit:g})"
    return f"| {record.method} | {block:.1f} | {record.seconds:.0f} | {record.peak_gib:.2f}{beyond} | {killed} |"


def _write(records: list[Record], record: Record, file: Path | None) -> None:
    records[:] = [r for r in records if (r.method, r.model) != (record.method, record.model)] + [record]
    if file:
        file.write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")


def _uninterrupted(job: Job, model: str) -> Record:
    with fresh_process() as process:
        found: Measured = process.submit(measured, "compress", job).result()
    files = _hashes(job.folder / "compressed")
    shutil.rmtree(job.folder / "compressed")
    gib = round(found.peak_bytes / GIB, 3)
    return Record(job.method, model, round(found.seconds, 1), found.block_seconds, gib, files)


def _killed(job: Job, record: Record) -> Record:
    """Runs again, kills the process halfway through the middle block, resumes, and compares the files."""
    middle = len(record.block_seconds) // 2
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_telling, args=(job, there))
    process.start()
    there.close()
    while here.recv() < middle:
        pass
    time.sleep(record.block_seconds[middle] / 2)
    if here.poll():
        raise RuntimeError(f"block {middle} of {job.method} was faster than half of what it took before")
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"{job.method} ended by itself before it was killed, with {process.exitcode}")
    with fresh_process() as resumed:
        resumed.submit(measured, "compress", job).result()
    same = _hashes(job.folder / "compressed") == record.files
    shutil.rmtree(job.folder / "compressed")
    return replace(record, killed_in=middle, same_after_kill=same)


def _telling(job: Job, pipe: Connection) -> None:
    compress(job, pipe.send)


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _REPORT:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
