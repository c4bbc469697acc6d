"""What `lower` writes: the graph, its names, its weights, and its refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from compress.format import Checkpoint
from sslc_common.errors import InputError
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.lowering import lower as lower_module
from sslc_export.lowering import names
from sslc_export.lowering.attention import expose_cache
from sslc_export.lowering.lower import lower, op_counts
from tests.tiny_models import DENSE_FAMILIES, FAMILIES, VOCABULARY, lowered, save_tiny

OURS = f"{names.DOMAIN}::{names.OP_TYPE}"

# Nodes by operator in models of two blocks. A difference is a silent change of the exporter, of the optimizer or of
# transformers: look at the new graph, and at its speed, before changing a number.
_LLAMA = {
    **{"MatMul": 15, "Transpose": 15, "Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Sigmoid": 2},
    **{"Add": 6, "And": 1, "Cast": 2, "Concat": 1, "Cos": 1, "Expand": 1, "Gather": 1, "LessOrEqual": 1, "Mul": 5},
    **{"Range": 2, "Reshape": 1, "Shape": 3, "Sin": 1, "Squeeze": 2, "Unsqueeze": 6},
}
_GPT2 = {
    **{"Gemm": 8, "MatMul": 1, "Transpose": 1, "Attention": 2, "LayerNormalization": 5, "Tanh": 2, "Gather": 2},
    **{"Add": 11, "And": 1, "Cast": 1, "Concat": 7, "Expand": 1, "LessOrEqual": 1, "Mul": 8, "Pow": 2, "Range": 2},
    **{"Reshape": 20, "Shape": 3, "Split": 2, "Squeeze": 2, "Unsqueeze": 5},
}
DENSE = {"llama": _LLAMA, "qwen2": _LLAMA | {"Add": 6 + 6}, "gpt2": _GPT2}
# One layer of each block and the lm_head stay dense; the others become one node each.
_COMPRESSED_LLAMA = _LLAMA | {"MatMul": 3, "Transpose": 3, OURS: 12}
_HEADS_OUTSIDE = {"Transpose": 3 + 8, "Reshape": 1 + 8}  # four times in each block
COMPRESSED = {
    "llama": _COMPRESSED_LLAMA,
    "qwen2": _COMPRESSED_LLAMA,
    # Its queries and keys are normalized head by head, so that Attention cannot split them.
    "qwen3": _COMPRESSED_LLAMA | _HEADS_OUTSIDE | {"RMSNormalization": 5 + 4, "Concat": 1 + 2},
    "mistral": _COMPRESSED_LLAMA | {"And": 3, "Greater": 1, "Sub": 1},  # the window
    "opt": {
        **{"MatMul": 3, "Transpose": 3, "Attention": 2, "LayerNormalization": 5, "Relu": 2, "Gather": 2},
        **{"Add": 10, "And": 1, "Cast": 1, "Concat": 3, "Expand": 1, "LessOrEqual": 1, "Mul": 2, "Range": 2},
        **{"Reshape": 6, "Shape": 3, "Squeeze": 2, "Unsqueeze": 5, OURS: 10},
    },
    "gpt2": _GPT2 | {"Gemm": 2, "Concat": 5, "Reshape": 8, OURS: 6},
}


def graph_of(path):
    return onnx.load(path, load_external_data=False).graph


def our_nodes(path):
    return [node for node in graph_of(path).node if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE)]


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_dense_graph_has_the_expected_operators(family):
    report = lowered(family, compressed=False).report
    assert report.op_counts == DENSE[family]
    assert report.kernel_layers == ()
    assert "lm_head" in report.dense_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_graph_has_the_expected_operators(family):
    assert lowered(family).report.op_counts == COMPRESSED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_can_be_taken_out_of_attention_again(family, tmp_path):
    model = ir.load(lowered(family).path)
    expose_cache(model)
    attention = [node for node in model.graph if node.op_type == "Attention"]
    assert [(len(node.inputs), len(node.outputs)) for node in attention] == [(4, 1), (4, 1)]
    assert op_counts(model)["Transpose"] >= 8  # four times in each block
    path = lowered(family).path.with_name(f"{tmp_path.name}.onnx")  # beside the weights
    ir.save(model, path)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9), dtype=np.int64)
    runs = []
    for engine in (OnnxRuntimeEngine(lowered(family).path), OnnxRuntimeEngine(path)):
        logits, cache = engine.run(ids[:, :6])
        runs += [np.concatenate([logits.copy(), engine.run(ids[:, 6:], None, cache)[0]], 1)]
    np.testing.assert_allclose(*runs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_compressed_layer_is_one_node_of_its_name_with_its_own_tensors(family):
    model = lowered(family)
    layers = Checkpoint.open(model.folder).layers
    nodes = our_nodes(model.path)
    assert sorted(node.name for node in nodes) == sorted(layers)
    assert sorted(model.report.kernel_layers) == sorted(layers)
    assert not set(model.report.dense_layers) & set(layers)
    for node in nodes:
        bias = f"{node.name}.bias" if layers[node.name].bias else f"sslc.zero_bias.{layers[node.name].N}"
        assert list(node.input)[1:] == [*(f"{node.name}.{part}" for part in ("bitmap", "values", "U", "V")), bias]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"version": 1, "layout": b"rows64"}


def test_inputs_and_outputs_have_the_names_and_dimensions_of_the_field():
    graph = graph_of(lowered("llama").path)

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    cache = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert shapes(graph.input) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{name}": ["batch", 2, "past", 12] for name in cache},
    }
    assert shapes(graph.output) == {
        "logits": ["batch", "sequence", 97],
        **{f"present.{name}": ["batch", 2, "total", 12] for name in cache},
    }


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
def test_every_tensor_of_the_checkpoint_is_a_byte_range_of_its_file(compressed, dtype):
    model = lowered("qwen2", compressed=compressed, dtype=dtype)
    tensors = Checkpoint.open(model.folder).tensors
    initializers = {tensor.name: tensor for tensor in graph_of(model.path).initializer}
    assert set(tensors) <= set(initializers)
    for name, ref in tensors.items():
        tensor = initializers[name]
        if ref.length == 0:
            assert tensor.data_location == onnx.TensorProto.DEFAULT
            assert tuple(tensor.dims) == ref.shape
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        assert model.path.parent / entry["location"] == ref.file
        assert (int(entry["offset"]), int(entry["length"])) == (ref.offset, ref.length)
    for name in set(initializers) - set(tensors):
        assert initializers[name].data_location == onnx.TensorProto.DEFAULT
    # The values themselves, read by onnx: all of them fit the types and shapes of the graph.
    whole = {t.name: numpy_helper.to_array(t) for t in onnx.load(model.path).graph.initializer}
    for file in {ref.file for ref in tensors.values()}:
        for name, expected in load_file(file).items():
            assert np.array_equal(whole[name].astype(np.float64), expected.to(torch.float64).numpy())


def test_layers_without_bias_share_one_zero_bias_for_each_size():
    zeros = [t for t in graph_of(lowered("llama").path).initializer if t.name.startswith("sslc.zero_bias.")]
    assert sorted(tuple(t.dims) for t in zeros) == [(24,), (48,), (80,)]
    assert not any(numpy_helper.to_array(t).any() for t in zeros)


def test_tied_embeddings_stay_one_tensor():
    model = lowered("llama", compressed=False, dtype=torch.float16, tie_word_embeddings=True)
    tables = [t.name for t in graph_of(model.path).initializer if tuple(sorted(t.dims)) == (48, 97)]
    assert tables == ["model.embed_tokens.weight"]


def test_metadata_names_the_origin():
    model = lowered("mistral")
    proto = onnx.load(model.path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert proto.producer_name == "sslc-export"
    assert metadata == {
        "sslc.format_version": "1",
        "sslc.model_type": "mistral",
        "sslc.config_sha256": hashlib.sha256((model.folder / "config.json").read_bytes()).hexdigest(),
        "sslc.dense_layers": json.dumps(model.report.dense_layers),
    }


def test_weights_inside_the_output_folder_are_used_in_place():
    model = lowered("llama", compressed=False)
    assert model.report.external_files == (model.folder / "model.safetensors",)
    assert not model.path.with_suffix("").exists()


def hub_cache(folder: Path) -> Path:
    """Turns a folder into what the Hugging Face hub's cache holds: links into a folder of blobs."""
    blobs = folder.parent / "blobs"
    shutil.move(folder, blobs)
    folder.mkdir()
    for blob in blobs.iterdir():
        (folder / blob.name).symlink_to(blob)
    return folder


