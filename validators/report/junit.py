"""junit.xml: a test case a gate and place, for systems that collect test results."""

from __future__ import annotations

import re
import shlex
from xml.etree import ElementTree as ET

from gptoss_export.validators.report.json_writer import content_sha256
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.report.text import number, verdict_sentence, verdict_word
from gptoss_export.validators.verdict import Case, cases

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


def to_junit(report: ParityReport) -> bytes:
    """One test suite. An engine that was built and not executed is a skipped case named `engine`; the cases beside it
    are those of its graph."""
    found = cases(report.evidence, report.gates)
    skipped = report.engine.execution == "graph only"
    suite = ET.Element("testsuite", name=_clean(f"gptoss-export parity of {report.target}"))
    suite.set("tests", str(len(found) + skipped))
    suite.set("failures", str(sum(not case.kept for case in found)))
    suite.set("errors", "0")
    suite.set("skipped", str(int(skipped)))
    suite.set("timestamp", _clean(report.created_at))
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(report):
        ET.SubElement(properties, "property", name=_clean(name), value=_clean(value))
    if skipped:
        case = ET.SubElement(suite, "testcase", classname=_clean(report.target), name="engine")
        ET.SubElement(case, "skipped", message=_clean(report.engine.not_executed_reason or ""))
    for one in found:
        _case(suite, report.target, one)
    ET.indent(suite)
    document: bytes = ET.tostring(suite, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _case(suite: ET.Element, target: str, case: Case) -> None:
    name = f"{case.where}: {case.gate}"
    element = ET.SubElement(suite, "testcase", classname=_clean(target), name=_clean(name))
    if not case.kept:
        side = "at least" if case.gate.startswith("min_") else "at most"
        message = f"measured {number(case.measured)}, limit {side} {number(case.limit)}"
        if case.gate == "measured":
            message = "nothing was measured"
        failure = ET.SubElement(element, "failure", type=case.gate, message=message)
        failure.text = f"{_clean(name)}: measured {case.measured!r}, limit {case.limit!r}"


def _properties(report: ParityReport) -> list[tuple[str, str]]:
    return [
        ("verdict", f"{verdict_word(report)}: {verdict_sentence(report)}"),
        ("report sha256", content_sha256(report)),
        ("reference", report.reference),
        ("engine", f"{report.engine.name} {report.engine.version}, {report.engine.provider}"),
        ("effort", report.effort),
        *((f"model {what}", text) for what, text in report.binding.model.facts),
        ("command", shlex.join(report.command)),
        *((f"version of {name}", value) for name, value in sorted(report.versions.items())),
        *((f"sha256 of checkpoint {name}", value) for name, value in sorted(report.binding.checkpoint.items())),
        *((f"sha256 of {name}", value) for name, value in sorted(report.binding.files.items())),
    ]


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
