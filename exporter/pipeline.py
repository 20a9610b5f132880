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
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.artifact import (
    REPORT_NAMES,
    Manifest,
    ParityRecord,
    now,
    read_manifest,
    verify_files,
    write_manifest,
)
from gptoss_export.exporter.errors import (
    IntegrityError,
    ManifestError,
    NotExecutedError,
    NotValidatedError,
    ParityFailedError,
)
from gptoss_export.exporter.measure import Effort, MeasureOptions, first_failure, make_yardstick, measure, record
from gptoss_export.exporter.plan import ExportRequest, Parity, Plan, make_plan
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.exporter.staging import staging, staging_in_place
from gptoss_export.exporter.weights import FileRecord, WeightsMode, hash_files, place_weights

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

_LIBRARIES = (
    "gptoss-export",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "transformers",
    "triton",
)


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


def export(request: ExportRequest, progress: Progress | None = None) -> list[ExportResult]:
    """Runs the whole pipeline; one result a target, in the order asked for.

    Raises any error of `gptoss_export.exporter.errors` but ParityFailedError; whatever is raised, nothing is
    left behind and an older artifact is still there.
    """
    progress = progress or SilentProgress()
    started = time.monotonic()
    plan = make_plan(request)
    progress.note(f"checkpoint: {plan.steps[0].removeprefix('read ')}")
    stage = staging_in_place if request.weights is WeightsMode.IN_PLACE else staging
    drafts: dict[str, tuple[Manifest, ParityReport | None]] = {}
    with stage(request.output, force=request.force, protect=plan.protected) as root:
        folders = {name: root / folder.relative_to(request.output) for name, folder in plan.folders.items()}
        graph, records = _weights_and_graph(plan, list(folders.values()), progress)
        placed = _placed_checkpoint(plan, next(iter(folders.values())))
        infos = {name: _build(name, graph, placed, folder, plan, progress) for name, folder in folders.items()}
        del graph
        yardstick = None
        if request.parity != "off":
            hashes = {name: record.sha256 for name, record in records.items()}
            yardstick = make_yardstick(placed, hashes, request.parity, list(folders), request.measure, progress)
        for name, folder in folders.items():
            draft = _draft(name, infos[name], plan, folder, records)
            report = measure(folder, draft, placed, yardstick, request.measure, request.threads, progress)
            if report is not None:
                draft = record(report, draft, folder)
            write_manifest(draft, folder)
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

    The report of before is not checked, only replaced, so a validation that was cut off can be repeated.
    """
    from gptoss_export.exporter.checkpoint.open import check_scales, open_checkpoint

    progress, options = progress or SilentProgress(), options or MeasureOptions()
    started = time.monotonic()
    manifest = read_manifest(folder)
    find_target(manifest).check_available()
    verify_files(folder, manifest, progress, skip=REPORT_NAMES)
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
    manifest = record(report, manifest, folder)
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


def _weights_and_graph(plan: Plan, folders: list[Path], progress: Progress) -> tuple[ir.Model, dict[str, FileRecord]]:
    """Places the weights in a thread, which the disk slows down, while this one makes the graph."""
    from gptoss_export.exporter.checkpoint.open import check_scales
    from gptoss_export.exporter.graph.build import build_graph

    checkpoint, cancel = plan.checkpoint, threading.Event()
    destinations = [folder / plan.weights_dir for folder in folders]
    with ThreadPoolExecutor(1, "weights") as pool:
        weights = pool.submit(
            place_weights, plan.checkpoint_files, destinations, plan.request.weights, progress, cancel
        )
        try:
            with progress.task("check scales"):
                check_scales(checkpoint)
            _fail_early(weights)
            with progress.task("graph"):
                graph = build_graph(checkpoint.config, checkpoint.layout)
            records = weights.result()
        except BaseException:
            cancel.set()
            raise
    if plan.weights_dir != ".":
        place_weights({path.name: path for path in checkpoint.side_files}, folders, WeightsMode.COPY)
    return graph, records


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
    name: str, graph: ir.Model, checkpoint: Checkpoint, folder: Path, plan: Plan, progress: Progress
) -> BuildInfo:
    from gptoss_export.engines.build_info import BuildSettings
    from gptoss_export.engines.targets import TARGETS

    with progress.task(f"build {name}"):
        weights_dir = "" if plan.weights_dir == "." else plan.weights_dir
        settings = BuildSettings(plan.request.engine, progress)
        info = TARGETS[name].build(graph, checkpoint, folder, weights_dir, settings)
        if not plan.request.bundle_kernels:
            return info
        return replace(info, notes=(*info.notes, TARGETS[name].bundle_kernels(folder)))


def _draft(name: str, info: BuildInfo, plan: Plan, folder: Path, placed: Mapping[str, FileRecord]) -> Manifest:
    prefix = "" if plan.weights_dir == "." else f"{plan.weights_dir}/"
    files = {f"{prefix}{file}": record for file, record in placed.items()}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files |= hash_files({file: path for file, path in paths.items() if file not in files})
    return Manifest(
        versions=_versions(),
        target=name,
        engine=info.engine,
        provider=info.provider,
        notes=info.notes,
        layout=plan.checkpoint.layout,
        model=plan.checkpoint.config,
        checkpoint=placed,
        weights_mode=plan.request.weights,
        weights_dir=plan.weights_dir,
        files=files,
        parity=ParityRecord("not validated"),
        created_at=now(),
    )


def _versions() -> dict[str, str]:
    return {name: found for name in _LIBRARIES if (found := _version(name)) != "not installed"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
