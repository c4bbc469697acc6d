"""Engines for TensorRT: the rewritten graph by numbers, and the plans by the real builder, on a machine without a GPU.

No engine is executed here: that needs a GPU (`scripts/gpu_check.sh`).
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from plugins_trt import library
from plugins_trt.pack import PackedLayer
from sslc_common.errors import InputError, MissingError
from sslc_export.engines import tensorrt, tensorrt_builder, tensorrt_graph
from tests.plugins_trt.emulator import compile_emulator, write_packed
from tests.tiny_models import FAMILIES, lowered

SHAPES = tensorrt.Shapes(batch=2, prefill=16, context=64)


def no_progress(items, _):
    return items


def rewrite(model, out, type="f16"):
    graph = tensorrt_graph.load(model)
    choices = tensorrt_graph.choose_layouts(graph, no_progress)
    return tensorrt_graph.rewrite(graph, out, choices, type=type, progress=no_progress)


class LowRankSparseLinear(OpRun):
    """The plugin's kernels on the CPU emulator, with the weights and attributes that the plugin is given."""

    op_domain = "sslc"

    def _run(self, X, S, U, V, bias, **a):
        packed = PackedLayer(
            a["layout"], a["type"], a["values"] == "int8", tuple(a["out_features"]), a["in_features"],
            tuple(a["rank"]), a["slot"], S, U, V, bias,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            case = Path(folder) / "case"
            write_packed(packed, X.reshape(-1, packed.in_features), case)
            subprocess.run([compile_emulator(), case], check=True)
            Y = np.fromfile(case.with_name("case.out"), np.float16)
        ends = np.cumsum(packed.out_features) * (X.size // packed.in_features)
        parts = zip(np.split(Y, ends[:-1]), packed.out_features, strict=True)
        return tuple(part.reshape(*X.shape[:-1], N) for part, N in parts)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in FAMILIES),
        ("llama", torch.int8),
        ("qwen2", torch.int8),
        ("llama", torch.uint8),
    ],
)
def test_the_rewritten_graph_computes_the_same_model(family, dtype, tmp_path):
    model = lowered(family, dtype=dtype)
    layers = rewrite(model.path, tmp_path / "model.onnx")
    assert [layer.name for layer in layers] == list(model.report.kernel_layers)
    graph = onnx.load(tmp_path / "model.onnx")
    for node in graph.graph.node:
        for attribute in [a for a in node.attribute if a.name == "TRT_decomposable"]:
            node.attribute.remove(attribute)  # TensorRT's own, unknown to ONNX
    evaluator = ReferenceEvaluator(graph, new_ops=[LowRankSparseLinear])
    ids = np.random.default_rng(0).integers(1, 97, (2, 7))
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((2, 7), np.int64),
        "position_ids": np.tile(np.arange(7), (2, 1)),
    }
    for value in graph.graph.input[3:]:
        size = [d.dim_value for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = np.zeros((2, size[1], 0, size[3]), np.float16)
    logits, *present = evaluator.run(None, feeds)
    expected, _ = model.torch_engine().run(ids)
    assert logits.dtype == np.float32
    assert {p.dtype for p in present} == {np.dtype(np.float16)}
    # Activations and weights are rounded to 11 bits some dozen times on the way: 2⁻¹¹ · √12 · 4 of the logits' size.
    assert np.abs(logits - expected).max() < 0.007 * np.abs(expected).max()


def test_positions_stay_float32(tmp_path):
    model = lowered("llama")
    rewrite(model.path, tmp_path / "model.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx", load_external_data=False)).graph
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    angles = [node for node in graph.node if node.op_type in ("Cos", "Sin")]
    assert len(angles) == 2
    # The angle of position 8191 is 8191 radians: in float16 its cosine would be noise.
    assert all(types[node.output[0]] == onnx.TensorProto.FLOAT for node in angles)
    rotary = next(node for node in graph.node if node.op_type == "RotaryEmbedding")
    makers = {node.output[0]: node for node in graph.node}
    assert makers[rotary.input[1]].op_type == "Cast"


