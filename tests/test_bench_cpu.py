"""scripts/bench_cpu.py on layers and a model too small for figures: what it runs, and what it writes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.compress.models import save_tiny

SCRIPTS = Path(__file__).parents[1] / "scripts"
# Beside what 8-bit and 4-bit weights lose, activations in 8 or 16 bits. Without VNNI, ONNX Runtime's int8 also
# saturates sums of two products at 16 bits.
ERRORS = {
    ("sslc", "f32"): 1e-6,
    ("sslc", "bf16"): 4e-3,
    ("sslc", "int8"): 1e-2,
    ("sslc", "int4"): 0.15,
    ("openvino", "f32"): 1e-5,
    ("ggml", "f32"): 1e-6,
    ("ggml", "bf16"): 4e-3,
    ("ggml", "int8"): 2e-2,
    ("ggml", "int4"): 0.2,
}
ERRORS |= {("onnxruntime", "f32"): 1e-6, ("onnxruntime", "int8"): 5e-2, ("onnxruntime", "int4"): 0.2}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("cpu_bench.contender.ROTATED_BYTES", 1e5)
    monkeypatch.setattr("cpu_bench.timing._AREA_BYTES", 1 << 20)
    import bench_cpu

    yield bench_cpu.main
    for name in [name for name in sys.modules if name.startswith(("bench_cpu", "cpu_bench"))]:
        del sys.modules[name]


def test_every_engine_computes_the_layer_and_has_a_record(bench, tmp_path, capsys):
    file = tmp_path / "out.json"
    bench(f"--shape 96 128 4 --tokens 1 3 --threads 1 2 --rounds 2 --json {file} --plot {tmp_path / 'a.png'}".split())
    records = json.loads(file.read_text())
    assert all((r["n"], r["k"]) == (96, 128) and r["ratio"] > 0 and r["share_of_bandwidth"] > 0 for r in records)
    there = {(r["engine"], r["values"], r["how"]) for r in records}
    assert len(records) == 4 * len(there)  # tokens × threads
    expected = {
        ("sslc", "f32"),
        ("sslc", "bf16"),
        ("sslc", "int8"),
        ("sslc", "int4"),
        ("torch", "f32"),
        ("torch", "bf16"),
    }
    expected |= {("onnxruntime", values) for values in ("f32", "int8", "int4")}
    for peer in ("openvino", "ggml"):
        if importlib.util.find_spec(peer):
            expected |= {(peer, values) for values in ("f32", "bf16", "int8", "int4")}
    assert {(engine, values) for engine, values, _ in there} == expected
    for record in records:
        limit = ERRORS.get((record["engine"], record["values"]))
        assert limit is None or record["error"] < limit
    dense = [r for r in records if (r["engine"], r["values"]) == ("onnxruntime", "f32")]
    assert all(r["ratio"] == 1 for r in dense)
    assert "| sslc | int8 |" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 0
    bench(f"--show {file}".split())
    assert "| sslc | int8 |" in capsys.readouterr().out


def test_a_rank_beyond_the_budget_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench(["--shape", "64", "64", "40"])
    assert "rank 40 alone needs more" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_built_once_and_timed_in_both_phases(bench, tmp_path, capsys):
    model = save_tiny(tmp_path / "tiny", "llama", vocab_size=1000, max_position_embeddings=256, num_hidden_layers=1)
    file = tmp_path / "out.json"
    arguments = (
        f"--model {model} --work {tmp_path / 'work'} --prefill 160 --threads 1 --rounds 2 --values f32 --json {file}"
    )
    bench(arguments.split())
    records = json.loads(file.read_text())
    assert {(r["phase"], r["m"]) for r in records} == {("decode", 1), ("prefill", 160)}
    assert {(r["engine"], r["values"]) for r in records} == {
        ("sslc", "f32"),
        *(("onnxruntime", values) for values in ("f32", "int8", "int4")),
    }
    capsys.readouterr()
    bench(arguments.split())
    assert "building" not in capsys.readouterr().err
