"""How much the model's output depends on every output of every linear layer: one backward pass, block by block.

With a label drawn from the model's own prediction, the squared gradient of the log-likelihood with respect to a layer's
output y_n is, averaged over tokens, the diagonal of the Fisher information in y: to second order, an error e_n in y_n
costs F_n·e_n²/2 nats of Kullback-Leibler divergence from the dense model. No loss on text is minimised.

The states between blocks are written to files on the way up, and each block is run once more on the way down, so that
memory holds one block, whatever their number. Refinement, which aims at the same states, reads them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.architectures import linear_shape, linears
from compress.blocks import BlockCall, batches, block_output, embed, return_freed_memory, run
from compress.format import Progress, no_progress
from compress.shards import read_header, read_tensor, write_shard
from compress.source import Source, assign
from sslc_common.files import remove

TOKENS = 8192  # More of them changed the allocation little.
HEAD_ROWS = 8192  # of the output head that are widened to float32 at a time

# What is measured of the states between blocks, a file for each, as all of them may be large:
HIDDEN = "hidden"  # The states themselves, float32 [n, L, d].
FISHER = "F"  # Their Fisher information [d, d]: the mean over tokens of g·gᵀ, g the gradient there.
_FIRST = "first"  # In the place of a block's name, for the states before the first one.


@dataclass(frozen=True)
class Importance:
    """Of one linear layer.

    Attributes:
        outputs: [N], mean over tokens of the squared gradient at each output.
        inputs: [K], mean over tokens of the squared input.
    """

    outputs: Tensor
    inputs: Tensor


def measure(
    source: Source, tokens: Tensor, states: Path, seed: int, progress: Progress = no_progress
) -> dict[str, Importance]:
    """The importance of every linear layer of the decoder blocks, by full name.

    Args:
        source: The dense model.
        tokens: int64 [n, L]; the first ones, about TOKENS of them, are used.
        states: Folder for what `load_state` reads.
        seed: Of the drawn labels.
        progress: Wraps the loop over blocks.
    """
    tokens, spill = _first(tokens), states / "spill.bin"
    states.mkdir(exist_ok=True)
    try:
        hidden, calls = embed(source, tokens, spill)
        _save_state(states, _FIRST, HIDDEN, hidden)
        for name, call in zip(source.blocks, calls, strict=True):
            source.load_block(name)
            run(source.model.get_submodule(name), call, hidden)
            _save_state(states, name, HIDDEN, hidden)
            source.model.get_submodule(name).to("meta")
            return_freed_memory()
        gradient = _head_gradient(source, tokens, hidden, seed)
    finally:
        remove(spill)
    del hidden
    found: dict[str, Importance] = {}
    order = list(zip(source.blocks, (_FIRST, *source.blocks[:-1]), calls, strict=True))[::-1]
    for name, before, call in progress(order, "Measuring importance"):
        source.load_block(name)
        block = source.model.get_submodule(name)
        flat = gradient.flatten(0, 1)
        _save_state(states, name, FISHER, flat.T @ flat / len(flat))
        inputs = load_state(states, before, HIDDEN)
        assert inputs is not None
        found |= {f"{name}.{layer}": value for layer, value in _block(block, call, inputs, gradient).items()}
        block.to("meta")
        return_freed_memory()
    return found


def save(path: Path, importance: dict[str, Importance]) -> None:
    """Writes importances, whole or not at all."""
    write_shard(path, {f"{name}.{key}": value for name, i in importance.items() for key, value in vars(i).items()})


def load(path: Path) -> dict[str, Importance]:
    """The inverse of `save`.

    Raises:
        InputError: the file is damaged.
    """
    # Copies: each tensor would keep a mapping of the whole file, and the system counts its pages as often.
    tensors = {name: read_tensor(name, ref).clone() for name, ref in read_header(path).items()}
    layers = {name.rpartition(".")[0] for name in tensors}
    return {name: Importance(tensors[f"{name}.outputs"], tensors[f"{name}.inputs"]) for name in layers}


def load_state(states: Path, block: str, what: str) -> Tensor | None:
    """HIDDEN or FISHER of the states after a block, in float32; None if they were not measured.

    Raises:
        InputError: the file is damaged.
    """
    path = _state_file(states, block, what)
    return read_tensor(what, read_header(path)[what]) if path.is_file() else None


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """An index [n] from each row of probabilities [n, V], by where a uniform number falls among their sums.

    torch.multinomial draws a number for every one of the V, and takes nine times as long with 49152 of them.
    """
    sums = probabilities.cumsum(-1)
    uniform = torch.rand(len(sums), 1, generator=generator)  # below 1, so that the last sum is not reached
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0]


def state_bytes(source: Source, tokens: Tensor) -> int:
    """Size of what `measure` writes for tokens [n, L]."""
    d, blocks = source.model.config.hidden_size, len(source.blocks)
    return 4 * d * ((blocks + 1) * _first(tokens).numel() + blocks * d)


def _save_state(states: Path, block: str, what: str, tensor: Tensor) -> None:
    write_shard(_state_file(states, block, what), {what: tensor})


def _state_file(states: Path, block: str, what: str) -> Path:
    return states / f"{block}.{what}.safetensors"


def _first(tokens: Tensor) -> Tensor:
    return tokens[: max(1, TOKENS // tokens.shape[1])]


def _head_gradient(source: Source, tokens: Tensor, hidden: Tensor, seed: int) -> Tensor:
    """Gradient [n, L, d] of −log p(label) with respect to the last block's output [n, L, d], a label per token.

    The model's own forward does it, with the blocks replaced: the last one hands over `hidden`.
    """
    model, gradient = source.model, torch.empty_like(hidden)
    blocks: list[Any] = [model.get_submodule(name) for name in source.blocks]
    head: Any = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    before = {name: model.get_parameter(name) for name in source.outside_blocks()}
    generator = torch.Generator().manual_seed(seed)
    current: list[Tensor] = []

    # Embedding tables and the head stay in their stored dtype, as the largest tensors of many models.
    hooks = [module.register_forward_hook(lambda _, __, output: output.float()) for module in tables]
    wide = {id(module.weight) for module in (*tables, head)}
    head_before = head.weight
    for name, parameter in before.items():
        tensor = source.read(name)
        assign(model, name, tensor if id(parameter) in wide else tensor.float())
    if head.weight.is_meta:  # tied to the input embeddings, and not in the files
        head.weight = model.get_input_embeddings().weight
    for block in blocks:
        block.forward = lambda _, *args, **kwargs: current[0]
    if head.weight.dtype != torch.float32:
        head.forward = lambda x: _WideLinear.apply(x, head.weight, head.bias)
    try:
        for index, sequence in enumerate(tokens):
            with torch.enable_grad():
                current[:] = [hidden[index, None].clone().requires_grad_()]
                logits = model(sequence[None], use_cache=False).logits
                slope = logits.detach()[0].softmax(-1)  # of −log p(label) at the logits: p, less 1 at the label
                slope[torch.arange(len(sequence)), draw(slope, generator)] -= 1
                logits.backward(slope[None])
            assert current[0].grad is not None
            gradient[index] = current[0].grad[0]
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks:
            del block.forward
        vars(head).pop("forward", None)
        for name, parameter in before.items():
            assign(model, name, parameter.data)
        head.weight = head_before
    return gradient


class _WideLinear(torch.autograd.Function):
    """x·Wᵀ + b in float32 for W [V, d] of 16 bits, some rows of it widened at a time; x alone has a gradient.

    Processors without instructions for bfloat16 multiply it slowly: one thread of a Zen 3 came to 7 GFLOP/s forwards
    and to 0.3 backwards, at which the head of LLaMA-7B and TOKENS take two hours.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = x.new_empty(*x.shape[:-1], len(weight))
        for part, rows in zip(y.split(HEAD_ROWS, -1), weight.split(HEAD_ROWS), strict=True):
            part.copy_(x @ rows.float().T)
        return y if bias is None else y.add_(bias.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ((weight,), (gradient,)) = ctx.saved_tensors, gradients
        found = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        for part, rows in zip(gradient.split(HEAD_ROWS, -1), weight.split(HEAD_ROWS), strict=True):
            found += part @ rows.float()
        return found, None, None


def _block(block: nn.Module, call: BlockCall, inputs: Tensor, gradient: Tensor) -> dict[str, Importance]:
    """The importance of a block's layers, from its inputs and the gradient at its outputs, [n, L, d] each.

    The gradient at its inputs replaces that at its outputs, in place.
    """
    layers, tokens = linears(block), gradient.shape[0] * gradient.shape[1]
    outputs = {name: torch.zeros(linear_shape(layer)[0]) for name, layer in layers.items()}
    squares = {name: torch.zeros(linear_shape(layer)[1]) for name, layer in layers.items()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def backward(g: Tensor) -> None:
            outputs[name] += g.flatten(0, -2).square().sum(0)

        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            squares[name] += args[0].detach().flatten(0, -2).square().sum(0)
            output.register_hook(backward)

        return forward

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for states, grad in zip(batches(inputs), batches(gradient), strict=True):
            with torch.enable_grad():
                x = states.clone().requires_grad_()
                block_output(block(x, *call.args, **call.kwargs)).backward(grad)
            assert x.grad is not None
            grad.copy_(x.grad)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Importance(outputs[name] / tokens, squares[name] / tokens) for name in layers}
