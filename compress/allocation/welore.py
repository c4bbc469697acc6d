"""WeLore: one threshold on normalised singular values for the whole model.

Jaiswal, Yin, Zhang et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
2024 (arXiv 2407.11239). With the singular values σ of a layer over its largest,

    share[l] = share of layer l's σ/σ₁ that are above t,  one t for the model such that the budget is kept

**Adapted**: the paper allocates ranks. It truncates a layer to the directions above t where that is less than half of
them, and leaves it dense where it is not. Here the same number decides which share of its values a layer keeps, sparse
or low-rank as the method has it: a layer whose spectrum falls fast can do with few. No data is looked at.
"""

from __future__ import annotations

import numpy as np
import torch

from compress.allocation.exact import at_threshold
from compress.allocation.problem import LOOP, Problem, Shares
from compress.allocation.scores import eigenvalues, share_above


def share(problem: Problem) -> Shares:
    """As large a share of a layer's values as of its singular values above the threshold."""
    spectra = []
    for name in problem.progress(problem.names, LOOP):
        sigma = eigenvalues(problem.weight(name)).sqrt()
        spectra.append((sigma / sigma[-1].clamp_min(torch.finfo(sigma.dtype).tiny)).numpy())

    def wanted(threshold: float) -> np.ndarray:
        return np.array([share_above(layer, threshold) for layer in spectra]) * problem.sizes

    return Shares(at_threshold(problem, wanted, 0.0, 1.0 + float(np.finfo(np.float32).eps))[0])
