"""What a method is given: one real layer, its real inputs, and how much it may keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from compress.architectures import linears, output_rows
from compress.blocks import collect_inputs, embed, run
from compress.calibration import read_tokens
from compress.rules import MaskRule, parse_rule
from compress.source import Source
from sslc_common.errors import InputError


@dataclass(frozen=True)
class Problem:
    """A layer and its calibration.

    Attributes:
        layer: Its name.
        W: float32 [N, K].
        X: float32 [tokens, K], its inputs.
    """

    layer: str
    W: Tensor
    X: Tensor

    @cached_property
    def H(self) -> Tensor:  # noqa: N802
        """The Gram matrix X·Xᵀ / tokens [K, K], as the pipeline makes it."""
        return self.X.T @ self.X / len(self.X)

    def error(self, approximation: Tensor) -> float:
        """‖(W − approximation)X‖ / ‖WX‖, in float64."""
        H, W = self.H.double(), self.W.double()
        D = W - approximation.double()
        return float((((D @ H) * D).sum() / ((W @ H) * W).sum()).sqrt())


@dataclass(frozen=True)
class Setting:
    """How much is kept.

    Attributes:
        mask_rule: "free", or "2:4" and the like.
        sparsity: Share of the entries that S does not have; that of the rule if there is one.
        rank: Of U·V.
    """

    mask_rule: str
    sparsity: float
    rank: int

    @property
    def rule(self) -> MaskRule | None:
        """The mask rule, parsed."""
        return parse_rule(self.mask_rule)

    @property
    def n_m(self) -> tuple[int, int]:
        """N and M of N:M, both 0 if the mask is free, as the published code has it."""
        return (self.rule.cap, self.rule.group) if self.rule else (0, 0)

    def nnz(self, N: int, K: int) -> int:
        """Entries of S [N, K]: every row has the same number, as the published code has it."""
        return N * (K - int(K * self.sparsity))


def setting(
    problem: Problem, mask_rule: str, budget: float, rank_share: float, *, sparse: bool = True, low_rank: bool = False
) -> Setting:
    """The setting for a method at a budget.

    Args:
        problem: Its shape decides the rank.
        mask_rule: With a rule the sparse part has the rule's share, and the low-rank part comes on top.
        budget: Share of N·K that is kept, in S and in U and V together.
        rank_share: Share of the budget that goes to U and V.
        sparse: Whether the method makes S.
        low_rank: Whether the method makes U and V.
    """
    N, K = problem.W.shape
    share = 0.0 if not low_rank else rank_share if sparse else 1.0
    rank, rule = int(share * budget * N * K / (N + K)), parse_rule(mask_rule)
    sparsity = (1 - rule.cap / rule.group) if rule else 1 - (1 - share) * budget
    return Setting(mask_rule, sparsity, rank)


def problems(
    model: Path, layers: Sequence[str], calibration: Sequence[str], tokens: int, length: int, seed: int = 0
) -> Iterator[Problem]:
    """The layers with the inputs that the dense model gives them, in the order of the blocks.

    Args:
        model: Dense Hugging Face folder.
        layers: Full names.
        calibration: Text, see `compress.calibration`.
        tokens: How many are calibrated on; rounded down to whole sequences.
        length: Tokens per sequence.
        seed: Of the choice of text.

    Raises:
        InputError: the model has no such layer; see also `read_tokens`.
    """
    source = Source.open(model)
    of_block = {block: linears(source.model.get_submodule(block)) for block in source.blocks}
    if missing := set(layers) - {f"{block}.{name}" for block, inside in of_block.items() for name in inside}:
        raise InputError(
            "The model has no such layer", got=", ".join(sorted(missing)), allowed=f"names like {source.blocks[0]}.…"
        )
    wanted = {
        block: {name: linear for name, linear in inside.items() if f"{block}.{name}" in layers}
        for block, inside in of_block.items()
    }
    last = max(index for index, block in enumerate(source.blocks) if wanted[block])
    sequences = read_tokens(calibration, model, tokens=tokens, length=length, seed=seed)
    with torch.no_grad():
        hidden, calls = embed(source, sequences, Path())
        for name, call in zip(source.blocks[: last + 1], calls, strict=False):
            block = source.model.get_submodule(name)
            stored = source.load_block(name)
            inputs = collect_inputs(block, wanted[name], call, hidden, 0, gram=False) if wanted[name] else {}
            for layer, linear in wanted[name].items():
                W = output_rows(linear, stored[f"{name}.{layer}.weight"])
                yield Problem(f"{name}.{layer}", W.float().contiguous(), inputs[layer].held_out)
            run(block, call, hidden)
            block.to("meta")
