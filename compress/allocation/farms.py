"""FARMS: blocks whose spectra have heavier tails keep more, the tails measured on square sub-matrices.

Hu, Goel, Killiakov and Yang, "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias", ICML 2025, on Lu,
Zhou, Liu et al., "AlphaPruning", NeurIPS 2024. With the eigenvalues λ of B·Bᵀ of all sub-matrices B of W together,
ascending, n of them and k = n/2 (Hill estimator):

    α = 1 + k / Σ ln(λ[n − i + 1] / λ[n − k]),  i = 1 ... k;   the mean over a block's layers
    sparsity[b] = η·(1 − τ + 2τ·(α[b] − min α)/(max α − min α)),  η such that the budget is kept

The authors take square windows of 2000 at 15 × 15 places of matrices of 4096 and more; here a window's side is half of
the matrix's shorter side, at most 2000, at 4 × 4 places that cover the matrix, as spectra are costly without a GPU.
No data is looked at.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.allocation.exact import at_threshold
from compress.allocation.problem import LOOP, Problem, Shares
from compress.allocation.scores import eigenvalues

WINDOW = 2000  # side of a sub-matrix, at most
PLACES = 4  # of windows along each side
SPREAD = 0.3  # AlphaPruning's τ; the authors search it, mostly to 0.2 or 0.3


def share(problem: Problem) -> Shares:
    """The same density for all layers of a block."""
    exponents = np.array([tail_exponent(problem.weight(name)) for name in problem.progress(problem.names, LOOP)])
    blocks = np.zeros(len(problem.names))
    for layers in problem.block_members().values():
        blocks[layers] = exponents[layers].mean()
    extent = blocks.max() - blocks.min()
    relative = (blocks - blocks.min()) / extent if extent else np.full(len(blocks), 0.5)
    factors = 1 - SPREAD + 2 * SPREAD * relative

    def wanted(scale: float) -> np.ndarray:
        return np.maximum(1 - scale * factors, 0) * problem.sizes

    return Shares(at_threshold(problem, wanted, 0.0, 1 / factors.min())[0])


def tail_exponent(W: Tensor) -> float:
    """α of a weight [N, K], the smaller the heavier the tail of its windows' spectra."""
    side = min(WINDOW, max(min(W.shape) // 2, 1))
    rows, columns = (np.unique(np.linspace(0, length - side, PLACES).astype(int)) for length in W.shape)
    windows = (W[row : row + side, column : column + side] for row in rows for column in columns)
    return hill(torch.cat([eigenvalues(window) for window in windows]).double().sort().values)


def hill(spectrum: Tensor) -> float:
    """The exponent of a power law, by Hill's estimator over the upper half of a spectrum [n], ascending."""
    tail = spectrum[len(spectrum) // 2 :].clamp_min(torch.finfo(torch.float32).eps * float(spectrum[-1]))
    excess = float((tail / tail[0]).log().mean()) if float(tail[0]) > 0 else 0.0
    return 1 + 1 / max(excess, torch.finfo(torch.float32).eps)
