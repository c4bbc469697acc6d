import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from sslc_common.errors import InputError
from tests.validate import toys
from tests.validate.results import STABLE
from validate.document import schema, to_document
from validate.latency import LatencyOptions
from validate.limits import Limit, Limits
from validate.numerics import NumericsOptions
from validate.run import Options, validate
from validate.size import Bytes, SizeLedger

HELD_OUT = toys.tokens(4, 40)
QUICK = Options(
    numerics=NumericsOptions(padded_tokens=16, greedy_tokens=4),
    latency=LatencyOptions(16, 8, 1, warm_up_seconds=0.01, prefill_seconds=0.05, decode_seconds=0.05),
)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    monkeypatch.setattr("validate.sampler.judge", lambda *arguments: STABLE)


def everything(engine, **more):
    given = {"dense": toys.Toy("dense", seed=1), "reference": toys.Toy("reference"), "held_out": HELD_OUT}
    return validate(engine, options=QUICK, **(given | more))


def test_a_right_engine_passes_with_every_stage_run():
    limits = Limits(max_size_ratio=Limit(value=0.8))
    verdict = everything(toys.Toy(dtype=np.float32), sizes=SizeLedger(engine=Bytes(100, 70)), limits=limits)
    assert verdict.verdict == "passed"
    skipped = {
        "attribution": "no way into the engine's layers was given",
        "harness": "no tasks of lm-evaluation-harness were given",
    }
    assert verdict.results.skipped == skipped
    assert verdict.results.seconds.keys() == {"numerics", "accuracy", "latency"}
    document = to_document(verdict)
    jsonschema.Draft202012Validator(schema()).validate(document)
    assert document["accuracy"]["perplexity_ratio"] > 0
    assert document["latency"]["decode"]["speedup"]["low"] > 0
    assert document["nulls"] == skipped


@pytest.mark.parametrize(
    "fault", [toys.StaleCache, toys.PositionsCountPadding, toys.NanAfterManyTokens, toys.ScaledLogits]
)
def test_a_faulty_engine_is_a_regression_whatever_else_is_good(fault):
    verdict = everything(fault())
    assert (verdict.verdict, verdict.exit_code) == ("regression", 1)
    jsonschema.Draft202012Validator(schema()).validate(to_document(verdict))


def test_stages_without_their_material_are_skipped_with_a_reason():
    verdict = validate(toys.Toy(), reference=toys.Toy(), held_out=HELD_OUT, options=QUICK)
    assert verdict.verdict == "passed"
    assert verdict.results.skipped == {
        "attribution": "no way into the engine's layers was given",
        "accuracy.dense": "no dense engine was given",
        "harness": "no tasks of lm-evaluation-harness were given",
        "latency.dense": "no dense engine was given",
        "size": "the sizes of the engine and of a dense one were not both given",
    }
    verdict = validate(toys.Toy(), options=QUICK)
    assert verdict.verdict == "inconclusive"
    assert verdict.results.skipped["numerics"] == "no PyTorch model to compare with was given"
    assert verdict.results.skipped["accuracy"] == "no held-out text was given"
    verdict = validate(toys.Toy(), reference=toys.Toy(), options=QUICK)
    assert verdict.results.skipped["numerics"] == "no text to compare logits on was given"


def test_stages_can_be_skipped_on_demand():
    verdict = everything(toys.Toy(), skip={"latency": "--skip latency", "accuracy": "--skip accuracy"})
    assert verdict.results.latency is None
    assert verdict.results.accuracy is None
    assert verdict.results.skipped["latency"] == "--skip latency"
    assert verdict.verdict == "passed"
    limited = everything(
        toys.Toy(), skip={"latency": "--skip latency"}, limits=Limits(min_decode_speedup=Limit(value=1))
    )
    assert limited.verdict == "inconclusive"
    assert limited.limits[-1].reason == "not measured: --skip latency"


def test_text_and_prompts_of_the_callers_choice_are_used():
    verdict = everything(toys.Toy(), text=HELD_OUT[:1, :20], prompts=[np.array([5, 6, 7])])
    phases = {phase.phase: phase.positions for phase in verdict.results.numerics.phases}
    assert (phases["prefill"], phases["greedy"]) == (12, 4)


def test_a_dense_model_with_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="vocabulary"):
        everything(toys.Toy(), held_out=np.full((2, 30), toys.VOCAB))


def test_importing_the_validator_pulls_in_no_runtime():
    modules = "validate.run, validate.report, validate.limits"
    heavy = "{'torch', 'transformers', 'onnx', 'onnxruntime', 'sslc_export', 'compress', 'plugins_ort'}"
    code = f"import sys; import {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
