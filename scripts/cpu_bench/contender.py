"""What is timed: an engine that holds several different copies of the layer, so that no cache holds them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cpu_bench.layer import Floats

ROTATED_BYTES = 160e6  # of weights in one run, beyond the caches


@dataclass(frozen=True)
class Runner:
    """An engine with its input in place.

    Attributes:
        run: Computes all copies of the layer.
        result: The first copy's output [M, N] of the last run.
    """

    run: Callable[[], object]
    result: Callable[[], Floats]


@dataclass(frozen=True)
class Contender:
    """An engine and how it stores the layer.

    Attributes:
        engine: Its name, "sslc" for ours.
        values: Class of its weights: f32, bf16, int8 or int4.
        how: What else there is to say: the operator, the group size, the kernel.
        bytes: Of one copy's weights, as they are read.
        copies: How many there are.
        prepare: From X [M, K] to something that runs.
    """

    engine: str
    values: str
    how: str
    bytes: int
    copies: int
    prepare: Callable[[Floats], Runner]


def copies_of(size: int) -> int:
    """How many copies of a layer of so many bytes are beyond the caches."""
    return max(2, math.ceil(ROTATED_BYTES / size))
