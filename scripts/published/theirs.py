"""The authors' own code on one problem: each function gives back what their code makes of W, [N, K], S + U·V summed.

What is ours here is only what their code is called with: a model of one layer, the layer's inputs through their own
hooks, their own defaults for all that is not asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from compress.methods import cap
from compress.methods.linalg import input_norms
from published.on_cpu import load, on_cpu
from published.problem import Problem, Setting


def wanda(folder: Path, problem: Problem, setting: Setting) -> Tensor:
    """prune_wanda of lib/prune.py on a model whose only block is the layer."""
    prune = load(folder, "lib.prune", without=["datasets"])
    model, sequences = _model(problem)
    arguments = SimpleNamespace(
        nsamples=len(sequences), seed=0, use_variant=False, sparsity_ratio=setting.sparsity, prune_method="wanda"
    )
    prune.get_loaders = lambda *_, **__: ([(x[None],) for x in sequences], None)
    n, m = setting.n_m
    with on_cpu():
        prune.prune_wanda(arguments, model, None, torch.device("cpu"), prune_n=n, prune_m=m)
    return model.block.up_proj.weight.data


def sparsegpt(folder: Path, problem: Problem, setting: Setting) -> Tensor:
    """SparseGPT.fasterprune of sparsegpt.py; its prunen is how many are removed of each prunem."""
    layer, (n, m) = _linear(problem), setting.n_m
    with on_cpu():
        solver = load(folder, "sparsegpt").SparseGPT(layer)
        solver.add_batch(problem.X[None], problem.X[None])
        solver.fasterprune(setting.sparsity, prunen=m - n, prunem=m)
    return layer.weight.data


def alps(folder: Path, problem: Problem, setting: Setting) -> Tensor:
    """ALPS_prune.ALPS_admm of alps.py."""
    layer, (n, m) = _linear(problem), setting.n_m
    with on_cpu():
        solver = load(folder, "alps").ALPS_prune(layer, 1, len(problem.X))
        solver.add_batch(problem.X[None], problem.X @ problem.W.T)
        solver.ALPS_admm(setting.sparsity, nm_n=n, nm_m=m)
    return layer.weight.data


def oats(folder: Path, problem: Problem, setting: Setting, iterations: int = 80) -> Tensor:
    """altern_ls of OATS/prune_oats.py, with the statistics of its WrappedOATS."""
    n, m = setting.n_m
    statistics = load(folder, "OATS.oats_wrapper").WrappedOATS(_linear(problem))
    prune = load(folder, "OATS.prune_oats", without=["config", "gpu_utils", "OATS.pruning_utils"])
    prune.config.device = torch.device("cpu")
    with on_cpu():
        statistics.add_batch(problem.X, None)
        return prune.altern_ls(
            problem.W, statistics.scaler_row[None], iterations, setting.rank, setting.sparsity, prune_n=n, prune_m=m
        )


def three_basil(folder: Path, problem: Problem, setting: Setting) -> Tensor:
    """LLM_Compressor.threebasil of 3BASiL's compress.py."""
    return _joint(load(folder, "compress", without=_PEFT).LLM_Compressor, "threebasil", problem, setting)


def hassle_free_exact(folder: Path, problem: Problem, setting: Setting, turns: int) -> Tensor:
    """LLM_Compressor.hassle_free_alps of 3BASiL's compress.py, whose low-rank step is in closed form."""
    solver = load(folder, "compress", without=_PEFT).LLM_Compressor
    return _joint(solver, "hassle_free_alps", problem, setting, n_iters=turns)


def hassle_free(folder: Path, problem: Problem, setting: Setting, turns: int) -> Tensor:
    """LLM_AM_Compressor.scale_alps_gd of HASSLE-free's src/compress.py, whose low-rank step is Adam's."""
    solver = load(folder / "src", "compress", without=_PEFT).LLM_AM_Compressor
    return _joint(solver, "scale_alps_gd", problem, setting, n_iters=turns)


