"""Looks around: which backends, libraries, compilers and devices are here, what each enables, how to get the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sslc_common.errors import UserError

CPU, BUILD, RUN = "engine.onnx", "engine.plan, built here", "engine.plan, run here"
PATHS = (CPU, BUILD, RUN)  # what can be done on a machine


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        name: What was looked for.
        found: What was found, None if it is missing.
        enables: What it is good for.
        get: How to get it, or why it was refused.
        needed_for: Which of PATHS cannot do without it.
    """

    name: str
    found: str | None
    enables: str
    get: str
    needed_for: tuple[str, ...] = ()


def examine() -> Iterator[Finding]:
    """Yields all findings, the ones that the CPU path needs first."""
    yield Finding("machine", _machine(), "threads and memory of the CPU engine", "")
    for package, enables, needed_for in (
        ("torch", "compression, the reference that engines are compared with", PATHS),
        ("transformers", "loading models and tokenizers", PATHS),
        ("onnxscript", "lowering to ONNX", (CPU, BUILD)),
        ("onnxruntime", "engine.onnx on CPUs", (CPU,)),
    ):
        yield Finding(package, _version(package), enables, f"pip install {package}", needed_for)
    yield _cpu_kernel()
    yield Finding(
        "compiler",
        next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None),
        "building the CPU kernel from source",
        "apt install g++",
    )
    yield Finding("gguf", _version("gguf"), "--model FILE.gguf", "pip install gguf")
    yield Finding("datasets", _version("datasets"), "calibration on Hugging Face datasets", "pip install datasets")
    tensorrt = next((f"{p} {_version(p)}" for p in ("tensorrt_rtx", "tensorrt") if _version(p)), None)
    yield Finding("tensorrt", tensorrt, "engine.plan", "pip install tensorrt-rtx-cu13", (BUILD, RUN))
    yield _tensorrt_plugin()
    device = "a machine with an NVIDIA GPU, its driver, and a CUDA build of torch"
    yield Finding("CUDA device", _cuda_device(), "running engine.plan (building needs none)", device, (RUN,))


def paths(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """What each of PATHS lacks."""
    missing = [finding for finding in findings if finding.found is None]
    return {path: [finding.name for finding in missing if path in finding.needed_for] for path in PATHS}


def _machine() -> str:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{system}, {os.cpu_count()} cores, {memory:.0f} GiB"


def _version(package: str) -> str | None:
    """The installed version, found without importing the package."""
    if importlib.util.find_spec(package) is None:
        return None
    for distribution in importlib.metadata.packages_distributions().get(package, [package]):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _cpu_kernel() -> Finding:
    from plugins_ort.library import kernel_name, library_path

    enables = "engine.onnx at full speed; without it the same file runs on standard ops, slowly"
    try:
        return Finding("CPU kernel", f"{kernel_name()} in {library_path()}", enables, "", (CPU,))
    except UserError as error:
        return Finding("CPU kernel", None, enables, str(error).rstrip("."), (CPU,))


def _tensorrt_plugin() -> Finding:
    from plugins_trt.library import headers_version, library_path

    enables = "building engine.plan, which then has it inside"
    try:
        path = library_path()
        return Finding("plugin", f"{path}, for TensorRT {headers_version(path)} and later", enables, "", (BUILD,))
    except UserError as error:
        return Finding("plugin", None, enables, str(error).rstrip("."), (BUILD,))


def _cuda_device() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
