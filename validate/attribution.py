"""Where does an error come from: compression, lowering, the kernel, or something between the layers?

Two looks at each compressed layer. *Alone*, on the inputs that the PyTorch model gives it on real text:

    compression   X·Wᵀ against X·(S + U·V)ᵀ: the price of compressing, no fault (needs the dense weights)
    lowering      X·(S + U·V)ᵀ + bias in float64 against the operator's ONNX body, on the weights that the engine holds
    kernel        the ONNX body against the op's kernel

*In place*: the engine's graph also gives out what goes into each compressed layer and what comes out, and both are held
against PyTorch in a prefill, in decode steps and in a padded batch. Rounding grows slowly from layer to layer; a fault
makes it jump. A layer that is right alone but gets wrong inputs points to what is between it and the layer before:
attention, positions, masks, the cache, norms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from sslc_common.errors import InputError
from validate.progress import Progress, silent
from validate.tokens import left_padded

Stage = Literal["lowering", "kernel", "between"]

LOGITS = "logits"

# A jump: so many times the largest error that any earlier layer had. In SmolLM2-135M rounding never grew by more than
# 1.5 times from one layer to the next.
_JUMP = 10.0
# Rows of X that a layer is judged on alone, and decode steps in place.
_ROWS = 64
_STEPS = 3


@dataclass(frozen=True)
class Activations:
    """Of one layer in one forward pass: X [B, S, K] and Y [B, S, N]; for the logits both are the logits."""

    X: np.ndarray
    Y: np.ndarray


class ReferenceProbe(Protocol):
    """The compressed PyTorch model, layer by layer."""

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, cache: Any
    ) -> tuple[dict[str, Activations], Any]:
        """A forward pass as `Engine.run`, but gives the activations of each compressed layer, and `LOGITS`."""
        ...

    def exact(self, layer: str, X: np.ndarray) -> np.ndarray:
        """Y [n, N] of X [n, K], in float64 from the checkpoint's weights."""
        ...

    def dense(self, layer: str, X: np.ndarray) -> np.ndarray | None:
        """The same with the weights before compression; None where they are not known."""
        ...


class EngineProbe(Protocol):
    """The engine, layer by layer.

    Attributes:
        layers: Names of the compressed layers, in the order of the graph.
        no_kernel: Why there is no kernel to compare with; None if there is one.
    """

    layers: Sequence[str]
    no_kernel: str | None

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, cache: Any
    ) -> tuple[dict[str, Activations], Any]:
        """See `ReferenceProbe.run`."""
        ...

    def function(self, layer: str, X: np.ndarray) -> np.ndarray:
        """Y [n, N] of X [n, K] by the operator's ONNX body, with the weights that the engine holds."""
        ...

    def kernel(self, layer: str, X: np.ndarray) -> np.ndarray:
        """The same by the kernel."""
        ...

    def different_weights(self, layer: str) -> Sequence[str]:
        """Which of the layer's tensors are not those of the checkpoint, bit for bit."""
        ...


@dataclass(frozen=True)
class LayerErrors:
    """Relative L2 errors of one layer; infinite where an output was NaN or infinite.

    Attributes:
        name: Of the layer.
        compression: Alone, against the dense layer on the same input; None if that is not known.
        lowering: Alone, the ONNX body against float64.
        kernel: Alone, the kernel against the ONNX body; None without a kernel.
        input: In place, its input against PyTorch's, in the worst phase.
        output: In place, its output.
        cosine: In place, of the angle between the two outputs; the smallest of the phases.
        max_error_over_rms: In place, the largest error of an output over the rms of PyTorch's; the largest.
    """

    name: str
    compression: float | None
    lowering: float
    kernel: float | None
    input: float
    output: float
    cosine: float = 1.0
    max_error_over_rms: float = 0.0


@dataclass(frozen=True)
class Finding:
    """The first thing that is wrong.

    Attributes:
        layer: The layer, or "logits".
        stage: "lowering" or "kernel" if the layer itself is wrong; "between" if its input is wrong already.
        error: Relative L2.
        phase: "alone", or the phase in which its input was wrong.
        after: The layer before it, for "between"; None if there is none.
        explanation: For people.
    """

    layer: str
    stage: Stage
    error: float
    phase: str
    after: str | None
    explanation: str


