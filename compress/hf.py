"""Compressed folders in transformers: importing this module teaches `from_pretrained` the quant_method "sslc".

import compress.hf
model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.architectures import linear_shape, linears, require_supported
from compress.format import QUANT_METHOD, Checkpoint
from compress.head import HeadEmbedding
from compress.layer import LowRankSparseLinear
from sslc_common.errors import InputError

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def load(folder: Path | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A dense or compressed folder as a transformers model, every tensor verified.

    Args:
        folder: A Hugging Face folder.
        dtype: Of the activations and of what is not compressed; None for what config.json says. Compressed layers
            keep their stored dtype and follow the activations.

    Raises:
        InputError: the folder is damaged, or its tensors are not those of its architecture.
    """
    folder = Path(folder)
    require_supported(folder)
    Checkpoint.open(folder).verify()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise InputError(
                f"The tensors in {folder} are not those of its architecture: {kind.replace('_', ' ')}",
                got=", ".join(sorted(map(str, info[kind]))[:4]),
                do="Copy or download the folder again",
            )
    return model


@register_quantization_config(QUANT_METHOD)
class SslcConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder, kept as it is written (docs/format.md)."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]


@register_quantizer(QUANT_METHOD)
class SslcQuantizer(HfQuantizer):
    """Puts empty LowRankSparseLinear layers into a model before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        checkpoint = Checkpoint.open(Path(kwargs["checkpoint_files"][0]).parent)
        replace_layers(model, checkpoint, model.dtype)
        return model

    def is_serializable(self) -> bool:
        """False: save_pretrained would write no checksums; compressed folders come from compress.pipeline."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: the operator has no gradient."""
        return False


def replace_layers(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Replaces the linear layers that a checkpoint holds compressed by empty LowRankSparseLinear ones, on meta.

    Embeddings whose rows are in one of them are replaced too, and no longer tied as transformers ties them.

    Args:
        model: Of the checkpoint's architecture.
        checkpoint: What `model` is to hold.
        dtype: Of the activations.

    Raises:
        InputError: the architecture has no such layer, or one of another size.
    """
    dense = linears(model)
    for name, info in checkpoint.layers.items():
        shape = linear_shape(dense[name]) if name in dense else None
        if shape != (info.N, info.K):
            raise InputError(
                f"{checkpoint.folder / 'config.json'}: layer {name} does not fit the architecture",
                got=[info.N, info.K],
                allowed=f"{list(shape)}" if shape else "the model's own linear layers",
                do="Copy or download the folder again, or compress the model again",
            )
        with torch.device("meta"):
            layer = LowRankSparseLinear(
                info.N,
                info.K,
                info.nnz,
                info.rank,
                bias=info.bias is not None,
                dtype=_TORCH_DTYPES[info.dtype],
                bias_dtype=_TORCH_DTYPES[info.bias] if info.bias else None,
                packed=info.packed,
            )
        model.set_submodule(name, layer)
    for name, holder in checkpoint.embeddings.items():
        embedding = dict(model.named_modules()).get(name)
        info = checkpoint.layers[holder]
        if not isinstance(embedding, nn.Embedding) or embedding.weight.shape != (info.N, info.K):
            raise InputError(
                f"{checkpoint.folder / 'config.json'}: embedding {name} does not fit the architecture",
                got=[info.N, info.K],
                allowed=f"{list(embedding.weight.shape)}" if isinstance(embedding, nn.Embedding) else "an embedding",
                do="Copy or download the folder again, or compress the model again",
            )
        head = model.get_submodule(holder)
        assert isinstance(head, LowRankSparseLinear)
        model.set_submodule(name, HeadEmbedding(head, dtype))
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}  # nothing else is tied in the supported architectures
