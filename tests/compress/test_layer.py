import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.int4 import pack_int4
from compress.layer import LowRankSparseLinear, bitmap_words, keep_decoded, pack, unpack, unpack_mask

DTYPES = (torch.float32, torch.bfloat16)


def random_layer(N, K, r, density=0.5, dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, K, generator=g) < density
    S = (torch.randn(N, K, generator=g) * mask).to(dtype)
    U, V = torch.randn(N, r, generator=g).to(dtype), torch.randn(r, K, generator=g).to(dtype)
    b = torch.randn(N, generator=g) if bias else None
    return LowRankSparseLinear.from_parts(*pack(S, mask), U, V, b), S


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 9),
    K=st.integers(1, 200),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_unpack_is_the_inverse_of_pack(N, K, density, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    S, mask = torch.randn(N, K, generator=g).to(dtype), torch.rand(N, K, generator=g) < density
    bitmap, values = pack(S, mask)
    assert bitmap.shape == (N, bitmap_words(K))
    assert bitmap.dtype == torch.int32
    assert values.shape == (int(mask.sum()),)
    assert torch.equal(unpack_mask(bitmap, K), mask)
    assert torch.equal(unpack(bitmap, values, K), torch.where(mask, S, 0))
    assert not unpack_mask(bitmap, 32 * bitmap_words(K))[:, K:].any()


def test_bit_k_is_bit_k_mod_32_of_word_k_div_32_and_values_follow_the_row():
    mask = torch.zeros(2, 70, dtype=torch.bool)
    mask[0, [0, 33, 69]] = True
    mask[1, 31] = True
    bitmap, values = pack(torch.arange(140.0).view(2, 70), mask)
    assert bitmap.tolist() == [[1, 2, 1 << 5, 0], [-(1 << 31), 0, 0, 0]]
    assert values.tolist() == [0, 33, 69, 70 + 31]


def test_a_stored_zero_is_stored():
    bitmap, values = pack(torch.zeros(1, 3), torch.tensor([[True, False, True]]))
    assert bitmap.tolist() == [[5, 0]]
    assert values.tolist() == [0, 0]


@pytest.mark.parametrize(("N", "K", "r"), [(1, 1, 0), (5, 63, 2), (33, 65, 16), (64, 200, 64)])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_forward_with_quantized_values_is_the_formula(N, K, r, density, bits):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(N, K, generator=g) < density
    Q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (N, K), generator=g).to(torch.int8) * mask
    scales = torch.rand(N, (K + 63) // 64, generator=g).half()
    U, V = torch.randn(N, r, generator=g).bfloat16(), torch.randn(r, K, generator=g).bfloat16()
    bias, x = torch.randn(N, generator=g), torch.randn(2, 3, K, generator=g)
    bitmap, values = pack(Q, mask)
    values = pack_int4(bitmap, values) if bits == 4 else values
    layer = LowRankSparseLinear.from_parts(bitmap, values, U, V, bias, scales)
    assert layer.nnz == int(mask.sum())
    S = Q.double() * scales.double()[:, torch.arange(K) // 64]
    W = S + U.double() @ V.double()
    # float32 sums of up to 200 terms: a relative 1e-5 of their sizes.
    size = x.double().abs() @ (S.abs() + U.double().abs() @ V.double().abs()).T + bias.abs()
    y = layer(x)
    assert ((y - (x.double() @ W.T + bias)).abs() <= 1e-5 * size).all()
    # bfloat16 products of U and V
    torch.testing.assert_close(layer.weight.double(), W, rtol=0.01, atol=0.01 * float(W.abs().max() + 1e-9))
    keep_decoded(layer)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "r"), [(1, 1, 0), (5, 63, 2), (7, 64, 0), (33, 65, 16), (64, 200, 64)])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_forward_is_the_formula(N, K, r, density, dtype):
    layer, S = random_layer(N, K, r, density, dtype)
    x = torch.randn(2, 3, K)
    W = S.double() + layer.U.double() @ layer.V.double()
    expected = x.double() @ W.T + layer.bias.double()
    # Values are widened, not rounded: float32 sums of K + r·K terms of size one are all that separates the two.
    scale = x.double().abs() @ (S.double().abs() + layer.U.double().abs() @ layer.V.double().abs()).T + 3
    assert layer(x).dtype == torch.float32
    assert ((layer(x) - expected).abs() <= 1e-6 * scale).all()
    assert ((layer.weight.double() - W).abs() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * (r + 1)).all()


def test_activations_decide_the_type_of_the_result():
    layer, _ = random_layer(6, 40, 3)
    assert layer(torch.randn(4, 40).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_decoded_layers_give_the_same_bits(bias):
    model = torch.nn.Sequential(random_layer(30, 20, 4, dtype=torch.bfloat16, bias=bias)[0])
    x = torch.randn(3, 20)
    before = model(x)
    keep_decoded(model)
    assert torch.equal(model(x), before)
    assert torch.equal(model(x), before)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    keep_decoded(model, False)
    assert torch.equal(model(x), before)
    assert model[0]._decoded is None


def test_the_operator_is_one_node_of_an_exported_graph():
    layer, _ = random_layer(6, 40, 3)
    program = torch.export.export(layer, (torch.randn(2, 40),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.sslc.low_rank_sparse_linear.default]


@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_obeys_the_rules_of_custom_operators(bias):
    layer, _ = random_layer(6, 40, 3, bias=bias)
    torch.library.opcheck(
        torch.ops.sslc.low_rank_sparse_linear,
        (torch.randn(2, 5, 40), layer.bitmap, layer.values, layer.U, layer.V, layer.bias),
    )


def test_an_empty_layer_on_meta_has_the_sizes_of_a_real_one():
    real, _ = random_layer(6, 70, 3)
    with torch.device("meta"):
        empty = LowRankSparseLinear(6, 70, real.nnz, 3, bias=True)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in real.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes


def test_an_empty_layer_for_int4_values_too():
    mask = torch.rand(6, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    bitmap, values = pack(torch.ones(6, 70, dtype=torch.int8), mask)
    U, V = torch.zeros(6, 3).bfloat16(), torch.zeros(3, 70).bfloat16()
    packed, scales = pack_int4(bitmap, values), torch.ones(6, 2).half()
    real = LowRankSparseLinear.from_parts(bitmap, packed, U, V, torch.zeros(6), scales)
    with torch.device("meta"):
        empty = LowRankSparseLinear(
            6, 70, real.nnz, 3, bias=True, dtype=torch.uint8, bias_dtype=torch.float32, packed=len(packed)
        )
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in real.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
