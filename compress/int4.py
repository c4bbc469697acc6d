"""int4 values: two to a byte, low nibble first, and each block (a row's aligned 64 columns) starts at a whole byte.

A block with c stored entries takes ⌈c/2⌉ bytes. If c is odd, the high nibble of its last byte is padding, and 0. So the
place of a block is known from the bitmap alone, and its bytes can be read without those of its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(bitmap: Tensor, values: Tensor) -> Tensor:
    """Packs stored entries.

    Args:
        bitmap: int32 [N, 2·⌈K/64⌉].
        values: int8 [nnz], −8 to 7, in the order of `compress.layer.pack`.

    Returns:
        uint8 [Σ ⌈c/2⌉].
    """
    used = ~_padding(bitmap)
    nibbles = torch.zeros_like(used, dtype=torch.uint8).masked_scatter_(used, (values & 15).view(torch.uint8))
    return nibbles[::2] | nibbles[1::2] << 4


def unpack_int4(bitmap: Tensor, packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: int8 [nnz]."""
    values = _nibbles(packed).masked_select(~_padding(bitmap)).view(torch.int8)
    return values.bitwise_xor_(8).sub_(8)  # two's complement of four bits


def packed_length(bitmap: Tensor) -> int:
    """How many bytes the entries that a bitmap selects take, Σ ⌈c/2⌉."""
    return int((block_counts(bitmap) + 1 >> 1).sum())


def padding_is_zero(bitmap: Tensor, packed: Tensor) -> bool:
    """Whether the unused nibbles of `packed`, which has the length that the bitmap asks for, are 0."""
    return not _nibbles(packed).masked_select(_padding(bitmap)).any()


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [2·bytes], 0 to 15."""
    return torch.stack((packed & 15, packed >> 4), dim=1).flatten()


def _padding(bitmap: Tensor) -> Tensor:
    """Bool, one for each nibble: the high nibbles of the last bytes of blocks with an odd number of entries."""
    counts = block_counts(bitmap)
    ends = (counts + 1 >> 1).cumsum(0)
    padding = torch.zeros(2 * int(ends[-1]) if len(ends) else 0, dtype=torch.bool, device=bitmap.device)
    padding[2 * ends[(counts & 1).bool()] - 1] = True
    return padding


def block_counts(bitmap: Tensor) -> Tensor:
    """int64 [N·⌈K/64⌉]: how many entries each block stores."""
    bits = torch.arange(256, device=bitmap.device)[:, None] >> torch.arange(8, device=bitmap.device) & 1
    return bits.sum(1)[bitmap.contiguous().view(torch.uint8).flatten().int()].view(-1, 8).sum(1)
