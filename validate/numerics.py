"""Does the engine compute what its own PyTorch model computes?

Both are run on the same tokens in every way an engine is used: a prefill; single-token decode steps with the cache; the
same steps as one chunk, from the prefill's cache (so an engine that writes into a cache it was given is seen); a
left-padded batch, prefill and decode; and greedy generation, each engine following its own tokens for as long as they
agree. Padded positions are excluded: attention over nothing but padding has no defined result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslc_common.errors import InputError
from validate.engine import Engine
from validate.metrics import PhaseNumerics, PositionErrors, concatenate, explained, position_errors, summarize
from validate.progress import Progress, silent
from validate.tokens import check_logits, check_token_ids, left_padded


@dataclass(frozen=True)
class NumericsOptions:
    """How much is compared.

    Attributes:
        decode_steps: Single-token steps after the prefill; as many tokens are taken from the end of each row.
        padded_tokens: Longest prefill of the left-padded batch; the shortest is about half of it.
        padded_rows: Rows of that batch if the text has one row; 1 for engines that take one sequence at a time.
        greedy_tokens: Tokens generated for each prompt; 0 for none.
        prompt_tokens: Length of the prompts taken from `input_ids` when none are given.
        max_prompts: How many of these.
    """

    decode_steps: int = 8
    padded_tokens: int = 48
    padded_rows: int = 2
    greedy_tokens: int = 32
    prompt_tokens: int = 16
    max_prompts: int = 4


@dataclass(frozen=True)
class Divergence:
    """Where greedy generation parted.

    Attributes:
        prompt: Index of the prompt.
        step: Index of the generated token.
        reference_token: What the reference chose.
        engine_token: What the engine chose.
        margin: Difference of their logits, in the reference.
        explained: Whether ordinary numeric error explains it (validate/metrics.py states the rule).
    """

    prompt: int
    step: int
    reference_token: int
    engine_token: int
    margin: float
    explained: bool


@dataclass(frozen=True)
class Numerics:
    """The comparison as a whole: the worst phase for errors, all positions together for agreements.

    Attributes:
        relative_l2: Largest `relative_l2` of the phases; NaN if any output was not finite.
        cosine: Smallest of the phases.
        max_error_over_rms: Largest of the phases.
        kl: Largest `kl_mean` of the phases, in nats.
        top1_agreement: Share of all positions with the same most likely token.
        margin_top1_agreement: The same, near-ties forgiven.
        typical_relative_l2: Median over positions: the e of the margin rule.
        greedy_agreement: Tokens generated alike before the first difference, over all tokens asked for; NaN if none.
        greedy_tokens: Tokens asked for, over all prompts.
        divergences: The prompts that parted.
        non_finite: NaN or infinite logits, in all.
        phases: Each phase by itself.
    """

    relative_l2: float
    cosine: float
    max_error_over_rms: float
    kl: float
    top1_agreement: float
    margin_top1_agreement: float
    typical_relative_l2: float
    greedy_agreement: float
    greedy_tokens: int
    divergences: tuple[Divergence, ...]
    non_finite: int
    phases: tuple[PhaseNumerics, ...]


@dataclass(frozen=True)
class _Generation:
    """Positions of one prompt's greedy generation, and the tokens both chose at each, [n, 2]."""

    errors: PositionErrors
    tokens: np.ndarray


def compare(
    reference: Engine,
    engine: Engine,
    input_ids: np.ndarray,
    *,
    prompts: Sequence[np.ndarray] | None = None,
    options: NumericsOptions | None = None,
    progress: Progress = silent,
) -> Numerics:
    """Runs both on the same tokens and measures how far their logits are apart.

    Args:
        reference: The compressed PyTorch model.
        engine: What was built from it.
        input_ids: [B, L] token ids of real text, L ≥ `decode_steps` + 2; two rows or more exercise a real batch.
        prompts: Token ids [P] to continue greedily; by default the beginnings of the rows of `input_ids`.
        options: How much is compared.
        progress: Wraps the loop over what is compared.

    Raises:
        InputError: the two have different vocabularies, one returns logits of a wrong shape, or the token ids do not
            suit the model.
    """
    options = options or NumericsOptions()
    if reference.vocab_size != engine.vocab_size:
        raise InputError(
            f"{engine.name} and {reference.name} have different vocabularies",
            got=f"{engine.vocab_size} against {reference.vocab_size} tokens",
            allowed="an engine that was built from this model",
            do="Check that the engine and its reference belong together",
        )
    pair, vocab_size = (reference, engine), engine.vocab_size
    text = check_token_ids(input_ids, vocab_size, "the text to compare on", min_length=options.decode_steps + 2)
    if prompts is None:
        prompts = [row[: options.prompt_tokens] for row in text[: options.max_prompts]]
    prompts = [check_token_ids(np.asarray(prompt)[None], vocab_size, "a prompt") for prompt in prompts]
    if not options.greedy_tokens:
        prompts = []

    phases: dict[str, PositionErrors] = {}
    generations: list[_Generation] = []
    for step in progress(["text", "padding", *range(len(prompts))], "Comparing logits"):
        if step == "text":
            phases |= _text(pair, text, options.decode_steps)
        elif step == "padding":
            rows = text if len(text) > 1 else np.repeat(text, options.padded_rows, axis=0)
            phases["padded"] = _padded(
                pair, rows[:, : options.padded_tokens + options.decode_steps], options.decode_steps
            )
        else:
            generations.append(_generate(pair, prompts[int(step)], options.greedy_tokens))
    if generations:
        phases["greedy"] = concatenate([generation.errors for generation in generations])
    return _summary(phases, generations, options.greedy_tokens)