@dataclass(frozen=True)
class Attribution:
    """All layers in the order of the graph, the first fault if there is one, and why no kernel was compared."""

    layers: tuple[LayerErrors, ...]
    first: Finding | None
    no_kernel: str | None
    limit: float

    @property
    def worst_alone(self) -> float:
        """Largest error of a layer alone, in lowering or kernel."""
        return max((max(layer.lowering, layer.kernel or 0.0) for layer in self.layers), default=0.0)


def attribute(
    reference: ReferenceProbe,
    engine: EngineProbe,
    text: np.ndarray,
    *,
    limit: float,
    tokens: int = 64,
    progress: Progress = silent,
) -> Attribution:
    """Finds the first layer that is wrong, and how much each contributes.

    Args:
        reference: The compressed PyTorch model.
        engine: What was built from it.
        text: Token ids [B, L] of real text.
        limit: Relative L2 above which an error is more than rounding.
        tokens: How many of L are looked at.
        progress: Wraps the loop over layers.

    Raises:
        InputError: the two do not have the same layers.
    """
    places, inputs = _in_place(reference, engine, text[:, :tokens])
    if inputs.keys() != {*engine.layers, LOGITS}:
        raise InputError(
            "The engine does not have the layers of its compressed model",
            got=f"{min(inputs.keys() ^ {*engine.layers, LOGITS})} in only one of them",
            allowed="the same compressed layers in both, by name",
            do="Build the engine again with sslc-export",
        )
    layers: list[LayerErrors] = []
    faults: dict[str, Finding] = {}
    other: list[str] = []  # layers whose weights in the engine are not the checkpoint's
    for name in progress(list(engine.layers), "Comparing layers"):
        X = inputs[name]
        exact, function = reference.exact(name, X), engine.function(name, X)
        lowering = relative_l2(exact, function)
        kernel = None
        if engine.no_kernel is None:
            # One row too: kernels for one token and for many are different code.
            kernel = max(
                relative_l2(function, engine.kernel(name, X)), relative_l2(function[:1], engine.kernel(name, X[:1]))
            )
        before = reference.dense(name, X)
        compression = None if before is None else relative_l2(before, exact)
        worst = functools.reduce(_Place.worse, (phase[name] for phase in places.values()))
        layers.append(LayerErrors(name, compression, lowering, kernel, **vars(worst)))
        if lowering > limit:
            different = engine.different_weights(name)
            other += [name] if different else []
            faults[name] = _lowering_fault(name, lowering, different)
        elif kernel is not None and kernel > limit:
            faults[name] = Finding(
                name, "kernel", kernel, "alone", None, "the kernel does not compute what the operator's ONNX body does"
            )
    first = _first([*engine.layers, LOGITS], places, faults, limit)
    if first is not None and len(other) > 1 and len(other) > len(layers) / 2:
        why = f"{len(other)} of {len(layers)} layers hold other weights: the engine was built from another checkpoint"
        first = Finding(other[0], "lowering", faults[other[0]].error, "alone", None, why)
    return Attribution(tuple(layers), first, engine.no_kernel, limit)


def relative_l2(reference: np.ndarray, other: np.ndarray) -> float:
    """‖other − reference‖₂ / ‖reference‖₂ in float64; infinite if either is not finite or only the other is not 0."""
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        error, scale = float(np.linalg.norm(other - reference)), float(np.linalg.norm(reference))
    if not np.isfinite(error):
        return float("inf")
    if scale == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / scale


@dataclass(frozen=True)
class _Place:
    """A layer in the whole graph: relative L2 of its input, and how far its output is off."""

    input: float
    output: float
    cosine: float
    max_error_over_rms: float

    def worse(self, other: _Place) -> _Place:
        """The worse of each."""
        return _Place(
            max(self.input, other.input),
            max(self.output, other.output),
            min(self.cosine, other.cosine),
            max(self.max_error_over_rms, other.max_error_over_rms),
        )


