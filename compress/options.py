"""What can be chosen about a compression, checked. Free of PyTorch, so that commands can import it at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from compress.rules import FREE, parse_rule
from sslc_common.errors import InputError


@dataclass(frozen=True)
class MethodTraits:
    """What a method needs and gives.

    Attributes:
        calibrated: Whether it looks at the Gram matrix of the inputs, hence needs calibration text.
        low_rank: Whether it makes a low-rank part.
    """

    calibrated: bool
    low_rank: bool


METHODS = {
    "magnitude": MethodTraits(calibrated=False, low_rank=False),
    "wanda": MethodTraits(calibrated=True, low_rank=False),
    "sparsegpt": MethodTraits(calibrated=True, low_rank=False),
    "oats": MethodTraits(calibrated=True, low_rank=True),
    "sslc": MethodTraits(calibrated=True, low_rank=True),
}
VALUE_BYTES = {"f32": 4, "bf16": 2}
BUDGET_UNITS = ("bytes", "params")


@dataclass(frozen=True)
class CompressOptions:
    """Options of `compress.pipeline.compress_model`.

    Attributes:
        method: One of METHODS.
        budget: Compressed over dense size of each layer, 0 < budget ≤ 1, in the unit of `budget_in`.
        budget_in: "bytes": what is stored (values, bitmap, U, V) over the dense bytes at the same value type.
            "params": the papers' count, (nnz + r(N + K)) / NK.
        values_dtype: Type of values, U and V: "f32" or "bf16".
        rank_share: Share of the room for values that goes to U and V. Methods without a low-rank part ignore it.
        rank: The rank of every layer, instead of `rank_share`.
        mask_rule: "free", or "CAP:GROUP": at most CAP values in each aligned GROUP columns of a row (`compress.rules`).
            A layer that would keep more than CAP/GROUP of its entries keeps as many as the rule allows.
        calibration: Text files, folders of .txt files, or Hugging Face dataset names, mixed evenly.
        calibration_tokens: How many tokens of them are used; an eighth is held out to measure errors.
        sequence_length: Tokens per calibration sequence.
        seed: Of the choice of text and of the randomized SVD.
        exclude: Patterns (`*.mlp.down_proj`, fnmatch) of layers that stay dense.
        overwrite: Replace an existing output, and drop interrupted work that was begun with other options.

    Raises:
        InputError: an option is out of its range.
    """

    method: str = "sslc"
    budget: float = 0.5
    budget_in: str = "bytes"
    values_dtype: str = "f32"
    rank_share: float = 0.1
    rank: int | None = None
    mask_rule: str = FREE
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 16384
    sequence_length: int = 512
    seed: int = 0
    exclude: tuple[str, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        _one_of("Method", self.method, METHODS)
        object.__setattr__(self, "budget", parse_budget(self.budget))
        _one_of("Budget unit", self.budget_in, BUDGET_UNITS)
        _one_of("Type of the values", self.values_dtype, VALUE_BYTES)
        parse_rule(self.mask_rule)
        if not 0 <= self.rank_share <= 1:
            raise InputError("The rank share is out of range", got=self.rank_share, allowed="0 ≤ rank_share ≤ 1")
        if self.rank is not None and self.rank < 0:
            raise InputError("The rank is negative", got=self.rank, allowed="0 or more")
        if self.rank and not METHODS[self.method].low_rank:
            raise InputError(
                f"Method {self.method} makes no low-rank part",
                got=f"rank {self.rank}",
                allowed="rank 0",
                do=f"Leave the rank out, or choose {_names(m for m, t in METHODS.items() if t.low_rank)}",
            )
        if self.sequence_length < 2:
            raise InputError("The sequence length is too short", got=self.sequence_length, allowed="2 or more")
        if self.calibration_tokens < 2 * self.sequence_length:
            raise InputError(
                "There are too few calibration tokens",
                got=self.calibration_tokens,
                allowed=f"at least two sequences, {2 * self.sequence_length} tokens",
            )

    def what_decides(self) -> dict[str, Any]:
        """The options that decide the result, for the manifest of interrupted work and the checkpoint's config.

        The calibration text is not among them: its tokens' fingerprint stands for it.
        """
        chosen = {key: value for key, value in asdict(self).items() if key not in ("calibration", "overwrite")}
        return chosen | {"exclude": list(self.exclude)}  # as JSON reads it back


def parse_budget(value: object) -> float:
    """A budget from a number or a text.

    Raises:
        InputError: it is no number, or not in 0 < budget ≤ 1.
    """
    try:
        budget = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        budget = math.nan
    if not 0 < budget <= 1:
        raise InputError(
            "The budget is not a share of the dense size",
            got=repr(value),
            allowed="0 < budget ≤ 1",
            do="0.5 keeps half of the bytes",
        )
    return budget


def _one_of(what: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise InputError(f"{what} is unknown", got=repr(value), allowed=_names(allowed))


def _names(names: Any) -> str:
    return ", ".join(names)
