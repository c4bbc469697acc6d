"""Will it pay? Bytes and speed of an engine for CPUs, from its layers' shapes and what the machine can do.

Decode reads every weight once per token, so a layer takes its bytes over the share of the read bandwidth that its loop
reaches. Prefill computes, so a layer takes its operations over the dense peak, times a measured ratio. What is not a
linear layer (attention, norms, sampling the cache) takes the same time in both engines. Nothing else is modelled;
docs/prediction.md shows how far off that is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sslc_export.machine import Machine

if TYPE_CHECKING:
    from compress.options import CompressOptions

PREFILL_TOKENS = 512

# Share of the read bandwidth at one token, from the layer of 4096 × 4096 with half of the parameters kept and from
# SmolLM2 (docs/prediction.md). avx512_bf16 was measured on Zen 5, and avx512 and amx are the same at one token; int4 on
# Emerald Rapids. avx2 and portable: as much less as their ratio to dense is below that of avx512 (docs/kernel-cpu.md);
# int4 with avx2 by its ratio on Zen 3. Not measured is int4 with portable, and below with avx512: taken as int8's.
# One thread of ONNX Runtime's dense MatMul leaves more of its bandwidth unused than two.
_DENSE_STREAM, _DENSE_STREAM_THREADS = 0.79, 0.92
_STREAM = {
    "amx": {"f32": 0.85, "bf16": 0.78, "int8": 0.68, "int4": 0.47},
    "avx512_bf16": {"f32": 0.85, "bf16": 0.78, "int8": 0.68, "int4": 0.47},
    "avx512": {"f32": 0.85, "bf16": 0.78, "int8": 0.68, "int4": 0.47},
    "avx2": {"f32": 0.75, "bf16": 0.48, "int8": 0.42, "int4": 0.22},
    "portable": {"f32": 0.14, "bf16": 0.06, "int8": 0.06, "int4": 0.06},
}
# Dense operations per second over ONNX Runtime's dense float32 ones, from 128 to 512 tokens, where half of the
# parameters are kept (the same tables; avx2 on Zen 3, where dense has no more; amx of SmolLM2, larger layers are up to
# twice as fast). f32 computes on what is kept only,
# the others on all of it.
_COMPUTE = {
    "amx": {"f32": 1.25, "bf16": 2.3, "int8": 1.85, "int4": 1.85},
    "avx512_bf16": {"f32": 1.25, "bf16": 1.65, "int8": 1.55, "int4": 1.55},
    "avx512": {"f32": 1.25, "bf16": 1.31, "int8": 1.55, "int4": 1.55},
    "avx2": {"f32": 1.5, "bf16": 1.4, "int8": 1.1, "int4": 1.0},
    "portable": {"f32": 0.37, "bf16": 0.31, "int8": 0.2, "int4": 0.2},
}
# Everything but linear layers, in seconds of one thread: per block and token at decode, and per block, token and hidden
# feature at prefill. From SmolLM2-135M (docs/prediction.md).
_DECODE_REST = 90e-6
_PREFILL_REST = 13e-9


@dataclass(frozen=True)
class Part:
    """A linear layer as an engine holds it.

    Attributes:
        name: Its module name.
        N: Outputs.
        K: Inputs.
        bytes: That a token reads.
        values: Type of the stored values: "f32", "bf16", "int8" or "int4"; None if it is dense, in float32.
        kept: (nnz + r(N + K)) / NK; 1 if it is dense.
        reason: Why it is dense; empty if it is not, or if it never could be anything else.
    """

    name: str
    N: int
    K: int
    bytes: int
    values: str | None = None
    kept: float = 1.0
    reason: str = ""

    def dense(self) -> Part:
        """The same layer in the dense engine."""
        return Part(self.name, self.N, self.K, 4 * self.N * self.K)

    def decode(self, machine: Machine) -> float:
        """Seconds for one token."""
        dense = _DENSE_STREAM if machine.threads == 1 else _DENSE_STREAM_THREADS
        share = _STREAM[machine.kernel][self.values] if self.values else dense
        return self.bytes / (machine.bandwidth * share)

    def prefill(self, machine: Machine, tokens: int = PREFILL_TOKENS) -> float:
        """Seconds for many tokens."""
        seconds = 2 * tokens * self.N * self.K / machine.peak
        if self.values is None:
            return seconds
        work = self.kept / 0.5 if self.values == "f32" else 1.0
        return seconds * work / _COMPUTE[machine.kernel][self.values]


@dataclass(frozen=True)
class Prediction:
    """What an engine would bring on a machine.

    Attributes:
        parts: Its linear layers, lm_head among them.
        blocks: Decoder blocks.
        hidden: Hidden features.
        machine: Where.
    """

    parts: tuple[Part, ...]
    blocks: int
    hidden: int
    machine: Machine

    @property
    def decode_speedup(self) -> float:
        """Dense time over the engine's for one token, of the whole model."""
        rest = _DECODE_REST * self.blocks / self.machine.threads
        dense, ours = (sum(part.decode(self.machine) for part in parts) for parts in (self._dense(), self.parts))
        return (dense + rest) / (ours + rest)

    @property
    def prefill_speedup(self) -> float:
        """The same for a prompt of 512 tokens."""
        rest = _PREFILL_REST * self.blocks * self.hidden * PREFILL_TOKENS / self.machine.threads
        dense, ours = (sum(part.prefill(self.machine) for part in parts) for parts in (self._dense(), self.parts))
        return (dense + rest) / (ours + rest)

    def slower(self) -> dict[str, str]:
        """Compressed layers that take longer than dense ones at decode, and the reason in words."""
        return {
            part.name: f"predicted to decode {dense / ours:.2f}× as fast as dense by the {self.machine.kernel} kernel"
            for part in self.parts
            if part.values and (ours := part.decode(self.machine)) > (dense := part.dense().decode(self.machine))
        }

    def reasons(self) -> dict[str, int]:
        """Why layers stay dense, and how many."""
        return dict(Counter(part.reason for part in self.parts if part.reason))

    def _dense(self) -> Iterable[Part]:
        return (part.dense() for part in self.parts)

    def table(self) -> list[tuple[str, ...]]:
        """Rows under HEADER: layers that are alike in all blocks share one, then the whole model."""
        alike: dict[tuple[object, ...], list[Part]] = {}
        for part in self.parts:
            # The last two names of "model.layers.3.mlp.up_proj".
            key = (".".join(part.name.split(".")[-2:]), part.N, part.K, part.bytes, part.values, part.reason)
            alike.setdefault(key, []).append(part)
        rows = [self._row(str(key[0]), parts) for key, parts in alike.items()]
        megabytes = [sum(part.bytes for part in parts) / 1e6 for parts in (list(self._dense()), self.parts)]
        total = (f"{self.decode_speedup:.2f}×", f"{self.prefill_speedup:.2f}×")
        return [*rows, ("whole model", "", "", *(f"{size:.1f}" for size in megabytes), *total, "")]

    def _row(self, name: str, parts: Sequence[Part]) -> tuple[str, ...]:
        part, count = parts[0], len(parts)
        dense = part.dense()
        return (
            name,
            str(count),
            f"{part.N} × {part.K}",
            *(f"{count * size / 1e6:.1f}" for size in (dense.bytes, part.bytes)),
            f"{dense.decode(self.machine) / part.decode(self.machine):.2f}×",
            f"{dense.prefill(self.machine) / part.prefill(self.machine):.2f}×",
            f"{part.values}, {part.kept:.0%}" if part.values else "dense",
        )