def svd_llm(folder: Path, problem: Problem, setting: Setting) -> Tensor:
    """profle_svdllm and whitening of SVDLLM.py on a model whose only block is the layer."""
    module = load(folder, "SVDLLM", without=["datasets", "component", *_COMPONENTS, "evaluater"])
    model, sequences = _model(problem)
    N, K = problem.W.shape
    ratio = (setting.rank + 0.5) * (N + K) / (N * K)  # it rounds down to the rank
    with on_cpu():
        whitening = module.profle_svdllm("llama", model, [{"x": x[None]} for x in sequences], "cpu")
        module.whitening("llama", model, whitening, ratio, "cpu")
    made = model.block.mlp
    return made.up_u_proj.weight.data @ made.up_v_proj.weight.data


def robust_pca(folder: Path, problem: Problem, _: Setting, iterations: int = cap.ITERATIONS) -> Tensor:
    """RobustPCA of r_pca.py on W·d; not CAP's authors', whose code is not public."""
    d = input_norms(problem.H)
    with on_cpu():
        L, _ = load(folder, "r_pca").RobustPCA((problem.W * d).double().numpy()).fit(max_iter=iterations)
    return torch.from_numpy(L) / d


_PEFT = ["peft", "peft.tuners"]
_COMPONENTS = [f"component.svd_{family}" for family in ("llama", "mistral", "opt")]


def _joint(solver: Any, method: str, problem: Problem, setting: Setting, **arguments: Any) -> Tensor:
    layer, (n, m) = _Adapted(problem, setting.rank), setting.n_m
    with on_cpu():
        compressor = solver(layer, problem.layer)
        compressor.add_batch(problem.X, None)
        getattr(compressor, method)(prunen=n, prunem=m, sparsity=setting.sparsity, percdamp=0.01, **arguments)
    lora_A, lora_B = layer.adapters()
    return layer.base_layer.weight.data + lora_B @ lora_A


class _Adapted(nn.Linear):
    """A linear layer with a low-rank adapter in the form of PEFT's, its scaling 1, its product 0 as PEFT begins."""

    def __init__(self, problem: Problem, rank: int) -> None:
        N, K = problem.W.shape
        super().__init__(K, N, bias=False)
        self.weight.data = problem.W.clone()
        self.base_layer = _linear(problem)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(K, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, N, bias=False)})
        self.adapters()[1].zero_()
        self.scaling, self.active_adapter = {"default": 1.0}, ["default"]

    def adapters(self) -> tuple[Tensor, Tensor]:
        """The weights of A [r, K] and B [N, r]."""
        made: list[Any] = [self.lora_A["default"], self.lora_B["default"]]
        return made[0].weight.data, made[1].weight.data


class _Block(nn.Module):
    """A decoder block that is one layer; its output is its input, as the layer need not be square."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.up_proj, self.hidden_size = _linear(problem), problem.W.shape[1]

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor]:
        self.up_proj(x)
        return (x,)


class _Model(nn.Module):
    """A model as far as the published code looks at one: blocks, configuration, length of the sequences."""

    def __init__(self, problem: Problem, length: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([_Block(problem)])  # their code puts others in its place
        N, K = problem.W.shape
        self.config = SimpleNamespace(use_cache=False, hidden_size=K, intermediate_size=N, hidden_act="silu")
        self.seqlen = length
        self.hf_device_map: dict[str, str] = {}

    def forward(self, x: Tensor) -> Any:
        return self.block(x, attention_mask=None, position_ids=None)

    @property
    def block(self) -> Any:
        """The only block, or what their code has put in its place."""
        return self.model.layers[0]  # type: ignore[index]


def _model(problem: Problem) -> tuple[_Model, Tensor]:
    """The model of one layer, and its inputs as sequences [n, L, K], n ≤ 128 as the code of Wanda wants it."""
    tokens, K = problem.X.shape
    n = math.gcd(tokens, 128)
    return _Model(problem, tokens // n).eval(), problem.X.view(n, tokens // n, K)


def _linear(problem: Problem) -> nn.Linear:
    N, K = problem.W.shape
    layer = nn.Linear(K, N, bias=False)
    layer.weight.data = problem.W.clone()
    return layer
