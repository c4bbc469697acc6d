import numpy as np
import pytest

from sslc_common.errors import InputError
from tests.validate import toys
from validate.metrics import MARGIN_ERRORS, explained, position_errors, summarize
from validate.numerics import NumericsOptions, compare

OPTIONS = NumericsOptions(padded_tokens=32, greedy_tokens=16)
TEXT = toys.tokens(2, 40)


def against(engine, text=TEXT, **more):
    return compare(toys.Toy("reference"), engine, text, options=OPTIONS, **more)


def phases(numerics):
    return {phase.phase: phase for phase in numerics.phases}


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_equal_engine_in_float32_passes_with_its_rounding_only(rows):
    numerics = against(toys.Toy(dtype=np.float32), toys.tokens(rows, 40))
    # float32 has 6e-8 of rounding per operation; a dozen operations deep.
    assert 0 < numerics.relative_l2 < 2e-6
    assert numerics.cosine == pytest.approx(1, abs=1e-10)
    assert numerics.kl < 1e-10
    assert numerics.margin_top1_agreement == 1.0
    assert numerics.greedy_agreement == 1.0
    assert numerics.greedy_tokens == 16 * min(rows, 4)
    assert numerics.divergences == ()
    assert numerics.non_finite == 0
    counts = {name: phase.positions for name, phase in phases(numerics).items()}
    padded = sum(32 - 16 * row // max(rows - 1, 1) for row in range(max(rows, 2))) + 8 * max(rows, 2)
    assert counts == {
        "prefill": 32 * rows,
        "decode": 8 * rows,
        "chunk": 8 * rows,
        "padded": padded,
        "greedy": 16 * min(rows, 4),
    }


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (toys.ScaledLogits, {"prefill", "decode", "chunk", "padded", "greedy"}),
        (toys.StaleCache, {"decode", "padded", "greedy"}),
        (toys.ShiftedPositions, {"prefill", "decode", "chunk", "padded", "greedy"}),
        (toys.PositionsCountPadding, {"padded"}),
        (toys.IgnoresPadding, {"padded"}),
        (toys.NotCausalInChunks, {"chunk"}),
        (toys.WritesIntoGivenCache, {"chunk"}),
    ],
)
def test_each_fault_shows_in_the_phases_that_exercise_it_and_only_there(fault, where):
    numerics = against(fault())
    assert {name for name, phase in phases(numerics).items() if phase.relative_l2 > 1e-5} == where
    assert numerics.relative_l2 > 1e-5


@pytest.mark.parametrize("fault", [toys.NanAfterManyTokens, toys.InfiniteOnce])
def test_nan_and_infinity_leave_no_figure_standing(fault):
    numerics = against(fault())
    assert numerics.non_finite > 0
    assert np.isnan(numerics.relative_l2)
    assert np.isnan(numerics.top1_agreement)
    bad = [phase for phase in numerics.phases if phase.non_finite]
    assert bad
    assert all(np.isnan(phase.relative_l2) and np.isnan(phase.kl_mean) for phase in bad)


def test_padded_positions_are_not_compared():
    assert against(toys.NanInPadding()).relative_l2 == 0


def test_a_fault_that_needs_many_tokens_is_seen_in_the_greedy_phase():
    class LateFault(toys.Toy):
        def out(self, logits, past):
            return logits + np.float32(past > 45) * np.arange(toys.VOCAB, dtype=np.float32)

    options = NumericsOptions(padded_tokens=32, greedy_tokens=40)
    numerics = compare(toys.Toy(), LateFault(), TEXT, options=options)
    assert phases(numerics)["decode"].relative_l2 == 0
    assert phases(numerics)["greedy"].relative_l2 > 0.1
    assert numerics.greedy_agreement < 1
    first = numerics.divergences[0]
    assert first.reference_token != first.engine_token
    assert first.step == 46 - 16 + 1  # the last logits of `past` tokens choose token past − prompt + 1
    assert not first.explained


def test_prompts_may_be_given_and_generation_left_out():
    numerics = against(toys.Toy(), prompts=[np.array([1, 2, 3]), np.array([4])])
    assert numerics.greedy_tokens == 32
    options = NumericsOptions(padded_tokens=32, greedy_tokens=0)
    numerics = compare(toys.Toy(), toys.Toy(), TEXT, options=options)
    assert np.isnan(numerics.greedy_agreement)
    assert "greedy" not in phases(numerics)


