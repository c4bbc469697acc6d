"""The plan of a whole model: what every linear layer of its decoder blocks may hold, before any work is done."""

from __future__ import annotations

import fnmatch

from torch import Tensor

from compress.allocation import allocate
from compress.architectures import linear_shape, linears, output_rows
from compress.budget import LayerPlan, factor_cost, plan_layer, stored_bytes
from compress.importance import Importance
from compress.options import METHODS, VALUE_BITS, CompressOptions
from compress.rules import parse_rule
from compress.source import Source
from sslc_common.errors import InputError


def plan_model(source: Source, options: CompressOptions) -> dict[str, LayerPlan]:
    """A plan for every linear layer of the decoder blocks, by full name: the same share for each.

    Raises:
        InputError: a pattern of `options.exclude` matches no layer.
    """
    plans: dict[str, LayerPlan] = {}
    unmatched = set(options.exclude)
    for block in source.blocks:
        for layer, linear in linears(source.model.get_submodule(block)).items():
            name = f"{block}.{layer}"
            patterns = [pattern for pattern in options.exclude if fnmatch.fnmatchcase(name, pattern)]
            unmatched -= set(patterns)
            if patterns:
                plans[name] = LayerPlan(dense_reason=f"excluded by {patterns[0]}")
            else:
                plans[name] = plan_layer(*linear_shape(linear), options, _bias_bytes(source, name))
    if unmatched:
        raise InputError(
            "A pattern of layers to exclude matches none",
            got=", ".join(sorted(unmatched)),
            allowed=f"patterns for names such as {next(iter(plans))}",
        )
    return plans


def share_out(
    source: Source, plans: dict[str, LayerPlan], importance: dict[str, Importance], options: CompressOptions
) -> dict[str, LayerPlan]:
    """The plans of `plan_model` with their budget shared out by importance; see `compress.allocation`."""
    linear = {name: source.model.get_submodule(name) for name in plans}
    shapes = {name: linear_shape(module) for name, module in linear.items()}

    def weight(name: str) -> Tensor:
        return output_rows(linear[name], source.read(f"{name}.weight"))

    free = options.rank is None and options.rank_share is None and METHODS[options.method].low_rank
    value_bits, rule = VALUE_BITS[options.values_dtype], parse_rule(options.mask_rule)
    cost = factor_cost(options)
    return allocate(plans, shapes, weight, importance, value_bits, choose_ranks=free, rule=rule, factor_cost=cost)


def space_needed(source: Source, plans: dict[str, LayerPlan], options: CompressOptions) -> int:
    """Bytes of the tensors of the checkpoint that will be written, at most."""
    size = sum(ref.length for ref in source.checkpoint.tensors.values())
    for name, plan in plans.items():
        if not plan.dense_reason:
            N, K = linear_shape(source.model.get_submodule(name))
            size -= source.ref(f"{name}.weight").length
            size += stored_bytes(N, K, plan.nnz, plan.rank, VALUE_BITS[options.values_dtype])
    return size


def _bias_bytes(source: Source, name: str) -> int:
    return source.ref(f"{name}.bias").length if source.find(f"{name}.bias") else 0
