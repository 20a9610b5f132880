"""docs/parity.schema.json, made of the dataclasses, so that it cannot say anything else than they do.

python -m gptoss_export.validators.report.json_schema > docs/parity.schema.json
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gptoss_export.exporter.origin import COMMIT, LABEL_KEY, LONGEST_TEXT, MOST_LABELS, REPOSITORY, ModelName
from gptoss_export.validators.gates import GATE_NAMES, GatePolicy, override
from gptoss_export.validators.report.bounds import LARGEST_FLOAT, item_bounds, number_bounds
from gptoss_export.validators.report.schema import SCHEMA_VERSION, Binding, Outcome, ParityReport, ProbeRecord

Schema = dict[str, Any]


def _pattern(form: re.Pattern[str]) -> Schema:
    return {"type": "string", "pattern": f"^{form.pattern}$"}


_SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
# One line; that it is printable, which no pattern says, the reader checks.
_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": LONGEST_TEXT, "pattern": "^\\S(.*\\S)?$"}
_SPECIAL: Mapping[tuple[type, str], Schema] = {
    (ParityReport, "schema_version"): {"const": SCHEMA_VERSION},
    (ParityReport, "created_at"): {"type": "string", "format": "date-time"},
    (ParityReport, "overrides"): {
        "type": "object",
        "properties": {name: {"type": "number", "minimum": 0} for name in GATE_NAMES},
        "additionalProperties": False,
        "description": " ".join((override.__doc__ or "").split()),
    },
    (ProbeRecord, "sha256"): _SHA256,
    (Binding, "checkpoint"): {"type": "object", "additionalProperties": _SHA256},
    (Binding, "files"): {"type": "object", "additionalProperties": _SHA256},
    (ModelName, "name"): {"anyOf": [_TEXT, {"type": "null"}]},
    (ModelName, "repository"): {"anyOf": [_pattern(REPOSITORY), {"type": "null"}]},
    (ModelName, "revision"): {"anyOf": [_pattern(COMMIT), {"type": "null"}]},
    (ModelName, "labels"): {
        "type": "object",
        "propertyNames": _pattern(LABEL_KEY),
        "additionalProperties": _TEXT,
        "maxProperties": MOST_LABELS,
    },
    (GatePolicy, "factor"): {"type": "number", "minimum": 1},
}


def parity_schema() -> Schema:
    """The JSON Schema (2020-12) of parity.json: every field required, none beyond."""
    definitions: dict[str, Schema] = {}
    schema = _object(ParityReport, definitions)
    schema["properties"]["outcome"] = {"enum": list(get_args(Outcome)), "description": _doc(ParityReport.outcome)}
    schema["required"] = sorted(schema["properties"])
    definitions["Engine"] |= _engine_rule()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"parity.json of gptoss-export, version {SCHEMA_VERSION}",
        **schema,
        "$defs": dict(sorted(definitions.items())),
    }


def parity_schema_text() -> str:
    """The schema as docs/parity.schema.json holds it."""
    return json.dumps(parity_schema(), indent=2) + "\n"


def _object(kind: type, definitions: dict[str, Schema]) -> Schema:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    properties = {
        name: _SPECIAL.get((kind, name)) or _field(kind, name, hints[name], definitions) for name in sorted(names)
    }
    return {
        "type": "object",
        "description": _doc(kind),
        "properties": properties,
        "required": sorted(names),
        "additionalProperties": False,
    }


def _field(kind: type, name: str, hint: Any, definitions: dict[str, Schema]) -> Schema:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_field(kind, name, args[0], definitions), {"type": "null"}]}
    if origin is tuple:
        fewest, most = item_bounds(kind, name)
        items = _field(kind, name, args[0], definitions)
        return {"type": "array", "items": items, "minItems": fewest, "maxItems": most}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _field(kind, name, args[1], definitions)}
    if hint in (int, float):
        low, high = number_bounds(kind, name, hint)
        limits = {"minimum": low} if low > -LARGEST_FLOAT else {}
        limits |= {"maximum": high} if high < LARGEST_FLOAT else {}
        return {"type": "integer" if hint is int else "number", **limits}
    return {"type": {str: "string", bool: "boolean"}[hint]}


def _engine_rule() -> Schema:
    """What Engine.__post_init__ holds."""
    names = ("not_executed_reason", "ran_instead")
    return {
        "if": {"properties": {"execution": {"const": "executed"}}},
        "then": {"properties": {name: {"type": "null"} for name in names}},
        "else": {"properties": {name: {"type": "string", "pattern": "\\S"} for name in names}},
    }


def _doc(of: object) -> str:
    return " ".join((of.__doc__ or "").split())


if __name__ == "__main__":
    print(parity_schema_text(), end="")