def test_progress_wraps_the_work():
    seen = []

    def progress(items, description):
        seen.append((description, len(items)))
        return items

    against(toys.Toy(), progress=progress)
    assert seen == [("Comparing logits", 4)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (toys.tokens(2, 9), ["2 rows of 9 tokens", "at least 1 row of 10 tokens"]),
        (toys.tokens(2, 40) + toys.VOCAB, ["not in the model's vocabulary", "0 to 60"]),
        (toys.tokens(2, 40) - toys.VOCAB, ["not in the model's vocabulary", "0 to 60"]),
        (toys.tokens(2, 40).astype(float), ["float64 [2, 40]", "integers"]),
        (toys.tokens(2, 40)[0], ["[40]", "integers [rows, tokens]"]),
    ],
)
def test_unusable_text_is_refused(text, words):
    with pytest.raises(InputError) as error:
        against(toys.Toy(), text)
    assert all(word in str(error.value) for word in words)


def test_engines_of_different_models_are_refused():
    with pytest.raises(InputError, match="different vocabularies"):
        against(toys.Toy(vocab_size=toys.VOCAB + 1))

    class LastTokenOnly(toys.Toy):
        def out(self, logits, past):
            return logits[:, -1:]

    with pytest.raises(InputError, match="wrong shape"):
        against(LastTokenOnly("half an engine"))


def test_metrics_match_their_definitions():
    random = np.random.default_rng(3)
    # More rows than one float64 block holds, so that joining blocks is exercised.
    reference = random.standard_normal((150, 97)).astype(np.float32)
    engine = (reference + 0.1 * random.standard_normal((150, 97))).astype(np.float32)
    summary = summarize("x", position_errors(reference, engine), typical_relative_l2=0.0)
    r, e = reference.astype(np.float64), engine.astype(np.float64)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (r, e))
    by_row = np.linalg.norm(e - r, axis=1) / np.linalg.norm(r, axis=1)
    kl = (p * np.log(p / q)).sum(1)
    assert summary.positions == 150
    assert summary.relative_l2 == pytest.approx(np.linalg.norm(e - r) / np.linalg.norm(r))
    assert (summary.worst_relative_l2, summary.worst_position) == (pytest.approx(by_row.max()), by_row.argmax())
    assert summary.cosine == pytest.approx((r * e).sum() / np.linalg.norm(r) / np.linalg.norm(e))
    assert summary.max_error_over_rms == pytest.approx(np.abs(e - r).max() / np.sqrt((r**2).mean()))
    assert (summary.kl_mean, summary.kl_max) == (pytest.approx(kl.mean()), pytest.approx(kl.max()))
    assert summary.top1_agreement == (r.argmax(1) == e.argmax(1)).mean() < 1


def test_near_ties_are_forgiven_and_clear_choices_are_not():
    reference = np.zeros((2, 8), np.float32)
    reference[:, 0] = 10
    reference[0, 1], reference[1, 1] = 10 - 1e-5, 10 - 1e-1  # a near-tie, and a clear choice
    engine = reference.copy()
    engine[:, 1] = 10.2  # flips both
    errors = position_errors(reference, engine)
    noise = 1e-6
    assert list(errors.agrees) == [False, False]
    assert list(explained(errors, noise)) == [True, False]
    assert errors.margin == pytest.approx([1e-5, 1e-1], rel=0.1)
    assert 1e-5 < MARGIN_ERRORS * noise * errors.rms[0] < 1e-1
    summary = summarize("x", errors, noise)
    assert (summary.top1_agreement, summary.margin_top1_agreement) == (0.0, 0.5)


def test_a_few_broken_positions_cannot_excuse_themselves():
    random = np.random.default_rng(0)
    reference = random.standard_normal((100, 50)).astype(np.float32)
    engine = reference + np.float32(1e-6) * random.standard_normal((100, 50)).astype(np.float32)
    engine[:3] = engine[:3, ::-1]
    errors = position_errors(reference, engine)
    typical = float(np.median(errors.relative_l2))
    assert summarize("x", errors, typical).margin_top1_agreement == pytest.approx(0.97)


def test_zero_logits_agree_with_zero_and_with_nothing_else():
    zeros, ones = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    assert summarize("x", position_errors(zeros, zeros), 0.0).relative_l2 == 0
    assert summarize("x", position_errors(zeros, ones), 0.0).relative_l2 == np.inf


def test_an_engine_for_one_sequence_gets_one_and_padding_all_the_same():
    class OneSequence(toys.Toy):
        def run(self, input_ids, attention_mask=None, cache=None):
            assert len(input_ids) == 1
            return super().run(input_ids, attention_mask, cache)

    options = NumericsOptions(padded_tokens=32, padded_rows=1, greedy_tokens=4)
    numerics = compare(toys.Toy("reference"), OneSequence(), toys.tokens(1, 40), options=options)
    assert phases(numerics)["padded"].positions == 16 + 8  # half of the row is padding
    assert numerics.relative_l2 == 0
