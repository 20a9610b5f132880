"""parity.json: canonical, readable back, bound, fit for its schema, and written whole."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.gates import override
from gptoss_export.validators.report import NAMES, content_sha256, from_json, read_report, to_json, write_report
from gptoss_export.validators.report.again import judged_again
from gptoss_export.validators.report.json_schema import parity_schema_text
from gptoss_export.validators.report.schema import Binding
from gptoss_export.validators.verdict import judge

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "parity.schema.json"
KINDS = (
    "passing",
    "failing",
    "not_executed",
    "failing_graph",
    "loosened",
    "executed_in_16_bits",
    "not_finite",
    "not_measured",
    "largest",
)


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    document = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


@pytest.mark.parametrize("kind", KINDS)
def test_any_report_fits_the_schema_and_reads_back(
    kind: str, samples: Any, schema: jsonschema.Draft202012Validator
) -> None:
    report = getattr(samples, kind)
    data = to_json(report)
    schema.validate(json.loads(data))
    assert from_json(data) == report
    assert to_json(from_json(data)) == data


def test_every_sample_is_tested(samples: Any) -> None:
    assert set(KINDS) == {field.name for field in dataclasses.fields(samples)}


def test_the_published_schema_is_that_of_the_code() -> None:
    assert SCHEMA_FILE.read_text() == parity_schema_text()


def test_the_schema_lets_no_field_be_left_out_or_added() -> None:
    def walk(node: object) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and "required" in node:
                assert sorted(node["properties"]) == node["required"]
                assert node["additionalProperties"] is False
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json.loads(SCHEMA_FILE.read_text()))


def test_json_is_canonical(samples: Any) -> None:
    report = samples.passing
    data = to_json(report)
    assert data.isascii()
    assert data.endswith(b"}\n")
    fields = json.loads(data)
    assert list(fields) == sorted(fields)
    assert to_json(replace(report, versions=dict(reversed(report.versions.items())))) == data


def test_nan_is_never_written(samples: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(replace(samples.passing, overrides={"max_kl_mean": float("nan")}))


def test_the_hash_leaves_out_the_time_and_nothing_else(samples: Any) -> None:
    report = samples.passing
    assert content_sha256(replace(report, created_at="2026-01-02T03:04:05+00:00")) == content_sha256(report)
    assert content_sha256(replace(report, binding=Binding({}, {"model.onnx": "e" * 64}))) != content_sha256(report)
    assert content_sha256(replace(report, command=("other",))) != content_sha256(report)


def test_the_verdict_can_be_taken_again_from_the_file(samples: Any) -> None:
    stored = from_json(to_json(samples.failing))
    assert judge(stored.evidence, stored.gates) == samples.failing.verdict
    again = judged_again(stored, {"max_logit_diff": 6.0, "max_layer_error": 1.0})
    assert again.outcome == "pass"
    assert again.loosened == ("max_logit_diff", "max_layer_error")
    assert from_json(to_json(again)) == again
    assert judged_again(again, {"max_logit_diff": 0.1}).overrides == {"max_logit_diff": 0.1, "max_layer_error": 1.0}


def test_the_gates_can_be_taken_again_from_the_stored_floor(samples: Any) -> None:
    stored = from_json(to_json(samples.not_executed))
    assert stored.policy.resolve(stored.floor) == stored.table_gates == stored.gates
    assert replace(stored.policy, factor=1.0).resolve(stored.floor).max_kl_mean < stored.gates.max_kl_mean


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("passing", "pass"),
        ("failing", "fail"),
        ("not_executed", "not executed"),
        ("failing_graph", "fail"),
        ("executed_in_16_bits", "pass"),
        ("not_measured", "fail"),
    ],
)
def test_a_graph_that_passes_is_no_engine_that_passes(kind: str, outcome: str, samples: Any) -> None:
    report = getattr(samples, kind)
    assert report.outcome == outcome
    assert json.loads(to_json(report))["verdict"] == outcome


def test_all_files_are_written_and_nothing_else(tmp_path: Path, samples: Any) -> None:
    paths = write_report(samples.passing, tmp_path)
    assert paths == tuple(tmp_path / name for name in NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(NAMES)
    assert read_report(tmp_path) == samples.passing == read_report(tmp_path / "parity.json")
    write_report(samples.failing, tmp_path)
    assert read_report(tmp_path) == samples.failing


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, samples: Any) -> None:
    write_report(samples.passing, tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(replace(samples.failing, overrides={"max_kl_mean": float("nan")}), tmp_path)
    (tmp_path / "junit.xml").unlink()
    (tmp_path / "junit.xml").mkdir()
    with pytest.raises(OSError, match="junit"):
        write_report(samples.failing, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(NAMES)


def test_a_report_that_was_never_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotValidatedError, match="no parity report"):
        read_report(tmp_path)
    with pytest.raises(NotValidatedError, match="no parity report"):
        read_report(tmp_path / "parity.json")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "parity.json")
    with pytest.raises(NotValidatedError, match="FIFO"):
        read_report(tmp_path)


def test_a_file_too_large_to_be_a_report_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "parity.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(NotValidatedError, match="too large"):
        read_report(tmp_path)


def test_overrides_are_those_of_the_gates(samples: Any) -> None:
    report = samples.loosened
    assert report.gates == override(report.table_gates, report.overrides)
    assert report.loosened == ("max_logit_diff", "max_layer_error")
    assert samples.passing.loosened == ()
