"""Our engines in lm-evaluation-harness answer as its own model class does with transformers. Needs lm_eval."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from compress.hf import load
from compress.layer import keep_decoded
from sslc_common.errors import InputError
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.lowering.lower import lower
from tests.tiny_models import compress_at_random

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install "lm_eval>=0.4.13"')

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from scripts.bench_harness import TASK, questions, write_task
from sslc_export.cli import export
from validate.document import schema
from validate.harness import evaluate, load_tasks
from validate.harness_model import EngineLM

LENGTH = 128
ROLLING = """\
task: whole_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GENERATED = """\
task: copied
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "x"
generation_kwargs: {until: ["e", " the"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory):
    """(transformers' model, its tokenizer, the engine) of a compressed model that is not quite the dense one."""
    folder = compress_at_random(tiny_folder, tmp_path_factory.mktemp("harness") / "engine")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    model = load(folder, dtype=torch.float32)
    keep_decoded(model)
    engine = OnnxRuntimeEngine(lower(folder, folder.with_suffix(".onnx")).path, threads=1)
    return model, AutoTokenizer.from_pretrained(folder), engine


@pytest.fixture(scope="module")
def tasks(text_file, tmp_path_factory):
    text = text_file.read_text()
    folder = tmp_path_factory.mktemp("tasks")
    rows = questions(text, 12, words=12)
    rows[0]["context"] = "word " * 60 + rows[0]["context"]  # longer than the model may look back
    rows[1]["choices"] = ["a", "b", "c", "d"]  # of one token
    return {
        "continuation": write_task(folder, "continuation", TASK, rows),
        "whole_text": write_task(folder, "whole_text", ROLLING, [{"text": text[:400]}, {"text": "Short."}]),
        "copied": write_task(folder, "copied", GENERATED, rows[1:5]),
    }


def asked(model, task):
    return simple_evaluate(
        model=model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )


def figures(results, name):
    return {key: value for key, value in results["results"][name].items() if isinstance(value, float)}


def answers(results, task):
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


@pytest.mark.parametrize("name", ["continuation", "whole_text", "copied"])
def test_the_engine_answers_as_transformers_does(tiny, tasks, name):
    model, tokenizer, engine = tiny
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, backend="causal")
    ours = EngineLM(engine, tokenizer, max_length=LENGTH)
    wanted, found = asked(theirs, tasks[name]), asked(ours, tasks[name])
    expected, got = answers(wanted, name), answers(found, name)
    assert len(got) > 1
    if name == "copied":
        assert got == expected
        assert any(text for (text,) in got)
        return
    # Sums over up to 400 tokens of log-probabilities that agree to 1e-5.
    numbers = (
        np.array([[value for value, _ in row] if name == "continuation" else row for row in x]) for x in (got, expected)
    )
    np.testing.assert_allclose(*numbers, rtol=1e-4)
    assert figures(found, name) == pytest.approx(figures(wanted, name), rel=1e-4)
    assert ours.non_finite == 0


def test_scores_stand_beside_the_dense_engines_with_their_recovery(tiny, tasks, tiny_folder, tmp_path):
    _, tokenizer, engine = tiny
    dense = OnnxRuntimeEngine(lower(tiny_folder, tmp_path / "dense.onnx").path, threads=1)
    loaded = load_tasks([tasks["continuation"]], samples=10)
    harness = evaluate(engine, dense, tokenizer, loaded, max_length=LENGTH)
    scores = {score.metric: score for score in harness.scores}
    assert scores.keys() == {"acc", "acc_norm"}
    acc = scores["acc"]
    assert (acc.task, acc.samples) == ("continuation", 10)
    assert acc.recovery == pytest.approx(acc.score / acc.dense)
    assert acc.recovery_standard_error >= 0
    assert harness.worst_recovery == min(score.recovery for score in harness.scores)
    same = evaluate(dense, dense, tokenizer, loaded, max_length=LENGTH)
    assert {(score.recovery, score.recovery_standard_error) for score in same.scores} == {(1.0, 0.0)}
    alone = evaluate(dense, None, tokenizer, loaded, max_length=LENGTH)
    assert {score.recovery for score in alone.scores} == {None}
    assert alone.worst_recovery is None


def test_the_command_scores_and_judges_by_the_harness(tiny_folder, text_file, tasks, tmp_path):
    arguments = ["--model", str(tiny_folder), "--out", str(tmp_path / "engine.onnx"), "--threads", "1"]
    arguments += ["--calibration", str(text_file), "--calibration-tokens", "2048", "--sequence-length", "128"]
    arguments += [
        "--held-out",
        str(text_file),
        "--held-out-tokens",
        "2048",
        "--latency-seconds",
        "0.2",
        "--batches",
        "2",
    ]
    arguments += ["--harness-tasks", tasks["continuation"], "--harness-samples", "6", "--min-harness-recovery", "0.001"]
    code = export.main(arguments)
    verdict = json.loads((tmp_path / "report" / "verdict.json").read_text())
    jsonschema.validate(verdict, schema())
    assert [(score["task"], score["samples"]) for score in verdict["harness"]["scores"]] == [("continuation", 6)] * 2
    limit = next(limit for limit in verdict["limits"] if limit["name"] == "min_harness_recovery")
    recovery = verdict["harness"]["worst_recovery"]
    # A random model answers some of six questions right, or none, when there is nothing to recover.
    assert limit["outcome"] == ("inconclusive" if recovery is None else "passed" if recovery else "regression")
    assert code == verdict["exit_code"]
    assert "Zero-shot accuracy" in (tmp_path / "report" / "report.html").read_text()


def test_logits_that_are_not_finite_make_every_score_nan(tiny, tasks):
    _, tokenizer, engine = tiny

    class Broken:
        name, vocab_size = "broken", engine.vocab_size

        def run(self, *arguments, **more):
            logits, cache = engine.run(*arguments, **more)
            logits[0, -1, 3] = np.nan
            return logits, cache

    harness = evaluate(Broken(), engine, tokenizer, load_tasks([tasks["continuation"]], 4), max_length=LENGTH)
    assert all(np.isnan(score.score) for score in harness.scores)
    assert np.isnan(harness.worst_recovery)


def test_unknown_tasks_are_refused_before_anything_runs():
    with pytest.raises(InputError, match="no_such_task"):
        load_tasks(["no_such_task"])
