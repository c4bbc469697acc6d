"""The plugin, compiled by nvcc, through its whole life on a stand-in for the CUDA runtime.

With SSLC_ON_GPU=1 the same on the GPU of this machine (scripts/gpu_check.sh).
"""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.plugins_trt.emulator import outputs_of, random_case, random_stack, worst_error, write_case, write_stack
from tests.plugins_trt.test_kernel import FORMATS, IDS
from tests.plugins_trt.toolchain import build_for_gpu, build_plugin, build_stand_in, tensorrt_headers

ON_GPU = bool(os.environ.get("SSLC_ON_GPU"))


@pytest.fixture(scope="module")
def life():
    if ON_GPU:
        plugin = build_plugin("Static", "native") / "libsslc_trt.so"
        program = build_for_gpu("life.cpp", f"-isystem={tensorrt_headers()}")
    else:
        plugin = build_plugin("Shared") / "libsslc_trt.so"
        _, program = build_stand_in()
    return lambda case, *changes: subprocess.run([program, plugin, case, *changes], capture_output=True, text=True)


def launches(done):
    """What the stand-in counted."""
    return int(done.stdout.split("launches:")[1])


@pytest.mark.parametrize("type", ["f16", "bf16"])
@pytest.mark.parametrize("f32", [False, True], ids=["half", "f32"])
@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
def test_from_creation_to_the_right_numbers(life, tmp_path, layout, rule, int8, f32, type):
    for M, rank, K in ((1, 0, 300), (5, 20, 1100), (40, 64, 576), (260, 100, 130)):
        options = {"rule": rule, "int8": int8, "layout": layout, "type": type, "f32": f32}
        case = random_case(M, 36, K, rank, M, **options)
        write_case(case, tmp_path / "case")
        done = life(tmp_path / "case")
        assert done.returncode == 0, done.stdout + done.stderr
        assert worst_error(case, outputs_of([case], tmp_path / "case")[0]) <= 1
        assert ON_GPU or launches(done) >= (1 if rank == 0 else 2)


@pytest.mark.parametrize("M", [5, 260])
@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
def test_layers_of_the_same_input_have_an_output_each(life, tmp_path, layout, rule, int8, M):
    # Each layer by itself: t, decode and perhaps reduce; or expand, convert, t and gemm. Here only gemm is one each.
    cases = random_stack(M, (36, 16, 1), 300, (20, 0, 64), M, rule=rule, int8=int8, layout=layout)
    write_stack(cases, tmp_path / "case")
    done = life(tmp_path / "case")
    assert done.returncode == 0, done.stdout + done.stderr
    for case, output in zip(cases, outputs_of(cases, tmp_path / "case"), strict=True):
        assert worst_error(case, output) <= 1
    assert ON_GPU or launches(done) <= (3 if M == 5 else 3 + len(cases))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop=rank", "attribute rank is missing"),
        ("drop=layout", "attribute layout is missing"),
        ("layout=rows64", "attribute layout has a value"),
        ("type=f8", "attribute type has a value"),
        ("values=int4", "attribute values has a value"),
        ("slot=33", "slot 33 does not belong to layout any"),
        ("slot=1048576", "slot 1048576 does not belong"),
        ("out_features=0", "not a layer's shape"),
        ("rank=-1", "not a layer's shape"),
        ("columns=320", "X has 320 columns; in_features is 300"),
        ("words=S:0", "S has 0 elements"),
        ("out_features=64", "elements in 1 dimensions"),
        ("rank=100", "U has 4 elements"),
        ("inputs=4", "it has 5"),
        ("also=rank", "out_features has 1 values, rank has 2"),
        ("also=slot", "attribute slot has a value"),
    ],
)
def test_what_cannot_work_is_refused_in_words(life, tmp_path, change, message):
    write_case(random_case(0, 36, 300, 0, 2, rule="free:0.5", layout="any"), tmp_path / "case")
    done = life(tmp_path / "case", change)
    assert done.returncode == 3, done.stdout
    assert message in done.stdout
    assert "refused" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [("slot=4600", "slot 4600 does not belong to layout bank32"), ("values=int8", "bank32 takes no int8")],
)
def test_bank32_is_checked_too(life, tmp_path, change, message):
    write_case(random_case(0, 36, 300, 0, 2, rule="32:64", layout="bank32"), tmp_path / "case")
    done = life(tmp_path / "case", change)
    assert done.returncode == 3, done.stdout
    assert message in done.stdout
