"""Predicts the kernel's speed-up over dense decoding from instructions counted in the compiled code.

    python scripts/predict_gpu.py                 the table, for every GPU
    python scripts/predict_gpu.py --check         fails if the counted cost per weight is worse than gpu_cost.json says
    python scripts/predict_gpu.py --write         writes gpu_cost.json anew

Everything printed is a PREDICTION; docs/kernel-gpu.md has what was measured on an H100 beside it.

The model: one multiprocessor decodes at the rate of its busiest pipe, counted over the main loop of decode() (bank
conflicts are none by construction); DRAM gives 90 % of its peak; of the two times the larger counts in full and a fifth
of the smaller is not hidden. Rates per clock and multiprocessor are those of NVIDIA's programming guide: 4 warp
instructions issued, 64 lanes of integer ALU, 16 lanes of special functions, 32 lanes of loads and stores, and 1024 or
512 multiply-adds of mma.sync. Needs nvcc and cuobjdump (with nvdisasm), from the CUDA toolkit or from
`make plugin`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The machine's tools, or else those that scripts/plugin.sh fetches.
SEARCH_PATH = f"{os.environ.get('PATH', '')}{os.pathsep}{ROOT / 'build/cuda/nvidia/cu13/bin'}"
_ENVIRONMENT = {**os.environ, "PATH": SEARCH_PATH}
COSTS = Path(__file__).with_name("gpu_cost.json")
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")

# GPU: DRAM GB/s, multiprocessors, clock in GHz, architecture, mma.sync multiply-adds per clock and multiprocessor.
GPUS = {
    "A100 80G": (2039, 108, 1.41, "80", 1024),
    "H100 SXM": (3350, 132, 1.83, "90a", 1024),
    "H200": (4800, 132, 1.83, "90a", 1024),
    "L40S": (864, 142, 2.52, "89", 512),
    "RTX 4090": (1008, 128, 2.52, "89", 512),
    "RTX 5090": (1792, 170, 2.41, "120", 512),
}
# Kernel: a piece of its mangled name (half precision, up to 8 tokens), columns per tile, bytes per weight at 50 %.
LAYOUTS = {
    "dense": ("6decodeINS_5DenseILi0EEELi1E", 64, 2.0),
    "any, 50 % kept": ("6decodeINS_3AnyILi0ELb0EEELi1E", 64, 1.16),
    "bank32, 32 of 64": ("6decodeINS_6Bank32ILi0EEELi1E", 256, 1.125),
    "fixed8, 8 of 16": ("6decodeINS_6Fixed8ILi0ELb0EEELi1E", 64, 1.125),
    "any, int8": ("6decodeINS_3AnyILi0ELb1EEELi1E", 64, 0.69),
    "fixed8, int8": ("6decodeINS_6Fixed8ILi0ELb1EEELi1E", 64, 0.656),
}
TOLERANCE = 1.02  # of instructions per weight: less than one instruction per tile and lane


@dataclass(frozen=True)
class Cost:
    """Warp instructions of the main loop, per weight and lane."""

    all: float
    alu: float
    xu: float
    lsu: float
    mma: float

    def rate(self, mma_per_clock: int) -> float:
        """Weights per clock and multiprocessor that the busiest pipe lets through."""
        lanes = 32
        clocks = max(
            self.all * lanes / 128,
            self.alu * lanes / 64,
            self.xu * lanes / 16,
            self.lsu * lanes / 32,
            self.mma * 16 * 8 * 16 / mma_per_clock,
        )
        return 32 / clocks


def compile_kernels(architecture: str, folder: Path) -> Path:
    """A cubin of every kernel. Raises FileNotFoundError without nvcc."""
    source = folder / "kernels.cu"
    source.write_text(
        f'#include "{ROOT}/plugins_trt/src/launch.h"\n'
        "cudaError_t use(const sslc::Layer& l, const sslc::Device& d, const sslc::Buffers& b, int M, cudaStream_t s) "
        "{ return sslc::run_layer(l, d, b, M, false, s); }\n"
    )
    cubin = folder / f"sm_{architecture}.cubin"
    command = ["nvcc", "-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin), str(source)]
    subprocess.run(command, env=_ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return cubin


def functions(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """Mangled name → (address, instruction) of every kernel."""
    command = ["cuobjdump", "-sass", str(cubin)]
    text = subprocess.run(command, env=_ENVIRONMENT, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    body: list[tuple[int, str]] = []
    for line in text.splitlines():
        if head := re.search(r"Function : (\S+)", line):
            body = found[head[1]] = []
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            body.append((int(match[1], 16), match[2]))
    return found


def main_loop(body: list[tuple[int, str]]) -> list[str]:
    """The loop that both copies tiles and multiplies, without loops inside it (the rare second part of a long tile)."""
    loops = []
    for address, text in body:
        target = re.search(r"BRA.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))

    def inside(loop: tuple[int, int]) -> list[tuple[int, str]]:
        return [(a, t) for a, t in body if loop[0] <= a <= loop[1]]

    def has(loop: tuple[int, int], what: str) -> bool:
        return any(what in t for _, t in inside(loop))

    best = min((x for x in loops if has(x, "HMMA") and has(x, "LDGSTS")), key=lambda x: x[1] - x[0])
    nested = [x for x in loops if x != best and best[0] <= x[0] and x[1] <= best[1]]
    return [t for a, t in inside(best) if not any(x[0] <= a <= x[1] for x in nested)]


def count(loop: list[str], columns: int) -> Cost:
    """Cost per weight: a lane handles columns · 16 / 32 weights per iteration."""
    pipes: Counter[str] = Counter()
    for text in loop:
        name = re.sub(r"^@!?U?P[T\d]+\s+", "", text).split()[0]
        pipes[_pipe(name)] += {"64": 2, "128": 4}.get(name.split(".")[-1], 1) if _pipe(name) == "lsu" else 1
        pipes["all"] += 1
    weights = columns / 2
    return Cost(**{pipe: round(pipes[pipe] / weights, 4) for pipe in ("all", "alu", "xu", "lsu", "mma")})


def _pipe(name: str) -> str:
    base = name.split(".")[0]
    if base in {"POPC", "MUFU", "FLO", "BREV", "I2F", "F2I"}:
        return "xu"
    if base in {"LDS", "STS", "LDG", "LDGSTS", "LDSM", "SHFL"}:
        return "lsu"
    if base == "HMMA":
        return "mma"
    if base in {"IMAD", "FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"} or base.startswith("U"):
        return "other"
    if base in {"BRA", "EXIT", "NOP", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "BSYNC", "BSSY", "R2UR", "LDC", "LDCU", "S2R"}:
        return "other"
    return "alu"


def measure(architectures: tuple[str, ...]) -> dict[str, dict[str, Cost]]:
    """Architecture → layout → cost."""
    costs: dict[str, dict[str, Cost]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            found = functions(compile_kernels(architecture, Path(folder)))
            costs[architecture] = {}
            for layout, (piece, columns, _) in LAYOUTS.items():
                (name,) = [n for n in found if piece in n]
                costs[architecture][layout] = count(main_loop(found[name]), columns)
    return costs


def worse(costs: dict[str, dict[str, Cost]], recorded: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What costs more than is recorded, in words."""
    complaints = []
    for architecture, layouts in costs.items():
        for layout, cost in layouts.items():
            for pipe, before in recorded[architecture][layout].items():
                now = getattr(cost, pipe)
                if now > before * TOLERANCE:
                    complaints.append(f"sm_{architecture} {layout}: {pipe} {now} instructions per weight, was {before}")
    return complaints


