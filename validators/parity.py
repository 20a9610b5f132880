"""Parity of an artifact with its model: what was measured of it, its gates, and the verdict.

    yardstick = Yardstick(reference, "quick", {})
    report = validate(subject, yardstick, policy=GATES["ort-cpu"])
    write_report(report, folder)

A target in 16 bits also needs a noise floor in its type, measured over the same probes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from gptoss_export.engines.inspector import Inspector
from gptoss_export.engines.machine import describe_machine
from gptoss_export.engines.runner import Runner
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.clock import now
from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.bisect import bisect
from gptoss_export.validators.consistency import measure_consistency
from gptoss_export.validators.ends import measure_ends
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.floor import FloorRecord
from gptoss_export.validators.gates import GatePolicy, override
from gptoss_export.validators.layers import measure_layers
from gptoss_export.validators.positions import Texts
from gptoss_export.validators.probes import Probe, long_probe
from gptoss_export.validators.prompts import decode
from gptoss_export.validators.ranges import RangeMeter
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.replay import measure_routing
from gptoss_export.validators.report.schema import (
    SCHEMA_VERSION,
    Binding,
    Engine,
    KLByPosition,
    Machine,
    ParityReport,
    ProbeRecord,
    WorstText,
)
from gptoss_export.validators.scenario_run import WORST, ScenarioRun, live_rows, run_scenarios
from gptoss_export.validators.scenarios import Effort
from gptoss_export.validators.verdict import judge

PACKAGES = ("gptoss-export", "numpy", "torch", "transformers")
CONTEXT_TOKENS = 24
CONTEXT_CHARACTERS = 120


@dataclass(frozen=True)
class Subject:
    """An artifact, opened, and what it is.

    inspector: looks into what `runner` runs, or into the graph of an engine that shows nothing of itself. checkpoint:
    the weights that lie in the artifact. max_batch, max_context: rows and positions that the engine takes, None for any
    number.
    """

    target: str
    runner: Runner
    inspector: Inspector
    checkpoint: Checkpoint
    engine: Engine
    binding: Binding
    max_batch: int | None = None
    max_context: int | None = None


@dataclass(frozen=True)
class Yardstick:
    """What artifacts are measured against: the reference, and noise floors by type."""

    reference: Reference
    effort: Effort
    floors: Mapping[str, FloorRecord]


def validate(
    subject: Subject,
    yardstick: Yardstick,
    *,
    policy: GatePolicy,
    overrides: Mapping[str, float] | None = None,
    with_bisection: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> ParityReport:
    """Measures everything and judges it; the report's outcome says whether the artifact passed.

    overrides: gates set to other limits than the table's. Raises NotValidatedError, before anything is run, for a floor
    that is missing, none, or over other probes; ValueError for an override that is none; SessionError when the engine
    answers with logits of a wrong shape; and whatever the runner raises.
    """
    reference = yardstick.reference
    table = policy.resolve(yardstick.floors.get(policy.floor_dtype or ""))
    gates = override(table, overrides or {})
    tokens = sum(len(probe.ids) for probe in reference.probes)
    for floor in yardstick.floors.values():
        if floor.metrics.positions != tokens or floor.texts.positions > tokens:
            raise NotValidatedError(
                f"the noise floor is over {floor.metrics.positions} positions, the probes are {tokens} tokens",
                "Measure the floor with the reference that the artifact is compared with.",
            )
    progress = progress or SilentProgress()
    run = run_scenarios(
        subject.runner, reference, effort=yardstick.effort, max_batch=subject.max_batch, progress=progress
    )
    evidence = _look_into(subject, reference, yardstick.effort, run, progress)
    bisection = None
    if with_bisection:
        bisection = bisect(subject.inspector, subject.checkpoint, reference, evidence, gates, progress=progress)
    here = describe_machine()
    return ParityReport(
        schema_version=SCHEMA_VERSION,
        created_at=now(),
        command=tuple(command),
        versions=_versions(),
        machine=Machine(here.platform, here.cpu, here.cores),
        reference=reference.description,
        target=subject.target,
        engine=subject.engine,
        effort=yardstick.effort,
        sliding_window=reference.config.sliding_window,
        probes=tuple(ProbeRecord(p.name, len(p.ids), p.sha256) for p in reference.probes),
        evidence=evidence,
        worst=_worst(run, reference, decode(subject.checkpoint)),
        kl_by_position=_by_position(run, reference),
        bisection=bisection,
        policy=policy,
        floors=_own_floors(yardstick, policy),
        overrides=dict(overrides or {}),
        table_gates=table,
        gates=gates,
        verdict=judge(evidence, gates),
        binding=subject.binding,
    )


def _own_floors(yardstick: Yardstick, policy: GatePolicy) -> tuple[FloorRecord, ...]:
    """A quick report has the floor of its own gates alone, so that it is the same whatever was exported beside it."""
    floors = yardstick.floors.values()
    return tuple(floor for floor in floors if yardstick.effort == "full" or floor.dtype == policy.floor_dtype)


def _look_into(
    subject: Subject, reference: Reference, effort: Effort, run: ScenarioRun, progress: Progress
) -> Evidence:
    meter = RangeMeter(reference.trace.peaks)
    rows = live_rows(reference.vocab_size)
    layers = measure_layers(subject.inspector, reference, meter.add, progress=progress)
    ends = measure_ends(subject.inspector, reference, rows, progress=progress)
    errors = [record.router for record in layers]
    routing = measure_routing(subject.inspector, reference, errors, rows, progress=progress)
    texts = Texts(reference, [row.replay_error for row in routing.layers])
    consistency = measure_consistency(
        subject.runner,
        [probe.ids for probe in reference.probes],
        reference.config,
        effort,
        long=_long_ids(subject.checkpoint),
        max_batch=subject.max_batch,
        max_context=subject.max_context,
        live=rows,
        progress=progress,
    )
    return Evidence(
        num_layers=reference.config.num_layers,
        scenarios=run.results(texts),
        texts=run.pooled(texts),
        routing=routing,
        layers=layers,
        ends=ends,
        ranges=meter.records(subject.checkpoint),
        consistency=consistency,
        looked_into=subject.inspector.description,
    )


def _long_ids(checkpoint: Checkpoint) -> Sequence[int] | None:
    probe = long_probe(checkpoint)
    return None if probe is None else probe.ids


def _worst(
    run: ScenarioRun, reference: Reference, text: Callable[[Sequence[int]], str] | None
) -> tuple[WorstText, ...]:
    """The positions with the largest KL of all scenarios, each once, in the scenario where it is worst."""
    found: dict[tuple[int, int], WorstText] = {}
    for name, position in sorted(
        ((name, position) for name, worst in run.worst.items() for position in worst), key=lambda pair: -pair[1].kl
    ):
        place = position.probe, position.position
        if place not in found and len(found) < WORST:
            probe = reference.probes[position.probe]
            found[place] = WorstText(
                scenario=name,
                probe=probe.name,
                position=position.position,
                kl=position.kl,
                reference=position.reference_token,
                candidate=position.candidate_token,
                following=position.following,
                context=_context(probe, position.position, text),
                text_reference=None if text is None else text([position.reference_token]),
                text_candidate=None if text is None else text([position.candidate_token]),
            )
    return tuple(found.values())


def _context(probe: Probe, position: int, text: Callable[[Sequence[int]], str] | None) -> str | None:
    if text is None:
        return None
    return text(probe.ids[max(position + 1 - CONTEXT_TOKENS, 0) : position + 1])[-CONTEXT_CHARACTERS:]


def _by_position(run: ScenarioRun, reference: Reference) -> tuple[KLByPosition, ...]:
    return tuple(
        KLByPosition(
            probe=reference.probes[probe].name,
            start=tuple(bucket.start for bucket in buckets),
            stop=tuple(bucket.stop for bucket in buckets),
            mean=tuple(bucket.kl_mean for bucket in buckets),
            max=tuple(bucket.kl_max for bucket in buckets),
        )
        for probe, buckets in sorted(run.by_position.items())
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
