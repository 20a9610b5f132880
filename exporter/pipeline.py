"""The stages in order: a checkpoint becomes one validated artifact a target.

    results = export(ExportRequest(model="./gpt-oss-20b", output=Path("release"), targets=("ort-cpu",)))
    require_pass(results)

The folder appears complete or not at all. An artifact that fails parity is delivered all the same, with the
verdict `fail` in its manifest, because its report is what the ticket needs; `require_pass` turns it into an
exit code.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.artifact import (
    RECORD_NAMES,
    Manifest,
    ParityRecord,
    read_manifest,
    verify_files,
    write_manifest,
)
from gptoss_export.exporter.clock import now
from gptoss_export.exporter.errors import IntegrityError, ManifestError
from gptoss_export.exporter.measure import first_failure, make_yardstick, measure, parity_record, record
from gptoss_export.exporter.output.identity import export_key, library_versions
from gptoss_export.exporter.output.journal import Journal
from gptoss_export.exporter.output.report_place import check_place, remove_signature, write_elsewhere
from gptoss_export.exporter.output.staging import in_use, journaled, journaled_in_place
from gptoss_export.exporter.planning.plan import Plan, make_plan
from gptoss_export.exporter.planning.request import Effort, ExportRequest, MeasureOptions, Parity
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.exporter.shared_stages import placed_checkpoint, weights_and_graph
from gptoss_export.exporter.stopwatch import RunSeconds, Stopwatch, rounded
from gptoss_export.exporter.trust.attest import attest
from gptoss_export.exporter.trust.origin_of import origin_of
from gptoss_export.exporter.trust.policy import Doubt
from gptoss_export.exporter.trust.policy import require_pass as require_one
from gptoss_export.exporter.weights import FileRecord, WeightsMode, disk_errors

if TYPE_CHECKING:
    import onnx_ir as ir

    from gptoss_export.engines.build_info import BuildInfo
    from gptoss_export.engines.runner import Runner
    from gptoss_export.engines.targets import Target
    from gptoss_export.exporter.checkpoint.tensors import Checkpoint
    from gptoss_export.validators.report import ParityReport

__all__ = [
    "ExportRequest",
    "ExportResult",
    "MeasureOptions",
    "Parity",
    "Plan",
    "export",
    "make_plan",
    "require_pass",
    "validate_artifact",
]


@dataclass(frozen=True)
class ExportResult:
    """One artifact and what is known about it; report is None when parity was off.

    seconds: that this target alone took, to be built and measured; where an earlier run, which was cut off, did so, as
    it noted them. run: of the run that all its results have in common. report_folder: where the report is, None for the
    artifact itself, whose manifest then has its verdict.
    """

    folder: Path
    manifest: Manifest
    report: ParityReport | None
    seconds: float
    run: RunSeconds
    report_folder: Path | None = None

    @property
    def parity(self) -> ParityRecord:
        """The verdict that was taken, wherever its report is."""
        if self.report is None or self.report_folder is None:
            return self.manifest.parity
        return parity_record(self.report)

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        if self.report is None:
            return f"{self.manifest.target}: NOT VALIDATED ({self.folder})"
        loosened = f", gates LOOSENED: {', '.join(self.report.loosened)}" if self.report.loosened else ""
        if self.report.outcome == "pass":
            return f"{self.manifest.target}: pass ({self.report.effort}{loosened}), {self.folder}"
        if self.report.outcome == "not executed":
            engine = f"engine NOT EXECUTED ({self.report.engine.not_executed_reason})"
            return f"{self.manifest.target}: graph passes ({self.report.effort}{loosened}), {engine}, {self.folder}"
        return f"{self.manifest.target}: FAIL, {first_failure(self.report)}{loosened} ({self.folder})"


def _built(target: str) -> str:
    return f"build {target}"


def _measured(target: str) -> str:
    return f"measure {target}"


def export(request: ExportRequest, progress: Progress | None = None) -> list[ExportResult]:
    """Runs the whole pipeline; one result a target, in the order asked for.

    Raises any error of `gptoss_export.exporter.errors` but ParityFailedError; whatever is raised, an older artifact is
    still there. The next call for the same goes on with what was finished, after a kill as well; see `journaled`.
    """
    progress = progress or SilentProgress()
    now()  # a SOURCE_DATE_EPOCH that is no time is refused before any work
    watch = Stopwatch()
    plan = make_plan(request)
    progress.note(f"checkpoint: {plan.steps[0].removeprefix('read ')}")
    for problem in plan.preflight.problems:
        progress.note(f"preflight, ignored: {problem.what}")
    stage = journaled_in_place if request.weights is WeightsMode.IN_PLACE else journaled
    drafts: dict[str, tuple[Manifest, ParityReport | None, float]] = {}
    with stage(
        request.output, export_key(plan), force=request.force, protect=plan.protected, progress=progress
    ) as journal:
        folders = {name: journal.root / folder.relative_to(request.output) for name, folder in plan.folders.items()}
        builds = any(journal.result(_built(name)) is None for name in folders)
        graph, records = weights_and_graph(plan, folders, builds, journal, watch, progress)
        placed = placed_checkpoint(plan, next(iter(folders.values())))
        infos = {name: _build(name, graph, placed, folder, plan, journal, progress) for name, folder in folders.items()}
        del graph
        yardstick = None
        unmeasured = [name for name in folders if journal.result(_measured(name)) is None]
        if request.parity != "off" and unmeasured:
            hashes = {name: record.sha256 for name, record in records.items()}
            with watch.stage("reference"):
                yardstick = make_yardstick(placed, hashes, request.parity, list(folders), request.measure, progress)
        for name, folder in folders.items():
            if name not in unmeasured:
                drafts[name] = (*_finished(folder), _took(name, journal))
                continue
            started = time.monotonic()
            draft = _draft(name, infos[name], plan, folder, records, journal)
            report = measure(folder, draft, placed, yardstick, request.measure, request.threads, progress)
            if report is not None:
                draft = record(report, draft, folder)
            draft = attest(draft, report, folder)
            write_manifest(draft, folder)
            journal.finish(_measured(name), journal.hash_new(folder), {"seconds": time.monotonic() - started})
            drafts[name] = (draft, report, _took(name, journal))
    run = watch.read()
    return [ExportResult(plan.folders[name], *draft, run) for name, draft in drafts.items()]


def validate_artifact(
    folder: Path,
    effort: Effort,
    *,
    options: MeasureOptions | None = None,
    output: Path | None = None,
    drop_signature: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Checks the hashes of a delivered artifact, measures its parity anew and records both.

    The records of before are not checked, only replaced, so a validation that was cut off can be repeated. output: a
    folder that gets the report instead; then nothing in the artifact changes, which may be read-only. drop_signature:
    whether a signature may be removed, since it is of the verdict of before.

    Raises, before any work, SignedError or AccessError for an artifact that must not or cannot be changed, and
    OutputExistsError or AccessError for an output that cannot be written.
    """
    from gptoss_export.exporter.checkpoint.open import check_scales, open_checkpoint

    progress, options = progress or SilentProgress(), options or MeasureOptions()
    now()
    watch = Stopwatch()
    with in_use(folder):
        manifest = read_manifest(folder)
        check_place(folder, output, drop_signature=drop_signature)
        find_target(manifest).check_available()
        with watch.stage("hashes"):
            verify_files(folder, manifest, progress, skip=RECORD_NAMES if output is None else ())
        checkpoint = open_checkpoint(folder / manifest.weights_dir)
        if checkpoint.config != manifest.model:
            raise IntegrityError(
                f"{folder / manifest.weights_dir} describes another network than the manifest",
                "export again; something was added to the folder of the weights",
            )
        check_scales(checkpoint)
        hashes = {name: record.sha256 for name, record in manifest.checkpoint.items()}
        with watch.stage("reference"):
            yardstick = make_yardstick(checkpoint, hashes, effort, [manifest.target], options, progress)
        started = time.monotonic()
        report = measure(folder, manifest, checkpoint, yardstick, options, threads, progress)
        assert report is not None
        if output is None:
            check_place(folder, None, drop_signature=drop_signature)  # other tools sign without asking for the lock
            if drop_signature:
                remove_signature(folder)
            manifest = attest(record(report, manifest, folder), report, folder)
            write_manifest(manifest, folder)
        else:
            write_elsewhere(report, output, folder)
        return ExportResult(folder, manifest, report, rounded(time.monotonic() - started), watch.read(), output)


