"""Every figure of a report by name and place, with the limit that it is measured by.

    figures_of(report)["decode", "kl_mean"].value

A figure's badness is 0 where nothing is wrong and grows with what is. `JUDGED` says of each figure by which gate it is
held, or which gate gives its scale where no gate is about it, and by which rule of `significance` a difference counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from gptoss_export.validators.gates import override
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.routing import RoutingRecord
from gptoss_export.validators.verdict import cases, judge_top1

KL_NOISE = 1e-12
LOGIT_NOISE = 1e-5
LAYER_NOISE = 1e-6
COSINE_NOISE = 1e-9
RATIO_NOISE = 1e-5
"""What another order of summation shows in float32, however narrow a gate is."""

RANK_NOISE = 5.0
"""A token among the five best is where rounding may put it."""

SUBNORMAL_NOISE = 100.0

Rule = Literal["size", "maximum", "count", "standard error", "condition", "none"]
Key = tuple[str, str]


@dataclass(frozen=True)
class Figure:
    """value: as the report has it; badness: at least 0. Both None where it was asked for and could not be measured.

    limit: of the badness, None without a gate; held: the gate is about this very figure, else its limit is a scale.
    A count is of `of` events that could have been, each of them in it `repeats` times; family: as many counts share one
    level. error: standard error of the badness.
    """

    value: float | None
    badness: float | None
    rule: Rule
    noise: float = 0.0
    gate: str | None = None
    limit: float | None = None
    held: bool = False
    of: int | None = None
    repeats: float = 1.0
    family: int = 1
    error: float | None = None

    @property
    def rate(self) -> float | None:
        """The badness, of a count as a share of what could have been."""
        return self.badness / self.of if self.badness is not None and self.of else self.badness

    @property
    def share(self) -> float | None:
        """Of its limit that it uses up, infinite beyond a limit of 0; None where no gate is about it."""
        rate = self.rate
        if self.limit is None or rate is None:
            return None
        return rate / self.limit if self.limit else math.inf if rate else 0.0


@dataclass(frozen=True)
class Judged:
    """gate: what the figure is held to, or whose limit is its scale; badness: of a value; limit: of the badness, from
    the gate's."""

    rule: Rule
    gate: str | None = None
    scale: bool = False
    noise: float = 0.0
    badness: Callable[[float], float] = abs
    limit: Callable[[float], float] = abs


def _short_of_one(value: float) -> float:
    return max(1 - value, 0.0)


