"""sslc-compress: from a dense model to a compressed Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence

from sslc_export.cli.arguments import parse, run
from sslc_export.recipe import CompressCommand

DESCRIPTION = """\
Compresses the linear layers of a language model's blocks into sparse + low-rank form, W ≈ S + U·V, one block at a
time, and writes a Hugging Face folder that transformers loads once `import compress.hf` has run.

An interrupted run goes on where it stopped when the same command is given again.

Exit codes: 0 done, 2 bad input, 3 a library is missing."""

EXAMPLES = """\
  sslc-compress --model SmolLM2-135M/ --out SmolLM2-135M-sslc
  sslc-compress --model model.gguf --out small --budget 0.6 --method oats --calibration wiki.txt
  sslc-compress --model SmolLM2-135M/ --out half --budget 0.5 --budget-in params --exclude '*.q_proj'"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def command() -> int:
        recipe = parse(CompressCommand, argv, DESCRIPTION, EXAMPLES)
        from sslc_export.pipeline import compress_only

        return compress_only(recipe)

    return run(command)
