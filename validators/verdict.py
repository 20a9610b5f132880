"""The verdict: a pure function of what was measured and of the limits.

    judge(evidence, gates).passed

Nothing measured is a failure, never a pass: a scenario, a layer or a check that is absent, one without positions, a
figure that is missing or not a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptoss_export.validators.consistency import CHECKS
from gptoss_export.validators.evidence import Evidence, ScenarioResult
from gptoss_export.validators.gates import Gates
from gptoss_export.validators.layers import LayerRecord
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.scenarios import SCENARIOS


@dataclass(frozen=True)
class Case:
    """One gate at one place, kept or not. measured: None where nothing could be measured.

    A gate named min_... needs at least its limit, every other at most.
    """

    where: str
    gate: str
    measured: float | None
    limit: float
    kept: bool


@dataclass(frozen=True)
class Failure:
    """A gate that was not kept."""

    where: str
    gate: str
    measured: float | None
    limit: float


@dataclass(frozen=True)
class Verdict:
    """passed exactly when failures is empty."""

    passed: bool
    failures: tuple[Failure, ...]


def judge(evidence: Evidence, gates: Gates) -> Verdict:
    """Scenarios beyond the known ones are held to the same gates as those."""
    failures = tuple(Failure(c.where, c.gate, c.measured, c.limit) for c in cases(evidence, gates) if not c.kept)
    return Verdict(not failures, failures)


def cases(evidence: Evidence, gates: Gates) -> list[Case]:
    """Every gate at every place, in the order of a report."""
    return [
        *scenario_cases(evidence.scenarios, gates.with_flips() if _flipped(evidence, gates) else gates),
        *_routing(evidence, gates),
        *_layers(evidence, gates),
        *_ends(evidence, gates),
        *_ranges(evidence, gates),
        *_consistency(evidence, gates),
    ]


def _at_most(where: str, gate: str, measured: float | None, limit: float) -> Case:
    # Written so that NaN, for which every comparison is false, fails.
    return Case(where, gate, measured, limit, measured is not None and measured <= limit)


def _absent(where: str) -> Case:
    return Case(where, "measured", 0.0, 1.0, False)


def _flipped(evidence: Evidence, gates: Gates) -> bool:
    """Whether tokens changed experts, and no more of them diverged than may."""
    routing = evidence.routing
    if routing is None or not routing.flipped:
        return False
    return routing.diverged_share is not None and routing.diverged_share <= gates.max_diverged


def scenario_cases(scenarios: Sequence[ScenarioResult], gates: Gates) -> Iterator[Case]:
    """The cases of the scenarios alone; known ones that are absent are among them."""
    found = {scenario.name: scenario.metrics for scenario in scenarios}
    for name in (*SCENARIOS, *sorted(set(found) - set(SCENARIOS))):
        m = found.get(name)
        if m is None or m.positions < 1:
            yield _absent(name)
            continue
        yield from _distribution(name, m, gates)
        top1 = m.top1_agreement
        kept = top1 is not None and (top1 >= gates.min_top1_agreement or m.disagreements <= gates.spare_positions)
        yield Case(name, "min_top1_agreement", top1, gates.min_top1_agreement, kept)


def _distribution(where: str, m: Metrics, gates: Gates) -> Iterator[Case]:
    yield _at_most(where, "non_finite", float(m.non_finite), 0.0)
    yield _at_most(where, "max_kl_mean", m.kl_mean, gates.kl_limit(m.positions))
    yield _at_most(where, "max_logit_diff", m.logit_diff_max, gates.max_logit_diff)


def _routing(evidence: Evidence, gates: Gates) -> Iterator[Case]:
    routing = evidence.routing
    if routing is None or not routing.token_layers:
        yield _absent("routing")
        return
    seen = {row.layer for row in routing.layers if row.tokens}
    for layer in sorted(set(range(evidence.num_layers)) - seen):
        yield _absent(f"routing of layer {layer}")
    yield _at_most("routing", "max_diverged", routing.diverged_share, gates.max_diverged)
    if routing.replay.positions < 1:
        yield _absent("routing replay")
    else:
        yield from _distribution("routing replay", routing.replay, gates)


def _layers(evidence: Evidence, gates: Gates) -> Iterator[Case]:
    found = {record.layer: record for record in evidence.layers}
    for layer in sorted(set(range(evidence.num_layers)) | set(found)):
        record = found.get(layer)
        if record is None or record.tokens < 1:
            yield _absent(f"layer {layer}")
        else:
            yield from _layer(record, gates)


def _layer(record: LayerRecord, gates: Gates) -> Iterator[Case]:
    where = f"layer {record.layer}"
    yield _at_most(where, "non_finite", float(record.non_finite), 0.0)
    yield _at_most(f"{where} attention", "max_layer_error", record.attention, gates.max_layer_error)
    yield _at_most(f"{where} attention with cache", "max_layer_error", record.cached, gates.max_layer_error)
    yield _at_most(f"{where} router", "max_router_error", record.router, gates.max_router_error)
    yield _at_most(f"{where} experts", "max_layer_error", record.experts, gates.max_layer_error)


def _ends(evidence: Evidence, gates: Gates) -> Iterator[Case]:
    record = evidence.ends
    if record is None or record.tokens < 1:
        yield _absent("ends")
        return
    yield _at_most("ends", "non_finite", float(record.non_finite), 0.0)
    for where, error in (("embedding", record.embedding), ("final norm", record.norm), ("lm_head", record.lm_head)):
        yield _at_most(where, "max_layer_error", error, gates.max_layer_error)


def _ranges(evidence: Evidence, gates: Gates) -> Iterator[Case]:
    for layer in sorted(set(range(evidence.num_layers)) - {record.layer for record in evidence.ranges}):
        yield _absent(f"range of layer {layer}")
    for record in evidence.ranges:
        where = f"range of layer {record.layer} in {record.type}"
        bits, least = record.headroom_bits, gates.min_headroom_bits
        yield Case(where, "min_headroom_bits", bits, least, bits is not None and bits >= least)
        yield _at_most(where, "saturated", float(record.saturated), 0.0)


def _consistency(evidence: Evidence, gates: Gates) -> Iterator[Case]:
    found = {check.name for check in evidence.consistency if check.positions > 0}
    for name in CHECKS:
        if name not in found:
            yield _absent(f"engine against itself: {name}")
    for check in evidence.consistency:
        where = f"engine against itself: {check.name} at {check.length}"
        gate = "max_repeat_diff" if check.name == "repeat" else "max_self_diff"
        yield _at_most(where, gate, check.logit_diff_max, getattr(gates, gate))
