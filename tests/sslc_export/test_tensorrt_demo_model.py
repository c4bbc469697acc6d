"""The real demo model as TensorRT plans, dense and compressed. Built, not executed. Minutes; needs PyPI once."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.options import CompressOptions
from compress.pipeline import compress_model
from sslc_export.engines import tensorrt
from sslc_export.lowering.lower import lower
from sslc_export.model import resolve


@pytest.mark.slow
def test_every_layer_of_the_demo_model_is_the_plugin_and_its_size_is_predicted(plugin, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        from fetch_demo import GGUF, fetch
    data = fetch()
    dense = resolve(str(data / GGUF))
    text = data / "text" / "wiki.train.txt"
    options = CompressOptions(
        method="magnitude", calibration=(str(text),), calibration_tokens=1024, sequence_length=256
    )
    compress_model(dense, tmp_path / "compressed" / "model", options)
    plans = {}
    for name, folder in (("dense", dense), ("compressed", tmp_path / "compressed" / "model")):
        path = lower(folder, tmp_path / name / "engine.onnx").path
        plans[name] = tensorrt.build(path, path.with_suffix(".plan"), targets=("sm_86", "sm_89"), plugin=plugin)
        print(name, plans[name].predicted, plans[name].size, plans[name].seconds, plans[name].peak_bytes)
        assert abs(plans[name].predicted.total / plans[name].size.total - 1) < 0.03
    compressed = plans["compressed"]
    assert len({layer.name for layer in compressed.layers}) == 210
    # The builder has checked that each node became the plugin with the right outputs: q, k, v; o; gate, up; down.
    assert len({layer.node for layer in compressed.layers}) == 120
    assert compressed.size.total < plans["dense"].size.total
    assert compressed.peak_bytes < 2 << 30
    again = tensorrt.build(
        tmp_path / "compressed" / "engine.onnx", tmp_path / "again.plan", targets=("sm_86", "sm_89"), plugin=plugin
    )
    if compressed.repeatable:
        assert again.path.read_bytes() == compressed.path.read_bytes()