_Places = dict[str, dict[str, _Place]]


def _in_place(
    reference: ReferenceProbe, engine: EngineProbe, text: np.ndarray
) -> tuple[_Places, dict[str, np.ndarray]]:
    """Errors of each layer by phase, and the inputs [≤ _ROWS, K] that PyTorch gave each."""
    places: _Places = {}
    inputs: dict[str, np.ndarray] = {}
    split = text.shape[1] - _STEPS
    padded, mask = left_padded(text, split)
    phases = (("", text, np.ones_like(text)), ("padded ", padded, mask))
    for prefix, ids, visible in phases:
        caches: tuple[Any, Any] = (None, None)
        spans = [slice(0, split), *(slice(at, at + 1) for at in range(split, text.shape[1]))]
        for span in spans:
            given = visible[:, : span.stop] if prefix else None
            wanted, first = reference.run(ids[:, span], given, caches[0])
            found, second = engine.run(ids[:, span], given, caches[1])
            caches = first, second
            phase = prefix + ("prefill" if span.start == 0 else "decode")
            errors = _compare(wanted, found, visible[:, span].astype(bool))
            known = places.setdefault(phase, errors)
            places[phase] = {name: known[name].worse(place) for name, place in errors.items()}
            if not inputs:
                inputs = {name: _some_rows(both.X) for name, both in wanted.items()}
    return places, inputs


def _compare(
    wanted: Mapping[str, Activations], found: Mapping[str, Activations], valid: np.ndarray
) -> dict[str, _Place]:
    """Layers that both have, at the positions [B, S] that are not padding."""
    places = {}
    for name in wanted.keys() & found.keys():
        right, Y = (both[name].Y[valid].astype(np.float64) for both in (wanted, found))
        scale = float(np.linalg.norm(right))
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            cosine = float((right * Y).sum() / (scale * np.linalg.norm(Y))) if scale and Y.any() else float(not scale)
            error = float(np.abs(Y - right).max() / (scale / math.sqrt(right.size))) if scale else float(Y.any())
        if not np.isfinite(Y).all():
            cosine, error = -1.0, math.inf  # NaN would be neither the smallest nor the largest
        inputs = relative_l2(wanted[name].X[valid], found[name].X[valid])
        places[name] = _Place(inputs, relative_l2(right, Y), cosine, error)
    return places


def _some_rows(X: np.ndarray) -> np.ndarray:
    rows = X.reshape(-1, X.shape[-1])
    return rows[np.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).astype(int)]


def _lowering_fault(name: str, error: float, different: Sequence[str]) -> Finding:
    if different:
        verb = "are" if len(different) > 1 or different[0] in ("values", "scales") else "is"
        why = f"its {' and '.join(different)} in the engine {verb} not the checkpoint's"
    else:
        why = "the operator's ONNX body does not compute what the PyTorch layer does, on the same weights"
    return Finding(name, "lowering", error, "alone", None, why)


def _first(names: Sequence[str], places: _Places, faults: Mapping[str, Finding], limit: float) -> Finding | None:
    """Walks the phases, then the graph; a fault of a layer alone is found where the layer is."""
    for phase, errors in places.items():
        before, largest = None, 0.0
        for name in names:
            x, y = errors[name].input, errors[name].output
            if x > limit and x > _JUMP * largest:
                return _between(name, before, x, phase)
            if name in faults:
                return faults[name]
            if y > limit and y > _JUMP * max(x, largest):
                why = f"its output is wrong in the whole graph ({phase}) though it is right alone"
                return Finding(name, "kernel", y, phase, None, why)
            before, largest = name, max(largest, x, y)
    return next(iter(faults.values()), None)


def _between(name: str, before: str | None, error: float, phase: str) -> Finding:
    where = f"between {before} and {name}" if before else f"before {name}"
    what = "attention, positions, masks, norms"
    if phase.endswith("decode"):
        what += ", the cache"
    why = f"in {phase} what comes {where} is not PyTorch's: {what}, or a layer that stayed dense"
    return Finding(name, "between", error, phase, before, why)
