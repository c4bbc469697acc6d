"""The output head in int8: the largest matrix of a small model, which decode reads once for every token.

A head of [N, K] becomes a `LowRankSparseLinear` that stores every entry and has rank 0: int8 values with one float16
scale per row and 64 columns. Its values are then row after row, so a tied embedding looks its rows up in them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.budget import stored_bytes
from compress.layer import SCALE_GROUP, LowRankSparseLinear, pack
from compress.quantize import round_to_nearest
from compress.report import LayerReport
from compress.shards import read_header, read_tensor, write_shard
from compress.source import Source


class HeadEmbedding(nn.Module):
    """An embedding that has no weights of its own: its rows are those of an int8 head.

    Args:
        head: Holds every entry of [vocabulary, hidden size].
        dtype: Of what comes out.
    """

    def __init__(self, head: LowRankSparseLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._head = (head,)  # in a tuple, or its parameters would have a second name in the model
        self.dtype = dtype  # transformers refuses `model.to(dtype)` for models with quantized weights

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., K] of token ids [...]."""
        (head,) = self._head
        K = head.in_features
        assert head.scales is not None
        rows = functional.embedding(ids, head.values.view(head.out_features, K)).to(self.dtype)
        scales = functional.embedding(ids, head.scales).to(self.dtype)
        return rows * scales[..., None].expand(*scales.shape, SCALE_GROUP).flatten(-2)[..., :K]


def head_names(source: Source) -> tuple[str, str | None]:
    """Module names of a model's head, and of the embedding if the two are tied, else None."""
    model = source.model
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return names[id(head)], names[id(embedding)] if model.config.tie_word_embeddings else None


def quantize_head(shard: Path, source: Source) -> LayerReport:
    """Rounds the head in the shard that holds what is outside the blocks; a tied embedding goes with it.

    Args:
        shard: A file with the head, or with the embedding that it is tied to; replaced.
        source: The dense model.
    """
    head, embedding = head_names(source)
    tensors = {name: read_tensor(name, ref) for name, ref in read_header(shard).items()}
    W = tensors.pop(f"{embedding or head}.weight")
    if embedding:
        tensors.pop(f"{head}.weight", None)  # some files hold both
    N, K = W.shape
    rounded, scales = round_to_nearest(W, 8)
    bitmap, values = pack(rounded, torch.ones(N, K, dtype=torch.bool))
    parts = {
        "bitmap": bitmap,
        "values": values,
        "U": torch.empty(N, 0, dtype=torch.bfloat16),
        "V": torch.empty(0, K, dtype=torch.bfloat16),
        "scales": scales,
    }
    write_shard(shard, tensors | {f"{head}.{part}": tensor for part, tensor in parts.items()})
    return LayerReport(
        head, N, K, rank=0, nnz=N * K, bytes=stored_bytes(N, K, N * K, 0, value_bits=8), dense_bytes=W.nbytes
    )
