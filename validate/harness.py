"""Zero-shot accuracy by lm-evaluation-harness, the field's own: an engine and the dense one on the same samples.

The harness is an optional extra (`pip install "sslc-export[harness]"`). Its tasks are named as it names them, or are
the path of a task's YAML file; most fetch their data set from the Hugging Face hub.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from sslc_common.errors import InputError, MissingError
from validate.engine import Engine
from validate.progress import Progress, silent


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks, with their data.

    Attributes:
        names: As they were asked for.
        manager: lm_eval's TaskManager.
        samples: At most so many of each; None for all.
    """

    names: tuple[str, ...]
    manager: Any
    samples: int | None = None


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Its name.
        metric: As the harness calls it, for example "acc_norm".
        samples: How many were asked.
        score: Of the engine; NaN if a logit was NaN or infinite.
        standard_error: Of `score`.
        dense: Of the dense engine on the same samples; None without one.
        dense_standard_error: Of `dense`.
        recovery: `score` over `dense`, for metrics that are better when higher.
        recovery_standard_error: From differences taken sample by sample; None where the metric is not a mean.
    """

    task: str
    metric: str
    samples: int
    score: float
    standard_error: float | None
    dense: float | None = None
    dense_standard_error: float | None = None
    recovery: float | None = None
    recovery_standard_error: float | None = None


@dataclass(frozen=True)
class Harness:
    """All scores, and lm_eval's version."""

    scores: tuple[TaskScore, ...]
    version: str

    @property
    def worst_recovery(self) -> float | None:
        """Smallest of all; NaN if one is; None without a dense engine."""
        known = [score.recovery for score in self.scores if score.recovery is not None]
        return float(np.min(known)) if known else None


def load_tasks(names: Sequence[str], samples: int | None = None) -> Tasks:
    """Finds tasks and fetches their data, which is tried before hours of measuring.

    Args:
        names: Of tasks, groups or tags of the harness, or paths of YAML files.
        samples: At most so many of each task.

    Raises:
        MissingError: lm_eval is not installed.
        InputError: a task is unknown, or its data cannot be fetched.
    """
    if util.find_spec("lm_eval") is None:
        raise MissingError("lm-evaluation-harness is not installed", do='pip install "sslc-export[harness]"')
    from lm_eval.tasks import TaskManager

    # Reading the thousands of tasks that it comes with takes it ten seconds.
    manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in names))
    try:
        manager.load(list(names))
    except Exception as error:  # of lm_eval, datasets, or whatever a task's own code raises
        raise InputError(
            f"lm-evaluation-harness cannot load {', '.join(names)}",
            got=f"{type(error).__name__}: {error}",
            allowed="names that `lm-eval ls tasks` lists, or paths of task files; their data must be reachable",
        ) from error
    return Tasks(tuple(names), manager, samples)


def evaluate(
    engine: Engine,
    dense: Engine | None,
    tokenizer: Any,
    tasks: Tasks,
    *,
    max_length: int,
    progress: Progress = silent,
) -> Harness:
    """Scores an engine, and the dense one beside it.

    Args:
        engine: The compressed engine.
        dense: The dense one, if there is one.
        tokenizer: Of transformers, the model's.
        tasks: From `load_tasks`.
        max_length: Most tokens of a request.
        progress: Wraps the loops over requests.
    """
    ours = _run(engine, tokenizer, tasks, max_length, progress)
    theirs = _run(dense, tokenizer, tasks, max_length, progress) if dense is not None else None
    scores = [
        _score(task, name, ours, theirs)
        for task, values in ours["results"].items()
        for name, value in values.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    ]
    return Harness(tuple(scores), metadata.version("lm_eval"))


def _run(engine: Engine, tokenizer: Any, tasks: Tasks, max_length: int, progress: Progress) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from validate.harness_model import EngineLM

    model = EngineLM(engine, tokenizer, max_length=max_length, progress=progress)
    results = simple_evaluate(
        model=model, tasks=list(tasks.names), task_manager=tasks.manager, limit=tasks.samples, bootstrap_iters=1000
    )
    assert results is not None  # it is None on other ranks than the first
    return dict(results) | {"finite": model.non_finite == 0}


def _score(task: str, name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> TaskScore:
    """`name` is "metric,filter", as the harness writes it."""
    metric, _, chosen = name.partition(",")
    score, error = _value(ours, task, metric, chosen)
    samples = [sample for sample in ours["samples"].get(task, ()) if sample["filter"] == chosen]
    if theirs is None:
        return TaskScore(task, metric, len(samples), score, error)
    dense, dense_error = _value(theirs, task, metric, chosen)
    recovery = recovery_error = None
    if dense and ours["higher_is_better"].get(task, {}).get(metric):
        recovery = score / dense
        others = [sample for sample in theirs["samples"].get(task, ()) if sample["filter"] == chosen]
        recovery_error = _ratio_error([s[metric] for s in samples], [s[metric] for s in others], recovery)
    return TaskScore(task, metric, len(samples), score, error, dense, dense_error, recovery, recovery_error)


def _value(results: Mapping[str, Any], task: str, metric: str, chosen: str) -> tuple[float, float | None]:
    values = results["results"][task]
    error = values.get(f"{metric}_stderr,{chosen}")
    if not results["finite"]:
        return math.nan, None
    return float(values[f"{metric},{chosen}"]), float(error) if isinstance(error, int | float) else None


def _ratio_error(ours: Sequence[Any], theirs: Sequence[Any], ratio: float) -> float | None:
    """Of mean(ours) / mean(theirs), paired, by the delta method; None for what are not numbers."""
    if len(ours) < 2 or not all(isinstance(value, int | float) for value in (*ours, *theirs)):
        return None
    residuals = np.asarray(ours, np.float64) - ratio * np.asarray(theirs, np.float64)
    return float(residuals.std(ddof=1) / math.sqrt(len(residuals)) / np.mean(theirs))
