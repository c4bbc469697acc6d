"""Finds the native library, checks that it is this version's, and loads it."""

from __future__ import annotations

import ctypes
import os
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

from sslc_common.errors import InputError, MissingError

# Instruction sets, the best first; but on Intel's processors without AMX, avx512 is faster than avx512_bf16, which is
# AVX-512 with VNNI and bfloat16 dot products; amx has tiles besides.
KERNELS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
# Those that round activations: of layers with bfloat16 values to bfloat16, where there are many tokens; and of layers
# that allow it to 8 bits, from two tokens on.
ROUND_TO_BF16 = ("amx", "avx512_bf16")
ROUND_TO_BYTES = ("amx", "avx512_bf16", "avx512")

_FOLDER = Path(__file__).resolve().parent
_NAME = "libsslc_ort.dylib" if sys.platform == "darwin" else "libsslc_ort.so"
_BUILD = "build it with `pip install .` (a C++17 compiler and CMake are needed)"


def library_path() -> Path:
    """The library to give to `onnxruntime.SessionOptions.register_custom_ops_library`.

    It lies beside this file, or where the environment variable `SSLC_ORT_LIBRARY` says.

    Raises:
        MissingError: It is absent, cannot be loaded, or was built from another version of this package.
        InputError: `SSLC_KERNEL` asks for an instruction set that this processor lacks.
    """
    path = _library_file()
    _load(path)
    kernel_name()
    return path


def kernel_name() -> str:
    """The instruction set that new layers use: one of `KERNELS`.

    All give the same results but for those of `ROUND_TO_BF16` and `ROUND_TO_BYTES`.

    The best that the processor has, unless the environment variable `SSLC_KERNEL` names one.

    Raises:
        MissingError: As `library_path`.
        InputError: `SSLC_KERNEL` asks for an instruction set that this processor lacks.
    """
    library = load()
    name = library.sslc_kernel_name()
    if name is None:
        raise InputError(
            last_error(library),
            got=f"SSLC_KERNEL={os.environ.get('SSLC_KERNEL', '')}",
            do="Unset SSLC_KERNEL, or set it to one of these",
        )
    return str(name.decode())


def layers_alive() -> int:
    """Layers of all open sessions that run in this library: the difference around opening one is its number."""
    return int(load().sslc_layers_alive())


def op_calls() -> int:
    """How often the op ran in this process, in all sessions."""
    return int(load().sslc_op_calls())


def read_memory(address: int, size: int, threads: int) -> None:
    """Reads `size` bytes once; timing it gives the machine's read bandwidth.

    Args:
        address: Where the memory starts. It has been written before, or it is one page of zeros.
        size: In bytes; much larger than the caches.
        threads: How many threads share the reading; one is the caller.
    """
    if load().sslc_read(ctypes.c_void_p(address), size, threads) != 0:
        raise RuntimeError(last_error(load()))


def load() -> ctypes.CDLL:
    """The library with its functions declared (plugins_ort/src/c_api.cc). Raises as `library_path`."""
    return _load(_library_file())


def last_error(library: ctypes.CDLL) -> str:
    """Why the last call of this thread into `library` failed."""
    return str(library.sslc_last_error().decode())


def _library_file() -> Path:
    wanted = os.environ.get("SSLC_ORT_LIBRARY")
    path = Path(wanted).resolve() if wanted else _FOLDER / _NAME
    if not path.is_file():
        raise MissingError(
            "The native library with the CPU kernels is not there",
            got=path,
            do=f"Correct SSLC_ORT_LIBRARY, or unset it and {_BUILD}" if wanted else _BUILD[0].upper() + _BUILD[1:],
        )
    return path


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.sslc_version.restype = ctypes.c_char_p
        found = library.sslc_version().decode()
    except (OSError, AttributeError) as error:
        raise MissingError(
            f"The native library {path} cannot be loaded", got=error, do=f"It may be of another machine; {_BUILD}"
        ) from error
    if found != (expected := _package_version()):
        raise MissingError(
            f"The native library {path} is of another version than this package",
            got=found,
            allowed=expected,
            do=_BUILD[0].upper() + _BUILD[1:],
        )
    try:
        _declare(library)
    except AttributeError as error:  # in a checkout, the version may be the same and the source newer
        raise MissingError(
            f"The native library {path} is older than this package", got=error, do=_BUILD[0].upper() + _BUILD[1:]
        ) from error
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures: dict[str, tuple[object, list[object]]] = {
        "sslc_last_error": (ctypes.c_char_p, []),
        "sslc_kernel_name": (ctypes.c_char_p, []),
        "sslc_set_kernel": (number, [ctypes.c_char_p]),
        "sslc_layers_alive": (integer, []),
        "sslc_op_calls": (integer, []),
        "sslc_layer_create": (pointer, [number, *[integer] * 3, pointer, pointer, integer, *[pointer] * 4, number]),
        "sslc_layer_destroy": (None, [pointer]),
        "sslc_layer_forward": (number, [pointer, pointer, integer, pointer, number]),
        "sslc_read": (number, [pointer, integer, number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _package_version() -> str:
    # In a checkout pyproject.toml is newer than what was recorded when it was installed.
    project = _FOLDER.parent / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("sslc-export")
