"""The report as sections of paragraphs and tables, in plain text: what Markdown and HTML both show.

    for section in sections(report):
        section.title, section.lead, section.tables

Nothing is escaped here; foreign strings are in one line of harmless characters, and cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gptoss_export.validators.layers import Finding
from gptoss_export.validators.report.distribution import metrics_tables, scenarios_section, texts_section
from gptoss_export.validators.report.gate_table import gates_section
from gptoss_export.validators.report.schema import ParityReport, WorstText
from gptoss_export.validators.report.setting import binding_section, probes_section, setting_section
from gptoss_export.validators.report.table import CELL, Section, Table
from gptoss_export.validators.report.text import named, number, one_line, percent, plural
from gptoss_export.validators.verdict import most_beyond

NAMED = 12
"""So many untested experts are named; all of them are counted."""


def sections(report: ParityReport) -> list[Section]:
    """Those that have something to say, what failed first."""
    found = [
        _failures(report),
        _bisection(report),
        scenarios_section(report),
        texts_section(report),
        _worst(report),
        _routing(report),
        _layers(report),
        _ranges(report),
        _consistency(report),
        _floors(report),
        gates_section(report),
        probes_section(report),
        setting_section(report),
        binding_section(report),
    ]
    return [section for section in found if section is not None]


def _failures(report: ParityReport) -> Section | None:
    if report.verdict.passed:
        return None
    rows = [(one_line(f.where, CELL), f.gate, number(f.measured), number(f.limit)) for f in report.verdict.failures]
    lead = f'{plural(len(rows), "gate")} not kept. What was not looked at fails as well, as "measured".'
    return Section("failures", "Gates not kept", lead, (Table("", ("where", "gate", "measured", "limit"), rows),))


def _bisection(report: ParityReport) -> Section | None:
    if report.bisection is None:
        return None

    def row(f: Finding) -> tuple[str, ...]:
        words = ("none" if f.layer is None else str(f.layer), *(one_line(text, CELL) for text in (f.half, f.op)))
        return (*words, number(f.error), number(f.limit), one_line(f.detail, 2 * CELL))

    head = ("layer", "half", "operation", "error", "limit", "what speaks for it")
    findings = report.bisection.findings
    tables = (Table("", head, [row(finding) for finding in findings]),) if findings else ()
    return Section("bisection", "Where it starts", one_line(report.bisection.sentence, 4 * CELL), tables)


def _worst(report: ParityReport) -> Section | None:
    if not report.worst:
        return None
    # One position is often the worst of every scenario.
    merged: dict[tuple[str, int, int, int], list[WorstText]] = {}
    for w in sorted(report.worst, key=lambda w: -w.kl):
        merged.setdefault((w.probe, w.position, w.reference, w.candidate), []).append(w)
    head = ("probe, position", "KL", "reference's best", "artifact's best", "the text's own", "in", "text before")
    lead = "Where the artifact is farthest from the reference, and what both would say next."
    return Section("worst", "Worst positions", lead, (Table("", head, [_worst_row(same) for same in merged.values()]),))


def _worst_row(same: Sequence[WorstText]) -> tuple[str, ...]:
    w = same[0]
    return (
        f"{one_line(w.probe, CELL)}, {w.position}",
        number(w.kl),
        _token(w.reference, w.text_reference),
        _token(w.candidate, w.text_candidate),
        "end" if w.following is None else str(w.following),
        one_line(", ".join(dict.fromkeys(each.scenario for each in same)), CELL),
        "" if w.context is None else one_line(w.context[-CELL:], CELL),
    )


def _token(ident: int, text: str | None) -> str:
    return str(ident) if text is None else f"{one_line(repr(text), 48)} ({ident})"


def _routing(report: ParityReport) -> Section | None:
    routing = report.evidence.routing
    if routing is None:
        return None
    untested, cells = routing.untested, sum(len(row.visits) for row in routing.layers)
    rows = [
        (
            str(r.layer),
            str(r.tokens),
            percent(r.same_order / r.tokens if r.tokens else None),
            percent(r.same_set / r.tokens if r.tokens else None),
            *map(str, (r.ties, r.near_ties, r.consequences, r.diverged)),
            *map(number, (r.margin_max, r.mass_mean, r.router_error)),
            str(sum(visits == 0 for visits in r.visits)),
        )
        for r in routing.layers
    ]
    flips = [
        (
            *map(str, (f.layer, f"{f.probe}, {f.position}", f.kind, f.left, f.taken)),
            number(f.margin),
            percent(f.mass),
        )
        for f in routing.worst
    ]
    lead = (
        f"{routing.flipped:,} of {plural(routing.token_layers, 'token')} x layers go to other experts, "
        f"{percent(routing.diverged_share)} by neither a tie nor a near-tie nor what follows from one. "
        + (
            f"Untested: {len(untested):,} of {cells:,} experts x layers, that no probe visits "
            f"({named(untested, NAMED)})."
            if untested
            else f"All {cells:,} experts x layers are visited."
        )
    )
    shares = ("layer", "tokens", "same order", "same set", "ties", "near-ties", "consequences", "divergences")
    head = (*shares, "largest margin", "mean mass", "router error", "untested experts")
    flip_head = ("layer", "probe, position", "kind", "left out", "taken", "margin", "mass")
    replay = [
        replace(table, caption=f"replay: {table.caption}")
        for table in metrics_tables("replay", [("reference's experts", routing.replay)])
    ]
    tables = (Table("by layer", head, rows), Table("flips with the largest margins", flip_head, flips), *replay)
    return Section("routing", "Routing", lead + _replay(report), tuple(table for table in tables if table.rows))


def _replay(report: ParityReport) -> str:
    routing = report.evidence.routing
    prefill = next((s.metrics for s in report.evidence.scenarios if s.name == "prefill"), None)
    if routing is None or routing.replay.kl_mean is None:
        return ""
    replayed = f" With the reference's experts in every layer (replay) the mean KL is {number(routing.replay.kl_mean)}"
    own = None if prefill is None else prefill.kl_mean
    if own is None:
        return f"{replayed}."
    rest = "the rest is what flips add" if routing.replay.kl_mean < own else "flips add nothing"
    return f"{replayed} beside {number(own)} with its own: that much is the kernels', {rest}."


def _layers(report: ParityReport) -> Section | None:
    layers = report.evidence.layers
    if not layers:
        return None
    rows = [
        (
            str(r.layer),
            one_line(r.kind, CELL),
            str(r.tokens),
            *map(number, (r.attention, r.cached, r.experts, r.router)),
            str(r.flipped),
            str(r.non_finite),
        )
        for r in layers
    ]
    head = ("layer", "kind", "tokens", "attention", "attention with cache", "experts", "router", "flipped")
    lead = (
        "Every layer given the reference's input, so that none inherits an error. Relative to what the half adds to "
        f"the residual stream; at most {number(report.gates.max_layer_error)} passes, and "
        f"{number(report.gates.max_router_error)} of a log weight of the router.{_by_whom(report)}"
    )
    return Section("layers", "Layer by layer", lead, (Table("", (*head, "non-finite"), rows), *_ends(report)))


def _ends(report: ParityReport) -> tuple[Table, ...]:
    ends = report.evidence.ends
    if ends is None:
        return ()
    row = (str(ends.tokens), *map(number, (ends.embedding, ends.norm, ends.lm_head)), str(ends.non_finite))
    head = ("tokens", "embedding", "final norm", "lm_head", "non-finite")
    return (Table("Before and behind the layers, relative to what it should be", head, [row]),)


def _ranges(report: ParityReport) -> Section | None:
    if not report.evidence.ranges:
        return None
    rows = [
        (
            str(r.layer),
            r.type,
            number(r.activation),
            one_line(r.activation_op, CELL),
            number(r.weight),
            one_line(r.weight_name, CELL),
            "none" if r.headroom_bits is None else f"{r.headroom_bits:.1f}",
            str(r.saturated),
            str(r.subnormal),
        )
        for r in report.evidence.ranges
    ]
    head = ("layer", "type", "largest activation", "of", "largest weight", "of", "headroom in bits", "saturated")
    lead = (
        "How far the largest value is below the limit of the type that the artifact holds it in; at least "
        f"{number(report.gates.min_headroom_bits)} bits are needed.{_by_whom(report)}"
    )
    return Section("ranges", "Range of numbers", lead, (Table("", (*head, "subnormal"), rows),))


def _by_whom(report: ParityReport) -> str:
    by = report.evidence.looked_into
    return f" Looked into with {one_line(by, CELL)}." if by else ""


def _consistency(report: ParityReport) -> Section | None:
    checks = report.evidence.consistency
    if not checks:
        return None
    rows = [
        (
            c.name,
            str(c.length),
            str(c.positions),
            number(c.logit_diff_max),
            number(c.kl_max),
            "none" if c.ulps_max is None else f"{c.ulps_max:,}",
            "yes" if c.bitwise else "no",
        )
        for c in checks
    ]
    head = ("check", "at length", "positions", "logit diff max", "KL max", "ulps", "same bits")
    lead = (
        "The same tokens by another way: step by step through the cache, in chunks, padded, and the same call twice. "
        f"At most {number(report.gates.max_self_diff)} passes, {number(report.gates.max_repeat_diff)} for repeat."
        f"{_set_aside(report)}"
    )
    return Section("consistency", "The engine against itself", lead, (Table("", head, rows),))


def _set_aside(report: ParityReport) -> str:
    """How many positions of which checks may be beyond."""
    found = {}
    for name in dict.fromkeys(check.name for check in report.evidence.consistency):
        mine = [check for check in report.evidence.consistency if check.name == name]
        if most := most_beyond(mine, report.gates):
            found[name] = f"{most} of the {sum(check.positions for check in mine)} positions of {name}"
    if not found:
        return ""
    return f" Where rounding sends tokens to other experts, {', '.join(found.values())} may be beyond."


def _floors(report: ParityReport) -> Section | None:
    if not report.floors:
        return None
    rows = [(floor.dtype, floor.metrics) for floor in report.floors]
    shares = [
        (
            f.dtype,
            str(f.token_layers),
            str(f.diverged),
            percent(f.diverged / f.token_layers if f.token_layers else None),
            str(len(f.texts.margins)),
            *map(number, (f.bulk_kl_mean, f.bulk_logit_diff_max)),
        )
        for f in report.floors
    ]
    head = ("floor", "tokens x layers", "divergences", "share", "other top-1", "KL mean", "logit diff max")
    routing = Table("routing, distinct positions, and figures where no expert was exchanged", head, shares)
    lead = (
        "What rounding costs: transformers itself in 16 bits against transformers in float32, over every position of "
        f"the probes, on {one_line(report.floors[0].cpu, 2 * CELL)}. {_consequence(report)}"
    )
    return Section("floors", "Noise floors", lead, (*metrics_tables("floor", rows), routing))


def _consequence(report: ParityReport) -> str:
    if report.floor is None:
        return "No gate follows from it."
    if report.floor.metrics.non_finite:
        return f"In {report.floor.dtype} transformers itself leaves the range of numbers: no gate follows from it."
    return f"A target in {report.floor.dtype} may show {report.policy.factor:g} times as much, and counts as high."
