"""Compressed folders in transformers: importing this module teaches `from_pretrained` the quant_method "sslc".

import compress.hf
model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.architectures import linear_shape, linears, require_supported
from compress.format import QUANT_METHOD, Checkpoint
from compress.layer import LowRankSparseLinear
from sslc_common.errors import InputError

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
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
        replace_linears(model, checkpoint)
        return model

    def is_serializable(self) -> bool:
        """False: save_pretrained would write no checksums; compressed folders come from compress.pipeline."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: the operator has no gradient."""
        return False


def replace_linears(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Replaces the linear layers that a checkpoint holds compressed by empty LowRankSparseLinear ones, on meta.

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
            )
        model.set_submodule(name, layer)
