"""What can be chosen about a compression, checked. Free of PyTorch, so that commands can import it at once."""

from __future__ import annotations

import fnmatch
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
    "joint": MethodTraits(calibrated=True, low_rank=True),
    "magnitude": MethodTraits(calibrated=False, low_rank=False),
    "wanda": MethodTraits(calibrated=True, low_rank=False),
    "sparsegpt": MethodTraits(calibrated=True, low_rank=False),
    "oats": MethodTraits(calibrated=True, low_rank=True),
    "alps": MethodTraits(calibrated=True, low_rank=False),
    "hassle_free": MethodTraits(calibrated=True, low_rank=True),
    "sslc": MethodTraits(calibrated=True, low_rank=True),
    "three_basil": MethodTraits(calibrated=True, low_rank=True),
    "cap": MethodTraits(calibrated=True, low_rank=True),
    "svd_llm": MethodTraits(calibrated=True, low_rank=True),
    "fwsvd": MethodTraits(calibrated=True, low_rank=True),
}
VALUE_BITS = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}
QUANTIZED = ("int8", "int4")  # values with a scale per row and 64 columns
BUDGET_UNITS = ("bytes", "params")
ALLOCATIONS = ("fisher", "uniform", "owl", "farms", "welore", "knapsack", "cap", "cap_reinforce")
TEXT_ALLOCATIONS = ("owl", "knapsack", "cap", "cap_reinforce")  # cannot do without; fisher is uniform then
JOINT_ALLOCATIONS = ("knapsack", "cap", "cap_reinforce")  # choose ranks together with the rooms
# Where the error of layers is least (docs/methods.md); with masks such as 2:4; and where numbers of U and V take the
# bytes of two or four values.
JOINT_SHARE, JOINT_SHARE_OF_FOUR, JOINT_SHARE_OF_BYTES = 0.15, 0.25, 0.0
HEADS = ("keep", "int8")
TUNED = ("all", "factors")


