"""Refinement: the kept values, U, V, biases and norms of one block, together, towards the dense model's hidden states.

    min  mean over tokens of  (y − y*)ᵀ·F·(y − y*) / ‖y*‖²

y is the block's output where the compressed blocks before it are its input, y* the dense model's hidden state there, so
that errors of the blocks before are mended, too. F [d, d] is the Fisher information of the hidden state after the block
(`compress.importance`): directions in which the model's predictions do not move may be wrong. The masks stay as they
are, and no loss on text is minimised. Sequences that no solver saw decide whether the outcome is kept.

After the block-wise refinement of 3BASiL (Makni et al., NeurIPS 2025), where F is the identity.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from compress.blocks import BlockCall, batches, block_output
from compress.trainable import fast_products, make_trainable

# The rate is what parameters may move by, and they have as much farther to go as the block is farther off: in blocks 0,
# 3, 7 and 12 of SmolLM2, with errors of 0.0013 to 0.033, the best of several was 0.011 to 0.017 times the error's root.
RATE_PER_ERROR = 0.012
LEAST_RATE = 6e-4
WARM_UP = 5  # steps
LAST = 0.05  # The rate falls along a cosine to this share.
TOKENS_PER_STEP = 512  # With 1024, in half as many steps, the error ended higher: 5 % in block 0, 0.5 % in block 12.
SHRINKAGE = 0.1  # Of F towards its diagonal: it is measured on few tokens.


def refine(
    block: nn.Module,
    name: str,
    call: BlockCall,
    inputs: Tensor,
    targets: Tensor,
    solving: int,
    fisher: Tensor | None,
    passes: int,
    seed: int,
) -> bool:
    """Refines a block in place.

    Args:
        block: With float32 LowRankSparseLinear layers.
        name: Of the block; decides, with `seed`, the order of the sequences.
        call: How the block is called.
        inputs: [n, L, d], hidden states before it.
        targets: [n, L, d], the dense model's hidden states after it.
        solving: How many of the n sequences, the first ones, are trained on; the others are held out.
        fisher: F [d, d]; None for the identity.
        passes: How many times every sequence is seen.
        seed: See `name`.

    Returns:
        Whether the error on the held-out sequences fell. If not, the block is as it was.
    """
    root = _root(fisher, inputs.shape[-1])
    layers, vectors = make_trainable(block)
    trained = [*vectors.values(), *(p for layer in layers.values() for p in layer.parameters())]
    before = [parameter.detach().clone() for parameter in trained]
    error = _mean_error(block, call, inputs[solving:], targets[solving:], root)
    better = error > 0 and bool(layers)
    if better:
        rate = max(LEAST_RATE, RATE_PER_ERROR * error**0.5)
        scaled = root / error**0.5
        _descend(block, call, inputs[:solving], targets[:solving], scaled, trained, rate, passes, name, seed)
        better = _mean_error(block, call, inputs[solving:], targets[solving:], root) < error
    for parameter, old in zip(trained, before, strict=True):
        parameter.requires_grad_(False)
        if not better:
            parameter.copy_(old)
    for layer_name, layer in layers.items():
        block.set_submodule(layer_name, layer.compressed())
    return better


def _descend(
    block: nn.Module,
    call: BlockCall,
    inputs: Tensor,
    targets: Tensor,
    root: Tensor,
    trained: list[nn.Parameter],
    rate: float,
    passes: int,
    name: str,
    seed: int,
) -> None:
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.95), fused=True)
    # A seed for each block, not one for the run: a resumed run draws the same numbers.
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    size = max(1, TOKENS_PER_STEP // inputs.shape[1])
    steps = [rows for _ in range(passes) for rows in torch.randperm(len(inputs), generator=generator).split(size)]
    for step, rows in enumerate(steps):
        cosine = LAST + (1 - LAST) * (1 + math.cos(math.pi * step / len(steps))) / 2
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARM_UP) * cosine
        with torch.enable_grad():
            _error(block, call, inputs[rows], targets[rows], root).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _mean_error(block: nn.Module, call: BlockCall, inputs: Tensor, targets: Tensor, root: Tensor) -> float:
    pairs = zip(batches(inputs), batches(targets), strict=True)
    return sum(float(_error(block, call, x, y, root)) * len(x) for x, y in pairs) / len(inputs)


def _error(block: nn.Module, call: BlockCall, inputs: Tensor, targets: Tensor, root: Tensor) -> Tensor:
    """What is minimised, over some sequences [n, L, d], with F = R·Rᵀ and R = `root`."""
    with fast_products():
        outputs = block_output(block(inputs, *call.args, **call.kwargs))
    wrong = ((outputs.float() - targets) @ root).square().sum(-1)
    size = targets.square().sum(-1)
    return (wrong / size.clamp_min(torch.finfo(size.dtype).tiny)).mean()


def _root(fisher: Tensor | None, d: int) -> Tensor:
    """R [d, d] with R·Rᵀ = F, shrunk towards its diagonal and scaled to a mean diagonal of 1."""
    if fisher is None or not float(fisher.diagonal().mean()) > 0:
        return torch.eye(d)
    F = fisher / fisher.diagonal().mean()
    ridge = SHRINKAGE * F.diagonal().diag() + 1e-3 * torch.eye(d)
    return torch.linalg.cholesky((1 - SHRINKAGE) * F + ridge)
