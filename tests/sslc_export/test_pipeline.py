"""The main job on a tiny model, as commands in one process: from dense to verdict, and everything that goes wrong."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import onnx
import pytest

from plugins_ort.library import ROUND_TO_BF16, ROUND_TO_BYTES, kernel_name
from sslc_common.errors import MissingError
from sslc_export.cli import compress, export, validate
from validate.document import schema

# Enough for every stage to run; a tiny model's speed is nobody's concern.
QUICK = ["--held-out-tokens", "2048", "--latency-seconds", "0.5", "--threads", "1"]
CALIBRATION = ["--calibration-tokens", "2048", "--sequence-length", "128"]


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_folder, text_file):
    """A folder with an engine, and the exit code of sslc-export."""
    folder = tmp_path_factory.mktemp("built")
    arguments = ["--model", str(tiny_folder), "--out", str(folder / "engine.onnx"), *CALIBRATION, *QUICK]
    code = export.main([*arguments, "--calibration", str(text_file), "--held-out", str(text_file)])
    return folder, code


def test_the_golden_path_passes_and_writes_all_it_promises(built):
    folder, code = built
    assert code == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "engine",
        "engine.json",
        "engine.onnx",
        "engine.recipe.yaml",
        "report",
    ]
    verdict = json.loads((folder / "report" / "verdict.json").read_text())
    jsonschema.validate(verdict, schema())
    assert verdict["verdict"] == "passed"
    assert verdict["numerics"]["relative_l2"] <= 1e-5
    assert verdict["engine"]["kernel_layers"] == 21
    assert verdict["engine"]["dense_layers"] == 1  # lm_head
    assert verdict["latency"]["decode"]["speedup"]["low"] > 0
    assert set(verdict["engine"]["predicted_speedup"]) == {"prefill", "decode"}
    assert "Predicted speed" in (folder / "report" / "report.md").read_text()
    assert 0 < verdict["size"]["ratio"] < 1
    assert verdict["accuracy"]["perplexity_ratio"] > 0
    assert "passed" in (folder / "report" / "report.md").read_text().lower()
    assert verdict["attribution"]["first"] is None
    assert verdict["attribution"]["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert len(verdict["attribution"]["layers"]) == 21
    assert all(layer["compression"] > 0 for layer in verdict["attribution"]["layers"])
    assert "PASSED" in (folder / "report" / "report.html").read_text()
    assert 'failures="0"' in (folder / "report" / "junit.xml").read_text()


def test_the_record_describes_the_engine(built, tiny_folder):
    record = json.loads((built[0] / "engine.json").read_text())
    assert record["model"] == str(tiny_folder)
    assert record["checkpoint"] == "engine"
    assert len(record["kernel_layers"]) == 21
    assert record["op_counts"]["sslc::LowRankSparseLinear"] == 21
    assert {"engine.onnx", "engine/model-00001-of-00004.safetensors"} <= record["files"].keys()


def test_the_resolved_recipe_repeats_the_build(built, tmp_path):
    code = export.main(
        ["--recipe", str(built[0] / "engine.recipe.yaml"), "--out", str(tmp_path / "engine.onnx"), "--skip-validation"]
    )
    assert code == 0
    for name in ("engine/model-00001-of-00004.safetensors", "engine/config.json", "engine.json"):
        assert (tmp_path / name).read_bytes() == (built[0] / name).read_bytes(), name


@pytest.mark.parametrize("flags", [["bf16"], ["int8"], ["int4"], ["bf16", "--values-of", "*.mlp.*=int8"]], ids=" ".join)
def test_values_of_fewer_bits_pass_with_a_tolerance_of_their_own(tiny_folder, text_file, tmp_path, flags):
    out = tmp_path / "engine.onnx"
    arguments = ["--model", str(tiny_folder), "--out", str(out), *CALIBRATION, "--calibration", str(text_file)]
    assert export.main([*arguments, "--values-dtype", *flags, *QUICK, "--held-out", str(text_file)]) in (0, 4)
    verdict = json.loads((tmp_path / "report" / "verdict.json").read_text())
    limits = {limit["name"]: limit for limit in verdict["limits"]}
    for name in ("max_relative_l2", "max_layer_error"):
        rounds = "bf16" in flags and kernel_name() in ROUND_TO_BF16
        assert limits[name]["limit"] == (2e-2 if rounds else 1e-5 if flags == ["bf16"] else 1e-3)
        assert limits[name]["outcome"] == "passed"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_int8_activations_are_in_the_graph_with_a_tolerance_of_their_own(tiny_folder, text_file, tmp_path, dtype):
    out = tmp_path / "engine.onnx"
    arguments = ["--model", str(tiny_folder), "--out", str(out), *CALIBRATION, "--calibration", str(text_file)]
    flags = ["--values-dtype", dtype, "--int8-activations"]
    assert export.main([*arguments, *flags, *QUICK, "--held-out", str(text_file)]) in (0, 4)
    nodes = [node for node in onnx.load(out, load_external_data=False).graph.node if node.domain == "sslc"]
    assert nodes
    bits = [a.i for node in nodes for a in node.attribute if a.name == "activation_bits"]
    assert bits == [8] * len(nodes)
    assert json.loads((tmp_path / "engine.json").read_text())["int8_activations"] is True
    limits = {x["name"]: x for x in json.loads((tmp_path / "report" / "verdict.json").read_text())["limits"]}
    rounds = kernel_name() in ROUND_TO_BYTES
    for name in ("max_relative_l2", "max_layer_error"):
        assert limits[name]["limit"] == (8e-2 if rounds else 1e-3)
        assert limits[name]["outcome"] == "passed"


def test_int8_activations_without_integer_values_are_refused_before_any_work(tiny_folder, built, tmp_path, capsys):
    out = tmp_path / "engine.onnx"
    for model, got in ((tiny_folder, "--values-dtype f32"), (built[0] / "engine", "F32 in")):
        assert export.main(["--model", str(model), "--out", str(out), "--int8-activations"]) == 2
        said = capsys.readouterr().err
        assert "8-bit activations are for layers with int8 or int4 values" in said
        assert got in said
    assert not list(tmp_path.iterdir())


def test_bfloat16_values_without_the_library_are_judged_by_the_body(tiny_folder, text_file, tmp_path, monkeypatch):
    out = tmp_path / "engine.onnx"
    arguments = ["--model", str(tiny_folder), "--out", str(out), *CALIBRATION, "--calibration", str(text_file)]
    assert export.main([*arguments, "--values-dtype", "bf16", *QUICK, "--skip-validation"]) == 0

    def missing():
        raise MissingError("The kernel library is not here", do="Build it")

    monkeypatch.setattr("plugins_ort.library.library_path", missing)
    monkeypatch.setattr("plugins_ort.library.kernel_name", missing)
    assert validate.main(["--engine", str(out), *QUICK, "--held-out", str(text_file)]) in (0, 4)
    verdict = json.loads((tmp_path / "report" / "verdict.json").read_text())
    assert verdict["engine"]["kernel"] == "function"
    limits = {limit["name"]: (limit["limit"], limit["outcome"]) for limit in verdict["limits"]}
    assert limits["max_relative_l2"] == (1e-5, "passed")


def test_a_missed_limit_is_a_regression(built, tiny_folder, text_file, tmp_path):
    arguments = ["--engine", str(built[0] / "engine.onnx"), "--reference", str(tiny_folder), *QUICK]
    arguments += ["--held-out", str(text_file), "--report", str(tmp_path / "report")]
    assert validate.main([*arguments, "--max-size-ratio", "0.01"]) == 1
    verdict = json.loads((tmp_path / "report" / "verdict.json").read_text())
    assert verdict["verdict"] == "regression"
    assert [limit["name"] for limit in verdict["limits"] if limit["outcome"] == "regression"] == ["max_size_ratio"]


def test_a_baseline_is_compared_and_a_wrong_one_is_told_at_once(built, tiny_folder, text_file, tmp_path, capsys):
    arguments = ["--engine", str(built[0] / "engine.onnx"), "--reference", str(tiny_folder), *QUICK]
    arguments += ["--held-out", str(text_file), "--report", str(tmp_path / "report")]
    assert validate.main([*arguments, "--baseline", str(tmp_path / "nowhere.json")]) == 2
    assert "no baseline" in capsys.readouterr().err
    assert validate.main([*arguments, "--baseline", str(built[0] / "report" / "verdict.json")]) == 0
    changes = {c["metric"]: c for c in json.loads((tmp_path / "report" / "verdict.json").read_text())["baseline"]}
    assert changes["size.ratio"]["outcome"] == "same"
    assert changes["accuracy.perplexity"]["before"] == changes["accuracy.perplexity"]["now"]


def test_a_layer_is_explained(built, text_file, tmp_path, capsys):
    arguments = ["--engine", str(built[0] / "engine.onnx"), "--held-out", str(text_file), "--report", str(tmp_path)]
    layer = "model.layers.0.mlp.up_proj"
    assert validate.main([*arguments, "--explain", layer]) == 0
    assert (tmp_path / "explain" / layer / "run.py").is_file()
    assert validate.main([*arguments, "--explain", "lm_head"]) == 2
    assert "no such compressed layer" in capsys.readouterr().err


def test_a_reference_with_another_tokenizer_is_refused(built, tiny_folder, text_file, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokenizer["model"]["vocab"] = dict(zip(tokens, [*range(1, len(tokens)), 0], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = ["--engine", str(built[0] / "engine.onnx"), "--reference", str(other), *QUICK]
    assert validate.main([*arguments, "--held-out", str(text_file)]) == 2
    assert "different tokenizers" in capsys.readouterr().err


def test_an_engine_is_validated_without_a_dense_model(built, text_file, tmp_path):
    arguments = ["--engine", str(built[0] / "engine.onnx"), *QUICK, "--held-out", str(text_file)]
    assert validate.main([*arguments, "--report", str(tmp_path / "report")]) == 0
    verdict = json.loads((tmp_path / "report" / "verdict.json").read_text())
    assert verdict["accuracy"]["perplexity"] > 1
    assert verdict["latency"]["decode"]["speedup"] is None


def test_compress_then_export_elsewhere_copies_the_checkpoint(tiny_folder, text_file, tmp_path):
    small = tmp_path / "small"
    assert (
        compress.main(["--model", str(tiny_folder), "--out", str(small), *CALIBRATION, "--calibration", str(text_file)])
        == 0
    )
    out = tmp_path / "elsewhere" / "engine.onnx"
    assert export.main(["--model", str(small), "--out", str(out), "--skip-validation"]) == 0
    assert (out.parent / "engine" / "config.json").read_bytes() == (small / "config.json").read_bytes()
    inside = small / "engine.onnx"
    assert export.main(["--model", str(small), "--out", str(inside), "--skip-validation"]) == 0
    assert not (small / "engine").exists()


def test_an_engine_moves_with_its_folder(built, text_file, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(built[0], moved)
    arguments = ["--engine", str(moved / "engine.onnx"), *QUICK, "--held-out", str(text_file)]
    assert validate.main(arguments) == 0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "engine.json").unlink(), "no build record"),
        (lambda f: (f / "engine.json").write_text("{"), "damaged"),
        (lambda f: (f / "engine.onnx").write_bytes(b"\x08\x0b"), "not the engine that engine.json describes"),
        (lambda f: (f / "engine/model-00002-of-00004.safetensors").unlink(), "no such file"),
        (lambda f: (f / "engine/config.json").unlink(), "compressed model .* is missing"),
    ],
)
def test_a_broken_engine_is_bad_input(built, tmp_path, capsys, break_it, message):
    broken = tmp_path / "broken"
    shutil.copytree(built[0], broken)
    break_it(broken)
    assert validate.main(["--engine", str(broken / "engine.onnx"), *QUICK]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_flipped_weight_bit_is_found(built, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(built[0], broken)
    shard = broken / "engine/model-00002-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert validate.main(["--engine", str(broken / "engine.onnx"), *QUICK]) == 2
    assert "model.layers.1" in capsys.readouterr().err


def test_what_exists_is_not_overwritten(built, tiny_folder, capsys):
    before = (built[0] / "engine.onnx").read_bytes()
    assert export.main(["--model", str(tiny_folder), "--out", str(built[0] / "engine.onnx")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (built[0] / "engine.onnx").read_bytes() == before


def test_a_compressed_model_is_not_compressed_again(built, tmp_path, capsys):
    assert compress.main(["--model", str(built[0] / "engine"), "--out", str(tmp_path / "again")]) == 2
    assert "compressed already" in capsys.readouterr().err


def test_an_interrupted_export_goes_on_and_leaves_no_engine(tiny_folder, text_file, tmp_path):
    out = tmp_path / "engine.onnx"
    arguments = ["--model", str(tiny_folder), "--out", str(out), *CALIBRATION, "--calibration", str(text_file)]
    # A shell starts its background jobs with SIGINT ignored, and children inherit that: the suite may be such a job.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from sslc_export.cli.export import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, *arguments, "--skip-validation"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    first_block = tmp_path / "engine.partial" / "model-00001-of-00004.safetensors"
    while not first_block.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert [p.name for p in tmp_path.iterdir()] == ["engine.partial"]
    assert export.main([*arguments, "--skip-validation"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine", "engine.json", "engine.onnx", "engine.recipe.yaml"]


def test_an_export_that_stopped_after_compressing_does_not_compress_again(
    tiny_folder, text_file, tmp_path, monkeypatch
):
    out = tmp_path / "engine.onnx"
    arguments = ["--model", str(tiny_folder), "--out", str(out), *CALIBRATION, "--calibration", str(text_file)]
    assert export.main([*arguments, "--skip-validation"]) == 0
    out.unlink()
    monkeypatch.setattr("compress.pipeline.compress_blocks", None)  # may not be called
    assert export.main([*arguments, "--skip-validation"]) == 0
    assert out.is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "t5"}'), "t5"),
        (lambda f: cut(f / "model.safetensors", -100), "model.safetensors"),
        (lambda f: overwrite(f / "model.safetensors", 0, b"\xff" * 8), "header"),
        (lambda f: overwrite(f / "model.safetensors", -4, b"\x00\x00\xc0\x7f"), "NaN"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["config", "architecture", "truncated", "header", "nan", "tokenizer"],
)
def test_a_damaged_model_is_bad_input_and_leaves_nothing(tiny_folder, text_file, tmp_path, capsys, damage, message):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    damage(model)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["--model", str(model), "--out", str(out / "engine.onnx"), *CALIBRATION]
    assert export.main([*arguments, "--calibration", str(text_file)]) == 2
    assert message in capsys.readouterr().err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("text", "message"), [("", "empty"), ("A few words.", "too short"), (None, "no calibration")])
def test_calibration_text_that_does_not_do(tiny_folder, tmp_path, capsys, text, message):
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_text(text)
    arguments = ["--model", str(tiny_folder), "--out", str(tmp_path / "small"), *CALIBRATION]
    assert compress.main([*arguments, "--calibration", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_an_output_that_cannot_be_written(tiny_folder, text_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = ["--model", str(tiny_folder), "--out", str(tmp_path / "file" / "engine.onnx"), *CALIBRATION]
    assert export.main([*arguments, "--calibration", str(text_file)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def overwrite(file, offset, content):
    data = bytearray(file.read_bytes())
    end = offset + len(content)
    data[offset : end if end else None] = content
    file.write_bytes(data)
