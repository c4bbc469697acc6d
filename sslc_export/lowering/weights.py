"""Weights as byte ranges of the checkpoint's .safetensors files: nothing is read, nothing is stored twice.

ONNX allows external data only inside the model's own folder. onnx (1.21 and later) and ONNX Runtime (1.24 and later)
check that the hard way: no `..`, no symbolic link that leads out (a Hugging Face cache is full of them), and onnx no
file with a second hard link either. So the files are used where they lie if they already lie well, and copied if not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.format import Checkpoint
from compress.shards import TensorRef
from sslc_common.errors import InputError
from sslc_common.files import atomic_path, remove, require_space

# safetensors' names of types, and ONNX's.
_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I32": ir.DataType.INT32,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
}


def attach(model: ir.Model, checkpoint: Checkpoint, folder: Path, locations: Mapping[Path, str]) -> None:
    """Makes the inputs of a graph that are weights its initializers, as byte ranges of the checkpoint's files.

    Weights of another floating type than the traced float32 get a Cast, because ONNX Runtime's CPU kernels calculate in
    float32. It folds the Casts when it opens the model: they cost memory (that of the float32 model) and no time.
    A weight that the graph reads in another shape, too, is a second initializer over the same bytes: a Reshape would be
    folded into a copy.

    Args:
        model: Its inputs include the weights, named as the checkpoint's tensors, in the types that they were traced in.
        checkpoint: Where the tensors are.
        folder: The folder of the .onnx file.
        locations: Path relative to `folder` of each weight file, from `placed`.
    """
    graph = model.graph
    weights = [value for value in graph.inputs if value.name in checkpoint.tensors]
    for value in weights:
        graph.inputs.remove(value)
        name = str(value.name)
        ref = checkpoint.tensors[name]
        value.const_value = _byte_range(name, ref, folder, locations[ref.file])
        traced, value.type = value.dtype, ir.TensorType(value.const_value.dtype)
        graph.register_initializer(value)
        if value.dtype != traced:
            _cast_to_float32(graph, value)
        for node in [node for node, index in value.uses() if node.op_type == "Reshape" and index == 0]:
            _share_bytes(graph, node, ref, folder, locations[ref.file])


def require_known_types(checkpoint: Checkpoint) -> None:
    """Raises InputError if a tensor has a type that ONNX models here do not have, before any work is done."""
    for name, ref in checkpoint.tensors.items():
        if ref.dtype not in _TYPES:
            raise InputError(
                f"Tensor {name} in {ref.file} has a type that cannot be lowered",
                got=ref.dtype,
                allowed=", ".join(_TYPES),
                do="Convert the model to one of these types first",
            )


def _byte_range(name: str, ref: TensorRef, folder: Path, location: str) -> ir.TensorProtocol:
    dtype, shape = _TYPES[ref.dtype], ir.Shape(ref.shape)
    if ref.length == 0:  # embedded: to ONNX, a length of 0 means "to the end of the file"
        return ir.tensor(np.zeros(ref.shape, dtype.numpy()), dtype=dtype, name=name)
    return ir.ExternalTensor(location, ref.offset, ref.length, dtype, shape=shape, name=name, base_dir=folder)


def _share_bytes(graph: ir.Graph, reshape: ir.Node, ref: TensorRef, folder: Path, location: str) -> None:
    """Puts an initializer over the bytes of a weight in the place of its Reshape."""
    weight, view = reshape.inputs[0], reshape.outputs[0]
    assert weight is not None
    assert view.shape is not None
    shape = tuple(view.shape.numpy())
    name = f"{weight.name}.as_{'x'.join(map(str, shape))}"
    shared = ir.Value(name=name, shape=view.shape, type=weight.type)
    shared.const_value = _byte_range(name, replace(ref, shape=shape), folder, location)
    graph.register_initializer(shared)
    ir.convenience.replace_all_uses_with(view, shared)
    graph.remove(reshape, safe=True)


def _cast_to_float32(graph: ir.Graph, weight: ir.Value) -> None:
    shared: ir.Value | None = None
    for node, index in list(weight.uses()):
        if node.op_type == "Gather" and index == 0:
            # Embeddings are cast behind the Gather: only the rows that are looked up.
            rows = node.outputs[0]
            cast = _cast(rows, f"{weight.name}.rows_float32")
            ir.convenience.replace_all_uses_with(rows, cast, replace_graph_outputs=True)
            cast.producer().replace_input_with(0, rows)  # type: ignore[union-attr]
            rows.type = ir.TensorType(weight.dtype)  # type: ignore[arg-type]
            graph.insert_after(node, cast.producer())  # type: ignore[arg-type]
            continue
        if shared is None:
            shared = _cast(weight, f"{weight.name}.float32")
            graph.insert_before(graph[0], shared.producer())  # type: ignore[arg-type]
        node.replace_input_with(index, shared)


def _cast(value: ir.Value, name: str) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=name).outputs[0]
    cast.name, cast.shape, cast.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
    return cast


@contextmanager
def placed(
    files: Iterable[Path], out: Path, progress: Callable[[Iterable[Any], str], Iterable[Any]]
) -> Iterator[dict[Path, str]]:
    """Yields where each weight file lies relative to the folder of `out`, after copying them there if need be.

    Copies go into a folder beside `out` named like it without its suffix: `engine.onnx` and `engine/` move together.
    They are removed again if the block fails.

    Args:
        files: The checkpoint's .safetensors files.
        out: The .onnx file to be.
        progress: Shows the copying.

    Raises:
        InputError: the folder for the copies exists and holds something else, or there is no space.
    """
    files = sorted(set(files))
    root = out.parent.resolve()
    in_place = {file: _location_inside(file, root) for file in files}
    if all(in_place.values()):
        yield {file: str(location) for file, location in in_place.items()}
        return
    folder = out.with_suffix("")
    _require_ours(folder)
    require_space(folder, sum(file.stat().st_size for file in files))
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for file in progress(files, "Copying weights"):
            shutil.copyfile(file, temporary / file.name)
    try:
        yield {file: f"{folder.name}/{file.name}" for file in files}
    except BaseException:
        remove(folder)
        raise


def _location_inside(file: Path, root: Path) -> str | None:
    """The path of a file relative to `root` if ONNX will take it there, else None."""
    real = file.resolve()
    if file.is_symlink() or real.stat().st_nlink > 1 or not real.is_relative_to(root):
        return None
    return real.relative_to(root).as_posix()


def _require_ours(folder: Path) -> None:
    foreign = [folder] if folder.is_file() else []
    if folder.is_dir():
        foreign = [path for path in folder.iterdir() if path.suffix != ".safetensors"]
    if foreign:
        raise InputError(
            f"The weights are to be copied to {folder}, but something else is there",
            got=", ".join(sorted(path.name for path in foreign)[:4]),
            allowed="nothing, or the .safetensors files of an earlier run",
            do="Choose another name for the .onnx file",
        )
