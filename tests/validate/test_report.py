import json
from copy import deepcopy

import jsonschema
import pytest

from sslc_common.errors import InputError
from tests.validate import results as given
from validate.document import schema, to_document
from validate.limits import Limit, Limits
from validate.report import write_report
from validate.summary import SUMMARY_HEADER, headline, summary_table
from validate.verdict import judge

LIMITS = Limits(
    max_perplexity_ratio=Limit(value=1.4, reason="agreed | with the product team"),
    min_decode_speedup=Limit(value=1.4),
)
VERDICTS = {
    "passed": judge(given.RESULTS, LIMITS),
    "inconclusive": judge(given.bare(), LIMITS),
    "regression": judge(given.broken(), LIMITS),
    "unstable": judge(given.unstable_decode(), LIMITS),
}


def closed(node):
    """The schema with no field allowed that it does not name, so that every field is documented."""
    node = deepcopy(node)
    if isinstance(node, dict):
        node = {key: closed(value) for key, value in node.items()}
        if "properties" in node:
            node.setdefault("additionalProperties", False)
    elif isinstance(node, list):
        node = [closed(item) for item in node]
    return node


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict_json_keeps_to_its_schema_and_holds_no_nan(name, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    write_report(VERDICTS[name], tmp_path)
    document = json.loads((tmp_path / "verdict.json").read_text(), parse_constant=refuse)
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator(closed(schema())).validate(document)
    assert (document["verdict"], document["exit_code"]) == (VERDICTS[name].verdict, VERDICTS[name].exit_code)


@pytest.mark.parametrize("name", VERDICTS)
def test_every_null_of_a_main_value_has_its_reason(name):
    document = to_document(VERDICTS[name])
    for path in (
        "size.ratio",
        "numerics.relative_l2",
        "numerics.top1_agreement",
        "accuracy.perplexity_dense",
        "accuracy.perplexity",
        "accuracy.perplexity_ratio",
        "latency.decode.speedup",
        "latency.prefill.speedup",
    ):
        value, stage = document, path.partition(".")[0]
        for key in path.split("."):
            value = value and value[key]
        assert value is not None or path in document["nulls"] or stage in document["nulls"], path


def test_the_fields_that_scripts_rely_on_are_there():
    document = to_document(VERDICTS["passed"])
    assert document["size"]["ratio"] == pytest.approx(345 / 538)
    assert document["numerics"]["relative_l2"] == 4e-7
    assert document["numerics"]["top1_agreement"] == 0.999
    assert document["accuracy"]["perplexity_dense"] == 12.4
    assert document["accuracy"]["perplexity"] == 16.5
    assert document["accuracy"]["perplexity_ratio"] == 1.33
    assert document["latency"]["decode"]["speedup"] == {"median": 1.5, "low": 1.48, "high": 1.52, "confidence": 0.95}
    assert document["latency"]["prefill"]["speedup"]["median"] == 0.96
    assert document["latency"]["decode"]["engines"]["compressed"]["median_ms"] == 15.0
    assert document["latency"]["decode"]["engines"]["compressed"]["samples_ms"] == [15.0, 15.15]
    assert (document["engine"]["kernel_layers"], document["engine"]["dense_layers"]) == (209, 1)
    assert document["limits"][2] == {
        "name": "max_perplexity_ratio",
        "metric": "accuracy.perplexity_ratio",
        "value": 1.33,
        "low": None,
        "high": None,
        "limit": 1.4,
        "comparison": "<=",
        "outcome": "passed",
        "reason": "1.33 <= 1.4",
        "limit_reason": "agreed | with the product team",
    }


def test_nan_becomes_null_with_a_reason():
    document = to_document(VERDICTS["regression"])
    assert document["accuracy"]["perplexity"] is None
    assert document["nulls"]["accuracy.perplexity"] == "an output was NaN or infinite"
    assert document["nulls"]["numerics.phases.0.relative_l2"] == "an output was NaN or infinite"
    assert document["nulls"]["numerics.greedy_agreement"] == "nothing was generated"


def test_the_headline_says_the_verdict_and_why():
    assert headline(VERDICTS["passed"]) == (
        "PASSED: 0.64× the size, decode 1.50× as fast, prefill 0.96× as fast, 1.330× the perplexity, "
        "logits within 4.0e-07 of PyTorch"
    )
    assert headline(VERDICTS["regression"]).startswith("REGRESSION: max_relative_l2: not a number")
    assert headline(VERDICTS["unstable"]) == (
        "INCONCLUSIVE: min_decode_speedup: the measurement was unstable: compressed varies by 31% (at most 20%)"
    )


def test_the_summary_is_one_table_of_text():
    assert summary_table(VERDICTS["passed"]) == [
        ("engine", "538.0 MB", "345.0 MB", "0.641×"),
        ("compressed layers alone", "424.0 MB", "231.0 MB", "0.545×"),
        ("checkpoint", "538.0 MB", "345.1 MB", "0.641×"),
        ("resident memory", "–", "400.0 MB", "–"),
        ("of resident memory, mapped files", "–", "310.0 MB", "–"),
        ("key-value cache, per token", "46.1 kB", "46.1 kB", "1.000×"),
        ("perplexity (16352 tokens)", "12.40 ± 0.61", "16.50 ± 0.61", "1.330× ± 0.012"),
        ("arc_easy, acc", "0.560 ± 0.035", "0.520 ± 0.035", "0.929× ± 0.020"),
        ("first token, after a prompt of 512", "600.00 ms", "625.00 ms", "0.96× as fast (0.94 to 0.98)"),
        ("prefill, tokens/s", "853.3", "819.2", ""),
        ("next token, after 128", "22.50 ms", "15.00 ms", "1.50× as fast (1.48 to 1.52)"),
        ("decode, tokens/s", "44.4", "66.7", ""),
    ]
    assert all(len(row) == len(SUMMARY_HEADER) for verdict in VERDICTS.values() for row in summary_table(verdict))


def test_report_md_reads_from_verdict_to_environment(tmp_path):
    _, report = write_report(VERDICTS["passed"], tmp_path / "new" / "report")
    text = report.read_text()
    assert text.splitlines()[0] == f"# {headline(VERDICTS['passed'])}"
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Limits",
        "## Latency",
        "## Layers",
        "## Where errors come from",
        "## Numerics",
        "## Zero-shot accuracy",
        "## Build record",
        "## Environment",
    ]
    for line in (
        "Engine `engine.onnx`: 209 layers in the sparse + low-rank kernel, 1 dense. "
        "Measured 2026-11-22T12:00:00+00:00.",
        "|  | dense | compressed | compressed against dense |",
        "| --- | ---: | ---: | ---: |",
        "| `max_perplexity_ratio` | <= 1.4 | passed | 1.33 <= 1.4 (the limit: agreed \\| with the product team) |",
        "| `min_decode_speedup` | >= 1.4 | passed | 95% interval 1.480 to 1.520 is not below 1.4 |",
        "| prefill | 1008 | 4.0e-07 | 9.0e-07 | 1.000000 | 3.0e-06 | 1.0e-12 | 99.90% | 100.00% |",
        "Greedy generation: 93.8% of 64 tokens alike.",
        "Prompt 1 parts at token 28: 17 in PyTorch, 4 in the engine, 2e-06 apart: a near-tie.",
        "| decode, compressed | 15.00 ms | 14.70 ms | 15.75 ms | 15.15 ms | 2.0% | -0.4% | 2 |",
        "Decode: stable. Other processes used 0.04 of 2 cores. Clock 2600 MHz (2590 to 2610).",
        "| 4 | 50.00 | 80.0 | 40.00 | 100.0 | 1.25× (1.20 to 1.30) |  |",
        "| model.layers.0.mlp.up_proj | 32 | 0.410 | 1.90 | 3.54 | 0.0830 |",
        "| processor | A Processor, 2 cores, of which this process may use 2 |",
        "| build record | engine.json |",
        "| validation took | numerics 20 s, latency 60 s |",
        "| model.layers.0.mlp.up_proj | 8.3e-02 | 2.0e-07 | 1.0e-07 | 3.0e-07 | 4.0e-07 | 2.0e-06 | 1.000000 |",
        "| compression | method hassle_free, budget_in_params 0.5, mask_cost – |",
        "| engine.onnx | 0.49 | 7d02d181cd55f62b |",
        "| wikitext | word_perplexity | 24.0000 | 31.0000 | – | 10 |",
    ):
        assert line in text.splitlines(), line


