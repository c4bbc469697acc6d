"""`LowRankSparseLinear`, the definition of the operator, and the packing of its sparse part.

    Y = X · (S + U·V)ᵀ + bias

S is stored as a bitmap (one bit per entry, rows padded to whole 64 columns, LSB first: the "rows64" layout of
docs/architecture.md) and the stored values in row-major order, int4 ones two to a byte (`compress.int4`). Every other
form of the operator, in ONNX, C++ or CUDA, is tested against this file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.int4 import block_counts, unpack_int4

SCALE_GROUP = 64  # columns of a row that share one scale of int8 or int4 values

# Multiplying eight bytes of 0 or 1 by this constant gathers them, first byte lowest, in the top byte of the product:
# byte i (bit 8i) meets 2^(56-7i) and lands on bit 56+i; no other pair of bits reaches the top byte, and none collide.
_GATHER_BITS = 0x0102040810204080


def bitmap_words(K: int) -> int:
    """Number of int32 words in one row of the bitmap of a layer with K inputs."""
    return 2 * ((K + 63) // 64)


def pack(S: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Packs the entries of S that the mask selects.

    Args:
        S: [N, K], any floating dtype. Entries outside the mask are dropped.
        mask: bool [N, K], what is stored. A stored entry may be zero.

    Returns:
        bitmap int32 [N, 2·⌈K/64⌉] and values [nnz] in the dtype of S.
    """
    N, K = S.shape
    padded = functional.pad(mask, (0, 32 * bitmap_words(K) - K)).contiguous()
    bits = (padded.view(torch.int64) * _GATHER_BITS) >> 56
    return bits.to(torch.uint8).view(torch.int32).reshape(N, bitmap_words(K)), torch.masked_select(S, mask)


def unpack_mask(bitmap: Tensor, K: int) -> Tensor:
    """The mask, bool [N, K], that a bitmap int32 [N, 2·⌈K/64⌉] holds."""
    N = bitmap.shape[0]
    spread = _bits_of_bytes(bitmap.device)[bitmap.contiguous().view(torch.uint8).reshape(-1).int()]
    return spread.view(torch.bool).view(N, 32 * bitmap.shape[1])[:, :K]


def unpack(bitmap: Tensor, values: Tensor, K: int) -> Tensor:
    """The inverse of `pack`: S [N, K] in the dtype of `values`, zero where nothing is stored."""
    S = torch.zeros(bitmap.shape[0], K, dtype=values.dtype, device=values.device)
    return S.masked_scatter_(unpack_mask(bitmap, K), values)


def decode(bitmap: Tensor, values: Tensor, scales: Tensor | None, K: int, dtype: torch.dtype) -> Tensor:
    """S [N, K] in a floating dtype, from values of any type.

    Args:
        bitmap: int32 [N, 2·⌈K/64⌉].
        values: [nnz], floating or int8; or uint8 [Σ ⌈c/2⌉], packed int4.
        scales: [N, ⌈K/64⌉], what int8 and int4 values of a row and aligned 64 columns are multiplied with; None for
            floats.
        K: Inputs of the layer.
        dtype: Of the result.
    """
    if values.dtype == torch.uint8:
        values = unpack_int4(bitmap, values)
    S = unpack(bitmap, values.to(dtype), K)
    if scales is None:
        return S
    return S.mul_(scales.to(dtype).repeat_interleave(SCALE_GROUP, dim=1)[:, :K])


def _bits_of_bytes(device: torch.device) -> Tensor:
    """int64 [256]: entry b holds the eight bits of b as eight bytes of 0 or 1, lowest bit first."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).reshape(256)


def _linear(x: Tensor, S: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    y = functional.linear(x, S, None if bias is None else bias.to(x.dtype))
    if U.shape[1]:
        y = y + functional.linear(functional.linear(x, V.to(x.dtype)), U.to(x.dtype))
    return y


@torch.library.custom_op("sslc::low_rank_sparse_linear", mutates_args=())
def low_rank_sparse_linear(
    x: Tensor,
    bitmap: Tensor,
    values: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Y = X · Sᵀ + (X · Vᵀ) · Uᵀ + bias, decoding S on every call.

    An operator of its own, `torch.ops.sslc.low_rank_sparse_linear`, so that torch.export keeps it as one node.

    Args:
        x: [..., K], the activations. Weights are converted to its dtype.
        bitmap: int32 [N, 2·⌈K/64⌉].
        values: [nnz], the stored entries of S; or uint8, packed int4.
        U: [N, r]. r may be 0.
        V: [r, K].
        bias: [N] or None.
        scales: [N, ⌈K/64⌉] for int8 and int4 values, else None.

    Returns:
        [..., N] in the dtype of x.
    """
    return _linear(x, decode(bitmap, values, scales, x.shape[-1], x.dtype), U, V, bias)


