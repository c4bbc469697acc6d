"""scripts/bench_memory.py on models too small for figures: the table, what is kept of it, and the verdicts."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = ["--blocks", "2", "--shape", "64", "96", "4", "100", "--sequences", "4", "--length", "16"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_memory

    yield bench_memory
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bench_memory", "memory_bench")]:
        del sys.modules[name]


def record(bench, method, **changes):
    from memory_bench.methods import Record

    fields = {"model": "2 × 64 × 96, 4 × 16 tokens", "seconds": 3.0, "block_seconds": [1.0, 2.0], "peak_gib": 1.0}
    return Record(**(fields | {"method": method, "files": {}} | changes))


@pytest.fixture
def measured(bench, monkeypatch):
    """What would be measured, without the processes that measure it."""
    made = []

    def uninterrupted(job, model):
        made.append(job.method)
        return record(bench, job.method, model=model)

    monkeypatch.setattr("memory_bench.methods._uninterrupted", uninterrupted)
    monkeypatch.setattr("bench_memory.make_model", lambda *_: None)
    monkeypatch.setattr("bench_memory.fresh_process", lambda: ThreadPoolExecutor(1))
    return made


def test_each_method_is_measured_once_and_added_to_the_file(bench, measured, tmp_path, capsys):
    file = tmp_path / "memory.json"
    arguments = [*SMALL, "--json", str(file), "--methods"]
    assert bench.main([*arguments, "wanda"]) == 0
    assert bench.main([*arguments, "wanda", "oats"]) == 0
    assert measured == ["wanda", "oats"]
    assert [row["method"] for row in json.loads(file.read_text())] == ["wanda", "oats"]
    assert capsys.readouterr().out.count("| wanda | 1.5 | 3 | 1.00 |  |") == 2


def test_what_is_beyond_the_limit_or_ends_with_other_bytes_fails(bench, measured, monkeypatch):
    from dataclasses import replace

    assert bench.main([*SMALL, "--methods", "wanda", "--limit", "0.5"]) == 1
    for same in (True, False):
        killed = lambda job, found, same=same: replace(found, killed_in=1, same_after_kill=same)  # noqa: E731
        monkeypatch.setattr("memory_bench.methods._killed", killed)
        assert bench.main([*SMALL, "--methods", "wanda", "--kill"]) == int(not same)


def test_all_methods_are_all_and_the_default(bench, measured):
    from compress.options import METHODS

    bench.main([*SMALL, "--methods", "all"])
    assert set(measured) == {"default", *METHODS}


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_block_ends_with_the_same_bytes(bench, tmp_path, capsys):
    file = tmp_path / "memory.json"
    shape = ["--blocks", "2", "--shape", "256", "688", "4", "1000"]
    assert bench.main([*shape, "--methods", "wanda", "--kill", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert row["same_after_kill"] is True
    assert row["killed_in"] == 1
    assert len(row["block_seconds"]) == 2
    assert 0 < row["peak_gib"] < 6
    assert "same bytes" in capsys.readouterr().out
