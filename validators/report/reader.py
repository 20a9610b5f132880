"""Reads parity.json without trusting it: types and bounds here, everything else in `checks`."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.report.bounds import item_bounds, number_bounds
from gptoss_export.validators.report.checks import InvalidReport, check_report
from gptoss_export.validators.report.schema import SCHEMA_VERSION, ParityReport

T = TypeVar("T")


def from_json(data: bytes | str) -> ParityReport:
    """The report in these bytes. Raises NotValidatedError when it is none that this version can vouch for."""
    try:
        found = json.loads(data, object_pairs_hook=_object, parse_constant=_no_constant)
        if not isinstance(found, dict):
            raise InvalidReport("it is no JSON object")
        if found.get("schema_version") != SCHEMA_VERSION:
            raise InvalidReport(f"its schema_version is not {SCHEMA_VERSION!r}, the one that this version reads")
        if "outcome" not in found:
            raise InvalidReport("outcome is missing")
        outcome = found.pop("outcome")
        report = _read(ParityReport, found, "")
        check_report(report)
        if outcome != report.outcome:
            raise InvalidReport("its outcome does not follow from its verdict and from what was executed")
    except (ValueError, RecursionError) as error:
        reason = ascii(" ".join(str(error).split())[:300])[1:-1] or "it is nested too deep"
        raise NotValidatedError(
            f"the parity report cannot be read: {reason}", "Run `gptoss-export validate` on the artifact."
        ) from error
    return report


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidReport("an object has the same key twice")
    return found


def _no_constant(name: str) -> object:
    raise InvalidReport(f"{name} is no number")


def _read(kind: type[T], value: object, where: str) -> T:
    """value as the dataclass, with every field there, none beyond, and each of its type and within its bounds."""
    if not isinstance(value, dict):
        raise InvalidReport(f"{where.rstrip('.') or 'the report'} is no object")
    hints = _hints(kind)  # type: ignore[arg-type]
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in sorted(set(names) ^ set(value)):
        raise InvalidReport(f"{where}{name} is {'missing' if name in names else 'not known'}")
    return kind(**{name: _value(kind, name, hints[name], value[name], f"{where}{name}") for name in names})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(kind: type, name: str, hint: Any, value: object, where: str) -> object:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _read(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _value(kind, name, args[0], value, where)
    if origin is tuple and isinstance(value, list):
        fewest, most = item_bounds(kind, name)
        if not fewest <= len(value) <= most:
            raise InvalidReport(f"{where} has {len(value)} items, where {fewest} to {most} can be")
        return tuple(_value(kind, name, args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(kind, name, args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint in (int, float) and _is_number(hint, value):
        low, high = number_bounds(kind, name, hint)
        # Compared before float(), which raises OverflowError for an integer beyond its range.
        if low <= value <= high:  # type: ignore[operator]
            return hint(value)
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    raise InvalidReport(f"{where} has a value that cannot be")


def _is_number(hint: type, value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (hint is float and isinstance(value, float) and math.isfinite(value))
