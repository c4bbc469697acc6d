"""Runs a TensorRT plan on a GPU, with the cache staying there. Not run on a GPU yet: see scripts/gpu_check.sh.

TensorRT's own runtime, and not polygraphy's TrtRunner: that writes every call's outputs into the same buffers, so the
cache, which is one call's output and the next one's input, would have to be copied for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslc_common.errors import InputError, MissingError
from sslc_export.engines import tensorrt_builder
from sslc_export.engines.inputs import model_inputs


@dataclass(frozen=True)
class _Cache:
    """Keys and values [B, heads, length, head size] of each layer, in the order of the engine's inputs."""

    values: tuple[torch.Tensor, ...]
    length: int


class TensorRTEngine:
    """A plan that `sslc_export.engines.tensorrt.build` wrote, behind `validate.engine.Engine`.

    Args:
        path: The .plan file. It has the plugin inside, and with it code that this process will run: open only plans
            that you trust.
        name: How reports call it; None for the file's name.

    Attributes:
        name: How reports call it.
        vocab_size: Width of the logits.
        kv_cache_bytes: Of one token of one sequence, in all layers.
        gpu_seconds: Time on the GPU of the last call, by CUDA events around the execution alone (trtexec's "GPU compute
            time").

    Raises:
        MissingError: no CUDA device, or no TensorRT.
        InputError: the file is missing, or this TensorRT or GPU does not take it.
    """

    def __init__(self, path: Path | str, *, name: str | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise InputError(f"There is no engine {path}", do="Check the path")
        if not torch.cuda.is_available():
            raise MissingError(
                f"{path} was built, but cannot be executed here: no CUDA device",
                do="Copy it to a machine with the GPU that it was built for, or validate the .onnx engine on this one",
            )
        trt = tensorrt_builder.tensorrt()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._runtime.engine_host_code_allowed = True  # the plugin is inside
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise InputError(
                f"{trt.__name__} {trt.__version__} cannot open {path}",
                allowed="a plan that was built with this version for this GPU (see the .json beside it)",
                do="Build the engine again on this machine",
            )
        self.name = name or path.stem
        self.gpu_seconds = 0.0
        self._trt = trt
        self._stream = torch.cuda.Stream()
        self._nothing = torch.empty(1, device="cuda")  # an empty cache has no address; TensorRT wants one all the same
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._past = [n for n in names if n.startswith("past_key_values.")]
        self._present = [n.replace("past_key_values.", "present.") for n in self._past]
        self._type = {trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16}[
            self._engine.get_tensor_dtype(self._past[0])
        ]
        shapes = [self._engine.get_tensor_shape(n) for n in self._past]
        self.kv_cache_bytes = sum(int(shape[1]) * int(shape[3]) * self._type.itemsize for shape in shapes)
        self.vocab_size = int(self._engine.get_tensor_shape("logits")[-1])
        # One context per optimization profile: mainline TensorRT's plans have one for decoding and one for prefill.
        self._contexts = []
        for profile in range(self._engine.num_optimization_profiles):
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(profile, self._stream.cuda_stream)
            self._contexts.append(context)

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, cache: Any = None
    ) -> tuple[np.ndarray, Any]:
        """One forward pass; see `validate.engine.Engine`."""
        cache = cache or self._empty_cache(len(input_ids))
        ids, mask, positions = model_inputs(input_ids, attention_mask, cache.length)
        feeds = dict(zip(self._past, cache.values, strict=True))
        for name, array in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            feeds[name] = torch.from_numpy(np.ascontiguousarray(array)).cuda()
        context = self._contexts[0 if ids.shape[1] == 1 else -1]
        for name, tensor in feeds.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise InputError(f"{name} has a shape that the engine was not built for", got=tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr() or self._nothing.data_ptr())
        outputs = {}
        for name in ("logits", *self._present):
            dtype = torch.float32 if name == "logits" else self._type
            outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            context.set_tensor_address(name, outputs[name].data_ptr())
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stream.wait_stream(torch.cuda.current_stream())
        start.record(self._stream)
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError(f"{self._trt.__name__} could not execute {self.name}")
        end.record(self._stream)
        end.synchronize()
        self.gpu_seconds = start.elapsed_time(end) / 1000
        present = tuple(outputs[name] for name in self._present)
        return outputs["logits"].cpu().numpy(), _Cache(present, cache.length + ids.shape[1])

    def _empty_cache(self, batch: int) -> _Cache:
        sizes = (self._engine.get_tensor_shape(name) for name in self._past)
        return _Cache(tuple(torch.empty((batch, s[1], 0, s[3]), dtype=self._type, device="cuda") for s in sizes), 0)
