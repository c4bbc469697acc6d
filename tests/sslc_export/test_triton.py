"""The Triton model repository. No server runs here: Triton needs a GPU."""

import re

from sslc_export.engines.triton import write_repository
from tests.tiny_models import lowered


def test_a_repository_has_all_that_triton_needs(tmp_path):
    (tmp_path / "engine.plan").write_bytes(b"plan")
    (tmp_path / "libsslc_trt.so").write_bytes(b"plugin")
    model = lowered("llama")
    folder = tmp_path / "repository"
    write_repository(tmp_path / "engine.plan", model.path, folder, type="f16", plugin=tmp_path / "libsslc_trt.so")
    assert (folder / "engine" / "1" / "model.plan").read_bytes() == b"plan"
    assert (folder / "libsslc_trt.so").read_bytes() == b"plugin"
    config = (folder / "engine" / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in config
    assert '{ name: "input_ids" data_type: TYPE_INT64 dims: [-1, -1] }' in config
    assert '{ name: "past_key_values.0.key" data_type: TYPE_FP16 dims: [-1, 2, -1, 12] }' in config
    assert '{ name: "logits" data_type: TYPE_FP32 dims: [-1, -1, 97] }' in config
    assert (
        len(re.findall("name:", config)) == 1 + 3 + 2 * 4 + 1
    )  # model, ids, mask, positions, caches in and out, logits
    readme = (folder / "README.md").read_text()
    assert "trtexec --loadEngine=engine/1/model.plan" in readme
    assert "past_key_values.1.value:1x2x128x12" in readme
