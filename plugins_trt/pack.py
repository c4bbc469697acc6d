"""From the checkpoint's rows64 storage to the byte layouts of the GPU kernel.

Each layout is described, byte for byte, in `src/layouts.cuh`, which decodes what is written here:

`any`
    any mask; about 2·density + 0.16 bytes per weight.
`bank32`
    at most 32 stored in each aligned 64 columns of a row; 1.125 bytes per weight; columns padded to 256.
`fixed8`
    at most 8 stored in each aligned 16 columns of a row; 1.125 bytes per weight, 0.66 with int8 values.

Everything is packed as int32 words, since TensorRT has no smaller type that it would leave alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sslc_common.errors import InputError

LAYOUTS = ("any", "bank32", "fixed8")
MOST_STACKED = 3  # kMaxParts of src/kernels.cuh
TYPES = ("f16", "bf16")

_ROWS = 512  # rows packed at a time: bounds the temporary arrays, whatever N is
_TILE_COLUMNS = {"any": 64, "bank32": 256, "fixed8": 64}
_BANK_BYTES = 128 * 32 + 512
_MAX_INT32 = 2**31 - 1
_MAX_FEATURES = 2**22  # as in src/plugin.cu


@dataclass(frozen=True)
class PackedLayer:
    """One layer as the plugin takes it, or several of the same input, one after the other (`stack`).

    Attributes:
        layout: One of `LAYOUTS`.
        type: "f16" or "bf16": the type of values, U and V, and of what the tensor cores see.
        int8: The values of S are int8 with one float16 scale per row and 64 columns.
        out_features: N of each layer.
        in_features: K.
        rank: r of each layer, 0 for none.
        slot: Shared memory for one tile, in bytes.
        S: int32 words of the packed sparse part.
        U: int32 words of U in fragment order (4 zeros if the rank is 0: TensorRT takes no empty weights).
        V: int32 words of V in fragment order, likewise.
        bias: float32 [N].
    """

    layout: str
    type: str
    int8: bool
    out_features: tuple[int, ...]
    in_features: int
    rank: tuple[int, ...]
    slot: int
    S: NDArray[np.int32]
    U: NDArray[np.int32]
    V: NDArray[np.int32]
    bias: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes that the layer takes in an engine."""
        return self.S.nbytes + self.U.nbytes + self.V.nbytes + self.bias.nbytes


def to_bits(array: NDArray[np.floating], type: str, what: str = "A weight") -> NDArray[np.uint16]:
    """Rounds to 16-bit floats, to nearest even, and returns their bit patterns.

    Raises:
        InputError: a value is beyond the type's range, or not finite.
    """
    wide = np.ascontiguousarray(array, dtype=np.float32)
    if type == "f16":
        with np.errstate(over="ignore"):
            bits = wide.astype(np.float16).view(np.uint16)
        finite = (bits & 0x7C00) != 0x7C00
    else:
        words = wide.view(np.uint32)
        bits = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
        finite = (bits & 0x7F80) != 0x7F80
    if not finite.all():
        raise InputError(
            f"{what} does not fit the engine's type {type}",
            got=wide[~finite].flat[0],
            allowed="finite values" + (" up to 65504" if type == "f16" else ""),
            do="Build the engine with bfloat16" if type == "f16" else "Check the checkpoint",
        )
    return bits


def mask_of(bitmap: NDArray[np.int32], in_features: int) -> NDArray[np.bool_]:
    """The mask [n, K] of rows64 bitmap words [n, 2·⌈K/64⌉]."""
    octets = np.ascontiguousarray(bitmap, dtype="<i4").view(np.uint8)
    return np.unpackbits(octets, axis=1, bitorder="little")[:, :in_features].astype(bool)


@dataclass(frozen=True)
class Choice:
    """A layout for a layer.

    Attributes:
        layout: One of `LAYOUTS`.
        reason: Why this one, in words.
        nbytes: What S will take in it, predicted by `sparse_bytes`.
    """

    layout: str
    reason: str
    nbytes: int


