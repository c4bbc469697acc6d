"""Linear algebra that the methods share. H is always the Gram matrix X·Xᵀ / tokens [K, K] of a layer's inputs."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

DAMPING = 0.01  # Share of the mean of H's diagonal that is added to it, as in SparseGPT.
_SEEDING = threading.Lock()


def input_norms(H: Tensor) -> Tensor:
    """D [K] = √diag(H), the root mean square of every input, kept away from zero so that it can be divided by."""
    d = H.diagonal().clamp_min(0).sqrt()
    return d.clamp_min(1e-4 * d.square().mean().sqrt()).clamp_min(torch.finfo(d.dtype).tiny ** 0.5)


def damped(H: Tensor) -> Tensor:
    """H + 1 % of its mean diagonal, positive definite even where there are fewer tokens than inputs, or dead inputs."""
    mean = H.diagonal().mean()
    H = H.clone()  # and no identity: with 11008 inputs each such matrix is half a gigabyte
    H.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return H


def low_rank(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [N, r], V [r, K] with U·V the best rank-r approximation of A [N, K], to about 0.1 % of what it leaves.

    A randomized SVD with two power steps and as many directions more as are wanted; the exact one where that is no
    slower. The singular values are split evenly between U and V, so that both have entries of a size that bf16 likes.
    """
    columns = _columns(A, rank, 2)
    if columns is None:
        left, s, right = torch.linalg.svd(A, full_matrices=False)
        right = right.T
    elif rank:
        left, s, right = randomized_svd(A, columns)
    else:
        return A.new_zeros(A.shape[0], 0), A.new_zeros(0, A.shape[1])
    root = s[:rank].sqrt()
    return left[:, :rank] * root, (right[:, :rank] * root).T.contiguous()


def randomized_svd(A: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.svd_lowrank` with two power steps and always the same numbers, layers being solved side by side or not.

    It draws from the generator that all threads share, and takes no other.
    """
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(A, columns, niter=2)


def whitened_low_rank(W: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U, V with U·V the best rank-r approximation of W in ‖·X‖, for XXᵀ = R·Rᵀ with R = `root` [K, K], lower."""
    U, V = low_rank(W @ root, rank)
    return U, torch.linalg.solve_triangular(root, V, upper=False, left=False)


def low_rank_again(
    A: Tensor, rank: int, basis: Tensor | None, G: Tensor | None = None, directions: float = 3
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `low_rank`, for a matrix that is a little other than in the last turn: for methods that take an SVD in each.

    One step of subspace iteration from the directions of the last turn costs two products with A, where a randomized
    SVD from nothing costs six, and over the turns the directions come as close to those of an exact SVD. In ‖·X‖ it
    runs on A·R, G = R·Rᵀ, without R and without that product: all that is needed of it is (A·R)·(A·R)ᵀ = A·G·Aᵀ.

    Args:
        A: [N, K].
        rank: r.
        basis: [K, directions] of the last turn; None in the first.
        G: X·Xᵀ [K, K], positive definite, to approximate A best in ‖·X‖; None for the Frobenius norm.
        directions: How many there are for each that is wanted.

    Returns:
        U [N, r], V [r, K] and the basis for the next turn.
    """
    columns = _columns(A, rank, directions)
    if columns is None or rank == 0:
        U, V = low_rank(A, rank) if G is None else whitened_low_rank(A, torch.linalg.cholesky(G), rank)
        return U, V, None
    steps = 1 if basis is not None else 3
    if basis is None:
        basis = torch.randn(A.shape[1], columns, dtype=A.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        Q = torch.linalg.qr(A @ basis).Q
        inside = Q.T @ A
        image = inside if G is None else inside @ G
        squares, left = (part.flip(-1) for part in torch.linalg.eigh(image @ inside.T))
        basis = image.T @ left
    size = squares[:rank].clamp_min(torch.finfo(A.dtype).tiny) ** 0.25
    left = left[:, :rank]
    return Q @ (left * size), (left.T @ inside) / size[:, None], basis


def _columns(A: Tensor, rank: int, times: float) -> int | None:
    """Directions of a randomized SVD; None where they are more than half of all, and an exact one is no slower.

    Eight more than are wanted do where the singular values fall fast (Halko, Martinsson and Tropp 2011). Those of
    weights hardly fall: on one of SmolLM2-135M's, whitened, eight more left 2 % more than the best of rank 144, twice
    as many within 0.1 %. Over the 80 turns of OATS with 2:4, twice as many ended with 0.8 % more error than exact SVDs,
    three times as many within 0.1 %.
    """
    columns = round(times * max(rank, 8))
    return None if rank and columns > min(A.shape) // 2 else columns


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
    # In place: with 11008 inputs and 4096 outputs each such matrix takes 180 MB.
    support = mask.to(W.dtype)
    inverse_diagonal = 1 / H.diagonal()
    residual = ((W - S) @ H).mul_(support)
    step = residual * inverse_diagonal
    direction = step.clone()
    energy = (residual * step).sum(1, keepdim=True)
    S = S.clone()
    for _ in range(iterations):
        image = (direction @ H).mul_(support)
        # A row that is solved already has no energy left; it must not divide by zero.
        length = energy / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
        S += length * direction
        residual -= image.mul_(length)
        torch.mul(residual, inverse_diagonal, out=step)
        previous, energy = energy, (residual * step).sum(1, keepdim=True)
        direction.mul_(energy / previous.clamp_min(torch.finfo(W.dtype).tiny)).add_(step)
    return S