def _log_off_one(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio else math.inf


def _of_range(bits: float) -> float:
    # Beyond 1000 bits a power of two would be no float.
    return math.pow(2.0, min(max(-bits, -1000.0), 1000.0))


def _root_of_kl(limit: float) -> float:
    """KL is half the mean square of log p - log q, as long as that is small."""
    return math.sqrt(2 * limit)


def _cosine_of_error(limit: float) -> float:
    """1 - cosine of two vectors whose relative distance is so much."""
    return limit * limit / 2


def _held(rule: Rule, gate: str, noise: float = 0.0, limit: Callable[[float], float] = abs) -> Judged:
    return Judged(rule, gate, noise=noise, limit=limit)


def _scaled(
    rule: Rule,
    gate: str,
    noise: float,
    badness: Callable[[float], float] = abs,
    limit: Callable[[float], float] = abs,
) -> Judged:
    return Judged(rule, gate, True, noise, badness, limit)


_COSINE = _scaled("maximum", "max_layer_error", COSINE_NOISE, _short_of_one, _cosine_of_error)

JUDGED: Mapping[str, Judged] = {
    "non_finite": _held("condition", "non_finite"),
    "kl_mean": _held("size", "max_kl_mean", KL_NOISE),
    "kl_median": _scaled("size", "max_kl_median", KL_NOISE),
    "kl_median_low": _held("size", "max_kl_median", KL_NOISE),
    "kl_position": _held("maximum", "max_kl_position", KL_NOISE),
    "text_kl_mean": _held("size", "max_text_kl_mean", KL_NOISE),
    "kl_p99": _scaled("maximum", "max_kl_mean", KL_NOISE),
    "kl_p999": _scaled("maximum", "max_kl_mean", KL_NOISE),
    "kl_max": _scaled("maximum", "max_kl_mean", KL_NOISE),
    "reverse_kl_mean": _scaled("size", "max_kl_mean", KL_NOISE),
    "reverse_kl_max": _scaled("maximum", "max_kl_mean", KL_NOISE),
    "logit_diff_mean": _scaled("size", "max_logit_diff", LOGIT_NOISE),
    "logit_diff_max": _held("maximum", "max_logit_diff", LOGIT_NOISE),
    "top1_disagreements": _scaled("count", "min_top1_agreement", 0.0, limit=_short_of_one),
    "top1_diverged": _held("count", "min_top1_agreement", limit=_short_of_one),
    "top5_misses": Judged("count"),
    "top10_misses": Judged("count"),
    # That of many positions some have another best token is what top1_disagreements counts.
    "rank_mean": Judged("none"),
    "rank_max": Judged("maximum", noise=RANK_NOISE),
    "cosine_mean": _COSINE,
    "cosine_min": _COSINE,
    "text_prob_diff_mean": _scaled("size", "max_kl_mean", RATIO_NOISE, limit=_root_of_kl),
    "text_prob_diff_max": _scaled("maximum", "max_kl_mean", RATIO_NOISE, limit=_root_of_kl),
    "perplexity_ratio": _scaled("standard error", "max_kl_mean", RATIO_NOISE, _log_off_one, _root_of_kl),
    "diverged": _held("count", "max_diverged"),
    "flipped": Judged("count"),
    "layer_error": _held("size", "max_layer_error", LAYER_NOISE),
    "router_error": _held("maximum", "max_router_error", LOGIT_NOISE),
    "headroom_bits": Judged("size", "min_headroom_bits", badness=_of_range, limit=_of_range),
    "saturated": _held("condition", "saturated"),
    "subnormal": Judged("size", noise=SUBNORMAL_NOISE),
    "self_diff": _held("maximum", "max_self_diff", LOGIT_NOISE),
    "self_kl": _scaled("maximum", "max_kl_mean", KL_NOISE),
    # A logit near 0 is many ulps from the next one; self_diff says how far.
    "self_ulps": Judged("none"),
    "repeat_diff": _held("maximum", "max_repeat_diff"),
    "repeat_kl": Judged("none"),
    "repeat_ulps": Judged("none"),
    "repeat_bits": Judged("none"),
}
"""By name. The gate of a figure is looked up here and nowhere else."""


@dataclass(frozen=True)
class _Found:
    """A value at a place, before it is held to anything."""

    where: str
    name: str
    value: float | None
    of: int | None = None
    repeats: float = 1.0
    family: int = 1
    error: float | None = None


def figures_of(report: ParityReport) -> Mapping[Key, Figure]:
    """All figures by (where, name), in the order of a report; where is that of the verdict's cases.

    A gate that was loosened by hand is no measure: the table's limit stays.
    """
    kept = {name: value for name, value in report.overrides.items() if name not in report.loosened}
    gates = override(report.table_gates, kept)
    limits = {(case.where, case.gate): case.limit for case in cases(report.evidence, gates)}

    def figure(found: _Found) -> Figure:
        judged = JUDGED[found.name]
        limit, held = None, False
        if judged.gate is not None:
            held = (found.where, judged.gate) in limits and not judged.scale
            # A condition is no field of the gates: it allows none.
            limit = judged.limit(limits.get((found.where, judged.gate), getattr(gates, judged.gate, 0.0)))
        return Figure(
            value=found.value,
            badness=None if found.value is None else judged.badness(found.value),
            rule=judged.rule,
            noise=judged.noise,
            gate=judged.gate,
            limit=limit,
            held=held,
            of=found.of,
            repeats=found.repeats,
            family=found.family,
            error=found.error,
        )

    return {(found.where, found.name): figure(found) for found in _all(report)}


def _all(report: ParityReport) -> Iterator[_Found]:
    evidence = report.evidence
    distinct = sum(probe.tokens for probe in report.probes)
    for scenario in evidence.scenarios:
        yield from _metrics(scenario.name, scenario.metrics, distinct)
        where, settled = f"settled positions of {scenario.name}", scenario.settled
        if settled.positions:
            yield _Found(where, "kl_position", settled.kl_max)
            yield _Found(where, "logit_diff_max", settled.logit_diff_max)
    top1 = judge_top1(evidence, report.gates)
    if evidence.texts is not None and top1 is not None:
        yield _Found("texts", "text_kl_mean", evidence.texts.kl_mean)
        yield _Found("texts", "top1_diverged", top1.diverged, top1.positions)
    if evidence.routing is not None:
        yield from _routing(evidence.routing, distinct)
    for record in evidence.layers:
        where = f"layer {record.layer}"
        yield _Found(where, "non_finite", record.non_finite)
        yield _Found(f"{where} attention", "layer_error", record.attention)
        yield _Found(f"{where} attention with cache", "layer_error", record.cached)
        yield _Found(f"{where} router", "router_error", record.router)
        yield _Found(f"{where} experts", "layer_error", record.experts)
    ends = evidence.ends
    if ends is not None:
        yield _Found("ends", "non_finite", ends.non_finite)
        for where, error in (("embedding", ends.embedding), ("final norm", ends.norm), ("lm_head", ends.lm_head)):
            yield _Found(where, "layer_error", error)
    for span in evidence.ranges:
        where = f"range of layer {span.layer} in {span.type}"
        yield _Found(where, "headroom_bits", span.headroom_bits)
        yield _Found(where, "saturated", span.saturated)
        yield _Found(where, "subnormal", span.subnormal)
    times: dict[str, int] = {}
    for check in evidence.consistency:
        place = f"engine against itself: {check.name} at {check.length}"
        times[place] = times.get(place, 0) + 1
        where = place if times[place] == 1 else f"{place} ({times[place]})"
        kind = "repeat" if check.name == "repeat" else "self"
        yield _Found(where, f"{kind}_diff", check.logit_diff_max)
        yield _Found(where, f"{kind}_kl", check.kl_max)
        yield _Found(where, f"{kind}_ulps", check.ulps_max)
        if check.name == "repeat":
            yield _Found(where, "repeat_bits", float(not check.bitwise))


def _metrics(where: str, m: Metrics, distinct: int) -> Iterator[_Found]:
    yield _Found(where, "non_finite", m.non_finite)
    kl = ("kl_mean", "kl_median", "kl_median_low", "kl_p99", "kl_p999", "kl_max", "reverse_kl_mean", "reverse_kl_max")
    for name in kl:
        yield _Found(where, name, getattr(m, name))
    yield _Found(where, "logit_diff_mean", m.logit_diff_mean)
    yield _Found(where, "logit_diff_max", m.logit_diff_max)
    # Batches have the same positions in several rows, which say nothing that one does not.
    repeats = max(1.0, m.positions / max(distinct, 1))
    yield _Found(where, "top1_disagreements", m.disagreements if m.positions else None, m.positions, repeats)
    finite = sum(m.kl_histogram)
    for name, best, overlap in (("top5_misses", 5, m.top5_overlap), ("top10_misses", 10, m.top10_overlap)):
        misses = None if overlap is None else round((1 - overlap) * best * finite)
        yield _Found(where, name, misses, best * finite, repeats)
    yield _Found(where, "rank_mean", m.rank_mean)
    yield _Found(where, "rank_max", m.rank_max)
    yield _Found(where, "cosine_mean", m.cosine_mean)
    yield _Found(where, "cosine_min", m.cosine_min)
    if m.text_positions:
        yield _Found(where, "text_prob_diff_mean", m.text_prob_diff_mean)
        yield _Found(where, "text_prob_diff_max", m.text_prob_diff_max)
        ratio, error = m.perplexity_ratio, m.perplexity_ratio_se
        # Of the logarithm; a ratio of 0 is infinitely far from 1, whatever its error.
        relative = error / ratio if ratio and error is not None else error
        yield _Found(where, "perplexity_ratio", ratio, error=relative)


def _routing(routing: RoutingRecord, distinct: int) -> Iterator[_Found]:
    share = routing.diverged_share
    yield _Found("routing", "diverged", None if share is None else routing.diverged, routing.token_layers)
    rows = [row for row in routing.layers if row.tokens]
    for row in rows:
        where = f"routing of layer {row.layer}"
        yield _Found(where, "flipped", row.tokens - row.same_set, row.tokens, family=len(rows))
        yield _Found(where, "diverged", row.diverged, row.tokens, family=len(rows))
    yield from _metrics("routing replay", routing.replay, distinct)