def with_hard_link(folder: Path) -> Path:
    os.link(folder / "model.safetensors", folder.parent / "second-name.safetensors")
    return folder


@pytest.mark.parametrize(
    ("prepare", "out"),
    [
        (lambda folder: folder, "elsewhere/engine.onnx"),
        (hub_cache, "models/engine.onnx"),
        (with_hard_link, "models/engine.onnx"),
    ],
    ids=["another folder", "hub cache", "hard link"],
)
def test_other_weights_are_copied_beside_the_output(tmp_path, capfd, prepare, out):
    folder = prepare(save_tiny(tmp_path / "models" / "tiny", num_hidden_layers=1))
    capfd.readouterr()
    steps = []

    def progress(items, description):
        for item in items:
            steps.append(description)
            yield item

    report = lower(folder, tmp_path / out, progress)
    assert capfd.readouterr() == ("", "")
    assert steps == ["Lowering to ONNX", "Lowering to ONNX", "Copying weights"]
    copy = (tmp_path / out).with_suffix("") / "model.safetensors"
    assert report.external_files == (copy,)
    assert copy.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert copy.stat().st_nlink == 1
    # onnx refuses links of either kind and paths outside the folder, so this is the proof that it can be used.
    shutil.move((tmp_path / out).parent, tmp_path / "moved")
    moved = tmp_path / "moved" / Path(out).name
    onnx.checker.check_model(moved, full_check=True)
    onnx.load(moved)


