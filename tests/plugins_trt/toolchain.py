"""Finds nvcc and TensorRT's headers, and builds the plugin for the tests: one GPU architecture, kept between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scripts.predict_gpu import ROOT, SEARCH_PATH
from tests.plugins_trt.emulator import SOURCE


def nvcc() -> str:
    path = shutil.which("nvcc", path=SEARCH_PATH)
    if path is None:
        pytest.skip("no nvcc: `make plugin` fetches it (the kernels' source runs in the emulator's tests all the same)")
    return path


def tensorrt_headers() -> Path:
    wanted = os.environ.get("TENSORRT_INCLUDE_DIR")
    if wanted:
        return Path(wanted)
    fetched = ROOT / "build" / "cuda" / "kernel_lens" / "include" / "tensorrt"
    for folder in (Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include/aarch64-linux-gnu"), fetched):
        if (folder / "NvInferRuntime.h").is_file():
            return folder
    pytest.skip("no TensorRT headers: `make plugin` fetches them, or set TENSORRT_INCLUDE_DIR")


def kept_folder(*parts: str) -> tuple[Path, bool]:
    """A folder for what is built from the present sources and `parts`, and whether it is already there."""
    digest = hashlib.sha256(" ".join(parts).encode())
    files = [SOURCE / "CMakeLists.txt", *(SOURCE / "src").iterdir(), *(SOURCE / "emulator").iterdir()]
    for file in sorted(f for f in files if f.is_file()):
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"sslc-plugin-{os.getuid()}" / digest.hexdigest()[:24]
    return folder, folder.is_dir()


def keep(partial: Path, folder: Path) -> None:
    """Moves what was built into place, unless another process was faster."""
    try:
        partial.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def build_plugin(runtime: str, architectures: str = "80-real") -> Path:
    """The folder of the plugin for one GPU, built by its CMakeLists.txt with the CUDA runtime "Static" or "Shared"."""
    compiler, headers = nvcc(), tensorrt_headers()
    folder, there = kept_folder("plugin", runtime, architectures, compiler, str(headers))
    if there:
        return folder
    cmake = shutil.which("cmake", path=f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}")
    if cmake is None:
        pytest.skip("no cmake: pip install cmake")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    options = [f"-DCMAKE_CUDA_COMPILER={compiler}", f"-DTENSORRT_INCLUDE_DIR={headers}"]
    options += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", f"-DCMAKE_CUDA_RUNTIME_LIBRARY={runtime}"]
    run(cmake, "-S", SOURCE, "-B", partial, *options)
    run(cmake, "--build", partial)
    for name in ("CMakeFiles", "CMakeCache.txt"):  # the build folder is about to move
        path = partial / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    keep(partial, folder)
    return folder


def build_for_gpu(source: str, *options: str, architecture: str = "native") -> Path:
    """A program of `emulator/` compiled for the GPU: on_gpu.cu runs the cases of emulator.py, life.cpp the plugin."""
    folder, there = kept_folder(source, nvcc(), *options, architecture)
    if not there:
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        flags = ["-std=c++17", f"-arch={architecture}", "-Xcompiler=-Wall,-Wextra", "-x", "cu", *options]
        run(nvcc(), *flags, SOURCE / "emulator" / source, "-o", partial / "program", "-ldl")
        keep(partial, folder)
    return folder / "program"


def build_stand_in() -> tuple[Path, Path]:
    """(folder with the stand-in for libcudart.so.13, the program `life`)."""
    headers = tensorrt_headers()
    # nvcc may be a wrapper script: it says itself where the toolkit lies.
    said = run(nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull)
    top = next(line.split("=", 1)[1].strip() for line in said.splitlines() if line.startswith("#$ TOP="))
    cuda = Path(top) / "include"
    folder, there = kept_folder("stand-in", str(headers))
    if not there:
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        flags = ["-std=c++20", "-O2", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        library = partial / "libcudart.so.13"
        shared = ["-shared", "-fPIC", "-Wl,-soname,libcudart.so.13"]
        run("g++", *flags, *shared, "-o", library, SOURCE / "emulator" / "cudart.cpp")
        include = ["-isystem", headers, "-isystem", cuda]
        # The program names the stand-in itself, so that the plugin finds it already loaded, and its kernels visible.
        link = ["-Wl,--no-as-needed", library, "-Wl,-rpath,$ORIGIN", "-ldl"]
        run("g++", *flags, *include, "-o", partial / "life", SOURCE / "emulator" / "life.cpp", *link)
        keep(partial, folder)
    return folder, folder / "life"


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr
