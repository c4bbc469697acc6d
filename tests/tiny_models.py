"""Tiny random models, compressed at random and lowered: each is made once per test session."""

from __future__ import annotations

import atexit
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from compress.architectures import block_names, linears
from compress.folder import shard_name, write_config, write_index
from compress.hf import load
from compress.int4 import pack_int4
from compress.layer import pack
from compress.quantize import round_to_nearest
from compress.shards import write_shard
from sslc_export.engines.pytorch import TorchEngine
from sslc_export.lowering.lower import LoweringReport, lower
from tests.compress.models import FAMILIES, VOCABULARY, save_tiny

__all__ = ["DENSE_FAMILIES", "FAMILIES", "VOCABULARY", "Lowered", "compress_at_random", "lowered", "save_tiny"]

# Compressed models keep a dense layer in each block, so these suffice: without biases, with them, and with Conv1D.
DENSE_FAMILIES = ("llama", "qwen2", "gpt2")


@dataclass(frozen=True)
class Lowered:
    """A lowered tiny model.

    Attributes:
        folder: The Hugging Face folder, inside the folder of `report.path`.
        report: What `lower` said.
    """

    folder: Path
    report: LoweringReport

    @property
    def path(self) -> Path:
        return self.report.path

    def torch_engine(self) -> TorchEngine:
        return TorchEngine(load(self.folder, dtype=torch.float32))


def lowered(
    family: str, *, compressed: bool = True, dtype: torch.dtype = torch.float32, **overrides: object
) -> Lowered:
    """A model of 2 blocks, as a folder and as `engine.onnx` beside it."""
    return _lowered(family, compressed, dtype, tuple(overrides.items()))


@cache
def _lowered(family: str, compressed: bool, dtype: torch.dtype, overrides: tuple[tuple[str, object], ...]) -> Lowered:
    place = tempfile.TemporaryDirectory(prefix="sslc-tiny-")
    atexit.register(place.cleanup)
    dense_dtype = dtype if dtype.is_floating_point else torch.float32
    folder = save_tiny(Path(place.name) / "dense", family, dense_dtype, **{_layers_key(family): 2, **dict(overrides)})
    if compressed:
        folder = compress_at_random(folder, Path(place.name) / "compressed", dtype)
    return Lowered(folder, lower(folder, Path(place.name) / "engine.onnx"))


def _layers_key(family: str) -> str:
    return "n_layer" if family == "gpt2" else "num_hidden_layers"


def compress_at_random(dense: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A compressed folder with random masks and factors.

    Of each block one layer stays dense. One has no low-rank part, one stores nothing, one stores everything.
    With int8 values, and with uint8 ones, which are packed int4, U and V are bfloat16.
    """
    model = load(dense)
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for block in block_names(model):
        for index, (name, linear) in enumerate(linears(model.get_submodule(block)).items()):
            if index == 3:
                continue
            name = f"{block}.{name}"
            W = tensors.pop(f"{name}.weight").float()
            W = W if isinstance(linear, torch.nn.Linear) else W.T
            N, K = W.shape
            rank = 0 if index == 0 else 3 + index
            density = {1: 0.0, 2: 1.0}.get(index, 0.5)
            mask = torch.rand(N, K, generator=generator) < density
            factors, bits = dtype, {torch.int8: 8, torch.uint8: 4}.get(dtype)
            if bits:
                factors = torch.bfloat16
                W, tensors[f"{name}.scales"] = round_to_nearest(W * mask, bits)
            bitmap, values = pack(W if bits else W.to(dtype), mask)
            nnz = len(values)
            if bits == 4:
                values = pack_int4(bitmap, values)
            tensors[f"{name}.bitmap"], tensors[f"{name}.values"] = bitmap, values
            tensors[f"{name}.U"] = (torch.randn(N, rank, generator=generator) * 0.1).to(factors)
            tensors[f"{name}.V"] = (torch.randn(rank, K, generator=generator) * 0.1).to(factors)
            layers[name] = {"N": N, "K": K, "rank": rank, "nnz": nnz}
    out.mkdir()
    names = sorted(tensors)
    shards = {shard_name(0, 2): names[::2], shard_name(1, 2): names[1::2]}
    for shard, members in shards.items():
        write_shard(out / shard, {name: tensors[name] for name in members})
    write_index(out, list(shards))
    write_config(out, json.loads((dense / "config.json").read_text()), {"layers": layers})
    return out
