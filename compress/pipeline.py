"""From a dense folder to a compressed one, holding one decoder block at a time.

Calibration is sequential: each block is solved on the hidden states that the compressed blocks before it produce, so
that it sees, and can partly mend, their errors. Peak memory is one block, its Gram matrices or what refining it needs
(both with int8 and int4 values), and the hidden states of the calibration sequences, however many blocks there are.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.blocks import spilled_bytes
from compress.budget import LayerPlan
from compress.calibration import fingerprint, hold_out, read_tokens
from compress.folder import copy_companions, write_config, write_index, write_json
from compress.format import Progress, no_progress
from compress.head import head_names, quantize_head
from compress.importance import Importance, load, measure, save, state_bytes
from compress.options import METHODS, TEXT_ALLOCATIONS, CompressOptions
from compress.planning import plan_model, share_out, space_needed
from compress.report import CompressReport, LayerReport
from compress.sequential import STATES, compress_blocks, shard_names
from compress.shards import write_shard
from compress.source import Source
from compress.tuning import TOKENS, forget, tune_folder
from compress.work import ALGORITHM_VERSION, Work, source_hash
from sslc_common.errors import InputError
from sslc_common.files import remove, require_space, writing

REPORT = "compression_report.json"
_IMPORTANCE = "importance.safetensors"
_PLANS = "plans.json"


def compress_model(
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    tokens: Tensor | None = None,
    kept_dense: Mapping[str, str] | None = None,
    progress: Progress = no_progress,
) -> CompressReport:
    """Compresses the linear layers of a model's decoder blocks and writes a checkpoint (docs/format.md).

    Work goes to `OUT.partial`, which stays if it is interrupted; calling again with the same source, text and options
    continues after the last finished block and gives the same bytes. OUT appears when all is done; if it is there
    already, made from the same source, text and options, nothing is left to do.

    Args:
        source: Dense Hugging Face folder of a supported architecture, with safetensors.
        out: Folder to write. Must not hold anything else, unless `options.overwrite`.
        options: What to do.
        tokens: int64 [n, L], calibration sequences instead of `options.calibration`.
        kept_dense: Layers that stay dense for reasons that `options` does not know, by full name, and the reasons.
        progress: Wraps the loops over weights to check and over blocks.

    Returns:
        What was done to each layer; the same is in OUT/compression_report.json.

    Raises:
        InputError: bad input of any kind, a place that cannot be written, a full disk.
        MissingError: calibration wants a dataset and `datasets` is not installed.
    """
    began = time.perf_counter()
    source, out = Path(source), Path(out)
    dense = Source.open(source)
    plans = plan_model(dense, options)
    plans |= {name: LayerPlan(dense_reason=reason) for name, reason in (kept_dense or {}).items()}
    tokens = _calibration_tokens(dense, options, tokens)
    solving = 0
    if tokens is not None:
        tokens, solving = hold_out(tokens)
    identity: dict[str, Any] = {
        "algorithm": ALGORITHM_VERSION,
        "source": source_hash(dense.checkpoint),
        "calibration": None if tokens is None else fingerprint(tokens),
        "options": options.what_decides(),
    }
    if kept_dense:
        identity["kept_dense"] = dict(kept_dense)
    if not options.overwrite and (done := _done_before(out, identity)):
        return done
    _require_free(source, out, options.overwrite)
    dense.verify(progress)
    with writing(out), torch.no_grad():
        work = Work.begin(out, identity, options.overwrite)
        resumed = len(work.finished)
        refining = tokens is not None and options.refinement > 0
        spilled = 0 if tokens is None else (1 + refining) * spilled_bytes(dense, tokens)
        importance: dict[str, Importance] = {}
        seen = tokens[:solving] if tokens is not None and options.allocation != "uniform" else None
        if seen is not None:
            states = state_bytes(dense, seen)
            spilled = spilled + states if refining else max(spilled, states)
        require_space(work.folder, space_needed(dense, plans, options) + spilled - work.written_bytes())
        if seen is not None:
            importance = _importance(work, dense, seen, options, progress)
        plans = share_out(work.folder / _PLANS, dense, plans, importance, options, seen, progress)
        compress_blocks(work, dense, plans, importance, options, tokens, solving, progress)
        rows = [row for block in work.finished for row in block]
        rest = {name: dense.read(name) for name in dense.outside_blocks()}
        write_shard(work.folder / shard_names(dense)[-1], rest)
        del rest
        written = write_index(work.folder, shard_names(dense))
        copy_companions(source, work.folder)
        write_config(work.folder, dense.checkpoint.config, _compression_config(rows, identity))
        steps = 0
        if options.tuning_minutes:
            text = tokens[:solving] if tokens is not None and not options.calibration else _tuning_text(source, options)
            steps = tune_folder(work.folder, source, text, options.tuning_minutes, options.tuning_of, progress)
        head = None
        if options.head == "int8":  # after the tuning, which has no use for rounded weights
            head = quantize_head(work.folder / shard_names(dense)[-1], dense)
            written = write_index(work.folder, shard_names(dense))
            compression = _compression_config([*rows, head], identity) | _embeddings(dense)
            write_config(work.folder, dense.checkpoint.config, compression)
        report = CompressReport(
            method=options.method,
            layers=tuple(rows),
            head=head,
            source_bytes=sum(ref.length for ref in dense.checkpoint.tensors.values()),
            checkpoint_bytes=sum(ref.length for ref in written.values()),
            source_hash=identity["source"],
            calibration=identity["calibration"],
            calibration_tokens=0 if tokens is None else tokens[:solving].numel(),
            held_out_tokens=0 if tokens is None else tokens[solving:].numel(),
            seconds=time.perf_counter() - began,
            resumed_blocks=resumed,
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            tuning_steps=steps,
        )
        write_json(work.folder / REPORT, report.to_json())
        remove(work.folder / _IMPORTANCE)
        remove(work.folder / _PLANS)
        remove(work.folder / STATES)
        forget(work.folder)
        work.publish(out)
    return report


def _done_before(out: Path, identity: dict[str, Any]) -> CompressReport | None:
    """The report of an output that the same source, text and options made before."""
    try:
        config = json.loads((out / "config.json").read_bytes())["quantization_config"]
        report = CompressReport.from_json(json.loads((out / REPORT).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):  # TypeError: what is written there has another shape
        return None
    wanted = json.loads(json.dumps(_decided_by(identity)))
    same = isinstance(config, dict) and all(key in config and config[key] == value for key, value in wanted.items())
    return report if same else None


def _decided_by(identity: dict[str, Any]) -> dict[str, Any]:
    """What decides the result, as config.json has it."""
    return {**identity["options"], **{key: value for key, value in identity.items() if key != "options"}}


def _require_free(source: Path, out: Path, overwrite: bool) -> None:
    if out.resolve() == source.resolve():
        raise InputError(f"The output is the source, {source}", do="Choose another output")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already", do="Choose another output, remove it, or overwrite it")


def _calibration_tokens(source: Source, options: CompressOptions, tokens: Tensor | None) -> Tensor | None:
    """Sequences [n, L] from the caller or from text; None if there are none and the method needs none."""
    if tokens is None:
        if not options.calibration and not METHODS[options.method].calibrated:
            if options.allocation in TEXT_ALLOCATIONS:
                raise InputError(
                    f"The allocation {options.allocation} looks at calibration text",
                    got="none",
                    do="Pass text, or choose an allocation that looks at weights alone: uniform, farms or welore",
                )
            return None
        tokens = read_tokens(
            options.calibration,
            source.checkpoint.folder,
            tokens=options.calibration_tokens,
            length=options.sequence_length,
            seed=options.seed,
        )
    if tokens.ndim != 2 or len(tokens) < 2:
        raise InputError("There are too few calibration sequences", got=list(tokens.shape), allowed="[2 or more, L]")
    config = source.model.config
    limit = getattr(config, "max_position_embeddings", tokens.shape[1])
    if tokens.shape[1] > limit:
        raise InputError(
            "The calibration sequences are longer than the model can take",
            got=f"{tokens.shape[1]} tokens",
            allowed=f"at most {limit}",
            do="Choose a shorter sequence length",
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise InputError(
            "The calibration tokens are not in the model's vocabulary",
            got=f"tokens from {int(tokens.min())} to {int(tokens.max())}",
            allowed=f"0 to {config.vocab_size - 1}",
            do="Use the tokenizer that belongs to the model",
        )
    return tokens


def _tuning_text(source: Path, options: CompressOptions) -> Tensor:
    """Sequences [n, L] from the calibration sources, drawn on beyond those that were calibrated on."""
    return read_tokens(
        options.calibration,
        source,
        tokens=max(TOKENS, options.calibration_tokens),
        length=options.sequence_length,
        seed=options.seed,
        less=True,
    )


def _importance(
    work: Work, source: Source, tokens: Tensor, options: CompressOptions, progress: Progress
) -> dict[str, Importance]:
    """The importance of every layer: measured, or what an interrupted run measured."""
    path = work.folder / _IMPORTANCE
    if not path.is_file():
        states = work.folder / STATES
        save(path, measure(source, tokens, states, options.seed, progress))
        if not options.refinement:  # nothing else reads them
            remove(states)
    return load(path)


def _embeddings(source: Source) -> dict[str, dict[str, str]]:
    """The embedding that looks its rows up in the head, if they are tied, for config.json."""
    head, embedding = head_names(source)
    return {"embeddings": {embedding: head}} if embedding else {}


def _compression_config(rows: list[LayerReport], identity: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the compression; nothing in it changes from run to run."""
    return {
        **_decided_by(identity),
        "layers": {
            row.name: {"N": row.N, "K": row.K, "rank": row.rank, "nnz": row.nnz, "density": round(row.density, 6)}
            for row in rows
            if not row.dense_reason
        },
        "dense_layers": {row.name: row.dense_reason for row in rows if row.dense_reason},
    }
