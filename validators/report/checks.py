"""What the types of a stored report cannot say: that its counts add up, that it names nothing twice and nothing that
is not there, and that gates and verdict follow from what was measured."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from datetime import datetime

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.evidence import Evidence, ScenarioResult
from gptoss_export.validators.gates import GATES, loosened, override
from gptoss_export.validators.metrics import HISTOGRAM_EDGES, Metrics
from gptoss_export.validators.positions import TextsRecord
from gptoss_export.validators.ranges import LIMITS, RangeRecord
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.routing import RoutingLayer, RoutingRecord
from gptoss_export.validators.verdict import judge

SHA256 = re.compile(r"[0-9a-f]{64}\Z")
CLOSE = 1e-9
"""Relative: so much the order of a sum may move a mean beyond its largest term."""


class InvalidReport(ValueError):  # noqa: N818 - never leaves the reader
    """What is wrong, for the error's one line."""


def check_report(report: ParityReport) -> None:
    """Raises InvalidReport, or another ValueError, for the first thing that cannot be."""
    datetime.fromisoformat(report.created_at)
    digests = [probe.sha256 for probe in report.probes]
    digests += [*report.binding.checkpoint.values(), *report.binding.files.values()]
    if not all(SHA256.match(digest) for digest in digests):
        raise InvalidReport("a sha256 is not 64 hexadecimal digits")
    _once("a probe", (probe.name for probe in report.probes))
    _check_evidence(report)
    _check_positions(report)
    _check_floors(report)
    if report.bisection is not None:
        for finding in report.bisection.findings:
            if finding.layer is not None:
                _is_layer(f"the finding in {finding.op}", finding.layer, report.evidence)
    _check_verdict(report)


def _check_policy(report: ParityReport) -> None:
    """A report is judged by the gates of its target as this version has them, or by narrower ones."""
    policy, own = report.policy, GATES.get(report.target)
    if policy.absolute.beside is not None or policy.absolute.by_hand:
        raise InvalidReport("its policy has a noise floor, or limits set by hand, among its absolute gates")
    if own is None:
        return
    if policy.floor_dtype != own.floor_dtype or policy.factor > own.factor:
        raise InvalidReport(f"its policy goes by another noise floor than that of {report.target}, or by more of it")
    if looser := loosened(own.absolute, policy.absolute):
        raise InvalidReport(f"its policy is looser than the gates of {report.target}: {', '.join(looser)}")


def _check_verdict(report: ParityReport) -> None:
    _check_policy(report)
    try:
        table = report.policy.resolve(report.floor)
    except NotValidatedError as error:
        raise InvalidReport(error.what) from error
    if table != report.table_gates:
        raise InvalidReport("its table_gates do not follow from its policy and noise floor")
    if override(table, report.overrides) != report.gates:
        raise InvalidReport("its gates do not follow from its table_gates and overrides")
    if judge(report.evidence, report.gates) != report.verdict:
        raise InvalidReport("its failures do not follow from its evidence and gates")


def _check_evidence(report: ParityReport) -> None:
    evidence, tokens = report.evidence, _tokens(report)
    _once("a scenario", (scenario.name for scenario in evidence.scenarios))
    for scenario in evidence.scenarios:
        _check_metrics(f"scenario {scenario.name}", scenario.metrics)
        _check_settled(scenario)
    if evidence.texts is not None:
        _check_texts("the texts", evidence.texts, tokens)
        _check_pooled(evidence.texts, evidence.scenarios)
    if evidence.routing is not None:
        _check_routing(evidence.routing, report, tokens)
    _once("a layer", (record.layer for record in evidence.layers))
    for record in evidence.layers:
        _is_layer("a layer", record.layer, evidence)
        if record.flipped > record.tokens or record.tokens > tokens:
            raise InvalidReport(f"layer {record.layer} has more tokens than there are")
    if evidence.ends is not None and evidence.ends.tokens > tokens:
        raise InvalidReport("its embedding has more tokens than there are")
    _once("the range of a layer", ((record.layer, record.type) for record in evidence.ranges))
    for span in evidence.ranges:
        _is_layer("a range", span.layer, evidence)
        _check_range(span)
    for check in evidence.consistency:
        if check.bitwise and (check.logit_diff_max or check.ulps_max or check.kl_max):
            raise InvalidReport(f"{check.name} at {check.length} differs and is the same in every bit")
        if list(check.diffs) != sorted(check.diffs, reverse=True) or len(check.diffs) > check.positions:
            raise InvalidReport(f"{check.name} at {check.length} has differences out of order, or of no position")
        if check.logit_diff_max is not None and check.logit_diff_max != max(check.diffs, default=0.0):
            raise InvalidReport(f"{check.name} at {check.length} has another largest difference than its positions")


