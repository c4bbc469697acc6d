import copy
import json
from dataclasses import replace

import jsonschema
import pytest

from sslc_common.errors import InputError
from tests.validate import results as given
from validate.baseline import changes, read_baseline
from validate.document import schema, to_document
from validate.limits import Limits
from validate.verdict import judge

NOW = to_document(judge(given.RESULTS, Limits()))


def outcomes(before):
    return {change.metric: change.outcome for change in changes(before, NOW)}


def test_nothing_changed_against_itself():
    assert outcomes(NOW) == {
        "size.ratio": "same",
        "accuracy.perplexity": "same",
        "accuracy.perplexity_ratio": "same",
        "latency.prefill.speedup": "same",
        "latency.decode.speedup": "same",
    }


def test_intervals_that_overlap_are_no_change():
    before = copy.deepcopy(NOW)
    before["latency"]["decode"]["speedup"] |= {"median": 1.54, "low": 1.51, "high": 1.57}
    assert outcomes(before)["latency.decode.speedup"] == "same"
    before["latency"]["decode"]["speedup"] |= {"median": 1.65, "low": 1.6, "high": 1.7}
    assert outcomes(before)["latency.decode.speedup"] == "worse"
    before["latency"]["decode"]["speedup"] |= {"median": 1.3, "low": 1.25, "high": 1.35}
    assert outcomes(before)["latency.decode.speedup"] == "better"


def test_intervals_that_part_by_less_than_whole_runs_differ_are_no_change():
    before = copy.deepcopy(NOW)
    before["latency"]["decode"]["speedup"] |= {"median": 1.55, "low": 1.53, "high": 1.57}  # now 1.48 to 1.52
    assert outcomes(before)["latency.decode.speedup"] == "same"


def test_an_unstable_measurement_is_neither_better_nor_worse():
    before = copy.deepcopy(NOW)
    before["latency"]["decode"]["speedup"] |= {"median": 3.0, "low": 2.9, "high": 3.1}
    before["latency"]["decode"]["stable"] = False
    assert outcomes(before)["latency.decode.speedup"] == "unclear"
    assert outcomes(before)["latency.prefill.speedup"] == "same"


def test_a_larger_engine_is_worse_and_a_smaller_perplexity_better():
    before = copy.deepcopy(NOW)
    before["size"]["ratio"] *= 0.99
    before["accuracy"]["perplexity"] *= 1.01
    assert outcomes(before)["size.ratio"] == "worse"
    assert outcomes(before)["accuracy.perplexity"] == "better"


def test_another_text_and_missing_stages_are_not_compared():
    before = copy.deepcopy(NOW)
    before["accuracy"]["text_sha256"] = "cd" * 32
    before["latency"] = None
    assert outcomes(before) == {"size.ratio": "same"}


def test_a_baseline_is_read_and_checked(tmp_path):
    file = tmp_path / "verdict.json"
    with pytest.raises(InputError, match="no baseline"):
        read_baseline(file)
    for content, message in (("{", "not a verdict"), ("[]", "not a verdict"), ('{"schema_version": 9}', "version")):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            read_baseline(file)
    file.write_text(json.dumps(NOW))
    assert read_baseline(file) == NOW


def test_changes_are_part_of_the_verdict():
    results = replace(given.RESULTS, baseline=changes(NOW, NOW))
    document = to_document(judge(results, Limits()))
    jsonschema.Draft202012Validator(schema()).validate(document)
    assert [change["outcome"] for change in document["baseline"]] == ["same"] * 5
