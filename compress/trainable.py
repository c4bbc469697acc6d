"""A compressed layer whose kept values, U, V and bias can be trained, as the operator itself has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.layer import LowRankSparseLinear, unpack_mask
from compress.source import assign


class TrainableLinear(nn.Module):
    """A LowRankSparseLinear with float32 parameters; the mask stays as it is.

    Args:
        layer: With floating values.
    """

    def __init__(self, layer: LowRankSparseLinear) -> None:
        super().__init__()
        # A copy, as all that is kept: a tensor that is mapped from a file keeps the whole of it in memory.
        self.bitmap, self.shape = layer.bitmap.clone(), (layer.out_features, layer.in_features)
        self.places = unpack_mask(layer.bitmap, layer.in_features).flatten().nonzero()[:, 0]
        self.values = nn.Parameter(layer.values.float().clone())
        self.U, self.V = nn.Parameter(layer.U.float().clone()), nn.Parameter(layer.V.float().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., N] of X [..., K]."""
        N, K = self.shape
        S = self.values.new_zeros(N * K).scatter(0, self.places, self.values).view(N, K)
        if not self.U.shape[1]:
            return functional.linear(x, S, self.bias)
        # U and V not in bfloat16: oneDNN compiles and keeps kernels for every shape, and nearly every layer has a rank
        # of its own. Block after block of SmolLM2 that took 8 to 20 MB more.
        if self.values.requires_grad:
            # The values take the gradient of a dense weight in any case, and with that those of U and V are cheap.
            with torch.autocast("cpu", enabled=False):
                weight = torch.addmm(S, self.U, self.V)
            return functional.linear(x, weight, self.bias)
        y = functional.linear(x, S, self.bias)
        with torch.autocast("cpu", enabled=False):
            return y + functional.linear(functional.linear(x.float(), self.V), self.U).to(y.dtype)

    def compressed(self) -> LowRankSparseLinear:
        """The layer as it is now."""
        parts = self.tensors()
        return LowRankSparseLinear.from_parts(self.bitmap, parts["values"], parts["U"], parts["V"], parts.get("bias"))

    def tensors(self) -> dict[str, Tensor]:
        """What was trained, as a checkpoint names it."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def make_trainable(module: nn.Module) -> tuple[dict[str, TrainableLinear], dict[str, nn.Parameter]]:
    """Replaces the compressed layers of a module by trainable ones.

    Returns:
        These by name, and what is trained beside them: every other vector, the norms and the biases of dense layers.
    """
    compressed = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LowRankSparseLinear)]
    layers = {name: TrainableLinear(layer) for name, layer in compressed}
    inside = tuple(f"{name}." for name in layers)
    vectors = [name for name, p in module.named_parameters() if p.ndim == 1 and not name.startswith(inside)]
    for name in vectors:  # copies: what is there may be mapped from a file
        assign(module, name, module.get_parameter(name).detach().float().clone())
    for name, layer in layers.items():
        module.set_submodule(name, layer)
    return layers, {name: module.get_parameter(name) for name in vectors}


def fast_products() -> torch.autocast:
    """bfloat16 products, about twice as fast, where the CPU has them; parameters and hidden states stay float32.

    Elsewhere they are slower than float32: by half or, emulated, a hundred times.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_products())


def has_fast_products() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32, on tiles or by AVX-512.

    Intel's AVX-512 is no faster at it: on an Emerald Rapids without tiles PyTorch had 84 GFLOP/s, and 158 in float32.
    By what the processor has rather than by a measurement, so that a resumed run goes on as it began.
    """
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or (able.get("avx512_bf16") and "Intel" not in able.get("cpu_name", "")))
