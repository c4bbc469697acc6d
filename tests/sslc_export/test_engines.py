"""The engines against PyTorch, and what they do with a missing library, missing weights or damaged files."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from plugins_ort import library as plugin
from sslc_common.errors import InputError, MissingError
from sslc_export.engines import onnxruntime as engine_module
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.lowering import names
from tests.tiny_models import DENSE_FAMILIES, FAMILIES, VOCABULARY, lowered

# The limit. Measured: 1e-7 to 4e-7, a few roundings of float32 sums in another order.
TOLERANCE = 1e-5
# Kernels that round activations to 16 bits: by 2e-5 of their root mean square for int8 values, and where there are
# bfloat16 dot products by up to 2e-3 of each for bfloat16 values and many tokens. The body rounds nothing.
ROUNDED = {"int8 values": 2e-4, "int4 values": 2e-4, "bfloat16 weights, compressed": 5e-3}


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


def left_padded(batch, length):
    """A mask whose row i begins with 2·i padded tokens."""
    return (np.arange(length) >= 2 * np.arange(batch)[:, None]).astype(np.int64)


def ones(batch, length):
    return np.ones((batch, length), np.int64)


# Calls of an engine, one after the other with the cache of the one before: (token ids, mask over past and new tokens).
# All are longer than Mistral's window of 8 tokens.
SEQUENCES = {
    "prefill": [(tokens(1, 20), ones(1, 20))],
    "decode": [(tokens(1, 11), ones(1, 11)), (tokens(1, 1), ones(1, 12)), (tokens(1, 1, 1), ones(1, 13))],
    "chunk with past": [(tokens(1, 9), ones(1, 9)), (tokens(1, 12), ones(1, 21))],
    "left-padded batch": [(tokens(3, 14), left_padded(3, 14))],
    "batch decode": [(tokens(3, 10), left_padded(3, 10)), (tokens(3, 1), left_padded(3, 11))],
    "no mask given": [(tokens(2, 10), None), (tokens(2, 2), None)],
}


def logits_of(engine, calls):
    """Logits of all unpadded new tokens, [tokens, vocabulary]."""
    cache, valid = None, []
    for ids, mask in calls:
        logits, cache = engine.run(ids, mask, cache)
        assert logits.shape == (*ids.shape, engine.vocab_size)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()  # of padding too: a NaN there would spread through the cache
        valid.append(logits if mask is None else logits[mask[:, -ids.shape[1] :].astype(bool)])
    return np.concatenate([part.reshape(-1, engine.vocab_size) for part in valid])


def relative_l2(actual, expected):
    return np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64))


def assert_agree(engine, reference, tolerance=TOLERANCE):
    for name, calls in SEQUENCES.items():
        error = relative_l2(logits_of(engine, calls), logits_of(reference, calls))
        assert error <= tolerance, f"{name}: {error}"


@pytest.fixture(scope="session")
def kernel():
    """The kernel library; without it these tests would prove less than they say."""
    return plugin.library_path()


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_dense_engine_agrees_with_pytorch(family):
    model = lowered(family, compressed=False)
    engine = OnnxRuntimeEngine(model.path)
    assert (engine.kernel, engine.fallback_reason, engine.kernel_layers) == ("none", None, 0)
    assert engine.dense_layers == len(model.report.dense_layers)
    assert_agree(engine, model.torch_engine())


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_with_our_kernel_agrees_with_pytorch(family, kernel):
    model = lowered(family)
    engine = OnnxRuntimeEngine(model.path)
    assert engine.kernel == plugin.kernel_name()
    assert engine.fallback_reason is None
    assert engine.kernel_layers == len(model.report.kernel_layers)
    assert engine.dense_layers == len(model.report.dense_layers) == 3
    assert_agree(engine, model.torch_engine())


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_with_the_onnx_body_agrees_with_pytorch(family):
    model = lowered(family)
    engine = OnnxRuntimeEngine(model.path, library="none")
    assert (engine.kernel, engine.kernel_layers) == ("function", 0)
    assert engine.fallback_reason == "the kernel library was switched off"
    assert_agree(engine, model.torch_engine())


VARIANTS = {
    "bfloat16 weights, compressed": ("qwen2", {"dtype": torch.bfloat16}),
    "int8 values": ("qwen2", {"dtype": torch.int8}),
    "int4 values": ("qwen2", {"dtype": torch.uint8}),
    "bfloat16 weights, dense": ("qwen2", {"dtype": torch.bfloat16, "compressed": False}),
    "float16 weights, dense, tied": (
        "llama",
        {"dtype": torch.float16, "compressed": False, "tie_word_embeddings": True},
    ),
    "a window in one layer of two": (
        "qwen2",
        {"compressed": False, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "llama3's rotary frequencies": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_agree_with_pytorch(variant):
    family, options = VARIANTS[variant]
    model = lowered(family, **{k: v if not isinstance(v, dict) else FrozenDict(v) for k, v in options.items()})
    for library in ("auto", "none"):
        tolerance = ROUNDED.get(variant, TOLERANCE) if library == "auto" else TOLERANCE
        assert_agree(OnnxRuntimeEngine(model.path, library=library), model.torch_engine(), tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_int4_values_run_by_the_operators_body(family):
    model = lowered(family, dtype=torch.uint8)
    assert_agree(OnnxRuntimeEngine(model.path, library="none"), model.torch_engine(), TOLERANCE)


class FrozenDict(dict):
    """A dict that `lowered` can look up in its cache."""

    def __hash__(self):
        return hash(tuple(self.items()))


def test_the_window_matters():
    # Guards the tests above: if the sequences were shorter than the window, they would prove nothing about it.
    calls = SEQUENCES["prefill"]
    with_window = lowered("mistral")
    reference = with_window.torch_engine()
    reference._model.config.sliding_window = None
    assert relative_l2(logits_of(reference, calls), logits_of(with_window.torch_engine(), calls)) > 1e-3


@pytest.mark.parametrize("make", ["onnxruntime", "pytorch"])
def test_a_given_cache_stays_valid(make):
    model = lowered("llama")
    engine = OnnxRuntimeEngine(model.path) if make == "onnxruntime" else model.torch_engine()
    _, cache = engine.run(tokens(2, 9))
    first, _ = engine.run(tokens(2, 3, 1), cache=cache)
    engine.run(tokens(2, 5, 2), cache=cache)
    again, _ = engine.run(tokens(2, 3, 1), cache=cache)
    assert np.array_equal(first, again)


def test_logits_outlive_later_runs():
    engine = OnnxRuntimeEngine(lowered("llama").path)
    logits, cache = engine.run(tokens(1, 9))
    kept = logits.copy()
    for seed in range(20):
        _, cache = engine.run(tokens(1, 9, seed), cache=cache if seed % 2 else None)
    assert np.array_equal(logits, kept)


def test_plain_onnxruntime_runs_the_file():
    model = lowered("llama")
    session = ort.InferenceSession(model.path)
    feeds = {
        "input_ids": tokens(1, 12),
        "attention_mask": ones(1, 12),
        "position_ids": np.arange(12)[None],
        **{
            f"past_key_values.{i}.{part}": np.zeros((1, 2, 0, 12), np.float32)
            for i in (0, 1)
            for part in ("key", "value")
        },
    }
    logits = session.run(["logits"], feeds)[0]
    assert relative_l2(logits, model.torch_engine().run(tokens(1, 12))[0]) <= TOLERANCE


def test_sizes_are_known():
    engine = OnnxRuntimeEngine(lowered("qwen3").path, threads=1, name="small")
    assert (engine.name, engine.vocab_size, engine.num_layers, engine.threads) == ("small", VOCABULARY, 2, 1)
    assert OnnxRuntimeEngine(lowered("qwen3").path).threads >= 1


def test_a_missing_library_means_the_onnx_body_and_is_told(monkeypatch):
    def missing():
        raise MissingError("The native library is not there", do="Build it")

    monkeypatch.setattr(plugin, "library_path", missing)
    engine = OnnxRuntimeEngine(lowered("llama").path)
    assert (engine.kernel, engine.kernel_layers) == ("function", 0)
    assert engine.fallback_reason == "The native library is not there. Build it."


def test_s_is_decoded_on_every_run_where_memory_is_short(monkeypatch):
    model = lowered("llama")
    monkeypatch.setattr(engine_module, "_FOLDING_BYTES_PER_WEIGHT", 10**12)
    engine = OnnxRuntimeEngine(model.path, library="none")
    assert "decoded on every run" in engine.fallback_reason
    assert_agree(engine, model.torch_engine())


def optimized_graph(model, tmp_path, monkeypatch, **kwargs):
    """The graph that ONNX Runtime really runs."""
    options = engine_module._session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    monkeypatch.setattr(engine_module, "_session_options", lambda threads: options)
    OnnxRuntimeEngine(model.path, **kwargs)
    return onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph


@pytest.mark.parametrize("tied", [False, True])
def test_dense_engine_multiplies_with_prepacked_weights(tied, tmp_path, monkeypatch):
    # The baseline that compressed engines are compared with: each linear layer, the tied lm_head among them, must be a
    # MatMul with a constant right side, which ONNX Runtime packs once. A Transpose left over would run for each token.
    options = {"dtype": torch.float16, "tie_word_embeddings": True} if tied else {}
    model = lowered("llama", compressed=False, **options)
    graph = optimized_graph(model, tmp_path, monkeypatch)
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert len(products) == len(model.report.dense_layers) == 15
    assert all(node.input[1] in constants for node in products)
    assert not any(node.input[0] in constants for node in graph.node if node.op_type in ("Transpose", "Cast"))


@pytest.fixture
def copied(tmp_path):
    """A compressed engine with its weights, to be damaged."""
    return shutil.copytree(lowered("llama").path.parent, tmp_path / "engine") / "engine.onnx"


def test_an_engine_can_be_moved_with_its_weights(copied):
    assert_agree(OnnxRuntimeEngine(copied), lowered("llama").torch_engine())


def shard_of(path):
    return next((path.parent / "compressed").glob("*-00001-of-*.safetensors"))


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def edit(path, change):
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def set_version(model):
    next(entry for entry in model.metadata_props if entry.key == names.FORMAT_VERSION_KEY).value = "9"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "There is no engine"),
        (lambda path: path.write_bytes(b"not a model"), "not an ONNX model, or damaged"),
        (lambda path: path.write_bytes(b""), "not made by sslc-export"),
        (truncate, "not an ONNX model, or damaged"),
        (
            lambda path: shard_of(path).unlink(),
            "needs the weights in .*-00001-of-00002.safetensors, which is not there",
        ),
        (lambda path: truncate(shard_of(path)), "00001-of-00002.safetensors is cut off: tensor .* ends behind"),
        (lambda path: edit(path, lambda model: model.ClearField("metadata_props")), "not made by sslc-export"),
        (lambda path: edit(path, set_version), "unknown format version. Got: 9. Allowed: 1"),
        (lambda path: edit(path, lambda model: model.graph.node.pop()), "ONNX Runtime .* cannot open"),
    ],
)
def test_damage_is_told(copied, damage, message):
    damage(copied)
    with pytest.raises(InputError, match=message):
        OnnxRuntimeEngine(copied)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((1, 0)), None, "S > 0"),
        (np.zeros(3), None, r"\[B, S\]"),
        (tokens(2, 3), ones(2, 4), r"\(2, 3\), got shape \(2, 4\)"),
    ],
)
def test_wrong_shapes_are_refused(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        OnnxRuntimeEngine(lowered("llama").path).run(ids, mask)
