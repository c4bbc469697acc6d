"""The C++ loader example compiles and links, and says so where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from tests.plugins_trt.emulator import SOURCE
from tests.plugins_trt.toolchain import nvcc, run, tensorrt_headers


def test_the_loader_example_compiles_and_asks_for_a_gpu(tmp_path):
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13")
    libraries, program = Path(spec.submodule_search_locations[0]), tmp_path / "load_engine"
    command = [nvcc(), "-std=c++17", "-x", "c++", SOURCE / "examples" / "load_engine.cpp", "-o", program]
    link = [f"-L{libraries}", "-l:libtensorrt_rtx.so.1", f"-Xlinker=-rpath,{libraries}"]
    run(*command, f"-I{tensorrt_headers()}", *link)
    (tmp_path / "engine.plan").write_bytes(b"not empty")
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([program, tmp_path / "engine.plan"], capture_output=True, text=True, env=hidden)
    assert (done.returncode, done.stderr) == (3, "there is no CUDA device\n")
