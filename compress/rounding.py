"""Rounding S so that the layer's outputs change least, and letting what is left of W take up the error.

    min ‖(S + U·V − Q·scales − U'·V')X‖²   over Q on the support of S, the scales, U' and V'

1. Columns are rounded one after the other, and each rounding sees the errors of those before it (GPTQ, Frantar et al.,
   ICLR 2023, here in its form as Babai's nearest plane, Chen et al., arXiv 2507.18553, which needs no inverse of H).
2. Coordinate descent over the same objective: every stored value in turn, given all others, and every scale before the
   values of its group (QuantEase, Behdin et al., arXiv 2309.01885, and its scales). It knows each row's support, which
   step 1 does not: there, errors meet columns that store nothing and cannot make up for them.
3. With a rank, U'·V' becomes the best rank-r part of what is missing, and step 2 once more makes up for rounding it.

If S is the least-squares optimum on its support, ‖(W − Q)X‖² = ‖(W − S)X‖² + ‖(S − Q)X‖², so nothing is lost by looking
at S in place of W; and refinement may have moved S away from W for good reasons.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.layer import SCALE_GROUP
from compress.methods.linalg import damped, whitened_low_rank
from compress.methods.solution import Solution
from compress.quantize import LIMITS, per_column, round_to_nearest

SWEEPS = 3  # of coordinate descent; docs/methods.md has what more of them bring
SWEEPS_AFTER_LOW_RANK = 2
_ROWS = 1024  # at a time: a group of 64 of their columns stays in the processor's cache
_LARGEST_HALF = 65504.0


def round_in_norm(
    solution: Solution, H: Tensor, bits: int, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounds a layer's S + U·V in ‖·X‖.

    Args:
        solution: What to round.
        H: [K, K], the Gram matrix of the inputs; damped here.
        bits: 8 or 4.
        row_weights: [N, 1], what the error of each output is multiplied with where they compete, which is for U·V; None
            for ones.

    Returns:
        Q int8 [N, K], zero outside the mask; the scales, float16 [N, ⌈K/64⌉]; U [N, r] and V [r, K] in bfloat16.

    Raises:
        ArithmeticError: A value is too large for a float16 scale.
    """
    mask, S, U, V = solution
    H = damped(H)
    Q, scales = round_to_nearest(S, bits, H.diagonal())
    order = H.diagonal().argsort()
    factor = torch.linalg.cholesky(H[order][:, order])
    for rows in _pieces(S):
        Q[rows] = feed_forward(S[rows], mask[rows], factor, order, scales[rows], bits)
        Q[rows], scales[rows] = descend(S[rows], Q[rows], mask[rows], H, scales[rows], bits, SWEEPS)
    if U.shape[1]:
        target = S + U @ V
        missing = target - Q * per_column(scales, S.shape[1])
        weights = torch.ones(len(S), 1) if row_weights is None else row_weights
        U, V = whitened_low_rank(weights * missing, torch.linalg.cholesky(H), U.shape[1])
        U, V = (U / weights).bfloat16(), V.bfloat16()
        for rows in _pieces(S):
            missing = target[rows] - U[rows].float() @ V.float()
            Q[rows], scales[rows] = descend(missing, Q[rows], mask[rows], H, scales[rows], bits, SWEEPS_AFTER_LOW_RANK)
    return Q, scales, U.bfloat16().contiguous(), V.bfloat16().contiguous()


def feed_forward(S: Tensor, mask: Tensor, factor: Tensor, order: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Rounds column by column, the error of each fed forward to those still to come.

    With L the lower Cholesky factor of H and E = S − Q·scales, ‖E·X‖² = ‖E·L‖², whose column j depends on E[:, j:]
    only. So from the last column to the first, Q[:, j] is what brings column j of E·L closest to zero.

    Args:
        S: [n, K].
        mask: bool [n, K]; other entries are rounded to 0.
        factor: L [K, K], of H with rows and columns in `order`.
        order: [K], a permutation: the last column is rounded first, and the errors of important ones should find many
            columns to make up for them.
        scales: float16 [n, ⌈K/64⌉].
        bits: 8 or 4.

    Returns:
        Q int8 [n, K].
    """
    low, high = LIMITS[bits]
    # Transposed, so that a column of S is contiguous.
    S, wide = S.T[order], per_column(scales, S.shape[1]).T[order]
    steps = torch.where(mask.T[order] & (wide > 0), 1 / wide, 0)
    L = factor / factor.diagonal()
    Q, errors = torch.zeros_like(S), torch.zeros_like(S)
    for start in reversed(range(0, len(S), SCALE_GROUP)):
        end = min(start + SCALE_GROUP, len(S))
        wanted, local = S[start:end] + L[end:, start:end].T @ errors[end:], L[start:end, start:end]
        for c in reversed(range(end - start)):
            j = start + c
            Q[j] = (wanted[c] * steps[j]).round_().clamp_(low, high)
            errors[j] = S[j] - Q[j] * wide[j]
            wanted[:c].addr_(local[c, :c], errors[j])
    return Q[order.argsort()].T.to(torch.int8)


def descend(
    target: Tensor, Q: Tensor, mask: Tensor, H: Tensor, scales: Tensor, bits: int, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Coordinate descent on ‖(target − Q·scales)X‖² over the scales and the entries of Q on the mask.

    Args:
        target: [n, K].
        Q: int8 [n, K], the start.
        mask: bool [n, K].
        H: [K, K], positive definite.
        scales: float16 [n, ⌈K/64⌉]; those that are 0 stay 0.
        bits: 8 or 4.
        sweeps: Each costs a product [n, K]·[K, K].

    Returns:
        Q and scales, improved.
    """
    low, high = LIMITS[bits]
    # Transposed, so that a column of S is contiguous.
    codes, scale, support = Q.T.float(), scales.T.float().contiguous(), mask.T.float()
    residual = target.T - codes * scale.repeat_interleave(SCALE_GROUP, dim=0)[: len(codes)]
    best_step = (1 / H.diagonal()).tolist()
    for _ in range(sweeps):
        for group, start in enumerate(range(0, len(codes), SCALE_GROUP)):
            columns = slice(start, min(start + SCALE_GROUP, len(codes)))
            local, q, kept = H[columns, columns], codes[columns], support[columns]
            before = q * scale[group]
            pull = H[columns] @ residual  # minus half the gradient
            scale[group] = s = _fit_scale(q, scale[group], pull, local)
            inverse = torch.where(s > 0, 1 / s, 0)
            for c in range(len(q)):
                new = torch.addcmul(q[c], pull[c], inverse, value=best_step[start + c])
                new.round_().clamp_(low, high).mul_(kept[c])
                pull[c + 1 :].addr_(local[c, c + 1 :], (q[c] - new).mul_(s))
                q[c] = new
            residual[columns] += before - q * s
    return codes.T.to(torch.int8), scale.T.to(torch.float16)


def _fit_scale(q: Tensor, scale: Tensor, pull: Tensor, local: Tensor) -> Tensor:
    """The best scales [n] of one group with values q [64, n]; `pull` [64, n] is left as they make it."""
    image = local @ q
    energy = (q * image).sum(0)
    change = torch.where(energy > 0, (q * pull).sum(0) / energy, 0)
    fitted = (scale + change).clamp_max(_LARGEST_HALF).to(torch.float16).float()
    fitted = torch.where((fitted > 0) & (scale > 0), fitted, scale)
    pull -= (fitted - scale) * image
    return fitted


def _pieces(S: Tensor) -> Iterator[slice]:
    for first in range(0, len(S), _ROWS):
        yield slice(first, first + _ROWS)
