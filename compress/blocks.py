"""Running calibration sequences through a model one decoder block at a time.

The model is a skeleton (parameters on the meta device). Its own forward is run once with every block replaced by a
recorder, which tells what each block is called with besides the hidden states: masks, positions, rotary tables.
Nothing here knows how a family computes them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.layer import keep_decoded
from compress.source import Source, assign

TOKENS_PER_BATCH = 2048  # Bounds the activations inside a block; more tokens at once were not faster.
GRAM_STRIP = 192  # Columns of a Gram matrix that are added to at a time; 96 to 384 were about as fast.
SPILL_BYTES = 256 << 20  # Hidden states larger than this live in a file.


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class LayerInputs:
    """What a linear layer sees during calibration.

    Attributes:
        gram: X·Xᵀ / tokens [K, K] over the sequences for solving; None if it was not asked for.
        held_out: [tokens, K] of the held-out sequences.
    """

    gram: Tensor | None
    held_out: Tensor


def embed(source: Source, tokens: Tensor, spill: Path) -> tuple[Tensor, list[BlockCall]]:
    """The hidden states before the first block, and how each block is called.

    Args:
        source: Its embeddings and final norm are loaded and dropped again.
        tokens: int64 [n, L].
        spill: File for the hidden states if they are large.

    Returns:
        float32 [n, L, hidden size] and one call per block, with batch size 1: masks and tables broadcast.
    """
    body = source.model.base_model
    prefix = f"{source.model.base_model_prefix}."
    blocks = [source.model.get_submodule(name) for name in source.blocks]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = {name: p for name, p in body.named_parameters() if id(p) not in inside}
    embeddings = [module for module in body.modules() if isinstance(module, nn.Embedding)]
    tables = {id(module.weight) for module in embeddings}

    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def recorder(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(BlockCall(args, kwargs))
        first.append(hidden)
        return hidden

    # An embedding table stays in its stored dtype, as the largest tensor of many models; what it yields is widened.
    hooks = [module.register_forward_hook(lambda _, __, output: output.float()) for module in embeddings]
    for name, parameter in outside.items():
        tensor = source.read(prefix + name)
        assign(body, name, tensor if id(parameter) in tables else tensor.float())
    for block in blocks:
        block.forward = recorder
    try:
        hidden: Tensor | None = None
        for index, sequence in enumerate(tokens):
            calls.clear()
            first.clear()
            body(sequence[None], use_cache=False)
            if hidden is None:
                hidden = _storage((*tokens.shape, first[0].shape[-1]), spill)
            hidden[index] = first[0][0]
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks:
            del block.forward
        for name, parameter in outside.items():
            assign(body, name, parameter.data)
    assert hidden is not None
    return hidden, calls


def run(block: nn.Module, call: BlockCall, hidden: Tensor) -> None:
    """Replaces the hidden states [n, L, d] by the block's outputs, in place."""
    keep_decoded(block)
    for batch in batches(hidden):
        batch.copy_(block_output(block(batch, *call.args, **call.kwargs)))
    keep_decoded(block, False)


def collect_inputs(
    block: nn.Module, layers: dict[str, nn.Module], call: BlockCall, hidden: Tensor, solving: int, gram: bool
) -> dict[str, LayerInputs]:
    """Runs the block and gathers what each linear layer sees; layers with one input share one LayerInputs.

    Args:
        block: With dense weights.
        layers: Its linear layers by name.
        call: How the block is called.
        hidden: [n, L, d], left as it is.
        solving: How many of the n sequences, the first ones, make the Gram matrices; the others are held out.
        gram: Whether Gram matrices are wanted at all.
    """
    leaders = _shared_inputs(block, layers, call, hidden[:1])
    seen = {name: layers[name] for name in set(leaders.values())}
    grams: dict[str, Tensor] = {}
    kept: dict[str, list[Tensor]] = {name: [] for name in seen}
    tokens = solving * hidden.shape[1]

    def add_to_gram(name: str, x: Tensor) -> None:
        if name not in grams:
            grams[name] = torch.zeros(x.shape[1], x.shape[1])
        for first in range(0, x.shape[1], GRAM_STRIP):  # the upper triangle, as the Gram matrix is symmetric
            end = first + GRAM_STRIP
            grams[name][:end, first:end].addmm_(x[:, :end].T, x[:, first:end], alpha=1 / tokens)

    if gram:
        _observe(block, seen, call, hidden[:solving], add_to_gram)
        for G in grams.values():
            for first in range(0, len(G), GRAM_STRIP):
                end = first + GRAM_STRIP
                G[end:, first:end] = G[first:end, end:].T
    _observe(block, seen, call, hidden[solving:], lambda name, x: kept[name].append(x))
    inputs = {name: LayerInputs(grams.get(name), torch.cat(xs)) for name, xs in kept.items()}
    return {name: inputs[leader] for name, leader in leaders.items()}


def batches(hidden: Tensor) -> Iterator[Tensor]:
    """Views of hidden states [n, L, d] of about TOKENS_PER_BATCH tokens."""
    yield from hidden.split(max(1, TOKENS_PER_BATCH // hidden.shape[1]))


class _AllSeenError(Exception):
    """Ends the run of a block whose outputs are not wanted."""


def _shared_inputs(block: nn.Module, layers: dict[str, nn.Module], call: BlockCall, hidden: Tensor) -> dict[str, str]:
    """For each layer, the first layer that is given the very same values (q, k and v; gate and up)."""
    seen: dict[str, Tensor] = {}
    _observe(block, layers, call, hidden, seen.__setitem__)
    return {
        name: next(other for other, y in seen.items() if y.data_ptr() == x.data_ptr() and y.shape == x.shape)
        for name, x in seen.items()
    }


def _observe(
    block: nn.Module,
    layers: dict[str, nn.Module],
    call: BlockCall,
    hidden: Tensor,
    see: Callable[[str, Tensor], object],
) -> None:
    """Runs the block on hidden states and calls `see` with the name and the input [tokens, K] of each layer."""
    handles, missing = [], set(layers)
    for name, layer in layers.items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            see(name, args[0].reshape(-1, args[0].shape[-1]))
            missing.discard(name)
            if not missing:
                raise _AllSeenError  # the last layer's product, one of the largest, is not wanted

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        for batch in batches(hidden):
            missing.update(layers)
            with suppress(_AllSeenError):
                block(batch, *call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()


def block_output(output: Any) -> Tensor:
    """The hidden states of what a block returns."""
    return output[0] if isinstance(output, tuple) else output


def return_freed_memory() -> None:
    """Hands freed tensors back to the system.

    glibc keeps freed memory in its heap, in pieces that later blocks do not fit into: without this, 8 blocks of
    LLaMA-7B's shape needed 13 % more memory than 4 (scripts/bench_memory.py).
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def spilled_bytes(source: Source, tokens: Tensor) -> int:
    """Size of the file that the hidden states of tokens [n, L] will need, 0 if they stay in memory."""
    size = 4 * tokens.numel() * source.model.config.hidden_size
    return size if size > SPILL_BYTES else 0


def _storage(shape: tuple[int, ...], spill: Path) -> Tensor:
    """Zeros, float32, for hidden states: in memory or, if large, in a file whose pages the system can write back."""
    size = 4 * torch.Size(shape).numel()
    if size <= SPILL_BYTES:
        return torch.zeros(shape)
    with spill.open("wb") as file:
        # Without this a full disk would show as SIGBUS on some later write to the mapping.
        os.posix_fallocate(file.fileno(), 0, size)
    return torch.from_file(str(spill), shared=True, size=size // 4, dtype=torch.float32).view(shape)
