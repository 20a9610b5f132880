"""The verdict: a pure function of what was measured and of the limits.

    judge(evidence, gates).passed

Nothing measured is a failure, never a pass: a scenario, a layer or a check that is absent, one without positions, a
figure that is missing or not a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptoss_export.validators.binomial import LEVEL, most_beside, most_by_chance
from gptoss_export.validators.consistency import CHECKS, ConsistencyCheck
from gptoss_export.validators.evidence import Evidence, ScenarioResult
from gptoss_export.validators.gates import Gates
from gptoss_export.validators.layers import LayerRecord
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.scenarios import SCENARIOS

EXCHANGED = 0.01
"""The rate at which positions of a 16-bit engine may have other experts by another way of asking, to any effect."""

CLOSE = 1e-9
"""A limit set by hand as a share that is a whole number of positions is not missed by rounding."""


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
        *scenario_cases(evidence.scenarios, gates),
        *_texts(evidence, gates),
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


def scenario_cases(scenarios: Sequence[ScenarioResult], gates: Gates) -> Iterator[Case]:
    """The gates of scenarios; those of SCENARIOS that are absent are among them."""
    found = {scenario.name: scenario for scenario in scenarios}
    for name in (*SCENARIOS, *sorted(set(found) - set(SCENARIOS))):
        scenario = found.get(name)
        if scenario is None or scenario.metrics.positions < 1:
            yield _absent(name)
            continue
        m, settled = scenario.metrics, scenario.settled
        yield _at_most(name, "non_finite", float(m.non_finite), 0.0)
        median = m.kl_median if "max_kl_median" in gates.by_hand else m.kl_median_low
        yield _at_most(name, "max_kl_median", median, gates.max_kl_median)
        if "max_kl_mean" in gates.by_hand:
            yield _at_most(name, "max_kl_mean", m.kl_mean, gates.max_kl_mean)
        where = f"settled positions of {name}"
        if settled.positions:
            yield _at_most(where, "max_kl_position", settled.kl_max, gates.max_kl_position)
        if "max_logit_diff" in gates.by_hand:
            yield _at_most(name, "max_logit_diff", m.logit_diff_max, gates.max_logit_diff)
        elif settled.positions:
            yield _at_most(where, "max_logit_diff", settled.logit_diff_max, gates.max_logit_diff)


def distribution_cases(where: str, m: Metrics, gates: Gates) -> Iterator[Case]:
    """The gates of positions that were all sent to the reference's experts, or are to be judged as if they were."""
    yield _at_most(where, "non_finite", float(m.non_finite), 0.0)
    yield _at_most(where, "max_kl_mean", m.kl_mean, gates.max_kl_mean)
    yield _at_most(where, "max_logit_diff", m.logit_diff_max, gates.max_logit_diff)


@dataclass(frozen=True)
class Top1:
    """How the best tokens of all distinct positions are judged.

    flips: positions where another is the artifact's; near_ties: those of them where the reference prefers its own by no
    more than `noise`, twice the largest logit difference that rounding alone shows in the replay; diverged: the others.
    most: so many diverged positions may be, at `level`; 0 where no near-tie can have sent a token elsewhere.
    """

    positions: int
    flips: int
    near_ties: int
    diverged: int
    noise: float
    most: int
    level: float


def judge_top1(evidence: Evidence, gates: Gates) -> Top1 | None:
    """None where nothing was measured."""
    texts, routing = evidence.texts, evidence.routing
    if texts is None or texts.positions < 1:
        return None
    by_hand = "min_top1_agreement" in gates.by_hand
    shown = None if routing is None else routing.replay.logit_diff_max
    noise = 0.0 if by_hand or shown is None else 2 * shown
    diverged = _beyond(texts.margins, noise)
    rate = 1 - gates.min_top1_agreement
    if by_hand:
        most = math.floor(rate * texts.positions + CLOSE)
    else:
        most = most_by_chance(texts.positions - texts.settled, rate)
        if gates.beside is not None:
            known = _beyond(gates.beside.margins, noise)
            most = max(most, most_beside(known, gates.beside.positions, texts.positions))
    flips = len(texts.margins)
    return Top1(texts.positions, flips, flips - diverged, diverged, noise, most, 1.0 if by_hand else LEVEL)


def _beyond(margins: Sequence[float], noise: float) -> int:
    return sum(margin > noise for margin in margins)


def _texts(evidence: Evidence, gates: Gates) -> Iterator[Case]:
    texts, top1 = evidence.texts, judge_top1(evidence, gates)
    if texts is None or top1 is None:
        yield _absent("texts")
        return
    yield _at_most("texts", "max_text_kl_mean", texts.kl_mean, gates.max_text_kl_mean)
    limit = 1 - top1.most / top1.positions
    agreement = 1 - top1.diverged / top1.positions
    yield Case("texts", "min_top1_agreement", agreement, limit, top1.diverged <= top1.most)


def most_diverged(token_layers: int, gates: Gates) -> int:
    """How many of so many tokens x layers may diverge."""
    rate = min(gates.max_diverged, 1.0)
    if "max_diverged" in gates.by_hand:
        return math.floor(rate * token_layers + CLOSE)
    most = most_by_chance(token_layers, rate)
    if gates.beside is None:
        return most
    return max(most, most_beside(gates.beside.diverged, gates.beside.token_layers, token_layers))


def _routing(evidence: Evidence, gates: Gates) -> Iterator[Case]:
    routing = evidence.routing
    if routing is None or not routing.token_layers:
        yield _absent("routing")
        return
    seen = {row.layer for row in routing.layers if row.tokens}
    for layer in sorted(set(range(evidence.num_layers)) - seen):
        yield _absent(f"routing of layer {layer}")
    most = most_diverged(routing.token_layers, gates)
    limit = most / routing.token_layers
    yield Case("routing", "max_diverged", routing.diverged_share, limit, routing.diverged <= most)
    if routing.replay.positions < 1:
        yield _absent("routing replay")
    else:
        yield from distribution_cases("routing replay", routing.replay, gates)


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
    for name in CHECKS:
        yield from _against_itself([check for check in evidence.consistency if check.name == name], gates)


def _against_itself(checks: Sequence[ConsistencyCheck], gates: Gates) -> Iterator[Case]:
    """All checks of one name: as many positions as `most_beyond` says are set aside, those that differ most."""
    diffs = sorted((diff for check in checks for diff in check.diffs), reverse=True)
    others = diffs[most_beyond(checks, gates) :]
    for check in checks:
        where = f"engine against itself: {check.name} at {check.length}"
        gate = "max_repeat_diff" if check.name == "repeat" else "max_self_diff"
        measured = check.logit_diff_max
        if measured is not None:
            measured = min(measured, others[0] if others else 0.0)
        yield _at_most(where, gate, measured, getattr(gates, gate))


def most_beyond(checks: Sequence[ConsistencyCheck], gates: Gates) -> int:
    """How many positions of these checks may be beyond their limit: by another way an engine that rounds to 16 bits may
    send a token to other experts, which no limit on rounding covers, and in one of 100 positions that may show."""
    gate = "max_repeat_diff" if any(check.name == "repeat" for check in checks) else "max_self_diff"
    if gates.beside is None or gate in gates.by_hand or not getattr(gates, gate):
        return 0
    return most_by_chance(sum(check.positions for check in checks), EXCHANGED)