def open_artifact(folder: Path, threads: int | None = None) -> tuple[Manifest, Runner]:
    """The manifest and a runner for an artifact, as it lies on disk; its hashes are not checked."""
    manifest = read_manifest(folder)
    target = find_target(manifest)
    target.check_available()
    return manifest, target.open_runner(folder, threads)


def require_pass(results: Sequence[ExportResult], *, allow_unexecuted: bool = False) -> None:
    """Raises what the policy raises. Loosened gates are accepted: it was the command at hand that loosened them."""
    later: tuple[Doubt, ...] = ("not executed", "loosened")
    for accepted in (later, later if allow_unexecuted else ("loosened",)):
        for result in results:
            judged = result.folder, result.manifest.target, result.parity, result.report
            require_one(*judged, accepted=accepted, offered=later[:1], report_folder=result.report_folder)


def find_target(manifest: Manifest) -> Target:
    """The target that made the artifact; raises ManifestError for one that this version does not have."""
    from gptoss_export.engines.targets import TARGETS

    if manifest.target not in TARGETS:
        raise ManifestError(
            f"the artifact is for the target {manifest.target!r}, which this version does not have",
            f"use the version that made it ({manifest.versions.get('gptoss-export', 'unknown')})",
        )
    return TARGETS[manifest.target]


