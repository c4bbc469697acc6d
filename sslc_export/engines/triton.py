"""A model repository for NVIDIA Triton Inference Server around a plan. Written, not served: that needs a GPU.

The model keeps no state: past keys and values go in and come out as tensors. That is the plan's own interface, simple
and slow over a network; a client on the same machine should use CUDA shared memory for them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from sslc_common.files import atomic_path

_TYPES: dict[int, str] = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}
_README = """# {name}, a Triton model repository

    tritonserver --model-repository=. --backend-config=tensorrt,version-compatible=true

`version-compatible=true` lets Triton run the plugin that is inside the plan (TensorRT's `engineHostCodeAllowed`). If
your Triton does not know it, load the library beside this file instead:

    tritonserver --model-repository=. --backend-config=tensorrt,plugins={plugin}

Triton's TensorRT backend reads plans of mainline TensorRT, of its own version, built for its GPU. A plan of
TensorRT-RTX needs a server with that library. To look at a plan without Triton:

    trtexec --loadEngine={name}/1/model.plan --versionCompatible \\
        --shapes=input_ids:1x1,position_ids:1x1,attention_mask:1x129,{past}

Inputs: input_ids and position_ids [batch, new], attention_mask [batch, past + new], past_key_values.N.key, .value.
Outputs: logits [batch, new, vocabulary] in FP32, and present.N.key and .value, the next call's past.
"""


def write_repository(plan: Path, model: Path, folder: Path, *, type: str, plugin: Path) -> None:
    """Writes `folder` with the plan, its configuration, the plugin library and a README.

    Args:
        plan: The .plan file.
        model: The lowered .onnx file that it was built from: it has the inputs' and outputs' names and shapes.
        folder: The repository to write.
        type: "f16" or "bf16": the type of the cache.
        plugin: The plugin library.
    """
    name = plan.stem
    graph = onnx.load(model, load_external_data=False).graph
    with atomic_path(folder) as temporary:
        (temporary / name / "1").mkdir(parents=True)
        shutil.copyfile(plan, temporary / name / "1" / "model.plan")
        shutil.copyfile(plugin, temporary / plugin.name)
        (temporary / name / "config.pbtxt").write_text(_configuration(name, graph, type))
        past = [v for v in graph.input if v.name.startswith("past_key_values.")]
        sizes = ",".join(
            f"{v.name}:1x{v.type.tensor_type.shape.dim[1].dim_value}x128x{v.type.tensor_type.shape.dim[3].dim_value}"
            for v in past
        )
        (temporary / "README.md").write_text(_README.format(name=name, plugin=plugin.name, past=sizes))


def _configuration(name: str, graph: onnx.GraphProto, type: str) -> str:
    def tensors(kind: str, values: list[onnx.ValueInfoProto]) -> str:
        entries = []
        for value in values:
            cache = value.name.startswith(("past_key_values.", "present."))
            half = "TYPE_FP16" if type == "f16" else "TYPE_BF16"
            element = half if cache else _TYPES[value.type.tensor_type.elem_type]
            sizes = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
            entries.append(f'  {{ name: "{value.name}" data_type: {element} dims: {sizes} }}')
        return f"{kind} [\n" + ",\n".join(entries) + "\n]\n"

    head = f'name: "{name}"\nplatform: "tensorrt_plan"\nmax_batch_size: 0\n'
    return head + tensors("input", list(graph.input)) + tensors("output", list(graph.output))
