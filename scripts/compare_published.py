#!/usr/bin/env python3
r"""Our methods against the authors' own code: the same layers, the same calibration, the same budget.

    python scripts/compare_published.py --model DIR --calibration text.txt --wanda clones/wanda --oats clones/OATS
    python scripts/compare_published.py ... --layers model.layers.1.self_attn.q_proj --mask-rules 2:4 --json out.json

The clones are yours, and what a clone is not given for is left out. Their code runs on the CPU whatever it was written
for; of what it imports, packages that are not here are stood in for. Error is ‖(W − S − UV)X‖ / ‖WX‖ on the inputs
that both calibrated on. Exit code 1 if a ratio is more than 1 % away from 1. Rows in brackets are not held to that:
there ours differs on purpose (docs/methods.md, "Against the authors' own code"). Records are appended to the JSON file
as they come, and what is in it already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the packages importable without installation

import torch
from published import ours, theirs
from published.problem import Problem, Setting, problems, setting
from torch import Tensor

from sslc_common.errors import InputError

Solver = Callable[[Problem, Setting], Tensor]
ALLOWED = 0.01  # of a ratio of errors
LAYERS = [
    f"model.layers.{block}.{layer}"
    for block in (1, 16)
    for layer in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Of the method.
        theirs: Their code.
        ours: Ours.
        low_rank: Whether the method makes U and V.
        sparse: Whether it makes S.
        same: Whether both do the same, so that the errors must agree.
    """

    name: str
    theirs: Solver
    ours: Solver
    low_rank: bool = False
    sparse: bool = True
    same: bool = True


@dataclass(frozen=True)
class Record:
    """One method on one layer; errors are relative, see the module's text."""

    method: str
    layer: str
    mask_rule: str
    sparsity: float
    rank: int
    theirs: float
    ours: float
    ratio: float
    same: bool
    seconds_theirs: float
    seconds_ours: float


def cases(options: argparse.Namespace) -> list[Case]:
    """What the given clones allow to compare."""
    found = []

    def add(
        folder: Path | None, name: str, run: Callable[..., Tensor], our: Solver | None = None, **traits: bool
    ) -> None:
        if folder is not None:
            found.append(Case(name, _in(folder, run), our or partial(ours.by_method, name), **traits))

    turns = options.turns
    add(options.wanda, "wanda", theirs.wanda)
    add(options.sparsegpt, "sparsegpt", theirs.sparsegpt)
    add(options.alps, "alps", theirs.alps)
    add(options.oats, "oats", theirs.oats, low_rank=True)
    add(options.three_basil, "three_basil", theirs.three_basil, low_rank=True)
    in_their_order = partial(ours.hassle_free_in_their_order, turns=turns)
    ours_in_turns = partial(ours.by_method, "hassle_free", turns=turns)
    exact, by_adam = partial(theirs.hassle_free_exact, turns=turns), partial(theirs.hassle_free, turns=turns)
    add(options.three_basil, "hassle_free, their order", exact, in_their_order, low_rank=True)
    add(options.three_basil, "hassle_free", exact, ours_in_turns, same=False, low_rank=True)
    add(options.hassle_free, "hassle_free, by Adam", by_adam, ours_in_turns, same=False, low_rank=True)
    add(options.svd_llm, "svd_llm", theirs.svd_llm, low_rank=True, sparse=False)
    add(options.robust_pca, "robust_pca", theirs.robust_pca, ours.robust_pca, low_rank=True, sparse=False)
    return found


def _in(folder: Path, run: Callable[..., Tensor]) -> Solver:
    return lambda problem, at: run(folder, problem, at)


def compare(case: Case, problem: Problem, at: Setting) -> Record:
    """Runs both on one problem, each with the same random numbers."""
    outcomes, seconds = [], []
    for solver in (case.theirs, case.ours):
        torch.manual_seed(0)
        began = time.process_time()
        outcomes.append(problem.error(solver(problem, at)))
        seconds.append(round(time.process_time() - began, 2))
    their_error, our_error = outcomes
    ratio = our_error / their_error if their_error else float(our_error == 0)
    return Record(
        case.name, problem.layer, at.mask_rule, at.sparsity, at.rank, their_error, our_error, ratio, case.same, *seconds
    )


def agrees(record: Record) -> bool:
    """Whether a ratio is within 1 %, or need not be."""
    return not record.same or abs(record.ratio - 1) <= ALLOWED


def line(record: Record) -> str:
    """A row of the table."""
    name, verdict = record.method if record.same else f"({record.method})", "" if agrees(record) else " beyond 1 %"
    return (
        f"| {name} | {record.layer.removeprefix('model.')} | {record.mask_rule} | {record.sparsity:.0%} "
        f"| {record.rank} | {record.theirs:.5f} | {record.ours:.5f} | {record.ratio:.4f} |{verdict}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing and prints the table; see the module's text."""
    options = _options(argv)
    if not (chosen := cases(options)):
        raise InputError("There is nothing to compare with", do="Pass the folder of a clone, --wanda DIR for example")
    records = [Record(**row) for row in _read(options.json)]
    done = {(record.method, record.layer, record.mask_rule) for record in records}
    print("| method | layer | mask | sparsity | rank | theirs | ours | ours / theirs |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for record in records:
        print(line(record))
    on = list(problems(options.model, options.layers, options.calibration, options.tokens, options.length))
    for case in chosen:
        for problem in on:
            for rule in options.mask_rules if case.sparse else ["free"]:
                if (case.name, problem.layer, rule) in done:
                    continue
                at = setting(
                    problem, rule, options.budget, options.rank_share, sparse=case.sparse, low_rank=case.low_rank
                )
                records.append(compare(case, problem, at))
                print(line(records[-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")
    return int(not all(map(agrees, records)))


def _read(file: Path | None) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file and file.is_file() else []


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face folder")
    parser.add_argument("--calibration", action="append", required=True, help="text to calibrate on; more than once")
    parser.add_argument("--tokens", type=int, default=8192, help="of it (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="full names (default: three of blocks 1 and 16)")
    parser.add_argument("--mask-rules", nargs="+", default=["free", "2:4"])
    parser.add_argument("--budget", type=float, default=0.5, help="share of the parameters kept, if the mask is free")
    parser.add_argument("--rank-share", type=float, default=0.25, help="share of the budget in U and V, as OATS has it")
    parser.add_argument("--turns", type=int, default=2, help="of HASSLE-free, on both sides (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="records, appended")
    for name, what in (
        ("wanda", "locuslab/wanda"),
        ("sparsegpt", "IST-DASLab/sparsegpt"),
        ("alps", "mazumder-lab/ALPS"),
        ("oats", "stephenqz/OATS"),
        ("three-basil", "mazumder-lab/3BASiL, which has HASSLE-free in closed form too"),
        ("hassle-free", "mazumder-lab/HASSLE-free"),
        ("svd-llm", "AIoT-MLSys-Lab/SVD-LLM"),
        ("robust-pca", "dganguli/robust-pca, for the first stage of CAP, whose own code is not public"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"clone of {what}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
