import pytest
import torch

import compress
from compress import refinement
from compress.format import Checkpoint
from compress.layer import LowRankSparseLinear, pack
from compress.options import CompressOptions
from compress.pipeline import compress_model
from compress.trainable import TrainableLinear, fast_products, has_fast_products
from sslc_common.errors import InputError
from tests.compress.models import save_tiny

HALF = {"budget": 0.5, "rank_share": 0.2}


def divergence(dense, compressed, tokens):
    with torch.no_grad():
        wanted, got = (compress.load(folder)(tokens).logits.log_softmax(-1) for folder in (dense, compressed))
    return float(torch.nn.functional.kl_div(got, wanted, reduction="batchmean", log_target=True))


def tensors(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture
def many_tokens():
    return torch.randint(0, 97, (64, 32), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("values_dtype", ["f32", "int8"])
@pytest.mark.parametrize("allocation", ["fisher", "uniform"])
def test_refined_blocks_are_nearer_to_the_dense_model_on_other_text(
    tmp_path, many_tokens, family, values_dtype, allocation
):
    # With weights as small as usual, predictions are nearly uniform and there is nothing to recover.
    source = save_tiny(tmp_path / "source", family, initializer_range=0.1)
    # Errors are kept small, as Fisher information tells of small ones only; 90 % in int8 leave nothing to recover.
    budget = 0.9 if values_dtype == "f32" else 0.8
    options = {"values_dtype": values_dtype, "allocation": allocation, "budget": budget, "rank_share": 0.2}
    for passes in (0, 30):
        out = tmp_path / str(passes)
        compress_model(source, out, CompressOptions(refinement=passes, **options), tokens=many_tokens[:48])
        Checkpoint.open(out).verify()
    plain, refined = (divergence(source, tmp_path / name, many_tokens[48:]) for name in ("0", "30"))
    assert refined < 0.98 * plain


def test_masks_ranks_and_what_stays_dense_are_not_touched_and_the_rest_is(tmp_path, tiny_llama, tokens):
    options = {"exclude": ("*.q_proj",)} | HALF
    for passes in (0, 5):
        compress_model(tiny_llama, tmp_path / str(passes), CompressOptions(refinement=passes, **options), tokens=tokens)
    before, after = tensors(tmp_path / "0"), tensors(tmp_path / "5")
    # Later masks are found on what the refined blocks before them produce.
    first = [name for name in before if ".layers.0." in name or ".layers." not in name]
    fixed = ("bitmap", "q_proj.weight", "embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for name in first:
        if not before[name].numel():  # U and V of rank 0
            continue
        assert torch.equal(before[name], after[name]) == name.endswith(fixed), name


def test_a_block_that_other_text_likes_less_is_as_it_was(tmp_path, tiny_llama, tokens, monkeypatch):
    compress_model(tiny_llama, tmp_path / "plain", CompressOptions(refinement=0, **HALF), tokens=tokens)
    monkeypatch.setattr(refinement, "LEAST_RATE", 10.0)
    compress_model(tiny_llama, tmp_path / "spoilt", CompressOptions(refinement=2, **HALF), tokens=tokens)
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "spoilt")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_error_is_weighted_by_fisher_information():
    F = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    root = refinement._root(F, 2)
    shrunk = (1 - refinement.SHRINKAGE) * F + refinement.SHRINKAGE * F.diagonal().diag()
    assert torch.allclose(root @ root.T, shrunk / 3 + 1e-3 * torch.eye(2))
    for nothing in (None, torch.zeros(2, 2)):
        assert torch.equal(refinement._root(nothing, 2), torch.eye(2))


def test_a_negative_number_of_passes_is_refused():
    with pytest.raises(InputError, match=r"refinement is negative.*-1"):
        CompressOptions(refinement=-1)


@pytest.mark.parametrize(
    ("processor", "faster"),
    [
        ({"cpu_name": "AMD Zen 5", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD Zen 3", "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_products_are_in_bfloat16_where_the_processor_is_faster_at_them(monkeypatch, processor, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert has_fast_products() == faster
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    with fast_products():
        assert torch.is_autocast_enabled("cpu") == faster


@pytest.mark.parametrize("values_too", [True, False])
def test_low_rank_parts_are_not_multiplied_in_bfloat16(values_too):
    # A kernel for every rank would be compiled and kept.
    generator = torch.Generator().manual_seed(0)
    x, U, V = (torch.randn(shape, generator=generator) for shape in [(5, 48), (32, 3), (3, 48)])
    bitmap, values = pack(torch.zeros(32, 48), torch.zeros(32, 48, dtype=torch.bool))
    layer = TrainableLinear(LowRankSparseLinear.from_parts(bitmap, values, U, V))
    layer.values.requires_grad_(values_too)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    wanted = x.bfloat16() @ (U @ V).bfloat16().T if values_too else (x @ V.T @ U.T).bfloat16()
    assert torch.equal(y, wanted)


def test_trained_factors_have_the_same_gradients_with_values_and_without():
    generator = torch.Generator().manual_seed(0)
    x, S, U, V, bias = (  # whole numbers, so that all sums are exact
        torch.randint(-2, 3, shape, generator=generator).float()
        for shape in [(7, 48), (32, 48), (32, 3), (3, 48), (32,)]
    )
    mask = S != 0
    found = []
    for values_too in (True, False):
        layer = TrainableLinear(LowRankSparseLinear.from_parts(*pack(S, mask), U, V, bias))
        layer.values.requires_grad_(values_too)
        y = layer(x)
        y.square().sum().backward()
        found.append([y, layer.U.grad, layer.V.grad, layer.bias.grad])
        if values_too:
            assert torch.equal(layer.values.grad, (2 * y.T @ x)[mask])
    assert all(map(torch.equal, *found))
