"""scripts/bench_quality.py and scripts/bench_rank.py on a model too small for figures: what they keep and show."""

import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Runs a script in this process with arguments."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return __import__(name).main()

    yield run
    torch.set_grad_enabled(True)
    for name in ("bench_quality", "bench_rank"):
        sys.modules.pop(name, None)


def test_quality_is_measured_once_kept_and_shown_again(script, tiny_folder, text_file, tmp_path, capsys):
    file, plot = tmp_path / "quality.json", tmp_path / "quality.png"
    model = ["--model", tiny_folder, "--calibration", text_file, "--held-out", f"text={text_file}"]
    few = ["--calibration-tokens", 1024, "--tokens", 1024, "--methods", "default", "wanda", "--budgets", 0.6]
    arguments = ["bench_quality", *model, *few, "--ort-bits", 8, "--folder", tmp_path, "--json", file]
    assert script(*arguments) == 0
    records = json.loads(file.read_text())
    assert [record["method"] for record in records] == ["default", "wanda", "ort_int8"]
    default, wanda, int8 = records
    assert default["bytes"] == wanda["bytes"] < int8["dense_bytes"] == default["dense_bytes"]
    assert 0.9 < int8["ratio"] < 1.1
    assert all(len(record["chunk_nll"]) == 2 for record in records)
    shown = capsys.readouterr().out.partition("\n\n")[2]
    cells = {line.split(" | ")[0]: line.split(" | ") for line in shown.splitlines() if " | text | " in line}
    assert ["±" in cells[f"| {method}"][7] for method in ("default", "wanda", "ort_int8")] == [False, True, False]
    assert "\n| text | 60 % of the params |\n|---|---:|\n" in shown
    assert f"\n| wanda | {wanda['ratio']:.3f} ± {wanda['ratio_standard_error']:.3f} |" in shown

    assert script(*arguments) == 0
    assert json.loads(file.read_text()) == records
    assert capsys.readouterr().out.strip() == shown.strip()
    elsewhere = wanda | {"method": "sslc", "text": "other"}
    file.write_text(json.dumps([*records, default | {"method": "default mask_rule=2:4"}, elsewhere]))
    assert script("bench_quality", "--show", file, "--plot", plot) == 0
    assert set(shown.strip().splitlines()) < set(lines := capsys.readouterr().out.splitlines())
    assert any(line.startswith("| default mask_rule=2:4 | ") for line in lines)
    assert f"| sslc | {wanda['ratio']:.3f} ± {wanda['ratio_standard_error']:.3f} |" in lines
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_layers_are_solved_once_rotated_or_not(script, tiny_folder, text_file, tmp_path, capsys):
    file, plot = tmp_path / "rank.json", tmp_path / "rank.png"
    few = ["--tokens", 1024, "--budgets", 1, "--rules", "free", "--shares", 0, 0.25, "--layers", "*.q_proj"]
    arguments = ["bench_rank", "--model", tiny_folder, "--text", text_file, *few, "--json", file]
    assert script(*arguments) == 0
    records = json.loads(file.read_text())
    errors = {(record["layer"], record["share"], record["way"]): record["error"] for record in records}
    layers = {record["layer"] for record in records}
    assert len(layers) == 2
    for layer in layers:
        # All of W is kept, in whatever basis, but what the stored rotation takes.
        assert max(errors[layer, 0.0, way] for way in ("joint", "hadamard")) < 1e-5 < errors[layer, 0.0, "eigen"]
    capsys.readouterr()
    assert script(*arguments) == 0
    assert json.loads(file.read_text()) == records
    shown = capsys.readouterr().out
    assert script("bench_rank", "--show", file, "--plot", plot) == 0
    assert capsys.readouterr().out == shown
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["bench_quality", "bench_rank"])
def test_without_a_model_or_records_they_say_what_is_needed(script, name, capsys):
    with pytest.raises(SystemExit):
        script(name)
    assert "or --show" in capsys.readouterr().err
