"""Faults put into the engines of tiny models: each is caught, and blamed on the right layer and stage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.format import Checkpoint
from compress.hf import load
from compress.layer import pack, unpack_mask
from plugins_ort import library
from sslc_common.errors import InputError, MissingError
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.engines.probes import OnnxRuntimeProbe, TorchProbe
from sslc_export.explain import explain
from sslc_export.lowering.lower import lower
from tests.tiny_models import FAMILIES, VOCABULARY, Lowered, compress_at_random, lowered, save_tiny
from validate.attribution import Attribution, attribute
from validate.limits import DEFAULT_RELATIVE_L2
from validate.numerics import NumericsOptions, compare

# compress_at_random: of each block v stores everything, o stays dense, and gate, up and down are ordinary.
V_PROJ, GATE, UP, DOWN = (
    f"model.layers.1.{name}" for name in ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))

Fault = Callable[[onnx.ModelProto], None]


def attributed(model: Lowered, path: Path | None = None) -> Attribution:
    reference = TorchProbe(load(model.folder, dtype=torch.float32), model.folder.parent / "dense")
    engine = OnnxRuntimeProbe(path or model.path, reference, threads=1)
    return attribute(reference, engine, TEXT, limit=DEFAULT_RELATIVE_L2)


def broken(model: Lowered, tmp_path: Path, fault: Fault) -> Path:
    """The engine with a fault, in a copy of its folder."""
    shutil.copytree(model.path.parent, tmp_path / "broken")
    path = tmp_path / "broken" / model.path.name
    proto = onnx.load(path, load_external_data=False)
    fault(proto)
    onnx.save(proto, path)
    return path


def logits_error(model: Lowered, path: Path) -> float:
    options = NumericsOptions(padded_tokens=24, greedy_tokens=4)
    return compare(model.torch_engine(), OnnxRuntimeEngine(path, threads=1), TEXT, options=options).relative_l2


def weight(model: Lowered, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """Embeds a changed copy of a weight in the engine's graph."""

    def fault(proto: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        changed = how(Checkpoint.open(model.folder).read(name).clone())
        tensor.CopyFrom(numpy_helper.from_array(changed.contiguous().numpy(), name))

    return fault


def rewire(name: str, nodes: Callable[[str], list[onnx.NodeProto]], *tensors: tuple[str, object]) -> Fault:
    """Lets all who read the value `name` read what `nodes` makes of it; or, for an output, renames its maker's."""

    def fault(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        proto.graph.initializer.extend(numpy_helper.from_array(np.array(value), key) for key, value in tensors)
        maker = next((i for i, node in enumerate(graph.node) if name in node.output), -1)
        if maker < 0:
            added, new = nodes(name), f"{name}.faulty"
            for node in graph.node:
                node.input[:] = [new if value == name else value for value in node.input]
        else:
            old = f"{name}.right"
            graph.node[maker].output[:] = [old if value == name else value for value in graph.node[maker].output]
            added = nodes(old)
        for offset, node in enumerate(added):
            graph.node.insert(maker + 1 + offset, node)

    return fault


def moved_bit(bitmap: torch.Tensor) -> torch.Tensor:
    """One stored entry of one row is said to be elsewhere."""
    mask = unpack_mask(bitmap, 48)
    row = int(((mask.sum(1) > 0) & (mask.sum(1) < 48)).nonzero()[0])
    mask[row, int(mask[row].nonzero()[0])], mask[row, int((~mask[row]).nonzero()[-1])] = False, True
    return pack(mask.float(), mask)[0]


def swapped_rows(values: torch.Tensor) -> torch.Tensor:
    rows = values.view(-1, 48)  # v stores everything
    rows[[2, 7]] = rows[[7, 2]]
    return rows.view(-1)


def with_infinity(values: torch.Tensor) -> torch.Tensor:
    values[5] = float("inf")
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_engine_has_no_fault_and_every_layer_is_compared(family):
    model = lowered(family)
    found = attributed(model)
    assert found.first is None
    assert {layer.name for layer in found.layers} == set(model.report.kernel_layers)
    assert found.worst_alone < 1e-6  # float32 rounding; seen: 2.3e-7
    for layer in found.layers:
        assert layer.kernel is not None
        assert layer.compression > 0.1  # random factors are far from W
        assert layer.output < 5e-6


WEIGHT_FAULTS = {
    "a bit of the bitmap is wrong": (f"{GATE}.bitmap", moved_bit),
    "two rows of values are swapped": (f"{V_PROJ}.values", swapped_rows),
    "the scale is wrong": (f"{UP}.U", lambda U: U * 1.01),
    "V is permuted": (f"{DOWN}.V", lambda V: V.flip(0)),
    "a value overflows": (f"{UP}.values", with_infinity),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_a_wrong_weight_is_blamed_on_its_layer_and_named(fault, tmp_path):
    model, (name, how) = lowered("llama"), WEIGHT_FAULTS[fault]
    path = broken(model, tmp_path, weight(model, name, how))
    layer, _, tensor = name.rpartition(".")
    first = attributed(model, path).first
    assert (first.layer, first.stage, first.phase) == (layer, "lowering", "alone")
    verb = "are" if tensor == "values" else "is"
    assert first.explanation == f"its {tensor} in the engine {verb} not the checkpoint's"
    assert not logits_error(model, path) <= DEFAULT_RELATIVE_L2  # NaN too


def test_wrong_scales_of_int8_values_are_blamed_on_their_layer(tmp_path):
    model = lowered("llama", dtype=torch.int8)
    path = broken(model, tmp_path, weight(model, f"{GATE}.scales", lambda scales: scales * 1.25))
    reference = TorchProbe(load(model.folder, dtype=torch.float32))
    limit = 1e-3  # the kernel for int8 values rounds activations to 16 bits
    right = attribute(reference, OnnxRuntimeProbe(model.path, reference, threads=1), TEXT, limit=limit).first
    first = attribute(reference, OnnxRuntimeProbe(path, reference, threads=1), TEXT, limit=limit).first
    assert right is None
    assert (first.layer, first.stage) == (GATE, "lowering")
    assert first.explanation == "its scales in the engine are not the checkpoint's"


def test_a_square_v_that_is_transposed_is_blamed_on_its_layer(tmp_path):
    model = lowered("llama")
    square = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))

    def fault(proto: onnx.ModelProto) -> None:
        weight(model, f"{GATE}.V", lambda V: square)(proto)
        weight(model, f"{GATE}.U", lambda U: torch.ones(80, 48))(proto)

    right = load(model.folder, dtype=torch.float32)
    layer = right.get_submodule(GATE)
    layer.U, layer.V = torch.nn.Parameter(torch.ones(80, 48)), torch.nn.Parameter(square.T.contiguous())
    reference = TorchProbe(right)
    path = broken(model, tmp_path, fault)
    first = attribute(reference, OnnxRuntimeProbe(path, reference, 1), TEXT, limit=DEFAULT_RELATIVE_L2).first
    assert (first.layer, first.stage) == (GATE, "lowering")
    assert first.explanation == "its V in the engine is not the checkpoint's"


def test_a_dropped_bias_is_blamed_on_its_layer(tmp_path):
    model = lowered("qwen2")
    path = broken(model, tmp_path, weight(model, f"{V_PROJ}.bias", torch.zeros_like))
    first = attributed(model, path).first
    assert (first.layer, first.stage) == (V_PROJ, "lowering")
    assert first.explanation == "its bias in the engine is not the checkpoint's"
    assert logits_error(model, path) > DEFAULT_RELATIVE_L2


def test_a_window_that_does_not_slide_is_blamed_on_attention(tmp_path):
    model, copy = lowered("mistral"), tmp_path / "copy"
    shutil.copytree(model.folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    path = lower(copy, tmp_path / "engine.onnx").path
    first = attributed(model, path).first
    assert (first.layer, first.stage, first.phase) == ("model.layers.0.mlp.gate_proj", "between", "prefill")
    assert first.after == "model.layers.0.self_attn.v_proj"
    assert "attention" in first.explanation
    assert logits_error(model, path) > DEFAULT_RELATIVE_L2


def test_positions_off_by_one_once_there_is_a_cache_are_blamed_on_attention_while_decoding(tmp_path):
    def shifted(name: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Shape", ["past_key_values.0.key"], ["past"], start=2, end=3),
            helper.make_node("Min", ["past", "one"], ["shift"]),
            helper.make_node("Add", [name, "shift"], [f"{name}.faulty"]),
        ]

    model = lowered("llama")
    path = broken(model, tmp_path, rewire("position_ids", shifted, ("one", np.array([1], np.int64))))
    first = attributed(model, path).first
    assert (first.layer, first.stage, first.phase) == ("model.layers.0.mlp.gate_proj", "between", "decode")
    assert logits_error(model, path) > DEFAULT_RELATIVE_L2


def test_learned_positions_off_by_one_are_blamed_on_what_comes_before_the_first_layer(tmp_path):
    def shifted(name: str) -> list[onnx.NodeProto]:
        return [helper.make_node("Add", [name, "one"], [f"{name}.faulty"])]

    model = lowered("gpt2")
    path = broken(model, tmp_path, rewire("position_ids", shifted, ("one", np.array([1], np.int64))))
    first = attributed(model, path).first
    assert (first.layer, first.stage, first.phase) == (model.report.kernel_layers[0], "between", "prefill")
    assert first.after is None
    assert "before transformer.h.0" in first.explanation


def test_a_stale_cache_entry_is_blamed_on_the_cache(tmp_path):
    name = "present.1.key"

    def stale(right: str) -> list[onnx.NodeProto]:
        """The newest slot holds what was in the one before it."""
        return [
            helper.make_node("Slice", [right, "zero", "last", "axis"], ["kept"]),
            helper.make_node("Slice", ["kept", "last", "end", "axis"], ["stale"]),
            helper.make_node("Concat", ["kept", "stale"], [name], axis=2),
        ]

    tensors = {"zero": [0], "last": [-1], "end": [2**31], "axis": [2]}
    model = lowered("llama")
    constants = [(key, np.array(value, np.int64)) for key, value in tensors.items()]
    path = broken(model, tmp_path, rewire(name, stale, *constants))
    first = attributed(model, path).first
    assert (first.layer, first.stage, first.phase) == (GATE, "between", "decode")
    assert first.after == V_PROJ
    assert "the cache" in first.explanation
    assert logits_error(model, path) > DEFAULT_RELATIVE_L2


def test_an_overflow_in_half_precision_is_blamed_on_what_follows_the_layer(tmp_path):
    proto = onnx.load(lowered("llama").path, load_external_data=False)
    output = next(node.output[0] for node in proto.graph.node if node.name == GATE)

    def half(right: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Mul", [right, "large"], ["scaled"]),
            helper.make_node("Cast", ["scaled"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["single", "large"], [output]),
        ]

    model = lowered("llama")
    path = broken(model, tmp_path, rewire(output, half, ("large", np.array(1e7, np.float32))))
    first = attributed(model, path).first
    # The value that the next layers read is what the layer is taken to have given.
    assert (first.layer, first.error) == (DOWN, float("inf"))
    assert (first.stage, first.after) == ("between", UP)
    assert not logits_error(model, path) <= DEFAULT_RELATIVE_L2


def test_a_wrong_dense_layer_is_found_between_its_neighbours(tmp_path):
    model, name = lowered("llama"), "model.layers.1.self_attn.o_proj.weight"
    path = broken(model, tmp_path, weight(model, name, lambda W: W * 1.01))
    first = attributed(model, path).first
    assert (first.layer, first.stage, first.after) == (GATE, "between", V_PROJ)
    assert "a layer that stayed dense" in first.explanation


def test_a_wrong_head_is_found_at_the_logits(tmp_path):
    model = lowered("llama")
    path = broken(model, tmp_path, weight(model, "lm_head.weight", lambda W: W * 1.01))
    first = attributed(model, path).first
    assert (first.layer, first.stage, first.after) == ("logits", "between", DOWN)


def test_an_engine_of_another_checkpoint_is_called_that(tmp_path):
    model = lowered("llama")
    dense = save_tiny(tmp_path / "dense", "llama", num_hidden_layers=2, initializer_range=0.05)
    other = lower(compress_at_random(dense, tmp_path / "compressed"), tmp_path / "engine.onnx")
    first = attributed(model, other.path).first
    assert (first.layer, first.stage) == (model.report.kernel_layers[0], "lowering")
    assert "built from another checkpoint" in first.explanation


def test_a_bitmap_that_contradicts_its_values_is_refused_by_the_kernel(tmp_path):
    model = lowered("llama")
    path = broken(model, tmp_path, weight(model, f"{GATE}.bitmap", lambda bitmap: bitmap ^ torch.eye(80, 2).int()))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate_proj"):
        OnnxRuntimeEngine(path, threads=1)


def test_a_layer_is_written_as_a_reproducer_that_runs_alone(tmp_path):
    model = lowered("llama")
    path = broken(model, tmp_path, weight(model, f"{UP}.U", lambda U: U * 1.01))
    reference = TorchProbe(load(model.folder, dtype=torch.float32))
    errors = explain(reference, OnnxRuntimeProbe(path, reference, 1), UP, TEXT, tmp_path / "explained" / UP)
    assert errors["function"] > 1e-4
    assert errors["kernel"] == pytest.approx(errors["function"], rel=1e-3)
    moved = (tmp_path / "explained" / UP).rename(tmp_path / "sent")
    assert sorted(file.name for file in moved.iterdir()) == ["data.npz", "model.onnx", "run.py"]
    for library_arguments in ([], ["--library", str(library.library_path())]):
        command = [sys.executable, str(moved / "run.py"), *library_arguments]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        assert float(said.split()[2]) == pytest.approx(errors["function"], rel=1e-3)


def test_an_unknown_layer_cannot_be_explained(tmp_path):
    model = lowered("llama")
    reference = TorchProbe(load(model.folder, dtype=torch.float32))
    with pytest.raises(InputError, match=r"model\.layers\.0"):
        explain(reference, OnnxRuntimeProbe(model.path, reference, 1), "lm_head", TEXT, tmp_path / "out")


def test_a_wrong_kernel_is_blamed_on_the_kernel(monkeypatch):
    right = OnnxRuntimeProbe.kernel

    def wrong(self: OnnxRuntimeProbe, layer: str, X: np.ndarray) -> np.ndarray:
        Y = right(self, layer, X).copy()
        if layer == UP and len(X) == 1:  # the path of a single token only
            Y[:, 3] *= 1.01
        return Y

    monkeypatch.setattr(OnnxRuntimeProbe, "kernel", wrong)
    first = attributed(lowered("llama")).first
    assert (first.layer, first.stage) == (UP, "kernel")


def test_without_the_library_the_body_is_used_and_that_is_said(monkeypatch):
    def missing() -> Path:
        raise MissingError("The kernel library is not here", do="Build it")

    monkeypatch.setattr("plugins_ort.library.library_path", missing)
    found = attributed(lowered("llama"))
    assert found.first is None
    assert "The kernel library is not here" in found.no_kernel
    assert {layer.kernel for layer in found.layers} == {None}
    engine = OnnxRuntimeEngine(lowered("llama").path, threads=1)
    assert (engine.kernel, engine.kernel_layers) == ("function", 0)
    assert "The kernel library is not here" in engine.fallback_reason
