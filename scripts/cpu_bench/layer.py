"""The layer that all engines compute: W = S + U·V, and its forms in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
WORD = 64  # columns under one word of the bitmap, and under one scale


@dataclass(frozen=True)
class Shape:
    """A layer: [N, K] with rank r, of which `budget` = (nnz + r (N + K)) / N K is kept."""

    n: int
    k: int
    r: int
    budget: float

    @property
    def density(self) -> float:
        """Share of S that is stored."""
        return self.budget - self.r * (self.n + self.k) / (self.n * self.k)


class Layer:
    """A random layer of a shape.

    Attributes:
        shape: Its shape.
        kept: bool [N, K rounded up to whole words], what is stored of S.
        S: [nnz], the stored values, row by row.
        U: [N, r].
        V: [r, K].
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        self.kept = np.zeros((shape.n, -(-shape.k // WORD) * WORD), dtype=bool)
        self.kept[:, : shape.k] = rng.random((shape.n, shape.k), dtype=np.float32) < shape.density
        self.S = rng.standard_normal(int(self.kept.sum()), dtype=np.float32)
        # Half as large as S in the product.
        self.U = rng.standard_normal((shape.n, shape.r), dtype=np.float32)
        self.V = rng.standard_normal((shape.r, shape.k), dtype=np.float32) * np.float32(0.5 / max(shape.r, 1) ** 0.5)

    @cached_property
    def W(self) -> Floats:  # noqa: N802
        """S + U·V [N, K]: what the dense engines hold."""
        return self.sparse + self.U @ self.V

    @property
    def sparse(self) -> Floats:
        """S [N, K] with its zeros."""
        S = np.zeros(self.kept.shape, np.float32)
        S[self.kept] = self.S
        return np.ascontiguousarray(S[:, : self.shape.k])

    @cached_property
    def bitmap(self) -> NDArray[np.int32]:
        """As the operator takes it."""
        return np.packbits(self.kept, axis=1, bitorder="little").view(np.int32)

    def integers(self, bits: int) -> tuple[NDArray[np.int8] | NDArray[np.uint8], NDArray[np.float16]]:
        """Values as the operator takes them, of 8 or 4 bits, and scales [N, ⌈K/64⌉]."""
        most = 2 ** (bits - 1) - 1
        blocks = np.zeros(self.kept.shape, np.float32)
        blocks[self.kept] = self.S
        grouped = blocks.reshape(self.shape.n, -1, WORD)
        scales = (np.abs(grouped).max(axis=2) / most).astype(np.float16)
        wide = np.maximum(scales.astype(np.float32), np.finfo(np.float32).tiny)[:, :, None]
        rounded = np.rint(grouped / wide).clip(-most, most).astype(np.int8).reshape(self.kept.shape)[self.kept]
        return (rounded if bits == 8 else self._packed(rounded)), scales

    def _packed(self, values: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Two values per byte, the first in the low half; those under each word of the bitmap begin a new byte."""
        counts = self.kept.reshape(-1, WORD).sum(axis=1)
        sizes = -(-counts // 2)
        # A block starts that many halves of bytes later than its values do.
        shift = 2 * (np.cumsum(sizes) - sizes) - (np.cumsum(counts) - counts)
        halves = np.zeros(2 * int(sizes.sum()), np.uint8)
        halves[np.arange(len(values)) + np.repeat(shift, counts)] = values.view(np.uint8) & 15
        return halves[0::2] | halves[1::2] << np.uint8(4)


def bf16(array: Floats) -> NDArray[np.uint16]:
    """Rounded to bfloat16, as its bits."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def grouped(W: Floats, bits: int, group: int) -> tuple[NDArray[np.int8], Floats]:
    """Symmetric rounding in groups along K: integers [N, K / group, group] and scales [N, K / group, 1]."""
    largest = 2 ** (bits - 1) - 1
    groups = W.reshape(len(W), -1, group)
    scales = np.maximum(np.abs(groups).max(axis=2, keepdims=True) / largest, 1e-12).astype(np.float32)
    return np.rint(groups / scales).clip(-largest, largest).astype(np.int8), scales
