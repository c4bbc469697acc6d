"""Recovery tuning: the kept values, U, V, biases and norms, end to end, towards the dense model's own predictions.

    min KL(dense ‖ compressed)   on calibration text, by Adam; the mask stays as it is

or U and V alone, which is what the paper tunes.

The one step that holds whole models in memory: the dense one, the compressed one, and for every trained
number its gradient and two moments. So it is for models of some hundred million parameters, and off by default.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compress import hf
from compress.format import Progress, no_progress, require_finite
from compress.shards import read_header, read_tensor, write_shard
from compress.trainable import fast_products, make_trainable
from sslc_common.errors import InputError
from sslc_common.files import remove

LEARNING_RATE = 2e-4
WARM_UP = 10  # steps
LAST = 0.05  # The rate falls along a cosine to this share.
SEQUENCES_PER_STEP = 2
LOGITS = 1 << 22  # at a time
TOKENS = 1 << 18  # Of text, at most; longer tuning goes through it again.
SAVED_EVERY = 300.0  # seconds
_TUNED = "tuned.safetensors"
_STATE = "tuning.safetensors"
_STEP = "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.Adam calls them


def tune_folder(
    folder: Path, source: Path, tokens: Tensor, minutes: float, what: str = "all", progress: Progress = no_progress
) -> int:
    """Tunes a compressed folder in place; see `tune`.

    An interrupted run goes on from where it was up to five minutes before. What was tuned is written to a file of its
    own before any shard is, so that after an interruption the same numbers go into all of them. `forget` removes both.

    Args:
        folder: Compressed.
        source: The dense model.
        tokens: See `tune`.
        minutes: See `tune`.
        what: See `tune`.
        progress: See `tune`.

    Returns:
        How many steps it took, those of an interrupted run included.
    """
    path = folder / _TUNED
    if not path.is_file():
        dense, compressed = hf.load(source, torch.float32), hf.load(folder, torch.float32)
        tensors, steps = tune(dense, compressed, tokens, minutes, what, folder / _STATE, progress)
        write_shard(path, tensors | {_STEP: torch.tensor([steps])})
    tuned = read_header(path)
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors = {name: read_tensor(name, ref) for name, ref in read_header(shard).items()}
        changed = {n: read_tensor(n, tuned[n]).to(t.dtype) for n, t in tensors.items() if n in tuned}
        for name, tensor in changed.items():
            require_finite(tensor, name, path)
        write_shard(shard, tensors | changed)
    return int(read_tensor(_STEP, tuned[_STEP]))


def forget(folder: Path) -> None:
    """Removes what `tune_folder` left for the case of an interruption."""
    remove(folder / _STATE)
    remove(folder / _TUNED)


def file_bytes(tuned: int, minutes: float) -> int:
    """Bytes of the files that tuning keeps beside the checkpoint, at most.

    Args:
        tuned: How many numbers are.
        minutes: See `tune`.
    """
    copies = 6 if 60 * minutes > SAVED_EVERY else minutes > 0  # two moments, too, and all again while it is replaced
    return 4 * tuned * copies


def tune(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokens: Tensor,
    minutes: float,
    what: str = "all",
    state: Path | None = None,
    progress: Progress = no_progress,
) -> tuple[dict[str, Tensor], int]:
    """Tunes a compressed model.

    Args:
        dense: The original, in float32.
        compressed: Its layers are replaced by trainable ones.
        tokens: int64 [n, L], gone through again and again in their order.
        minutes: How long.
        what: "all" for the kept values, U, V, biases and norms, "factors" for U and V alone.
        state: File that is written every five minutes; if it is there, the tuning goes on from it.
        progress: Wraps the loop over steps.

    Returns:
        The tuned tensors in float32, by their names in the checkpoint, and how many steps it took.

    Raises:
        InputError: only U and V are to be tuned, and there are none.
    """
    layers, others = make_trainable(compressed)
    compressed.requires_grad_(False)
    tuned = {f"{name}.{part}": p for name, layer in layers.items() for part, p in layer.named_parameters()} | others
    if what == "factors":
        tuned = {name: p for name, p in tuned.items() if name.endswith((".U", ".V")) and p.numel()}
        if not tuned:
            raise InputError(
                "There is nothing to tune: no layer has a low-rank part",
                got="rank 0 in all of them",
                do="Give them one, by a rank share of 0.1 for example, or tune everything",
            )
    trained = list(tuned.values())
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.95), fused=True)
    step, before = _resume(state, tuned, optimizer) if state and state.is_file() else (0, 0.0)
    began, saved = time.monotonic() - before, before

    def until_the_time_is_up() -> Iterator[float]:
        """The share of the time that has passed, once for each step."""
        while (passed := (time.monotonic() - began) / (60 * minutes)) < 1:
            yield passed

    for passed in progress(until_the_time_is_up(), "Tuning"):
        cosine = LAST + (1 - LAST) * (1 + math.cos(math.pi * passed)) / 2
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * cosine
        rows = torch.arange(step * SEQUENCES_PER_STEP, (step + 1) * SEQUENCES_PER_STEP) % len(tokens)
        with torch.enable_grad():
            _backward(dense, compressed, tokens[rows])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if state and 60 * minutes * passed - saved >= SAVED_EVERY:
            saved = 60 * minutes * passed
            _save(state, tuned, optimizer, step, saved)
    return {name: parameter.detach() for name, parameter in tuned.items()}, step


def _backward(dense: PreTrainedModel, compressed: PreTrainedModel, tokens: Tensor) -> None:
    """Adds the gradients of KL(dense ‖ compressed), mean over the tokens [n, L], to those of the parameters.

    Logits are made for some tokens at a time, as they and what is made of them would take more memory than all else.
    """
    with fast_products():
        with torch.no_grad():
            wanted = _last_states(dense, tokens)
        got = _last_states(compressed, tokens)
        dense_head, head = dense.get_output_embeddings(), compressed.get_output_embeddings()
        end = got.detach().requires_grad_()
        rows = max(1, LOGITS // dense.config.vocab_size)
        for x, y in zip(wanted.split(rows), end.split(rows), strict=True):
            with torch.no_grad():
                p = dense_head(x).float().log_softmax(-1)
            q = head(y).float().log_softmax(-1)
            (functional.kl_div(q, p, reduction="sum", log_target=True) / tokens.numel()).backward()
    got.backward(end.grad)


def _last_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the head of a model sees of tokens [n, L], as [n·L, d]."""
    states: Tensor = model.base_model(tokens, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def _save(path: Path, tuned: dict[str, nn.Parameter], optimizer: torch.optim.Adam, step: int, seconds: float) -> None:
    """What tuning needs to go on: parameters, their moments, steps and seconds so far."""
    moments = {f"{m}.{n}": optimizer.state[p][m] for n, p in tuned.items() if p in optimizer.state for m in _MOMENTS}
    so_far = {_STEP: torch.tensor([step]), "seconds": torch.tensor([seconds], dtype=torch.float64)}
    write_shard(path, tuned | moments | so_far)


def _resume(path: Path, tuned: dict[str, nn.Parameter], optimizer: torch.optim.Adam) -> tuple[int, float]:
    """The inverse of `_save`; returns steps and seconds so far."""
    saved = {name: read_tensor(name, ref) for name, ref in read_header(path).items()}
    step = int(saved[_STEP])
    for name, parameter in tuned.items():
        parameter.data.copy_(saved[name])
        if f"{_MOMENTS[0]}.{name}" in saved:
            moments = {moment: saved[f"{moment}.{name}"] for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step, float(saved["seconds"])
