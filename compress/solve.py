"""Solving the linear layers of one block by a method, within their plans."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress import budget
from compress.architectures import linear_shape, linears, output_rows
from compress.blocks import LayerInputs
from compress.budget import LayerPlan
from compress.importance import Importance
from compress.int8 import round_to_int8
from compress.layer import LowRankSparseLinear, pack
from compress.methods import (
    alps,
    cap,
    fwsvd,
    hassle_free,
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
from compress.options import VALUE_BYTES, CompressOptions
from compress.report import LayerReport
from compress.rules import MaskRule, parse_rule

SOLVERS: dict[str, Any] = {
    "magnitude": magnitude.solve,
    "wanda": wanda.solve,
    "sparsegpt": sparsegpt.solve,
    "oats": oats.solve,
    "alps": alps.solve,
    "hassle_free": hassle_free.solve,
    "sslc": sslc.solve,
    "three_basil": three_basil.solve,
    "cap": cap.solve,
    "svd_llm": svd_llm.solve,
    "fwsvd": fwsvd.solve,
}
_FACTOR_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


def compress_block(
    block: nn.Module,
    name: str,
    stored: dict[str, Tensor],
    inputs: dict[str, LayerInputs],
    importance: dict[str, Importance],
    plans: dict[str, LayerPlan],
    options: CompressOptions,
) -> list[LayerReport]:
    """Replaces the linear layers of a block by compressed ones, in the module and in `stored`."""
    rows, value_bytes = [], VALUE_BYTES[options.values_dtype]
    for layer, linear in linears(block).items():
        full = f"{name}.{layer}"
        plan, (N, K) = plans[full], linear_shape(linear)
        bias = stored.get(f"{full}.bias")
        bias_bytes = 0 if bias is None else bias.numel() * bias.itemsize
        dense = budget.dense_bytes(N, K, value_bytes, bias_bytes)
        if plan.dense_reason:
            rows.append(LayerReport(full, N, K, 0, N * K, dense, dense, dense_reason=plan.dense_reason))
            continue
        rule = parse_rule(options.mask_rule)
        if rule and plan.nnz > rule.most(N, K):
            plan = replace(plan, nnz=rule.most(N, K))
        began = time.perf_counter()
        W = output_rows(linear, linear.weight).contiguous()  # type: ignore[arg-type]
        rows_fisher = importance[full].outputs if full in importance else None
        compressed = _solve(full, W, linear.bias, inputs.get(layer), rows_fisher, plan, options)  # type: ignore[arg-type]
        rows.append(
            LayerReport(
                full,
                N,
                K,
                plan.rank,
                plan.nnz,
                bytes=budget.stored_bytes(N, K, plan.nnz, plan.rank, value_bytes, bias_bytes),
                dense_bytes=dense,
                error=_held_out_error(W, compressed, inputs[layer].held_out) if layer in inputs else None,
                seconds=time.perf_counter() - began,
                mask_cost=_mask_cost(W, inputs.get(layer), plan.nnz, rule) if rule else None,
            )
        )
        del stored[f"{full}.weight"]
        for part in ("bitmap", "values", "U", "V", *(() if compressed.scales is None else ("scales",))):
            stored[f"{full}.{part}"] = getattr(compressed, part)
        block.set_submodule(layer, compressed)
    return rows


def _solve(
    name: str,
    W: Tensor,
    bias: Tensor | None,
    inputs: LayerInputs | None,
    fisher: Tensor | None,
    plan: LayerPlan,
    options: CompressOptions,
) -> LowRankSparseLinear:
    """One layer [N, K], its values as they will be stored.

    With F [N], `fisher`, the method sees diag(√F)·W: what it minimises over rows and columns is then weighted by how
    much the model's output depends on each output of the layer.
    """
    with torch.random.fork_rng(devices=[]):
        # A seed for each layer, not one for the run: a resumed run draws the same numbers.
        torch.manual_seed(options.seed + zlib.crc32(name.encode()))
        gram = None if inputs is None else inputs.gram
        scale = torch.ones(W.shape[0], 1) if fisher is None else _row_scale(fisher)
        rule = parse_rule(options.mask_rule)
        mask, S, U, V = SOLVERS[options.method](scale * W.detach(), gram, plan.nnz, plan.rank, rule)
    parts = (S / scale, U / scale, V)
    for part in parts:
        if not torch.isfinite(part).all():
            raise ArithmeticError(f"{options.method} made values of {name} that are not finite")
    S, U, V = (part.to(_FACTOR_DTYPES[options.values_dtype]).contiguous() for part in parts)
    if options.values_dtype == "int8":
        rounded, scales = round_to_int8(parts[0] * mask, None if gram is None else gram.diagonal())
        return LowRankSparseLinear.from_parts(*pack(rounded, mask), U, V, bias, scales)
    return LowRankSparseLinear.from_parts(*pack(S, mask), U, V, bias)


def _row_scale(fisher: Tensor) -> Tensor:
    """√F [N, 1] relative to its mean, within a factor of ten: no row is given up for the others."""
    return (fisher / fisher.mean().clamp_min(torch.finfo(fisher.dtype).tiny)).sqrt().clamp(0.1, 10)[:, None]


def _held_out_error(W: Tensor, layer: LowRankSparseLinear, X: Tensor) -> float:
    """‖(W − S − U·V)X‖ / ‖W·X‖ for X [tokens, K]."""
    dense = float((X @ W.T).norm())
    return float((X @ (W - layer.weight).T).norm()) / dense if dense else 0.0


def _mask_cost(W: Tensor, inputs: LayerInputs | None, nnz: int, rule: MaskRule) -> float:
    scores = W.detach().abs()
    if inputs is not None and inputs.gram is not None:
        scores = scores * linalg.input_norms(inputs.gram)
    return masks.cost(scores, nnz, rule)
