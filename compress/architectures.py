"""Which models can be compressed, and where their parts are: decoder blocks and the linear layers inside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compress.format import read_config
from sslc_common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Where each family keeps its decoder blocks. A model type that is not here is refused rather than guessed at.
BLOCKS = {
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "mistral": "model.layers",
    "opt": "model.decoder.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}


def require_supported(folder: Path) -> dict[str, Any]:
    """config.json of a folder whose architecture is supported.

    Raises:
        InputError: it is not, or there is no config.
    """
    config = read_config(folder)
    model_type = config.get("model_type")
    if model_type not in BLOCKS:
        raise InputError(
            f"{folder} has an architecture that is not supported",
            got=f"model_type {model_type!r}",
            allowed=", ".join(sorted(BLOCKS)),
            do="Choose another model",
        )
    return config


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder with its parameters on the meta device and its buffers (rotary tables) real.

    Raises:
        InputError: config.json does not describe a model that transformers can build.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    require_supported(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'} does not describe a model that transformers can build",
            got=f"{type(error).__name__}: {error}",
            do="Compare it with the original config.json, or download the model again",
        ) from error
    return model.eval()


def block_names(model: PreTrainedModel) -> list[str]:
    """Module names of the decoder blocks, in order: "model.layers.0", ..."""
    path = BLOCKS[model.config.model_type]
    return [f"{path}.{index}" for index in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by name: nn.Linear, and GPT-2's Conv1D, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(N, K): outputs and inputs of one of `linears`."""
    first, second = linear.weight.shape  # type: ignore[misc]
    return (first, second) if isinstance(linear, nn.Linear) else (second, first)


def output_rows(linear: nn.Module, weight: Tensor) -> Tensor:
    """The weight of one of `linears` as [N, K], a view."""
    return weight if isinstance(linear, nn.Linear) else weight.T
