"""The stage that measures: what artifacts are compared with, what runs them on this host, and what goes on record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptoss_export.exporter.artifact import REPORT_NAMES, Manifest, ParityRecord
from gptoss_export.exporter.progress import Progress
from gptoss_export.exporter.weights import hash_files

if TYPE_CHECKING:
    from gptoss_export.exporter.checkpoint.tensors import Checkpoint
    from gptoss_export.validators.floor import FloorRecord
    from gptoss_export.validators.reference import Reference
    from gptoss_export.validators.report import ParityReport
    from gptoss_export.validators.report.schema import Execution

Effort = Literal["quick", "full"]

_EXECUTED: Execution = "executed"
_GRAPH_ONLY: Execution = "graph only"


@dataclass(frozen=True)
class Yardstick:
    """What artifacts are measured against: the reference, and the noise floors that their gates need, by type."""

    reference: Reference
    effort: Effort
    floors: Mapping[str, FloorRecord]


def make_yardstick(checkpoint: Checkpoint, effort: Effort, targets: Sequence[str], progress: Progress) -> Yardstick:
    """Runs the reference, and once more in each type that a target's gates are relative to."""
    from gptoss_export.validators.floor import measure_floor
    from gptoss_export.validators.gates import GATES
    from gptoss_export.validators.probes import default_probes
    from gptoss_export.validators.reference import run_reference

    reference = run_reference(checkpoint, default_probes(checkpoint, effort), progress=progress)
    floors: dict[str, FloorRecord] = {}
    for dtype in (GATES[name].floor_dtype for name in targets):
        if dtype is not None and dtype not in floors:
            floors[dtype] = measure_floor(checkpoint, reference, dtype, progress=progress)
    return Yardstick(reference, effort, floors)


def measure(
    folder: Path, manifest: Manifest, yardstick: Yardstick | None, threads: int | None, progress: Progress
) -> ParityReport | None:
    """Loads the artifact from disk, which shows that it loads, and measures it if there is something to measure by.

    Where this host cannot run its engine, that is its graph.
    """
    from gptoss_export.engines.targets import TARGETS
    from gptoss_export.validators.gates import GATES
    from gptoss_export.validators.parity import validate
    from gptoss_export.validators.report.schema import Binding, Engine

    name = manifest.target
    target, runs = TARGETS[name], TARGETS[name].execution(folder)
    if runs.not_executed_reason is None:
        opener, how = target.open_runner, _EXECUTED
    else:
        assert target.stand_in is not None
        opener, how = target.stand_in, _GRAPH_ONLY
    if yardstick is None and how == _GRAPH_ONLY:
        return None  # that a graph loads says nothing of its engine
    with progress.task(f"load {name}"):
        runner = opener(folder, threads)
    if yardstick is None:
        return None
    return validate(
        runner,
        yardstick.reference,
        target=name,
        effort=yardstick.effort,
        gates=GATES[name],
        floor=yardstick.floors.get(GATES[name].floor_dtype or ""),
        max_batch=runs.max_batch,
        binding=Binding(
            checkpoint={file: record.sha256 for file, record in manifest.checkpoint.items()},
            files={f: record.sha256 for f, record in manifest.files.items() if f not in REPORT_NAMES},
        ),
        engine_description=Engine(
            runs.name, runs.version, runs.provider, how, runs.not_executed_reason, runs.ran_instead
        ),
        progress=progress,
    )


def record(report: ParityReport, manifest: Manifest, folder: Path) -> Manifest:
    """Writes the report into the folder and its verdict into the manifest."""
    from gptoss_export.validators.report import content_sha256, write_report

    paths = write_report(report, folder)
    record = ParityRecord(report.outcome, report.effort, content_sha256(report))
    return manifest.with_parity(record, hash_files({path.name: path for path in paths}))


def first_failure(report: ParityReport) -> str:
    first = report.verdict.failures[0]
    measured = "nothing" if first.measured is None else f"{first.measured:g}"
    return f"gate {first.gate} in scenario {first.scenario}: measured {measured}, limit {first.limit:g}"
