"""The stage that measures: what artifacts are compared with, what runs them on this host, and what goes on record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.artifact import RECORD_NAMES, Manifest, ParityRecord
from gptoss_export.exporter.errors import PromptError
from gptoss_export.exporter.planning.request import Effort, MeasureOptions
from gptoss_export.exporter.progress import Progress
from gptoss_export.exporter.weights import disk_errors, hash_files

if TYPE_CHECKING:
    from gptoss_export.exporter.checkpoint.tensors import Checkpoint
    from gptoss_export.validators.floor import FloorDtype, FloorRecord
    from gptoss_export.validators.parity import Yardstick
    from gptoss_export.validators.report import ParityReport
    from gptoss_export.validators.report.schema import Execution

_EXECUTED: Execution = "executed"
_GRAPH_ONLY: Execution = "graph only"
_FLOORS: tuple[FloorDtype, ...] = ("bfloat16", "float16")


def make_yardstick(
    checkpoint: Checkpoint,
    files: Mapping[str, str],
    effort: Effort,
    targets: Sequence[str],
    options: MeasureOptions,
    progress: Progress,
) -> Yardstick:
    """Runs the reference, or takes it out of the cache, and does so again in each type that a noise floor is needed in.

    files: sha256 of the checkpoint's files by name, which is what the cache goes by. A full measurement has the floors
    of all types, a quick one those that a target's gates follow from.
    """
    from gptoss_export.validators.floor import measure_floor
    from gptoss_export.validators.parity import Yardstick
    from gptoss_export.validators.probes import default_probes
    from gptoss_export.validators.prompts import read_prompts
    from gptoss_export.validators.reference_cache import default_cache, reference_for

    probes = default_probes(checkpoint, effort)
    if options.prompts is not None:
        given = read_prompts(options.prompts, checkpoint)
        if taken := {probe.name for probe in probes} & {probe.name for probe in given}:
            raise PromptError(
                f"{options.prompts} names a prompt {min(taken)!r}, as a probe of every measurement is",
                "Give it another name.",
            )
        probes += given
    cache = default_cache()
    reference = reference_for(checkpoint, files, probes, "float32", cache=cache, progress=progress)
    floors: dict[str, FloorRecord] = {}
    for dtype in floors_of(effort, targets):
        floors[dtype] = measure_floor(checkpoint, reference, dtype, files=files, cache=cache, progress=progress)
    return Yardstick(reference, effort, floors)


def floors_of(effort: Effort, targets: Sequence[str]) -> tuple[FloorDtype, ...]:
    """The types whose noise floors a measurement has."""
    from gptoss_export.validators.gates import GATES

    wanted = {GATES[name].floor_dtype for name in targets}
    return tuple(dtype for dtype in _FLOORS if effort == "full" or dtype in wanted)


def measure(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    yardstick: Yardstick | None,
    options: MeasureOptions,
    threads: int | None,
    progress: Progress,
) -> ParityReport | None:
    """Loads the artifact from disk, which shows that it loads, and measures it if there is something to measure by.

    checkpoint: the weights in it. Where this host cannot run its engine, what is measured is its graph.
    """
    from gptoss_export.engines.targets import TARGETS
    from gptoss_export.validators.gates import GATES
    from gptoss_export.validators.parity import Subject, validate
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
    subject = Subject(
        target=name,
        runner=runner,
        inspector=target.inspect(folder, threads),
        checkpoint=checkpoint,
        engine=Engine(runs.name, runs.version, runs.provider, how, runs.not_executed_reason, runs.ran_instead),
        binding=Binding(
            checkpoint={file: record.sha256 for file, record in manifest.checkpoint.items()},
            files={f: record.sha256 for f, record in manifest.files.items() if f not in RECORD_NAMES},
            model=manifest.origin.model,
        ),
        max_batch=runs.max_batch,
        max_context=runs.max_context,
    )
    return validate(
        subject,
        yardstick,
        policy=GATES[name],
        overrides=options.overrides,
        with_bisection=options.bisection,
        command=options.command(yardstick.effort),
        progress=progress,
    )


def record(report: ParityReport, manifest: Manifest, folder: Path) -> Manifest:
    """Writes the report into the folder and its verdict into the manifest."""
    from gptoss_export.validators.report import write_report

    with disk_errors("the parity report"):
        paths = write_report(report, folder)
    return manifest.with_parity(parity_record(report), hash_files({path.name: path for path in paths}))


def parity_record(report: ParityReport) -> ParityRecord:
    """What a manifest says of a report."""
    from gptoss_export.validators.report import content_sha256

    return ParityRecord(report.outcome, report.effort, content_sha256(report), report.loosened)


def first_failure(report: ParityReport) -> str:
    first = report.verdict.failures[0]
    measured = "nothing" if first.measured is None else f"{first.measured:g}"
    return f"gate {first.gate} in {first.where}: measured {measured}, limit {first.limit:g}"
