"""Continues a prompt with an engine, streaming the text.

python scripts/generate.py --engine build/engine.onnx --prompt "The capital of France is"
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from sslc_export.cli.arguments import run


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, type=Path, help="engine.onnx, its compressed model beside it")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=64, help="at most so many new ones (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    arguments = parser.parse_args(argv)
    return run(lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from sslc_export.engines.generate import generate
    from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
    from sslc_export.record import read_record

    record = read_record(arguments.engine)
    engine = OnnxRuntimeEngine(arguments.engine, threads=arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.engine.parent / record["checkpoint"])
    print(arguments.prompt, end="", flush=True)
    result = generate(
        engine,
        arguments.prompt,
        tokenizer,
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        on_text=partial(print, end="", flush=True),
    )
    speed = f"{result.tokens_per_second:.1f} tokens/s" if result.tokens_per_second else "one token"
    print(f"\n[{len(result.tokens)} tokens; first after {result.prefill_seconds * 1e3:.0f} ms, then {speed}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
