"""Linear algebra that the methods share. H is always the Gram matrix X·Xᵀ / tokens [K, K] of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # Share of the mean of H's diagonal that is added to it, as in SparseGPT.


def input_norms(H: Tensor) -> Tensor:
    """D [K] = √diag(H), the root mean square of every input, kept away from zero so that it can be divided by."""
    d = H.diagonal().clamp_min(0).sqrt()
    return d.clamp_min(1e-4 * d.square().mean().sqrt()).clamp_min(torch.finfo(d.dtype).tiny ** 0.5)


def damped(H: Tensor) -> Tensor:
    """H + 1 % of its mean diagonal, positive definite even where there are fewer tokens than inputs, or dead inputs."""
    mean = H.diagonal().mean()
    return H + (DAMPING * mean if mean > 0 else 1.0) * torch.eye(H.shape[0], dtype=H.dtype)


def low_rank(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [N, r], V [r, K] with U·V close to the best rank-r approximation of A [N, K] (randomized SVD, two power steps).

    The singular values are split evenly between U and V, so that both have entries of a size that bf16 likes.
    """
    N, K = A.shape
    if rank == 0:
        return A.new_zeros(N, 0), A.new_zeros(0, K)
    if rank + _OVERSAMPLING >= min(N, K):
        left, s, right = torch.linalg.svd(A, full_matrices=False)
        right = right.T
    else:
        left, s, right = torch.svd_lowrank(A, rank + _OVERSAMPLING, niter=2)
    root = s[:rank].sqrt()
    return left[:, :rank] * root, (right[:, :rank] * root).T.contiguous()


_OVERSAMPLING = 8  # Halko, Martinsson and Tropp 2011 suggest 5 to 10 more directions than are wanted.


def least_squares_on_support(W: Tensor, mask: Tensor, S: Tensor, H: Tensor, iterations: int) -> Tensor:
    """Improves S on a fixed support: a few steps of min ‖(W − S)X‖² over the entries of the mask.

    Every row is a least-squares problem of its own; conjugate gradients with Jacobi preconditioning run on all rows
    at once, at the cost of one [N, K]·[K, K] product per step. Each step lowers the error of each row.

    Args:
        W: [N, K], the target.
        mask: bool [N, K].
        S: [N, K], the start, zero outside the mask.
        H: [K, K], positive definite (see `damped`).
        iterations: Steps.
    """
    support = mask.to(W.dtype)
    inverse_diagonal = 1 / H.diagonal()
    residual = ((W - S) @ H) * support
    step = residual * inverse_diagonal
    direction = step.clone()
    energy = (residual * step).sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ H) * support
        # A row that is solved already has no energy left; it must not divide by zero.
        length = energy / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
        S = S + length * direction
        residual = residual - length * image
        step = residual * inverse_diagonal
        previous, energy = energy, (residual * step).sum(1, keepdim=True)
        direction = step + energy / previous.clamp_min(torch.finfo(W.dtype).tiny) * direction
    return S
