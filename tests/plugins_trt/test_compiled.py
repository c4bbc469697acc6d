"""What nvcc makes of the kernels for every architecture: registers, spills, shared memory, instructions per weight."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from scripts import predict_gpu
from tests.plugins_trt.emulator import SOURCE
from tests.plugins_trt.toolchain import build_for_gpu, nvcc, run

# Registers per thread. decode(): 512 threads per multiprocessor must fit. gemm(): 256 threads, 64 of the registers are
# accumulators. The others are bound by memory and want many threads.
MOST_REGISTERS = {"decode": 128, "expand": 64, "gemm": 224, "reduce": 48, "convert": 48}
KERNELS = 48 + 10 + 4 + 2 * 2  # decode: 12 formats × 4; expand: 10 formats; gemm: 2 types × 2; reduce, convert: 2

ARCHITECTURES = [pytest.param(a, marks=() if a == "80" else pytest.mark.slow) for a in predict_gpu.ARCHITECTURES]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_spills_and_shared_memory(architecture, tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(
        f'#include "{SOURCE}/src/launch.h"\n'
        "cudaError_t use(const sslc::Layer& l, const sslc::Device& d, const sslc::Buffers& b, int M, cudaStream_t s)"
        "{ return sslc::run_layer(l, d, b, M, false, s); }\n"
    )
    command = [nvcc(), "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, "-o", tmp_path / "out.cubin", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found = re.findall(pattern, done.stderr, re.S)
    assert len(found) == KERNELS
    for name, stack, stores, registers, rest in found:
        kind = next(k for k in MOST_REGISTERS if f"{len(k)}{k}" in name)
        # Those for 64 tokens keep a few addresses there, written once.
        most = 40 if kind == "decode" and "ELi8E" in name else 0
        assert max(int(stack), int(stores)) <= most, f"{name} uses local memory"
        assert int(registers) <= MOST_REGISTERS[kind], f"{name} uses {registers} registers"
        assert "smem" not in rest, f"{name} has static shared memory, which no plan of launch.h counts"


@pytest.mark.slow
def test_the_program_for_gpus_compiles_and_asks_for_one():
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    program = build_for_gpu("on_gpu.cu", architecture="sm_80")
    done = subprocess.run([program, "case"], capture_output=True, text=True, env=hidden)
    assert done.returncode == 1
    assert done.stderr.startswith("the GPU: ")


@pytest.mark.slow
def test_the_plugin_compiles_with_other_headers(tmp_path):
    """TENSORRT_INCLUDE_DIRS: include folders of releases (github.com/NVIDIA/TensorRT), separated by colons."""
    folders = os.environ.get("TENSORRT_INCLUDE_DIRS")
    if not folders:
        pytest.skip("TENSORRT_INCLUDE_DIRS names no other TensorRT headers")
    for folder in folders.split(":"):
        command = [nvcc(), "-std=c++17", "-arch=sm_80", "-shared", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror"]
        run(*command, "-isystem", folder, "-o", tmp_path / "plugin.so", SOURCE / "src" / "plugin.cu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cost_per_weight_is_no_worse_than_recorded(architecture):
    nvcc()
    if shutil.which("cuobjdump", path=predict_gpu.SEARCH_PATH) is None:
        pytest.skip("no cuobjdump: `make plugin` fetches it")
    recorded = json.loads(predict_gpu.COSTS.read_text())
    assert predict_gpu.worse(predict_gpu.measure([architecture]), {architecture: recorded[architecture]}) == []


def test_a_worse_cost_is_noticed():
    recorded = json.loads(predict_gpu.COSTS.read_text())
    costs = {a: {k: predict_gpu.Cost(**v) for k, v in layouts.items()} for a, layouts in recorded.items()}
    assert predict_gpu.worse(costs, recorded) == []
    recorded["80"]["fixed8, 8 of 16"]["all"] *= 0.9
    assert len(predict_gpu.worse(costs, recorded)) == 1


def test_the_prediction_says_that_it_is_one():
    recorded = json.loads(predict_gpu.COSTS.read_text())
    text = predict_gpu.table({a: {k: predict_gpu.Cost(**v) for k, v in x.items()} for a, x in recorded.items()})
    assert text.startswith("PREDICTED")
    assert "not measured" in text
    assert all(gpu in text for gpu in predict_gpu.GPUS)
