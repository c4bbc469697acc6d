"""The checkpoint, format version 1: a Hugging Face folder, read strictly. docs/format.md has every byte.

`Checkpoint.open` looks at headers and the config only, and believes no number in them before it has been compared with
the files' real sizes; `Checkpoint.verify` reads every tensor once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.int4 import packed_length, padding_is_zero
from compress.layer import bitmap_words, unpack_mask
from compress.shards import TensorRef, read_header, read_tensor
from sslc_common.errors import InputError

QUANT_METHOD = "sslc"
FORMAT_VERSION = 1
INDEX = "model.safetensors.index.json"
VALUE_DTYPES = {"F32": "f32", "BF16": "bf16", "I8": "int8", "U8": "int4"}  # and what options call them
_FACTOR_DTYPES = {"F32": "F32", "BF16": "BF16", "I8": "BF16", "U8": "BF16"}  # of U and V, by the dtype of the values
_WITH_SCALES = ("I8", "U8")
_FLOATS = ("F64", "F32", "F16", "BF16")

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def no_progress(iterable: Iterable[Any], description: str) -> Iterable[Any]:
    """The silent default of every `progress` argument."""
    return iterable


@dataclass(frozen=True)
class LayerInfo:
    """A compressed layer, as config.json and the tensors agree on it.

    Attributes:
        N: Outputs.
        K: Inputs.
        rank: r, may be 0.
        nnz: Stored values of S.
        dtype: Of values: "F32" or "BF16", as are U and V; or "I8", or "U8" for packed int4, with U and V in BF16 and
            scales.
        bias: dtype of the bias, or None.
        packed: Bytes of packed int4 values; None for others.
    """

    N: int
    K: int
    rank: int
    nnz: int
    dtype: str
    bias: str | None
    packed: int | None = None

    @property
    def density(self) -> float:
        """Stored share of S."""
        return self.nnz / (self.N * self.K)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder with safetensors, dense or compressed, whose headers have been checked.

    Attributes:
        folder: Where it is.
        config: config.json.
        tensors: Every tensor of the model by name, as a byte range of a file.
        layers: The compressed layers by name; empty for a dense folder.
        embeddings: Embeddings without weights of their own, by name, and the layer that holds their rows: all of them,
            in int8.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    layers: dict[str, LayerInfo]
    embeddings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Reads config and headers of a folder.

        Raises:
            InputError: something is missing, damaged, contradictory or of an unknown version.
        """
        folder = Path(folder)
        config = read_config(folder)
        quantization = _quantization(folder, config)
        tensors = _tensors(folder)
        layers, embeddings = {}, {}
        if quantization is not None:
            entries = quantization.get("layers")
            if not isinstance(entries, dict):
                raise _damaged(folder / "config.json", "quantization_config has no table of layers", got=entries)
            layers = {name: _layer(folder, name, entry, tensors) for name, entry in entries.items()}
            embeddings = _embeddings(folder / "config.json", quantization.get("embeddings", {}), layers)
            for name, ref in tensors.items():
                if ref.sha256 is None:
                    raise _damaged(ref.file, f"Tensor {name} has no checksum in the file's __metadata__")
        return cls(folder, config, tensors, layers, embeddings)

    def read(self, name: str) -> Tensor:
        """One tensor, its checksum verified (dense folders have none).

        Raises:
            InputError: there is no such tensor, or its bytes are not those that were written.
        """
        if name not in self.tensors:
            raise InputError(f"Tensor {name} is missing from {self.folder}", do="Copy or download the folder again")
        return read_tensor(name, self.tensors[name])

    def verify(self, progress: Progress = no_progress) -> None:
        """Reads every tensor once: checksums, finite values, bitmaps that agree with their values.

        Raises:
            InputError: naming the file and the tensor that are wrong.
        """
        for name in progress(self.tensors, "Verifying tensors"):
            ref = self.tensors[name]
            tensor = self.read(name)
            if ref.dtype in _FLOATS:
                require_finite(tensor, name, ref.file)
            layer_name, _, part = name.rpartition(".")
            if part == "bitmap" and (layer := self.layers.get(layer_name)):
                _verify_bitmap(tensor, name, ref, layer)
                if layer.dtype == "U8":
                    self._verify_int4(tensor, f"{layer_name}.values")
            if part == "scales" and layer_name in self.layers:
                _verify_scales(tensor, name, ref)

    def _verify_int4(self, bitmap: Tensor, name: str) -> None:
        ref = self.tensors[name]
        if (wanted := packed_length(bitmap)) != ref.shape[0]:
            raise _damaged(ref.file, f"Tensor {name} has not the bytes that its bitmap says", ref.shape[0], str(wanted))
        if not padding_is_zero(bitmap, self.read(name)):
            raise _damaged(ref.file, f"Tensor {name} has bits set in the padding of a block", allowed="0 bits")


