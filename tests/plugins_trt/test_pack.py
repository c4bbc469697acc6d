"""What pack.py writes is read back here, one lane at a time, from the description in src/layouts.cuh."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins_trt.pack import PackedLayer, choose_layout, factor_bytes, pack_layer, sparse_bytes, to_bits
from sslc_common.errors import InputError
from tests.plugins_trt.emulator import bitmap_of, random_case, random_mask


def unpack(packed: PackedLayer) -> tuple[np.ndarray, np.ndarray]:
    """Bit patterns and mask of S [N, K], read lane by lane."""
    (N,), K = packed.out_features, packed.in_features
    octets = packed.S.view(np.uint8)
    rows, columns = -(-N // 16) * 16, -(-K // 256) * 256 if packed.layout == "bank32" else -(-K // 64) * 64
    dense, mask = np.zeros((rows, columns), np.uint16), np.zeros((rows, columns), bool)
    width = 256 if packed.layout == "bank32" else 64
    tiles = columns // width
    for tile in range(rows // 16 * tiles):
        row, column = tile // tiles * 16, tile % tiles * width
        if packed.layout == "any":
            data = octets[packed.S[tile] * 16 : packed.S[tile + 1] * 16]
        else:
            data = octets[tile * packed.slot : (tile + 1) * packed.slot]
        cut = np.s_[row : row + 16, column : column + width]
        _READERS[packed.layout](data, dense[cut], mask[cut], packed.int8)
    assert not mask[N:].any(), "a padding row stores something"
    assert not mask[:, K:].any(), "a padding column stores something"
    return dense[:N, :K], mask[:N, :K]


def _read_bank32(data, dense, mask, int8):
    values, masks = data[:4096].view(np.uint16).reshape(32, 32, 2), data[4096:].view(np.uint16).reshape(4, 32, 2)
    for lane in range(32):
        for half in range(2):
            kept = 0
            for column in range(64):
                if masks[column // 16, lane, half] >> (column % 16) & 1:
                    at = lane // 4 + 8 * half, lane % 4 * 64 + column
                    dense[at], mask[at] = values[kept, lane, half], True
                    kept += 1


def _read_fixed8(data, dense, mask, int8):
    planes = 8 if int8 else 16
    words = data[64 * planes : 64 * planes + 128].view(np.uint32)
    for lane in range(32):
        for half in range(2):
            slots = data[half * 32 * planes + lane * planes :][:planes]
            kept = 0
            for column in range(16):
                if words[lane] >> np.uint32(4 * (column % 8) + 2 * half + column // 8) & 1:
                    at = lane // 4 + 8 * half, lane % 4 * 16 + column
                    dense[at] = slots[kept] if int8 else int(slots[kept]) | int(slots[8 + kept]) << 8
                    mask[at] = True
                    kept += 1


def _read_any(data, dense, mask, int8):
    words, starts = data[:128].view(np.uint32), data[128:144].view(np.uint32)
    for unit in range(4):
        kept = 0
        for lane in range(32):
            for i in range(8):
                if words[lane] >> np.uint32(4 * i + unit) & 1:
                    at = lane // 4 + 8 * (unit // 2), lane % 4 * 16 + unit % 2 * 8 + i
                    group = data[starts[unit] + kept // 4 * (4 if int8 else 8) :]
                    dense[at] = group[kept % 4] if int8 else int(group[kept % 4]) | int(group[4 + kept % 4]) << 8
                    mask[at] = True
                    kept += 1


_READERS = {"bank32": _read_bank32, "fixed8": _read_fixed8, "any": _read_any}


def assert_packs_exactly(case) -> None:
    packed = case.pack()
    dense, mask = unpack(packed)
    if packed.int8:
        expected = np.where(case.mask, case.dense.view(np.uint8), 0)
    else:
        expected = np.where(case.mask, to_bits(case.dense, packed.type), 0)
    assert np.array_equal(dense, expected)
    added = mask & ~case.mask  # fixed8 may store a zero to keep its slot 0 free; nothing else may be added
    assert not (case.mask & ~mask).any()
    assert not added.any() or packed.layout == "fixed8"


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", [(16, 64), (48, 256), (33, 576), (1, 1), (17, 65), (530, 128)])
@pytest.mark.parametrize(("layout", "rule"), [("any", "free:0.5"), ("bank32", "32:64"), ("fixed8", "8:16")])
def test_what_is_packed_reads_back(layout, rule, shape, int8):
    if layout == "bank32" and int8:
        with pytest.raises(InputError, match="int8"):
            random_case(0, *shape, 0, 1, rule=rule, int8=True, layout=layout).pack()
        return
    assert_packs_exactly(random_case(0, *shape, 0, 1, rule=rule, int8=int8, layout=layout))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 40),
    K=st.integers(1, 300),
    rule=st.sampled_from(["free:0.0", "free:0.03", "free:0.5", "free:1.0", "32:64", "8:16"]),
    int8=st.booleans(),
)
def test_any_mask_packs_exactly(seed, N, K, rule, int8):
    assert_packs_exactly(random_case(seed, N, K, 0, 1, rule=rule, int8=int8, layout="any"))
    if rule == "8:16":
        assert_packs_exactly(random_case(seed, N, K, 0, 1, rule=rule, int8=int8, layout="fixed8"))
    if rule in ("32:64", "8:16"):
        assert_packs_exactly(random_case(seed, N, K, 0, 1, rule=rule, layout="bank32"))


@pytest.mark.parametrize(("layout", "rule", "most"), [("bank32", "33:64", 33), ("fixed8", "9:16", 9)])
def test_a_mask_that_breaks_the_rule_is_refused(layout, rule, most):
    with pytest.raises(InputError, match=f"{most} stored"):
        random_case(0, 16, 256, 0, 1, rule=rule, layout=layout).pack()


def test_factors_lie_in_fragment_order_padded_with_zeros():
    case = random_case(0, 20, 70, 5, 1, rule="free:0.5", layout="any")
    packed = case.pack()
    for matrix, data, rows, columns in ((case.U, packed.U, 32, 64), (case.V, packed.V, 64, 128)):
        fragments = data.view(np.uint16).reshape(rows // 16, columns // 64, 4, 32, 8)
        dense = np.zeros((rows, columns), np.uint16)
        for i, k, c, lane in np.ndindex(fragments.shape[:4]):
            column = k * 64 + lane % 4 * 16 + c % 2 * 8
            dense[i * 16 + lane // 4 + c // 2 * 8, column : column + 8] = fragments[i, k, c, lane]
        assert np.array_equal(dense[: matrix.shape[0], : matrix.shape[1]], to_bits(matrix, "f16"))
        assert not dense[matrix.shape[0] :].any()
        assert not dense[:, matrix.shape[1] :].any()


def test_rank_0_leaves_words_that_tensorrt_accepts():
    packed = random_case(0, 16, 64, 0, 1, rule="free:0.5").pack()
    assert packed.U.size == packed.V.size == 4
    assert packed.rank == (0,)


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_rounding_is_to_nearest_even(type):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    half = torch.from_numpy(values).to(torch.float16 if type == "f16" else torch.bfloat16)
    assert np.array_equal(to_bits(values, type), half.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize(("type", "value"), [("f16", 7e4), ("f16", np.nan), ("bf16", np.inf), ("bf16", 3.4e38)])
def test_a_value_out_of_range_is_refused(type, value):
    with pytest.raises(InputError, match="does not fit"):
        to_bits(np.array([1.0, value], np.float32), type)


@pytest.mark.parametrize(
    ("rule", "K", "int8", "layout"),
    [
        ("8:16", 4096, False, "fixed8"),
        ("32:64", 4096, False, "any"),  # bank32 is 3 % smaller, and was no faster on an H100
        ("free:0.5", 4096, False, "any"),
        ("32:64", 576, False, "any"),  # 576 columns padded to 768 would cost a third more
        ("free:0.1", 4096, False, "any"),
        ("8:16", 4096, True, "fixed8"),
    ],
)
def test_the_layout_follows_from_the_mask(rule, K, int8, layout):
    rng = np.random.default_rng(0)
    if rule.startswith("free"):
        mask = random_mask(rng, 64, K, rule)
    else:  # every group as full as the rule lets it be
        most, of = map(int, rule.split(":"))
        mask = np.argsort(np.argsort(rng.random((64, K // of, of)))) < most
        mask = mask.reshape(64, K)
    choice = choose_layout([bitmap_of(mask)], K, int8=int8)
    assert choice.layout == layout
    assert "bytes per weight" in choice.reason


def test_bytes_per_weight_are_what_the_documentation_says():
    def per_weight(rule, layout, int8=False):
        case = random_case(0, 256, 1024, 0, 1, rule=rule, int8=int8, layout=layout)
        return case.pack().S.nbytes / case.mask.size

    assert per_weight("32:64", "bank32") == 1.125
    assert per_weight("8:16", "fixed8") == 1.125
    assert per_weight("8:16", "fixed8", int8=True) == pytest.approx(0.656, abs=0.001)
    assert per_weight("free:0.5", "any") == pytest.approx(2 * 0.5 + 0.16, abs=0.02)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("rule", "layout"), [("free:0.5", "any"), ("free:0.1", "any"), ("8:16", "fixed8"), ("32:64", "bank32")]
)
def test_sizes_are_predicted_from_shapes_and_counts(rule, layout, int8):
    if layout == "bank32" and int8:
        pytest.skip("bank32 takes no int8 values")
    for N, K, rank in ((256, 1024, 100), (100, 576, 0)):
        case = random_case(0, N, K, rank, 1, rule=rule, int8=int8, layout=layout)
        packed, stored = case.pack(), int(case.mask.sum())
        # Random masks: what rounding adds in each of hundreds of tiles is close to its average.
        tolerance = 0.005 if layout == "any" else 0
        assert sparse_bytes(layout, N, K, stored, int8=int8) == pytest.approx(packed.S.nbytes, rel=tolerance)
        assert factor_bytes(N, K, rank) == packed.U.nbytes + packed.V.nbytes


def test_ranks_are_padded_to_64():
    # What a rank of 7 costs: nine times its own size, as docs/kernel-gpu.md says.
    assert factor_bytes(576, 576, 7) / (2 * 7 * 2 * 576) == pytest.approx(64 / 7)
    assert factor_bytes(4096, 4096, 128) == 2 * 128 * 2 * 4096


def test_a_bitmap_that_disagrees_with_its_values_is_an_internal_error():
    case = random_case(0, 16, 64, 0, 1, rule="free:0.5")
    with pytest.raises((ValueError, IndexError)):
        pack_layer(bitmap_of(case.mask), case.dense[case.mask][:-1], case.U, case.V, in_features=64)


@pytest.mark.parametrize(("N", "K"), [(1, 2**22 + 64), (2**22 + 1, 1)])
def test_a_width_that_the_kernel_cannot_take_is_refused_with_the_way_out(N, K):
    bitmap = np.zeros((N, 2 * -(-K // 64)), np.int32)
    parts = np.zeros(0, np.float32), np.zeros((N, 0), np.float32), np.zeros((0, K), np.float32)
    with pytest.raises(InputError, match=r"model.layers.3.mlp.up_proj is larger .* --exclude"):
        pack_layer(bitmap, *parts, in_features=K, name="model.layers.3.mlp.up_proj")