def test_a_weight_beyond_float16_is_refused_and_fits_bfloat16(tmp_path):
    model = lowered("llama", compressed=False)
    broken = onnx.load(model.path)
    weight = next(t for t in broken.graph.initializer if t.name.endswith("norm.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full(weight.dims, 1e5, np.float32), weight.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(InputError, match="does not fit"):
        rewrite(tmp_path / "broken.onnx", tmp_path / "model.onnx")
    rewrite(tmp_path / "broken.onnx", tmp_path / "model.onnx", "bf16")


# ---- with TensorRT itself


def build(model, out, plugin, **options):
    return tensorrt.build(
        model.path, out, **{"targets": ("sm_86", "sm_89"), "shapes": SHAPES, "plugin": plugin, **options}
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2: biases; both: K = 48 and 80, layers with r = 0
def test_a_compressed_model_builds_twice_with_the_same_bytes(family, plugin, tmp_path):
    model = lowered(family)
    # Nor may the length of a path, which decides what malloc gives out, show in the bytes.
    names = ("a", "in-a-longer-folder" * 8)
    first, second = (build(model, tmp_path / f"{name}.plan", plugin) for name in names)
    assert [layer.name for layer in first.layers] == list(model.report.kernel_layers)
    assert first.size.total == first.path.stat().st_size
    if not first.repeatable:
        pytest.skip("this machine does not let a process have a repeatable memory layout; the plan was built")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert sorted(p.stem for p in tmp_path.iterdir()) == list(names), "something was left behind"


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_size_of_a_plan_is_predicted_before_it_is_built(compressed, dtype, plugin, tmp_path):
    if dtype == torch.int8 and not compressed:
        pytest.skip("int8 is a type of compressed layers only")
    size = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    report = build(lowered("llama", compressed=compressed, dtype=dtype, **size), tmp_path / "e.plan", plugin)
    assert abs(report.predicted.total / report.size.total - 1) < 0.03
    assert abs(report.predicted.weights / report.size.weights - 1) < 0.003
    assert report.predicted.plugin == report.size.plugin == (plugin.stat().st_size if compressed else 0)


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_int8_values_go_into_a_plan(type, plugin, tmp_path):
    model = lowered("llama", dtype=torch.int8)
    report = build(model, tmp_path / "e.plan", plugin, type=type)  # the builder's check: each layer is our plugin
    assert [layer.name for layer in report.layers] == list(model.report.kernel_layers)
    assert {layer.layout for layer in report.layers} <= {"any", "fixed8"}
    plan = report.path.read_bytes()
    assert all(plan.count(f'custom_layer={{ name="{layer.node}"'.encode()) == 1 for layer in report.layers)
    wide = build(lowered("llama"), tmp_path / "wide.plan", plugin, type=type)
    nbytes, wide_nbytes = (sum(layer.nbytes for layer in r.layers if layer.rank == 0) for r in (report, wide))
    assert nbytes < wide_nbytes


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen3", "mistral"])
def test_every_family_builds(family, plugin, tmp_path):
    assert len(build(lowered(family), tmp_path / "e.plan", plugin).layers) > 0


def test_a_dense_model_builds_without_the_plugin_inside(plugin, tmp_path):
    report = build(lowered("llama", compressed=False), tmp_path / "dense.plan", plugin)
    assert report.layers == ()
    assert report.plugin is None
    assert plugin.read_bytes()[:4096] not in report.path.read_bytes()


def test_bfloat16_builds(plugin, tmp_path):
    assert build(lowered("llama"), tmp_path / "e.plan", plugin, type="bf16").type == "bf16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("sm_90",)}, "cannot build for this GPU architecture.*sm_90.*sm_86"),
        ({"targets": ("ampere",)}, "cannot build for this GPU architecture"),
        ({"type": "f32"}, "no such type.*f16 or bf16"),
        ({"shapes": tensorrt.Shapes(prefill=100, context=10)}, "shapes do not make sense"),
    ],
)
def test_what_cannot_be_built_is_said_before_any_work(options, message, plugin, tmp_path):
    with pytest.raises(InputError, match=message):
        build(lowered("llama"), tmp_path / "e.plan", plugin, **options)
    assert not list(tmp_path.iterdir())


def test_another_suffix_is_refused(plugin, tmp_path):
    with pytest.raises(InputError, match=r"\.plan"):
        build(lowered("llama"), tmp_path / "e.engine", plugin)


def test_a_full_disk_is_said_before_any_work(plugin, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"(?i)space|disk"):
        build(lowered("llama"), tmp_path / "e.plan", plugin)


def test_a_disk_that_fills_up_leaves_nothing(plugin, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorrt, "rewrite", full)
    with pytest.raises(InputError, match="The disk is full"):
        build(lowered("llama"), tmp_path / "e.plan", plugin)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_in_the_building_process_is_said_by_it(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorrt_builder, "build_plan", full)
    (tmp_path / "job.json").write_text("{}")
    tensorrt_builder.main()
    error = tensorrt._error(json.loads((tmp_path / "error.json").read_text()))
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC


class FakeTensorRT:
    """A TensorRT of any name and version, whose registry gets one creator out of any library."""

    def __init__(self, name, version, creator=("LowRankSparseLinear", "1", "sslc")):
        self.__name__, self.__version__ = name, version
        fields = zip(("name", "plugin_version", "plugin_namespace"), creator, strict=True)
        self.all_creators, self._loaded = [], SimpleNamespace(**dict(fields))

    def get_plugin_registry(self):
        return self

    def load_library(self, _):
        self.all_creators.append(self._loaded)


@pytest.mark.parametrize(
    ("name", "version", "headers", "fits"),
    [
        ("tensorrt", "10.14.1", "10.14.1", True),
        ("tensorrt", "11.0.0", "10.14.1", True),
        ("tensorrt", "10.3.0", "10.14.1", False),
        ("tensorrt", "10.14.1", "1.7.1", False),
        ("tensorrt_rtx", "1.7.1.116", "10.14.1", True),
        ("tensorrt_rtx", "1.7.1.116", "1.7.1", True),
        ("tensorrt_rtx", "1.7.1.116", "1.8.0", False),
    ],
)
def test_a_plugin_for_another_tensorrt_is_refused(name, version, headers, fits, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "headers_version", lambda _: headers)
    if fits:
        library.require_headers(FakeTensorRT(name, version), tmp_path)
        return
    with pytest.raises(MissingError, match=f"built for another TensorRT than {name} {version}.*{headers}.*make plugin"):
        library.require_headers(FakeTensorRT(name, version), tmp_path)


@pytest.mark.parametrize(
    "creator",
    [("LowRankSparseLinear", "2", "sslc"), ("LowRankSparseLinear", "1", ""), ("AnotherName", "1", "sslc")],
    ids=["another version", "no namespace", "another name"],
)
def test_another_plugin_is_not_taken_for_ours(creator, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "headers_version", lambda _: "10.0.0")
    fake = FakeTensorRT("tensorrt", "10.0.0", creator)
    with pytest.raises(MissingError, match=r"does not find the plugin sslc::LowRankSparseLinear 1.*make plugin"):
        library.register(fake, tmp_path / "plugin.so")


def test_a_missing_plugin_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLC_TRT_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(MissingError, match=r"SSLC_TRT_LIBRARY.*cmake"):
        library.library_path()


def test_a_library_that_is_no_plugin_is_refused(tmp_path, monkeypatch):
    (tmp_path / "no.so").write_bytes(b"not a library")
    monkeypatch.setenv("SSLC_TRT_LIBRARY", str(tmp_path / "no.so"))
    with pytest.raises(MissingError, match="cannot be loaded"):
        library.library_path()


def test_a_plugin_of_another_version_is_refused(plugin, tmp_path, monkeypatch):
    data = plugin.read_bytes()
    version = library._package_version().encode() + b"\0"
    assert data.count(version) == 1
    (tmp_path / "old.so").write_bytes(data.replace(version, version.replace(b".1.", b".0.")))
    monkeypatch.setenv("SSLC_TRT_LIBRARY", str(tmp_path / "old.so"))
    with pytest.raises(MissingError, match="another version"):
        library.library_path()


def broken_plugin(plugin, folder, before, after):
    data = plugin.read_bytes()
    assert before in data
    folder.mkdir()
    (folder / plugin.name).write_bytes(data.replace(before, after))
    shutil.copy(plugin.parent / "libsslc_rtx_alias.so", folder)
    return folder / plugin.name


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"\0sslc\0", b"\0sslx\0"), (b"LowRankSparseLinear\0", b"LowRankSparseLinead\0")],
    ids=["another namespace", "another name"],
)
def test_a_plugin_that_tensorrt_would_not_find_is_noticed(plugin, tmp_path, before, after):
    broken = broken_plugin(plugin, tmp_path / "broken", before, after)
    with pytest.raises(MissingError, match="does not find the plugin sslc::LowRankSparseLinear 1"):
        build(lowered("llama"), tmp_path / "e.plan", broken)


