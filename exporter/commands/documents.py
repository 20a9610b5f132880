"""What --json prints: one dataclass for each document, and how it is filled.

    settings.document = documents.delivered(results)

Field names are the keys, docstrings the descriptions in docs/schemas/, which `schemas` makes of them. `bench` has its
own document, docs/bench.schema.json, and `inspect` prints manifest.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptoss_export.exporter.artifact import ParityRecord, Verdict
from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.commands.settings import SCHEMA_VERSION
from gptoss_export.exporter.origin import Origin
from gptoss_export.exporter.planning.request import Effort
from gptoss_export.exporter.stopwatch import RunSeconds
from gptoss_export.exporter.trust.verify import Check
from gptoss_export.exporter.weights import FileRecord, WeightsMode
from gptoss_export.validators.diff import Change, Comparison, ComparisonVerdict
from gptoss_export.validators.layers import Bisection
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.report import Outcome, ParityReport, content_sha256
from gptoss_export.validators.report.gate_table import origin, worst_cases
from gptoss_export.validators.significance import LEVEL, MATTERS
from gptoss_export.validators.verdict import Case, Failure

if TYPE_CHECKING:
    from gptoss_export.exporter.pipeline import ExportResult

Document = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One artifact and its verdict.

    failures: gates that were not kept. effort, report_sha256, report_folder: null where nothing was validated. seconds:
    that this target alone took, to be built and measured, in whichever run. bisection: null where none was asked for.
    """

    target: str
    folder: Path
    verdict: Verdict
    effort: Effort | None
    loosened: tuple[str, ...]
    failures: tuple[Failure, ...]
    report_sha256: str | None
    report_folder: Path | None
    content_sha256: str
    engine: str
    provider: str
    notes: tuple[str, ...]
    artifact_bytes: int
    seconds: float
    bisection: Bisection | None


@dataclass(frozen=True)
class Results:
    """The artifacts in the order in which their targets were named."""

    results: tuple[Result, ...]
    run_seconds: RunSeconds


@dataclass(frozen=True)
class TargetState:
    """missing: what this host lacks for the target, null where it can build it."""

    name: str
    engine: str
    summary: str
    missing: str | None


@dataclass(frozen=True)
class Targets:
    """All targets of this version."""

    targets: tuple[TargetState, ...]


@dataclass(frozen=True)
class Placement:
    """How the weights come into the artifact, and into which folder of it."""

    mode: WeightsMode
    dir: str


@dataclass(frozen=True)
class ManifestFile:
    """manifest.json: what the artifact is, made from what, by which versions, and the verdict."""

    schema_version: int
    versions: Mapping[str, str]
    target: str
    engine: str
    provider: str
    notes: tuple[str, ...]
    layout: Layout
    model: ModelConfig
    checkpoint: Mapping[str, FileRecord]
    weights: Placement
    files: Mapping[str, FileRecord]
    parity: ParityRecord
    created_at: str
    origin: Origin
    content_sha256: str


@dataclass(frozen=True)
class Verified:
    """An artifact that is what its manifest says. files: how many. checks: in the order in which they were made."""

    target: str
    verdict: Verdict
    effort: str | None
    loosened: tuple[str, ...]
    content_sha256: str
    files: int
    signature_checked: bool
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Signed:
    """A signature that was written. files: how many it signs, the manifest among them."""

    signature: Path
    target: str
    verdict: Verdict
    loosened: tuple[str, ...]
    content_sha256: str
    files: int


@dataclass(frozen=True)
class JudgedGate(Case):
    """A gate at the place that comes nearest to its limit, or is farthest beyond it. limit_from: whence it comes."""

    limit_from: str


@dataclass(frozen=True)
class Judged:
    """A verdict on a stored measurement."""

    target: str
    verdict: Outcome
    effort: Effort
    loosened: tuple[str, ...]
    failures: tuple[Failure, ...]
    gates: tuple[JudgedGate, ...]
    report_sha256: str


@dataclass(frozen=True)
class Compared:
    """Release against release. old_*, new_*: of the reports. changes: of every figure, whatever its kind.

    not_kept: gates that were kept and are not; kept_again: the other way round; failing: all that the new report does
    not keep. regressions, improvements: what is neither figure nor gate, in words. What it was judged by: level of the
    counts' tests, matters (share of a limit), tolerance (times).
    """

    verdict: ComparisonVerdict
    regressed: bool
    old_target: str
    new_target: str
    old_verdict: Outcome
    new_verdict: Outcome
    changes: tuple[Change, ...]
    not_kept: tuple[Failure, ...]
    kept_again: tuple[Failure, ...]
    failing: tuple[Failure, ...]
    regressions: tuple[str, ...]
    improvements: tuple[str, ...]
    level: float
    matters: float
    tolerance: float


@dataclass(frozen=True)
class ImportedScenario:
    """The logits of one runner of Polygraphy's, against the reference's."""

    name: str
    top1_agreement: float | None
    metrics: Metrics


@dataclass(frozen=True)
class Imported:
    """Polygraphy's results, held to the gates of the artifact; verdict: whether they keep them."""

    verdict: Literal["pass", "fail"]
    scenarios: tuple[ImportedScenario, ...]
    gates: tuple[Case, ...]


@dataclass(frozen=True)
class Exchanged:
    """Files for Polygraphy. probes: how many. next: the command that reads them."""

    folder: Path
    probes: int
    next: str


@dataclass(frozen=True)
class Synthesized:
    """A random checkpoint that was written."""

    folder: Path
    layout: Layout
    checkpoint_bytes: int


def document(content: object) -> Document:
    """A dataclass of this module as it is printed."""
    return {"schema_version": SCHEMA_VERSION, **asdict(content)}  # type: ignore[call-overload]


def delivered(results: Sequence[ExportResult]) -> Document:
    """Of an export or a validation: one run, with at least one result."""
    return document(Results(tuple(map(_result, results)), results[0].run))


def _result(result: ExportResult) -> Result:
    manifest, report = result.manifest, result.report
    return Result(
        target=manifest.target,
        folder=result.folder,
        verdict=result.parity.verdict,
        effort=None if report is None else report.effort,
        loosened=result.parity.loosened,
        failures=() if report is None else report.verdict.failures,
        report_sha256=result.parity.report_sha256,
        report_folder=None if report is None else result.report_folder or result.folder,
        content_sha256=manifest.content_sha256,
        engine=manifest.engine,
        provider=manifest.provider,
        notes=manifest.notes,
        artifact_bytes=sum(record.nbytes for record in manifest.files.values()),
        seconds=result.seconds,
        bisection=None if report is None else report.bisection,
    )


def judged(report: ParityReport) -> Document:
    """Of `report`."""
    gates = tuple(JudgedGate(**asdict(case), limit_from=origin(report, case.gate)) for case in worst_cases(report))
    said = (report.target, report.outcome, report.effort, report.loosened)
    return document(Judged(*said, report.verdict.failures, gates, content_sha256(report)))


def compared(found: Comparison) -> Document:
    """Of `diff`."""
    same = {field.name: getattr(found, field.name) for field in fields(found)}
    return document(Compared(found.verdict, found.regressed, level=LEVEL, matters=MATTERS, **same))


def imported(found: Mapping[str, Metrics], gates: Sequence[Case]) -> Document:
    """Of `polygraphy import`; found: by what it is called in the gates."""
    scenarios = tuple(ImportedScenario(name, m.top1_agreement, m) for name, m in found.items())
    return document(Imported("pass" if all(case.kept for case in gates) else "fail", scenarios, tuple(gates)))
