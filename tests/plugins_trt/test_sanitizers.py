# ruff: noqa: E501  (one mutation per line)
"""The kernels under the address, undefined-behaviour and thread sanitizers, and proof that the tests can fail.

Each mutation below breaks the kernels in one way that a GPU may or may not show. Every one must be caught.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.plugins_trt.emulator import (
    DECODE_TOKENS,
    SOURCE,
    Case,
    compile_emulator,
    random_stack,
    run_stacks,
    worst_error,
)
from tests.plugins_trt.test_kernel import FORMATS

PREFILL = DECODE_TOKENS + 2


def small_stacks(M: int, *, late: bool = True, real_threads: bool = True) -> list[list[Case]]:
    """Every layout, with tails in N, K and the rank, split and not, alone and two layers of the same input.

    Real threads are slow: fewer tiles for them.
    """
    stacks = []
    for i, (layout, rule, int8) in enumerate(FORMATS):
        if M > DECODE_TOKENS and real_threads and layout == "fixed8":
            continue  # blocks of 256 threads take long; expand and gemm do not differ between the byte-plane layouts
        options = {"type": ("f16", "bf16")[i % 2], "layout": layout, "splits": (1, 8)[i % 2], "late": late}
        # Long enough for every warp's ring to wrap in one split; short enough in 8 splits for the last one to start
        # inside the low-rank columns.
        K = 200 if M > DECODE_TOKENS and real_threads else (1100 if real_threads or i % 2 else 5100)
        outs, ranks = ((20,), (20,)) if i % 2 == 0 else ((20,), (200,))
        if layout == "fixed8":
            outs, ranks = (20, 7), (20, 200)
        if M > DECODE_TOKENS and real_threads:
            ranks = (20,) * len(outs)
        stacks.append(random_stack(i, outs, K, ranks, M, rule=rule, int8=int8, **options))
    return stacks


def failure(program: Path, stacks: list[list[Case]], folder: Path, timeout: float = 120) -> str:
    """What is wrong with the outputs, or "": a sanitizer's report, a crash, a hang, or a wrong number."""
    try:
        outputs = run_stacks(program, stacks, folder, timeout=timeout)
    except subprocess.CalledProcessError as error:
        return f"exit {error.returncode}: {error.stderr[:2000]}"
    except subprocess.TimeoutExpired:
        return "it hangs"
    worst = max(
        worst_error(case, output)
        for cases, results in zip(stacks, outputs, strict=True)
        for case, output in zip(cases, results, strict=True)
    )
    return "" if worst <= 1 else f"{worst:.3g} × the allowed error"


@pytest.mark.parametrize("late", [True, False], ids=["copies-land-late", "copies-land-at-once"])
@pytest.mark.parametrize(
    ("sanitizer", "M"),
    [
        pytest.param("address", 3, id="address-decode"),
        pytest.param("address", PREFILL, id="address-prefill"),
        pytest.param("thread", 3, id="thread-decode", marks=pytest.mark.slow),
        pytest.param("thread", PREFILL, id="thread-prefill", marks=pytest.mark.slow),
    ],
)
def test_sanitizers_find_nothing(sanitizer, M, late, tmp_path):
    program = compile_emulator(sanitizer=sanitizer, optimize="-O1")
    assert failure(program, small_stacks(M, late=late), tmp_path, timeout=900) == ""


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    before: str
    after: str
    sanitizer: str = "none"
    M: int = 3


