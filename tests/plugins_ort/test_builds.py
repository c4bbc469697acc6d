"""The kernel sweep again, with other builds: under the compiler's sanitizers, and with AVX-512 emulated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (sys.platform == "linux" and shutil.which("cmake") and shutil.which("g++")),
        reason="g++ and CMake on Linux are needed",
    ),
]


MEMORY = ("libasan.so", "libubsan.so")


@pytest.mark.parametrize(
    ("options", "runtimes", "tests"),
    [
        (["-DSSLC_SANITIZE=address,undefined"], MEMORY, "test_kernels"),
        (["-DSSLC_SANITIZE=thread"], ("libtsan.so",), "number_of_threads or any_layer"),
        # plugins_ort/emulator: the AVX-512 kernels' own source, on a processor of any kind.
        (["-DSSLC_EMULATE=ON"], (), "(avx512 or amx) and not neighbours"),
        (["-DSSLC_EMULATE=ON", "-DSSLC_SANITIZE=address,undefined"], MEMORY, "(avx512 or amx) and side_by_side"),
    ],
    ids=["address and undefined", "thread", "emulated", "emulated, address and undefined"],
)
def test_the_kernel_sweep_passes_with(
    options: list[str], runtimes: tuple[str, ...], tests: str, tmp_path: Path
) -> None:
    build = ["cmake", "-S", ROOT, "-B", tmp_path, *options, "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    subprocess.run([*build, "-DCMAKE_CXX_COMPILER=g++"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "--parallel", "2"], check=True, capture_output=True)
    environment = {
        **os.environ,
        "SSLC_ORT_LIBRARY": str(tmp_path / "libsslc_ort.so"),
        # Python itself is not built with them, so that their runtimes must be there first.
        "LD_PRELOAD": " ".join(
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in runtimes
        ),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python never frees some of its memory
        "TSAN_OPTIONS": "halt_on_error=1",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's own threads are not instrumented
    }
    sweep = [sys.executable, "-m", "pytest", "tests/plugins_ort/test_kernels.py", "-p", "no:cacheprovider", "-k", tests]
    result = subprocess.run(sweep, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    if "-DSSLC_EMULATE=ON" in options:
        assert not re.search("has no (avx512|amx)", result.stdout)  # the kernels ran, rather than being skipped
