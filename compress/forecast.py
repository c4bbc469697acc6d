"""What a compression will take on this machine, said before it begins: seconds and memory.

Seconds are multiplications over the rate at which PyTorch multiplies matrices here, which is measured in a moment.
What solving a layer takes beside products (eigenvectors, sorting) is counted as so many products of [N, K] by [K, K],
measured on layers of 1536 × 576, 576 × 1536 and 1024 × 2048.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from compress import importance, tuning
from compress.architectures import linear_shape, linears
from compress.blocks import SPILL_BYTES
from compress.calibration import HELD_OUT_EVERY
from compress.options import METHODS, CompressOptions
from compress.refinement import TOKENS_PER_STEP
from compress.source import Source
from compress.threads import side_by_side
from compress.trainable import has_fast_products

# Products of [N, K] by [K, K] that take as long as solving a layer without a low-rank part, and with one.
PRODUCTS = {
    "joint": (80, 95),
    "magnitude": (1, 1),
    "wanda": (1, 1),
    "sparsegpt": (12, 12),
    "alps": (80, 80),
    "hassle_free": (80, 190),
    "three_basil": (80, 1000),
    "oats": (2, 100),
    "sslc": (12, 30),
    "cap": (40, 90),
    "svd_llm": (7, 7),
    "fwsvd": (3, 3),
}
_EFFICIENCY = 0.66  # Of the best rate, counting all that is no product: SmolLM2's blocks on one thread of a Zen 3.
_PROCESS = 450 << 20  # PyTorch and transformers themselves


@dataclass(frozen=True)
class Forecast:
    """What a compression will take.

    Attributes:
        seconds: Without tuning, whose time is chosen.
        memory: Peak resident bytes.
    """

    seconds: float
    memory: int


def forecast(source: Source, options: CompressOptions, rate: float | None = None) -> Forecast:
    """Seconds and memory of `compress_model`.

    Args:
        source: The dense model.
        options: What to do.
        rate: Floating-point operations per second; measured if it is not given.
    """
    sequences = options.calibration_tokens // options.sequence_length
    tokens = sequences * options.sequence_length if METHODS[options.method].calibrated or options.calibration else 0
    held_out = max(1, sequences // HELD_OUT_EVERY) * options.sequence_length if tokens else 0
    solving, refining = tokens - held_out, options.refinement if tokens else 0
    measured = min(solving, importance.TOKENS) if options.allocation != "uniform" else 0
    low_rank = any(map(options.share_of, options.values_dtypes)) or bool(options.rank)
    products = PRODUCTS[options.method][low_rank]
    d = source.model.config.hidden_size
    operations, memory = 0.0, 0
    for block in source.blocks:
        shapes = {name: linear_shape(layer) for name, layer in linears(source.model.get_submodule(block)).items()}
        weights = sum(N * K for N, K in shapes.values())
        # Layers of the same module and width nearly always have the same input.
        inputs = {(name.rpartition(".")[0], K) for name, (_, K) in shapes.items()}
        grams = sum(K * K for _, K in inputs) if METHODS[options.method].calibrated else 0
        forward = 2 * weights + 4 * options.sequence_length * d  # of one token
        operations += 2 * forward * tokens + grams * solving  # one half of each Gram matrix is multiplied
        operations += sum(2 * products * N * K * K for N, K in shapes.values())
        operations += 4 * forward * measured  # up, down, and its gradient
        operations += (refining > 0) * forward * (tokens - measured + 2 * held_out)
        operations += refining * 3 * forward * solving / (2 if has_fast_products() else 1)
        memory = max(memory, _block_memory(list(shapes.values()), grams, d, options, refining > 0))
    head = source.model.get_output_embeddings().weight
    if measured:
        operations += 6 * head.numel() * measured
        # The head, and logits, probabilities and their sums for a sequence.
        memory = max(memory, head.numel() * head.itemsize + 12 * options.sequence_length * head.shape[0])
    states = 4 * tokens * d
    memory += (1 + (refining > 0)) * states * (states <= SPILL_BYTES)
    if options.tuning_minutes:
        memory = max(memory, _tuning_memory(source, options))
    return Forecast(operations / (_EFFICIENCY * (rate or measure_rate())), _PROCESS + memory)


def measure_rate() -> float:
    """Floating-point operations per second of PyTorch's float32 products, at best."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = min(_seconds(a, b) for _ in range(8))
    return 2 * a.numel() * b.shape[1] / best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    began = time.perf_counter()
    a @ b
    return time.perf_counter() - began


def _block_memory(shapes: list[tuple[int, int]], grams: int, d: int, options: CompressOptions, refining: bool) -> int:
    """Bytes while a block is worked on: it is solved with its Gram matrices, and then refined without them."""
    weights = sum(N * K for N, K in shapes)
    squares = 5 if PRODUCTS[options.method][0] > 3 else 1
    layers = sorted((8 * N * K + squares * K * K for N, K in shapes), reverse=True)
    solving = 4 * (grams + sum(layers[: 2 if side_by_side(shapes) else 1]))
    kept = options.budget * weights
    # Values, their gradients, two moments and what they were; where they go; S and its gradient, dense; activations.
    refining_bytes = refining * (28 * kept + 8 * weights + _activations(TOKENS_PER_STEP, d, shapes))
    return int(4 * weights + 4 * weights / 2 + max(solving, refining_bytes))


def _activations(tokens: int, d: int, shapes: list[tuple[int, int]]) -> int:
    """Bytes that a block keeps of so many tokens for its gradients."""
    return 4 * tokens * (16 * d + 4 * max(N for N, _ in shapes))


def _tuning_memory(source: Source, options: CompressOptions) -> int:
    """Bytes while the whole model is tuned: all of both models, and what every block keeps of a step's tokens."""
    model, tokens = source.model, tuning.SEQUENCES_PER_STEP * options.sequence_length
    blocks = [[linear_shape(x) for x in linears(model.get_submodule(block)).values()] for block in source.blocks]
    weights = sum(N * K for shapes in blocks for N, K in shapes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # Values and where they go; if they are tuned, their gradients and two moments.
    kept = (24 if options.tuning_of == "all" else 12) * options.budget * weights
    models = 4 * parameters + 4 * (parameters - weights) + kept + 4 * weights  # the last: S of every layer, dense
    return int(models + sum(_activations(tokens, model.config.hidden_size, shapes) for shapes in blocks))
