"""Finds the TensorRT plugin, checks that it is this version's, and registers it with the TensorRT that is installed."""

from __future__ import annotations

import ctypes
import os
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from sslc_common.errors import MissingError

NAME, VERSION, NAMESPACE = "LowRankSparseLinear", "1", "sslc"

_FOLDER = Path(__file__).resolve().parent
_LIBRARY = "libsslc_trt.so"
_ALIAS = "libsslc_rtx_alias.so"
_BUILD = (
    "Build it: `make plugin` in a checkout, elsewhere `cmake -S "
    f"{_FOLDER} -B build-trt && cmake --build build-trt && cmake --install build-trt`, with nvcc of the CUDA toolkit "
    "(12.8 or later) and TensorRT's headers in TENSORRT_INCLUDE_DIR"
)


def library_path() -> Path:
    """The plugin library, checked.

    It lies beside this file, or where the environment variable `SSLC_TRT_LIBRARY` says.

    Raises:
        MissingError: It is absent, cannot be loaded, or was built from another version of this package.
    """
    wanted = os.environ.get("SSLC_TRT_LIBRARY")
    path = Path(wanted).resolve() if wanted else _FOLDER / _LIBRARY
    if not path.is_file():
        do = f"Correct SSLC_TRT_LIBRARY, or unset it. {_BUILD}" if wanted else _BUILD
        raise MissingError("The TensorRT plugin is not there", got=path, do=do)
    try:
        library = ctypes.CDLL(str(path))
        library.sslc_trt_version.restype = ctypes.c_char_p
        found = library.sslc_trt_version().decode()
        library.getCreators, library.setLoggerFinder  # noqa: B018 - what TensorRT will look for
    except (OSError, AttributeError) as error:
        raise MissingError(f"The TensorRT plugin {path} cannot be loaded", got=error, do=_BUILD) from error
    if found != (expected := _package_version()):
        raise MissingError(
            f"The TensorRT plugin {path} is of another version than this package",
            got=found,
            allowed=expected,
            do=_BUILD,
        )
    return path


def headers_version(path: Path) -> str:
    """The TensorRT version whose headers the plugin was built with, for example "10.14.1"."""
    number = int(ctypes.CDLL(str(path)).sslc_trt_headers())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def register(trt: ModuleType, path: Path | None = None) -> Path:
    """Registers the plugin with TensorRT and returns the library's path.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        path: The plugin library; None for `library_path()`.

    Raises:
        MissingError: The library is not there, or TensorRT does not get the plugin out of it: TensorRT itself says
            nothing when a name, version or namespace differs, and would fail much later or take another plugin.
    """
    path = path or library_path()
    require_headers(trt, path)
    load_alias(trt, path.parent)
    registry = trt.get_plugin_registry()
    if creator(registry) is not None:
        return path
    registry.load_library(str(path))
    if creator(registry) is None:
        others = [f"{c.plugin_namespace}::{c.name} {c.plugin_version}" for c in registry.all_creators if c.name == NAME]
        raise MissingError(
            f"TensorRT {trt.__version__} does not find the plugin {NAMESPACE}::{NAME} {VERSION} in {path}",
            got=", ".join(others) or "no plugin of that name",
            allowed="the library that this version of the package builds, with headers of this TensorRT or older",
            do=_BUILD,
        )
    return path


def require_headers(trt: ModuleType, path: Path) -> None:
    """Refuses a plugin that was built for a newer TensorRT, or with TensorRT-RTX's headers for TensorRT.

    TensorRT-RTX takes plugins with TensorRT's headers too; their version numbers cannot be compared.

    Raises:
        MissingError: the plugin does not fit.
    """
    headers, here = headers_version(path), str(trt.__version__)
    of_rtx, rtx = _numbers(headers)[0] < 8, trt.__name__.startswith("tensorrt_rtx")
    if (rtx and not of_rtx) or (rtx == of_rtx and _numbers(headers) <= _numbers(here)):
        return
    raise MissingError(
        f"The TensorRT plugin {path} was built for another TensorRT than {trt.__name__} {here}",
        got=f"headers of {'TensorRT-RTX' if of_rtx else 'TensorRT'} {headers}",
        allowed=f"headers of {'TensorRT 10 or later, or TensorRT-RTX' if rtx else 'TensorRT'} up to {here}",
        do=_BUILD,
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def creator(registry: Any) -> Any:
    """The registered creator with exactly our name, version and namespace, or None."""
    for c in registry.all_creators:
        if (c.name, c.plugin_version, c.plugin_namespace) == (NAME, VERSION, NAMESPACE):
            return c
    return None


def load_alias(trt: ModuleType, folder: Path = _FOLDER) -> None:
    """Makes "libtensorrt_rtx.so" resolve to the "libtensorrt_rtx.so.1" that is already in this process.

    When a network has a plugin, TensorRT-RTX's parser opens the first name, which its Python wheel lacks, and aborts
    the process. Otherwise users would have to set LD_LIBRARY_PATH before starting Python.

    Raises:
        MissingError: The small library that bears the missing name is not there.
    """
    if not trt.__name__.startswith("tensorrt_rtx") or not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libtensorrt_rtx.so", mode=ctypes.RTLD_GLOBAL)  # the SDK is installed, or a previous call was here
    except OSError:
        try:
            ctypes.CDLL(str(folder / _ALIAS), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise MissingError(
                "TensorRT-RTX would not find itself: its wheel lacks the name libtensorrt_rtx.so", got=error, do=_BUILD
            ) from error


def _package_version() -> str:
    # In a checkout pyproject.toml is newer than what was recorded when it was installed.
    project = _FOLDER.parent / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("sslc-export")
