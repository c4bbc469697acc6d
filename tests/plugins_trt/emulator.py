"""Compiles the kernels for the CPU and runs cases through them; a float64 reference with the error it allows."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import plugins_trt
from compress.layer import SCALE_GROUP
from plugins_trt.pack import LAYOUTS, MOST_STACKED, PackedLayer, pack_layer, stack, to_bits

SOURCE = Path(plugins_trt.__file__).parent
DECODE_TOKENS = 256  # kDecodeTokens of src/launch.h
SANITIZERS = {
    "none": [],
    # One stack per CUDA thread confuses the address sanitizer, so sanitizers run with real threads.
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSSLC_EMULATOR_THREADS", "-pthread"],
    "address only": ["-fsanitize=address", "-DSSLC_EMULATOR_THREADS", "-pthread"],
    "thread": ["-fsanitize=thread", "-DSSLC_EMULATOR_THREADS", "-pthread"],
}


def compile_emulator(source: Path = SOURCE, *, sanitizer: str = "none", optimize: str = "-O2") -> Path:
    """Compiles `emulate.cpp` under `source`; the program is kept for as long as the sources stay the same."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, or CXX)")
    flags = [
        "-std=c++20",
        optimize,
        "-g1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        *SANITIZERS[sanitizer],
    ]
    files = sorted([*(source / "src").glob("*.cuh"), *(source / "src").glob("*.h"), *(source / "emulator").iterdir()])
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"sslc-emulator-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    program = folder / digest.hexdigest()[:24]
    if not program.exists():
        partial = program.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *flags, "-o", partial, source / "emulator" / "emulate.cpp"], check=True)
        partial.replace(program)
    return program


@dataclass
class Case:
    """One layer with its mask as dense arrays, ready to pack, run and check."""

    mask: np.ndarray  # bool [N, K]
    dense: np.ndarray  # float32 [N, K], or int8
    U: np.ndarray
    V: np.ndarray
    bias: np.ndarray
    X: np.ndarray  # float32 [M, K]
    type: str = "f16"
    layout: str | None = None
    f32: bool = False
    scales: np.ndarray | None = None
    splits: int = 0
    late: bool = True
    reverse: bool = False
    multiprocessors: int = 4
    shared_bytes: int = 99 << 10

    def pack(self) -> PackedLayer:
        return pack_layer(
            bitmap_of(self.mask),
            self.dense[self.mask],
            self.U,
            self.V,
            self.bias,
            in_features=self.mask.shape[1],
            type=self.type,
            layout=self.layout,
            scales=self.scales,
        )


def bitmap_of(mask: np.ndarray) -> np.ndarray:
    """rows64 words of a mask."""
    padded = np.pad(mask, [(0, 0), (0, -mask.shape[1] % 64)])
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def from_bits(bits: np.ndarray, type: str) -> np.ndarray:
    if type == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(array: np.ndarray, type: str) -> np.ndarray:
    """float64 of the array rounded to the type, infinities and NaN kept."""
    finite = np.where(np.isfinite(array), array, 0)
    return np.where(np.isfinite(array), from_bits(to_bits(finite, type), type), array.astype(np.float64))


