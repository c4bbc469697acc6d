"""The int8 head: what is stored, what PyTorch makes of it, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from compress import hf
from compress.format import Checkpoint
from compress.head import HeadEmbedding
from compress.layer import LowRankSparseLinear
from compress.options import CompressOptions
from compress.pipeline import REPORT, compress_model
from compress.report import CompressReport
from sslc_common.errors import InputError
from tests.compress.models import FAMILIES, VOCABULARY, save_tiny

OPTIONS = CompressOptions(method="magnitude", allocation="uniform", budget=0.7, head="int8")
EMBEDDINGS = {"gpt2": "transformer.wte", "opt": "model.decoder.embed_tokens"}


def compressed(tmp_path, family, options=OPTIONS, **overrides):
    """A tiny model of a hidden size that is no multiple of 64, compressed without calibration."""
    dense = save_tiny(tmp_path / "dense", family, **overrides)
    report = compress_model(dense, tmp_path / "out", options)
    return dense, tmp_path / "out", report


def ids():
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rounded_head_gives_the_logits_of_the_rounded_weights(tmp_path, family, tied):
    dense, out, report = compressed(tmp_path, family, tie_word_embeddings=tied)
    model = hf.load(out, torch.float32)
    head = model.get_output_embeddings()
    assert isinstance(head, LowRankSparseLinear)
    assert isinstance(model.get_input_embeddings(), HeadEmbedding) == tied

    # The same model with its head (and what is tied to it) kept, and then given the rounded weight.
    kept = tmp_path / "kept"
    compress_model(dense, kept, CompressOptions(method="magnitude", allocation="uniform", budget=0.7))
    reference = hf.load(kept, torch.float32)
    W = reference.get_output_embeddings().weight
    error = (head.weight - W).abs().max() / W.abs().max()
    assert 0 < error <= 0.011  # half a step of 127, or 1 % where a finer grid clips (compress.int8)
    with torch.no_grad():
        W.copy_(head.weight)
        got, expected = model(ids()).logits, reference(ids()).logits
    assert torch.allclose(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert report.head is not None
    assert report.head.bytes < 0.6 * report.head.dense_bytes  # 48 columns share the bitmap's and scales' 64
    assert CompressReport.from_json(json.loads((out / REPORT).read_bytes())) == report


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_matrix_is_stored_once(tmp_path, family):
    _, out, report = compressed(tmp_path, family, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.embeddings == {EMBEDDINGS.get(family, "model.embed_tokens"): "lm_head"}
    assert not [name for name in checkpoint.tensors if "embed_tokens" in name or "wte" in name]
    stored = sum(ref.length for name, ref in checkpoint.tensors.items() if name.startswith("lm_head."))
    assert stored == report.head.bytes
    checkpoint.verify()


def test_the_budget_does_not_count_the_head(tmp_path):
    _, out, report = compressed(tmp_path, "llama")
    assert all(layer.name != "lm_head" for layer in report.layers)
    assert report.budget_in_bytes <= 0.7
    assert report.checkpoint_bytes == sum(ref.length for ref in Checkpoint.open(out).tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_have_the_models_type_and_scales_their_own(tmp_path, dtype):
    _, out, _ = compressed(tmp_path, "llama", tie_word_embeddings=True)
    model = hf.load(out, dtype)
    assert model.get_input_embeddings()(ids()).dtype == dtype
    assert model(ids()).logits.dtype == dtype
    assert model.get_output_embeddings().scales.dtype == torch.float16


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, monkeypatch):
    dense, out, _ = compressed(tmp_path, "llama")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("compress.work.Work.publish", interrupt)
        compress_model(dense, tmp_path / "again", OPTIONS)
    compress_model(dense, tmp_path / "again", OPTIONS)
    for file in sorted(out.glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert load_file(out / "model-00004-of-00004.safetensors")["lm_head.values"].dtype == torch.int8


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({"model.embed_tokens": "model.layers.0.mlp.up_proj"}, "cannot hold them"),
        ({"model.embed_tokens": "nowhere"}, "cannot hold them"),
        (["model.embed_tokens"], "no table of embeddings"),
        ({"model.layers.0.mlp.up_proj": "lm_head"}, "does not fit the architecture"),
    ],
)
def test_embeddings_whose_rows_are_elsewhere_are_refused(tmp_path, embeddings, message):
    _, out, _ = compressed(tmp_path, "llama", tie_word_embeddings=True)
    config = json.loads((out / "config.json").read_bytes())
    config["quantization_config"]["embeddings"] = embeddings
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        hf.load(out, torch.float32)


def test_an_unknown_treatment_is_refused():
    with pytest.raises(InputError, match="Treatment of the head"):
        CompressOptions(head="int2")
