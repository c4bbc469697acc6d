"""The op inside ONNX Runtime: right numbers, the session's threads, mapped weights, clear errors.

A wrong position in the ABI table (src/ort_abi.h) cannot pass here: making the op, its attributes, shapes, constant
inputs, output and threads each go through their entry.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from plugins_ort import library

from .layers import expected_of, random_layer
from .sessions import ATTRIBUTES, model_of, open_session

DTYPES = ("f32", "bf16", "int8", "int4")


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "r", "density"),
    [(70, 130, 33, 0.5), (257, 576, 0, 0.5), (5, 64, 3, 0.0), (64, 63, 0, 0.0), (33, 128, 7, 1.0)],
    ids=["tails", "r = 0", "nothing stored", "bias only", "all stored"],
)
def test_agrees_with_float64(dtype: str, N: int, K: int, r: int, density: float) -> None:
    layer = random_layer(N, K, r, density, dtype)
    session = open_session(model_of(layer))
    for shape in [(1, 1, K), (2, 3, K), (2, 0, K), (0, 4, K), (3, 40, K)]:
        x = tokens(*shape)
        y = session.run(None, {"X": x})[0]
        assert y.shape == (*shape[:2], N)
        exact, bound = expected_of(layer, x.reshape(-1, K), library.kernel_name())
        assert (np.abs(y.reshape(-1, N) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype: str) -> None:
    model = model_of(random_layer(900, 640, 96, 0.5, dtype))
    one, two = open_session(model, threads=1), open_session(model, threads=2)
    for shape in [(1, 1, 640), (1, 7, 640), (2, 100, 640)]:
        x = tokens(*shape)
        np.testing.assert_array_equal(one.run(None, {"X": x})[0], two.run(None, {"X": x})[0])


def test_a_session_can_be_run_by_several_threads_at_once() -> None:
    layer = random_layer(300, 320, 40, 0.5, "f32")
    session = open_session(model_of(layer), threads=2)
    inputs = [tokens(1, count, 320) for count in (1, 3, 50, 130)]
    expected = [session.run(None, {"X": x})[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            results = pool.map(lambda x: session.run(None, {"X": x})[0], inputs)
            for y, y_expected in zip(results, expected, strict=True):
                np.testing.assert_array_equal(y, y_expected)


def test_the_library_counts_its_layers_and_calls() -> None:
    model = model_of(random_layer(8, 64, 2, 0.5, "f32"))
    alive, calls = library.layers_alive(), library.op_calls()
    first, second = open_session(model), open_session(model)
    assert library.layers_alive() == alive + 2
    first.run(None, {"X": tokens(1, 1, 64)})
    second.run(None, {"X": tokens(1, 1, 64)})
    assert library.op_calls() == calls + 2
    del first, second
    assert library.layers_alive() == alive


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({**ATTRIBUTES, "version": 2}, "'layer.7': version 2 of the operator; this library knows version 1"),
        ({**ATTRIBUTES, "layout": "columns"}, "'layer.7': layout 'columns'; this library knows 'rows64'"),
        ({"layout": "rows64"}, "'layer.7': the attribute 'version' is missing"),
        ({"version": 1}, "'layer.7': the attribute 'layout' is missing"),
        ({**ATTRIBUTES, "activation_bits": 4}, "'layer.7': activations of 4 bits; 16 and 8 are known"),
    ],
    ids=["version", "layout", "no version", "no layout", "bits"],
)
def test_unknown_attributes_are_refused(attributes: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_session(model_of(random_layer(8, 70, 2, 0.5, "f32"), attributes=attributes))


@pytest.mark.parametrize("name", ["bitmap", "values", "U", "V", "bias"])
def test_a_weight_that_is_not_constant_is_refused(name: str) -> None:
    model = model_of(random_layer(8, 70, 2, 0.5, "f32"), fed=[name])
    with pytest.raises(Exception, match=f"'layer.7': {name} is computed in the graph or fed"):
        open_session(model)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_scales_that_are_not_constant_are_refused(dtype: str) -> None:
    model = model_of(random_layer(8, 70, 2, 0.5, dtype), fed=["scales"])
    with pytest.raises(Exception, match=r"'layer.7': scales is absent, computed in the graph or fed"):
        open_session(model)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integer_values_without_scales_are_refused(dtype: str) -> None:
    layer = random_layer(8, 70, 2, 0.5, dtype)
    del layer.stored["scales"]
    with pytest.raises(Exception, match=r"'layer.7': scales is absent, computed in the graph or fed"):
        open_session(model_of(layer))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"scales": np.zeros((8, 1), np.float16)}, r"scales is \[8, 1\], but U and V ask for \[8, 2\]"),
        ({"scales": np.full((8, 2), -1, np.float16)}, "scale 0 is negative or not finite"),
        ({"scales": np.full((8, 2), np.inf, np.float16)}, "scale 0 is negative or not finite"),
        ({"U": np.zeros((8, 2), np.float32)}, "U and V are not bfloat16"),
    ],
    ids=["shape", "negative", "infinite", "U"],
)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integer_weights_that_disagree_are_refused(dtype: str, replaced: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_session(model_of(random_layer(8, 70, 2, 0.5, dtype), replaced=replaced))


@pytest.mark.parametrize("change", [-1, 1])
def test_int4_values_of_another_size_are_refused(change: int) -> None:
    layer = random_layer(8, 70, 2, 0.5, "int4")
    count = layer.stored["values"].size
    model = model_of(layer, replaced={"values": np.resize(layer.stored["values"], count + change)})
    message = f"'layer.7': the bitmap says that {count} bytes of int4 values are stored, but there are {count + change}"
    with pytest.raises(Exception, match=message):
        open_session(model)


LAYER = random_layer(8, 70, 2, 0.5, "f32")  # bitmap [8, 4], U [8, 2], V [2, 70]
VALUES = LAYER.stored["values"]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"values": VALUES[:-1]}, f"says that {VALUES.size} values are stored, but there are {VALUES.size - 1}"),
        ({"bitmap": np.full((8, 4), -1, np.int32)}, "row 0 of the bitmap has bits beyond column 69"),
        ({"bitmap": LAYER.stored["bitmap"][:, :3]}, r"bitmap is \[8, 3\], but U and V ask for \[8, 4\]"),
        ({"bitmap": LAYER.stored["bitmap"].astype(np.float32)}, "input parameter .bitmap. .* is invalid"),
        ({"values": VALUES[:, None]}, r"values is \[\d+, 1\], which has not 1 dimensions"),
        ({"values": VALUES.astype(np.int32)}, "values have ONNX element type 6"),
        ({"V": np.zeros((3, 70), np.float32)}, r"V is \[3, 70\], but U and V ask for \[2, 70\]"),
        ({"V": np.zeros((2, 70), np.uint16)}, "values, U and V are not of one type"),
        ({"scales": np.zeros((8, 2), np.float16)}, "scales are given, but the values are neither int8 nor int4"),
        ({"bias": np.zeros(7, np.float32)}, r"bias is \[7\], but U and V ask for \[8\]"),
        ({"U": np.zeros((0, 2), np.float32)}, r"bitmap is \[8, 4\], but U and V ask for \[0, 4\]"),
    ],
    ids=[
        "popcount",
        "padding bits",
        "bitmap",
        "bitmap type",
        "rank",
        "type",
        "V",
        "types",
        "scales",
        "bias",
        "no rows",
    ],
)
def test_weights_that_disagree_are_refused(replaced: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_session(model_of(LAYER, replaced=replaced))


def test_an_input_of_another_width_is_refused() -> None:
    session = open_session(model_of(LAYER))
    with pytest.raises(Exception, match=r"'layer.7': X is \[1, 2, 71\], but the layer takes \[..., 70\]"):
        session.run(None, {"X": tokens(1, 2, 71)})


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.library_path()
    monkeypatch.setenv("SSLC_KERNEL", "mmx")
    options = onnxruntime.SessionOptions()
    with pytest.raises(Exception, match=r"SSLC_KERNEL asks for the kernel 'mmx'; this processor can run: .*portable"):
        options.register_custom_ops_library(str(path))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_weights_are_used_where_the_file_is_mapped(tmp_path: Path) -> None:
    """64 MB of weights may cost a few MB of own memory: row starts, scratch, the session itself."""
    layer = random_layer(16, 64, 0, 1.0, "f32")
    N, K = 4096, 4096
    model = model_of(
        layer,
        replaced={
            "bitmap": np.full((N, 2 * K // 64), -1, np.int32),
            "values": np.ones(N * K, np.float32),
            "U": np.zeros((N, 0), np.float32),
            "V": np.zeros((0, K), np.float32),
            "bias": np.zeros(N, np.float32),
        },
    )
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1024)
    script = f"""
import gc, numpy as np, pathlib
from tests.plugins_ort.sessions import open_session
def own(): # kB that are no file's
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])
before = own()
session = open_session(pathlib.Path({str(tmp_path / "model.onnx")!r}))
y = session.run(None, {{'X': np.ones((1, 1, {K}), np.float32)}})[0]
assert (y == {K}).all()
print(own() - before)
"""
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 16_000, "kB of own memory for 67 000 kB of weights"
