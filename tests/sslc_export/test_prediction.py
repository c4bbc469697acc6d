"""Will it pay? The model of speed, the command that prints it, and layers that stay dense because of it."""

import json

import pytest

from compress.format import Checkpoint
from compress.options import CompressOptions
from compress.pipeline import REPORT, compress_model
from plugins_ort.library import KERNELS
from sslc_export.cli.export import main
from sslc_export.machine import Machine, measure_machine
from sslc_export.prediction import HEADER, Part, Prediction, predict_build, predict_checkpoint
from tests.compress.models import save_tiny

MACHINE = Machine(bandwidth=30e9, peak=200e9, threads=1, kernel="avx512_bf16")
QUICK = ["--held-out-tokens", "512", "--latency-seconds", "0.2", "--threads", "1", "--prefill-tokens", "16"]


def large(values="f32", kept=0.5, size=35.7e6, **fields):
    return Part("model.layers.0.mlp.up_proj", 4096, 4096, int(size), values, kept, **fields)


def test_decode_is_bytes_over_bandwidth_and_prefill_operations_over_the_peak():
    dense = large().dense()
    assert dense.decode(MACHINE) == pytest.approx(67.1e6 / (30e9 * 0.79), rel=1e-3)
    assert dense.prefill(MACHINE, 128) == pytest.approx(2 * 128 * 4096**2 / 200e9)
    # Half of the parameters: what scripts/bench_cpu.py measured with one thread, within the scatter of its runs.
    for values, size, decode in (("f32", 35.7e6, 1.90), ("bf16", 18.9e6, 3.20), ("int8", 12.0e6, 5.18)):
        part = large(values, size=size)
        assert dense.decode(MACHINE) / part.decode(MACHINE) == pytest.approx(decode, rel=0.15)
    assert large(kept=0.25).prefill(MACHINE) == pytest.approx(large().prefill(MACHINE) / 2)


def test_which_way_is_slower_depends_on_the_kernel_and_not_on_the_bandwidth():
    for bandwidth in (1e9, 100e9):
        for kernel, slower in (("avx512", False), ("avx2", False), ("portable", True)):
            found = Prediction((large(),), 1, 4096, Machine(bandwidth, 1e11, 1, kernel)).slower()
            assert bool(found) == slower
    assert "portable" in found["model.layers.0.mlp.up_proj"]


def test_layers_that_are_alike_share_a_row():
    parts = tuple(Part(f"model.layers.{i}.mlp.up_proj", 64, 48, 9000, "f32", 0.6) for i in range(3))
    rows = Prediction((*parts, Part("lm_head", 97, 48, 4 * 97 * 48)), 3, 48, MACHINE).table()
    assert [row[:2] for row in rows] == [("mlp.up_proj", "3"), ("lm_head", "1"), ("whole model", "")]
    assert {len(row) for row in rows} == {len(HEADER)}
    assert rows[1][5:] == ("1.00×", "1.00×", "dense")


@pytest.mark.parametrize("values", ["f32", "bf16", "int8"])
def test_a_build_is_predicted_as_what_comes_of_it(tmp_path, values):
    """The same budget for every layer gives each the plan that the prediction saw."""
    dense = save_tiny(tmp_path / "dense", "llama", tie_word_embeddings=True)
    options = CompressOptions("magnitude", 0.8, allocation="uniform", values_dtype=values, head="int8")
    before = predict_build(dense, options, MACHINE, compress_slower=True)
    compress_model(dense, tmp_path / "out", options)
    after = predict_checkpoint(tmp_path / "out", MACHINE)
    assert before.parts == after.parts
    assert before.decode_speedup == after.decode_speedup > 1
    assert predict_checkpoint(dense, MACHINE).decode_speedup == 1


def test_a_build_with_int4_values_is_predicted_with_the_padding_that_they_may_need(tmp_path):
    dense = save_tiny(tmp_path / "dense", "llama")
    options = CompressOptions("magnitude", 0.95, allocation="uniform", values_dtype="int4")
    before = predict_build(dense, options, MACHINE, compress_slower=True)
    compress_model(dense, tmp_path / "out", options)
    after = predict_checkpoint(tmp_path / "out", MACHINE)
    checkpoint = Checkpoint.open(tmp_path / "out")
    for predicted, made in zip(before.parts, after.parts, strict=True):
        assert (predicted.name, predicted.values, predicted.kept) == (made.name, made.values, made.kept)
        blocks = made.N * -(-made.K // 64) if made.values else 0
        assert made.bytes <= predicted.bytes <= made.bytes + blocks / 2 + 1
        if made.values:
            parts = ("bitmap", "values", "scales", "U", "V")
            assert made.bytes == sum(checkpoint.tensors[f"{made.name}.{part}"].length for part in parts)
    assert {part.values for part in after.parts} == {"int4", None}  # None is the head


def test_this_machine_is_measured():
    machine = measure_machine(1)
    assert 1e9 < machine.bandwidth < 1e12
    assert 1e9 < machine.peak < 1e13


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("values", ["f32", "bf16", "int8", "int4"])
def test_every_kernel_is_known(kernel, values):
    machine = Machine(bandwidth=30e9, peak=200e9, threads=2, kernel=kernel)
    assert large(values).decode(machine) > 0
    assert large(values).prefill(machine) > 0


def test_the_command_prints_a_table_and_writes_nothing(tiny_folder, tmp_path, capsys):
    out = tmp_path / "build" / "engine.onnx"
    assert main(["--model", str(tiny_folder), "--out", str(out), "--budget", "0.8", "--predict-only"]) == 0
    shown = capsys.readouterr().out
    assert "GB/s" in shown
    assert "whole model" in shown
    assert list(tmp_path.iterdir()) == []
    assert main(["--model", str(tiny_folder), "--out", str(tmp_path / "engine.plan"), "--predict-only"]) == 2


def test_slower_layers_stay_dense_unless_they_are_wanted(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSLC_KERNEL", "portable")
    flags = ["--model", str(tiny_folder), "--skip-validation", "--head", "int8"]
    flags += ["--budget", "0.8", "--method", "magnitude", "--allocation", "uniform"]
    assert main([*flags, "--out", str(tmp_path / "dense.onnx")]) == 0
    report = json.loads((tmp_path / "dense" / REPORT).read_bytes())
    assert all("predicted to decode" in layer["dense_reason"] for layer in report["layers"])
    assert report["head"] is None
    assert "lm_head is kept as it is" in capsys.readouterr().err
    assert main([*flags, "--out", str(tmp_path / "small.onnx"), "--compress-slower"]) == 0
    report = json.loads((tmp_path / "small" / REPORT).read_bytes())
    assert not any(layer["dense_reason"] for layer in report["layers"])
    assert report["head"] is not None
