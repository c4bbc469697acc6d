"""The main job on a real model: fetch SmolLM2-135M-Instruct, compress it to half, export it, run it, judge it.

    make demo                      writes build/demo/

Calibration is wiki articles and speeches in equal parts, since the perplexity is measured on other articles and other
speeches: calibration text should be of the kind that the model will see. 49152 tokens, because perplexity on other text
still falls from 8 k to 24 k tokens by some per cent. The budget is half of the parameters of the linear layers, the
paper's setting; embeddings and lm_head stay dense.

Where TensorRT-RTX and the plugin are (`make setup` sees to it on Linux x86_64), engine.plan is built beside
engine.onnx, with no GPU: it is judged as far as that goes, and engine.onnx is validated in full.
"""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

from fetch_demo import GGUF, fetch

from sslc_common.errors import INCONCLUSIVE, PASSED
from sslc_export.doctor import BUILD, examine, paths

OUT = Path("build/demo/engine.onnx")
TARGETS = "sm_86,sm_89"  # RTX 30 and 40, A10, L4, L40S


def main() -> int:
    """Runs the demo; returns the exit code of sslc-export."""
    start = time.monotonic()
    data = fetch()
    text = data / "text"
    lacking = paths(examine())[BUILD]
    arguments: list[object] = ["--model", data / GGUF, "--overwrite"]
    arguments += ["--budget", "0.5", "--budget-in", "params", "--calibration-tokens", "49152"]
    held_out: list[object] = []
    for name in ("wiki", "speeches"):
        arguments += ["--calibration", text / f"{name}.train.txt"]
        held_out += ["--held-out", text / f"{name}.heldout.txt"]
    if lacking:
        print(f"demo: engine.plan is left out, for want of {', '.join(lacking)}; `sslc-doctor` says how to get it")
        code = _run("sslc-export", "--out", OUT, *arguments, *held_out)
    else:
        plan = OUT.with_suffix(".plan")
        report = ["--report", OUT.parent / "report-plan"]
        code = _run("sslc-export", "--out", plan, "--target", TARGETS, *report, *arguments, *held_out)
        if code in (PASSED, INCONCLUSIVE):  # without a GPU, a plan is built and not executed
            code = _run("sslc-validate", "--engine", OUT, "--reference", data / GGUF, *held_out)
    if code:
        return code
    _run("generate", "--engine", OUT, "--prompt", "The three primary colors are", "--tokens", "48")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"\ndemo: {(time.monotonic() - start) / 60:.1f} minutes, {peak:.1f} GiB peak memory; see {OUT.parent}/report/"
    )
    return 0


def _run(command: str, *arguments: object) -> int:
    words = [str(argument) for argument in arguments]
    print(f"\n$ {command} {shlex.join(words)}", flush=True)
    if command == "generate":
        program = [sys.executable, str(Path(__file__).with_name("generate.py"))]
    else:
        program = [str(Path(sys.executable).with_name(command))]
    return subprocess.run([*program, *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
