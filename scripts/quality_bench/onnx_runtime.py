"""ONNX Runtime's own quantization of the dense model: what users would do instead."""

from __future__ import annotations

import logging
from pathlib import Path

BITS = (8, 4, 2)  # what its quantizer takes (1.31): there is no 3
BLOCK = 32  # weights that share a scale; ONNX Runtime's usual choice


def quantize(model: Path, folder: Path, bits: int) -> tuple[Path, int, int]:
    """The dense model with the linear layers of its blocks quantized by ONNX Runtime, to the nearest, symmetric.

    Returns:
        The file, and the bytes of those layers quantized (values and scales) and dense.
    """
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    from sslc_export.lowering.lower import lower

    logging.getLogger("onnxruntime").setLevel(logging.WARNING)  # it tells of every node
    path = folder / "dense.onnx"
    if not path.is_file():
        lower(model, path)
    graph = onnx.load(path)
    # The quantizer looks for constants: weights are transposed in the file rather than by a node.
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    transposes = [n for n in graph.graph.node if n.op_type == "Transpose" and n.input[0] in weights]
    excluded, sizes = [], []
    for node in transposes:
        weight = numpy_helper.to_array(weights[node.input[0]])
        users = [user for user in graph.graph.node if node.output[0] in user.input]
        if "lm_head" in node.input[0] or "embed" in node.input[0]:
            excluded += [user.name for user in users]
        else:
            sizes.append(weight.shape)
        graph.graph.initializer.append(numpy_helper.from_array(weight.T.copy(), node.output[0]))
        graph.graph.node.remove(node)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    quantizer = MatMulNBitsQuantizer(graph, nodes_to_exclude=excluded, algo_config=config)
    quantizer.process()
    out = folder / f"int{bits}.onnx"
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)
    dense = sum(4 * N * K for N, K in sizes)
    blocks = sum(N * -(-K // BLOCK) for N, K in sizes)
    return out, sum(N * K * bits // 8 for N, K in sizes) + 4 * blocks, dense
