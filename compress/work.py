"""Unfinished work: the folder OUT.partial, which an interrupted run leaves and the next one continues.

A manifest in it says what the work is and which blocks are finished. Shards and manifest are each whole or absent, and
a block counts as finished only once the manifest says so, so that the work can be cut off at any moment.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.folder import write_json
from compress.format import Checkpoint
from compress.report import LayerReport
from sslc_common.errors import InputError
from sslc_common.files import remove, sha256

MANIFEST = "manifest.json"

# Part of the manifest: raise it when a change makes finished blocks, or what is tuned, differ from what a rerun writes.
ALGORITHM_VERSION = 15


@dataclass
class Work:
    """Work on one output.

    Attributes:
        folder: OUT.partial.
        identity: What decides the result: the source, the calibration, the options, the version of the algorithms.
        finished: The layers of each finished block, in order.
    """

    folder: Path
    identity: dict[str, Any]
    finished: list[list[LayerReport]] = field(default_factory=list)

    @classmethod
    def begin(cls, out: Path, identity: dict[str, Any], overwrite: bool) -> Work:
        """Continues the work left for `out`, or begins it.

        Raises:
            InputError: work is there that was begun with something else, and `overwrite` is off.
        """
        work = cls(partial_folder(out), identity)
        manifest = work.folder / MANIFEST
        if manifest.is_file():
            content = json.loads(manifest.read_bytes())
            difference = _difference(content["identity"], work.identity)
            if difference is None:
                work.finished = [[LayerReport(**row) for row in rows] for rows in content["blocks"]]
            elif overwrite:
                remove(work.folder)
            else:
                key, theirs, ours = difference
                raise InputError(
                    f"{work.folder} holds interrupted work that was begun with another {key}",
                    got=f"{ours!r}, but the work there was begun with {theirs!r}",
                    do=f"Run again with what it was begun with, or remove {work.folder}, or overwrite",
                )
        work.folder.mkdir(parents=True, exist_ok=True)
        for leftover in work.folder.glob(".*.partial*"):  # what a killed run was writing
            remove(leftover)
        work.save()
        return work

    def finish_block(self, layers: list[LayerReport]) -> None:
        """Notes that the next block's shard is written."""
        self.finished.append(layers)
        self.save()

    def save(self) -> None:
        """Writes the manifest."""
        blocks = [[asdict(row) for row in rows] for rows in self.finished]
        write_json(self.folder / MANIFEST, {"identity": self.identity, "blocks": blocks})

    def written_bytes(self) -> int:
        """Bytes of the files that are there already."""
        return sum(path.stat().st_size for path in self.folder.rglob("*"))

    def publish(self, out: Path) -> None:
        """Moves the finished folder to its place, replacing what is there."""
        remove(out)
        self.folder.replace(out)
        (out / MANIFEST).unlink()


def partial_folder(out: Path) -> Path:
    """Where work on `out` goes."""
    return out.with_name(out.name + ".partial")


def source_hash(source: Checkpoint) -> str:
    """SHA-256 over config.json and the weight files of a model."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    for file in sorted({ref.file for ref in source.tensors.values()}):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _difference(theirs: dict[str, Any], ours: dict[str, Any], path: str = "") -> tuple[str, Any, Any] | None:
    """The first entry in which two identities differ: its name, their value, ours."""
    for key in theirs | ours:
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if (found := _difference(a, b, f"{path}{key}.")) is not None:
                return found
        elif a != b:
            return f"{path}{key}", a, b
    return None
