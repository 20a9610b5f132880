"""How figures and foreign strings are written in the views of a report."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.verdict import Failure

REASON = 400
_SHOWN_AS = {"\n": "↵", "\t": "⇥", "\r": "↵"}


def number(value: float | None) -> str:
    """Three digits, four of what is larger; `none` where nothing could be measured."""
    if value is None:
        return "none"
    return f"{value:.4g}" if 1e3 <= abs(value) < 1e4 else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.4g} %"


def of_limit(value: float | None, limit: float) -> str:
    """What part of its limit a figure uses up, or how many times it is beyond."""
    if value is None or not limit:
        return "-"
    part = value / limit
    if part > 1:
        return f"{part:.3g} x"
    return f"{100 * part:.2g} %" if part >= 1e-3 or not part else "< 0.1 %"


def visible(text: str) -> str:
    """The text with everything that would not show, or would turn the text around it, written out.

    Control and format characters (the right-to-left override among them) and lone surrogates become their escapes, line
    ends and tabs their signs, any space a space.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    if character in _SHOWN_AS:
        return _SHOWN_AS[character]
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")


def one_line(text: str, most: int) -> str:
    """The text in one line of harmless characters, cut to `most`."""
    line = " ".join(visible(" ".join(text.split())).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def named(layers_and_experts: Sequence[tuple[int, int]], most: int) -> str:
    """The first (layer, expert) pairs by name."""
    shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in layers_and_experts[:most])
    more = len(layers_and_experts) - most
    return f"{shown} and {more:,} more" if more > 0 else shown


def verdict_word(report: ParityReport) -> str:
    """PASS, FAIL or NOT EXECUTED."""
    return report.outcome.upper()


def verdict_sentence(report: ParityReport) -> str:
    """After the word, one line that says all: which target, over how much, by how little or why not, and by whose
    limits. Plain text, its foreign parts in one line each and cut; not escaped for any format."""
    return " ".join(part for part in (verdict_finding(report), loosened_sentence(report)) if part)


def verdict_finding(report: ParityReport) -> str:
    """The verdict's sentence without the gates that were loosened."""
    scenarios, target = report.evidence.scenarios, one_line(report.target, 160)
    kl = max((s.metrics.kl_mean for s in scenarios if s.metrics.kl_mean is not None), default=None)
    diff = max((s.metrics.logit_diff_max for s in scenarios if s.metrics.logit_diff_max is not None), default=None)
    extent = f"over {_extent(report)}"
    worst = f"(worst mean KL {number(kl)}, worst logit difference {number(diff)})"
    if report.outcome == "pass":
        return f"{target} is the model within its gates, {extent} {worst}."
    if report.outcome == "not executed":
        return (
            f"the graph passes (graph parity), the engine was not run: {_reason(report)}. "
            "Run gptoss-export validate <folder> on a host with an NVIDIA GPU. "
            f"The graph of {target} keeps its gates, {extent} {worst}."
        )
    failures = report.verdict.failures
    places = len({failure.where for failure in failures})
    graph_only = (
        f" Only the graph was run, by {one_line(report.engine.ran_instead or '', 160)}; the engine was not: "
        f"{_reason(report)}."
        if report.engine.execution == "graph only"
        else ""
    )
    return (
        f"{target} is not shown to be the model, over {_extent(report)}: {plural(len(failures), 'gate')} not kept "
        f"in {plural(places, 'place')}, first {failure_text(failures[0])}.{graph_only}"
    )


def _extent(report: ParityReport) -> str:
    """`69 distinct positions, 500 in 6 scenarios`."""
    scenarios, texts = report.evidence.scenarios, report.evidence.texts
    asked = f"{sum(s.metrics.positions for s in scenarios):,} in {plural(len(scenarios), 'scenario')}"
    return f"{plural(0 if texts is None else texts.positions, 'distinct position')}, {asked}"


def model_sentence(report: ParityReport) -> str:
    """What the model is called and where it came from; empty where neither is known."""
    model = report.binding.model
    named = ", from ".join(filter(None, (model.name, model.source)))
    return f"The model: {named}." if named else ""


def failure_text(failure: Failure) -> str:
    """`max_kl_mean in decode (2e-09, limit 1e-09)`, or that nothing was measured."""
    where = one_line(failure.where, 160)
    if failure.gate == "measured":
        return f"{where}: nothing was measured"
    return f"{failure.gate} in {where} ({number(failure.measured)}, limit {number(failure.limit)})"


def _reason(report: ParityReport) -> str:
    return one_line(report.engine.not_executed_reason or "", REASON).rstrip(".")


def loosened_sentence(report: ParityReport) -> str:
    """The gates that let more pass than the table does; empty where none was loosened."""
    if not report.loosened:
        return ""
    table, used = report.table_gates, report.gates
    gates = (f"{name} {number(getattr(used, name))} (table {number(getattr(table, name))})" for name in report.loosened)
    return f"With loosened gates: {', '.join(gates)}."