def sparse_bytes(layout: str, out_features: int, in_features: int, stored: int, *, int8: bool = False) -> int:
    """Bytes that S [N, K] with `stored` entries takes in a layout.

    Exact for `bank32` and `fixed8`. What `any` adds to round its pieces depends on the mask; here it is what random
    masks add on average: 1.5 values for each of a tile's four units (to a multiple of four), and 4 bytes (from 8 to 16;
    int8: 6, from 4 to 16).
    """
    tiles = -(-out_features // 16) * -(-in_features // _TILE_COLUMNS[layout])
    if layout == "bank32":
        return tiles * _BANK_BYTES
    if layout == "fixed8":
        return tiles * (64 * (8 if int8 else 16) + 128 + (32 if int8 else 0))
    value, head, rounding = (1, 176, 6) if int8 else (2, 144, 4)
    return stored * value + tiles * (4 + head + 4 * 3 * value // 2 + rounding)


def factor_bytes(out_features: int, in_features: int, rank: int) -> int:
    """Bytes that U [N, r] and V [r, K] take together."""
    steps = -(-rank // 64)
    rows, columns = -(-out_features // 16) * 16, -(-in_features // 64) * 64
    return 2 * 64 * steps * (rows + columns) if rank else 32


def choose_layout(bitmaps: Sequence[NDArray[np.int32]], in_features: int, *, int8: bool = False) -> Choice:
    """The layout that should be fastest for these masks, of layers that will be one (`stack`).

    A tile's time is modelled as the larger of its memory time and its decoding time plus a fifth of the smaller, with
    an H100's bandwidth (13.3 bytes per clock and multiprocessor) and the decoding rates that explain what it took for
    one token of LLaMA-2-7B's gate and up (docs/kernel-gpu.md). They are half to three quarters of those that
    `scripts/predict_gpu.py` counts; other GPUs were not measured.
    """
    most16, most64, stored = 0, 0, [0] * len(bitmaps)
    for i, bitmap in enumerate(bitmaps):
        for first in range(0, len(bitmap), _ROWS):
            mask = _padded(mask_of(bitmap[first : first + _ROWS], in_features), 1, 64)
            most16 = max(most16, int(mask.reshape(-1, 16).sum(1).max(initial=0)))
            most64 = max(most64, int(mask.reshape(-1, 64).sum(1).max(initial=0)))
            stored[i] += int(mask.sum())
    weights = sum(len(bitmap) for bitmap in bitmaps) * in_features
    rates = {"any": 10.0}
    if most64 <= 32 and not int8:
        rates["bank32"] = 9.7
    if most16 <= 8:
        rates["fixed8"] = 11.7
    sizes = {
        layout: sum(
            sparse_bytes(layout, len(bitmap), in_features, n, int8=int8)
            for bitmap, n in zip(bitmaps, stored, strict=True)
        )
        for layout in rates
    }

    def time(layout: str) -> float:
        memory, decoding = sizes[layout] / weights / 13.3, 1 / rates[layout]
        return max(memory, decoding) + 0.2 * min(memory, decoding)

    best = min(rates, key=time)
    rule = f"at most {most16} of 16 and {most64} of 64 columns stored, {sum(stored) / weights:.1%} in all"
    reason = f"{rule}: {sizes[best] / weights:.3f} bytes per weight, expected to be the fastest of {', '.join(rates)}"
    return Choice(best, reason, sizes[best])


def pack_layer(
    bitmap: NDArray[np.int32],
    values: NDArray[np.generic],
    U: NDArray[np.floating],
    V: NDArray[np.floating],
    bias: NDArray[np.floating] | None = None,
    *,
    in_features: int,
    type: str = "f16",
    layout: str | None = None,
    scales: NDArray[np.floating] | None = None,
    name: str = "The layer",
) -> PackedLayer:
    """Packs one layer.

    Args:
        bitmap: rows64 words [N, 2·⌈K/64⌉], padding bits 0.
        values: The stored entries [nnz]: floating, or int8 if `scales` are given.
        U: [N, r].
        V: [r, K].
        bias: [N], zeros if None.
        in_features: K.
        type: "f16" or "bf16".
        layout: One of `LAYOUTS`; `choose_layout` chooses if None.
        scales: Float16 [N, ⌈K/64⌉] for int8 values.
        name: How errors call it.

    Raises:
        InputError: the layer is too large for the kernel, its mask does not obey the layout's rule, or a value does not
            fit the type.
    """
    N, K, rank, int8 = len(bitmap), in_features, V.shape[0], scales is not None
    if bitmap.shape[1] != 2 * -(-K // 64) or U.shape != (N, rank) or V.shape != (rank, K):
        raise ValueError(f"shapes do not agree: bitmap {bitmap.shape}, U {U.shape}, V {V.shape}, K {K}")
    if max(N, K) > _MAX_FEATURES:
        raise InputError(
            f"{name} is larger than the GPU kernel can take",
            got=f"{N} outputs, {K} inputs",
            allowed=f"at most {_MAX_FEATURES} of each",
            do=f"Leave it dense: compress again with --exclude '{name}'",
        )
    if layout is None:
        layout = choose_layout([bitmap], K, int8=int8).layout
    if int8 and layout == "bank32":
        raise InputError(
            "Layout bank32 takes no int8 values", allowed="any or fixed8", do="Leave the layout to the tool"
        )

    bits = (
        values.astype(np.int8).view(np.uint8) if int8 else to_bits(_floating(values), type, f"A value of S of {name}")
    )
    columns, pack = _TILE_COLUMNS[layout], _PACKERS[layout]
    parts: list[NDArray[np.uint8]] = []
    sizes: list[NDArray[np.int64]] = []
    at = 0
    for first in range(0, N, _ROWS):
        mask = mask_of(bitmap[first : first + _ROWS], K)
        count = int(mask.sum())
        dense = np.zeros(mask.shape, bits.dtype)
        dense[mask] = bits[at : at + count]
        at += count
        mask, dense = (_padded(_padded(a, 0, 16), 1, columns) for a in (mask, dense))
        scale = None
        if scales is not None:
            scale = _padded(_padded(scales[first : first + _ROWS].astype(np.float16), 0, 16), 1, columns // 64)
        data, size = pack(dense, mask, scale)
        parts.append(data)
        sizes.append(size)
    if at != len(bits):
        raise ValueError(f"the bitmap has {at} bits, but there are {len(bits)} values")

    body = np.concatenate(parts)
    if layout == "any":
        tile_bytes = np.concatenate(sizes)
        table = _offset_table(tile_bytes)
        slot = int(tile_bytes.max()) + 32
        S = np.concatenate([table, body.view(np.int32)])
    else:
        slot, S = int(sizes[0][0]), body.view(np.int32)
    return PackedLayer(
        layout=layout,
        type=type,
        int8=int8,
        out_features=(N,),
        in_features=K,
        rank=(rank,),
        slot=slot,
        S=S,
        U=_fragments(_padded(to_bits(U, type, f"An entry of U of {name}"), 1, 64)),
        V=_fragments(_padded(to_bits(V, type, f"An entry of V of {name}"), 0, 64)),
        bias=np.zeros(N, np.float32) if bias is None else np.ascontiguousarray(bias, dtype=np.float32),
    )


def stack(layers: Sequence[PackedLayer]) -> PackedLayer:
    """Layers of the same input as one: the plugin computes them, and their t = V·x, with one launch each.

    Args:
        layers: Packed in the same layout, type and type of values; at most `MOST_STACKED`.
    """
    first = layers[0]
    kinds = {(layer.layout, layer.type, layer.int8, layer.in_features) for layer in layers}
    if len(kinds) != 1 or len(layers) > MOST_STACKED:
        raise ValueError(f"{len(layers)} layers of {kinds} cannot be one")
    if first.layout == "any":
        ends = [layer.S[: _tiles(layer) + 1] for layer in layers]  # tables of offsets, in 16 bytes
        tile_bytes = np.concatenate([np.diff(end).astype(np.int64) * 16 for end in ends])
        bodies = [layer.S[4 * end[0] : 4 * end[-1]] for layer, end in zip(layers, ends, strict=True)]
        S = np.concatenate([_offset_table(tile_bytes), *bodies])
    else:
        S = np.concatenate([layer.S for layer in layers])
    ranked = [layer for layer in layers if any(layer.rank)] or [first]
    return PackedLayer(
        layout=first.layout,
        type=first.type,
        int8=first.int8,
        out_features=tuple(N for layer in layers for N in layer.out_features),
        in_features=first.in_features,
        rank=tuple(r for layer in layers for r in layer.rank),
        slot=max(layer.slot for layer in layers),
        S=S,
        U=np.concatenate([layer.U for layer in ranked]),
        V=np.concatenate([layer.V for layer in ranked]),
        bias=np.concatenate([layer.bias for layer in layers]),
    )


def _tiles(layer: PackedLayer) -> int:
    rows = sum(-(-N // 16) for N in layer.out_features)
    return rows * -(-layer.in_features // _TILE_COLUMNS[layer.layout])


# Below, arrays are cut as [row tile, row half, g, column tile, t, ...]: row = 16·tile + 8·half + g, and lane = 4·g + t.


def _pack_bank32(
    dense: NDArray[np.uint16], mask: NDArray[np.bool_], scale: None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    tiles, steps = len(mask) // 16, mask.shape[1] // 256
    groups = mask.reshape(tiles, 2, 8, steps, 4, 64)
    slot = np.cumsum(groups, axis=-1, dtype=np.uint8) - 1
    _check_rule("bank32", int(groups.sum(-1).max()), 32, 64)
    words = np.zeros((tiles, steps, 32, 8, 4, 2), np.uint16)  # [.., j, g, t, half]
    i, half, g, k, t, column = np.nonzero(groups)
    words[i, k, slot[i, half, g, k, t, column], g, t, half] = dense.reshape(groups.shape)[i, half, g, k, t, column]
    bits = np.packbits(groups.reshape(tiles, 2, 8, steps, 4, 4, 16), axis=-1, bitorder="little").view(np.uint16)
    masks = bits[..., 0].transpose(0, 3, 5, 2, 4, 1)  # [row tile, column tile, step, g, t, half]
    out = np.empty((tiles * steps, _BANK_BYTES), np.uint8)
    out[:, :4096] = words.reshape(tiles * steps, -1).view(np.uint8)
    out[:, 4096:] = np.ascontiguousarray(masks).reshape(tiles * steps, -1).view(np.uint8)
    return out.reshape(-1), np.array([_BANK_BYTES])


def _pack_fixed8(
    dense: NDArray[np.uint16 | np.uint8], mask: NDArray[np.bool_], scale: NDArray[np.float16] | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    tiles, steps = len(mask) // 16, mask.shape[1] // 64
    groups = mask.reshape(tiles, 2, 8, steps, 4, 16).copy()
    _check_rule("fixed8", int(groups.sum(-1).max()), 8, 16)
    # Dropped columns of the upper half read slot 0, which must therefore belong to the lower half: store a zero there.
    upper = groups[..., 8:].sum(-1)
    groups[..., 0] |= ~groups[..., :8].any(-1) & (upper > 0) & (upper < 8)
    slot = np.cumsum(groups, axis=-1, dtype=np.uint8) - 1
    values = np.zeros((tiles, steps, 2, 8, 4, 8), dense.dtype)
    i, half, g, k, t, column = np.nonzero(groups)
    values[i, k, half, g, t, slot[i, half, g, k, t, column]] = dense.reshape(groups.shape)[i, half, g, k, t, column]
    planes = _planes(values)
    words = _mask_words(groups)
    parts = [planes.reshape(tiles * steps, -1), words.reshape(tiles * steps, -1).view(np.uint8)]
    if scale is not None:
        parts.append(_tile_scales(scale))
    out = np.concatenate(parts, axis=1)
    return out.reshape(-1), np.array([out.shape[1]])


def _pack_any(
    dense: NDArray[np.uint16 | np.uint8], mask: NDArray[np.bool_], scale: NDArray[np.float16] | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    tiles, steps = len(mask) // 16, mask.shape[1] // 64
    value = dense.dtype.itemsize
    cut = (tiles, 2, 8, steps, 4, 2, 8)

    def units(a: NDArray[np.generic]) -> NDArray[np.generic]:  # [tile, unit 2·half + upper, lane, column of unit]
        return np.ascontiguousarray(a.reshape(cut).transpose(0, 3, 1, 5, 2, 4, 6)).reshape(tiles * steps, 4, 32, 8)

    stored = units(mask)
    counts = stored.sum((2, 3), dtype=np.int64)  # [tile, unit]
    sizes = (counts + 3) // 4 * 4 * value
    head = 144 + (32 if scale is not None else 0)
    starts = head + np.cumsum(sizes, axis=1) - sizes
    tile_bytes = _up(head + sizes.sum(1), 16)
    first = np.cumsum(tile_bytes) - tile_bytes
    out = np.zeros(int(tile_bytes.sum()), np.uint8)

    def put(offset: int, rows: NDArray[np.generic]) -> None:
        octets = np.ascontiguousarray(rows).view(np.uint8).reshape(len(first), -1)
        out[(first + offset)[:, None] + np.arange(octets.shape[1])] = octets

    put(0, _mask_words(mask.reshape(tiles, 2, 8, steps, 4, 16)).reshape(tiles * steps, 32))
    put(128, starts.astype(np.uint32))
    if scale is not None:
        put(144, _tile_scales(scale))
    # The p-th value of a unit lies in its p // 4-th group of four: low bytes, then (16 bit) high bytes.
    flat = counts.reshape(-1)
    begin = np.repeat((first[:, None] + starts).reshape(-1), flat)
    p = np.arange(len(begin)) - np.repeat(np.cumsum(flat) - flat, flat)
    to = begin + p // 4 * (4 * value) + p % 4
    octets = units(dense)[stored].view(np.uint8).reshape(-1, value)
    for byte in range(value):
        out[to + 4 * byte] = octets[:, byte]
    return out, tile_bytes


_PACKERS: dict[str, Callable[..., tuple[NDArray[np.uint8], NDArray[np.int64]]]] = {
    "any": _pack_any,
    "bank32": _pack_bank32,
    "fixed8": _pack_fixed8,
}


def _planes(values: NDArray[np.uint16 | np.uint8]) -> NDArray[np.uint8]:
    """[..., 8] values to [..., 8 low bytes, 8 high bytes]."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, values.dtype.itemsize)
    return np.ascontiguousarray(np.moveaxis(octets, -1, -2)).reshape(*values.shape[:-1], -1)


def _mask_words(groups: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """[row tile, half, g, column tile, t, 16] to words [row tile, column tile, lane]: bit 4·i + 2·half + upper."""
    tiles, _, _, steps, _, _ = groups.shape
    g = groups.reshape(tiles, 2, 8, steps, 4, 2, 8).transpose(0, 3, 2, 4, 6, 1, 5)  # [.., g, t, i, half, upper]
    bits = np.ascontiguousarray(g).reshape(tiles, steps, 32, 32)
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)[..., 0]


def _tile_scales(scale: NDArray[np.float16]) -> NDArray[np.uint8]:
    """[rows, column tiles] to 16 scales per tile."""
    tiles = len(scale) // 16
    cut = np.ascontiguousarray(scale.reshape(tiles, 16, -1).transpose(0, 2, 1))
    return cut.reshape(-1, 16).view(np.uint8)


def _fragments(bits: NDArray[np.uint16]) -> NDArray[np.int32]:
    """A dense matrix as 16 × 64 tiles in fragment order; 4 zeros for an empty one."""
    if bits.size == 0:
        return np.zeros(4, np.int32)
    bits = _padded(_padded(bits, 0, 16), 1, 64)
    cut = bits.reshape(len(bits) // 16, 2, 8, bits.shape[1] // 64, 4, 2, 8)
    return np.ascontiguousarray(cut.transpose(0, 3, 1, 5, 2, 4, 6)).reshape(-1).view(np.int32)


def _offset_table(tile_bytes: NDArray[np.int64]) -> NDArray[np.int32]:
    """Where each tile starts, and the last one ends, in units of 16 bytes from the start of the table."""
    words = _up(len(tile_bytes) + 1, 4)
    ends = words // 4 + np.concatenate([[0], np.cumsum(tile_bytes)]) // 16
    if ends[-1] > _MAX_INT32:
        raise InputError("The layer is too large", got=f"{ends[-1] * 16 / 1e9:.0f} GB packed", do="Leave it dense")
    table = np.zeros(words, np.int32)
    table[: len(ends)] = ends
    return table


def _check_rule(layout: str, got: int, most: int, of: int) -> None:
    if got > most:
        raise InputError(
            f"The mask does not fit the layout {layout}",
            got=f"{got} stored in an aligned group of {of} columns",
            allowed=f"at most {most}",
            do="Leave the layout to the tool, or compress with the mask rule of this layout",
        )


def _floating(values: NDArray[np.generic]) -> NDArray[np.floating]:
    if values.dtype.kind != "f" and values.dtype.name != "bfloat16":
        raise ValueError(f"values of type {values.dtype} need scales")
    return values  # type: ignore[return-value]


def _padded(array: NDArray[Any], axis: int, multiple: int) -> NDArray[Any]:
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    return np.pad(array, [(0, missing if a == axis else 0) for a in range(array.ndim)])


def _up(n: Any, multiple: int) -> Any:
    return -(-n // multiple) * multiple
