"""Random layers in the storage layout of the op, with their float64 reference, and memory that ends where it ends."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from plugins_ort.library import ROUND_TO_BYTES

# Half a unit in the last place of float32: the relative error of one rounding.
ROUNDING = 2.0**-24

# Errors are bounded by this many roundings of sum |x| |w|. The sums here have up to 600 terms, whose roundings would
# add up to 600 only if all had one sign; random ones grow like the root (25), spread over the lanes of a vector and
# over terms of unequal size. The worst seen in this sweep is 1.8.
TOLERANCE = 8 * ROUNDING


@dataclass(frozen=True)
class RandomLayer:
    """Weights in float64 and as stored.

    Attributes:
        element: The values' ONNX type (1 float32, 2 int4, 3 int8, 16 bfloat16).
        activation_bits: 8 where kernels may round the activations of many tokens to 8 bits.
    """

    element: int
    S: np.ndarray
    U: np.ndarray
    V: np.ndarray
    bias: np.ndarray
    stored: dict[str, np.ndarray]
    activation_bits: int = 16

    def reference(self, x: np.ndarray, *, activations: str = "f32") -> tuple[np.ndarray, np.ndarray]:
        """The output in float64, and the largest error that is allowed in each of its elements.

        Args:
            x: Activations [tokens, K].
            activations: "bf16" or "int8" where the kernel rounds them to that.
        """
        x64 = x.astype(np.float64)
        y = x64 @ self.S.T + (x64 @ self.V.T) @ self.U.T + self.bias
        size = np.abs(x64) @ np.abs(self.S).T + (np.abs(x64) @ np.abs(self.V).T) @ np.abs(self.U).T + np.abs(self.bias)
        bound = TOLERANCE * size
        if activations == "bf16":
            # Eight significant bits: half a step is at most 2^-8 of the number; and 1 % for what is rounded on the way.
            bound += 1.01 * 2.0**-8 * size
        if self.element in (2, 3):
            # Activations are rounded to 16 bits of the token's largest: half a step each, and 1 % for what is rounded
            # on the way to it.
            step = np.abs(x64).max(axis=1, initial=0) / 32767
            weights = np.abs(self.S).sum(axis=1) + np.abs(self.U) @ np.abs(self.V).sum(axis=1)
            bound += 1.01 * 0.5 * step[:, None] * weights
        if activations == "int8":
            # To 8 bits of the largest among 64 columns.
            K = x64.shape[1]
            blocks = np.abs(np.pad(x64, ((0, 0), (0, -K % 64)))).reshape(len(x64), -1, 64).max(axis=2)
            steps = (blocks / 127).repeat(64, axis=1)[:, :K]
            bound += 1.01 * 0.5 * (steps @ np.abs(self.S).T + (steps @ np.abs(self.V).T) @ np.abs(self.U).T)
        return y, bound


def expected_of(layer: RandomLayer, x: np.ndarray, kernel: str) -> tuple[np.ndarray, np.ndarray]:
    """The output of one call in float64, and the largest error that this kernel may have."""
    activations = "f32"
    if (
        kernel in ("amx", "avx512_bf16") and layer.element == 16 and len(x) >= (6 if kernel == "amx" else 9)
    ):  # bfloat16 products
        activations = "bf16"
    if kernel in ROUND_TO_BYTES and layer.activation_bits == 8 and len(x) >= 2:
        activations = "int8"
    return layer.reference(x, activations=activations)


def bf16_bits(array: np.ndarray) -> np.ndarray:
    """The upper half of each float32, which is bfloat16 for values that fit."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers with these upper halves."""
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def pack_int4(integers: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept of -8 … 7, two per byte, the first in the low half; every row and every 64 columns begin a new byte.

    Args:
        integers: [N, K].
        kept: bool [N, K].
    """
    packed: list[int] = []
    for n in range(len(kept)):
        for k in range(0, kept.shape[1], 64):
            block = integers[n, k : k + 64][kept[n, k : k + 64]].tolist()
            pairs = zip_longest(block[::2], block[1::2], fillvalue=0)
            packed += [(low & 15) | (high & 15) << 4 for low, high in pairs]
    return np.array(packed, np.uint8)


def random_layer(
    N: int, K: int, r: int, density: float, dtype: str, seed: int = 0, kept: np.ndarray | None = None
) -> RandomLayer:
    """A layer that keeps random places, or `kept` [N, K]; one in eight of the stored values is zero, which is legal.

    With "int8 a8" and "int4 a8" for `dtype`, activations may be rounded to 8 bits.
    """
    dtype, few_bits = dtype.removesuffix(" a8"), dtype.endswith(" a8")
    rng = np.random.default_rng(seed)
    if kept is None:
        kept = rng.random((N, K)) < density
    S, U, V = (rng.standard_normal(shape).astype(np.float32) for shape in [(N, K), (N, r), (r, K)])
    S[~kept | (rng.random((N, K)) < 1 / 8)] = 0
    bias = rng.standard_normal(N).astype(np.float32)
    scales, integers = random_scales(S, rng, 8 if dtype == "int4" else 128)
    if dtype in ("int8", "int4"):
        S = integers * scales.astype(np.float32).repeat(64, axis=1)[:, :K]
    if dtype != "f32":
        U, V = (from_bf16_bits(bf16_bits(array)) for array in (U, V))
    if dtype == "bf16":
        S = from_bf16_bits(bf16_bits(S))
    bits = np.zeros((N, -(-K // 64) * 64), dtype=bool)
    bits[:, :K] = kept
    store = np.ascontiguousarray if dtype == "f32" else bf16_bits
    values = {"int8": lambda: integers[kept], "int4": lambda: pack_int4(integers, kept)}
    stored = {
        "bitmap": np.packbits(bits, axis=1, bitorder="little").view(np.int32),
        "values": values.get(dtype, lambda: store(S[kept]))(),
        "U": store(U),
        "V": store(V),
        "bias": bias,
    }
    if dtype in ("int8", "int4"):
        stored["scales"] = scales
    wide = (array.astype(np.float64) for array in (S, U, V, bias))
    return RandomLayer({"f32": 1, "int4": 2, "int8": 3, "bf16": 16}[dtype], *wide, stored, 8 if few_bits else 16)


def random_scales(S: np.ndarray, rng: np.random.Generator, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Float16 scales [N, ⌈K/64⌉] of many sizes, and S in integers; some blocks use -most, and some have scale 0."""
    N, K = S.shape
    words = -(-K // 64)
    padded = np.zeros((N, 64 * words), np.float32)
    padded[:, :K] = S
    blocks = padded.reshape(N, words, 64)
    # Down to 1e-7, where float16 is subnormal.
    scales = np.where(rng.random((N, words)) < 1 / 16, 0, 10.0 ** rng.uniform(-7, 0, (N, words))).astype(np.float16)
    largest = np.abs(blocks).max(axis=2, keepdims=True, initial=1e-30)
    rounded = np.rint(blocks / largest * most).clip(-most, most - 1).astype(np.int8)
    return scales, rounded.reshape(N, 64 * words)[:, :K]


class GuardedArray:
    """An array that ends at the last byte before an unreadable page: one step too far ends the process.

    Args:
        array: Copied in.
        writable: Whether the memory can be written; weights cannot.
        margin: Bytes of known content before the array, checked by `margin_is_intact`.
    """

    MARK = 0xA5

    def __init__(self, array: np.ndarray, *, writable: bool = False, margin: int = 0) -> None:
        page = mmap.PAGESIZE
        length = -(-(array.nbytes + margin) // page) * page
        self._map = mmap.mmap(-1, length + page)
        memory = np.frombuffer(self._map, dtype=np.uint8)
        memory[:] = self.MARK
        start = length - array.nbytes
        self.array = memory[start:length].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self._margin = memory[start - margin : start]
        self.address = memory.ctypes.data + start
        libc = ctypes.CDLL(None, use_errno=True)
        protect = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        for address, size, rights in [(memory.ctypes.data, length, protect), (memory.ctypes.data + length, page, 0)]:
            if size and libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), rights) != 0:
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def margin_is_intact(self) -> bool:
        return bool((self._margin == self.MARK).all())
