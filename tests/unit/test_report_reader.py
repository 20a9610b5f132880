"""parity.json that lies, is broken, or means harm: one error and never a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.report import from_json, to_json
from gptoss_export.validators.report.schema import Engine, ParityReport

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "parity.schema.json"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))


def edited(edit: Edit, report: ParityReport) -> bytes:
    fields = json.loads(to_json(report))
    edit(fields)
    return json.dumps(fields).encode()


NONE_SETTLED = {"positions": 0, "kl_max": None, "logit_diff_max": None}


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
def test_an_engine_ran_or_says_why_not(
    said: dict[str, Any], samples: Any, schema: jsonschema.Draft202012Validator
) -> None:
    with pytest.raises(ValueError, match="executed"):
        Engine("tensorrt_rtx", "1", "NVIDIA GPU", **said)
    data = edited(lambda r: r["engine"].update(said), samples.failing)
    with pytest.raises(NotValidatedError, match="executed"):
        from_json(data)
    assert not schema.is_valid(json.loads(data))


def scenario(r: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = r["evidence"]["scenarios"][0]["metrics"]
    return found


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
        (lambda r: r.update(sliding_window=10**30), "31 digits"),
        (lambda r: r.update(command="gptoss-export"), "command"),
        (lambda r: r.update(command=[1]), r"command\[0\]"),
        (lambda r: r.update(probes={}), "probes"),
        (lambda r: r["probes"].append(3), r"probes\[3\]"),
        (lambda r: r["probes"].extend([r["probes"][0]] * 5000), "5003 items"),
        (lambda r: r["probes"][0].update(sha256="A" * 64), "sha256"),
        (lambda r: r["binding"]["files"].update(x="../../etc"), "sha256"),
        (lambda r: r["binding"]["files"].update(x=4), "binding.files.x"),
        (lambda r: r.pop("verdict"), "verdict is missing"),
        (lambda r: r.update(verdict="passed"), "verdict does not follow"),
        (lambda r: r.update(verdict=None), "verdict does not follow"),
        (lambda r: r.update(verdict=["fail"]), "verdict does not follow"),
        (lambda r: r.update(verdict={"passed": False, "failures": r["failures"]}), "verdict does not follow"),
        (lambda r: r.pop("failures"), "failures is missing"),
        (lambda r: r.update(failures=None), "failures has a value"),
        (lambda r: r["failures"][0].update(kept=False), r"failures\[0\].kept is not known"),
        (lambda r: r["engine"].update(execution="simulated"), "engine.execution"),
        (lambda r: r["engine"].pop("execution"), "engine.execution is missing"),
        (lambda r: r["policy"].update(floor_dtype="int8"), "policy.floor_dtype"),
        (lambda r: r["policy"].update(factor=0.5), "factor"),
        (lambda r: r.update(floors={}), "floors"),
        (lambda r: r.update(floors=[1]), r"floors\[0\] is no object"),
        (lambda r: r["gates"].update(spare_positions=-1), "gates.spare_positions"),
        (lambda r: r["gates"].update(max_kl_mean="1"), "gates.max_kl_mean"),
        (lambda r: r["gates"].update(max_kl_mean=10**400), "401 digits"),
        (lambda r: r["gates"].update(min_top1_agreement=1.5), "gates.min_top1_agreement"),
        (lambda r: r.update(overrides={"max_everything": 1.0}), "there is no gate"),
        (lambda r: r.update(overrides={"max_kl_mean": "0"}), "overrides.max_kl_mean"),
        (lambda r: r.update(overrides={"max_kl_mean": -1}), "overrides.max_kl_mean"),
        (lambda r: scenario(r).update(kl_mean=-1e-12), "kl_mean"),
        (lambda r: scenario(r).update(positions="69"), "positions"),
        (lambda r: scenario(r).update(top5_overlap=1.01), "top5_overlap"),
        (lambda r: scenario(r).update(cosine_min=-1.5), "cosine_min"),
        (lambda r: scenario(r).update(rank_mean=0.5), "rank_mean"),
        (lambda r: scenario(r).update(text_prob_diff_mean=-2), "text_prob_diff_mean"),
        (lambda r: scenario(r)["kl_histogram"].pop(), "73 items"),
        (lambda r: scenario(r).update(kl_histogram=None), "kl_histogram"),
        (lambda r: r["evidence"].update(num_layers=10**12), "num_layers"),
        (lambda r: r["evidence"].update(num_layers=0), "num_layers"),
        (lambda r: r["evidence"]["layers"][0].update(layer=-1), "layer"),
        (lambda r: r["evidence"]["routing"]["layers"][0].update(visits=[]), "visits"),
        (lambda r: r["evidence"]["routing"]["worst"][0].update(kind="guess"), "kind"),
        (lambda r: r["evidence"]["routing"]["worst"][0].update(mass=1.5), "mass"),
        (lambda r: r["evidence"]["consistency"][0].update(name="again"), "name"),
        (lambda r: r["kl_by_position"][0].update(start=list(range(300))), "300 items"),
    ],
)
def test_what_the_schema_forbids_is_not_read(
    edit: Edit, reason: str, samples: Any, schema: jsonschema.Draft202012Validator
) -> None:
    data = edited(edit, samples.failing)
    with pytest.raises(NotValidatedError, match=reason) as error:
        from_json(data)
    assert error.value.next_step
    if b"0" * 400 not in data:  # JSON itself knows no largest number
        assert not schema.is_valid(json.loads(data))


def twice(rows: list[Any]) -> None:
    rows.append(copy.deepcopy(rows[0]))


def layer(r: dict[str, Any], k: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = r["evidence"]["routing"]["layers"][k]
    return found


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda r: r.update(failures=[]), "failures do not follow"),
        (lambda r: r.update(verdict="pass", failures=[]), "failures do not follow"),
        (lambda r: r["gates"].update(max_kl_mean=1.0), "gates do not follow from its table_gates"),
        (lambda r: r.update(overrides={"max_logit_diff": 1.0}), "gates do not follow from its table_gates"),
        (lambda r: r["table_gates"].update(max_kl_mean=1.0), "table_gates do not follow"),
        (lambda r: r.update(verdict="pass"), "verdict does not follow"),
        (lambda r: r.update(verdict="not executed"), "verdict does not follow"),
        (lambda r: r["policy"]["absolute"].update(max_kl_mean=1e-8), "gates do not follow"),
        (lambda r: r["policy"].update(floor_dtype="float16"), "another noise floor than that of ort-cpu"),
        (lambda r: r["policy"]["absolute"].update(max_text_kl_mean=1e300), "looser than the gates of ort-cpu: max_t"),
        (lambda r: r["policy"]["absolute"].update(min_top1_agreement=0.0), "looser than the gates of ort-cpu: min_t"),
        (lambda r: r["policy"]["absolute"].update(by_hand=["max_kl_mean"]), "limits set by hand, among its absolute"),
        (lambda r: r["probes"][0].update(tokens=2**62), "tokens has a value that cannot be"),
        (lambda r: r["evidence"]["texts"].update(margins=[0.5] * 9), "9 other best tokens, and all scenarios"),
        (lambda r: [s.update(settled=NONE_SETTLED) for s in r["evidence"]["scenarios"]], "67 settled positions, and"),
        (lambda r: r["evidence"]["scenarios"].pop(), "failures do not follow"),
        (lambda r: r["evidence"]["layers"].pop(), "failures do not follow"),
        (lambda r: r["evidence"]["consistency"].pop(), "failures do not follow"),
        (lambda r: r["evidence"].update(routing=None), "failures do not follow"),
        (lambda r: r["evidence"].update(num_layers=3), "failures do not follow"),
        (lambda r: twice(r["evidence"]["scenarios"]), "a scenario is there twice"),
        (lambda r: twice(r["evidence"]["layers"]), "a layer is there twice"),
        (lambda r: twice(r["evidence"]["ranges"]), "range of a layer is there twice"),
        (lambda r: twice(r["evidence"]["routing"]["layers"]), "routing of a layer is there twice"),
        (lambda r: twice(r["probes"]), "a probe is there twice"),
        (lambda r: twice(r["kl_by_position"]), "is there twice"),
        (lambda r: scenario(r).update(positions=70), "not all positions"),
        (lambda r: scenario(r)["kl_histogram"].__setitem__(0, 1), "histogram"),
        (lambda r: scenario(r).update(non_finite=1), "not finite"),
        (lambda r: scenario(r).update(kl_mean=None), "a figure is missing"),
        (lambda r: scenario(r).update(kl_max=1e-14), "beyond the largest"),
        (lambda r: scenario(r).update(kl_max=1.0), "not where the histogram ends"),
        (lambda r: scenario(r).update(logit_diff_mean=1.0), "beyond the largest"),
        (lambda r: scenario(r).update(text_positions=70), "more positions with a text"),
        (lambda r: scenario(r).update(text_positions=0), "of no text"),
        (lambda r: layer(r).update(same_set=69), "not all tokens"),
        (lambda r: layer(r).update(ties=0, near_ties=2), "not all tokens"),
        (lambda r: layer(r).update(same_order=69), "not all tokens"),
        (lambda r: layer(r).update(margin_max=None), "of flips is missing"),
        (lambda r: layer(r).update(visits=[69, 69, 1, 0]), "visits"),
        (lambda r: layer(r).update(visits=[70, 68, 0, 0]), "visits"),
        (lambda r: layer(r).update(visits=[69, 0, 0, 0]), "different numbers of experts"),
        (lambda r: layer(r).update(visits=[69, 69, 0, 0, 0]), "different numbers of experts"),
        (lambda r: layer(r).update(layer=2), "there are 2"),
        (lambda r: r["evidence"]["layers"][1].update(layer=7), "there are 2"),
        (lambda r: r["evidence"]["layers"][1].update(flipped=70), "more tokens"),
        (lambda r: r["evidence"]["ranges"][0].update(layer=9), "there are 2"),
        (lambda r: r["evidence"]["ranges"][0].update(type="int4"), "a type of its own"),
        (lambda r: r["evidence"]["ranges"][0].update(headroom_bits=200.0), "headroom"),
        (lambda r: r["evidence"]["routing"]["worst"][0].update(taken=4), "expert that is not there"),
        (lambda r: r["evidence"]["routing"]["worst"][0].update(layer=5), "expert that is not there"),
        (lambda r: r["evidence"]["routing"]["worst"][0].update(probe=3), "position"),
        (lambda r: r["evidence"]["routing"]["worst"][0].update(position=27), "position"),
        (lambda r: r["evidence"]["routing"]["worst"][0].update(kind="divergence"), "more flips of kind"),
        (lambda r: r["evidence"]["consistency"][3].update(logit_diff_max=1.0), "same in every bit"),
        (lambda r: r["worst"][0].update(position=41), "worst positions"),
        (lambda r: r["worst"][0].update(probe="other"), "worst positions"),
        (lambda r: r["worst"][0].update(scenario="other"), "worst positions"),
        (lambda r: r["kl_by_position"][0].update(stop=[1, 42]), "not there"),
        (lambda r: r["kl_by_position"][0].update(stop=[2, 41]), "out of order"),
        (lambda r: r["kl_by_position"][0].update(stop=[1]), "different lengths"),
        (lambda r: r["kl_by_position"][0].update(mean=[1.0, 1.0]), "beyond the largest"),
        (lambda r: r["bisection"]["findings"][0].update(layer=2), "there are 2"),
        (lambda r: r.update(created_at="yesterday"), "isoformat"),
    ],
)
def test_a_report_that_contradicts_itself_is_not_read(edit: Edit, reason: str, samples: Any) -> None:
    with pytest.raises(NotValidatedError, match=reason):
        from_json(edited(edit, samples.failing))


def floor(r: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = r["floors"][0]
    return found


def loosen(r: dict[str, Any]) -> None:
    """Gates and verdict agree, and the floor does not."""
    r["gates"]["max_layer_error"] = r["table_gates"]["max_layer_error"] = 9.0
    r.update(verdict="not executed", failures=[])


def claim_execution(r: dict[str, Any]) -> None:
    r["engine"].update(execution="executed", not_executed_reason=None, ran_instead=None)


def with_no_floor_to_speak_of(r: dict[str, Any]) -> None:
    floor(r)["metrics"].update(agreements=28, disagreements=40)


@pytest.mark.parametrize(
    ("kind", "edit", "reason"),
    [
        ("failing_graph", loosen, "table_gates do not follow"),
        ("not_executed", with_no_floor_to_speak_of, "too far from the model"),
        ("not_executed", lambda r: floor(r).update(dtype="bfloat16"), "need one of float16, and none"),
        ("not_executed", lambda r: r.update(floors=[]), "need one of float16, and none"),
        ("not_executed", lambda r: twice(r["floors"]), "noise floor is there twice"),
        ("not_executed", lambda r: floor(r)["metrics"].update(positions=68, agreements=66), "noise floor"),
        ("not_executed", lambda r: floor(r)["metrics"].update(agreements=42), "not all positions"),
        ("not_executed", lambda r: floor(r).update(token_layers=139), "tokens x layers"),
        ("not_executed", lambda r: floor(r).update(diverged=139), "tokens x layers"),
        ("not_executed", lambda r: r["policy"].update(factor=4.0), "or by more of it"),
        ("not_executed", lambda r: r.update(verdict="pass"), "verdict does not follow"),
        ("not_executed", claim_execution, "verdict does not follow"),
    ],
)
def test_a_report_whose_floor_or_execution_contradicts_it_is_not_read(
    kind: str, edit: Edit, reason: str, samples: Any
) -> None:
    with pytest.raises(NotValidatedError, match=reason):
        from_json(edited(edit, getattr(samples, kind)))


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
        b'{"schema_version": "5"}',
        b'{"schema_version": "5", "verdict": "pass"}',
        b'{"schema_version": "5", "schema_version": "3"}',
        b'{"schema_version": "5", "verdict": "fail", "failures": [], "sliding_window": ' + b"9" * 10_000 + b"}",
        b'{"schema_version": "5", "verdict": "fail", "failures": [], "\\ud800": 1}',
    ],
)
def test_bytes_that_are_no_report(data: bytes) -> None:
    with pytest.raises(NotValidatedError, match="the parity report cannot be read") as error:
        from_json(data)
    assert error.value.what.isascii()


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"[]", b'"1"'])
def test_a_figure_that_is_no_number(value: bytes, samples: Any) -> None:
    data = to_json(samples.passing)
    assert b'"logit_diff_max": 7.6e-06' in data
    with pytest.raises(NotValidatedError, match="the parity report cannot be read"):
        from_json(data.replace(b'"logit_diff_max": 7.6e-06', b'"logit_diff_max": ' + value))


@pytest.mark.parametrize("version", ["1", "4", "6", 5, None])
def test_another_version_is_named_as_such(version: object, samples: Any) -> None:
    with pytest.raises(NotValidatedError, match="schema_version is not '5'"):
        from_json(edited(lambda r: r.update(schema_version=version, more=1), samples.passing))


ODD = st.sampled_from(
    [None, True, -1, 0, 1, 2**63, 10**400, -0.5, 1e308, 5e-324, "", "\ud800", "NaN", [], {}, [[]], {"a": [None]}]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_is_refused_or_read_back_alike(data: st.DataObject, samples: Any) -> None:
    """Walks to any place in the document and puts anything there."""
    fields = json.loads(to_json(samples.failing))
    node: Any = fields
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(list(keys)))
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.integers(0, 9)) == 0:
            break
        node = node[key]
    node[key] = data.draw(ODD)
    try:
        report = from_json(json.dumps(fields))
    except NotValidatedError as error:
        assert "\n" not in error.what
        return
    assert from_json(to_json(report)) == report