def _check_settled(scenario: ScenarioResult) -> None:
    where, m, settled = f"scenario {scenario.name}", scenario.metrics, scenario.settled
    if settled.positions > sum(m.kl_histogram):
        raise InvalidReport(f"{where}: more positions are settled than there are")
    for mine, of_all in ((settled.kl_max, m.kl_max), (settled.logit_diff_max, m.logit_diff_max)):
        if (mine is None) != (settled.positions == 0):
            raise InvalidReport(f"{where}: a figure of settled positions is missing, or of none")
        if mine is not None:
            _rising(where, (mine, math.nan if of_all is None else of_all))


def _check_pooled(texts: TextsRecord, scenarios: Sequence[ScenarioResult]) -> None:
    """Every position of the texts is one of a scenario, and so is every one that is settled or has another token."""
    for what, counted, asked in (
        ("positions", texts.positions, sum(s.metrics.positions for s in scenarios)),
        ("settled positions", texts.settled, sum(s.settled.positions for s in scenarios)),
        ("other best tokens", len(texts.margins), sum(s.metrics.disagreements for s in scenarios)),
    ):
        if counted > asked:
            raise InvalidReport(f"the texts have {counted} {what}, and all scenarios together {asked}")


def _check_texts(where: str, texts: TextsRecord, tokens: int) -> None:
    for what, count in (("settled", texts.settled), ("of another best token", len(texts.margins))):
        if count > texts.positions:
            raise InvalidReport(f"{where}: {count} positions are {what}, of {texts.positions}")
    if texts.positions > tokens:
        raise InvalidReport(f"{where}: {texts.positions} positions of {tokens} tokens")
    if any((figure is None) != (texts.positions == 0) for figure in (texts.kl_mean, texts.kl_max)):
        raise InvalidReport(f"{where}: a figure is missing, or of no position")
    _rising(where, [figure for figure in (texts.kl_mean, texts.kl_max) if figure is not None])
    if list(texts.margins) != sorted(texts.margins, reverse=True) or 0.0 in texts.margins:
        raise InvalidReport(f"{where}: margins out of order, or none")


def _check_metrics(where: str, m: Metrics) -> None:
    finite = sum(m.kl_histogram)
    if m.agreements + m.ties + m.disagreements != m.positions:
        raise InvalidReport(f"{where}: agreements, ties and disagreements are not all positions")
    if finite > m.positions or m.positions - finite > min(m.disagreements, m.non_finite):
        raise InvalidReport(f"{where}: the histogram's {finite} positions are not all that are finite")
    if (m.non_finite > 0) != (finite < m.positions):
        raise InvalidReport(f"{where}: {m.non_finite} logits are not finite, and {m.positions - finite} positions")
    if m.text_positions > finite:
        raise InvalidReport(f"{where}: there are more positions with a text than positions")
    kl = (m.kl_mean, m.kl_median, m.kl_median_low, m.kl_p99, m.kl_p999, m.kl_max, m.reverse_kl_mean, m.reverse_kl_max)
    tokens = (m.top5_overlap, m.top10_overlap, m.rank_mean, m.rank_max)
    logits = (m.logit_diff_mean, m.logit_diff_max, m.cosine_mean, m.cosine_min)
    if any((figure is None) != (finite == 0) for figure in (*kl, *tokens, *logits)):
        raise InvalidReport(f"{where}: a figure is missing, or of no position")
    if m.text_positions == 0 and any(f is not None for f in (m.text_prob_diff_mean, m.perplexity_ratio)):
        raise InvalidReport(f"{where}: a figure is of no text")
    rising = (
        (m.kl_median_low, m.kl_median, m.kl_p99, m.kl_p999, m.kl_max),
        (m.kl_mean, m.kl_max),
        (m.reverse_kl_mean, m.reverse_kl_max),
    )
    means = (m.logit_diff_mean, m.logit_diff_max), (m.rank_mean, m.rank_max), (m.cosine_min, m.cosine_mean)
    for figures in (*rising, *means):
        _rising(where, [figure for figure in figures if figure is not None])
    if m.kl_max is not None:
        last = max(i for i, count in enumerate(m.kl_histogram) if count)
        if last != bisect_right(HISTOGRAM_EDGES, m.kl_max):
            raise InvalidReport(f"{where}: the largest KL is not where the histogram ends")