MUTATIONS = [
    Mutation("warp barrier of the ring removed", "kernels.cuh", "__syncwarp();  // the other", "// the other", "thread"),
    Mutation("block barrier after the sums removed", "kernels.cuh", "  __syncthreads();\n  for (int o", "  for (int o", "thread"),
    Mutation("block barrier before the sums removed", "kernels.cuh", "  __syncthreads();  // the sums", "  // the sums", "thread"),
    Mutation("block barrier of gemm removed", "kernels.cuh", "    __syncthreads();  // everyone's", "    // everyone's", "thread", PREFILL),
    Mutation("waits for one copy too few", "kernels.cuh", "wait_copies<Layout::kStages - 2>", "wait_copies<Layout::kStages - 1>"),
    Mutation("ring filled one tile too far", "kernels.cuh", "i < Layout::kStages - 1; i++) issue", "i < Layout::kStages; i++) issue"),
    Mutation("activations not filled with zeros", "kernels.cuh", "    if (k + i < K) {", "    {", "address only"),
    Mutation("last column of activations dropped", "kernels.cuh", "    if (k + i < K) {", "    if (k + i < K - 1) {"),
    Mutation("accumulators not zeroed", "kernels.cuh", "c[j][i] = 0;", "c[j][i] = 1;"),
    Mutation("row tail written", "kernels.cuh", "if (m < tokens && n < p.N) {", "if (m < tokens) {", "address only"),
    Mutation("token tail written", "kernels.cuh", "if (m < tokens && n < p.N) {", "if (n < p.N) {", "address only"),
    Mutation("a split starts one tile late", "kernels.cuh", "const int first = blockIdx.y * a.tiles_per_split;", "const int first = blockIdx.y * a.tiles_per_split + 1;"),
    Mutation("low-rank columns counted in every split", "kernels.cuh", "const int rank0 = first > sparse ? first - sparse : 0;", "const int rank0 = 0;"),
    Mutation("one warp's sum dropped", "kernels.cuh", "for (int s = 0; s < kShare; s++) sum", "for (int s = 1; s < kShare; s++) sum"),
    Mutation("warps past the last row tile work", "kernels.cuh", "row_tile < a.row_tiles ? sparse", "true ? sparse", "address only", 40),
    Mutation("the warps of a block take the same row tile", "kernels.cuh", "RT + warp % RT, sparse", "RT, sparse", "none", 40),
    Mutation("the second slice repeats the first's tokens", "kernels.cuh", "token[j] = token0 + least", "token[j] = least", "none", 70),
    Mutation("bias added to every partial sum", "kernels.cuh", "* a.M + at] = sum;", "* a.M + at] = sum + (p.bias ? p.bias[n] : 0);"),
    Mutation("slot 7 not blanked", "layouts.cuh", "    u.l1 &= 0x00ffffffu | full0;\n", ""),
    Mutation("slot 0 not blanked", "layouts.cuh", "    v.l0 &= keep0;\n", ""),
    Mutation("bank pointer stays", "layouts.cuh", "(next), next += 128;\n    if (bits & 2)", "(next);\n    if (bits & 2)"),
    Mutation("scan stops at 16 lanes", "layouts.cuh", "distance < 32;", "distance < 16;"),
    Mutation("int8 bias off by one", "layouts.cuh", "0x4140), 0x64806480u", "0x4140), 0x64816481u"),
    Mutation("bank columns permuted wrongly for prefill", "layouts.cuh", "block = lane % 4, as_lane = lane / 4 * 4 + step;", "block = step, as_lane = lane;", "none", PREFILL),
    Mutation("gemm skips the last step", "kernels.cuh", "stage < stages; stage++) {\n    wait", "stage < stages - 1; stage++) {\n    wait", "none", PREFILL),
    Mutation("gemm takes the first half of each step twice", "kernels.cuh", "step = stage / 2, half = stage % 2;", "step = stage / 2, half = 0;", "none", PREFILL),
    Mutation("a part reads the ranks of the first", "kernels.cuh", "* a.R + part.t + step", "* a.R + step"),
    Mutation("a part takes the rows of U of the first", "kernels.cuh", "static_cast<size_t>(row_tile - part.row_tile) * (part.R / 64)", "static_cast<size_t>(0 * part.row_tile) * (part.R / 64)"),
    Mutation("parts add up in the same place", "kernels.cuh", "* a.N + p.rows) * a.M + at]", "* a.N) * a.M + at]"),
    Mutation("reduce takes the first part for all", "kernels.cuh", "[M](const Part& p) { return M * p.rows; }", "[M](const Part& p) { return M * p.rows + 1; }"),
    Mutation("gemm takes the first part's weights", "launch.h", "static_cast<size_t>(p.row_tile) * tiles", "static_cast<size_t>(0) * tiles", "none", PREFILL),
    Mutation("gemm takes the first part's t", "launch.h", "R > 0 ? t + p.t : nullptr", "R > 0 ? t : nullptr", "none", PREFILL),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_broken_kernel_is_caught(mutation, tmp_path):
    copy = tmp_path / "plugins_trt"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
    file = copy / "src" / mutation.file
    text = file.read_text()
    assert text.count(mutation.before) == 1, f"the mutation no longer fits {mutation.file}: {mutation.before!r}"
    file.write_text(text.replace(mutation.before, mutation.after))
    program = compile_emulator(copy, sanitizer=mutation.sanitizer, optimize="-O0")
    for late in (True, False):
        stacks = small_stacks(mutation.M, late=late, real_threads=mutation.sanitizer != "none")
        if mutation.name.startswith("activations"):
            stacks[0][0].X[1] = np.nan  # what lies behind a row must be poison for a forgotten zero to show
        if failure(program, stacks, tmp_path):
            return
    raise AssertionError(f"nobody noticed: {mutation.name}")
