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
from gptoss_export.validators.floor import FloorRecord
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
FLOOR = FloorRecord("float16", Metrics(42, 41, 0, 1, 2e-4, 5e-3, 1e-2, 6e-3, 0.25, 0))
GRAPH_ONLY = Engine(
    "tensorrt_rtx",
    "1.7.1.116",
    "NVIDIA GPU",
    execution="graph only",
    not_executed_reason="no NVIDIA driver on this host",
    ran_instead="onnxruntime 1.31.1, CPUExecutionProvider",
)
NOT_FINITE = Metrics(3, 0, 0, 3, None, None, None, None, None, 6144)


def make_report(**decode: Any) -> ParityReport:
    """A report in which `decode` has its metrics changed."""
    metrics = dict.fromkeys(SCENARIOS, GOOD) | {"decode": replace(GOOD, **decode)}
    return ParityReport(
        schema_version="2",
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
        policy=GATES["onnx"],
        floor=None,
        gates=GATES["onnx"].absolute,
        verdict=judge(metrics, GATES["onnx"].absolute),
        binding=Binding({"model.safetensors": "c" * 64}, {"model.onnx": "d" * 64}),
    )


def of_tensorrt(report: ParityReport) -> ParityReport:
    """The same metrics as of an engine in float16 of which only the graph was run."""
    gates = GATES["trt-fp16"].resolve(FLOOR)
    verdict = judge({s.name: s.metrics for s in report.scenarios}, gates)
    changes = {"target": "trt-fp16", "policy": GATES["trt-fp16"], "floor": FLOOR, "gates": gates, "verdict": verdict}
    return replace(report, engine=GRAPH_ONLY, **changes)


PASSING = make_report()
FAILING = make_report(kl_mean=2e-9, logit_diff_max=0.5)
NOT_EXECUTED = of_tensorrt(PASSING)
FAILING_GRAPH = of_tensorrt(make_report(kl_mean=2.0))


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
        NOT_EXECUTED,
        FAILING_GRAPH,
        replace(NOT_EXECUTED, engine=PASSING.engine),
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


@pytest.mark.parametrize(
    ("report", "outcome"),
    [
        (PASSING, "pass"),
        (FAILING, "fail"),
        (NOT_EXECUTED, "not executed"),
        (FAILING_GRAPH, "fail"),
        (replace(NOT_EXECUTED, engine=PASSING.engine), "pass"),
    ],
)
def test_a_graph_that_passes_is_no_engine_that_passes(report: ParityReport, outcome: str) -> None:
    assert report.outcome == outcome
    assert json.loads(to_json(report))["outcome"] == outcome


@pytest.mark.parametrize(
    "said",
    [
        {"not_executed_reason": "no GPU"},
        {"ran_instead": "onnxruntime"},
        {"execution": "graph only"},
        {"execution": "graph only", "not_executed_reason": "no GPU"},
        {"execution": "graph only", "ran_instead": "onnxruntime"},
        {"execution": "graph only", "not_executed_reason": " ", "ran_instead": "onnxruntime"},
    ],
)
def test_an_engine_ran_or_says_why_not(said: dict[str, Any], schema: jsonschema.Draft202012Validator) -> None:
    with pytest.raises(ValueError, match="executed"):
        Engine("tensorrt_rtx", "1", "NVIDIA GPU", **said)
    data = edited(lambda r: r["engine"].update(said))
    with pytest.raises(NotValidatedError, match="executed"):
        from_json(data)
    assert not schema.is_valid(json.loads(data))


def test_the_gates_can_be_taken_again_from_the_stored_floor() -> None:
    stored = from_json(to_json(NOT_EXECUTED))
    assert stored.policy.resolve(stored.floor) == stored.gates
    tighter = replace(stored.policy, factor=1.0).resolve(stored.floor)
    assert tighter.max_kl_mean == 2e-4
    assert judge({s.name: s.metrics for s in stored.scenarios}, tighter).passed


