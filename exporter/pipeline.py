"""The stages in order: a checkpoint becomes one validated artifact a target.

    results = export(ExportRequest(model="./gpt-oss-20b", output=Path("release"), targets=("ort-cpu",)))
    require_pass(results)

The folder appears complete or not at all. An artifact that fails parity is delivered all the same, with the
verdict `fail` in its manifest, because its report is what the ticket needs; `require_pass` turns it into an
exit code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.artifact import (
    RECORD_NAMES,
    REPORT_NAMES,
    Manifest,
    ParityRecord,
    read_manifest,
    verify_files,
    write_manifest,
)
from gptoss_export.exporter.clock import now
from gptoss_export.exporter.errors import (
    IntegrityError,
    ManifestError,
    NotExecutedError,
    NotValidatedError,
    ParityFailedError,
)
from gptoss_export.exporter.measure import first_failure, make_yardstick, measure, record
from gptoss_export.exporter.output.identity import export_key, library_versions
from gptoss_export.exporter.output.journal import Journal
from gptoss_export.exporter.output.staging import in_use, journaled, journaled_in_place
from gptoss_export.exporter.planning.plan import Plan, make_plan
from gptoss_export.exporter.planning.request import Effort, ExportRequest, MeasureOptions, Parity
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.exporter.trust.attest import attest
from gptoss_export.exporter.trust.origin_of import origin_of
from gptoss_export.exporter.weights import FileRecord, WeightsMode, disk_errors, place_weights

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
    """One artifact and what is known about it; report is None when parity was off. seconds: since the
    start.
    """

    folder: Path
    manifest: Manifest
    report: ParityReport | None
    seconds: float

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


_SIDE_FILES = "side files"


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
    started = time.monotonic()
    plan = make_plan(request)
    progress.note(f"checkpoint: {plan.steps[0].removeprefix('read ')}")
    for problem in plan.preflight.problems:
        progress.note(f"preflight, ignored: {problem.what}")
    stage = journaled_in_place if request.weights is WeightsMode.IN_PLACE else journaled
    drafts: dict[str, tuple[Manifest, ParityReport | None]] = {}
    with stage(
        request.output, export_key(plan), force=request.force, protect=plan.protected, progress=progress
    ) as journal:
        folders = {name: journal.root / folder.relative_to(request.output) for name, folder in plan.folders.items()}
        graph, records = _weights_and_graph(plan, folders, journal, progress)
        placed = _placed_checkpoint(plan, next(iter(folders.values())))
        infos = {name: _build(name, graph, placed, folder, plan, journal, progress) for name, folder in folders.items()}
        del graph
        yardstick = None
        unmeasured = [name for name in folders if journal.result(_measured(name)) is None]
        if request.parity != "off" and unmeasured:
            hashes = {name: record.sha256 for name, record in records.items()}
            yardstick = make_yardstick(placed, hashes, request.parity, list(folders), request.measure, progress)
        for name, folder in folders.items():
            if name not in unmeasured:
                drafts[name] = _finished(folder)
                continue
            draft = _draft(name, infos[name], plan, folder, records, journal)
            report = measure(folder, draft, placed, yardstick, request.measure, request.threads, progress)
            if report is not None:
                draft = record(report, draft, folder)
            draft = attest(draft, report, folder)
            write_manifest(draft, folder)
            journal.finish(_measured(name), journal.hash_new(folder))
            drafts[name] = (draft, report)
    seconds = time.monotonic() - started
    return [ExportResult(plan.folders[name], *draft, seconds) for name, draft in drafts.items()]


def validate_artifact(
    folder: Path,
    effort: Effort,
    *,
    options: MeasureOptions | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Checks the hashes of a delivered artifact, measures its parity anew and records both.

    The records of before are not checked, only replaced, so a validation that was cut off can be repeated.
    """
    from gptoss_export.exporter.checkpoint.open import check_scales, open_checkpoint

    progress, options = progress or SilentProgress(), options or MeasureOptions()
    now()
    started = time.monotonic()
    with in_use(folder):
        manifest = read_manifest(folder)
        find_target(manifest).check_available()
        verify_files(folder, manifest, progress, skip=RECORD_NAMES)
        checkpoint = open_checkpoint(folder / manifest.weights_dir)
        if checkpoint.config != manifest.model:
            raise IntegrityError(
                f"{folder / manifest.weights_dir} describes another network than the manifest",
                "export again; something was added to the folder of the weights",
            )
        check_scales(checkpoint)
        hashes = {name: record.sha256 for name, record in manifest.checkpoint.items()}
        yardstick = make_yardstick(checkpoint, hashes, effort, [manifest.target], options, progress)
        report = measure(folder, manifest, checkpoint, yardstick, options, threads, progress)
        assert report is not None
        manifest = attest(record(report, manifest, folder), report, folder)
        write_manifest(manifest, folder)
        return ExportResult(folder, manifest, report, time.monotonic() - started)


