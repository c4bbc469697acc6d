"""`sslc-export --out engine.plan` on a tiny model, on a machine that may have no GPU: built, judged, and refused."""

from __future__ import annotations

import json
import re
import shutil

import jsonschema
import pytest

from sslc_export import plans
from sslc_export.cli import export, validate
from sslc_export.engines import tensorrt_builder, tensorrt_runtime
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from validate.document import schema
from validate.limits import Limits

NOT_EXECUTED = "built, not executed: no CUDA device"
CALIBRATION = ["--calibration-tokens", "2048", "--sequence-length", "128"]
TARGETS = ["--target", "sm_86,sm_89"]


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_folder, text_file, plugin):
    """A folder with a plan, and the exit code of sslc-export."""
    folder = tmp_path_factory.mktemp("plan")
    arguments = ["--model", str(tiny_folder), "--out", str(folder / "engine.plan"), *CALIBRATION, *TARGETS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLC_TRT_LIBRARY", str(plugin))
        patch.setattr(plans, "why_not_executed", lambda: NOT_EXECUTED)
        code = export.main([*arguments, "--calibration", str(text_file), "--triton", str(folder / "triton")])
    return folder, code


@pytest.fixture
def without_gpu(monkeypatch, plugin):
    monkeypatch.setenv("SSLC_TRT_LIBRARY", str(plugin))
    monkeypatch.setattr(plans, "why_not_executed", lambda: NOT_EXECUTED)


def test_a_plan_is_built_and_the_verdict_says_that_it_was_not_executed(built):
    folder, code = built
    assert code == 4
    assert sorted(p.name for p in folder.iterdir()) == [
        "engine",
        "engine.json",
        "engine.onnx",
        "engine.plan",
        "engine.recipe.yaml",
        "report",
        "triton",
    ]
    verdict = json.loads((folder / "report" / "verdict.json").read_text())
    jsonschema.validate(verdict, schema())
    assert verdict["verdict"] == "inconclusive"
    assert {s["what"]: s["reason"] for s in verdict["skipped"]} == dict.fromkeys(
        ("numerics", "attribution", "accuracy", "harness", "latency"), NOT_EXECUTED
    )
    assert verdict["engine"]["kernel_layers"] == 21
    assert verdict["size"]["ratio"] > 0
    assert NOT_EXECUTED in (folder / "report" / "report.md").read_text()
    assert (folder / "triton" / "engine" / "1" / "model.plan").read_bytes() == (folder / "engine.plan").read_bytes()


def test_every_compressed_layer_is_our_plugin_in_the_plan_itself(built):
    # TensorRT-RTX writes the network that it will run into the plan, as text.
    plan = (built[0] / "engine.plan").read_bytes()
    layers = json.loads((built[0] / "engine.json").read_text())["tensorrt"]["layers"]
    assert len({layer["name"] for layer in layers}) == 21
    # q, k and v are one node, and so are gate and up.
    nodes = {layer["node"] for layer in layers}
    assert len(nodes) == 12
    assert len({(layer["node"], layer["output"]) for layer in layers}) == 21
    for name in nodes:
        assert plan.count(f'custom_layer={{ name="{name}"'.encode()) == 1, name


def test_the_record_says_what_the_plan_is_made_of(built):
    record = json.loads((built[0] / "engine.json").read_text())
    assert record["runtime"] == "tensorrt_rtx"
    assert {"engine.plan", "engine.onnx"} <= record["files"].keys()
    about = record["tensorrt"]
    assert about["targets"] == ["sm_86", "sm_89"]
    assert about["activations"] == "f16"
    assert len(about["plugin"]["sha256"]) == 64
    assert about["dense_layers"] == {"lm_head": "outside the blocks"}
    assert all("expected to be the fastest" in layer["reason"] for layer in about["layers"])
    assert about["profiles"][0]["input_ids"] == [[1, 1], [1, 1], [1, 512]]


def test_the_bytes_of_a_plan_are_accounted_for(built):
    size = json.loads((built[0] / "engine.json").read_text())["tensorrt"]["size"]
    assert size["total"] == (built[0] / "engine.plan").stat().st_size
    # TensorRT's own tables are what is missing, and the plugin's few texts are counted twice.
    accounted = plans.tensorrt.PlanSize(**size).accounted
    assert abs(accounted / size["total"] - 1) < 0.03


def test_a_plan_is_judged_again_without_the_dense_model(built, without_gpu, tmp_path):
    assert validate.main(["--engine", str(built[0] / "engine.plan"), "--report", str(tmp_path)]) == 4
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["size"]["engine"]["dense"] is None
    assert "size" in {s["what"] for s in verdict["skipped"]}


def test_the_engine_beside_a_plan_runs_on_the_cpu(built, text_file, tmp_path):
    quick = ["--held-out-tokens", "2048", "--latency-seconds", "0.5", "--threads", "1", "--held-out", str(text_file)]
    assert validate.main(["--engine", str(built[0] / "engine.onnx"), "--report", str(tmp_path), *quick]) == 0


def test_a_missed_size_limit_is_a_regression_without_a_gpu_too(built, tiny_folder, without_gpu, tmp_path):
    arguments = ["--engine", str(built[0] / "engine.plan"), "--reference", str(tiny_folder)]
    assert validate.main([*arguments, "--report", str(tmp_path), "--max-size-ratio", "0.01"]) == 1


class OnCpu(OnnxRuntimeEngine):
    """Stands in for a GPU: runs the graph beside a plan, and takes no shapes beyond those of the tiny plan."""

    def __init__(self, path, *, name):
        super().__init__(path.with_suffix(".onnx"), threads=1, name=name)

    def run(self, input_ids, attention_mask=None, cache=None):
        batch, new = input_ids.shape
        assert batch == 1
        assert new <= 512
        return super().run(input_ids, attention_mask, cache)


def test_where_a_gpu_is_the_plan_is_validated_in_full(built, tiny_folder, text_file, monkeypatch, plugin, tmp_path):
    monkeypatch.setenv("SSLC_TRT_LIBRARY", str(plugin))
    monkeypatch.setattr(plans, "why_not_executed", lambda: None)
    monkeypatch.setattr(tensorrt_runtime, "TensorRTEngine", OnCpu)
    free = iter(range(4000, 0, -1000))  # each engine that is opened takes 1000 bytes
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (next(free), 4000))
    arguments = ["--engine", str(built[0] / "engine.plan"), "--reference", str(tiny_folder), "--report", str(tmp_path)]
    arguments += ["--held-out-tokens", "2048", "--latency-seconds", "0.5", "--held-out", str(text_file)]
    assert validate.main(arguments) == 0
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["numerics"]["relative_l2"] < 1e-5
    assert verdict["accuracy"]["perplexity_ratio"] > 0
    assert verdict["latency"]["decode"]["speedup"]
    assert verdict["limits"][0]["limit"] == 0.02
    assert (verdict["size"]["gpu"]["dense"], verdict["size"]["gpu"]["compressed"]) == (1000, 1000)
    assert verdict["size"]["kv_cache"]["ratio"] == 1.0
    assert verdict["latency"]["sweep"] == []
    reasons = {skipped["what"]: skipped["reason"] for skipped in verdict["skipped"]}
    assert "at most 1 sequences" in reasons["latency.sweep"]
    assert verdict["engine"]["build"]["tensorrt"]["activations"] == "f16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["tensorrt"]["layers"][0].update(in_features=7), "does not have the layers"),
        (lambda record: record["tensorrt"]["layers"].pop(), "does not have the layers"),
        (lambda record: record["files"].pop("engine.plan"), "is not the engine that engine.json describes"),
        (lambda record: record["files"]["engine.plan"].update(sha256="0"), "is not the engine"),
    ],
)
def test_a_plan_of_another_model_is_refused(built, tmp_path, capsys, without_gpu, change, message):
    broken = tmp_path / "broken"
    shutil.copytree(built[0], broken)
    record = json.loads((broken / "engine.json").read_text())
    change(record)
    (broken / "engine.json").write_text(json.dumps(record))
    assert validate.main(["--engine", str(broken / "engine.plan")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "e.plan", "--target", "sm_90"], "cannot build for this GPU architecture.*sm_90.*sm_86"),
        (["--out", "e.onnx", "--target", "sm_86"], "are for TensorRT"),
        (["--out", "e.onnx", "--triton", "t"], "are for TensorRT"),
        (["--out", "e.plan", "--activations", "f64"], "invalid choice"),
        (["--out", "e.plan", "--max-context", "4096", "--skip-validation"], "longer than the model"),
    ],
)
def test_what_cannot_be_built_is_said(tiny_folder, tmp_path, monkeypatch, capsys, without_gpu, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = export.main(["--model", str(tiny_folder), *arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not list(tmp_path.iterdir())


def test_without_tensorrt_nothing_is_begun(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorrt_builder, "_MODULES", ("no_such_tensorrt",))
    assert export.main(["--model", str(tiny_folder), "--out", str(tmp_path / "engine.plan")]) == 3
    assert "pip install tensorrt-rtx-cu13" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_plugin_nothing_is_begun(tiny_folder, tmp_path, monkeypatch, capsys, plugin):
    monkeypatch.setenv("SSLC_TRT_LIBRARY", str(tmp_path / "none.so"))
    assert export.main(["--model", str(tiny_folder), "--out", str(tmp_path / "engine.plan")]) == 3
    assert "make plugin" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sixteen_bit_activations_have_a_tolerance_of_their_own_unless_one_is_given():
    described = {"activations": "f16"}
    assert plans.limits_of(Limits(), described).max_relative_l2.value == 0.02
    strict = Limits.model_validate({"max_relative_l2": 1e-6})
    assert plans.limits_of(strict, described) == strict
