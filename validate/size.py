"""The size ledger: what the model takes on disk and in memory, dense beside compressed.

`ratio` is compressed over dense bytes of the *whole engine*: the graph and all weights it refers to, embeddings, norms
and dense layers included, because that is what is shipped. The ratio of the compressed layers alone, which is what a
budget speaks of, stands beside it and is never called the ratio.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from sslc_common.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Bytes:
    """The same thing, dense and compressed, in bytes; None where it is not known."""

    dense: int | None = None
    compressed: int | None = None

    @property
    def ratio(self) -> float | None:
        """Compressed over dense; None unless both are known."""
        return self.compressed / self.dense if self.dense and self.compressed is not None else None


@dataclass(frozen=True)
class SizeLedger:
    """All sizes that are known.

    Attributes:
        engine: The engine files: the graph and the weights it refers to.
        layers: The weights of the compressed linear layers alone.
        checkpoint: The weight files of the Hugging Face folders.
        memory: Growth of the resident memory when the engine was loaded and run once, mapped files included.
        mapped: The part of it that is mapped files: weights that processes share, and that the system can drop.
        kv_cache: Of one token of one sequence, in the key-value cache of all layers.
        gpu: Memory that the engine takes on the GPU, weights included, when it was loaded and run once.
    """

    engine: Bytes = Bytes()
    layers: Bytes = Bytes()
    checkpoint: Bytes = Bytes()
    memory: Bytes = Bytes()
    mapped: Bytes = Bytes()
    kv_cache: Bytes = Bytes()
    gpu: Bytes = Bytes()

    @property
    def ratio(self) -> float | None:
        """Compressed over dense engine bytes."""
        return self.engine.ratio


def file_bytes(paths: Iterable[Path]) -> int:
    """Total size of files, each counted once, however many names (links) it has.

    Raises:
        InputError: a file is missing.
    """
    sizes = {}
    for path in paths:
        if not path.is_file():
            raise InputError(f"There is no file {path}", do="Give the files that the engine was built into")
        status = path.stat()
        sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


@dataclass(frozen=True)
class Memory:
    """By how many bytes the memory of a process grew.

    Attributes:
        resident: In all.
        mapped: Of it, files that are mapped; None where the operating system does not say.
    """

    resident: int
    mapped: int | None


def measure_memory(load: Callable[[], T]) -> tuple[T, Memory]:
    """Calls `load` and measures by how many bytes the memory of this process grew.

    `load` should run one forward pass too: mapped weights take no memory before they are touched. What was freed is not
    counted. Freed memory that the process could not give back is used again unseen, so measure in a fresh process.
    """
    gc.collect()
    _give_back()
    before = _memory()
    loaded = load()
    gc.collect()
    _give_back()
    after = _memory()
    mapped = None if before.mapped is None or after.mapped is None else max(0, after.mapped - before.mapped)
    return loaded, Memory(max(0, after.resident - before.resident), mapped)


def _give_back() -> None:
    """Returns to the system what the C library keeps for later: 60 to 200 MB after a model of 538 MB, by chance."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it, musl does not
        trim(0)


def _memory() -> Memory:
    """Of this process, now."""
    info = psutil.Process().memory_info()
    # Linux calls file-backed resident pages "shared", whether anyone shares them or not.
    return Memory(info.rss, getattr(info, "shared", None))
