"""From a budget to a rank and a number of values, layer by layer, and never more than the budget.

Bytes are what the checkpoint stores, values, bitmap, U, V and the bias, over the dense weight and bias at the same
value type. The papers' count, nnz + r(N + K) over NK, knows neither bitmap nor bias.

With int8 and int4 values there is a float16 scale per row and 64 columns, and numbers of U and V take two bytes. Each
such block of int4 values begins at a whole byte, so that one with an odd number of them wastes half a byte. How many do
is not known before the mask is: plans count all of them, so that no mask exceeds the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.options import METHODS, VALUE_BITS, CompressOptions


@dataclass(frozen=True)
class LayerPlan:
    """What a layer may hold.

    Attributes:
        rank: r.
        nnz: Values of S.
        dense_reason: Why the layer stays dense instead; empty if it does not.
    """

    rank: int = 0
    nnz: int = 0
    dense_reason: str = ""


def dense_bytes(N: int, K: int, value_bits: int, bias_bytes: int = 0) -> int:
    """Bytes of a dense layer."""
    return -(-N * K * value_bits // 8) + bias_bytes


def stored_bytes(N: int, K: int, nnz: int, rank: int, value_bits: int, bias_bytes: int = 0) -> int:
    """Bytes of a compressed layer in the checkpoint; with int4 values at most so many."""
    values = -(-nnz * value_bits // 8) + rank * (N + K) * factor_bits(value_bits) // 8
    return fixed_bytes(N, K, value_bits) + values + bias_bytes


def factor_bits(value_bits: int) -> int:
    """Bits of one number of U or V."""
    return max(value_bits, 16)


def fixed_bytes(N: int, K: int, value_bits: int) -> int:
    """Bytes that do not depend on the plan: the bitmap, scales, and what the blocks of int4 values can waste."""
    blocks = N * ((K + 63) // 64)
    scales = 2 * blocks if value_bits <= 8 else 0
    padding = -(-blocks // 2) if value_bits == 4 else 0
    return bitmap_bytes(N, K) + scales + padding


def bitmap_bytes(N: int, K: int) -> int:
    """Bytes of the bitmap, rows padded to whole 64 columns."""
    return N * 8 * ((K + 63) // 64)


def parameters(N: int, K: int, nnz: int, rank: int) -> int:
    """The papers' count of a compressed layer."""
    return nnz + rank * (N + K)


def kept_dense_bytes(N: int, K: int, value_bits: int, bias_bytes: int = 0) -> int:
    """Bytes of a layer that stays dense: of 16 bits at the least, whatever the values of others are."""
    return dense_bytes(N, K, max(value_bits, 16), bias_bytes)


def most_values(N: int, K: int, value_bits: int) -> int:
    """Values that a layer can hold, in S, U and V together, and still take fewer bytes than if it stayed dense."""
    return 8 * (kept_dense_bytes(N, K, value_bits) - fixed_bytes(N, K, value_bits) - 1) // value_bits


def most_rank(N: int, K: int, room: int, value_bits: int, factor_cost: int) -> int:
    """The largest rank with which a layer still takes fewer bytes than if it stayed dense.

    Args:
        N: Outputs.
        K: Inputs.
        room: The layer's values, each number of U and V counted as `factor_cost` of them.
        value_bits: Of a stored value.
        factor_cost: See the function of this name.
    """
    more = factor_bits(value_bits) - factor_cost * value_bits  # bits of a number of U or V beyond what it displaces
    if more <= 0:
        return min(N, K)
    spare = (most_values(N, K, value_bits) - room) * value_bits
    return max(0, min(N, K, spare // ((N + K) * more)))


def plan_layer(N: int, K: int, options: CompressOptions, values_dtype: str, bias_bytes: int = 0) -> LayerPlan:
    """Splits a layer's budget between U·V and S.

    Args:
        N: Outputs.
        K: Inputs.
        options: The budget and how to spend it.
        values_dtype: Type of the layer's values.
        bias_bytes: Of the layer's bias, 0 if it has none.

    Returns:
        A plan within the budget, or one that says why the layer stays dense.
    """
    value_bits = VALUE_BITS[values_dtype]
    dense = dense_bytes(N, K, value_bits, bias_bytes)
    if options.budget_in == "params":
        room = math.floor(options.budget * N * K)
    else:
        room = 8 * (math.floor(options.budget * dense) - fixed_bytes(N, K, value_bits) - bias_bytes) // value_bits
    if room <= 0:
        return LayerPlan(
            dense_reason=f"a budget of {options.budget:g} leaves no room for values: "
            f"what says where they are takes {fixed_bytes(N, K, value_bits) / dense:.1%} of the dense bytes"
        )
    direction = (N + K) * factor_cost(value_bits, options.budget_in)
    rank = _rank(N, K, room / direction, options, values_dtype) if METHODS[options.method].low_rank else 0
    if rank * direction > room:
        return LayerPlan(dense_reason=f"rank {rank} takes {rank * direction} values, more than the budget's {room}")
    nnz = min(room - rank * direction, N * K)
    if stored_bytes(N, K, nnz, rank, value_bits, bias_bytes) >= kept_dense_bytes(N, K, value_bits, bias_bytes):
        return LayerPlan(dense_reason="compressed, it would take no fewer bytes than dense")
    return LayerPlan(rank, nnz)


def factor_cost(value_bits: int, budget_in: str) -> int:
    """How many values of S a number of U or V displaces: 1, or with a budget in bytes 2 for int8 and 4 for int4."""
    return factor_bits(value_bits) // value_bits if budget_in == "bytes" else 1


def _rank(N: int, K: int, most: float, options: CompressOptions, values_dtype: str) -> int:
    if options.rank is not None:
        return min(options.rank, N, K)
    return min(math.floor((options.share_of(values_dtype) or 0) * most), N, K)
