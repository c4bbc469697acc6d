"""int4 values, two to a byte, every block at a whole byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.int4 import block_counts, pack_int4, packed_length, padding_is_zero, unpack_int4
from compress.layer import pack


def random_values(N, K, density, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (N, K), generator=g).to(torch.int8), torch.rand(N, K, generator=g) < density


@settings(max_examples=80, deadline=None)
@given(
    N=st.integers(0, 9),
    K=st.integers(1, 200),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_unpack_is_the_inverse_of_pack(N, K, density, seed):
    Q, mask = random_values(N, K, density, seed)
    bitmap, values = pack(Q, mask)
    packed = pack_int4(bitmap, values)
    assert packed.dtype == torch.uint8
    counts = [int(row[start : start + 64].sum()) for row in mask for start in range(0, K, 64)]
    assert block_counts(bitmap).tolist() == counts
    assert len(packed) == packed_length(bitmap) == sum((count + 1) // 2 for count in counts)
    assert padding_is_zero(bitmap, packed)
    assert torch.equal(unpack_int4(bitmap, packed), values)


def test_the_low_nibble_comes_first_and_every_block_begins_with_a_byte():
    Q, mask = torch.zeros(2, 70, dtype=torch.int8), torch.zeros(2, 70, dtype=torch.bool)
    for n, k, value in [(0, 3, 1), (0, 40, -8), (0, 63, 7), (0, 64, -1), (1, 0, 2), (1, 69, 3), (1, 68, -2)]:
        Q[n, k], mask[n, k] = value, True
    packed = pack_int4(*pack(Q, mask))
    # Row 0: 1, −8 | 7, padding | −1, padding. Row 1: 2, padding | −2, 3.
    assert packed.tolist() == [0x81, 0x07, 0x0F, 0x02, 0x3E]


def test_all_values_survive():
    Q = torch.arange(-8, 8).to(torch.int8)[None]
    bitmap, values = pack(Q, torch.ones_like(Q, dtype=torch.bool))
    assert unpack_int4(bitmap, pack_int4(bitmap, values)).tolist() == list(range(-8, 8))


def test_padding_that_is_not_zero_is_seen():
    bitmap, values = pack(*random_values(5, 130, 0.5, 0))
    counts = block_counts(bitmap)
    odd = int((counts & 1).nonzero()[0])
    packed = pack_int4(bitmap, values)
    packed[int(((counts + 1) // 2)[: odd + 1].sum()) - 1] |= 0x10
    assert not padding_is_zero(bitmap, packed)
    assert torch.equal(unpack_int4(bitmap, packed), values)


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_bytes_is_not_decoded(change):
    bitmap, values = pack(*random_values(5, 130, 0.5, 0))
    packed = pack_int4(bitmap, values)
    with pytest.raises(RuntimeError):
        unpack_int4(bitmap, torch.cat((packed, packed))[: len(packed) + change])
