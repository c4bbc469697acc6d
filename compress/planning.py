"""The plan of a whole model: what every linear layer of its decoder blocks may hold, before any work is done."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from compress import hf
from compress.allocation import Problem, allocate
from compress.architectures import linear_shape, linears, output_rows
from compress.budget import LayerPlan, factor_cost, plan_layer, stored_bytes
from compress.folder import write_json
from compress.format import Progress, no_progress
from compress.importance import Importance
from compress.options import METHODS, VALUE_BITS, CompressOptions
from compress.rules import parse_rule
from compress.source import Source
from compress.tuning import file_bytes
from sslc_common.errors import InputError


def plan_model(source: Source, options: CompressOptions) -> dict[str, LayerPlan]:
    """A plan for every linear layer of the decoder blocks, by full name: the same share for each.

    Raises:
        InputError: a pattern of `options.exclude` or `options.values_of` matches no layer.
    """
    plans: dict[str, LayerPlan] = {}
    unmatched = {*options.exclude, *(pattern for pattern, _ in options.types_by_pattern)}
    for block in source.blocks:
        for layer, linear in linears(source.model.get_submodule(block)).items():
            name = f"{block}.{layer}"
            unmatched = {pattern for pattern in unmatched if not fnmatch.fnmatchcase(name, pattern)}
            excluded_by = next((p for p in options.exclude if fnmatch.fnmatchcase(name, p)), None)
            if excluded_by:
                plans[name] = LayerPlan(dense_reason=f"excluded by {excluded_by}")
            else:
                values_dtype, bias_bytes = options.values_dtype_of(name), _bias_bytes(source, name)
                plans[name] = plan_layer(*linear_shape(linear), options, values_dtype, bias_bytes)
    if unmatched:
        raise InputError(
            "A pattern of layers matches none",
            got=", ".join(sorted(unmatched)),
            allowed=f"patterns for names such as {next(iter(plans))}",
        )
    return plans


def share_out(
    path: Path,
    source: Source,
    plans: dict[str, LayerPlan],
    importance: dict[str, Importance],
    options: CompressOptions,
    tokens: Tensor | None = None,
    progress: Progress = no_progress,
) -> dict[str, LayerPlan]:
    """The plans of `plan_model` with their budget shared out by `options.allocation`; see `compress.allocation`.

    Args:
        path: JSON file of the plans: read if it is there, so that an interrupted run goes on with the same, or written.
        source: The dense model.
        plans: The same share for every layer.
        importance: Of the layers; empty without calibration text.
        options: What to do.
        tokens: int64 [n, L], the sequences that solvers see; None without text.
        progress: Wraps loops over layers.

    Raises:
        InputError: the allocation needs more memory than is free.
    """
    if path.is_file():
        return {name: LayerPlan(**plan) for name, plan in json.loads(path.read_bytes()).items()}
    if options.allocation != "uniform" and (importance or options.allocation != "fisher"):
        for dtype in sorted(options.values_dtypes):  # one by one: a value takes other bytes in each
            of_type = {name: plan for name, plan in plans.items() if options.values_dtype_of(name) == dtype}
            problem = _problem(source, of_type, dtype, importance, options, tokens, progress)
            plans |= allocate(options.allocation, problem)
    write_json(path, {name: asdict(plan) for name, plan in plans.items()})
    return plans


def _problem(
    source: Source,
    plans: dict[str, LayerPlan],
    values_dtype: str,
    importance: dict[str, Importance],
    options: CompressOptions,
    tokens: Tensor | None,
    progress: Progress,
) -> Problem:
    linear = {name: source.model.get_submodule(name) for name in plans}
    free = options.rank is None and options.share_of(values_dtype) is None

    def weight(name: str) -> Tensor:
        return output_rows(linear[name], source.read(f"{name}.weight"))

    return Problem(
        plans=plans,
        shapes={name: linear_shape(module) for name, module in linear.items()},
        blocks={name: block for block in source.blocks for name in plans if name.startswith(f"{block}.")},
        weight=weight,
        importance=importance,
        value_bits=VALUE_BITS[values_dtype],
        choose_ranks=free and METHODS[options.method].low_rank,
        rule=parse_rule(options.mask_rule),
        factor_cost=factor_cost(VALUE_BITS[values_dtype], options.budget_in),
        tokens=tokens,
        model=lambda: hf.load(source.checkpoint.folder, torch.float32),
        seed=options.seed,
        progress=progress,
    )


def space_needed(source: Source, plans: dict[str, LayerPlan], options: CompressOptions) -> int:
    """Bytes that will be written, at most: the tensors of the checkpoint, and what tuning keeps beside them."""
    size, tuned = sum(ref.length for ref in source.checkpoint.tensors.values()), 0
    for name, plan in plans.items():
        if not plan.dense_reason:
            N, K = linear_shape(source.model.get_submodule(name))
            size -= source.ref(f"{name}.weight").length
            size += stored_bytes(N, K, plan.nnz, plan.rank, VALUE_BITS[options.values_dtype_of(name)])
            tuned += plan.rank * (N + K) + (options.tuning_of == "all") * plan.nnz
    return size + file_bytes(tuned, options.tuning_minutes)


def _bias_bytes(source: Source, name: str) -> int:
    return source.ref(f"{name}.bias").length if source.find(f"{name}.bias") else 0