@low_rank_sparse_linear.register_fake
def _(
    x: Tensor,
    bitmap: Tensor,
    values: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], U.shape[0])


class LowRankSparseLinear(nn.Module):
    """A linear layer whose weight is S + U·V, with S sparse and packed.

    Created empty (on the meta device inside `torch.device("meta")`); its tensors come from `from_parts` or from a
    checkpoint. Their dtype is the stored one, whatever the dtype of the activations.

    Args:
        N: Outputs.
        K: Inputs.
        nnz: Stored values of S.
        rank: r, may be 0.
        bias: Whether there is a bias.
        dtype: Of values, U and V. With int8 values and with uint8 ones, which are packed int4, there are scales, and U
            and V are bfloat16.
        bias_dtype: Of the bias; None for `dtype`.
        packed: Bytes of packed int4 values.
    """

    bitmap: Tensor

    def __init__(
        self,
        N: int,
        K: int,
        nnz: int,
        rank: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype | None = None,
        packed: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.nnz = K, N, rank, nnz
        self.register_buffer("bitmap", torch.empty(N, bitmap_words(K), dtype=torch.int32))
        self.values = _parameter(torch.empty(nnz if packed is None else packed, dtype=dtype))
        quantized = not dtype.is_floating_point
        factors = torch.bfloat16 if quantized else dtype
        self.U = _parameter(torch.empty(N, rank, dtype=factors))
        self.V = _parameter(torch.empty(rank, K, dtype=factors))
        self.bias = _parameter(torch.empty(N, dtype=bias_dtype or factors)) if bias else None
        scales = torch.empty(N, bitmap_words(K) // 2, dtype=torch.float16) if quantized else None
        self.scales = None if scales is None else _parameter(scales)
        self._keep = False
        self._decoded: Tensor | None = None

    @classmethod
    def from_parts(
        cls,
        bitmap: Tensor,
        values: Tensor,
        U: Tensor,
        V: Tensor,
        bias: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> LowRankSparseLinear:
        """A layer that uses the given tensors as they are."""
        packed = len(values) if values.dtype == torch.uint8 else None
        nnz = len(values) if packed is None else int(block_counts(bitmap).sum())
        N, K, rank, dtype = U.shape[0], V.shape[1], U.shape[1], values.dtype
        with torch.device("meta"):
            layer = cls(N, K, nnz, rank, bias=bias is not None, dtype=dtype, packed=packed)
        layer.bitmap = bitmap
        layer.values, layer.U, layer.V = _parameter(values), _parameter(U), _parameter(V)
        layer.bias = None if bias is None else _parameter(bias)
        layer.scales = None if scales is None else _parameter(scales)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., N] of X [..., K]."""
        if not self._keep:
            weights = (self.bitmap, self.values, self.U, self.V, self.bias, self.scales)
            return torch.ops.sslc.low_rank_sparse_linear(x, *weights)
        if self._decoded is None or self._decoded.dtype != x.dtype:
            self._decoded = self._decode(x.dtype)
        return _linear(x, self._decoded, self.U, self.V, self.bias)

    def keep_decoded(self, keep: bool) -> None:
        """See the function `keep_decoded`."""
        self._keep, self._decoded = keep, None

    @property
    def weight(self) -> Tensor:
        """The dense S + U·V [N, K], made on each access: model code that looks at `layer.weight` sees the truth."""
        dtype = torch.float32 if self.scales is not None else self.U.dtype
        return self._decode(dtype) + self.U.to(dtype) @ self.V.to(dtype)

    def _decode(self, dtype: torch.dtype) -> Tensor:
        scales = None if self.scales is None else self.scales.detach()
        return decode(self.bitmap, self.values.detach(), scales, self.in_features, dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nnz={self.nnz}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def keep_decoded(model: nn.Module, keep: bool = True) -> None:
    """Makes the compressed layers of a model keep S decoded from their next forward on, or drop it again.

    Decoding S costs about as much as multiplying it with a few tokens, so generation token by token in PyTorch is
    several times faster with this; results are the same bit for bit. The price is the memory of the dense model, and
    that a trace of the model no longer contains the operator: leave it off (the default) for export.
    """
    for module in model.modules():
        if isinstance(module, LowRankSparseLinear):
            module.keep_decoded(keep)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