def _check_routing(routing: RoutingRecord, report: ParityReport, tokens: int) -> None:
    _once("the routing of a layer", (row.layer for row in routing.layers))
    for row in routing.layers:
        _is_layer("the routing of a layer", row.layer, report.evidence)
        if row.tokens > tokens:
            raise InvalidReport(f"routing of layer {row.layer} is of more tokens than there are")
        _check_routing_layer(row)
    if len({(len(row.visits), _experts_a_token(row)) for row in routing.layers if row.tokens}) > 1:
        raise InvalidReport("layers have different numbers of experts")
    rows = {row.layer: row for row in routing.layers}
    kinds: dict[tuple[int, str], int] = {}
    for flip in routing.worst:
        if flip.layer not in rows or max(flip.left, flip.taken) >= len(rows[flip.layer].visits):
            raise InvalidReport(f"a flip in layer {flip.layer} is of an expert that is not there")
        if flip.probe >= len(report.probes) or flip.position >= report.probes[flip.probe].tokens:
            raise InvalidReport(f"a flip is at a position {flip.position} that is not there")
        kinds[flip.layer, flip.kind] = kinds.get((flip.layer, flip.kind), 0) + 1
    for (layer, kind), count in kinds.items():
        row = rows[layer]
        counted = {"tie": row.ties, "near-tie": row.near_ties, "consequence": row.consequences}
        if count > counted.get(kind, row.diverged):
            raise InvalidReport(f"layer {layer} has more flips of kind {kind} than it counts")
    _check_metrics("routing replay", routing.replay)


def _check_routing_layer(row: RoutingLayer) -> None:
    where = f"routing of layer {row.layer}"
    flipped = row.ties + row.near_ties + row.consequences + row.diverged
    if row.same_set + flipped != row.tokens or row.same_order > row.same_set:
        raise InvalidReport(f"{where}: the same, ties, near-ties, consequences and divergences are not all tokens")
    if any((figure is None) != (flipped == 0) for figure in (row.margin_max, row.mass_mean)):
        raise InvalidReport(f"{where}: a figure of flips is missing, or of none")
    visits = sum(row.visits)
    if max(row.visits) > row.tokens or (row.tokens and visits % row.tokens) or (visits == 0) != (row.tokens == 0):
        raise InvalidReport(f"{where}: the visits of its experts are not those of its tokens")


def _experts_a_token(row: RoutingLayer) -> int:
    return sum(row.visits) // row.tokens


def _check_range(span: RangeRecord) -> None:
    if span.type not in LIMITS:
        raise InvalidReport(f"the range of layer {span.layer} is in a type of its own, {span.type[:40]!r}")
    largest = max(span.activation, span.weight)
    if span.headroom_bits is None or not largest:
        return
    if not math.isclose(span.headroom_bits, math.log2(LIMITS[span.type]) - math.log2(largest), abs_tol=1e-6):
        raise InvalidReport(f"the headroom of layer {span.layer} in {span.type} does not follow from its largest value")


def _check_positions(report: ParityReport) -> None:
    tokens = {probe.name: probe.tokens for probe in report.probes}
    scenarios = {scenario.name for scenario in report.evidence.scenarios}
    for worst in report.worst:
        if worst.scenario not in scenarios or worst.position >= tokens.get(worst.probe, 0):
            raise InvalidReport("one of the worst positions is not there")
    _once("KL by position of a probe", (course.probe for course in report.kl_by_position))
    for course in report.kl_by_position:
        spans = len(course.start)
        if {len(course.stop), len(course.mean), len(course.max)} != {spans}:
            raise InvalidReport("KL by position has columns of different lengths")
        edges = [edge for pair in zip(course.start, course.stop, strict=True) for edge in pair]
        if edges != sorted(edges) or any(a >= b for a, b in zip(course.start, course.stop, strict=True)):
            raise InvalidReport("KL by position has spans out of order")
        if course.probe not in tokens or (edges and edges[-1] > tokens[course.probe]):
            raise InvalidReport("KL by position is of positions that are not there")
        for figures in zip(course.mean, course.max, strict=True):
            _rising("KL by position", figures)


def _check_floors(report: ParityReport) -> None:
    tokens = _tokens(report)
    _once("a noise floor", (floor.dtype for floor in report.floors))
    for floor in report.floors:
        where = f"the noise floor in {floor.dtype}"
        _check_metrics(where, floor.metrics)
        _check_texts(where, floor.texts, tokens)
        if floor.texts.settled or len(floor.texts.margins) > floor.metrics.disagreements:
            raise InvalidReport(f"{where} counts positions that it does not have")
        if floor.metrics.positions != tokens:
            raise InvalidReport(f"{where} is over other positions than its probes")
        if floor.token_layers != tokens * report.evidence.num_layers or floor.diverged > floor.token_layers:
            raise InvalidReport(f"{where} has other tokens x layers than its probes")


def _tokens(report: ParityReport) -> int:
    return sum(probe.tokens for probe in report.probes)


def _is_layer(what: str, layer: int, evidence: Evidence) -> None:
    if layer >= evidence.num_layers:
        raise InvalidReport(f"{what} is of layer {layer}, and there are {evidence.num_layers}")


def _once(what: str, names: Iterable[Hashable]) -> None:
    found = list(names)
    if len(set(found)) != len(found):
        raise InvalidReport(f"{what} is there twice")


def _rising(where: str, figures: Iterable[float]) -> None:
    before = -math.inf
    for figure in figures:
        if figure < before - CLOSE * abs(before):
            raise InvalidReport(f"{where}: a mean or a quantile is beyond the largest")
        before = figure