def require_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raises InputError if a tensor holds NaN or infinity, saying how many and where the first is."""
    # In pieces: isfinite makes temporaries of the tensor's size, and embeddings are large.
    wrong = [~torch.isfinite(piece) for piece in tensor.reshape(-1).split(1 << 22) if not torch.isfinite(piece).all()]
    if wrong:
        first = torch.unravel_index(torch.nonzero(~torch.isfinite(tensor.reshape(-1)))[0, 0], tensor.shape)
        count = sum(int(piece.sum()) for piece in wrong)
        raise InputError(
            f"Tensor {name} in {file} holds NaN or infinite values",
            got=f"{count} of {tensor.numel()}, the first at {[int(i) for i in first]}",
            allowed="finite values",
            do="Fix or replace the model; training or converting it probably overflowed",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        InputError: there is no such folder, no config in it, or it is not JSON.
    """
    if not folder.is_dir():
        raise InputError(
            f"There is no model folder {folder}",
            got="a file" if folder.is_file() else "nothing",
            allowed="a Hugging Face folder with config.json and safetensors",
            do="Check the path",
        )
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no config.json",
            got=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
            allowed="a Hugging Face folder with config.json and safetensors",
            do="Check the path, or download the model again",
        )
    return _json_object(path)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{path.name} is not JSON", got=error) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"{path.name} is not a JSON object", got=type(content).__name__)
    return content


def _damaged(path: Path, fact: str, got: object = None, allowed: str | None = None) -> InputError:
    return InputError(
        f"{path}: {fact}",
        got=got,
        allowed=allowed,
        do="Copy or download the folder again, or compress the model again",
    )


def _quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != QUANT_METHOD:
        raise InputError(
            f"{folder} holds a model that is quantized in another way",
            got=f"quant_method {method!r}" if method else repr(quantization),
            allowed="a dense model, or one that sslc-compress wrote",
            do="Start from the dense model",
        )
    version = quantization.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{folder} has an unknown checkpoint format version",
            got=version,
            allowed=str(FORMAT_VERSION),
            do="Compress the model again with this version, or install a newer one",
        )
    return quantization


