"""The ONNX function body of `sslc::LowRankSparseLinear` against the definition in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sslc_export.lowering import names, op

FOLD_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"


INT4 = "int4"
DTYPES = [np.float32, ml_dtypes.bfloat16, np.int8, INT4]
IDS = ["float32", "bfloat16", "int8", "int4"]


def stored_values(rng, count, dtype):
    if dtype is INT4:
        return rng.integers(-8, 8, count, np.int8)
    return rng.integers(-128, 128, count, dtype) if dtype is np.int8 else rng.standard_normal(count).astype(dtype)


def random_layer(n, k, r, density, dtype, seed=0):
    """The operator's constant inputs, W = S + U·V in float64, and |S| + |U|·|V|, the size of what is summed."""
    rng = np.random.default_rng(seed)
    quantized = dtype in (np.int8, INT4)
    factors = ml_dtypes.bfloat16 if quantized else dtype
    mask = rng.random((n, k)) < density
    padded = np.zeros((n, -(-k // 64) * 64), bool)
    padded[:, :k] = mask
    tensors = {
        "bitmap": np.packbits(padded, axis=1, bitorder="little").view("<i4"),
        "values": stored_values(rng, mask.sum(), dtype),
        "U": rng.standard_normal((n, r)).astype(factors),
        "V": rng.standard_normal((r, k)).astype(factors),
        "bias": rng.standard_normal(n).astype(np.float32),
    }
    S, U, V = np.zeros((n, k)), tensors["U"].astype(np.float64), tensors["V"].astype(np.float64)
    S[mask] = tensors["values"]
    if dtype is INT4:
        tensors["values"] = packed_nibbles(padded, tensors["values"])
    if quantized:
        scales = rng.uniform(0, 0.1, (n, -(-k // 64))).astype(np.float16)
        S *= scales.astype(np.float64).repeat(64, axis=1)[:, :k]
        tensors["scales"] = scales
    return tensors, S + U @ V, np.abs(S) + np.abs(U) @ np.abs(V)


def packed_nibbles(mask, values):
    """Two to a byte, low nibble first, entry by entry; each 64 columns begin with a new byte."""
    octets, left = [], values.tolist()
    for block in mask.reshape(-1, 64):
        entries, left = left[: block.sum()], left[block.sum() :]
        entries += [0] * (len(entries) % 2)
        octets += [(low & 15) | (high & 15) << 4 for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return np.array(octets, np.uint8)


def model_of(tensors, x_shape):
    n = tensors["bias"].shape[0]
    leading = [f"d{i}" for i in range(len(x_shape) - 1)]
    float32 = onnx.TensorProto.FLOAT
    body = op.function_body(op.overload(ir.DataType.from_numpy(tensors["values"].dtype)))
    graph = helper.make_graph(
        [
            helper.make_node(
                names.OP_TYPE,
                ["X", *tensors],
                ["Y"],
                domain=names.DOMAIN,
                overload=body.overload,
                version=names.VERSION,
                layout=names.LAYOUT,
            )
        ],
        "layer",
        [helper.make_tensor_value_info("X", float32, [*leading, x_shape[-1]])],
        [helper.make_tensor_value_info("Y", float32, [*leading, n])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", op.OPSET), helper.make_opsetid(names.DOMAIN, names.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run_onnxruntime(model, x, fold=True):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(FOLD_LIMIT, "0" if fold else "1")  # 0 is "no limit"
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"X": x})[0]


def run_reference(model, x):
    return ReferenceEvaluator(model).run(None, {"X": x})[0]


RUNTIMES = {
    "onnxruntime": run_onnxruntime,
    "onnxruntime, S decoded on every run": lambda model, x: run_onnxruntime(model, x, fold=False),
    "onnx.reference": run_reference,
}


def assert_agrees(y, x, layer):
    tensors, W, size = layer
    x = x.astype(np.float64)
    assert y.dtype == np.float32
    assert y.shape == (*x.shape[:-1], W.shape[0])
    # A float32 sum of K terms is off by at most K·eps times the terms' sizes; 4·√K holds for roundings that are not
    # all in the same direction, with room for the other few steps.
    bound = 4 * np.finfo(np.float32).eps * np.sqrt(W.shape[1]) * (np.abs(x) @ size.T + np.abs(tensors["bias"]))
    assert np.all(np.abs(y - (x @ W.T + tensors["bias"])) <= bound)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    ("n", "k", "r", "density"),
    [
        (48, 128, 8, 0.5),
        (5, 70, 3, 0.5),  # K not a multiple of 64
        (1, 64, 3, 0.5),
        (5, 1, 1, 0.5),
        (7, 130, 0, 0.5),  # no low-rank part
        (7, 130, 2, 0.0),  # nothing stored
        (7, 130, 0, 0.0),  # W = 0
        (7, 130, 2, 1.0),  # everything stored
        (33, 63, 4, 0.3),
    ],
)
def test_body_computes_the_definition(n, k, r, density, dtype, runtime):
    layer = random_layer(n, k, r, density, dtype)
    x = np.random.default_rng(1).standard_normal((2, 3, k)).astype(np.float32)
    y = RUNTIMES[runtime](model_of(layer[0], x.shape), x)
    assert_agrees(y, x, layer)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("leading", [(), (4,), (1, 2, 3), (2, 0)])
def test_body_takes_any_leading_dimensions(leading, runtime):
    layer = random_layer(5, 70, 3, 0.5, np.float32)
    x = np.random.default_rng(1).standard_normal((*leading, 70)).astype(np.float32)
    y = RUNTIMES[runtime](model_of(layer[0], x.shape), x)
    assert_agrees(y, x, layer)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 200),
    r=st.integers(0, 9),
    density=st.floats(0, 1),
    m=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_body_computes_the_definition_for_any_shape(n, k, r, density, m, dtype, seed):
    layer = random_layer(n, k, r, density, dtype, seed)
    x = np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)
    model = model_of(layer[0], x.shape)
    for run in RUNTIMES.values():
        assert_agrees(run(model, x), x, layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_onnxruntime_decodes_s_once_at_session_creation(tmp_path, dtype):
    tensors = random_layer(64, 128, 8, 0.5, dtype)[0]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model_of(tensors, (1, 128)).SerializeToString(), options)
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert left <= {"Gemm", "MatMul", "Add", "Reshape", "Shape", "Concat"}


def test_every_bit_of_a_word_finds_its_column():
    for column in range(64):
        bitmap = np.zeros((1, 64), bool)
        bitmap[0, column] = True
        tensors = {
            "bitmap": np.packbits(bitmap, axis=1, bitorder="little").view("<i4"),
            "values": np.array([3.0], np.float32),
            "U": np.zeros((1, 0), np.float32),
            "V": np.zeros((0, 64), np.float32),
            "bias": np.zeros(1, np.float32),
        }
        identity = np.eye(64, dtype=np.float32)
        y = run_reference(model_of(tensors, identity.shape), identity)[:, 0]
        assert y.tolist() == [3.0 if i == column else 0.0 for i in range(64)]


def test_attributes_name_version_and_layout_with_defaults():
    body = op.function_body()
    defaults = {a.name: helper.get_attribute_value(a) for a in body.attribute_proto}
    assert (body.domain, body.name) == ("sslc", "LowRankSparseLinear")
    assert defaults == {"version": 1, "layout": b"rows64"}
    assert tuple(body.input) == ("X", "bitmap", "values", "U", "V", "bias")


@pytest.mark.parametrize(("type", "overload"), [("INT8", "scales"), ("UINT8", "int4")])
def test_the_bodies_for_int8_and_int4_values_have_scales_and_the_same_name(type, overload):
    body = op.function_body(op.overload(ir.DataType[type]))
    assert (body.domain, body.name, body.overload) == ("sslc", "LowRankSparseLinear", overload)
    assert tuple(body.input) == names.INPUTS
