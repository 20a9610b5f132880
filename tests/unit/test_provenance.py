"""The provenance, by a schema written after the specifications and by what it has to say."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, replace
from typing import Any

import jsonschema
import pytest

from gptoss_export.exporter.artifact import PROVENANCE_NAME, RECORD_NAMES, REPORT_NAMES
from gptoss_export.exporter.origin import ModelName, Origin
from gptoss_export.exporter.trust.provenance import make_provenance


def strict(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": sorted(required),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "minLength": 1}
# RFC 3986, as far as a type or an identity needs it: a scheme and something after it.
URI = {"type": "string", "pattern": r"^[a-zA-Z][a-zA-Z0-9+.-]*:[^\s]+$"}
TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"}
DIGEST = strict({"sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"}})
# in-toto attestation framework, spec/v1/resource_descriptor.md
RESOURCE = strict(
    {},
    {
        "name": TEXT,
        "uri": URI,
        "digest": DIGEST,
        "content": {"type": "string", "pattern": "^[A-Za-z0-9+/]+={0,2}$"},
        "downloadLocation": URI,
        "mediaType": {"type": "string", "pattern": "^[a-z]+/[a-z0-9.+-]+$"},
        "annotations": {"type": "object"},
    },
) | {"anyOf": [{"required": [name]} for name in ("uri", "digest", "content")]}
# in-toto attestation framework, spec/v1/statement.md, and https://slsa.dev/provenance/v1
SCHEMA = strict(
    {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": RESOURCE | {"required": ["name", "digest"]},
        },
        "predicateType": {"const": "https://slsa.dev/provenance/v1"},
        "predicate": strict(
            {
                "buildDefinition": strict(
                    {"buildType": URI, "externalParameters": {"type": "object", "minProperties": 1}},
                    {
                        "internalParameters": {"type": "object"},
                        "resolvedDependencies": {"type": "array", "items": RESOURCE, "uniqueItems": True},
                    },
                ),
                "runDetails": strict(
                    {
                        "builder": strict(
                            {"id": URI},
                            {
                                "version": {"type": "object", "additionalProperties": TEXT},
                                "builderDependencies": {"type": "array", "items": RESOURCE},
                            },
                        )
                    },
                    {
                        "metadata": strict({}, {"invocationId": TEXT, "startedOn": TIME, "finishedOn": TIME}),
                        "byproducts": {"type": "array", "items": RESOURCE},
                    },
                ),
            }
        ),
    }
)


def statement_of(delivered: Any) -> dict[str, Any]:
    return json.loads((delivered.folder / PROVENANCE_NAME).read_bytes())


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_it_keeps_the_schema(delivered: Any, unvalidated: Any) -> None:
    for artifact in (delivered, unvalidated):
        jsonschema.Draft202012Validator(SCHEMA).validate(statement_of(artifact))
    in_folder = replace(delivered.manifest, origin=Origin())
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(make_provenance(in_folder)))


@pytest.mark.parametrize("path", ["predicateType", "subject", "predicate", "_type"])
def test_the_schema_misses_what_is_missing(path: str, delivered: Any) -> None:
    statement = statement_of(delivered)
    del statement[path]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(statement)


def test_another_reader_of_in_toto_takes_it(delivered: Any) -> None:
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

    message = json_format.Parse((delivered.folder / PROVENANCE_NAME).read_bytes(), StatementMessage())
    Statement.copy_from_pb(message).validate()
    assert len(message.subject) == len(delivered.manifest.files) - len(RECORD_NAMES)


def test_subjects_dependencies_and_parameters(delivered: Any) -> None:
    statement, manifest = statement_of(delivered), delivered.manifest
    subjects = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    assert subjects == {k: v.sha256 for k, v in manifest.files.items() if k not in RECORD_NAMES}
    definition = statement["predicate"]["buildDefinition"]
    needed = {entry["name"]: entry["digest"]["sha256"] for entry in definition["resolvedDependencies"]}
    assert needed == {name: record.sha256 for name, record in manifest.checkpoint.items()}
    revision = manifest.origin.model.revision
    assert {entry["uri"] for entry in definition["resolvedDependencies"]} == {
        f"pkg:huggingface/openai/gpt-oss-20b@{revision}#{name}" for name in needed
    }
    assert definition["externalParameters"] == {
        "model": {
            "name": None,
            "repository": "openai/gpt-oss-20b",
            "revision": revision,
            "subfolder": None,
            "labels": {},
        },
        "options": {"parity": "quick"},
    }
    assert definition["internalParameters"]["versions"] == manifest.versions
    details = statement["predicate"]["runDetails"]
    assert details["metadata"] == {"finishedOn": manifest.created_at.replace("+00:00", "Z")}


def test_a_folder_is_named_by_its_hashes_alone(delivered: Any) -> None:
    statement = json.loads(make_provenance(replace(delivered.manifest, origin=Origin())))
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["model"] == asdict(ModelName())
    assert all("uri" not in entry for entry in definition["resolvedDependencies"])
    assert str(delivered.folder) not in json.dumps(statement)


def test_the_verdict_is_a_by_product(delivered: Any, unvalidated: Any) -> None:
    verdict, *files = statement_of(delivered)["predicate"]["runDetails"]["byproducts"]
    said = json.loads(base64.b64decode(verdict["content"]))
    parity = delivered.manifest.parity
    assert said == verdict["annotations"]
    assert (said["verdict"], said["effort"], said["report_sha256"]) == ("pass", "quick", parity.report_sha256)
    assert said["loosened"] == []
    assert [entry["name"] for entry in files] == list(REPORT_NAMES)
    assert files[0]["digest"]["sha256"] == delivered.manifest.files["parity.json"].sha256
    (alone,) = statement_of(unvalidated)["predicate"]["runDetails"]["byproducts"]
    assert alone["annotations"]["verdict"] == "not validated"
