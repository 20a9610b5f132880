"""parity.json in canonical bytes: the same report is the same file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from gptoss_export.validators.report.schema import ParityReport


def to_json(report: ParityReport) -> bytes:
    """Sorted keys, floats by their shortest exact repr, ASCII, a newline at the end.

    Raises ValueError for a NaN or an infinity, which JSON cannot hold and a report never contains.
    """
    return _canonical(_fields(report))


def content_sha256(report: ParityReport) -> str:
    """Hash of everything but created_at, so that the same measurement has the same hash tomorrow."""
    fields = _fields(report)
    del fields["created_at"]
    return hashlib.sha256(_canonical(fields)).hexdigest()


def _fields(report: ParityReport) -> dict[str, object]:
    """verdict is the word for the artifact, so that no reader takes gates that were kept for an engine that was run."""
    failures = asdict(report.verdict)["failures"]
    return {**asdict(report), "verdict": report.outcome, "failures": failures}


def _canonical(fields: dict[str, object]) -> bytes:
    return (json.dumps(fields, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")