def _tensors(folder: Path) -> dict[str, TensorRef]:
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise InputError(
                f"{folder} has no safetensors weights",
                got=", ".join(sorted(p.name for p in folder.iterdir())[:8]),
                allowed=f"model.safetensors, or {INDEX} and its shards",
                do="Load the model with transformers and save it with save_pretrained, which writes safetensors",
            )
        return read_header(single)
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "there is no weight_map", got=type(weight_map).__name__)
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise _damaged(index, "weight_map names a file outside the folder", got=repr(file), allowed="plain names")
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise _damaged(folder / file, f"Tensor {name} is missing, though {INDEX} says that it is here")
    # transformers loads whatever is in the files, so the two must agree.
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name) != file:
                raise _damaged(folder / file, f"Tensor {name} is here, but {INDEX} does not say so")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _layer(folder: Path, name: str, entry: object, tensors: dict[str, TensorRef]) -> LayerInfo:
    """Compares what the config says of a layer with the tensors' headers."""
    config = folder / "config.json"
    keys = ("N", "K", "rank", "nnz")
    numbers = [n for key in keys if isinstance(entry, dict) and type(n := entry.get(key)) is int and n >= 0]
    if len(numbers) < len(keys) or 0 in numbers[:2]:
        raise _damaged(config, f"Layer {name} is not described by sizes", got=entry, allowed="N, K ≥ 1; rank, nnz ≥ 0")
    N, K, rank, nnz = numbers
    shapes = {"bitmap": (N, bitmap_words(K)), "values": (nnz,), "U": (N, rank), "V": (rank, K)}
    packed = _packed_int4(name, nnz, N * bitmap_words(K) // 2, tensors)
    if packed is not None:
        shapes["values"] = (packed,)
    for part, shape in shapes.items():
        ref = tensors.get(f"{name}.{part}")
        if ref is None:
            raise _damaged(config, f"Tensor {name}.{part} is missing, though the layer is said to be compressed")
        if ref.shape != shape:
            raise _damaged(
                ref.file,
                f"Tensor {name}.{part} has a shape that contradicts config.json",
                got=list(ref.shape),
                allowed=str(list(shape)),
            )
        dtypes = {"bitmap": ("I32",), "values": tuple(VALUE_DTYPES)}.get(part, ("F32", "BF16"))
        if ref.dtype not in dtypes:
            raise _damaged(ref.file, f"Tensor {name}.{part} has a wrong type", ref.dtype, " or ".join(dtypes))
    dtype = tensors[f"{name}.values"].dtype
    for part in ("U", "V"):
        ref = tensors[f"{name}.{part}"]
        if ref.dtype != (wanted := _FACTOR_DTYPES[dtype]):
            fact = f"Tensor {name}.{part} has another type than {name}.values asks for"
            raise _damaged(ref.file, fact, ref.dtype, wanted)
    _check_scales(config, name, (N, bitmap_words(K) // 2), dtype, tensors)
    bias = tensors.get(f"{name}.bias")
    if bias is not None and (bias.shape != (N,) or bias.dtype not in _FLOATS):
        raise _damaged(bias.file, f"Tensor {name}.bias is wrong", f"{bias.dtype} {list(bias.shape)}", f"[{N}] floats")
    return LayerInfo(N, K, rank, nnz, dtype, bias.dtype if bias else None, packed)


def _packed_int4(name: str, nnz: int, blocks: int, tensors: dict[str, TensorRef]) -> int | None:
    """The bytes of packed int4 values, which must be possible; None for values of another type. See `compress.int4`."""
    ref = tensors.get(f"{name}.values")
    if ref is None or ref.dtype != "U8":
        return None
    least, most = -(-nnz // 2), (nnz + min(nnz, blocks)) // 2  # no block, or every one, with an odd number of entries
    if len(ref.shape) != 1 or not least <= ref.shape[0] <= most:
        raise _damaged(
            ref.file,
            f"Tensor {name}.values has a shape that contradicts config.json",
            got=list(ref.shape),
            allowed=f"[{least}] to [{most}] for {nnz} int4 values",
        )
    return ref.shape[0]


def _check_scales(config: Path, name: str, shape: tuple[int, int], dtype: str, tensors: dict[str, TensorRef]) -> None:
    ref = tensors.get(f"{name}.scales")
    if dtype not in _WITH_SCALES:
        if ref is not None:
            fact = f"Tensor {name}.scales is there, though {name}.values are not int8 or int4"
            raise _damaged(ref.file, fact, dtype, " or ".join(_WITH_SCALES))
        return
    if ref is None:
        raise _damaged(config, f"Tensor {name}.scales is missing, though {name}.values are {VALUE_DTYPES[dtype]}")
    if ref.dtype != "F16" or ref.shape != shape:
        got = f"{ref.dtype} {list(ref.shape)}"
        raise _damaged(ref.file, f"Tensor {name}.scales is wrong", got, f"F16 {list(shape)}")


def _embeddings(config: Path, entries: object, layers: dict[str, LayerInfo]) -> dict[str, str]:
    """Checks that the layers that embeddings look their rows up in store every entry, in int8 and with rank 0."""
    if not isinstance(entries, dict):
        raise _damaged(config, "quantization_config has no table of embeddings", got=entries)
    for name, layer in entries.items():
        info = layers.get(layer) if isinstance(layer, str) else None
        if info is None or info.dtype != "I8" or info.rank or info.nnz != info.N * info.K:
            allowed = "an int8 layer of rank 0 that stores every entry"
            raise _damaged(config, f"Embedding {name} has its rows in a layer that cannot hold them", layer, allowed)
    return entries


def _verify_scales(scales: Tensor, name: str, ref: TensorRef) -> None:
    if torch.signbit(scales).any():  # −0, too, which the kernel does not take
        raise _damaged(ref.file, f"Tensor {name} holds negative scales", float(scales.min()), "0 or more")


def _verify_bitmap(bitmap: Tensor, name: str, ref: TensorRef, layer: LayerInfo) -> None:
    bits = unpack_mask(bitmap, 32 * bitmap.shape[1])
    if (stored := int(bits.sum())) != layer.nnz:
        raise _damaged(
            ref.file, f"Tensor {name} has another number of bits set than there are values", stored, str(layer.nnz)
        )
    if bits[:, layer.K :].any():
        row = int(bits[:, layer.K :].any(1).nonzero()[0])
        raise _damaged(
            ref.file,
            f"Tensor {name} has bits set in the padding after column {layer.K}",
            got=f"the first in row {row}",
            allowed="0 bits",
        )
