"""One safetensors file: written with a SHA-256 of every tensor, and its header read strictly.

The safetensors library validates sizes, offsets and the header's JSON before anything is allocated; this file turns
what it finds into errors for the user and adds the byte ranges that the library does not tell.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sslc_common.errors import InputError
from sslc_common.files import atomic_path

CHECKSUM = "sha256."  # __metadata__ key of a tensor's checksum: this, then its name


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies.

    Attributes:
        file: The safetensors file.
        dtype: As safetensors writes it: "F32", "BF16", "I32", ...
        shape: Its shape.
        offset: First byte, counted from the beginning of the file.
        length: Number of bytes.
        sha256: Of those bytes, in hexadecimal; None if the file has none (dense models).
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    sha256: str | None = None


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one shard, whole or not at all, the same bytes for the same tensors."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {CHECKSUM + name: checksum(tensor) for name, tensor in contiguous.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", **metadata})
        except SafetensorError as error:
            # The library tells the system's errors, a full disk above all, only in its text.
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), str(error), str(path)) from error
            raise
        _sort_metadata(temporary)


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of a safetensors file, none of which is read.

    Raises:
        InputError: there is no such file, or it is cut off or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            file.metadata()
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing", do="Copy or download the whole folder again, or compress the model again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors",
            got=f"{error} ({path.stat().st_size if path.is_file() else 0} bytes)",
            do="The file is cut off or damaged: copy or download it again, or compress the model again",
        ) from error
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
    metadata = header.pop("__metadata__", {})
    return {
        name: TensorRef(
            file=path,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + size + entry["data_offsets"][0],
            length=entry["data_offsets"][1] - entry["data_offsets"][0],
            sha256=metadata.get(CHECKSUM + name),
        )
        for name, entry in header.items()
    }


def read_tensor(name: str, ref: TensorRef) -> Tensor:
    """One tensor, its checksum verified if the file has one.

    Raises:
        InputError: the bytes are not those that were written.
    """
    with safe_open(ref.file, "pt") as file:
        tensor = file.get_tensor(name)
    if ref.sha256 is not None and (found := checksum(tensor)) != ref.sha256:
        raise InputError(
            f"Tensor {name} in {ref.file} is damaged: its SHA-256 is not the one written with it",
            got=found,
            allowed=ref.sha256,
            do="Copy or download the file again, or compress the model again",
        )
    return tensor


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, in hexadecimal."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _sort_metadata(path: Path) -> None:
    """Orders the keys of `__metadata__`, which the library writes in a random order: equal tensors, equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The library writes the same compact JSON, padded with spaces: only the order may differ.
        if len(text) > size:
            raise AssertionError(f"the header of {path} grew from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))
