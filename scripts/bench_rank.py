#!/usr/bin/env python3
r"""Where does a low-rank part pay? The error of layers at equal bytes, by the share of them that goes to U·V.

    python scripts/bench_rank.py --model SmolLM2-135M/ --model all-MiniLM-L6-v2/ --text wiki.train.txt --json rank.json
    python scripts/bench_rank.py --model SmolLM2-135M/ --text wiki.train.txt --synthetic 2048 4096 --json rank.json
    python scripts/bench_rank.py --show rank.json --plot rank.png

Layers are those of two blocks of each model, one in the first half and one in the second, with their inputs on the
text. A bitmap takes the same bytes whatever it says, so at one mask rule equal parameters are equal bytes.

joint     S and U·V in one ADMM, as the default does
turns     S and U·V by HASSLE-free: each for the other, in two turns
tuned     S keeps the entries of W that Wanda chooses, as they are; U·V alone is fitted, exactly: what tuning of U and V
          alone, with S frozen, can reach for one layer. With a share of 0 this is Wanda
hadamard  like joint, but with inputs rotated in blocks of 64: W·Q and Qᵀ·x. Q has a Hadamard matrix and random signs in
          each block, which take no bytes
eigen     the same with the eigenvectors of each block of WᵀW: Q is stored in bfloat16, in place of as many values as
          take its bytes

A synthetic layer has the singular values of the first model's layer of the same kind and the eigenvalues of its inputs'
Gram matrix, stretched to another width, and random directions: a stand-in for a wider model, no more. Records are
appended to the JSON file as they come, and what is in it already is not solved again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the packages importable without installation

SHARES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5)
RULES = ("free", "32:64", "8:16", "2:4")
WAYS = ("joint", "turns", "tuned", "hadamard", "eigen")
LENGTH = 512
ROTATED = 64  # columns that are rotated together


@dataclass(frozen=True)
class Layer:
    """A weight and what it sees.

    Attributes:
        model: The model's name, or "synthetic".
        name: Of the layer.
        W: [N, K].
        solving: [tokens, K], inputs to solve on.
        held_out: [tokens, K], inputs to measure on.
    """

    model: str
    name: str
    W: Tensor
    solving: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Record:
    """The error of one layer.

    Attributes:
        model: See Layer.
        layer: Its name.
        N: Outputs.
        K: Inputs.
        rule: Of the mask.
        budget: (nnz + r(N + K)) / NK.
        share: Of the budget that went to U·V.
        rank: r.
        way: One of WAYS.
        error: ‖(W − S − UV)X‖/‖WX‖ on inputs that were not solved on.
    """

    model: str
    layer: str
    N: int
    K: int
    rule: str
    budget: float
    share: float
    rank: int
    way: str
    error: float


def main() -> int:
    """Measures what is missing, prints the table, writes the plot."""
    arguments = _arguments()
    path = arguments.json or arguments.show
    done: list[dict[str, Any]] = json.loads(path.read_text()) if path and path.is_file() else []
    if not arguments.show:
        torch.set_grad_enabled(False)
        seen = {_key(record) for record in done}
        for layer in _layers(arguments):
            for record in _measure(layer, arguments, seen):
                done.append(asdict(record))
                if arguments.json:
                    arguments.json.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{layer.model} {layer.name}: done", file=sys.stderr, flush=True)
    print("\n".join(_table(done)))
    if arguments.plot:
        _plot(done, arguments.plot)
    return 0


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("model", "layer", "N", "K", "rule", "budget", "share", "way"))


def _layers(arguments: argparse.Namespace) -> Iterator[Layer]:
    real: list[Layer] = []
    for folder in arguments.model:
        real += _real_layers(folder, arguments.text, arguments.tokens, arguments.layers)
        yield from real if arguments.real else ()
        if arguments.synthetic:  # only the first model is stretched
            break
    for width in arguments.synthetic:
        yield from (_stretched(layer, width) for layer in real[: len(real) // 2])


def _real_layers(folder: Path, text: Path, tokens: int, pattern: str = "*") -> list[Layer]:
    """The linear layers of two blocks, with their inputs."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    length = min(LENGTH, model.config.max_position_embeddings)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"][: 2 * tokens])
    ids = ids[: len(ids) // length * length].view(-1, length)
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    chosen = {len(blocks) // 4, 3 * len(blocks) // 4}
    linears = {
        f"{index}.{name}": module
        for index in sorted(chosen)
        for name, module in blocks[index].named_modules()
        if isinstance(module, nn.Linear) and fnmatch.fnmatchcase(f"{index}.{name}", pattern)
    }
    inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2)))
    for batch in ids.split(4):
        model(batch)
    layers = []
    for name, module in linears.items():
        x = torch.cat(inputs[name])
        layers.append(Layer(folder.absolute().name, name, module.weight.detach(), x[: len(x) // 2], x[len(x) // 2 :]))
    return layers


def _stretched(layer: Layer, width: int) -> Layer:
    """A layer of the same kind, `width` being what 1 is for the smaller side of the given one."""
    factor = width / min(layer.W.shape)
    N, K = (round(side * factor) for side in layer.W.shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{layer.name} {width}".encode()))

    def directions(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]

    def at(profile: Tensor, count: int) -> Tensor:
        return nn.functional.interpolate(profile[None, None], count, mode="linear", align_corners=True)[0, 0]

    s = at(torch.linalg.svdvals(layer.W), min(N, K))
    eigenvalues = torch.linalg.eigvalsh(layer.solving.T @ layer.solving / len(layer.solving)).clamp_min(0).flip(0)
    W = (directions(N, len(s)) * s) @ directions(K, len(s)).T
    root = directions(K, K) * at(eigenvalues, K).sqrt()
    x = torch.randn(4 * K, K, generator=generator) @ root.T
    return Layer("synthetic", layer.name, W, x[: 2 * K], x[2 * K :])


def _measure(layer: Layer, arguments: argparse.Namespace, seen: set[tuple[Any, ...]]) -> Iterator[Record]:
    from compress.methods import hassle_free, joint, wanda
    from compress.methods.linalg import damped, whitened_low_rank
    from compress.rules import parse_rule

    W, (N, K) = layer.W, layer.W.shape
    H = layer.solving.T @ layer.solving / len(layer.solving)
    root = torch.linalg.cholesky(damped(H))
    dense = float((layer.held_out @ W.T).norm())
    for text in arguments.rules:
        rule = parse_rule(text)
        for budget in arguments.budgets:
            room = math.floor(budget * N * K)
            for share in arguments.shares:
                rank = math.floor(share * room / (N + K))
                if share and not rank:
                    continue
                for way in arguments.ways:
                    nnz = room - rank * (N + K) - (K * ROTATED // 2 if way == "eigen" else 0)
                    if nnz < 0 or (rule and nnz > rule.most(N, K)):
                        continue
                    record = Record(layer.model, layer.name, N, K, text, budget, share, rank, way, 0.0)
                    if _key(asdict(record)) in seen:
                        continue
                    torch.manual_seed(0)  # of the randomized SVD
                    if way == "tuned":
                        S = wanda.solve(W, H, nnz, 0, rule).S
                        U, V = whitened_low_rank(W - S, root, rank)
                    else:
                        Q = _rotation(W, way)
                        found = (hassle_free if way == "turns" else joint).solve(W @ Q, Q.T @ H @ Q, nnz, rank, rule)
                        S, U, V = found.S @ Q.T, found.U, found.V @ Q.T
                    error = float((layer.held_out @ (W - S - U @ V).T).norm()) / dense
                    yield Record(layer.model, layer.name, N, K, text, budget, share, rank, way, error)


def _rotation(W: Tensor, way: str) -> Tensor:
    """Q [K, K], orthogonal and block-diagonal; the identity where nothing is rotated."""
    K = W.shape[1]
    if way == "hadamard":
        size, block = min(ROTATED, K & -K), torch.ones(1, 1)
        while len(block) < size:
            block = torch.kron(block, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        signs = torch.randint(2, (K, 1)) * 2 - 1
        return signs * torch.block_diag(*[block / size**0.5] * (K // size))
    if way == "eigen":
        return torch.block_diag(*[torch.linalg.eigh(part.T @ part)[1] for part in W.split(ROTATED, dim=1)])
    return torch.eye(K)


def _groups(records: list[dict[str, Any]]) -> dict[tuple[str, str, float, str], dict[float, float]]:
    """Geometric mean over layers of the error at each share, by model and width, rule, budget and way."""
    logs: dict[tuple[str, str, float, str], dict[float, list[float]]] = {}
    for r in records:
        model = f"{r['model']}, {min(r['N'], r['K'])}" if r["model"] == "synthetic" else r["model"]
        group = logs.setdefault((model, r["rule"], r["budget"], r["way"]), {})
        group.setdefault(r["share"], []).append(math.log(max(r["error"], sys.float_info.min)))
    full = {key: max(len(errors) for errors in group.values()) for key, group in logs.items()}
    return {
        key: {s: math.exp(sum(e) / len(e)) for s, e in sorted(group.items()) if len(e) == full[key]}
        for key, group in logs.items()
    }


def _table(records: list[dict[str, Any]]) -> Iterator[str]:
    shares = sorted({record["share"] for record in records})
    yield "| model | mask | budget | | " + " | ".join(f"U·V {share:.0%}" for share in shares) + " |"
    yield "|---|---|---:|---|" + "---:|" * len(shares)
    for (model, rule, budget, way), errors in _groups(records).items():
        best = min(errors.values())
        cells = [
            f"{'**' * (errors[s] == best)}{errors[s]:.4f}{'**' * (errors[s] == best)}" if s in errors else ""
            for s in shares
        ]
        yield f"| {model} | {rule} | {budget:g} | {way} | " + " | ".join(cells) + " |"


def _plot(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = _groups(records)
    models, budgets = (list(dict.fromkeys(key[index] for key in groups)) for index in (0, 2))
    figure, axes = pyplot.subplots(
        len(budgets), len(models), figsize=(4 * len(models), 3.2 * len(budgets)), squeeze=False
    )
    colours = {rule: f"C{index}" for index, rule in enumerate(dict.fromkeys(key[1] for key in groups))}
    for (model, rule, budget, way), errors in groups.items():
        axis = axes[budgets.index(budget)][models.index(model)]
        style = dict(zip(WAYS, ("o-", "^-.", "s--", "v:", "x:"), strict=True))[way]
        relative = [error / errors[0.0] for error in errors.values()] if 0.0 in errors else []
        axis.plot(
            list(errors)[: len(relative)], relative, style, color=colours[rule], label=f"{rule}, {way}", markersize=3
        )
        axis.set(
            title=f"{model}, budget {budget:g}", xlabel="share of the bytes in U·V", ylabel="error over that without"
        )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="Hugging Face folder; repeat")
    parser.add_argument("--text", type=Path, help="what the layers see")
    parser.add_argument("--tokens", type=int, default=16384, help="to solve on; as many measure")
    parser.add_argument("--synthetic", type=int, nargs="*", default=[], metavar="WIDTH")
    parser.add_argument("--no-real", dest="real", action="store_false", help="synthetic layers only")
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of the budget that goes to U·V")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", default="*", help="only those whose names match, such as '*.q_proj'")
    parser.add_argument("--json", type=Path, help="records; what is in it is not solved again")
    parser.add_argument("--show", type=Path, metavar="JSON", help="only show these records")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if not arguments.show and not (arguments.model and arguments.text):
        parser.error("--model and --text are needed, or --show")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
