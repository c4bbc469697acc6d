"""What makes shards a Hugging Face folder: the index, config.json, and the files that travel with every model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compress.format import FORMAT_VERSION, INDEX, QUANT_METHOD
from compress.shards import TensorRef, read_header
from sslc_common.files import atomic_path

# Tokenizer and generation files, as transformers names them. Weights and config.json are written anew.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.*",
    "chat_template*",
    "LICENSE*",
)


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (from 0) of `count`, in Hugging Face's manner."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def copy_companions(source: Path, out: Path) -> None:
    """Copies tokenizer and generation files; links are followed."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
            elif path.is_dir():
                shutil.copytree(path, out / path.name, dirs_exist_ok=True)


def write_index(out: Path, shards: list[str]) -> dict[str, TensorRef]:
    """Writes model.safetensors.index.json over the given shards and returns their tensors."""
    headers = {shard: read_header(out / shard) for shard in shards}
    tensors = {name: ref for header in headers.values() for name, ref in header.items()}
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    total = sum(ref.length for ref in tensors.values())
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return tensors


def write_config(out: Path, source_config: dict[str, Any], compression: dict[str, Any]) -> None:
    """Writes config.json: the source's, with the compression as its `quantization_config`."""
    quantization = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **compression}
    write_json(out / "config.json", {**source_config, "quantization_config": quantization})


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
