"""Parity of an artifact with its model: every scenario against the reference's teacher-forced logits.

    report = validate(runner, reference, target="ort-cpu", effort="quick", gates=GATES["ort-cpu"],
                      binding=Binding(checkpoint={...}, files={...}),
                      engine_description=Engine("onnxruntime", "1.31.1", "CPUExecutionProvider"))
    write_report(report, folder)

A target in 16 bits also takes floor=measure_floor(checkpoint, reference, "float16"), or whichever dtype its
gates are for. The runner is fed the probes' own tokens whatever it answers, so that one wrong position does
not spoil the next.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from gptoss_export.engines.runner import KVCache, Logits, Runner, Step, Tokens
from gptoss_export.exporter.errors import NotValidatedError, SessionError
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.floor import FloorRecord
from gptoss_export.validators.gates import GatePolicy, judge
from gptoss_export.validators.metrics import Accumulator
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.report.schema import (
    SCHEMA_VERSION,
    Binding,
    Engine,
    Machine,
    ParityReport,
    ProbeRecord,
    ScenarioResult,
)
from gptoss_export.validators.scenarios import Call, Case, Effort, plan

LIVE_BYTES = 104 << 20
"""Logits that one call of the engine may return: 135 positions of a vocabulary of 201088. Longer prefills
are asked for in several pieces."""

COMPARED_AT_ONCE = 64
PACKAGES = ("gptoss-export", "numpy", "torch", "transformers")


def validate(
    runner: Runner,
    reference: Reference,
    *,
    target: str,
    effort: Effort,
    gates: GatePolicy,
    floor: FloorRecord | None = None,
    binding: Binding,
    engine_description: Engine,
    max_batch: int | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Measures every scenario and judges it; the report's outcome says whether the artifact passed.

    floor: over the reference's probes, where the gates need one. max_batch: rows that the engine takes. Raises
    NotValidatedError, before anything is run, for a floor that is missing, none, or over other probes;
    SessionError when the engine answers with logits of a wrong shape; and whatever the runner raises.
    """
    limits = gates.resolve(floor)
    tokens = sum(len(probe.ids) for probe in reference.probes)
    if floor is not None and floor.metrics.positions != tokens:
        raise NotValidatedError(
            f"the noise floor is over {floor.metrics.positions} positions, the probes are {tokens} tokens",
            "Measure the floor with the reference that the artifact is compared with.",
        )
    scenarios = tuple(measure(runner, reference, effort=effort, max_batch=max_batch, progress=progress))
    return ParityReport(
        schema_version=SCHEMA_VERSION,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        machine=Machine(platform.platform(), _cpu(), os.cpu_count() or 1),
        reference=reference.description,
        target=target,
        engine=engine_description,
        effort=effort,
        sliding_window=reference.config.sliding_window,
        probes=tuple(ProbeRecord(p.name, len(p.ids), p.sha256) for p in reference.probes),
        scenarios=scenarios,
        policy=gates,
        floor=floor,
        gates=limits,
        verdict=judge({s.name: s.metrics for s in scenarios}, limits),
        binding=binding,
    )


def measure(
    runner: Runner,
    reference: Reference,
    *,
    effort: Effort,
    max_batch: int | None = None,
    progress: Progress | None = None,
) -> list[ScenarioResult]:
    """The metrics of every scenario that the probes are long enough for, in the order of SCENARIOS."""
    if runner.vocab_size != reference.vocab_size:
        raise SessionError(
            f"the engine has a vocabulary of {runner.vocab_size}, the checkpoint of {reference.vocab_size}",
            "Export this checkpoint again: the artifact was made from another one.",
        )
    lengths = [len(probe.ids) for probe in reference.probes]
    live = max(LIVE_BYTES // (4 * reference.vocab_size), 1)
    cases = plan(lengths, reference.config.sliding_window, live, effort, max_batch)
    total = sum(len(case.calls) for scenario in cases.values() for case in scenario)
    results = []
    with (progress or SilentProgress()).task("parity", total=total) as task:
        for name, scenario in cases.items():
            accumulator = Accumulator()
            for case in scenario:
                _run(runner, reference, case, accumulator)
                task.advance(len(case.calls))
            calls = sum(len(case.calls) for case in scenario)
            results.append(ScenarioResult(name, calls, accumulator.metrics()))
    return results


def _run(runner: Runner, reference: Reference, case: Case, accumulator: Accumulator) -> None:
    """Runs one case and compares all logits that belong to tokens."""
    cache: KVCache | None = None
    past = [0] * len(case.rows)
    for call in case.calls:
        ids, mask = _batch(reference, case, call, past)
        step = runner.forward(ids, None if mask.all() else mask, cache, call.keep)
        cache = step.cache
        kept = call.keep or call.width
        _check(step, (len(case.rows), kept, reference.vocab_size))
        for row, (probe, length) in enumerate(zip(case.rows, call.lengths, strict=True)):
            # Column c of this call holds position c + shift of the row's probe.
            first = call.width - length if case.side == "left" else 0
            shift = past[row] - first
            begin = max(first, call.width - kept)
            rows = step.logits[row, begin - (call.width - kept) : first + length - (call.width - kept)]
            _compare(reference, probe, begin + shift, rows, accumulator)
            past[row] += length


def _batch(reference: Reference, case: Case, call: Call, past: Sequence[int]) -> tuple[Tokens, Tokens]:
    """input_ids and attention_mask [rows, width] of one call; padding is token 0, which must not be seen."""
    ids = np.zeros((len(case.rows), call.width), np.int64)
    mask = np.zeros_like(ids)
    for row, (probe, length) in enumerate(zip(case.rows, call.lengths, strict=True)):
        first = call.width - length if case.side == "left" else 0
        ids[row, first : first + length] = reference.probes[probe].ids[past[row] : past[row] + length]
        mask[row, first : first + length] = 1
    return ids, mask


def _check(step: Step, shape: tuple[int, int, int]) -> None:
    if step.logits.shape != shape or step.logits.dtype != np.float32:
        raise SessionError(
            f"the engine returned logits {step.logits.dtype} {list(step.logits.shape)} where float32 "
            f"{list(shape)} were asked for",
            "Report this as a bug: the engine's runner breaks its protocol.",
        )


def _compare(reference: Reference, probe: int, position: int, candidate: Logits, accumulator: Accumulator) -> None:
    """Compares rows of one probe from that position on, a few at a time."""
    for start in range(0, len(candidate), COMPARED_AT_ONCE):
        rows = candidate[start : start + COMPARED_AT_ONCE]
        at = position + start
        accumulator.add(reference.logits(probe, at, at + len(rows)), rows)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu() -> str:
    """The processor's name as the kernel gives it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line)
    return next(names, platform.machine())
