"""An `Engine` as a model of lm-evaluation-harness (package lm_eval, 0.4.13). Imported only where that is installed.

It asks what lm_eval's own `HFLM` asks, in the same tokens: special tokens as the tokenizer adds them, the first token
of an empty context, what is cut off when a request is too long, rolling windows. So scores can be compared with those
that are published for transformers. Answers to the same context share its key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sslc_common.errors import InputError
from validate.accuracy import negative_log_likelihood
from validate.engine import Engine
from validate.progress import Progress, silent

_MAX_GENERATED = 256  # where a task does not say; HFLM's number

_Request = tuple[Any, list[int], list[int]]


class EngineLM(TemplateLM):
    """Log-likelihoods and greedy continuations from an engine.

    Args:
        engine: What answers, one sequence at a time.
        tokenizer: Of transformers, the model's.
        max_length: Most tokens of a request; what is older is cut off.
        progress: Wraps the loops over requests.

    Attributes:
        non_finite: NaN or infinite logits so far. With any, no score means anything.
    """

    def __init__(self, engine: Engine, tokenizer: Any, *, max_length: int, progress: Progress = silent) -> None:
        super().__init__()
        self.tokenizer, self.max_length, self.non_finite = tokenizer, max_length, 0
        self._engine, self._progress = engine, progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands in for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default with the tokenizer's special tokens, unless the string begins with the prefix token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: Any) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is what greedy decoding gives) of (_, context, continuation)."""
        answers: list[tuple[float, bool]] = [(np.nan, False)] * len(requests)
        known: list[int] = []
        last, cache = np.empty(0), None
        # Sorted, so that answers to the same context follow each other.
        order = sorted(range(len(requests)), key=lambda index: requests[index][1])
        for index in self._progress(order, f"Harness, {self._engine.name}"):
            _, context, continuation = requests[index]
            tokens = (context + continuation)[-(self.max_length + 1) :]
            context = tokens[: len(tokens) - len(continuation)]
            if context != known:
                logits, cache = self._engine.run(np.array([context], np.int64))
                last, known = logits[0, -1:].copy(), context
            rows = last
            if len(continuation) > 1:
                more, _ = self._engine.run(np.array([continuation[:-1]], np.int64), cache=cache)
                rows = np.concatenate([last, more[0]])
            total, bad = negative_log_likelihood(rows, np.array(continuation))
            self.non_finite += bad
            answers[index] = -total, bool((rows.argmax(axis=1) == continuation).all())
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length`."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            asked = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(answer for answer, _ in self._loglikelihood_tokens(asked)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to what each task stops at.

        Raises:
            InputError: a task wants to sample.
        """
        return [self._generate(*request.args) for request in self._progress(requests, f"Harness, {self._engine.name}")]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(options, _MAX_GENERATED)
        if options["do_sample"]:
            raise InputError("A harness task wants to sample", got=options, allowed="tasks that generate greedily")
        most, end = options["max_gen_toks"], self.tokenizer.decode(self.eot_token_id)
        stops = handle_stop_sequences(options.get("until"), eos=end)
        ids, cache = self.tok_encode(context)[-(self.max_length - most) :], None
        tokens: list[int] = []
        text = ""
        while len(tokens) < most:
            logits, cache = self._engine.run(np.array([ids], np.int64), cache=cache)
            self.non_finite += int((~np.isfinite(logits[0, -1])).sum())
            ids = [int(logits[0, -1].argmax())]
            if ids[0] == self.eot_token_id:
                break
            tokens += ids
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
        return str(postprocess_generated_text(generation=text, stop=stops, think_end_token=None))
