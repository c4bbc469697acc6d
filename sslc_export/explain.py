"""`sslc-validate --explain LAYER`: one layer of an engine as a model of its own, with inputs and a script to run it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_model

from sslc_common.errors import InputError
from sslc_common.files import atomic_path
from sslc_export.engines.probes import OnnxRuntimeProbe, TorchProbe
from validate.attribution import relative_l2

_ROWS = 8

# It needs numpy and onnxruntime only, so that it can be sent to someone who has nothing else of ours.
_SCRIPT = '''\
"""Layer {layer}: its ONNX body and its kernel against float64, on the same input.

    python run.py                              the operator's ONNX body
    python run.py --library libsslc_ort.so     the kernel: plugins_ort.library.library_path() says where it is
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort

parser = argparse.ArgumentParser()
parser.add_argument("--library")
library = parser.parse_args().library
here = Path(__file__).parent
options = ort.SessionOptions()
if library:
    options.register_custom_ops_library(library)
session = ort.InferenceSession(here / "model.onnx", options, providers=["CPUExecutionProvider"])
data = np.load(here / "data.npz")
Y = session.run(["Y"], {{"X": data["X"]}})[0].astype(np.float64)
error = np.abs(Y - data["Y"])
row, column = np.unravel_index(np.nanargmax(error), error.shape)
print("relative L2", np.linalg.norm(Y - data["Y"]) / np.linalg.norm(data["Y"]))
print("worst output", int(column), "of row", int(row), "is", Y[row, column], "and should be", data["Y"][row, column])
'''


def explain(
    reference: TorchProbe, engine: OnnxRuntimeProbe, layer: str, text: np.ndarray, out: Path
) -> dict[str, float]:
    """Writes model.onnx (one node, weights embedded), data.npz (X, and Y in float64) and run.py.

    Args:
        reference: The compressed PyTorch model.
        engine: What was built from it.
        layer: Name of a compressed layer.
        text: Token ids [B, L] that give the layer its input.
        out: The folder to write.

    Returns:
        Relative L2 errors, by what ran: "function", and "kernel" if there is one.

    Raises:
        InputError: there is no such layer, or it is larger than an ONNX file may be.
    """
    if layer not in engine.layers:
        raise InputError(
            "There is no such compressed layer",
            got=layer,
            allowed=", ".join(engine.layers[:8]) + (", ..." if len(engine.layers) > 8 else ""),
        )
    X = reference.run(text, None, None)[0][layer].X
    X = np.ascontiguousarray(X.reshape(-1, X.shape[-1])[:_ROWS], np.float32)
    Y = reference.exact(layer, X)
    model = engine.model_of(layer)
    load_external_data_for_model(model, str(engine.path.parent))
    if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise InputError(f"{layer} is too large for one ONNX file", got=model.ByteSize(), allowed="2 GiB")
    with atomic_path(out) as temporary:
        temporary.mkdir()
        onnx.save(model, temporary / "model.onnx")
        np.savez(temporary / "data.npz", X=X, Y=Y)
        (temporary / "run.py").write_text(_SCRIPT.format(layer=layer))
    errors = {"function": relative_l2(Y, engine.function(layer, X))}
    if engine.no_kernel is None:
        errors["kernel"] = relative_l2(Y, engine.kernel(layer, X))
    return errors