def edited(edit: Callable[[dict[str, Any]], object], report: ParityReport = FAILING) -> bytes:
    fields = json.loads(to_json(report))
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
        (lambda r: r.pop("outcome"), "outcome is missing"),
        (lambda r: r.update(outcome="passed"), "outcome does not follow"),
        (lambda r: r.update(outcome=None), "outcome does not follow"),
        (lambda r: r.update(outcome=["fail"]), "outcome does not follow"),
        (lambda r: r["engine"].update(execution="simulated"), "engine.execution"),
        (lambda r: r["engine"].pop("execution"), "engine.execution is missing"),
        (lambda r: r["policy"].update(floor_dtype="int8"), "policy.floor_dtype"),
        (lambda r: r["policy"].update(factor=0.5), "factor"),
        (lambda r: r.update(floor={}), "floor"),
        (lambda r: r.update(floor={"dtype": "float32", "metrics": r["scenarios"][0]["metrics"]}), "floor.dtype"),
        (lambda r: r["gates"].update(spare_positions=-1), "gates.spare_positions"),
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
        (lambda r: r.update(outcome="pass"), "outcome does not follow"),
        (lambda r: r.update(outcome="not executed"), "outcome does not follow"),
        (lambda r: r["policy"]["absolute"].update(max_kl_mean=1e-8), "gates do not follow"),
        (lambda r: r["policy"].update(floor_dtype="float16"), "need one of float16, and none"),
        (lambda r: r["scenarios"].pop(), "verdict does not follow"),
        (lambda r: r["scenarios"].append(copy.deepcopy(r["scenarios"][0])), "twice"),
        (lambda r: r["scenarios"][0]["metrics"].update(positions=70), "not all positions"),
        (lambda r: r.update(created_at="yesterday"), "isoformat"),
    ],
)
def test_a_report_that_contradicts_itself_is_not_read(edit: Callable[[dict[str, Any]], object], reason: str) -> None:
    with pytest.raises(NotValidatedError, match=reason):
        from_json(edited(edit))


def loosen(r: dict[str, Any]) -> None:
    """Gates and verdict agree, and the floor does not."""
    r["gates"]["max_kl_mean"] = 9.0
    r.update(verdict={"passed": True, "failures": []}, outcome="not executed")


def loosen_with_its_floor(r: dict[str, Any]) -> None:
    loosen(r)
    r["floor"]["metrics"].update(kl_mean=3.0)


def claim_execution(r: dict[str, Any]) -> None:
    r["engine"].update(execution="executed", not_executed_reason=None, ran_instead=None)


@pytest.mark.parametrize(
    ("report", "edit", "reason"),
    [
        (FAILING_GRAPH, loosen, "gates do not follow"),
        (FAILING_GRAPH, loosen_with_its_floor, "too far from the model"),
        (NOT_EXECUTED, lambda r: r["floor"].update(dtype="bfloat16"), "need one of float16, and one of bfloat16"),
        (NOT_EXECUTED, lambda r: r.update(floor=None), "need one of float16, and none"),
        (NOT_EXECUTED, lambda r: r["floor"]["metrics"].update(non_finite=1), "not finite"),
        (NOT_EXECUTED, lambda r: r["floor"]["metrics"].update(kl_mean=None), "no position"),
        (NOT_EXECUTED, lambda r: r["floor"]["metrics"].update(kl_mean=-1.0), "negative"),
        (NOT_EXECUTED, lambda r: r["floor"]["metrics"].update(positions=41, agreements=40), "other positions"),
        (NOT_EXECUTED, lambda r: r["floor"]["metrics"].update(agreements=42), "not all positions"),
        (NOT_EXECUTED, lambda r: r["policy"].update(factor=4.0), "gates do not follow"),
        (NOT_EXECUTED, lambda r: r.update(outcome="pass"), "outcome does not follow"),
        (NOT_EXECUTED, claim_execution, "outcome does not follow"),
    ],
)
def test_a_report_whose_floor_or_execution_contradicts_it_is_not_read(
    report: ParityReport, edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    with pytest.raises(NotValidatedError, match=reason):
        from_json(edited(edit, report))


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
        b'{"schema_version": "2"}',
        b'{"schema_version": "3"}',
        b'{"schema_version": "2", "outcome": "pass"}',
        b'{"schema_version": "2", "schema_version": "2"}',
        b'{"schema_version": "2", "outcome": "pass", "sliding_window": ' + b"9" * 10_000 + b"}",
        to_json(PASSING)[:-20],
        to_json(PASSING).replace(b"4.5e-13", b"NaN"),
        to_json(PASSING).replace(b"4.5e-13", b"Infinity"),
        to_json(PASSING).replace(b"4.5e-13", b"1e999"),
    ],
)
def test_bytes_that_are_no_report(data: bytes) -> None:
    with pytest.raises(NotValidatedError, match="the parity report cannot be read"):
        from_json(data)