def random_mask(rng: np.random.Generator, N: int, K: int, rule: str) -> np.ndarray:
    """A mask that obeys a rule: "free:DENSITY", "32:64" or "8:16"; with full, empty and one-sided groups."""
    if rule.startswith("free"):
        mask = rng.random((N, K)) < float(rule.split(":")[1])
        mask[rng.random(N) < 0.05] = True
        mask[rng.random(N) < 0.05] = False
        return mask
    most, of = map(int, rule.split(":"))
    groups = -(-K // of)
    score = rng.random((N, groups, of))
    side = rng.random((N, groups, 1))
    # One group in eight keeps its first columns, one in eight its last, one in four fewer than it may.
    score = np.where(side < 0.125, -np.arange(of), np.where(side > 0.875, np.arange(of), score))
    keep = np.argsort(np.argsort(-score, axis=-1), axis=-1)
    limit = np.where(rng.random((N, groups, 1)) < 0.25, rng.integers(0, most + 1, (N, groups, 1)), most)
    return (keep < limit).reshape(N, groups * of)[:, :K].copy()


def random_case(
    seed: int, N: int, K: int, rank: int, M: int, *, rule: str, int8: bool = False, **options: object
) -> Case:
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, N, K, rule)
    dense = rng.standard_normal((N, K)).astype(np.float32) * 0.05
    scales = None
    if int8:
        dense = rng.integers(-127, 128, (N, K)).astype(np.int8)
        scales = (rng.random((N, -(-K // SCALE_GROUP))) * 0.001 + 1e-4).astype(np.float16)
    U = rng.standard_normal((N, rank)).astype(np.float32) * 0.05
    V = rng.standard_normal((rank, K)).astype(np.float32) * 0.05
    bias = rng.standard_normal(N).astype(np.float32)
    X = rng.standard_normal((M, K)).astype(np.float32)
    return Case(mask, dense, U, V, bias, X, scales=scales, **options)  # type: ignore[arg-type]


def write_case(case: Case, path: Path) -> None:
    write_stack([case], path)


def write_stack(cases: list[Case], path: Path) -> None:
    """Writes layers as one, with the activations and options of the first."""
    first = cases[0]
    options = (first.multiprocessors, first.shared_bytes, first.splits, first.late, first.reverse)
    write_packed(stack([case.pack() for case in cases]), first.X, path, f32=first.f32, options=options)


def write_packed(
    packed: PackedLayer,
    X: np.ndarray,
    path: Path,
    *,
    f32: bool = False,
    options: tuple[int, int, int, bool, bool] = (4, 99 << 10, 0, True, False),
) -> None:
    """Writes what `emulate` runs; the options are multiprocessors, shared bytes, splits, late, reverse."""
    x = X.astype(np.float32)
    if not f32:
        bits = to_bits(np.where(np.isfinite(x), x, 0), packed.type)
        bits[~np.isfinite(x)] = 0x7FFF  # NaN in both types
        x = bits
    arrays = [x, packed.S, packed.U, packed.V, packed.bias]
    parts = len(packed.out_features)
    header = [parts]
    for numbers in (packed.out_features, packed.rank):
        header += [*numbers, *[0] * (MOST_STACKED - parts)]
    header += [packed.in_features, LAYOUTS.index(packed.layout)]
    header += [("f16", "bf16").index(packed.type), packed.int8, packed.slot, len(X), f32, *options]
    header += [a.nbytes for a in arrays]
    data = struct.pack(f"<{len(header)}i", *header)
    data += b"\0" * (16 - len(data) % 16)
    with path.open("wb") as file:
        file.write(data)
        for a in arrays:
            file.write(np.ascontiguousarray(a).tobytes())
            file.write(b"\0" * (-a.nbytes % 16))


def run_cases(program: Path, cases: list[Case], folder: Path, timeout: float = 600) -> list[np.ndarray]:
    """The outputs [M, N] in float64."""
    return [output for (output,) in run_stacks(program, [[case] for case in cases], folder, timeout)]


def run_stacks(program: Path, stacks: list[list[Case]], folder: Path, timeout: float = 600) -> list[list[np.ndarray]]:
    """The outputs [M, N] of each layer of each stack, in float64."""
    paths = [folder / f"case{i}" for i in range(len(stacks))]
    for cases, path in zip(stacks, paths, strict=True):
        write_stack(cases, path)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    subprocess.run([program, *paths], check=True, timeout=timeout, env=environment, capture_output=True, text=True)
    return [outputs_of(cases, path) for cases, path in zip(stacks, paths, strict=True)]


def outputs_of(cases: list[Case], path: Path) -> list[np.ndarray]:
    """What a program wrote for `path`, in float64: the layers' outputs [M, N], which lie one after the other."""
    first, rows = cases[0], len(cases[0].X)
    data = np.fromfile(f"{path}.out", np.float32 if first.f32 else np.uint16)
    wide = data.astype(np.float64) if first.f32 else from_bits(data, first.type)
    ends = np.cumsum([rows * len(case.mask) for case in cases])
    return [part.reshape(rows, -1) for part in np.split(wide, ends[:-1])]


def random_stack(
    seed: int, outs: tuple[int, ...], K: int, ranks: tuple[int, ...], M: int, **options: object
) -> list[Case]:
    """Layers of the same activations."""
    cases = [random_case(seed + i, N, K, r, M, **options) for i, (N, r) in enumerate(zip(outs, ranks, strict=True))]
    for case in cases:
        case.X = cases[0].X
    return cases


def reference(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Y in float64 from the rounded inputs, and the error that the kernel's arithmetic may make, both [M, N].

    The allowed error has three parts: f32 accumulation, 2⁻²⁰ of the sum of magnitudes (the tensor core adds 16
    products at a time and may truncate; 2⁻²⁴·√K would be the size of one rounding each); the rounding of t = X·Vᵀ to
    16 bits; and the rounding of the output. Prefill rounds int8 value × scale to 16 bits, one more rounding of S.
    """
    unit = 2.0**-11 if case.type == "f16" else 2.0**-8
    X = rounded(case.X, case.type)
    if case.scales is None:
        S = rounded(case.dense, case.type) * case.mask
    else:
        scales = np.repeat(case.scales.astype(np.float64), SCALE_GROUP, axis=1)[:, : case.mask.shape[1]]
        S = case.dense * scales * case.mask
    U, V = rounded(case.U, case.type), rounded(case.V, case.type)
    t = X @ V.T
    Y = X @ S.T + t @ U.T + case.bias
    magnitude = np.abs(X) @ np.abs(S).T + (np.abs(X) @ np.abs(V).T) @ np.abs(U).T + np.abs(case.bias)
    allowed = 2.0**-20 * magnitude + unit * (np.abs(t) @ np.abs(U).T) + 1e-6
    if case.scales is not None:
        allowed += unit * np.abs(X) @ np.abs(S).T * (len(X) > DECODE_TOKENS)
    if not case.f32:
        allowed += unit * np.abs(Y)
    return Y, allowed


def worst_error(case: Case, output: np.ndarray) -> float:
    """The largest error in units of what is allowed; NaN counts as infinite."""
    Y, allowed = reference(case)
    ratio = np.abs(output - Y) / allowed
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())
