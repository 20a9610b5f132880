"""parity.json and parity.md: canonical, readable back, bound, and never trusted when read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.gates import GATES, judge
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.report import (
    content_sha256,
    from_json,
    read_report,
    to_json,
    to_markdown,
    write_report,
)
from gptoss_export.validators.report.schema import (
    Binding,
    Engine,
    Machine,
    ParityReport,
    ProbeRecord,
    ScenarioResult,
)
from gptoss_export.validators.scenarios import SCENARIOS

GOOD = Metrics(
    positions=69,
    agreements=68,
    ties=1,
    disagreements=0,
    kl_mean=4.5e-13,
    kl_p99=1e-12,
    kl_max=1.25e-12,
    logit_diff_mean=1e-6,
    logit_diff_max=7.6e-6,
    non_finite=0,
)
NOT_FINITE = Metrics(3, 0, 0, 3, None, None, None, None, None, 6144)


def make_report(**decode: Any) -> ParityReport:
    """A report in which `decode` has its metrics changed."""
    metrics = dict.fromkeys(SCENARIOS, GOOD) | {"decode": replace(GOOD, **decode)}
    return ParityReport(
        schema_version="1",
        created_at="2025-01-02T03:04:05+00:00",
        versions={"gptoss-export": "0.1.0", "python": "3.11.9", "transformers": "5.23.0"},
        machine=Machine("Linux-6.1-x86_64", "A CPU @ 2.5 GHz", 2),
        reference="transformers 5.23.0 GptOss, float32, eager, one layer at a time",
        target="ort-cpu",
        engine=Engine("onnxruntime", "1.31.1", "CPUExecutionProvider"),
        effort="quick",
        sliding_window=16,
        probes=(ProbeRecord("plain-1", 1, "a" * 64), ProbeRecord("chat-41", 41, "b" * 64)),
        scenarios=tuple(ScenarioResult(name, 3, m) for name, m in metrics.items()),
        gates=GATES["onnx"],
        verdict=judge(metrics, GATES["onnx"]),
        binding=Binding({"model.safetensors": "c" * 64}, {"model.onnx": "d" * 64}),
    )


PASSING = make_report()
FAILING = make_report(kl_mean=2e-9, logit_diff_max=0.5)


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    path = Path(__file__).parents[2] / "docs" / "parity.schema.json"
    document = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


@pytest.mark.parametrize(
    "report",
    [
        PASSING,
        FAILING,
        make_report(positions=0, agreements=0, ties=0, kl_mean=None),
        make_report(**NOT_FINITE.__dict__),
        replace(PASSING, scenarios=(), verdict=judge({}, PASSING.gates)),
    ],
)
def test_any_report_fits_the_schema_and_reads_back(
    report: ParityReport, schema: jsonschema.Draft202012Validator
) -> None:
    data = to_json(report)
    schema.validate(json.loads(data))
    assert from_json(data) == report
    assert to_json(from_json(data)) == data


def test_json_is_canonical() -> None:
    data = to_json(PASSING)
    assert data.isascii()
    assert data.endswith(b"}\n")
    assert b"4.5e-13" in data
    fields = json.loads(data)
    assert list(fields) == sorted(fields)
    shuffled = replace(PASSING, versions=dict(reversed(PASSING.versions.items())))
    assert to_json(shuffled) == data


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(make_report(kl_mean=float("nan")))


def test_the_hash_leaves_out_the_time_and_nothing_else() -> None:
    later = replace(PASSING, created_at="2026-01-02T03:04:05+00:00")
    assert content_sha256(later) == content_sha256(PASSING)
    bound_to_another = replace(PASSING, binding=Binding({}, {"model.onnx": "e" * 64}))
    assert content_sha256(bound_to_another) != content_sha256(PASSING)


def test_the_verdict_can_be_taken_again_from_the_file() -> None:
    stored = from_json(to_json(FAILING))
    metrics = {s.name: s.metrics for s in stored.scenarios}
    assert judge(metrics, stored.gates) == FAILING.verdict
    assert judge(metrics, replace(stored.gates, max_kl_mean=1.0, max_logit_diff=1.0)).passed


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    fields = json.loads(to_json(FAILING))
    edit(fields)
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda r: r.pop("binding"), "binding is missing"),
        (lambda r: r.update(extra=1), "extra is not known"),
        (lambda r: r["machine"].update(hostname="x"), "machine.hostname is not known"),
        (lambda r: r.update(effort="thorough"), "effort"),
        (lambda r: r.update(target=None), "target"),
        (lambda r: r.update(sliding_window=True), "sliding_window"),
        (lambda r: r.update(sliding_window=1.5), "sliding_window"),
        (lambda r: r.update(sliding_window=-1), "sliding_window"),
        (lambda r: r.update(sliding_window=10**30), "sliding_window"),
        (lambda r: r.update(probes={}), "probes"),
        (lambda r: r["probes"].append(3), r"probes\[2\]"),
        (lambda r: r["probes"][0].update(sha256="A" * 64), "sha256"),
        (lambda r: r["binding"]["files"].update(x="../../etc"), "sha256"),
        (lambda r: r["binding"]["files"].update(x=4), "binding.files.x"),
        (lambda r: r["gates"].update(max_kl_mean="1"), "gates.max_kl_mean"),
        (lambda r: r["gates"].update(max_kl_mean=10**400), "gates.max_kl_mean"),
        (lambda r: r["scenarios"][0]["metrics"].update(kl_mean=-1e-12), "negative"),
        (lambda r: r["scenarios"][0]["metrics"].update(positions="69"), "positions"),
    ],
)
def test_what_the_schema_forbids_is_not_read(
    edit: Callable[[dict[str, Any]], object], reason: str, schema: jsonschema.Draft202012Validator
) -> None:
    data = edited(edit)
    with pytest.raises(NotValidatedError, match=reason) as error:
        from_json(data)
    assert error.value.next_step
    if b"0" * 400 not in data:  # JSON itself knows no largest number
        assert not schema.is_valid(json.loads(data))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda r: r["verdict"].update(passed=True), "verdict does not follow"),
        (lambda r: r.update(verdict={"passed": True, "failures": []}), "verdict does not follow"),
        (lambda r: r["gates"].update(max_kl_mean=1.0, max_logit_diff=1.0), "verdict does not follow"),
        (lambda r: r["scenarios"].pop(), "verdict does not follow"),
        (lambda r: r["scenarios"].append(copy.deepcopy(r["scenarios"][0])), "twice"),
        (lambda r: r["scenarios"][0]["metrics"].update(positions=70), "not all positions"),
        (lambda r: r.update(created_at="yesterday"), "isoformat"),
    ],
)
def test_a_report_that_contradicts_itself_is_not_read(edit: Callable[[dict[str, Any]], object], reason: str) -> None:
    with pytest.raises(NotValidatedError, match=reason):
        from_json(edited(edit))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"schema_version": "1"}',
        b'{"schema_version": "2"}',
        b'{"schema_version": "1", "schema_version": "1"}',
        b'{"schema_version": "1", "sliding_window": ' + b"9" * 10_000 + b"}",
        to_json(PASSING)[:-20],
        to_json(PASSING).replace(b"4.5e-13", b"NaN"),
        to_json(PASSING).replace(b"4.5e-13", b"Infinity"),
        to_json(PASSING).replace(b"4.5e-13", b"1e999"),
    ],
)
def test_bytes_that_are_no_report(data: bytes) -> None:
    with pytest.raises(NotValidatedError, match="the parity report cannot be read"):
        from_json(data)


def test_a_later_version_is_named_as_such() -> None:
    with pytest.raises(NotValidatedError, match="schema_version is not '1'"):
        from_json(edited(lambda r: r.update(schema_version="2", more=1)))


def test_both_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    paths = write_report(PASSING, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parity.json", "parity.md"]
    assert paths == (tmp_path / "parity.json", tmp_path / "parity.md")
    assert read_report(tmp_path) == PASSING
    write_report(FAILING, tmp_path)
    assert read_report(tmp_path) == FAILING


def test_a_report_that_was_never_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotValidatedError, match="no parity report"):
        read_report(tmp_path)


def test_a_file_too_large_to_be_a_report_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "parity.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(NotValidatedError, match="too large"):
        read_report(tmp_path)


def test_markdown_says_the_verdict_first() -> None:
    first = to_markdown(PASSING).splitlines()[0]
    assert first.startswith("**PASS**: ort-cpu is the model within its gates, over 414 positions in 6")
    assert "4.5e-13" in first
    first = to_markdown(FAILING).splitlines()[0]
    assert first.startswith("**FAIL**: ort-cpu is not shown to be the model")
    assert "2e-09" in first


def test_markdown_has_every_scenario_gate_and_hash() -> None:
    text = to_markdown(FAILING)
    for piece in (*SCENARIOS, "1e-09", "0.0001", "100 %", "c" * 64, "d" * 64, "a" * 64, "5.23.0"):
        assert piece in text
    assert content_sha256(FAILING) in text
    assert "The sliding window of 16 positions is crossed." in text
    unmeasured = to_markdown(make_report(**NOT_FINITE.__dict__))
    assert "| none | none | none | none | none |" in unmeasured


def test_markdown_says_when_the_window_was_not_crossed() -> None:
    assert "**is not** crossed" in to_markdown(replace(PASSING, sliding_window=41))


def test_markdown_stays_a_ticket_however_much_there_is() -> None:
    many = {f"{i:05}-{'x' * 200}.safetensors": "e" * 64 for i in range(5000)}
    probes = tuple(ProbeRecord("p" * 300, 1, "f" * 64) for _ in range(5000))
    text = to_markdown(replace(PASSING, probes=probes, binding=Binding(many, many)))
    assert len(text) < 65_000
    assert text.startswith("**PASS**")
    assert "and 4940 more in parity.json" in text


def test_names_cannot_break_out_of_the_markdown() -> None:
    evil = "a|b`c\n\n# PASS <img src=x> [l](http://x) \u202e\x1b[31m"
    text = to_markdown(replace(PASSING, target=evil, binding=Binding({evil: "e" * 64}, {})))
    assert "\n# PASS" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<img" not in text.replace("\\<img", "")
    row = next(line for line in text.splitlines() if "e" * 64 in line)
    assert row.replace("\\|", "").count("|") == 3
