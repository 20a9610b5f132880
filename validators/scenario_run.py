"""Runs the scenarios: the engine, asked in every way of `scenarios.plan`, against the reference's logits.

The runner is fed the probes' own tokens whatever it answers, so that one wrong position does not spoil the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptoss_export.engines.runner import KVCache, Runner, Step, Tokens
from gptoss_export.exporter.errors import SessionError
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.compare import compare_rows
from gptoss_export.validators.evidence import ScenarioResult
from gptoss_export.validators.metrics import Accumulator, PositionBucket, WorstPosition
from gptoss_export.validators.positions import Texts, TextsRecord
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.scenarios import Call, Case, Effort, plan

LIVE_BYTES = 104 << 20
"""Logits that one call of the engine may return: 135 positions of a vocabulary of 201088. Longer prefills
are asked for in several pieces."""

WORST = 10


@dataclass(frozen=True)
class ScenarioRun:
    """What came out of each scenario, in the order of SCENARIOS; calls: by its name, how many it took."""

    calls: Mapping[str, int]
    accumulators: Mapping[str, Accumulator]

    def results(self, texts: Texts) -> tuple[ScenarioResult, ...]:
        """The scenarios' figures, and those of their settled positions."""
        return tuple(
            ScenarioResult(name, self.calls[name], accumulator.metrics(), texts.settled_figures(accumulator.placed()))
            for name, accumulator in self.accumulators.items()
        )

    def pooled(self, texts: Texts) -> TextsRecord | None:
        """All scenarios together; None where there is none."""
        rows = [accumulator.placed() for accumulator in self.accumulators.values()]
        return texts.pool(rows) if rows else None

    @property
    def worst(self) -> Mapping[str, tuple[WorstPosition, ...]]:
        """The positions with the largest KL of each scenario, by its name."""
        return {name: accumulator.worst(WORST) for name, accumulator in self.accumulators.items()}

    @property
    def by_position(self) -> Mapping[int, tuple[PositionBucket, ...]]:
        """KL along the text in `prefill`, by probe."""
        found = self.accumulators.get("prefill")
        return {} if found is None else found.by_position()


def live_rows(vocab_size: int) -> int:
    """Rows of logits that one call may return."""
    return max(LIVE_BYTES // (4 * vocab_size), 1)


def run_scenarios(
    runner: Runner,
    reference: Reference,
    *,
    effort: Effort,
    max_batch: int | None = None,
    progress: Progress | None = None,
) -> ScenarioRun:
    """Every scenario that the probes are long enough for, in the order of SCENARIOS.

    max_batch: rows that the engine takes. Raises SessionError when the engine answers with logits of a wrong shape, and
    whatever the runner raises.
    """
    if runner.vocab_size != reference.vocab_size:
        raise SessionError(
            f"the engine has a vocabulary of {runner.vocab_size}, the checkpoint of {reference.vocab_size}",
            "Export this checkpoint again: the artifact was made from another one.",
        )
    lengths = [len(probe.ids) for probe in reference.probes]
    cases = plan(lengths, reference.config.sliding_window, live_rows(reference.vocab_size), effort, max_batch)
    total = sum(len(case.calls) for scenario in cases.values() for case in scenario)
    accumulators = {name: Accumulator() for name in cases}
    with (progress or SilentProgress()).task("parity", total=total) as task:
        for name, scenario in cases.items():
            for case in scenario:
                _run(runner, reference, case, accumulators[name])
                task.advance(len(case.calls))
    calls = {name: sum(len(case.calls) for case in scenario) for name, scenario in cases.items()}
    return ScenarioRun(calls, accumulators)


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
            compare_rows(reference, probe, begin + shift, rows, accumulator)
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
