"""JSON Schemas made of dataclasses, so that they cannot say anything else than these do; first docs/parity.schema.json.

python -m gptoss_export.validators.report.json_schema > docs/parity.schema.json
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gptoss_export.exporter.origin import COMMIT, LABEL_KEY, LONGEST_TEXT, MOST_LABELS, REPOSITORY, ModelName
from gptoss_export.validators.gates import GATE_NAMES, GatePolicy, override
from gptoss_export.validators.report.bounds import LARGEST_FLOAT, item_bounds, number_bounds
from gptoss_export.validators.report.schema import SCHEMA_VERSION, Binding, Outcome, ParityReport, ProbeRecord
from gptoss_export.validators.verdict import Verdict

Schema = dict[str, Any]
Special = Mapping[tuple[type, str], Schema]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _pattern(form: re.Pattern[str]) -> Schema:
    return {"type": "string", "pattern": f"^{form.pattern}$"}


_SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
# One line; that it is printable, which no pattern says, the reader checks.
_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": LONGEST_TEXT, "pattern": "^\\S(.*\\S)?$"}
_SPECIAL: Special = {
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
    schema = object_schema(ParityReport, definitions)
    schema["properties"] |= definitions.pop(Verdict.__name__)["properties"]
    del schema["properties"]["passed"]
    schema["properties"]["verdict"] = {"enum": list(get_args(Outcome)), "description": _doc(ParityReport.outcome)}
    schema["properties"] = dict(sorted(schema["properties"].items()))
    schema["required"] = sorted(schema["properties"])
    definitions["Engine"] |= _engine_rule()
    return {
        "$schema": DIALECT,
        "title": f"parity.json of gptoss-export, version {SCHEMA_VERSION}",
        **schema,
        "$defs": dict(sorted(definitions.items())),
    }


def parity_schema_text() -> str:
    """The schema as docs/parity.schema.json holds it."""
    return json.dumps(parity_schema(), indent=2) + "\n"


def object_schema(kind: type, definitions: dict[str, Schema], special: Special = _SPECIAL) -> Schema:
    """The schema of a dataclass as `asdict` writes it: every field required, none beyond.

    definitions: takes those of the dataclasses in it, by name. special: of fields whose type does not say enough.
    """
    hints, known = get_type_hints(kind), {**_SPECIAL, **special}
    names = sorted(field.name for field in fields(kind))
    properties = {
        name: known.get((kind, name)) or _field(kind, name, hints[name], definitions, special) for name in names
    }
    return {
        "type": "object",
        "description": _doc(kind),
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }


def _field(kind: type, name: str, hint: Any, definitions: dict[str, Schema], special: Special) -> Schema:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            definitions[hint.__name__] = object_schema(hint, definitions, special)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_field(kind, name, args[0], definitions, special), {"type": "null"}]}
    if origin is tuple:
        fewest, most = item_bounds(kind, name)
        items = _field(kind, name, args[0], definitions, special)
        return {"type": "array", "items": items, "minItems": fewest, "maxItems": most}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _field(kind, name, args[1], definitions, special)}
    if hint in (int, float):
        low, high = number_bounds(kind, name, hint)
        limits = {"minimum": low} if low > -LARGEST_FLOAT else {}
        limits |= {"maximum": high} if high < LARGEST_FLOAT else {}
        return {"type": "integer" if hint is int else "number", **limits}
    return {"type": {str: "string", Path: "string", bool: "boolean"}[hint]}


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
