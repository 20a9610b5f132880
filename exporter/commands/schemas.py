"""docs/schemas/: a JSON Schema (2020-12) for what each command prints with --json, made of `documents`.

python -m gptoss_export.exporter.commands.schemas docs/schemas
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_export.exporter.artifact import SCHEMA_VERSION as MANIFEST_VERSION
from gptoss_export.exporter.artifact import ParityRecord
from gptoss_export.exporter.commands import documents
from gptoss_export.exporter.commands.failure import Error
from gptoss_export.exporter.commands.plan_document import Planned
from gptoss_export.exporter.commands.settings import SCHEMA_VERSION
from gptoss_export.exporter.origin import Origin
from gptoss_export.exporter.weights import FileRecord
from gptoss_export.validators.diff import Change
from gptoss_export.validators.report.bounds import MOST_ITEMS
from gptoss_export.validators.report.json_schema import DIALECT, Schema, object_schema

DOCUMENTS: Mapping[str, tuple[str, type]] = {
    "export": ("", documents.Results),
    "plan": ("--dry-run", Planned),
    "targets": ("targets", documents.Targets),
    "inspect": ("inspect", documents.ManifestFile),
    "validate": ("validate", documents.Results),
    "verify": ("verify", documents.Verified),
    "sign": ("sign", documents.Signed),
    "report": ("report", documents.Judged),
    "diff": ("diff", documents.Compared),
    "polygraphy-export": ("polygraphy export", documents.Exchanged),
    "polygraphy-import": ("polygraphy import", documents.Imported),
    "synth": ("synth", documents.Synthesized),
}
"""By the name of the schema: the command, and what it prints."""

_SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_TIME: Schema = {"type": "string", "format": "date-time"}
_ANY_NUMBER: Schema = {"type": ["number", "null"]}
_OPTION: Schema = {"type": ["string", "number", "boolean", "null", "array"], "items": {"type": "string"}}
_SPECIAL: Mapping[tuple[type, str], Schema] = {
    **{(kind, "content_sha256"): _SHA256 for _, kind in DOCUMENTS.values()},
    (documents.Result, "content_sha256"): _SHA256,
    (documents.Result, "report_sha256"): {"anyOf": [_SHA256, {"type": "null"}]},
    (documents.Judged, "report_sha256"): _SHA256,
    (documents.JudgedGate, "measured"): _ANY_NUMBER,
    (documents.JudgedGate, "limit"): {"type": "number"},
    (documents.ManifestFile, "schema_version"): {"const": MANIFEST_VERSION},
    (documents.ManifestFile, "created_at"): _TIME,
    (FileRecord, "sha256"): _SHA256,
    (ParityRecord, "report_sha256"): {"anyOf": [_SHA256, {"type": "null"}]},
    (Origin, "options"): {"type": "object", "additionalProperties": _OPTION},
    **{(Change, name): _ANY_NUMBER for name in ("old", "new", "old_share", "new_share")},
    (Error, "kind"): {"type": "string", "pattern": "^[a-z]+(-[a-z]+)*$"},
    (Error, "exit_code"): {"type": "integer", "minimum": 1, "maximum": 125},
}

_FAILED: Schema = {
    "type": "object",
    "description": "A command that ended with an error and has nothing else to say.",
    "properties": {"error": {"$ref": "#/$defs/Error"}, "schema_version": {"const": SCHEMA_VERSION}},
    "required": ["error", "schema_version"],
    "additionalProperties": False,
}


def document_schema(name: str) -> Schema:
    """The schema of one of DOCUMENTS: what the command prints, or its error.

    What is printed has an `error` as well where one came after it, as of a verdict.
    """
    command, kind = DOCUMENTS[name]
    definitions: dict[str, Schema] = {}
    printed = object_schema(kind, definitions, _SPECIAL)
    printed["properties"].setdefault("schema_version", {"const": SCHEMA_VERSION})
    printed["properties"]["error"] = {"$ref": "#/$defs/Error"}
    printed["properties"] = dict(sorted(printed["properties"].items()))
    printed["required"] = sorted({*printed["required"], "schema_version"})
    definitions |= {kind.__name__: printed, **error_definitions()}
    title = " ".join(f"Output of `gptoss-export {command} --json`, version".split())
    version = printed["properties"]["schema_version"]["const"]
    schema = {
        "$schema": DIALECT,
        "title": f"{title} {version}",
        "oneOf": [{"$ref": f"#/$defs/{kind.__name__}"}, {"$ref": "#/$defs/Failed"}],
        "$defs": dict(sorted(definitions.items())),
    }
    _drop_bounds(schema)
    return schema


def error_definitions() -> dict[str, Schema]:
    """What all schemas share, docs/bench.schema.json too."""
    return {"Error": object_schema(Error, {}, _SPECIAL), "Failed": _FAILED}


def schema_text(schema: Schema) -> str:
    """The schema as its file holds it."""
    return json.dumps(schema, indent=2) + "\n"


def _drop_bounds(node: Any) -> None:
    """Without the lengths that a reader of reports bounds its memory by; what is printed has none."""
    if isinstance(node, dict):
        if node.get("maxItems", 0) >= MOST_ITEMS:
            del node["maxItems"], node["minItems"]
        for child in node.values():
            _drop_bounds(child)
    elif isinstance(node, list):
        for child in node:
            _drop_bounds(child)


def write_schemas(folder: Path) -> None:
    """Writes one file for each of DOCUMENTS."""
    for name in DOCUMENTS:
        (folder / f"{name}.schema.json").write_text(schema_text(document_schema(name)), encoding="ascii")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
