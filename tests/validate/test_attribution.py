"""The logic on probes of plain arrays; real models and engines are in tests/sslc_export/test_faults.py."""

import numpy as np
import pytest

from sslc_common.errors import InputError
from validate.attribution import LOGITS, Activations, attribute, relative_l2

NAMES = ("a", "b", "c", "d")
TEXT = np.random.default_rng(0).integers(0, 50, (2, 20))


class Probe:
    """Layers that double what they get; errors are put in by name and phase."""

    def __init__(self, noise=0.0, inputs=None, alone=None, no_kernel=None, different=(), layers=NAMES):
        self.layers = layers
        self.noise, self.inputs, self.alone, self.no_kernel = noise, inputs or {}, alone or {}, no_kernel
        self.different = different
        self.random = np.random.default_rng(1)

    def run(self, ids, mask, cache):
        phase = "decode" if ids.shape[1] == 1 else "prefill"
        hidden, seen = np.stack([np.sin(ids * (k + 1.0)) for k in range(4)], -1), {}
        for name in (*self.layers, LOGITS):
            hidden = hidden * (1 + self.inputs.get((name, phase), 0.0))
            hidden = hidden * (1 + self.noise * self.random.standard_normal(hidden.shape))
            X = hidden.copy()
            if mask is not None:
                X[mask[:, -ids.shape[1] :] == 0] = np.nan  # padding has no defined value
            seen[name] = Activations(X, 2 * X)
        return seen, None

    def exact(self, layer, X):
        return 2 * X

    def dense(self, layer, X):
        return 2.2 * X

    def function(self, layer, X):
        return 2 * X * (1 + self.alone.get((layer, "lowering"), 0.0))

    def kernel(self, layer, X):
        return self.function(layer, X) * (1 + self.alone.get((layer, "kernel"), 0.0))

    def different_weights(self, layer):
        return self.different


def found(**engine):
    return attribute(Probe(), Probe(**engine), TEXT, limit=1e-5)


def test_rounding_is_no_fault_and_compression_is_a_price():
    attribution = found(noise=1e-7)
    assert attribution.first is None
    assert [layer.name for layer in attribution.layers] == list(NAMES)
    assert all(layer.compression == pytest.approx(0.2 / 2.2) for layer in attribution.layers)
    assert all(0 < layer.input < 1e-6 for layer in attribution.layers)


def test_rounding_that_grows_beyond_the_limit_by_and_by_is_blamed_on_no_layer():
    attribution = found(noise=6e-6)
    assert attribution.first is None
    assert attribution.layers[-1].input > 1e-5


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("layer", "after"), [("a", None), ("c", "b"), (LOGITS, "d")])
def test_a_wrong_input_is_blamed_on_what_comes_before_it(layer, after, phase):
    first = found(noise=1e-7, inputs={(layer, phase): 1e-3}).first
    assert (first.layer, first.stage, first.after, first.phase) == (layer, "between", after, phase)


@pytest.mark.parametrize("stage", ["lowering", "kernel"])
def test_a_layer_that_is_wrong_alone_is_blamed_itself(stage):
    first = found(alone={("c", stage): 1e-4}).first
    assert (first.layer, first.stage, first.phase) == ("c", stage, "alone")
    assert first.error == pytest.approx(1e-4, rel=1e-3)


def test_the_first_of_several_faults_is_named():
    first = found(alone={("d", "lowering"): 1e-3}, inputs={("b", "prefill"): 1e-4}).first
    assert (first.layer, first.stage) == ("b", "between")


def test_without_a_kernel_there_is_no_kernel_error():
    attribution = found(no_kernel="not installed", alone={("c", "kernel"): 1.0})
    assert attribution.first is None
    assert {layer.kernel for layer in attribution.layers} == {None}


def test_other_weights_everywhere_mean_another_checkpoint():
    first = found(alone={(name, "lowering"): 0.1 for name in NAMES}, different=("values",)).first
    assert "another checkpoint" in first.explanation


def test_cosine_and_largest_error_are_those_of_the_worst_phase():
    right = {layer.name: layer for layer in found().layers}
    assert (right["c"].cosine, right["c"].max_error_over_rms) == (pytest.approx(1.0), 0.0)
    wrong = {layer.name: layer for layer in found(inputs={("c", "decode"): -2.0}).layers}  # the sign turned
    assert wrong["b"].cosine == pytest.approx(1.0)
    assert wrong["c"].cosine == pytest.approx(-1.0)
    # Errors of twice the value; the largest sine is at most √2 of their rms or a little more, on a few values.
    assert 2.0 < wrong["c"].max_error_over_rms < 4.0


@pytest.mark.parametrize("layers", [NAMES[:3], (*NAMES, "e")])
def test_layers_that_only_one_of_them_has_are_refused(layers):
    with pytest.raises(InputError, match="does not have the layers"):
        found(layers=layers)


def test_relative_l2_of_nothing_and_of_nan():
    zeros = np.zeros(3)
    assert relative_l2(zeros, zeros) == 0.0
    assert relative_l2(zeros, np.ones(3)) == float("inf")
    assert relative_l2(np.ones(3), np.array([1.0, np.nan, 1.0])) == float("inf")
    assert relative_l2(np.array([np.inf]), np.array([np.inf])) == float("inf")
