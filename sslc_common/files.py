"""Files and folders that are whole or absent: written under a temporary name, then moved into place."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sslc_common.errors import InputError

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; moves it onto `path` if the block ends well, else removes it.

    The block may write a file or make a folder under the temporary name; its suffix is that of `path`.
    An interrupted block (Ctrl-C included) leaves nothing behind.

    Raises:
        InputError: the place cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            temporary.replace(path)
        finally:
            remove(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a place that cannot be written into an InputError."""
    try:
        yield
    except Exception as error:
        if _no_space(error):
            free = shutil.disk_usage(existing_parent(path)).free
            raise InputError(
                f"The disk is full: {path} could not be written",
                got=f"{free / 1e6:.0f} MB free",
                do="Free space or choose another place; nothing was left half-written",
            ) from error
        if not isinstance(error, OSError) or error.errno not in _UNWRITABLE:
            raise
        raise InputError(
            f"{path} cannot be written",
            got=str(error),
            allowed="a folder that this user may write to",
            do="Choose another output or change its permissions",
        ) from error


def _no_space(error: BaseException) -> bool:
    # safetensors reports the operating system's error only as text.
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "StorageFull" in str(error)


def require_space(path: Path, size: int) -> None:
    """Raises InputError now if `size` bytes will not fit where `path` goes, rather than after minutes of work."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < size:
        raise InputError(
            f"There is not enough space for {path}",
            got=f"{free / 1e6:.0f} MB free",
            allowed=f"at least {size / 1e6:.0f} MB",
            do="Free space or choose another place",
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = Path(path).absolute()
    while not path.is_dir():
        path = path.parent
    return path


def remove(path: Path) -> None:
    """Removes a file or a folder with all it holds; silent if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
