"""What a compression did, layer by layer and in total; written as compression_report.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress.budget import parameters


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: Its module name.
        N: Outputs.
        K: Inputs.
        rank: r; 0 if the layer is dense.
        nnz: Stored values of S; N·K if the layer is dense.
        bytes: In the checkpoint: values, bitmap, U, V and bias.
        dense_bytes: Weight and bias dense, at the same value type.
        error: ‖(W − S − U·V)X‖ / ‖W·X‖ on calibration sequences that the solver did not see; None without calibration.
        seconds: Spent on solving it.
        mask_cost: What the mask rule costs: energy |W|²·d² (d the inputs' rms, 1 without calibration) that it leaves
            out, over what a free mask of as many values leaves out, less 1; None without a rule.
        dense_reason: Why the layer stays dense; empty if it does not.
    """

    name: str
    N: int
    K: int
    rank: int
    nnz: int
    bytes: int
    dense_bytes: int
    error: float | None = None
    seconds: float = 0.0
    mask_cost: float | None = None
    dense_reason: str = ""

    @property
    def density(self) -> float:
        """Stored share of S."""
        return self.nnz / (self.N * self.K)

    @property
    def parameters(self) -> int:
        """The papers' count, nnz + r(N + K)."""
        return parameters(self.N, self.K, self.nnz, self.rank)


@dataclass(frozen=True)
class CompressReport:
    """A whole model.

    Attributes:
        method: Of the compression.
        layers: The linear layers of the decoder blocks, in order.
        head: The output head, with the embedding that is tied to it, if it was rounded; `dense_bytes` as in the source.
            None if it was kept.
        source_bytes: All tensors of the source.
        checkpoint_bytes: All tensors of the checkpoint.
        source_hash: SHA-256 over config and weights of the source.
        calibration: Fingerprint of the calibration tokens; None without.
        calibration_tokens: How many the solvers saw.
        held_out_tokens: How many measured the errors.
        seconds: For everything, resumed work not included.
        resumed_blocks: Blocks that an interrupted run had finished.
        peak_memory: Most resident bytes that the process had, from its start.
        tuning_steps: How many steps the tuning took; 0 without.
    """

    method: str
    layers: tuple[LayerReport, ...]
    source_bytes: int
    checkpoint_bytes: int
    source_hash: str
    calibration: str | None
    calibration_tokens: int
    held_out_tokens: int
    seconds: float
    resumed_blocks: int
    peak_memory: int
    head: LayerReport | None = None
    tuning_steps: int = 0

    @property
    def bytes(self) -> int:
        """Of all linear layers in the blocks, as stored."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Of all linear layers in the blocks, dense at the same value type."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def budget_in_bytes(self) -> float:
        """What the linear layers came to, in bytes."""
        return self.bytes / self.dense_bytes

    @property
    def budget_in_params(self) -> float:
        """What the linear layers came to, in the papers' count."""
        return sum(layer.parameters for layer in self.layers) / sum(layer.N * layer.K for layer in self.layers)

    @property
    def mask_cost(self) -> float | None:
        """Mean of the layers' `mask_cost`, None without a rule."""
        costs = [layer.mask_cost for layer in self.layers if layer.mask_cost is not None]
        return sum(costs) / len(costs) if costs else None

    def to_json(self) -> dict[str, Any]:
        """All of it, totals included, ready for JSON."""
        keys = ("bytes", "dense_bytes", "budget_in_bytes", "budget_in_params", "mask_cost")
        totals = {key: getattr(self, key) for key in keys}
        rows = [asdict(layer) | {"density": layer.density} for layer in self.layers]
        head = self.head and asdict(self.head) | {"density": self.head.density}
        return asdict(self) | totals | {"layers": rows, "head": head}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CompressReport:
        """The inverse of `to_json`."""
        fields = {name: content[name] for name in cls.__dataclass_fields__}

        def layer(row: dict[str, Any]) -> LayerReport:
            return LayerReport(**{name: row[name] for name in LayerReport.__dataclass_fields__})

        head = content["head"]
        return cls(**fields | {"layers": tuple(map(layer, content["layers"])), "head": head and layer(head)})