def open_artifact(folder: Path, threads: int | None = None) -> tuple[Manifest, Runner]:
    """The manifest and a runner for an artifact, as it lies on disk; its hashes are not checked."""
    manifest = read_manifest(folder)
    target = find_target(manifest)
    target.check_available()
    return manifest, target.open_runner(folder, threads)


def require_pass(results: Sequence[ExportResult], *, allow_unexecuted: bool = False) -> None:
    """Raises ParityFailedError naming the first gate that was not kept, NotValidatedError when none was
    asked, NotExecutedError for an engine that was never run, unless that is allowed.
    """
    for result in results:
        if result.manifest.parity.verdict == "not validated":
            raise NotValidatedError(
                f"{result.folder} was never validated", f"run `gptoss-export validate {result.folder}`"
            )
        if result.report is not None and not result.report.verdict.passed:
            raise ParityFailedError(
                f"{result.manifest.target} is not the model: {first_failure(result.report)}",
                f"do not ship it; read {result.folder / REPORT_NAMES[1]} and attach it to a bug report",
            )
    for result in results:
        if result.manifest.parity.verdict == "not executed" and not allow_unexecuted:
            raise NotExecutedError(
                f"{result.manifest.target} was built and not executed here; its graph keeps the gates",
                f"run `gptoss-export validate {result.folder}` on a host with an NVIDIA GPU, or accept it as it is "
                "with --allow-unexecuted",
            )


def find_target(manifest: Manifest) -> Target:
    """The target that made the artifact; raises ManifestError for one that this version does not have."""
    from gptoss_export.engines.targets import TARGETS

    if manifest.target not in TARGETS:
        raise ManifestError(
            f"the artifact is for the target {manifest.target!r}, which this version does not have",
            f"use the version that made it ({manifest.versions.get('gptoss-export', 'unknown')})",
        )
    return TARGETS[manifest.target]


def _weights_and_graph(
    plan: Plan, folders: Mapping[str, Path], journal: Journal, progress: Progress
) -> tuple[ir.Model | None, dict[str, FileRecord]]:
    """Places the weights in a thread, which the disk slows down, while this one makes the graph that builds need."""
    from gptoss_export.exporter.checkpoint.open import check_scales
    from gptoss_export.exporter.graph.build import build_graph

    checkpoint, cancel, graph = plan.checkpoint, threading.Event(), None
    destinations = [folder / plan.weights_dir for folder in folders.values()]
    below = [folder.relative_to(journal.root) for folder in destinations]

    def finish(name: str, record: FileRecord) -> None:
        journal.finish(f"weights {name}", {(folder / name).as_posix(): record for folder in below})

    known = journal.files
    records = {name: known[file] for name in plan.checkpoint_files if (file := (below[0] / name).as_posix()) in known}
    missing = {name: path for name, path in plan.checkpoint_files.items() if name not in records}
    with ThreadPoolExecutor(1, "weights") as pool:
        weights = pool.submit(place_weights, missing, destinations, plan.request.weights, progress, cancel, finish)
        try:
            if any(journal.result(_built(name)) is None for name in folders):
                with progress.task("check scales"):
                    check_scales(checkpoint)
                _fail_early(weights)
                with progress.task("graph"):
                    graph = build_graph(checkpoint.config, checkpoint.layout)
            records |= weights.result()
        except BaseException:
            cancel.set()
            raise
    if plan.weights_dir != "." and journal.result(_SIDE_FILES) is None:
        side = place_weights(
            {path.name: path for path in checkpoint.side_files}, list(folders.values()), WeightsMode.COPY
        )
        roots = [folder.relative_to(journal.root) for folder in folders.values()]
        journal.finish(_SIDE_FILES, {(root / name).as_posix(): side[name] for root in roots for name in side})
    return graph, {name: records[name] for name in plan.checkpoint_files}


def _fail_early(future: Future[dict[str, FileRecord]]) -> None:
    if future.done():
        future.result()


def _placed_checkpoint(plan: Plan, folder: Path) -> Checkpoint:
    """The checkpoint as it lies in the artifact: what is built, compared and shipped are the same bytes."""
    from gptoss_export.exporter.checkpoint.open import open_checkpoint

    placed = open_checkpoint(folder / plan.weights_dir)
    source = plan.checkpoint
    if (placed.config, placed.layout) != (
        source.config,
        source.layout,
    ) or placed.tensors.keys() != source.tensors.keys():
        raise IntegrityError(
            f"{source.root} changed while it was exported",
            "wait until the download or copy has ended, then run again",
        )
    return placed


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
    with progress.task(f"build {name}"), disk_errors(f"the model of {name}"):
        weights_dir = "" if plan.weights_dir == "." else plan.weights_dir
        settings = BuildSettings(plan.request.engine, progress)
        info = TARGETS[name].build(graph, checkpoint, folder, weights_dir, settings)
        if plan.request.bundle_kernels:
            info = replace(info, notes=(*info.notes, TARGETS[name].bundle_kernels(folder)))
        journal.finish(_built(name), journal.hash_new(folder), asdict(info))
        return info


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
