"""`sslc::LowRankSparseLinear` in ONNX: its name, its attributes and its body of standard operators.

    Y = X · (S + U·V)ᵀ + bias

Inputs, types and shapes are in docs/architecture.md ("The operator"). The body goes into every model we write, so that
a runtime that does not have our library still runs the model.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
from onnx_ir.passes.common import InlinePass

from sslc_export.lowering.names import DOMAIN, LAYOUT, OP_TYPE, VERSION, WITH_INT4, WITH_SCALES

# Opset 23 has Attention, RMSNormalization and RotaryEmbedding. The exporter decomposes them for older opsets,
# and loses two of the three again for 24 (torch 2.13).
OPSET = 23

op: Any = onnxscript.opset23  # Any: onnxscript's type variables do not unify over a chain of operators
_OPSET = onnxscript.values.Opset(DOMAIN, VERSION)
_BIT_MASKS = onnx.numpy_helper.from_array((np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32))


@onnxscript.script(_OPSET, default_opset=op)
def _sparse(bitmap, values, K, rows):
    """S [N, K] from a bitmap and its stored values (rows64: row by row, whole 64 columns); `rows` is [N, -1]."""
    # Which entries of S are stored, as a flat 0/1 vector in row-major order. Bit k mod 32 of word k div 32 belongs to
    # column k; columns from K on are padding.
    bits = op.BitwiseAnd(op.Unsqueeze(bitmap, op.Constant(value_ints=[-1])), op.Constant(value=_BIT_MASKS))
    padded = op.Reshape(op.Cast(bits, to=onnx.TensorProto.BOOL), rows)
    mask = op.Slice(padded, op.Constant(value_ints=[0]), K, op.Constant(value_ints=[1]))
    stored = op.Cast(op.Reshape(mask, op.Constant(value_ints=[-1])), to=onnx.TensorProto.INT32)

    # The i-th stored entry is values[i - 1]. A zero in front serves every entry that is not stored, and an S without
    # any value. Float first: ONNX Runtime's CPU kernels do not calculate in bfloat16.
    position = op.CumSum(stored, op.Constant(value_int=0)) * stored
    with_zero = op.Concat(op.Constant(value_floats=[0.0]), op.Cast(values, to=onnx.TensorProto.FLOAT), axis=0)
    return op.Reshape(op.Gather(with_zero, position), rows)


@onnxscript.script(_OPSET, default_opset=op)
def _sparse_int4(bitmap, values, K, rows):
    """The same for int4 values, two to a byte; every block (64 columns of a row) begins with a byte of its own."""
    bits = op.BitwiseAnd(op.Unsqueeze(bitmap, op.Constant(value_ints=[-1])), op.Constant(value=_BIT_MASKS))
    stored = op.Cast(op.Cast(bits, to=onnx.TensorProto.BOOL), to=onnx.TensorProto.INT32)
    blocks = op.Reshape(stored, op.Constant(value_ints=[-1, 64]))

    # Entry i of a block is its i-th nibble, counted from 1, after twice the bytes of the blocks before it.
    counts = op.ReduceSum(blocks, op.Constant(value_ints=[1]), keepdims=1)
    one, two = op.Constant(value_int=1), op.Constant(value_int=2)
    octets = op.Cast((op.Cast(counts, to=onnx.TensorProto.INT64) + one) / two, to=onnx.TensorProto.INT32)
    before = op.CumSum(octets, op.Constant(value_int=0), exclusive=1)
    position = (before + before + op.CumSum(blocks, op.Constant(value_int=1))) * blocks

    low = op.BitwiseAnd(values, op.Cast(op.Constant(value_int=15), to=onnx.TensorProto.UINT8))
    high = op.BitShift(values, op.Cast(op.Constant(value_int=4), to=onnx.TensorProto.UINT8), direction="RIGHT")
    last = op.Constant(value_ints=[-1])
    nibbles = op.Reshape(op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1), last)
    # Two's complement: the upper half of 0 to 15 is negative.
    flipped = op.BitwiseXor(nibbles, op.Cast(op.Constant(value_int=8), to=onnx.TensorProto.UINT8))
    signed = op.Cast(flipped, to=onnx.TensorProto.FLOAT) - op.Constant(value_float=8.0)
    with_zero = op.Concat(op.Constant(value_floats=[0.0]), signed, axis=0)
    padded = op.Reshape(op.Gather(with_zero, position), rows)
    return op.Slice(padded, op.Constant(value_ints=[0]), K, op.Constant(value_ints=[1]))


@onnxscript.script(_OPSET, default_opset=op)
def _of_column(scales, K, rows):
    """Scales [N, ⌈K/64⌉] as [N, K]: each serves 64 columns, the last of a row perhaps fewer."""
    wide = op.Unsqueeze(op.Cast(scales, to=onnx.TensorProto.FLOAT), op.Constant(value_ints=[-1]))
    columns = op.Reshape(op.Expand(wide, op.Constant(value_ints=[1, 1, 64])), rows)
    return op.Slice(columns, op.Constant(value_ints=[0]), K, op.Constant(value_ints=[1]))


@onnxscript.script(_OPSET, default_opset=op)
def _linear(X, S, U, V, bias, K, N):
    """Y = X · (S + U·V)ᵀ + bias for X of any number of dimensions."""
    # Gemm, because it takes its second factor transposed: a Transpose of S would be one more copy of it in memory.
    x = op.Reshape(X, op.Concat(op.Constant(value_ints=[-1]), K, axis=0))
    t = op.Gemm(x, op.Cast(V, to=onnx.TensorProto.FLOAT), transB=1)
    low_rank = op.Gemm(t, op.Cast(U, to=onnx.TensorProto.FLOAT), bias, transB=1)
    y = op.Gemm(x, S, low_rank, transB=1)
    return op.Reshape(y, op.Concat(op.Shape(X, end=-1), N, axis=0), allowzero=1)


@onnxscript.script(_OPSET, default_opset=op)
def LowRankSparseLinear(X, bitmap, values, U, V, bias, version: int = VERSION, layout: str = LAYOUT):  # noqa: N802
    """Y = X · (S + U·V)ᵀ + bias, with S as a bitmap and its stored values."""
    N = op.Shape(bias)
    K = op.Shape(V, start=1)
    S = _sparse(bitmap, values, K, op.Concat(N, op.Constant(value_ints=[-1]), axis=0))
    Y = _linear(X, S, U, V, bias, K, N)
    return Y  # noqa: RET504 - the name becomes the output's


@onnxscript.script(_OPSET, default_opset=op)
def _with_scales(
    X, bitmap, values, U, V, bias, scales, version: int = VERSION, layout: str = LAYOUT, activation_bits: int = 16
):
    """The same with int8 values and one scale per row and aligned 64 columns."""
    # (A function cannot ask whether an input is there, nor for its type, hence three of them.)
    # activation_bits allows kernels to round X; this body does not.
    N = op.Shape(bias)
    K = op.Shape(V, start=1)
    rows = op.Concat(N, op.Constant(value_ints=[-1]), axis=0)
    S = _sparse(bitmap, values, K, rows) * _of_column(scales, K, rows)
    Y = _linear(X, S, U, V, bias, K, N)
    return Y  # noqa: RET504 - the name becomes the output's


@onnxscript.script(_OPSET, default_opset=op)
def _with_int4(
    X, bitmap, values, U, V, bias, scales, version: int = VERSION, layout: str = LAYOUT, activation_bits: int = 16
):
    """The same with packed int4 values."""
    N = op.Shape(bias)
    K = op.Shape(V, start=1)
    rows = op.Concat(N, op.Constant(value_ints=[-1]), axis=0)
    S = _sparse_int4(bitmap, values, K, rows) * _of_column(scales, K, rows)
    Y = _linear(X, S, U, V, bias, K, N)
    return Y  # noqa: RET504 - the name becomes the output's


_input, _attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
_SCHEMA = onnx.defs.OpSchema(
    OP_TYPE,
    DOMAIN,
    VERSION,
    doc=str(LowRankSparseLinear.__doc__),
    inputs=[
        _input("X", "tensor(float)"),
        _input("bitmap", "tensor(int32)"),
        _input("values", "T"),
        _input("U", "TFactor"),
        _input("V", "TFactor"),
        _input("bias", "tensor(float)", param_option=onnx.defs.OpSchema.FormalParameterOption.Optional),
        _input("scales", "tensor(float16)", param_option=onnx.defs.OpSchema.FormalParameterOption.Optional),
    ],
    outputs=[_input("Y", "tensor(float)")],
    type_constraints=[
        (
            "T",
            ["tensor(float)", "tensor(bfloat16)", "tensor(int8)", "tensor(uint8)"],
            "the stored type of the values; uint8 is packed int4",
        ),
        ("TFactor", ["tensor(float)", "tensor(bfloat16)"], "that of U and V: T, or bfloat16 where T is an integer"),
    ],
    attributes=[
        _attribute("version", onnx.defs.OpSchema.AttrType.INT, required=False),
        _attribute("layout", onnx.defs.OpSchema.AttrType.STRING, required=False),
    ],
)

# Called in a translation of the exporter, this adds one node. (The function itself would be inlined there. The bias is
# optional only until the exporter is done: docs/architecture.md wants it always present.)
node = onnxscript.values.Op(_OPSET, OP_TYPE, _SCHEMA)


def overload(values: ir.DataType | None) -> str:
    """The overload of the function body for nodes with values of a type; a model may have several."""
    return {ir.DataType.INT8: WITH_SCALES, ir.DataType.UINT8: WITH_INT4}.get(values, "")  # type: ignore[arg-type]


def function_body(overload: str = "") -> onnx.FunctionProto:
    """The operator as a model-local function of standard operators: what runs where our library is not loaded."""
    bodies: dict[str, Any] = {"": LowRankSparseLinear, WITH_SCALES: _with_scales, WITH_INT4: _with_int4}
    scripts = (_sparse, _sparse_int4, _of_column, _linear, bodies[overload])
    functions = [ir.serde.deserialize_function(script.to_function_proto()) for script in scripts]
    body = functions[-1]
    body.name, body.overload = OP_TYPE, overload
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}), ir_version=10, functions=functions)
    InlinePass(lambda function: function.name != OP_TYPE)(model)
    return ir.serde.serialize_function(body)
