import math

import numpy as np
import pytest

from sslc_common.errors import InputError
from tests.validate import toys
from validate.accuracy import Perplexity, perplexity, perplexity_ratio

CHUNKS = toys.tokens(6, 20)


def oracle(engine, chunk):
    logits = engine.run(chunk[None])[0][0].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return float(np.mean([-np.log(p[i, chunk[i + 1]]) for i in range(len(chunk) - 1)]))


@pytest.mark.parametrize("batch", [1, 4, 10])
@pytest.mark.parametrize("length", [2, 20, 90])
def test_perplexity_matches_its_definition(batch, length):
    chunks = toys.tokens(6, length)
    found = perplexity(toys.Toy(), chunks, batch=batch)
    nll = [oracle(toys.Toy(), chunk) for chunk in chunks]
    assert found.chunk_nll == pytest.approx(nll)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)))
    assert found.standard_error == pytest.approx(found.perplexity * np.std(nll, ddof=1) / math.sqrt(6))
    assert (found.tokens, found.chunk_tokens, found.non_finite) == (6 * (length - 1), length, 0)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    class Clueless(toys.Toy):
        def out(self, logits, past):
            return np.zeros_like(logits)

    found = perplexity(Clueless(), CHUNKS)
    assert found.perplexity == pytest.approx(toys.VOCAB)
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_one_chunk_has_no_standard_error():
    assert math.isnan(perplexity(toys.Toy(), CHUNKS[:1]).standard_error)


def test_nan_gives_no_perplexity():
    found = perplexity(toys.InfiniteOnce(), CHUNKS)
    assert math.isnan(found.perplexity)
    assert found.non_finite == 6
    assert math.isnan(perplexity_ratio(found, perplexity(toys.Toy(), CHUNKS)).ratio)


def test_a_hopeless_model_has_infinite_perplexity_and_no_crash():
    class Sure(toys.Toy):
        def out(self, logits, past):
            return logits * np.float32(1e6)

    assert perplexity(Sure(), CHUNKS).perplexity == math.inf


def test_the_ratio_is_paired_chunk_by_chunk():
    # Chunks differ wildly in difficulty, but the second model is worse by the same 0.1 ± 0.01 on each.
    dense = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    worse = dense + np.array([0.09, 0.11, 0.1, 0.12, 0.08])

    def make(nll):
        return Perplexity(math.exp(nll.mean()), nll.mean(), 0, 50, tuple(nll), 11, 0, "same")

    found = perplexity_ratio(make(worse), make(dense))
    assert found.ratio == pytest.approx(math.exp(0.1))
    assert found.standard_error == pytest.approx(found.ratio * np.std(worse - dense, ddof=1) / math.sqrt(5))
    assert found.standard_error < 0.01


def test_different_texts_are_never_divided():
    with pytest.raises(InputError, match="different texts"):
        perplexity_ratio(perplexity(toys.Toy(), CHUNKS), perplexity(toys.Toy(), CHUNKS[:, ::-1].copy()))


def test_chunks_of_one_token_and_foreign_tokens_are_refused():
    with pytest.raises(InputError, match="at least 1 row of 2 tokens"):
        perplexity(toys.Toy(), CHUNKS[:, :1])
    with pytest.raises(InputError, match="tokenizer"):
        perplexity(toys.Toy(), CHUNKS + toys.VOCAB)
    with pytest.raises(InputError, match="0 rows"):
        perplexity(toys.Toy(), CHUNKS[:0])
