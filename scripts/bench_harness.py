"""Zero-shot accuracy of an engine in lm-evaluation-harness, and of the same model in transformers, on the same samples.

    python scripts/bench_harness.py build/demo/engine.onnx TEXT [--reference SmolLM2-135M/] [--samples 100]

The task needs no network: which of four passages of TEXT goes on where a passage stops? The three wrong ones are from
elsewhere in it. Exit code 1 if the answers differ by more than rounding, or an accuracy differs at all. Needs
`pip install "sslc-export[harness]"`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.hf import load
from compress.layer import keep_decoded
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.lowering.lower import lower
from sslc_export.model import resolve
from sslc_export.record import read_record
from validate.harness import Tasks, evaluate, load_tasks
from validate.harness_model import EngineLM

TASK = """\
task: continuation
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_LENGTH = 512
# Log-likelihoods are sums over some twenty tokens of −1 to −10; float32 logits agree to some 1e-5.
_TOLERANCE = 2e-3


def questions(text: str, number: int, words: int = 24, answer: int = 6) -> list[dict[str, Any]]:
    """Passages of `words` words, each with four passages of `answer` words to choose from."""
    random, given = np.random.default_rng(0), text.split()
    pieces = [given[at : at + words + answer] for at in range(0, len(given) - words - answer, words + answer)]
    rows = []
    for index in random.permutation(len(pieces))[:number]:
        others = random.choice(np.delete(np.arange(len(pieces)), index), 3, replace=False)
        endings = [" " + " ".join(pieces[which][words:]) for which in (index, *others)]
        order = random.permutation(4)
        context, right = " ".join(pieces[index][:words]), int(np.flatnonzero(order == 0)[0])
        rows.append({"context": context, "choices": [endings[which] for which in order], "answer": right})
    return rows


def write_task(folder: Path, name: str, task: str, rows: list[dict[str, Any]]) -> str:
    """Writes a task and its data; returns the path that lm_eval takes."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    return str(folder / f"{name}.yaml")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--reference", help="the dense model, for the recovery")
    parser.add_argument("--samples", type=int, default=100)
    arguments = parser.parse_args()
    checkpoint = arguments.engine.parent / read_record(arguments.engine)["checkpoint"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = load(checkpoint, dtype=torch.float32)
    keep_decoded(model)
    with tempfile.TemporaryDirectory() as folder:
        rows = questions(arguments.text.read_text(), arguments.samples)
        tasks = load_tasks([write_task(Path(folder), "continuation", TASK, rows)])
        engine = OnnxRuntimeEngine(arguments.engine, name="compressed")
        wrong = _compare("compressed", engine, model, tokenizer, tasks)
        if arguments.reference:
            source = resolve(arguments.reference)
            dense = OnnxRuntimeEngine(lower(source, Path(folder) / "dense.onnx").path, name="dense")
            wrong |= _compare(
                "dense", dense, AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tokenizer, tasks
            )
            for score in evaluate(engine, dense, tokenizer, tasks, max_length=_LENGTH).scores:
                print(f"recovery, {score.metric}: {score.recovery:.3f} ± {score.recovery_standard_error:.3f}")
    return int(wrong)


def _compare(name: str, engine: OnnxRuntimeEngine, model: Any, tokenizer: Any, tasks: Tasks) -> bool:
    """Prints how engine and transformers answer; returns whether they differ."""
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=_LENGTH, batch_size=1, backend="causal")
    ours = EngineLM(engine, tokenizer, max_length=_LENGTH)
    results = [
        simple_evaluate(model=each, tasks=list(tasks.names), task_manager=tasks.manager, bootstrap_iters=0)
        for each in (theirs, ours)
    ]
    answers = []
    for result in results:
        samples = sorted(result["samples"]["continuation"], key=lambda sample: sample["doc_id"])
        answers.append(np.array([[value for value, _ in sample["filtered_resps"]] for sample in samples]))
    difference = float(np.abs(answers[0] - answers[1]).max())
    different = difference > _TOLERANCE
    for metric in ("acc", "acc_norm"):
        wanted, found = (result["results"]["continuation"][f"{metric},none"] for result in results)
        different |= wanted != found
        print(f"{name}, {metric}: {found:.4f} in the engine, {wanted:.4f} in transformers")
    print(f"{name}: {answers[0].size} log-likelihoods differ by at most {difference:.1e}")
    return different


if __name__ == "__main__":
    sys.exit(main())