@pytest.mark.parametrize("change", ["type", "columns", "absent"])
def test_an_output_that_tensorrt_would_not_notice_is_noticed(plugin, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    layers = rewrite(lowered("llama").path, tmp_path / "model.onnx")
    expected = tensorrt._outputs(layers)
    name = next(iter(expected))
    if change == "columns":
        expected[name][-1] += 1
    elif change == "absent":
        expected["model.layers.9"] = expected.pop(name)
    job = {
        "plugin": str(plugin),
        "nodes": expected,
        "type": "bf16" if change == "type" else "f16",
        "shapes": {"batch": 1, "prefill": 16, "context": 64},
        "targets": ["sm_86"],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    tensorrt_builder.main()
    error = json.loads((tmp_path / "error.json").read_text())
    assert error["kind"] == "RuntimeError"
    assert {"type": "DataType.BF16", "columns": "columns expected", "absent": "became nothing"}[change] in error["text"]
    assert not (tmp_path / "engine.plan").exists()


def test_without_tensorrt_the_way_to_install_it_is_said(monkeypatch):
    monkeypatch.setattr(tensorrt_builder, "_MODULES", ("no_such_tensorrt",))
    with pytest.raises(MissingError, match="pip install tensorrt-rtx-cu13"):
        tensorrt_builder.tensorrt()


def test_running_a_plan_without_a_gpu_says_that_it_was_built_only(tmp_path, monkeypatch):
    import torch

    from sslc_export.engines.tensorrt_runtime import TensorRTEngine

    (tmp_path / "engine.plan").write_bytes(b"plan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match="cannot be executed here: no CUDA device"):
        TensorRTEngine(tmp_path / "engine.plan")


class TimingConfig:
    """What TensorRT's builder configuration does with timing caches: it refuses those of another GPU."""

    def __init__(self):
        self.cache = None

    def create_timing_cache(self, content):
        return None if content == b"damaged" else SimpleNamespace(serialize=lambda: content + b" and more")

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache.serialize().startswith(b"another GPU") and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, b" and more"),
        (b"measured", b"measured and more"),
        (b"damaged", b" and more"),
        (b"another GPU's", b" and more"),
    ],
)
def test_times_of_kernels_are_kept_for_the_next_build_on_the_same_gpu(tmp_path, before, after):
    path, config = tmp_path / "cache" / "timing.cache", TimingConfig()
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    tensorrt_builder.take_timing_cache(config, path)
    tensorrt_builder.keep_timing_cache(config, path)
    assert path.read_bytes() == after