def _text(pair: tuple[Engine, Engine], text: np.ndarray, steps: int) -> dict[str, PositionErrors]:
    """Prefill, decode and chunk."""
    split = text.shape[1] - steps
    prefill, caches = _run(pair, text[:, :split])
    phases = {"prefill": prefill}
    decode, decode_caches = [], caches
    for position in range(split, text.shape[1]):
        errors, decode_caches = _run(pair, text[:, position : position + 1], caches=decode_caches)
        decode.append(errors)
    if decode:
        phases["decode"] = concatenate(decode)
        phases["chunk"], _ = _run(pair, text[:, split:], caches=caches)
    return phases


def _padded(pair: tuple[Engine, Engine], text: np.ndarray, steps: int) -> PositionErrors:
    """A batch of rows from whole to half length (a single row: half), padded on the left, then decoded."""
    tokens = text.shape[1]
    split = tokens - steps
    padded, mask = left_padded(text, split)
    errors, caches = _run(pair, padded[:, :split], mask[:, :split])
    parts = [errors]
    for position in range(split, tokens):
        errors, caches = _run(pair, padded[:, position : position + 1], mask[:, : position + 1], caches)
        parts.append(errors)
    return concatenate(parts)


def _generate(pair: tuple[Engine, Engine], prompt: np.ndarray, tokens: int) -> _Generation:
    """Both generate greedily until they choose different tokens; until then their histories are the same."""
    chosen: list[list[int]] = []
    parts: list[PositionErrors] = []
    ids, caches = prompt, (None, None)
    while len(chosen) < tokens:
        logits, caches = _both(pair, ids, None, caches)
        last = [output[:, -1] for output in logits]
        parts.append(position_errors(*last))
        chosen.append([int(output.argmax()) for output in last])
        if chosen[-1][0] != chosen[-1][1]:
            break
        ids = np.array([[chosen[-1][0]]], dtype=np.int64)
    return _Generation(concatenate(parts), np.array(chosen))


def _run(
    pair: tuple[Engine, Engine],
    ids: np.ndarray,
    mask: np.ndarray | None = None,
    caches: tuple[Any, Any] = (None, None),
) -> tuple[PositionErrors, tuple[Any, Any]]:
    """One forward pass of both, compared at the positions that are not padding."""
    logits, caches = _both(pair, ids, mask, caches)
    if mask is None:
        return position_errors(*(output.reshape(-1, output.shape[-1]) for output in logits)), caches
    real = mask[:, -ids.shape[1] :].astype(bool)
    return position_errors(*(output[real] for output in logits)), caches


def _both(
    pair: tuple[Engine, Engine], ids: np.ndarray, mask: np.ndarray | None, caches: tuple[Any, Any]
) -> tuple[list[np.ndarray], tuple[Any, Any]]:
    outputs, new = [], []
    for engine, cache in zip(pair, caches, strict=True):
        logits, cache = engine.run(ids, mask, cache)
        outputs.append(check_logits(logits, (*ids.shape, engine.vocab_size), engine.name))
        new.append(cache)
    return outputs, (new[0], new[1])


def _summary(phases: dict[str, PositionErrors], generations: list[_Generation], greedy_tokens: int) -> Numerics:
    everything = concatenate(list(phases.values()))
    typical = float(np.median(everything.relative_l2))
    total = summarize("all", everything, typical)
    records = tuple(summarize(name, errors, typical) for name, errors in phases.items())
    divergences, alike = [], 0
    for prompt, generation in enumerate(generations):
        step = len(generation.tokens) - 1
        a, b = (int(token) for token in generation.tokens[step])
        alike += step + (a == b)
        if a != b:
            forgiven = bool(explained(generation.errors, typical)[step])
            divergences.append(Divergence(prompt, step, a, b, float(generation.errors.margin[step]), forgiven))
    asked = greedy_tokens * len(generations)
    return Numerics(
        # NumPy's max and min give NaN if there is one, Python's do not.
        relative_l2=float(np.max([record.relative_l2 for record in records])),
        cosine=float(np.min([record.cosine for record in records])),
        max_error_over_rms=float(np.max([record.max_error_over_rms for record in records])),
        kl=float(np.max([record.kl_mean for record in records])),
        top1_agreement=total.top1_agreement,
        margin_top1_agreement=total.margin_top1_agreement,
        typical_relative_l2=typical,
        greedy_agreement=alike / asked if asked else float("nan"),
        greedy_tokens=asked,
        divergences=tuple(divergences),
        non_finite=total.non_finite,
        phases=records,
    )
