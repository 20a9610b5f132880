"""parity.md: the report for a release ticket. Its first line is the verdict; under 65,000 characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gptoss_export.validators.report.json_writer import content_sha256
from gptoss_export.validators.report.schema import ParityReport, ScenarioResult

LARGEST = 65_000
ROWS_SHOWN = 60
CELL = 160


def to_markdown(report: ParityReport) -> str:
    """The report as GitHub-flavoured Markdown."""
    sections = [
        _verdict(report),
        _failures(report),
        _scenarios(report.scenarios),
        _gates(report),
        _probes(report),
        _setting(report),
        _binding(report),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    if len(text) < LARGEST:
        return text
    end = "\n\nCut here: the whole report is parity.json.\n"
    return text[: LARGEST - len(end) - 1] + end


def _verdict(report: ParityReport) -> str:
    """One line that says all: whether, for which target, over how much, and by how little or why not."""
    positions = sum(s.metrics.positions for s in report.scenarios)
    if report.verdict.passed:
        kl = max((s.metrics.kl_mean for s in report.scenarios if s.metrics.kl_mean is not None), default=None)
        diff = max(
            (s.metrics.logit_diff_max for s in report.scenarios if s.metrics.logit_diff_max is not None),
            default=None,
        )
        return (
            f"**PASS**: {_text(report.target)} is the model within its gates, over {positions} positions "
            f"in {len(report.scenarios)} scenarios (worst mean KL {_number(kl)}, worst logit difference "
            f"{_number(diff)})."
        )
    failures = report.verdict.failures
    first = failures[0]
    return (
        f"**FAIL**: {_text(report.target)} is not shown to be the model, over {positions} positions: "
        f"{len(failures)} gates not kept in {len({f.scenario for f in failures})} scenarios, first "
        f"{_text(first.gate)} in {_text(first.scenario)} ({_number(first.measured)}, limit {_number(first.limit)})."
    )


def _failures(report: ParityReport) -> str:
    if report.verdict.passed:
        return ""
    rows = [(f.scenario, f.gate, _number(f.measured), _number(f.limit)) for f in report.verdict.failures]
    return "## Gates not kept\n\n" + _table(("scenario", "gate", "measured", "limit"), rows)


def _scenarios(scenarios: Sequence[ScenarioResult]) -> str:
    head = (
        *("scenario", "calls", "positions", "KL mean", "KL p99", "KL max"),
        *("logit diff mean", "logit diff max", "same top-1", "ties", "other top-1", "non-finite"),
    )
    rows = []
    for s in scenarios:
        m = s.metrics
        figures = (m.kl_mean, m.kl_p99, m.kl_max, m.logit_diff_mean, m.logit_diff_max)
        counts = (m.agreements, m.ties, m.disagreements, m.non_finite)
        row = (s.name, str(s.calls), str(m.positions), *map(_number, figures), *map(str, counts))
        rows.append(row)
    return (
        "## Scenarios\n\nTeacher-forced, KL(reference || artifact) in nats. A tie is a position where the "
        "reference itself holds both tokens equal.\n\n" + _table(head, rows)
    )


def _gates(report: ParityReport) -> str:
    g = report.gates
    rows = [
        ("mean KL, at most", _number(g.max_kl_mean)),
        ("logit difference, at most", _number(g.max_logit_diff)),
        ("top-1 agreement, ties aside, at least", f"{100 * g.min_top1_agreement:g} %"),
        ("non-finite logits", "0"),
        ("scenarios that did not run", "0"),
    ]
    return "## Gates\n\nEvery scenario has to keep every one.\n\n" + _table(("gate", "limit"), rows)


def _probes(report: ParityReport) -> str:
    longest = max((p.tokens for p in report.probes), default=0)
    crossed = "is" if longest > report.sliding_window else "**is not**"
    rows = [(p.name, str(p.tokens), p.sha256) for p in report.probes]
    return f"## Probes\n\nThe sliding window of {report.sliding_window} positions {crossed} crossed.\n\n" + _table(
        ("probe", "tokens", "sha256 of the ids"), rows
    )


def _setting(report: ParityReport) -> str:
    engine, machine = report.engine, report.machine
    rows = [
        ("reference", report.reference),
        ("engine", f"{engine.name} {engine.version}, {engine.provider}"),
        ("effort", report.effort),
        ("machine", f"{machine.platform}, {machine.cpu}, {machine.cores} cores"),
        *((name, value) for name, value in sorted(report.versions.items())),
        ("measured at", report.created_at),
    ]
    return "## Setting\n\n" + _table(("what", "which"), rows)


def _binding(report: ParityReport) -> str:
    return (
        "## Bound to\n\n### Checkpoint\n\n"
        + _hashes(report.binding.checkpoint)
        + "\n\n### Artifact\n\n"
        + _hashes(report.binding.files)
        + f"\n\nSchema {report.schema_version}; sha256 of this report without its time stamp: "
        + content_sha256(report)
    )


def _hashes(files: Mapping[str, str]) -> str:
    return _table(("file", "sha256"), sorted(files.items())) if files else "Nothing."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of at most ROWS_SHOWN rows; how many more there are is said below."""
    rows = list(rows)
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(map(_text, row))} |" for row in rows[:ROWS_SHOWN]]
    more = len(rows) - ROWS_SHOWN
    return "\n".join(lines) + (f"\n\nand {more} more in parity.json" if more > 0 else "")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _text(value: str) -> str:
    """Any string as one harmless piece of text in a table or a paragraph."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in value).split())
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", one_line[:CELL])