def _build(
    name: str,
    graph: ir.Model | None,
    checkpoint: Checkpoint,
    folder: Path,
    plan: Plan,
    journal: Journal,
    progress: Progress,
) -> BuildInfo:
    from gptoss_export.engines.build_info import BuildInfo, BuildSettings
    from gptoss_export.engines.targets import TARGETS

    if (known := journal.result(_built(name))) is not None:
        notes = known["notes"]
        assert isinstance(notes, list | tuple)
        return BuildInfo(str(known["engine"]), str(known["provider"]), tuple(map(str, notes)))
    assert graph is not None
    started = time.monotonic()
    with progress.task(f"build {name}"), disk_errors(f"the model of {name}"):
        weights_dir = "" if plan.weights_dir == "." else plan.weights_dir
        settings = BuildSettings(plan.request.engine, progress)
        info = TARGETS[name].build(graph, checkpoint, folder, weights_dir, settings)
        if plan.request.bundle_kernels:
            info = replace(info, notes=(*info.notes, TARGETS[name].bundle_kernels(folder)))
        files = journal.hash_new(folder)
        journal.finish(_built(name), files, asdict(info) | {"seconds": time.monotonic() - started})
        return info


def _took(name: str, journal: Journal) -> float:
    """Seconds that a target's own stages took, in whichever run."""
    noted = [(journal.result(stage) or {}).get("seconds") for stage in (_built(name), _measured(name))]
    return rounded(sum(seconds for seconds in noted if isinstance(seconds, int | float)))


def _finished(folder: Path) -> tuple[Manifest, ParityReport | None]:
    """An artifact that an earlier run measured."""
    from gptoss_export.validators.report import read_report

    manifest = read_manifest(folder)
    return manifest, None if manifest.parity.verdict == "not validated" else read_report(folder)


def _draft(
    name: str, info: BuildInfo, plan: Plan, folder: Path, placed: Mapping[str, FileRecord], journal: Journal
) -> Manifest:
    return Manifest(
        versions=library_versions([name], plan.request.engine),
        target=name,
        engine=info.engine,
        provider=info.provider,
        notes=info.notes,
        layout=plan.checkpoint.layout,
        model=plan.checkpoint.config,
        checkpoint=placed,
        weights_mode=plan.request.weights,
        weights_dir=plan.weights_dir,
        files=journal.files_of(folder),
        parity=ParityRecord("not validated"),
        created_at=now(),
        origin=origin_of(plan.request, name, plan.checkpoint),
    )
