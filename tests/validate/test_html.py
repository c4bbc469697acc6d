from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tests.validate import results as given
from tests.validate.test_report import VERDICTS
from validate.attribution import Attribution, LayerErrors
from validate.html import render_html
from validate.junit import render_junit
from validate.limits import Limits
from validate.plots import bars, distributions, scatter
from validate.verdict import judge

_VOID = {"meta"}


class Strict(HTMLParser):
    """Checks that what is opened is closed, and collects what would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.loads, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("name", VERDICTS)
def test_the_page_is_whole_loads_nothing_and_begins_with_the_verdict(name):
    page = render_html(VERDICTS[name])
    parser = Strict()
    parser.feed(page)
    assert parser.stack == []
    assert parser.loads == []
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert page.index(f"<h1>{VERDICTS[name].verdict.upper()}</h1>") < page.index("<section>")
    assert "prefers-color-scheme: dark" in page


def test_the_page_shows_every_layer_and_every_distribution():
    page = render_html(VERDICTS["passed"])
    for text in ("prefill, milliseconds", "decode, milliseconds", "density of S", "rank of U·V", "held-out error"):
        assert text in page
    assert "<title>model.layers.0.mlp.up_proj: 0.41</title>" in page


def test_text_of_others_cannot_become_markup():
    layer = LayerErrors("<img src=x>", None, 2e-7, None, 3e-7, 4e-7)
    engine = replace(given.RESULTS.engine, name="<script>alert(1)</script>")
    results = replace(given.RESULTS, engine=engine, attribution=Attribution((layer,), None, "<b>", 1e-5))
    page = render_html(judge(results, Limits()))
    assert "<img" not in page
    assert "<script" not in page


@pytest.mark.parametrize("values", [[1.0], [2.0] * 30, [0.001, 5000.0], [1.0, 1.0 + 1e-12]])
def test_plots_take_any_samples(values):
    for svg in (
        distributions("x", {"dense": values, "compressed": values}),
        bars("x", [str(value) for value in values], values),
        bars("x", ["zero"], [0.0]),
        scatter("x", [str(value) for value in values], {"a": values, "b": [None] * len(values)}, limit=1e-5),
        scatter("x", ["a", "b"], {"a": [float("inf"), 0.0]}, limit=1e-5),
    ):
        figure = ElementTree.fromstring(svg)
        numbers = [value for element in figure.iter() for value in element.attrib.values()]
        assert not {"nan", "inf"} & set(numbers)


def test_junit_has_a_case_for_each_limit_and_each_gap():
    suite = ElementTree.fromstring(render_junit(VERDICTS["passed"]))
    assert [case.get("name") for case in suite] == [limit.name for limit in VERDICTS["passed"].limits]
    assert all(len(case) == 0 for case in suite)
    suite = ElementTree.fromstring(render_junit(VERDICTS["regression"]))
    failed = {
        case.get("name"): case.find("failure").get("message") for case in suite if case.find("failure") is not None
    }
    assert failed.keys() == {"max_relative_l2", "max_layer_error", "max_perplexity_ratio"}
    assert suite.get("failures") == "3"
    suite = ElementTree.fromstring(render_junit(VERDICTS["inconclusive"]))
    assert suite.get("failures") == "0"
    assert int(suite.get("errors")) == sum(limit.outcome == "inconclusive" for limit in VERDICTS["inconclusive"].limits)
    assert {case.get("name") for case in suite if case.find("skipped") is not None} >= {"numerics", "size"}