def table(costs: dict[str, dict[str, Cost]]) -> str:
    """Predicted speed-up over a dense half-precision layer that is bound by DRAM, as Markdown."""
    lines = [
        "PREDICTED from counted instructions, not measured. Speed-up over dense half precision, batch 1 to 8,",
        "of the sparse part: U and V add 2r(N + K) bytes, and up to three launches per input are not counted.",
        "",
        "| layout | bytes/weight | weights/clk/SM (A100, H100, 4090) | " + " | ".join(GPUS) + " |",
        "|---" * (3 + len(GPUS)) + "|",
    ]
    for layout, (_, _, size) in LAYOUTS.items():
        if layout == "dense":
            continue
        rates, cells = {}, []
        for gpu, (bandwidth, multiprocessors, clock, architecture, mma) in GPUS.items():
            rates[gpu] = costs[architecture][layout].rate(mma)
            per_clock = 0.9 * bandwidth / (multiprocessors * clock)  # bytes per clock and multiprocessor
            memory, decode = size / per_clock, 1 / rates[gpu]
            cells.append(f"{2 / per_clock / (max(memory, decode) + 0.2 * min(memory, decode)):.2f}")
        shown = ", ".join(f"{rates[g]:.1f}" for g in ("A100 80G", "H100 SXM", "RTX 4090"))
        lines.append(f"| {layout} | {size} | {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the counted cost is worse than recorded")
    parser.add_argument("--write", action="store_true", help="record the counted cost")
    arguments = parser.parse_args()
    costs = measure(ARCHITECTURES)
    if arguments.write:
        plain = {a: {name: vars(cost) for name, cost in layouts.items()} for a, layouts in costs.items()}
        COSTS.write_text(json.dumps(plain, indent=1) + "\n")
    if arguments.check and (complaints := worse(costs, json.loads(COSTS.read_text()))):
        print("\n".join(complaints), file=sys.stderr)
        return 1
    print(table(costs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