@dataclass(frozen=True)
class CompressOptions:
    """Options of `compress.pipeline.compress_model`.

    Attributes:
        method: One of METHODS.
        budget: Compressed over dense size of all layers together, 0 < budget ≤ 1, in the unit of `budget_in`.
        budget_in: "bytes": what is stored (values, bitmap, U, V) over the dense bytes at the same value type.
            "params": the papers' count, (nnz + r(N + K)) / NK.
        allocation: "fisher": one threshold for the whole model on the loss that each entry's removal would cause.
            "uniform": the same budget for every layer, as "fisher" without calibration text. The others are published
            ways, one file each in `compress.allocation`; "knapsack", "cap" and "cap_reinforce" choose ranks, too.
        values_dtype: Type of values, U and V: "f32" or "bf16"; or "int8" or "int4" for the values, with one float16
            scale per row and 64 columns, and bfloat16 for U and V.
        values_of: "PATTERN=TYPE", the type of values of the layers whose names match (`*.mlp.down_proj=bf16`, fnmatch),
            instead of `values_dtype`; the first that matches holds. Layers of a type share their budget among them.
        head: What becomes of the output head, and of an embedding that is tied to it: "keep" for as it is, "int8" for
            one byte per weight and a scale per row and 64 columns (`compress.head`). The budget does not count it.
        rank_share: Share of the room for values that goes to U and V. None, unless the allocation chooses ranks itself,
            for 0.15 with the method "joint": 0.25 with mask rules for four columns, else 0 with int8 and int4 values
            and a budget in bytes, where a number of U or V takes those of two or four values. With other methods None
            is for the rank that pays in each layer by its singular values, often 0, and always 0 with a uniform
            allocation. Methods without a low-rank part ignore it.
        rank: The rank of every layer, instead of `rank_share`.
        mask_rule: "free", or "CAP:GROUP": at most CAP values in each aligned GROUP columns of a row (`compress.rules`).
            A layer that would keep more than CAP/GROUP of its entries keeps as many as the rule allows.
        calibration: Text files, folders of .txt files, or Hugging Face dataset names, mixed evenly.
        calibration_tokens: How many tokens of them are used; one sequence of 13 is held out to measure errors.
        sequence_length: Tokens per calibration sequence.
        refinement: How many times each block, once its layers are solved, is fitted as a whole to the dense model's
            hidden states on the calibration text (`compress.refinement`). 0 for never, and without text.
        tuning_minutes: How long the whole compressed model is tuned towards the dense one's predictions on more text
            from the calibration sources (`compress.tuning`). Needs both models in memory; the result depends on how
            far the machine gets. 0 for none.
        tuning_of: "all": kept values, U, V, biases and norms. "factors": U and V alone, as the paper.
        seed: Of the choice of text, of the labels that importance draws, and of the order of text in refinement.
        exclude: Patterns (`*.mlp.down_proj`, fnmatch) of layers that stay dense.
        overwrite: Replace an existing output, and drop interrupted work that was begun with other options.

    Raises:
        InputError: an option is out of its range.
    """

    method: str = "joint"
    budget: float = 0.5
    budget_in: str = "bytes"
    allocation: str = "fisher"
    values_dtype: str = "f32"
    values_of: tuple[str, ...] = ()
    head: str = "keep"
    rank_share: float | None = None
    rank: int | None = None
    mask_rule: str = FREE
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 30720
    sequence_length: int = 512
    refinement: int = 1
    tuning_minutes: float = 0.0
    tuning_of: str = "all"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        _one_of("Method", self.method, METHODS)
        object.__setattr__(self, "budget", parse_budget(self.budget))
        _one_of("Budget unit", self.budget_in, BUDGET_UNITS)
        _one_of("Allocation", self.allocation, ALLOCATIONS)
        _one_of("Type of the values", self.values_dtype, VALUE_BITS)
        for pattern, dtype in self.types_by_pattern:
            if dtype not in VALUE_BITS or not pattern:
                raise InputError(
                    "The type of some layers' values is not PATTERN=TYPE",
                    got=repr(f"{pattern}={dtype}" if pattern else dtype),
                    allowed=f"a pattern for names of layers, = and one of {_names(VALUE_BITS)}",
                    do="*.mlp.down_proj=bf16 keeps the values of these layers in bfloat16",
                )
        _one_of("Treatment of the head", self.head, HEADS)
        _one_of("What is tuned", self.tuning_of, TUNED)
        parse_rule(self.mask_rule)
        if self.rank_share is not None and not 0 <= self.rank_share <= 1:
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
        if (rounded := sorted(self.values_dtypes & set(QUANTIZED))) and self.tuning_minutes:
            raise InputError(
                f"Models with {' and '.join(rounded)} values cannot be tuned yet",
                got=f"{self.tuning_minutes:g} tuning minutes",
                allowed="0",
                do="Leave the tuning out, or store the values as bf16",
            )
        if self.refinement < 0:
            raise InputError("The refinement is negative", got=self.refinement, allowed="0 or more passes")
        if not 0 <= self.tuning_minutes < math.inf:
            raise InputError("The tuning time is out of range", got=self.tuning_minutes, allowed="0 minutes or more")
        if self.sequence_length < 2:
            raise InputError("The sequence length is too short", got=self.sequence_length, allowed="2 or more")
        if self.calibration_tokens < 2 * self.sequence_length:
            raise InputError(
                "There are too few calibration tokens",
                got=self.calibration_tokens,
                allowed=f"at least two sequences, {2 * self.sequence_length} tokens",
            )

    @property
    def types_by_pattern(self) -> list[tuple[str, str]]:
        """Pattern and type of each of `values_of`."""
        return [(pattern, dtype) for pattern, _, dtype in (text.rpartition("=") for text in self.values_of)]

    @property
    def values_dtypes(self) -> set[str]:
        """All types of values that layers may have."""
        return {self.values_dtype, *(dtype for _, dtype in self.types_by_pattern)}

    def values_dtype_of(self, layer: str) -> str:
        """The type of the values of the layer of this full name."""
        found = (dtype for pattern, dtype in self.types_by_pattern if fnmatch.fnmatchcase(layer, pattern))
        return next(found, self.values_dtype)

    def share_of(self, values_dtype: str) -> float | None:
        """The rank share that holds for layers with values of that type; None where ranks are free."""
        if self.rank_share is None and self.method == "joint" and self.allocation not in JOINT_ALLOCATIONS:
            rule = parse_rule(self.mask_rule)
            if rule and rule.group == 4:
                return JOINT_SHARE_OF_FOUR
            return JOINT_SHARE_OF_BYTES if values_dtype in QUANTIZED and self.budget_in == "bytes" else JOINT_SHARE
        return self.rank_share

    def what_decides(self) -> dict[str, Any]:
        """The options that decide the result, for the manifest of interrupted work and the checkpoint's config.

        The calibration text is not among them: its tokens' fingerprint stands for it.
        """
        chosen = {key: value for key, value in asdict(self).items() if key not in ("calibration", "overwrite")}
        return chosen | {"exclude": list(self.exclude), "values_of": list(self.values_of)}  # as JSON reads it back


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
