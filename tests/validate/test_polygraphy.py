"""The metrics that polygraphy has too are the same numbers, where it can compute them."""

import numpy as np
import pytest

from validate.attribution import relative_l2
from validate.metrics import position_errors, summarize

pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install polygraphy")

from polygraphy.comparator import CosineSimilarityCompareFunc, IterationResult, L2CompareFunc


def by_polygraphy(compare, metric, reference, engine):
    runs = [IterationResult({"logits": array}, runner_name=name) for name, array in (("a", reference), ("b", engine))]
    return getattr(compare(*runs)["logits"], metric)


@pytest.mark.parametrize("error", [1e-6, 1e-3, 0.5])
def test_l2_and_cosine_are_polygraphys(error):
    random = np.random.default_rng(0)
    reference = random.standard_normal((40, 61))
    engine = reference + error * random.standard_normal((40, 61))
    ours = summarize("prefill", position_errors(reference, engine), 0.0)
    distance = by_polygraphy(L2CompareFunc(), "l2_norm", reference, engine)
    # float64 on both sides; only the order of the sums differs.
    assert ours.relative_l2 == pytest.approx(distance / np.linalg.norm(reference), rel=1e-9)
    assert relative_l2(reference, engine) == pytest.approx(ours.relative_l2, rel=1e-12)
    cosine = by_polygraphy(CosineSimilarityCompareFunc(), "cosine_similarity", reference, engine)
    assert ours.cosine == pytest.approx(cosine, rel=1e-12)


def test_nan_fails_in_both():
    reference, engine = np.ones((2, 8)), np.ones((2, 8))
    engine[1, 3] = np.nan
    runs = [IterationResult({"logits": array}, runner_name=name) for name, array in (("a", reference), ("b", engine))]
    assert not L2CompareFunc()(*runs)["logits"]
    assert np.isnan(summarize("prefill", position_errors(reference, engine), 0.0).relative_l2)
    assert relative_l2(reference, engine) == np.inf