HEADER = ("layers", "", "N × K", "dense MB", "MB", "decode", f"prefill {PREFILL_TOKENS}", "kept as")


def predict_build(source: Path, options: CompressOptions, machine: Machine, *, compress_slower: bool) -> Prediction:
    """What compressing a dense folder would bring, before any work: each layer has the same share of the budget.

    Args:
        source: The folder.
        options: Of the compression.
        machine: Where the engine is to run.
        compress_slower: Whether layers that would be slower than dense are compressed all the same.

    Raises:
        InputError: bad input, as `compress_model` would say.
    """
    from compress.budget import parameters, stored_bytes
    from compress.options import VALUE_BITS
    from compress.planning import plan_model
    from compress.source import Source

    dense = Source.open(source)
    plans = plan_model(dense, options)
    parts = []
    for name, N, K in _linears(dense.model):
        plan = plans.get(name)
        if plan is None:  # the head
            kept = Part(name, N, K, 4 * N * K)
            rounded = Part(name, N, K, stored_bytes(N, K, N * K, 0, VALUE_BITS["int8"]), "int8")
            parts.append(rounded if options.head == "int8" else kept)
        elif plan.dense_reason:
            parts.append(Part(name, N, K, 4 * N * K, reason=plan.dense_reason))
        else:
            values_dtype = options.values_dtype_of(name)
            size = stored_bytes(N, K, plan.nnz, plan.rank, VALUE_BITS[values_dtype])
            kept_share = parameters(N, K, plan.nnz, plan.rank) / (N * K)
            parts.append(Part(name, N, K, size, values_dtype, kept_share))
    predicted = Prediction(tuple(parts), *_size(dense.model.config), machine)
    if compress_slower:
        return predicted
    slower = predicted.slower()
    chosen = [replace(part.dense(), reason=slower[part.name]) if part.name in slower else part for part in parts]
    return replace(predicted, parts=tuple(chosen))


def predict_checkpoint(folder: Path, machine: Machine) -> Prediction:
    """What a folder, compressed or dense, would bring as an engine.

    Raises:
        InputError: it is damaged.
    """
    from compress.architectures import skeleton
    from compress.budget import parameters
    from compress.format import VALUE_DTYPES, Checkpoint

    checkpoint, model, parts = Checkpoint.open(folder), skeleton(folder), []
    for name, N, K in _linears(model):
        layer = checkpoint.layers.get(name)
        if layer is None:
            parts.append(Part(name, N, K, 4 * N * K))
        else:
            tensors = (f"{name}.{part}" for part in ("bitmap", "values", "scales", "U", "V"))
            size = sum(checkpoint.tensors[tensor].length for tensor in tensors if tensor in checkpoint.tensors)
            kept_share = parameters(N, K, layer.nnz, layer.rank) / (N * K)
            parts.append(Part(name, N, K, size, VALUE_DTYPES[layer.dtype], kept_share))
    return Prediction(tuple(parts), *_size(model.config), machine)


def _linears(model: object) -> list[tuple[str, int, int]]:
    """(name, N, K) of every linear layer of a model, the head among them."""
    from compress.architectures import linear_shape, linears

    return [(name, *linear_shape(linear)) for name, linear in linears(model).items()]  # type: ignore[arg-type]


def _size(config: object) -> tuple[int, int]:
    """(blocks, hidden features) of a transformers config."""
    return config.num_hidden_layers, config.hidden_size  # type: ignore[attr-defined]
