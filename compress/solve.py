"""Solving the linear layers of one block by a method, within their plans; then storing them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress import budget
from compress.architectures import linear_shape, linears, output_rows
from compress.blocks import LayerInputs
from compress.budget import LayerPlan
from compress.importance import Importance
from compress.int4 import pack_int4
from compress.layer import LowRankSparseLinear, pack, unpack, unpack_mask
from compress.methods import (
    alps,
    cap,
    fwsvd,
    hassle_free,
    joint,
    linalg,
    magnitude,
    masks,
    oats,
    sparsegpt,
    sslc,
    svd_llm,
    three_basil,
    wanda,
)
from compress.methods.solution import Solution
from compress.options import QUANTIZED, VALUE_BITS, CompressOptions
from compress.quantize import round_to_nearest
from compress.report import LayerReport
from compress.rounding import round_in_norm
from compress.rules import MaskRule, parse_rule
from compress.source import assign
from compress.threads import side_by_side, two_at_a_time

SOLVERS: dict[str, Any] = {
    "magnitude": magnitude.solve,
    "wanda": wanda.solve,
    "sparsegpt": sparsegpt.solve,
    "oats": oats.solve,
    "alps": alps.solve,
    "joint": joint.solve,
    "hassle_free": hassle_free.solve,
    "sslc": sslc.solve,
    "three_basil": three_basil.solve,
    "cap": cap.solve,
    "svd_llm": svd_llm.solve,
    "fwsvd": fwsvd.solve,
}
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Solved:
    """What is known of a layer between solving and storing it.

    Attributes:
        plan: What it holds; with a reason to stay dense, nothing was done.
        weight: [N, K], dense, in its stored type.
        seconds: Spent on solving it.
        row_scale: [N, 1], what the errors of its outputs are weighted with; None for ones.
        mask_cost: See LayerReport.
    """

    plan: LayerPlan
    weight: Tensor
    seconds: float = 0.0
    row_scale: Tensor | None = None
    mask_cost: float | None = None


def solve_block(
    block: nn.Module,
    name: str,
    stored: dict[str, Tensor],
    inputs: dict[str, LayerInputs],
    importance: dict[str, Importance],
    plans: dict[str, LayerPlan],
    options: CompressOptions,
) -> dict[str, Solved]:
    """Replaces the linear layers of a block by compressed ones, in float32 whatever will be stored."""
    dense, rule = linears(block), parse_rule(options.mask_rule)

    def solve(layer: str) -> tuple[nn.Module, Solved]:
        full, linear = f"{name}.{layer}", dense[layer]
        plan, weight = plans[full], output_rows(linear, stored[f"{full}.weight"])
        if plan.dense_reason:
            return linear, Solved(plan, weight)
        if rule and plan.nnz > rule.most(*weight.shape):
            plan = replace(plan, nnz=rule.most(*weight.shape))
        began, W = time.perf_counter(), weight.float().contiguous()
        gram = inputs[layer].gram if layer in inputs else None
        scale = _row_scale(importance[full].outputs) if full in importance else None
        compressed = _solve(full, W, linear.bias, gram, scale, plan, options)  # type: ignore[arg-type]
        cost = _mask_cost(W, gram, plan.nnz, rule) if rule else None
        return compressed, Solved(plan, weight, time.perf_counter() - began, scale, cost)

    shapes = {layer: linear_shape(linear) for layer, linear in dense.items()}
    if side_by_side(shapes.values()):
        order = sorted(dense, key=lambda layer: -shapes[layer][0] * shapes[layer][1] ** 2)  # the longest first
        done = dict(zip(order, two_at_a_time(solve, order), strict=True))
    else:
        done = {layer: solve(layer) for layer in dense}
    for layer in dense:
        block.set_submodule(layer, done[layer][0])
    return {layer: done[layer][1] for layer in dense}


def store_block(
    block: nn.Module,
    name: str,
    stored: dict[str, Tensor],
    inputs: dict[str, LayerInputs],
    solved: dict[str, Solved],
    options: CompressOptions,
) -> list[LayerReport]:
    """Puts a block into its stored form, in the module and in `stored`, which holds the dense block's tensors.

    Values that are quantized are rounded in the norm of the layer's inputs where these have Gram matrices.
    """
    rows = []
    vectors = {tensor for tensor, value in stored.items() if value.ndim == 1}
    for layer, found in solved.items():
        full, plan = f"{name}.{layer}", found.plan
        bias = stored.get(f"{full}.bias")
        bias_bytes = 0 if bias is None else bias.numel() * bias.itemsize
        N, K = found.weight.shape
        values_dtype = options.values_dtype_of(full)
        dense = budget.dense_bytes(N, K, VALUE_BITS[values_dtype], bias_bytes)
        if plan.dense_reason:
            rows.append(LayerReport(full, N, K, 0, N * K, dense, dense, dense_reason=plan.dense_reason))
            continue
        del stored[f"{full}.weight"]
        began = time.perf_counter()
        gram = inputs[layer].gram if layer in inputs else None
        compressed = _to_stored(block.get_submodule(layer), gram, found.row_scale, values_dtype)  # type: ignore[arg-type]
        block.set_submodule(layer, compressed)
        names = ("bitmap", "values", "U", "V", *(() if compressed.scales is None else ("scales",)))
        parts = {f"{full}.{part}": getattr(compressed, part) for part in names}
        stored.update(parts)
        rows.append(
            LayerReport(
                full,
                N,
                K,
                plan.rank,
                plan.nnz,
                bytes=sum(part.nbytes for part in parts.values()) + bias_bytes,
                dense_bytes=dense,
                error=_held_out_error(found.weight.float(), compressed, inputs[layer].held_out)
                if layer in inputs
                else None,
                seconds=found.seconds + time.perf_counter() - began,
                mask_cost=found.mask_cost,
            )
        )
    for vector, parameter in list(block.named_parameters()):  # norms and biases, which refinement may have changed
        if (full := f"{name}.{vector}") in vectors:
            stored[full] = parameter.detach().to(stored[full].dtype)
            assign(block, vector, stored[full].float())
    return rows


def _solve(
    name: str,
    W: Tensor,
    bias: Tensor | None,
    gram: Tensor | None,
    row_scale: Tensor | None,
    plan: LayerPlan,
    options: CompressOptions,
) -> LowRankSparseLinear:
    """One layer [N, K] in float32.

    With √F [N, 1], `row_scale`, the method sees diag(√F)·W: what it minimises over rows and columns is then weighted by
    how much the model's output depends on each output of the layer.
    """
    scale = torch.ones(W.shape[0], 1) if row_scale is None else row_scale
    mask, S, U, V = SOLVERS[options.method](scale * W, gram, plan.nnz, plan.rank, parse_rule(options.mask_rule))
    S, U = S / scale, U / scale
    for part in (S, U, V):
        if not torch.isfinite(part).all():
            raise ArithmeticError(f"{options.method} made values of {name} that are not finite")
    return LowRankSparseLinear.from_parts(*pack(S, mask), U.contiguous(), V.contiguous(), bias)


def _to_stored(
    layer: LowRankSparseLinear, gram: Tensor | None, row_scale: Tensor | None, values_dtype: str
) -> LowRankSparseLinear:
    """A float32 layer with values, U and V of the types that are stored."""
    values, U, V = layer.values.detach(), layer.U.detach(), layer.V.detach()
    if values_dtype not in QUANTIZED:
        values, U, V = (part.to(_DTYPES[values_dtype]) for part in (values, U, V))
        return LowRankSparseLinear.from_parts(layer.bitmap, values, U, V, layer.bias)
    mask = unpack_mask(layer.bitmap, layer.in_features)
    S, bits = unpack(layer.bitmap, values, layer.in_features), VALUE_BITS[values_dtype]
    if gram is None:
        rounded, scales = round_to_nearest(S, bits)
        U, V = U.bfloat16(), V.bfloat16()
    else:
        rounded, scales, U, V = round_in_norm(Solution(mask, S, U, V), gram, bits, row_scale)
    values = torch.masked_select(rounded, mask)
    if values_dtype == "int4":
        values = pack_int4(layer.bitmap, values)
    return LowRankSparseLinear.from_parts(layer.bitmap, values, U, V, layer.bias, scales)


def _row_scale(fisher: Tensor) -> Tensor:
    """√F [N, 1] relative to its mean, within a factor of ten: no row is given up for the others."""
    return (fisher / fisher.mean().clamp_min(torch.finfo(fisher.dtype).tiny)).sqrt().clamp(0.1, 10)[:, None]


def _held_out_error(W: Tensor, layer: LowRankSparseLinear, X: Tensor) -> float:
    """‖(W − S − U·V)X‖ / ‖W·X‖ for X [tokens, K]."""
    dense = float((X @ W.T).norm())
    return float((X @ (W - layer.weight).T).norm()) / dense if dense else 0.0


def _mask_cost(W: Tensor, gram: Tensor | None, nnz: int, rule: MaskRule) -> float:
    scores = W.abs()
    if gram is not None:
        scores = scores * linalg.input_norms(gram)
    return masks.cost(scores, nnz, rule)
