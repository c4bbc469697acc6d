"""Every kernel, through the C entries, against float64, on memory that may not be left by one byte."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins_ort import library

from .layers import GuardedArray, RandomLayer, expected_of, random_layer

INTEGERS = ("int8", "int4")
FEW_BITS = ("int8 a8", "int4 a8")
DTYPES = ("f32", "bf16", *INTEGERS, *FEW_BITS)
TOKENS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 96, 97, 130)
SHAPES = (  # N, K, r
    (1, 1, 0),
    (1, 64, 1),
    (5, 63, 3),
    (64, 128, 16),
    (70, 130, 33),
    (3, 600, 0),
    (64, 64, 64),
    (131, 192, 70),
    (257, 65, 64),
    (301, 600, 5),  # more than one chunk of rows that stays in the cache
)


def available() -> list[str]:
    lib = library.load()
    found = [name for name in library.KERNELS if lib.sslc_set_kernel(name.encode()) == 0]
    lib.sslc_set_kernel(b"")
    return found


@pytest.fixture(params=library.KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param not in available():
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


class NativeLayer:
    """A layer in guarded memory, run by one kernel."""

    def __init__(self, layer: RandomLayer, kernel: str) -> None:
        self._lib = library.load()
        self._shape = (layer.S.shape[0], layer.S.shape[1], layer.V.shape[0])
        self._weights = {name: GuardedArray(array) for name, array in layer.stored.items()}
        assert self._lib.sslc_set_kernel(kernel.encode()) == 0, library.last_error(self._lib)
        address = {name: ctypes.c_void_p(weight.address) for name, weight in self._weights.items()}
        self._handle = self._lib.sslc_layer_create(
            layer.element,
            *self._shape,
            address["bitmap"],
            address["values"],
            layer.stored["values"].size,
            *(address.get(name) for name in ("U", "V", "bias", "scales")),
            layer.activation_bits,
        )
        error = library.last_error(self._lib)
        self._lib.sslc_set_kernel(b"")
        if self._handle is None:
            raise ValueError(error)

    def __call__(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        given = GuardedArray(x)
        y = GuardedArray(np.full((len(x), self._shape[0]), np.nan, np.float32), writable=True, margin=256)
        arguments = (ctypes.c_void_p(given.address), len(x), ctypes.c_void_p(y.address), threads)
        assert self._lib.sslc_layer_forward(self._handle, *arguments) == 0, library.last_error(self._lib)
        assert y.margin_is_intact(), "the kernel wrote before its output"
        return y.array

    def close(self) -> None:
        self._lib.sslc_layer_destroy(self._handle)


@contextmanager
def native(layer: RandomLayer, kernel: str) -> Iterator[NativeLayer]:
    layer_on_cpu = NativeLayer(layer, kernel)
    try:
        yield layer_on_cpu
    finally:
        layer_on_cpu.close()


def inputs(M: int, K: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize(("N", "K", "r"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(kernel: str, dtype: str, N: int, K: int, r: int, density: float) -> None:
    layer = random_layer(N, K, r, density, dtype)
    x = inputs(max(TOKENS), K)
    with native(layer, kernel) as run:
        for M in TOKENS:
            y, bound = expected_of(layer, x[:M], kernel)
            error = np.abs(run(x[:M]) - y)
            assert (error <= bound).all(), f"{M} tokens: {(error / bound).max():.1f} times the tolerance"


@settings(max_examples=150, deadline=None)
@given(
    kernel=st.sampled_from(available()),
    dtype=st.sampled_from(DTYPES),
    N=st.integers(1, 90),
    K=st.integers(1, 300),
    r=st.integers(0, 80),
    M=st.integers(0, 120),
    density=st.floats(0, 1),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_layer_agrees_with_float64(
    kernel: str, dtype: str, N: int, K: int, r: int, M: int, density: float, threads: int, seed: int
) -> None:
    layer = random_layer(N, K, r, density, dtype, seed)
    x = inputs(M, K, seed)
    y, bound = expected_of(layer, x, kernel)
    with native(layer, kernel) as run:
        assert (np.abs(run(x, threads) - y) <= bound).all()


def rows_with(counts: list[int], K: int, dtype: str) -> RandomLayer:
    """A layer whose row n stores exactly counts[n] values."""
    return random_layer(len(counts), K, 4, 1.0, dtype, kept=np.arange(K)[None, :] < np.array(counts)[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts",
    [[0, 0, 0, 200], [200, 0, 0, 0], [0] * 40 + [1], [200] + [0] * 40, [1] * 70, [0, 200] * 5 + [3], [200] * 9],
    ids=["last full", "first full", "one value", "then empty", "one each", "in turn", "all full"],
)
def test_empty_and_full_rows_lie_side_by_side(kernel: str, dtype: str, counts: list[int]) -> None:
    layer = rows_with(counts, 200, dtype)
    x = inputs(40, 200)
    with native(layer, kernel) as run:
        for M in (1, 4, 40):
            y, bound = expected_of(layer, x[:M], kernel)
            assert (np.abs(run(x[:M]) - y) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 5, 40])
def test_memory_that_an_earlier_call_left_behind_does_not_matter(kernel: str, dtype: str, M: int) -> None:
    layer = random_layer(20, 70, 5, 0.5, dtype)  # K and r are padded: the padding must not be NaN
    x = inputs(M, 70)
    y, bound = expected_of(layer, x, kernel)
    with native(random_layer(20, 128, 64, 0.5, dtype), kernel) as other, native(layer, kernel) as run:
        assert np.isnan(other(np.full((M, 128), np.nan, np.float32))).all()
        assert (np.abs(run(x) - y) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 5, 40, 130])
def test_the_number_of_threads_changes_no_bit(kernel: str, dtype: str, M: int) -> None:
    with native(random_layer(700, 320, 100, 0.5, dtype), kernel) as run:
        x = inputs(M, 320)
        one = run(x, threads=1).copy()
        for threads in (2, 3, 7):
            np.testing.assert_array_equal(one, run(x, threads=threads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_depends_on_its_neighbours_only_where_the_algorithm_changes(kernel: str, dtype: str) -> None:
    # One algorithm for one token, one for few, one for many, where floats on AVX have another for up to 32: the
    # result changes at most where the next one begins.
    narrow_tiles = (dtype == "f32" and kernel != "portable") or (dtype == "bf16" and kernel in ("avx512", "avx2"))
    with native(random_layer(70, 320, 33, 0.5, dtype), kernel) as run:
        x = inputs(130, 320)
        results = [run(x[:M])[0].tobytes() for M in range(1, 131)]
    changes = sum(a != b for a, b in pairwise(results))
    assert changes <= 2 + narrow_tiles


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("M", [1, 7, 100])
def test_one_large_activation_leaves_integer_layers_exact_enough(kernel: str, dtype: str, M: int) -> None:
    layer = random_layer(300, 1024, 16, 0.5, dtype)
    x = inputs(M, 1024)
    x[:, 77] = 50
    y, _ = layer.reference(x)
    with native(layer, kernel) as run:
        error = run(x) - y
    # Half a step of 50 / 32767 in each activation of size 1: 4e-4.
    assert np.sqrt(np.mean(error**2) / np.mean(y**2)) < 2e-3


@pytest.mark.parametrize("dtype", FEW_BITS)
@pytest.mark.parametrize("M", [1, 2, 5, 12, 13, 100])
def test_activations_of_8_bits_cost_what_they_say(kernel: str, dtype: str, M: int) -> None:
    layer = random_layer(300, 1024, 16, 0.5, dtype)
    x = inputs(M, 1024)
    without, _ = layer.reference(x)
    with native(layer, kernel) as run:
        error = run(x) - without
        x[:, 77] = 50
        y, _ = layer.reference(x)
        error_beside = run(x) - y
    rounds = kernel in library.ROUND_TO_BYTES and M > 1
    # A step is the largest of 64 normal numbers, some 2.5, over 127, and the rms of its rounding 0.29 steps: 6e-3.
    assert np.sqrt(np.mean(error**2) / np.mean(without**2)) < (8e-3 if rounds else 2e-3)
    # A large activation spoils the 63 beside it, with steps of 50 / 127: 0.1 of each, in 1/16 of the columns.
    assert np.sqrt(np.mean(error_beside**2) / np.mean(without**2)) < (4e-2 if rounds else 2e-3)


@pytest.mark.parametrize("M", [1, 5, 8, 9, 100])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_errors_of_a_layer_stay_small(kernel: str, dtype: str, M: int) -> None:
    layer = random_layer(300, 1024, 16, 0.5, dtype)
    x = inputs(M, 1024)
    y, _ = layer.reference(x)
    with native(layer, kernel) as run:
        error = run(x) - y
    rounds = dtype == "bf16" and {"amx": 6, "avx512_bf16": 9}.get(kernel, 1000) <= M
    # A step of bfloat16 is 2^-8 to 2^-7 of the number, and the rms of its rounding 0.29 steps: 1.6e-3.
    assert np.sqrt(np.mean(error**2) / np.mean(y**2)) < (4e-3 if rounds else 2e-6)


@pytest.mark.parametrize("M", [1, 7, 20])
@pytest.mark.parametrize("value", [0.0, 1e-35, 1e-20, 1e30, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("dtype", [*INTEGERS, *FEW_BITS])
def test_integer_layers_take_activations_of_any_size(kernel: str, dtype: str, M: int, value: float) -> None:
    layer = random_layer(20, 130, 0, 0.5, dtype)
    x = np.full((M, 130), value, np.float32)
    with native(layer, kernel) as run:
        y = run(x)
    if np.isfinite(value):
        exact, bound = layer.reference(x)
        assert (np.abs(y - exact) <= bound + 1e-30).all()  # below 1e-30 activations count as zero
    else:
        assert np.isnan(y).all()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_values_and_scales_come_together(kernel: str, dtype: str) -> None:
    layer = random_layer(8, 70, 2, 0.5, dtype)
    without = {name: array for name, array in layer.stored.items() if name != "scales"}
    with pytest.raises(ValueError, match="int8 and int4 values need scales"):
        NativeLayer(RandomLayer(layer.element, layer.S, layer.U, layer.V, layer.bias, without), kernel)
    wide = random_layer(8, 70, 2, 0.5, "f32")
    both = {**wide.stored, "scales": layer.stored["scales"]}
    with pytest.raises(ValueError, match="float values have no scales"):
        NativeLayer(RandomLayer(1, wide.S, wide.U, wide.V, wide.bias, both), kernel)


def test_a_wrong_number_of_values_is_refused(kernel: str) -> None:
    layer = random_layer(8, 70, 2, 0.5, "f32")
    short = {**layer.stored, "values": layer.stored["values"][:-1]}
    count = layer.stored["values"].size
    with pytest.raises(ValueError, match=f"says that {count} values are stored, but there are {count - 1}"):
        NativeLayer(RandomLayer(1, layer.S, layer.U, layer.V, layer.bias, short), kernel)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_int4_bytes_is_refused(kernel: str, change: int) -> None:
    layer = random_layer(8, 70, 2, 0.5, "int4")
    count = layer.stored["values"].size
    given = {**layer.stored, "values": np.resize(layer.stored["values"], count + change)}
    message = f"says that {count} bytes of int4 values are stored, but there are {count + change}"
    with pytest.raises(ValueError, match=message):
        NativeLayer(RandomLayer(2, layer.S, layer.U, layer.V, layer.bias, given), kernel)


def test_int4_values_lie_two_in_a_byte_and_every_block_begins_a_new_one(kernel: str) -> None:
    # Three values of the first block, one of the second, in one row: 1, -8 | 7 | -1.
    kept = np.zeros((1, 128), bool)
    kept[0, [3, 5, 60, 64]] = True
    layer = random_layer(1, 128, 0, 0, "int4", kept=kept)
    layer.stored["values"][:] = [0x81, 0x07, 0x0F]
    layer.stored["scales"][:] = [[2, 0.5]]
    layer.stored["bias"][:] = 0
    x = np.zeros((4, 128), np.float32)
    x[[0, 1, 2, 3], [3, 5, 60, 64]] = 1
    with native(layer, kernel) as run:
        for M in (1, 4, 40):
            y = run(np.resize(x, (M, 128)))[:4, 0]
            np.testing.assert_allclose(y, np.array([2, -16, 14, -0.5])[:M], rtol=1e-6)


def test_bits_in_the_padding_columns_are_refused(kernel: str) -> None:
    layer = random_layer(8, 70, 2, 0.5, "f32")
    bitmap = layer.stored["bitmap"].copy()
    bitmap[3, 2] |= 1 << 6  # column 70
    stored = {**layer.stored, "bitmap": bitmap, "values": np.append(layer.stored["values"], np.float32(1))}
    with pytest.raises(ValueError, match="row 3 of the bitmap has bits beyond column 69"):
        NativeLayer(RandomLayer(1, layer.S, layer.U, layer.V, layer.bias, stored), kernel)
