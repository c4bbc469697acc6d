"""A transformers model as an engine: the reference that the others are judged against."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from sslc_export.engines.inputs import model_inputs


class TorchEngine:
    """Runs a transformers model, dense or compressed, in the precision that it has; logits come back as float32.

    A reference should be float32: `compress.hf.load(folder, dtype=torch.float32)`.

    Args:
        model: A causal language model, on any device.
        name: How reports call it.

    Attributes:
        name: How reports call it.
        vocab_size: Width of the logits.
        num_layers: Decoder blocks.
    """

    def __init__(self, model: PreTrainedModel, name: str = "PyTorch") -> None:
        self.name = name
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.num_layers: int = model.config.get_text_config().num_hidden_layers
        self._model = model.eval()

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, cache: Any = None
    ) -> tuple[np.ndarray, Any]:
        """One forward pass; see `validate.engine.Engine`."""
        past = 0 if cache is None else cache.get_seq_length()
        ids, mask, positions = (
            torch.from_numpy(array).to(self._model.device) for array in model_inputs(input_ids, attention_mask, past)
        )
        with torch.inference_mode():
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=DynamicCache(config=self._model.config) if cache is None else _fork(cache),
                use_cache=True,
            )
        return output.logits.float().cpu().numpy(), output.past_key_values


def _fork(cache: Cache) -> Cache:
    """A cache that can grow while the given one stays as it is.

    A layer's update binds new tensors to it and changes none, so copies of the layer objects suffice.
    """
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked
