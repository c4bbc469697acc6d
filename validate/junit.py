"""junit.xml, which every CI shows: one test case per limit, one per stage that was not run."""

from __future__ import annotations

from xml.etree import ElementTree

from validate.summary import headline
from validate.verdict import Verdict


def render_junit(verdict: Verdict) -> str:
    """The file as text. A limit that could not be decided is an error: not a failure, and not a success either."""
    suite = ElementTree.Element("testsuite", name="sslc-validate", timestamp=verdict.results.created)
    counts = dict.fromkeys(("failures", "errors", "skipped"), 0)
    for limit in verdict.limits:
        case = ElementTree.SubElement(suite, "testcase", classname="limits", name=limit.name)
        if limit.outcome == "regression":
            ElementTree.SubElement(case, "failure", message=limit.reason).text = headline(verdict)
            counts["failures"] += 1
        elif limit.outcome == "inconclusive":
            ElementTree.SubElement(case, "error", message=limit.reason, type="inconclusive")
            counts["errors"] += 1
    for what, reason in verdict.results.skipped.items():
        case = ElementTree.SubElement(suite, "testcase", classname="measured", name=what)
        ElementTree.SubElement(case, "skipped", message=reason)
        counts["skipped"] += 1
    suite.set("tests", str(len(suite)))
    for name, count in counts.items():
        suite.set(name, str(count))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
