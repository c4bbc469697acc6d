"""How far two sets of logits are apart, position by position, in float64, and folded into one record.

Margin-aware top-1. The reference prefers token a, the engine token b: harmless if the two were nearly tied. The margin
is the reference's logit of a minus its logit of b (for the usual flip, its top-1/top-2 margin). A disagreement counts
only if the margin is larger than MARGIN_ERRORS × e × rms(reference logits of that position), where e is the median
relative L2 over all compared positions: larger than anything the engine's ordinary rounding explains. A median, so that
a few broken positions cannot excuse themselves; if most positions are broken, relative L2 says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

# The largest of 50 000–150 000 normal errors is about 4.5 of their rms, the difference of two such logits at most twice
# that; errors of real kernels have somewhat heavier tails.
MARGIN_ERRORS = 10.0

# Rows of [positions, vocabulary] that are in float64 at once: 64 × 150 000 × 8 bytes = 77 MB.
_ROWS = 64


@dataclass(frozen=True)
class PositionErrors:
    """One number per compared position, each an array [n]; sums run over the vocabulary."""

    error_square: np.ndarray
    reference_square: np.ndarray
    engine_square: np.ndarray
    product: np.ndarray
    max_error: np.ndarray
    kl: np.ndarray
    agrees: np.ndarray
    margin: np.ndarray
    non_finite: np.ndarray
    vocab_size: int

    @property
    def relative_l2(self) -> np.ndarray:
        """‖error‖₂ / ‖reference‖₂ of each position [n]."""
        return _ratio(np.sqrt(self.error_square), np.sqrt(self.reference_square))

    @property
    def rms(self) -> np.ndarray:
        """Rms of the reference's logits at each position [n]."""
        return np.sqrt(self.reference_square / self.vocab_size)


@dataclass(frozen=True)
class PhaseNumerics:
    """Logits of one phase, engine against reference.

    Attributes:
        phase: "prefill", "decode", "chunk", "padded" or "greedy".
        positions: Compared positions.
        non_finite: NaN or infinite logits in either output. Where there are any, the other numbers are NaN.
        relative_l2: ‖engine − reference‖₂ / ‖reference‖₂ over the whole phase.
        worst_relative_l2: The same of the worst single position.
        worst_position: Its index among the compared positions of this phase.
        cosine: Cosine of the angle between the two outputs, each taken as one vector.
        max_error_over_rms: Largest absolute error over the rms of the reference's logits.
        kl_mean: Mean over positions of KL(reference ‖ engine) of the next-token distributions, in nats.
        kl_max: Its largest value.
        top1_agreement: Share of positions with the same most likely token.
        margin_top1_agreement: The same, but only disagreements beyond the numeric error count (see above).
    """

    phase: str
    positions: int
    non_finite: int
    relative_l2: float
    worst_relative_l2: float
    worst_position: int
    cosine: float
    max_error_over_rms: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    margin_top1_agreement: float


def position_errors(reference: np.ndarray, engine: np.ndarray) -> PositionErrors:
    """Compares logits [n, V] with logits [n, V].

    Positions where either is NaN or infinite have `non_finite` above 0, and NaN elsewhere.
    """
    starts = range(0, len(reference), _ROWS)
    return concatenate([_block(reference[i : i + _ROWS], engine[i : i + _ROWS]) for i in starts])


def _block(reference: np.ndarray, engine: np.ndarray) -> PositionErrors:
    reference, engine = reference.astype(np.float64), engine.astype(np.float64)
    non_finite = (~(np.isfinite(reference) & np.isfinite(engine))).sum(axis=1)
    reference[non_finite > 0] = engine[non_finite > 0] = np.nan
    error = engine - reference
    log_p, log_q = log_softmax(reference), log_softmax(engine)
    rows = np.arange(len(reference))
    top_reference, top_engine = reference.argmax(axis=1), engine.argmax(axis=1)
    return PositionErrors(
        error_square=(error**2).sum(axis=1),
        reference_square=(reference**2).sum(axis=1),
        engine_square=(engine**2).sum(axis=1),
        product=(reference * engine).sum(axis=1),
        max_error=np.abs(error).max(axis=1),
        # Rounding may leave −1e-17 where the two are the same.
        kl=np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0),
        agrees=top_reference == top_engine,
        margin=reference[rows, top_reference] - reference[rows, top_engine],
        non_finite=non_finite,
        vocab_size=reference.shape[1],
    )


def concatenate(parts: Sequence[PositionErrors]) -> PositionErrors:
    """Joins the positions of several comparisons, in order."""
    arrays = [field.name for field in fields(PositionErrors) if field.name != "vocab_size"]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    return PositionErrors(**joined, vocab_size=parts[0].vocab_size)


def explained(errors: PositionErrors, typical_relative_l2: float) -> np.ndarray:
    """Which positions [n] were so nearly tied that ordinary numeric error explains another most likely token."""
    return errors.margin <= MARGIN_ERRORS * typical_relative_l2 * errors.rms


def summarize(phase: str, errors: PositionErrors, typical_relative_l2: float) -> PhaseNumerics:
    """Folds positions into one record.

    Args:
        phase: What they are.
        errors: The positions.
        typical_relative_l2: The e of the margin rule.
    """
    positions, non_finite = len(errors.agrees), int(errors.non_finite.sum())
    if non_finite:
        nan = float("nan")
        return PhaseNumerics(
            phase, positions, non_finite, nan, nan, int(errors.non_finite.argmax()), nan, nan, nan, nan, nan, nan
        )
    reference_norm, engine_norm = np.sqrt(errors.reference_square.sum()), np.sqrt(errors.engine_square.sum())
    by_position = errors.relative_l2
    return PhaseNumerics(
        phase=phase,
        positions=positions,
        non_finite=0,
        relative_l2=float(_ratio(np.sqrt(errors.error_square.sum()), reference_norm)),
        worst_relative_l2=float(by_position.max()),
        worst_position=int(by_position.argmax()),
        cosine=float(errors.product.sum() / (reference_norm * engine_norm)) if reference_norm * engine_norm else 0.0,
        max_error_over_rms=float(_ratio(errors.max_error.max(), np.sqrt((errors.rms**2).mean()))),
        kl_mean=float(errors.kl.mean()),
        kl_max=float(errors.kl.max()),
        top1_agreement=float(errors.agrees.mean()),
        margin_top1_agreement=float((errors.agrees | explained(errors, typical_relative_l2)).mean()),
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [n, V] of logits [n, V]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _ratio(error: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Relative error, where nothing over nothing is no error, and something over nothing is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, np.divide(error, scale))
