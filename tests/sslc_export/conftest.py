"""The TensorRT plugin, for the tests that build plans."""

import importlib.util

import pytest

from plugins_trt import library
from sslc_common.errors import MissingError


@pytest.fixture(scope="session")
def plugin():
    """The installed plugin, or one built now for one architecture."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13")
    try:
        return library.library_path()
    except MissingError:
        from tests.plugins_trt.toolchain import build_plugin

        return build_plugin("Static") / "libsslc_trt.so"