def test_a_folder_with_other_content_is_not_replaced_by_weights(tmp_path):
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=1)
    (tmp_path / "out" / "engine").mkdir(parents=True)
    (tmp_path / "out" / "engine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        lower(folder, tmp_path / "out" / "engine.onnx")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["engine", "thesis.tex"]


def test_nothing_is_left_when_lowering_is_interrupted(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=1)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lower_module.onnx.checker, "check_model", fail)
    with pytest.raises(KeyboardInterrupt):
        lower(folder, tmp_path / "out" / "engine.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_an_unsupported_architecture_is_refused_with_the_supported_ones(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mamba"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"'mamba'.*gpt2, llama, mistral, opt, qwen2, qwen3"):
        lower(tmp_path / "model", tmp_path / "engine.onnx")


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "model.layers.0.mlp.up_proj.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"model.norm.weight .* \[47\]. Allowed: \[48\]"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}), "F8_E4M3"),
    ],
    ids=["missing", "wrong shape", "wrong type"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, edit, message):
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=1)
    change(folder, edit)
    with pytest.raises(InputError, match=message):
        lower(folder, tmp_path / "engine.onnx")
    assert not (tmp_path / "engine.onnx").exists()


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=1, rope_parameters=rope)
    with pytest.raises(InputError, match="LlamaForCausalLM cannot be traced") as caught:
        lower(folder, tmp_path / "engine.onnx")
    assert caught.value.__cause__ is not None


def test_folders_saved_without_the_prefix_of_the_base_model_are_understood(tmp_path):
    folder = save_tiny(tmp_path / "tiny", "gpt2", n_layer=1)
    renamed = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(renamed, folder / "model.safetensors")
    report = lower(folder, tmp_path / "engine.onnx")
    assert {t.name for t in graph_of(report.path).initializer} >= {"wte.weight", "h.0.attn.c_attn.weight"}


def test_the_output_must_be_an_onnx_file(tmp_path):
    with pytest.raises(InputError, match=r"\.onnx"):
        lower(save_tiny(tmp_path / "tiny", num_hidden_layers=1), tmp_path / "engine")


def test_twice_gives_the_same_bytes():
    model = lowered("llama")
    assert lower(model.folder, model.path.with_name("again.onnx")).path.read_bytes() == model.path.read_bytes()


def test_no_weight_is_read(tmp_path):
    # 17 GB of weights in a sparse file: reading even one matrix would be seen, and all would not fit.
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**19, "hidden_size": 4096}))
    shapes = {name: list(ref.shape) for name, ref in Checkpoint.open(folder).tensors.items()}
    shapes = {name: [{97: 2**19, 48: 4096}.get(n, n) for n in shape] for name, shape in shapes.items()}
    # Only widths were scaled: heads keep 4 × 12 = 48 outputs.
    for part in ("q_proj", "o_proj"):
        shapes[f"model.layers.0.self_attn.{part}.weight"] = [48, 4096] if part == "q_proj" else [4096, 48]
    offsets = np.cumsum([0, *(4 * int(np.prod(shape)) for shape in shapes.values())]).tolist()
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
            for (name, shape), start, end in zip(shapes.items(), offsets[:-1], offsets[1:], strict=True)
        }
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offsets[-1])
    before = resident_bytes()
    lower(folder, tmp_path / "engine.onnx")
    assert offsets[-1] > 17e9
    assert resident_bytes() - before < 500e6


def resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
