"""From a dense model to a sparse + low-rank one, in PyTorch: solvers, budgets, calibration, the checkpoint format."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel


def load(folder: Path | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A dense or compressed folder as a transformers model; see `compress.hf.load`.

    PyTorch and transformers are imported only when this is called.
    """
    from compress import hf

    return hf.load(folder, dtype)
