"""The walk through the blocks: each is solved, refined and stored on the hidden states that those before it produce.

Two streams of hidden states go up side by side: those of the compressed blocks so far, which are what the next block is
solved on, and those of the dense model, which refinement aims at.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from compress.architectures import linears
from compress.blocks import BlockCall, LayerInputs, collect_inputs, embed, return_freed_memory, run
from compress.budget import LayerPlan
from compress.folder import shard_name
from compress.format import Progress
from compress.importance import FISHER, HIDDEN, Importance, load_state
from compress.layer import LowRankSparseLinear
from compress.options import METHODS, QUANTIZED, CompressOptions
from compress.refinement import refine
from compress.shards import read_header, read_tensor, write_shard
from compress.solve import solve_block, store_block
from compress.source import Source, assign
from compress.work import Work
from sslc_common.files import remove

# In the folder of the work:
STATES = "states"
_SPILL = "hidden_states.bin"
_DENSE_SPILL = "dense_hidden_states.bin"


def compress_blocks(
    work: Work,
    source: Source,
    plans: dict[str, LayerPlan],
    importance: dict[str, Importance],
    options: CompressOptions,
    tokens: Tensor | None,
    solving: int,
    progress: Progress,
) -> None:
    """Compresses every block that is not finished, and writes its shard.

    Args:
        work: What is finished; the others are added.
        source: The dense model.
        plans: Of every layer.
        importance: Of the layers, if it was measured.
        options: What to do.
        tokens: int64 [n, L]; None for a method that needs none.
        solving: How many of the n sequences, the first ones, are solved on; the others measure errors.
        progress: Wraps the loop over blocks.
    """
    rounding = not options.values_dtypes.isdisjoint(QUANTIZED)
    spill, hidden = work.folder / _SPILL, None
    dense_spill, dense = work.folder / _DENSE_SPILL, None
    try:
        if tokens is not None:
            hidden, calls = embed(source, tokens, spill)
            if options.refinement:
                dense, _ = embed(source, tokens, dense_spill)
        for index, name in enumerate(progress(source.blocks, "Compressing blocks")):
            shard = work.folder / shard_names(source)[index]
            block = source.model.get_submodule(name)
            unfinished = index >= len(work.finished)
            if unfinished or dense is not None:
                stored = source.load_block(name)
            if dense is not None:
                _run_dense(block, calls[index], dense, load_state(work.folder / STATES, name, HIDDEN))
            if unfinished:
                inputs: dict[str, LayerInputs] = {}
                if hidden is not None:
                    gram = METHODS[options.method].calibrated or rounding
                    inputs = collect_inputs(block, linears(block), calls[index], hidden, solving, gram)
                return_freed_memory()  # what each step freed, so that a block's peak is one step's and not their sum
                solved = solve_block(block, name, stored, inputs, importance, plans, options)
                if not rounding:  # nothing else needs them any more
                    for seen in inputs.values():
                        seen.gram = None
                return_freed_memory()
                if hidden is not None and dense is not None:
                    F = load_state(work.folder / STATES, name, FISHER)
                    refine(block, name, calls[index], hidden, dense, solving, F, options.refinement, options.seed)
                return_freed_memory()
                rows = store_block(block, name, stored, inputs, solved, options)
                write_shard(shard, stored)
                work.finish_block(rows)
                del inputs, solved
            elif hidden is not None:
                _load_finished(source, name, shard)
            if hidden is not None:
                run(block, calls[index], hidden)
            stored = {}
            block.to("meta")
            return_freed_memory()
    finally:
        remove(spill)
        remove(dense_spill)


def _run_dense(block: nn.Module, call: BlockCall, dense: Tensor, known: Tensor | None) -> None:
    """`run` on the dense model's hidden states [n, L, d], the first of which `compress.importance` may know already."""
    count = 0 if known is None else len(known)
    if known is not None:
        dense[:count] = known
    run(block, call, dense[count:])


def _load_finished(source: Source, name: str, shard: Path) -> None:
    """Puts a block that an earlier run finished into the skeleton, as `store_block` left it."""
    tensors = {key: read_tensor(key, ref) for key, ref in read_header(shard).items()}
    for layer in linears(source.model.get_submodule(name)):
        full = f"{name}.{layer}"
        if f"{full}.bitmap" in tensors:
            bitmap, values, U, V = (tensors.pop(f"{full}.{part}") for part in ("bitmap", "values", "U", "V"))
            bias = tensors.pop(f"{full}.bias").float() if f"{full}.bias" in tensors else None
            scales = tensors.pop(f"{full}.scales", None)
            compressed = LowRankSparseLinear.from_parts(bitmap, values, U, V, bias, scales)
            source.model.set_submodule(full, compressed)
    for parameter, tensor in tensors.items():
        assign(source.model, parameter, tensor.float())


def shard_names(source: Source) -> list[str]:
    """Names of the shards: one per block, and the last for the rest."""
    count = len(source.blocks) + 1
    return [shard_name(index, count) for index in range(count)]
