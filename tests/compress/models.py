"""Tiny random models of every supported family, as Hugging Face folders."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "opt", "gpt2")
VOCABULARY = 97

_DECODER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_SIZES = {
    "llama": _DECODER,
    "qwen2": {k: v for k, v in _DECODER.items() if k != "head_dim"},
    "qwen3": _DECODER,
    "mistral": _DECODER | {"sliding_window": 8},
    "opt": {
        "hidden_size": 48,
        "ffn_dim": 80,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 48,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
    "gpt2": {
        "n_embd": 48,
        "n_inner": 80,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **overrides: object) -> torch.nn.Module:
    """A model with random weights and, where the family has them, random biases."""
    config = AutoConfig.for_model(family, **(_SIZES[family] | overrides), dtype=dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def save_tiny(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **kwargs: object) -> Path:
    """Saves `tiny_model` as transformers does. `max_shard_size` makes several files."""
    shard_size = kwargs.pop("max_shard_size", "5GB")
    tiny_model(family, dtype, **kwargs).save_pretrained(folder, max_shard_size=shard_size)
    return folder
