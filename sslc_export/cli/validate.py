"""sslc-validate: is an engine still right, and is it really faster?"""

from __future__ import annotations

from collections.abc import Sequence

from sslc_export.cli.arguments import parse, run
from sslc_export.recipe import ValidateCommand

DESCRIPTION = """\
Compares an engine with the PyTorch model that it was made from (which it must match), and with the dense model:
size, perplexity on held-out text, prefill and decode latency, interleaved in one run.

Writes report/verdict.json, junit.xml, report.md and report.html, and names the first layer that is wrong if one is.
Limits come from flags or from a file (docs/verdict.md).

Exit codes: 0 passed, 1 a limit was missed, 2 bad input, 3 a backend is missing, 4 the measurement was inconclusive."""

EXAMPLES = """\
  sslc-validate --engine build/engine.onnx --reference SmolLM2-135M/
  sslc-validate --engine build/engine.onnx --reference SmolLM2-135M/ --limits limits.yaml --held-out wiki.txt"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def command() -> int:
        recipe = parse(ValidateCommand, argv, DESCRIPTION, EXAMPLES)
        from sslc_export.validation import validate_only

        return validate_only(recipe)

    return run(command)
