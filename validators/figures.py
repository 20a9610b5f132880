"""Every figure of a report by name, with how bad it is, so that two reports can be compared figure by figure.

    figures_of(report)["decode", "kl_mean"].value

A figure's badness is 0 where nothing is wrong and grows with what is; noise is the badness below which a difference
means nothing, because another order of summation shows as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.routing import RoutingRecord

KL_NOISE = 1e-12
LOGIT_NOISE = 1e-5
LAYER_NOISE = 1e-6
SHARE_NOISE = 1e-3
COSINE_NOISE = 1e-9
RATIO_NOISE = 1e-5
ULPS_NOISE = 64.0
SUBNORMAL_NOISE = 100.0
HEADROOM_NOISE = 2.0**-6
"""Of the share of a type's limit that is used up: with six bits of headroom nothing is near."""

ONE_POSITION = 1.5
"""Positions: one more or less that changes its token is no trend."""

Key = tuple[str, str]


@dataclass(frozen=True)
class Figure:
    """value: as the report has it; badness: at least 0. Both None where it was asked for and could not be measured."""

    value: float | None
    badness: float | None
    noise: float


def figures_of(report: ParityReport) -> Mapping[Key, Figure]:
    """All figures by (where, name), in the order of a report."""
    evidence = report.evidence
    found: dict[Key, Figure] = {}
    for scenario in evidence.scenarios:
        found |= {(scenario.name, name): figure for name, figure in _metrics(scenario.metrics)}
    if evidence.routing is not None:
        found |= dict(_routing(evidence.routing))
    for record in evidence.layers:
        where = f"layer {record.layer}"
        halves = (("attention", record.attention), ("cached", record.cached), ("experts", record.experts))
        found |= {(where, name): _plain(value, LAYER_NOISE) for name, value in halves}
        found[where, "router"] = _plain(record.router, LOGIT_NOISE)
        found[where, "non_finite"] = _plain(record.non_finite, 0.0)
    if evidence.ends is not None:
        found |= {("ends", name): _plain(value, LAYER_NOISE) for name, value in evidence.ends.errors.items()}
        found["ends", "non_finite"] = _plain(evidence.ends.non_finite, 0.0)
    for span in evidence.ranges:
        where = f"range of layer {span.layer} in {span.type}"
        bits = span.headroom_bits
        # Below -1000 bits a power of two would be no float.
        used = None if bits is None else 2.0 ** -max(bits, -1000.0)
        found[where, "headroom_bits"] = Figure(bits, used, HEADROOM_NOISE)
        found[where, "saturated"] = _plain(span.saturated, 0.0)
        found[where, "subnormal"] = _plain(span.subnormal, SUBNORMAL_NOISE)
    times: dict[str, int] = {}
    for check in evidence.consistency:
        place = f"engine against itself: {check.name} at {check.length}"
        times[place] = times.get(place, 0) + 1
        where = place if times[place] == 1 else f"{place} ({times[place]})"
        found[where, "logit_diff_max"] = _plain(check.logit_diff_max, LOGIT_NOISE)
        found[where, "kl_max"] = _plain(check.kl_max, KL_NOISE)
        found[where, "ulps_max"] = _plain(check.ulps_max, ULPS_NOISE)
        if check.name == "repeat":
            found[where, "bitwise"] = Figure(float(check.bitwise), float(not check.bitwise), 0.0)
    return found


def _metrics(m: Metrics) -> Iterator[tuple[str, Figure]]:
    one_position = ONE_POSITION / max(m.positions, 1)
    yield "non_finite", _plain(m.non_finite, 0.0)
    for name in ("kl_mean", "kl_median", "kl_p99", "kl_p999", "kl_max", "reverse_kl_mean", "reverse_kl_max"):
        yield name, _plain(getattr(m, name), KL_NOISE)
    for name in ("logit_diff_mean", "logit_diff_max"):
        yield name, _plain(getattr(m, name), LOGIT_NOISE)
    yield "top1_agreement", _short_of_one(m.top1_agreement, one_position)
    yield "top5_overlap", _short_of_one(m.top5_overlap, SHARE_NOISE)
    yield "top10_overlap", _short_of_one(m.top10_overlap, SHARE_NOISE)
    yield "rank_mean", _off_one(m.rank_mean, one_position)
    yield "rank_max", _off_one(m.rank_max, 1.0)
    yield "cosine_mean", _short_of_one(m.cosine_mean, COSINE_NOISE)
    yield "cosine_min", _short_of_one(m.cosine_min, COSINE_NOISE)
    if m.text_positions:
        yield "text_prob_diff_mean", _plain(m.text_prob_diff_mean, RATIO_NOISE)
        yield "text_prob_diff_max", _plain(m.text_prob_diff_max, RATIO_NOISE)
        yield "perplexity_ratio", _off_one(m.perplexity_ratio, RATIO_NOISE)


def _routing(routing: RoutingRecord) -> Iterator[tuple[Key, Figure]]:
    yield ("routing", "diverged_share"), _plain(routing.diverged_share, SHARE_NOISE)
    for row in routing.layers:
        if row.tokens:
            where, noise = f"routing of layer {row.layer}", ONE_POSITION / row.tokens
            yield (where, "same_set"), _short_of_one(row.same_set / row.tokens, noise)
            yield (where, "diverged"), _plain(row.diverged / row.tokens, noise)
    for name, figure in _metrics(routing.replay):
        yield ("routing replay", name), figure


def _plain(value: float | None, noise: float) -> Figure:
    return Figure(value, None if value is None else abs(value), noise)


def _short_of_one(value: float | None, noise: float) -> Figure:
    return Figure(value, None if value is None else max(1 - value, 0.0), noise)


def _off_one(value: float | None, noise: float) -> Figure:
    return Figure(value, None if value is None else abs(value - 1), noise)
