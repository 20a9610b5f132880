"""Reads parity.json without trusting it: types and bounds here, everything else in `checks`."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gptoss_export.exporter.checkpoint.json_reader import parse_json_object
from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.report.bounds import item_bounds, number_bounds
from gptoss_export.validators.report.checks import InvalidReport, check_report
from gptoss_export.validators.report.schema import SCHEMA_VERSION, ParityReport
from gptoss_export.validators.verdict import Verdict

T = TypeVar("T")

_UNREADABLE = "the parity report cannot be read"
_NEXT_STEP = "Run `gptoss-export validate` on the artifact."
_UNREAD = {"passed": True, "failures": []}


def from_json(data: bytes | str) -> ParityReport:
    """The report in these bytes. Raises NotValidatedError when it is none that this version can vouch for."""
    encoded = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    found = parse_json_object(encoded, _UNREADABLE, NotValidatedError, next_step=_NEXT_STEP)
    try:
        if found.get("schema_version") != SCHEMA_VERSION:
            raise InvalidReport(f"its schema_version is not {SCHEMA_VERSION!r}, the one that this version reads")
        for name in ("verdict", "failures"):
            if name not in found:
                raise InvalidReport(f"{name} is missing")
        verdict, failures = found["verdict"], found.pop("failures")
        judged = _read(Verdict, {"passed": failures == [], "failures": failures}, "")
        report = replace(_read(ParityReport, found | {"verdict": _UNREAD}, ""), verdict=judged)
        check_report(report)
        if verdict != report.outcome:
            raise InvalidReport("its verdict does not follow from its failures and from what was executed")
    except ValueError as error:
        reason = ascii(" ".join(str(error).split())[:300])[1:-1]
        raise NotValidatedError(f"{_UNREADABLE}: {reason}", _NEXT_STEP) from error
    return report


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
