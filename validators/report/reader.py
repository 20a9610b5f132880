"""Reads parity.json without trusting it: types, invariants, and that gates, verdict and outcome follow from what
was measured."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.gates import judge
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.report.schema import SCHEMA_VERSION, ParityReport

T = TypeVar("T")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")
LARGEST_INTEGER = 2**63 - 1


class _InvalidReport(ValueError):  # noqa: N818 - never leaves this module
    """What is wrong, for the error's one line."""


def from_json(data: bytes | str) -> ParityReport:
    """The report in these bytes. Raises NotValidatedError when it is none that this version can vouch for."""
    try:
        fields_ = json.loads(data, object_pairs_hook=_object, parse_constant=_no_constant)
        if not isinstance(fields_, dict):
            raise _InvalidReport("it is no JSON object")
        if fields_.get("schema_version") != SCHEMA_VERSION:
            raise _InvalidReport(f"its schema_version is not {SCHEMA_VERSION!r}, the one that this version reads")
        if "outcome" not in fields_:
            raise _InvalidReport("outcome is missing")
        outcome = fields_.pop("outcome")
        report = _read(ParityReport, fields_, "")
        _check(report)
        if outcome != report.outcome:
            raise _InvalidReport("its outcome does not follow from its verdict and from what was executed")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300] or "it is nested too deep"
        raise NotValidatedError(
            f"the parity report cannot be read: {reason}", "Run `gptoss-export validate` on the artifact."
        ) from error
    return report


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _InvalidReport("an object has the same key twice")
    return found


def _no_constant(name: str) -> object:
    raise _InvalidReport(f"{name} is no number")


def _read(kind: type[T], value: object, where: str) -> T:
    """value as the dataclass, with every field there, none beyond, and each of its type."""
    if not isinstance(value, dict):
        raise _InvalidReport(f"{where or 'the report'} is no object")
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in sorted(set(names) ^ set(value)):
        raise _InvalidReport(f"{where}{name} is {'missing' if name in names else 'not known'}")
    return kind(**{name: _value(hints[name], value[name], f"{where}{name}") for name in names})


def _value(hint: Any, value: object, where: str) -> object:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _read(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _value(args[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        # float() of an integer beyond float's range raises OverflowError, which is no ValueError.
        if abs(value) <= LARGEST_INTEGER or (isinstance(value, float) and math.isfinite(value)):
            return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value <= LARGEST_INTEGER:
            return value
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    raise _InvalidReport(f"{where} has a value that cannot be")


def _check(report: ParityReport) -> None:
    """What types cannot say."""
    datetime.fromisoformat(report.created_at)
    digests = [probe.sha256 for probe in report.probes]
    digests += [*report.binding.checkpoint.values(), *report.binding.files.values()]
    if not all(SHA256.match(digest) for digest in digests):
        raise _InvalidReport("a sha256 is not 64 hexadecimal digits")
    metrics = {scenario.name: scenario.metrics for scenario in report.scenarios}
    if len(metrics) != len(report.scenarios):
        raise _InvalidReport("a scenario is there twice")
    for name, m in metrics.items():
        _check_metrics(f"scenario {name}", m)
    if report.floor is not None:
        _check_metrics("the noise floor", report.floor.metrics)
        if report.floor.metrics.positions != sum(probe.tokens for probe in report.probes):
            raise _InvalidReport("its noise floor is over other positions than its probes")
    if judge(metrics, report.gates) != report.verdict:
        raise _InvalidReport("its verdict does not follow from its metrics and gates")
    try:
        gates = report.policy.resolve(report.floor)
    except NotValidatedError as error:
        raise _InvalidReport(error.what) from error
    if gates != report.gates:
        raise _InvalidReport("its gates do not follow from its policy and noise floor")


def _check_metrics(where: str, m: Metrics) -> None:
    if m.agreements + m.ties + m.disagreements != m.positions:
        raise _InvalidReport(f"{where}: agreements, ties and disagreements are not all positions")
    figures = (m.kl_mean, m.kl_p99, m.kl_max, m.logit_diff_mean, m.logit_diff_max)
    if any(figure is not None and figure < 0 for figure in figures):
        raise _InvalidReport(f"{where}: a divergence is negative")