def test_report_md_says_what_was_not_measured_and_what_was_unstable(tmp_path):
    text = write_report(VERDICTS["inconclusive"], tmp_path)[1].read_text()
    assert "| latency.dense | no dense engine was given |" in text
    assert "## Numerics" not in text
    text = write_report(VERDICTS["unstable"], tmp_path)[1].read_text()
    assert "Measured twice, because at first compressed varies by 31% (at most 20%)." in text
    text = write_report(VERDICTS["regression"], tmp_path)[1].read_text()
    assert "**12 logits were NaN or infinite.**" in text


def test_tables_keep_their_columns_whatever_stands_in_them(tmp_path):
    for verdict in VERDICTS.values():
        widths, tables = set(), 0
        for line in [*write_report(verdict, tmp_path)[1].read_text().splitlines(), ""]:
            if line.startswith("|"):
                widths.add(line.replace("\\|", "").count("|"))
            elif widths:
                assert len(widths) == 1
                widths, tables = set(), tables + 1
        assert tables >= 4


def test_a_report_replaces_an_older_one_and_leaves_nothing_else(tmp_path):
    write_report(VERDICTS["passed"], tmp_path)
    write_report(VERDICTS["regression"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junit.xml", "report.html", "report.md", "verdict.json"]
    assert json.loads((tmp_path / "verdict.json").read_text())["verdict"] == "regression"


def test_a_report_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_report(VERDICTS["passed"], tmp_path / "file" / "report")
