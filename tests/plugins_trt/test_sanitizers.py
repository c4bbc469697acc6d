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

from tests.plugins_trt.emulator import SOURCE, Case, compile_emulator, random_stack, run_stacks, worst_error
from tests.plugins_trt.test_kernel import FORMATS


def small_stacks(M: int, *, late: bool = True, real_threads: bool = True) -> list[list[Case]]:
    """Every layout, with tails in N, K and the rank, split and not, alone and two layers of the same input.

    Real threads are slow: fewer tiles for them.
    """
    stacks = []
    for i, (layout, rule, int8) in enumerate(FORMATS):
        if M > 64 and real_threads and layout == "fixed8":
            continue  # blocks of 256 threads take long; expand and gemm do not differ between the byte-plane layouts
        options = {"type": ("f16", "bf16")[i % 2], "layout": layout, "splits": (1, 8)[i % 2], "late": late}
        # Long enough for every warp's ring to wrap in one split; short enough in 8 splits for the last one to start
        # inside the low-rank columns.
        K = 200 if M > 64 and real_threads else (1100 if real_threads or i % 2 else 5100)
        outs, ranks = ((20,), (20,)) if i % 2 == 0 else ((20,), (200,))
        if layout == "fixed8":
            outs, ranks = (20, 7), (20, 200)
        stacks.append(random_stack(i, outs, K, ranks, M, rule=rule, int8=int8, **options))
    return stacks


def failure(program: Path, stacks: list[list[Case]], folder: Path) -> str:
    """What is wrong with the outputs, or "": a sanitizer's report, a crash, a hang, or a wrong number."""
    try:
        outputs = run_stacks(program, stacks, folder, timeout=120)
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
        pytest.param("address", 66, id="address-prefill"),
        pytest.param("thread", 3, id="thread-decode", marks=pytest.mark.slow),
        pytest.param("thread", 66, id="thread-prefill", marks=pytest.mark.slow),
    ],
)
def test_sanitizers_find_nothing(sanitizer, M, late, tmp_path):
    program = compile_emulator(sanitizer=sanitizer, optimize="-O1")
    assert failure(program, small_stacks(M, late=late), tmp_path) == ""


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
    Mutation("block barrier after staging removed", "kernels.cuh", "  __syncthreads();\n\n  // Lane", "\n  // Lane", "thread"),
    Mutation("block barrier before the sums removed", "kernels.cuh", "  __syncthreads();  // the sums", "  // the sums", "thread"),
    Mutation("block barrier of gemm removed", "kernels.cuh", "    __syncthreads();  // everyone's", "    // everyone's", "thread", 66),
    Mutation("waits for one copy too few", "kernels.cuh", "wait_copies<Layout::kStages - 2>", "wait_copies<Layout::kStages - 1>"),
    Mutation("ring filled one tile too far", "kernels.cuh", "i < Layout::kStages - 1; i++) issue", "i < Layout::kStages; i++) issue"),
    Mutation("activations not filled with zeros", "kernels.cuh", "    if (k + i < K) {", "    {", "address only"),
    Mutation("last column of activations dropped", "kernels.cuh", "    if (k + i < K) {", "    if (k + i < K - 1) {"),
    Mutation("accumulators not zeroed", "kernels.cuh", "for (int i = 0; i < 4 * NT; i++) c[i] = 0;", "for (int i = 0; i < 4 * NT; i++) c[i] = 1;"),
    Mutation("row tail written", "kernels.cuh", "if (m < tokens && n < part.N) {", "if (m < tokens) {", "address only"),
    Mutation("token tail written", "kernels.cuh", "if (m < tokens && n < part.N) {", "if (n < part.N) {", "address only"),
    Mutation("a split starts one tile late", "kernels.cuh", "const int first = blockIdx.y * a.tiles_per_split, last = least(first + a.tiles_per_split, all)", "const int first = blockIdx.y * a.tiles_per_split + 1, last = least(first + a.tiles_per_split, all)"),
    Mutation("low-rank columns counted in every split", "kernels.cuh", "const int rank0 = first > sparse ? first - sparse : 0;", "const int rank0 = 0;"),
    Mutation("one partial sum of t dropped", "kernels.cuh", "for (int s = 0; s < splits; s++) {", "for (int s = 1; s < splits; s++) {"),
    Mutation("bias added to every partial sum", "kernels.cuh", "* a.M + at] = sum;", "* a.M + at] = sum + (part.bias ? part.bias[n] : 0);"),
    Mutation("slot 7 not blanked", "layouts.cuh", "    u.l1 &= 0x00ffffffu | full0;\n", ""),
    Mutation("slot 0 not blanked", "layouts.cuh", "    v.l0 &= keep0;\n", ""),
    Mutation("bank pointer stays", "layouts.cuh", "(next), next += 128;\n    if (bits & 2)", "(next);\n    if (bits & 2)"),
    Mutation("scan stops at 16 lanes", "layouts.cuh", "distance < 32;", "distance < 16;"),
    Mutation("int8 bias off by one", "layouts.cuh", "0x4140), 0x64806480u", "0x4140), 0x64816481u"),
    Mutation("bank columns permuted wrongly for prefill", "layouts.cuh", "block = lane % 4, as_lane = lane / 4 * 4 + step;", "block = step, as_lane = lane;", "none", 66),
    Mutation("gemm skips the last step", "kernels.cuh", "for (int step = 0; step < steps; step++) {\n    wait", "for (int step = 0; step < steps - 1; step++) {\n    wait", "none", 66),
    Mutation("gemm's swap of halves forgotten", "kernels.cuh", "((c ^ m) & 1) * 64", "(c & 1) * 64", "none", 66),
    Mutation("a part reads the ranks of the first", "kernels.cuh", "const int t_begin = part_here().t,", "const int t_begin = 0,"),
    Mutation("a part takes the rows of U of the first", "kernels.cuh", "static_cast<size_t>(blockIdx.x - part.row_tile) * (part.R / 64)", "static_cast<size_t>(0 * part.row_tile) * (part.R / 64)"),
    Mutation("parts add up in the same place", "kernels.cuh", "* a.N + part.rows) * a.M + at]", "* a.N) * a.M + at]"),
    Mutation("reduce takes the first part for all", "kernels.cuh", "[M](const Part& p) { return M * p.rows; }", "[M](const Part& p) { return M * p.rows + 1; }"),
    Mutation("gemm takes the first part's weights", "launch.h", "static_cast<size_t>(p.row_tile) * tiles", "static_cast<size_t>(0) * tiles", "none", 66),
    Mutation("gemm takes the first part's t", "launch.h", "R > 0 ? t + p.t : nullptr", "R > 0 ? t : nullptr", "none", 66),
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
