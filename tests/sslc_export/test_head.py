"""The int8 head in the lowered graph: what it computes, that its bytes are there once, and that plans refuse it."""

import json

import numpy as np
import onnx
import pytest
import torch

from compress.hf import load
from compress.options import CompressOptions
from compress.pipeline import compress_model
from plugins_ort import library
from sslc_export.cli.export import main
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.engines.probes import OnnxRuntimeProbe, TorchProbe
from sslc_export.engines.pytorch import TorchEngine
from sslc_export.lowering import names
from sslc_export.lowering.lower import lower
from tests.compress.models import FAMILIES, VOCABULARY, save_tiny

IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))


def lowered(tmp_path, family="llama", values="f32", head="int8", **overrides):
    dense = save_tiny(tmp_path / "dense", family, **{"tie_word_embeddings": True, **overrides})
    options = CompressOptions(method="magnitude", allocation="uniform", budget=0.8, values_dtype=values, head=head)
    compress_model(dense, tmp_path / "engine", options)
    report = lower(tmp_path / "engine", tmp_path / "engine.onnx")
    return tmp_path / "engine", report


def relative_l2(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("family", "values"), [*((f, "f32") for f in FAMILIES), ("llama", "bf16"), ("llama", "int8")])
def test_engines_compute_what_pytorch_does(tmp_path, family, values):
    """With int8 values beside others the operator's body has an overload; ONNX Runtime finds both, and the kernel."""
    folder, report = lowered(tmp_path, family, values)
    assert "lm_head" in report.kernel_layers
    assert "lm_head" not in report.dense_layers
    reference, step = TorchEngine(load(folder, torch.float32)), np.array([[3], [5]])
    logits, cache = reference.run(IDS)
    next_logits, _ = reference.run(step, None, cache)
    # The kernel rounds activations to 16 bits for int8 values (2e-4 were seen in tiny models), one to bfloat16 for bf16
    # values; the body does not.
    rounded = 0.02 if values == "bf16" and library.kernel_name() in library.ROUND_TO_BF16 else 1e-3
    for engine, tolerance in (("none", 1e-5), ("auto", rounded)):
        engine = OnnxRuntimeEngine(report.path, library=engine, threads=1)
        got, its_cache = engine.run(IDS)
        assert relative_l2(got, logits) < tolerance
        assert relative_l2(engine.run(step, None, its_cache)[0], next_logits) < tolerance
    assert engine.kernel_layers == len(report.kernel_layers)


def test_head_and_embedding_are_the_same_bytes(tmp_path):
    _, report = lowered(tmp_path)
    graph = onnx.load(report.path, load_external_data=False).graph
    where = {
        tensor.name: tuple(entry.value for entry in tensor.external_data if entry.key != "checksum")
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    table = f"lm_head.values.as_{VOCABULARY}x48"
    assert where[table] == where["lm_head.values"]
    gathers = [node.input[0] for node in graph.node if node.op_type == "Gather"]
    assert table in gathers
    assert "lm_head.scales" in gathers
    assert not [node for node in graph.node if node.op_type == "Reshape" and node.input[0] in where]


def test_one_model_has_one_body_per_kind_of_values(tmp_path):
    mixed = onnx.load(lowered(tmp_path)[1].path, load_external_data=False)
    assert [(f.name, f.overload) for f in mixed.functions] == [(names.OP_TYPE, ""), (names.OP_TYPE, names.WITH_SCALES)]
    alike = onnx.load(lowered(tmp_path / "int8", values="int8")[1].path, load_external_data=False)
    assert [f.overload for f in alike.functions] == [names.WITH_SCALES]


def test_the_head_alone_can_be_probed(tmp_path):
    folder, report = lowered(tmp_path)
    reference = TorchProbe(load(folder, torch.float32), tmp_path / "dense")
    probe = OnnxRuntimeProbe(report.path, reference)
    X = reference.run(IDS, None, None)[0]["lm_head"].X.reshape(-1, 48)
    exact = reference.exact("lm_head", X)
    assert relative_l2(probe.function("lm_head", X), exact) < 1e-6
    assert relative_l2(probe.kernel("lm_head", X), exact) < 1e-3
    # Half a step of 127 per weight: well below 1 %.
    assert 0 < relative_l2(reference.dense("lm_head", X), exact) < 0.01
    assert probe.different_weights("lm_head") == []


def test_commands_take_it_and_the_report_has_its_row(tiny_folder, text_file, tmp_path):
    out = tmp_path / "build" / "engine.onnx"
    how = "--head int8 --budget 0.8 --method magnitude --allocation uniform"
    measured = "--held-out-tokens 512 --latency-seconds 0.2 --threads 1 --prefill-tokens 16"
    where = ["--model", str(tiny_folder), "--out", str(out), "--held-out", str(text_file)]
    code = main([*where, *how.split(), *measured.split()])
    assert code in (0, 4)  # so short a measurement may be inconclusive
    verdict = json.loads((out.parent / "report" / "verdict.json").read_bytes())
    rows = {row["name"]: row for row in verdict["layers"]}
    assert rows["lm_head"]["density"] == 1
    assert library.layers_alive() == 0


@pytest.mark.parametrize("compressed", [False, True])
def test_plans_refuse_it(tmp_path, compressed, capsys):
    folder, _ = lowered(tmp_path)
    flags = ["--model", str(folder)] if compressed else ["--model", str(tmp_path / "dense"), "--head", "int8"]
    assert main([*flags, "--out", str(tmp_path / "other" / "engine.plan")]) == 2
    assert "TensorRT plans take no int8 head" in capsys.readouterr().err