@pytest.mark.parametrize("version", ["1", "3", 2, None])
def test_another_version_is_named_as_such(version: object) -> None:
    with pytest.raises(NotValidatedError, match="schema_version is not '2'"):
        from_json(edited(lambda r: r.update(schema_version=version, more=1)))


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


def test_markdown_never_calls_an_engine_that_was_not_run_the_model() -> None:
    assert to_markdown(NOT_EXECUTED).splitlines()[0] == (
        "**NOT EXECUTED**: the graph passes (graph parity), the engine was not run: no NVIDIA driver on this host. "
        "Run `gptoss-export validate <folder>` on a host with an NVIDIA GPU. The graph of trt-fp16 keeps its gates, "
        "over 414 positions in 6 scenarios (worst mean KL 4.5e-13, worst logit difference 7.6e-06)."
    )
    assert "PASS" not in to_markdown(NOT_EXECUTED)
    assert "is the model" not in to_markdown(NOT_EXECUTED)
    assert to_markdown(FAILING_GRAPH).splitlines()[0] == (
        "**FAIL**: trt-fp16 is not shown to be the model, over 414 positions: 1 gates not kept in 1 scenarios, first "
        "max\\_kl\\_mean in decode (2, limit 0.00103). Only the graph was run, by onnxruntime 1.31.1, "
        "CPUExecutionProvider; the engine was not: no NVIDIA driver on this host."
    )
    for report in (NOT_EXECUTED, FAILING_GRAPH):
        assert "| execution | graph only, by onnxruntime 1.31.1, CPUExecutionProvider |" in to_markdown(report)
    assert "| execution | executed |" in to_markdown(PASSING)


def test_a_reason_cannot_break_the_verdict_line() -> None:
    reason = "no GPU.\n\n**PASS**: `x` | " + "y" * 9000
    first = to_markdown(replace(NOT_EXECUTED, engine=replace(GRAPH_ONLY, not_executed_reason=reason))).splitlines()[0]
    assert first.startswith("**NOT EXECUTED**: ")
    assert "**PASS**" not in first.replace("\\*", "")
    assert len(first) < 900


def test_markdown_says_where_a_limit_comes_from() -> None:
    text = to_markdown(NOT_EXECUTED)
    assert "| mean KL, at most | 0.0006, and 0.03 / positions for 1 of them | 3 x the noise floor |" in text
    assert "| logit difference, at most | 0.75 | 3 x the noise floor |" in text
    assert (
        "| top-1 agreement, ties aside, at least | 86.36 %, or all but 1 of a scenario's | 3 x the noise floor |"
        in text
    )
    assert "## Noise floor\n\nWhat rounding costs: transformers itself in float16 against" in text
    assert "| 42 | 0.0002 | 0.005 | 0.01 | 0.006 | 0.25 | 41 | 0 | 1 | 0 |" in text
    text = to_markdown(PASSING)
    assert "| mean KL, at most | 1e-09 | absolute |" in text
    assert "oise floor" not in text


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
