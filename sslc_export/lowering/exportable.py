"""What makes a transformers model exportable: attention as one ONNX node, and a cache of plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

ATTENTION = "sslc_onnx"  # our entry in transformers' tables of attention implementations
WRAPPED = "wrapped"  # what FlatCache calls its model; the exporter puts it before each name


class FlatCache(nn.Module):
    """A model whose cache goes in and out as plain tensors: the exporter does not take a Cache object."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.add_module(WRAPPED, model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits and the new keys and values; `past` and the cache in the result are key, value, key, value, ..."""
        # Without a config every layer of the cache keeps all tokens; the mask alone makes a window slide.
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        logits = self.get_submodule(WRAPPED)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))  # type: ignore


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """ONNX `Attention`, which shares key and value heads between query heads by itself."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # One output only: TensorRT refuses the node when its cache outputs are used.
    output = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scale)[0]
    return output.transpose(1, 2).contiguous(), None


def _mask(attention_mask: Tensor, **kwargs: Any) -> Tensor:
    """Who sees whom, bool [batch, 1, sequence, total]: causal, inside the window, and not padding."""
    # Padding is applied here because transformers looks it up entry by entry (GatherND) rather than by broadcasting.
    pattern = sdpa_mask(**{**kwargs, "attention_mask": None, "allow_is_causal_skip": False})
    assert pattern is not None
    return pattern & attention_mask[:, None, None, :]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
