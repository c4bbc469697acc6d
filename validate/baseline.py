"""What changed since an accepted verdict. Only what is comparable is compared.

Perplexities of the same text; speed-ups that were both measured on a quiet machine. A speed-up changed if the two
intervals part, and by more than whole measurements of the same engines differ from each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslc_common.errors import InputError

Outcome = Literal["better", "same", "worse", "unclear"]

# Sizes and perplexities of a rebuild with the same seed are equal; across versions of torch they waver by less.
_TOLERANCE = 0.002
# An interval knows the noise inside a run. Where memory came to lie, and what the machine did, differ between runs. Of
# 324 pairs of stable runs of one engine, 15 % looked different where the intervals only had to part, 2 % where by 2 %,
# 0.6 % where by 3 %, none where by 5 %; but there half of the engines that were a tenth slower went unnoticed.
_BETWEEN_RUNS = 0.03


@dataclass(frozen=True)
class Change:
    """One metric, before and now.

    Attributes:
        metric: Its path in verdict.json.
        before: In the baseline.
        now: In this verdict.
        outcome: "better", "same", "worse", or "unclear" where a measurement was unstable.
        reason: How that was decided.
    """

    metric: str
    before: float
    now: float
    outcome: Outcome
    reason: str


def read_baseline(file: Path) -> dict[str, Any]:
    """Reads a verdict.json.

    Raises:
        InputError: it is missing, damaged, or of another version.
    """
    if not file.is_file():
        raise InputError(f"There is no baseline {file}", do="Check the path given to --baseline")
    try:
        document = json.loads(file.read_bytes())
        version = document["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"The baseline {file} is not a verdict.json", got=repr(error)) from error
    if version != 1:
        raise InputError(f"The baseline {file} has an unknown version", got=version, allowed="1")
    return dict(document)


def changes(before: dict[str, Any], now: dict[str, Any]) -> tuple[Change, ...]:
    """Compares two verdicts as documents; what is missing in either is left out."""
    found = []
    for metric in ("size.ratio", "accuracy.perplexity", "accuracy.perplexity_ratio"):
        old, new = _at(before, metric), _at(now, metric)
        if metric.startswith("accuracy") and _at(before, "accuracy.text_sha256") != _at(now, "accuracy.text_sha256"):
            continue  # another text: nothing to compare
        if old is not None and new is not None:
            found.append(_smaller_is_better(metric, old, new))
    for phase in ("prefill", "decode"):
        metric = f"latency.{phase}.speedup"
        old, new = _at(before, metric), _at(now, metric)
        if old is not None and new is not None and None not in (*old.values(), *new.values()):
            stable = all(_at(document, f"latency.{phase}.stable") for document in (before, now))
            found.append(_faster_is_better(metric, old, new, stable))
    return tuple(found)


def _smaller_is_better(metric: str, old: float, new: float) -> Change:
    change = new / old - 1
    outcome: Outcome = "same" if abs(change) <= _TOLERANCE else "worse" if change > 0 else "better"
    return Change(metric, old, new, outcome, f"{change:+.2%} (within ±{_TOLERANCE:.1%} is the same)")


def _faster_is_better(metric: str, old: dict[str, float], new: dict[str, float], stable: bool) -> Change:
    outcome: Outcome = "same"
    if not stable:
        outcome = "unclear"
    elif new["high"] < old["low"] * (1 - _BETWEEN_RUNS):
        outcome = "worse"
    elif new["low"] > old["high"] * (1 + _BETWEEN_RUNS):
        outcome = "better"
    intervals = f"{old['low']:.3f} to {old['high']:.3f}, now {new['low']:.3f} to {new['high']:.3f}"
    reason = f"95% intervals: {intervals}" + ("" if stable else "; a measurement was unstable")
    return Change(metric, old["median"], new["median"], outcome, reason)


def _at(document: dict[str, Any], path: str) -> Any:
    value: Any = document
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
