"""From a budget to a rank and a number of values, layer by layer, and never more than the budget.

Bytes are what the checkpoint stores, values, bitmap, U, V and the bias, over the dense weight and bias at the same
value type. The papers' count, nnz + r(N + K) over NK, knows neither bitmap nor bias.

With int8 values there is a float16 scale per row and 64 columns, and numbers of U and V take two bytes, not one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.options import METHODS, VALUE_BYTES, CompressOptions


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


def dense_bytes(N: int, K: int, value_bytes: int, bias_bytes: int = 0) -> int:
    """Bytes of a dense layer."""
    return N * K * value_bytes + bias_bytes


def stored_bytes(N: int, K: int, nnz: int, rank: int, value_bytes: int, bias_bytes: int = 0) -> int:
    """Bytes of a compressed layer in the checkpoint."""
    values = nnz * value_bytes + rank * (N + K) * factor_bytes(value_bytes)
    return fixed_bytes(N, K, value_bytes) + values + bias_bytes


def factor_bytes(value_bytes: int) -> int:
    """Bytes of one number of U or V."""
    return max(value_bytes, 2)


def fixed_bytes(N: int, K: int, value_bytes: int) -> int:
    """Bytes that do not depend on the plan: the bitmap, and the scales of int8 values."""
    return bitmap_bytes(N, K) + (N * 2 * ((K + 63) // 64) if value_bytes == 1 else 0)


def bitmap_bytes(N: int, K: int) -> int:
    """Bytes of the bitmap, rows padded to whole 64 columns."""
    return N * 8 * ((K + 63) // 64)


def parameters(N: int, K: int, nnz: int, rank: int) -> int:
    """The papers' count of a compressed layer."""
    return nnz + rank * (N + K)


def most_values(N: int, K: int, value_bytes: int) -> int:
    """Values that a layer can hold, in S, U and V together, and still take fewer bytes than dense."""
    return (dense_bytes(N, K, value_bytes) - fixed_bytes(N, K, value_bytes) - 1) // value_bytes


def plan_layer(N: int, K: int, options: CompressOptions, bias_bytes: int = 0) -> LayerPlan:
    """Splits a layer's budget between U·V and S.

    Args:
        N: Outputs.
        K: Inputs.
        options: The budget and how to spend it.
        bias_bytes: Of the layer's bias, 0 if it has none.

    Returns:
        A plan within the budget, or one that says why the layer stays dense.
    """
    value_bytes = VALUE_BYTES[options.values_dtype]
    dense = dense_bytes(N, K, value_bytes, bias_bytes)
    if options.budget_in == "params":
        room = math.floor(options.budget * N * K)
    else:
        room = (math.floor(options.budget * dense) - fixed_bytes(N, K, value_bytes) - bias_bytes) // value_bytes
    if room <= 0:
        return LayerPlan(
            dense_reason=f"a budget of {options.budget:g} leaves no room for values: "
            f"what says where they are takes {fixed_bytes(N, K, value_bytes) / dense:.1%} of the dense bytes"
        )
    direction = (N + K) * factor_cost(options)
    rank = _rank(N, K, room / direction, options) if METHODS[options.method].low_rank else 0
    if rank * direction > room:
        return LayerPlan(dense_reason=f"rank {rank} takes {rank * direction} values, more than the budget's {room}")
    nnz = min(room - rank * direction, N * K)
    if stored_bytes(N, K, nnz, rank, value_bytes, bias_bytes) >= dense:
        return LayerPlan(dense_reason="compressed, it would take no fewer bytes than dense")
    return LayerPlan(rank, nnz)


def factor_cost(options: CompressOptions) -> int:
    """How many values of S a number of U or V displaces: 1, or 2 with int8 values and a budget in bytes."""
    value_bytes = VALUE_BYTES[options.values_dtype]
    return factor_bytes(value_bytes) // value_bytes if options.budget_in == "bytes" else 1


def _rank(N: int, K: int, most: float, options: CompressOptions) -> int:
    if options.rank is not None:
        return min(options.rank, N, K)
    return min(math.floor((options.rank_share or 0) * most), N, K)
