"""sslc-export: from a language model to a validated engine."""

from __future__ import annotations

from collections.abc import Sequence

from sslc_export.cli.arguments import parse, run
from sslc_export.recipe import ExportRecipe

DESCRIPTION = """\
Compresses a language model's linear layers into sparse + low-rank form, lowers the model to ONNX with one custom op
per compressed layer, builds the engine, and validates numerics, accuracy and latency against the dense engine.

Written beside --out: the compressed model (a Hugging Face folder of the engine's name, which holds the weights that
the engine maps), engine.json (the build record), the resolved recipe, and report/ with the verdict.

Exit codes: 0 passed, 1 a limit was missed, 2 bad input, 3 a backend is missing, 4 the measurement was inconclusive."""

EXAMPLES = """\
  sslc-export --model SmolLM2-135M/ --out build/engine.onnx
  sslc-export --model model.gguf --out engine.onnx --budget 0.6 --calibration wiki.txt --held-out other.txt
  sslc-export --model SmolLM2-135M/ --out engine.onnx --max-perplexity-ratio 1.3 --min-decode-speedup 1.4
  sslc-export --recipe engine.recipe.yaml --out again/engine.onnx"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def command() -> int:
        recipe = parse(ExportRecipe, argv, DESCRIPTION, EXAMPLES)
        from sslc_export.pipeline import export

        return export(recipe)

    return run(command)
