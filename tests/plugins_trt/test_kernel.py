"""The CUDA kernels' own source, run on the CPU emulator, against float64.

With SSLC_ON_GPU=1 the same cases run on the GPU of this machine (scripts/gpu_check.sh).
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.plugins_trt.emulator import (
    compile_emulator,
    random_case,
    random_stack,
    run_cases,
    run_stacks,
    worst_error,
)
from tests.plugins_trt.toolchain import build_for_gpu

# layout, mask rule, int8
FORMATS = [
    ("any", "free:0.5", False),
    ("any", "free:0.5", True),
    ("bank32", "32:64", False),
    ("fixed8", "8:16", False),
    ("fixed8", "8:16", True),
]
IDS = [f"{layout}{'-int8' if int8 else ''}" for layout, _, int8 in FORMATS]


@pytest.fixture(scope="module")
def program():
    return build_for_gpu("on_gpu.cu") if os.environ.get("SSLC_ON_GPU") else compile_emulator()


def check(program, folder, cases):
    outputs = run_cases(program, cases, folder)
    for case, output in zip(cases, outputs, strict=True):
        error = worst_error(case, output)
        assert error <= 1, f"{error:.3g} × allowed at N, K = {case.mask.shape}, M = {len(case.X)}, rank = {len(case.V)}"


@pytest.mark.parametrize("type", ["f16", "bf16"])
@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
def test_decode_over_shapes_with_tails(program, tmp_path, layout, rule, int8, type):
    shapes = [  # N, K, rank, M
        (16, 256, 0, 1),
        (32, 512, 64, 8),
        (33, 576, 16, 5),  # SmolLM2's width, tails in N and in the rank
        (48, 1536, 128, 16),
        (16, 896, 100, 11),  # Qwen2-0.5B's width
        (1, 1, 1, 1),
        (17, 65, 3, 2),
        (31, 1000, 65, 9),  # K % 64 and K % 8 == 0
        (20, 77, 0, 3),  # K odd: no 16-byte loads of activations
        (16, 2816, 64, 3),  # the ring wraps more than once
    ]
    cases = [
        random_case(i, N, K, r, M, rule=rule, int8=int8, layout=layout, type=type, late=bool(i % 2), reverse=i % 3 == 0)
        for i, (N, K, r, M) in enumerate(shapes)
    ]
    check(program, tmp_path, cases)


@pytest.mark.parametrize("type", ["f16", "bf16"])
@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
def test_f32_activations_are_rounded_to_the_weights_type(program, tmp_path, layout, rule, int8, type):
    shapes = [(40, 320, 20, 3), (16, 77, 0, 16), (24, 130, 8, 260)]
    check(
        program,
        tmp_path,
        [random_case(7, *s, rule=rule, int8=int8, layout=layout, type=type, f32=True) for s in shapes],
    )


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
def test_split_k_takes_every_column_once(program, tmp_path, layout, rule, int8, splits):
    # The last splits may hold low-rank columns only, or both kinds.
    shapes = [(16, 768, 192, 4), (20, 640, 40, 9), (16, 2048, 320, 1)]
    cases = [random_case(3, *s, rule=rule, int8=int8, layout=layout, splits=splits) for s in shapes]
    check(program, tmp_path, cases)


@pytest.mark.parametrize("M", [17, 33, 64, 65, 200])
def test_more_tokens_run_as_slices(program, tmp_path, M):
    check(
        program,
        tmp_path,
        [random_case(M, 40, 512, 32, M, rule=rule, layout=layout) for layout, rule, int8 in FORMATS if not int8],
    )


@pytest.mark.parametrize("type", ["f16", "bf16"])
@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
def test_prefill_expands_and_multiplies(program, tmp_path, layout, rule, int8, type):
    shapes = [(128, 256, 64, 272), (150, 320, 20, 257), (16, 65, 0, 300), (300, 77, 130, 260)]
    cases = [
        random_case(i, *s, rule=rule, int8=int8, layout=layout, type=type, late=bool(i % 2))
        for i, s in enumerate(shapes)
    ]
    check(program, tmp_path, cases)


# q, k and v of a grouped-query attention; gate and up; one without a low-rank part, one that is nothing else but small.
STACKS = [((48, 16, 20), (64, 7, 100)), ((33, 33), (0, 65)), ((1, 40, 16), (130, 0, 0)), ((17, 5), (0, 0))]


@pytest.mark.parametrize("type", ["f16", "bf16"])
@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
def test_layers_of_the_same_input_are_one_launch(program, tmp_path, layout, rule, int8, type):
    options = {"rule": rule, "int8": int8, "layout": layout, "type": type}
    stacks = [
        random_stack(i, outs, K, ranks, M, splits=splits, f32=f32, **options)
        for i, (outs, ranks) in enumerate(STACKS)
        # 200 columns are 4 tiles: of 3 splits the last has columns of U only, and a part without a rank has none there.
        for K, M, splits, f32 in (
            (576, 3, 0, False),
            (200, 9, 3, False),
            (1100, 40, 3, True),
            (130, 260, 0, i % 2 == 0),
        )
    ]
    for cases, outputs in zip(stacks, run_stacks(program, stacks, tmp_path), strict=True):
        for case, output in zip(cases, outputs, strict=True):
            assert worst_error(case, output) <= 1


@pytest.mark.parametrize("M", [4, 260])
def test_a_layer_has_the_same_bits_in_a_stack_as_alone(program, tmp_path, M):
    cases = random_stack(0, (32, 16, 48), 512, (64, 64, 64), M, rule="free:0.5", splits=2)
    stacked = run_stacks(program, [cases], tmp_path)[0]
    for case, output in zip(cases, stacked, strict=True):
        assert np.array_equal(output, run_cases(program, [case], tmp_path)[0])


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 0.7, 0.97, 1.0])
def test_any_density(program, tmp_path, density):
    cases = [
        random_case(1, 32, 448, 16, M, rule=f"free:{density}", int8=int8, layout="any")
        for M in (2, 260)
        for int8 in (False, True)
    ]
    check(program, tmp_path, cases)


def test_the_same_call_gives_the_same_bits(program, tmp_path):
    for splits in (1, 4):
        case = random_case(0, 64, 2048, 64, 5, rule="32:64", layout="bank32", splits=splits)
        first, second = (run_cases(program, [case], tmp_path)[0] for _ in range(2))
        case.reverse, case.late = True, False
        third = run_cases(program, [case], tmp_path)[0]
        assert np.array_equal(first, second)
        assert np.array_equal(first, third), "the result depends on the order in which threads run"


@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
@pytest.mark.parametrize("M", [4, 260])
def test_a_bad_token_spoils_no_other(program, tmp_path, layout, rule, int8, M):
    # Nothing behind a row of activations may be read as part of it: token 1 is NaN, and follows token 0 in memory.
    case = random_case(0, 32, 100, 8, M, rule=rule, int8=int8, layout=layout)
    case.X[1] = np.nan
    output = run_cases(program, [case], tmp_path)[0]
    assert np.isnan(output[1]).all()
    clean = np.delete(output, 1, axis=0)
    case.X[1] = 0
    assert worst_error(case, np.insert(clean, 1, case.bias, axis=0)) <= 1


# K of every linear layer of the three models (and N scaled down): q/k/v/o and gate/up, then down.
MODELS = {"LLaMA-2-7B": (4096, 11008), "LLaMA-3-8B": (4096, 14336), "Qwen2.5-7B": (3584, 18944)}


@pytest.mark.parametrize(("layout", "rule", "int8"), FORMATS, ids=IDS)
@pytest.mark.parametrize("model", MODELS)
def test_widths_of_published_models(program, tmp_path, model, layout, rule, int8):
    cases = [
        random_case(K, 48, K, 128, M, rule=rule, int8=int8, layout=layout, multiprocessors=108)
        for K in MODELS[model]
        for M in (1, 16)
    ]
    check(program, tmp_path, cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "K", "layout", "rule"),
    [(4096, 4096, "bank32", "32:64"), (4096, 11008, "any", "free:0.5"), (18944, 3584, "fixed8", "8:16")],
)
def test_true_size_layers(program, tmp_path, N, K, layout, rule):
    cases = [
        random_case(1, N, K, 128, M, rule=rule, layout=layout, multiprocessors=108, shared_bytes=163 << 10)
        for M in (1, 16)
    ]
    check(program, tmp_path, cases)
