"""parity.md: the report for a release ticket. Its first line is the verdict; under 65,000 characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.report.json_writer import content_sha256
from gptoss_export.validators.report.schema import Engine, ParityReport, ScenarioResult

LARGEST = 65_000
ROWS_SHOWN = 60
CELL = 160
REASON = 400

FIGURES = ("KL mean", "KL p99", "KL max", "logit diff mean", "logit diff max")
COUNTS = ("same top-1", "ties", "other top-1", "non-finite")


def to_markdown(report: ParityReport) -> str:
    """The report as GitHub-flavoured Markdown."""
    sections = [
        _verdict(report),
        _failures(report),
        _scenarios(report.scenarios),
        _gates(report),
        _floor(report),
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
    engine, failures = report.engine, report.verdict.failures
    kl = max((s.metrics.kl_mean for s in report.scenarios if s.metrics.kl_mean is not None), default=None)
    diff = max(
        (s.metrics.logit_diff_max for s in report.scenarios if s.metrics.logit_diff_max is not None), default=None
    )
    extent = f"over {positions} positions in {len(report.scenarios)} scenarios"
    worst = f"(worst mean KL {_number(kl)}, worst logit difference {_number(diff)})"
    if report.outcome == "pass":
        return f"**PASS**: {_text(report.target)} is the model within its gates, {extent} {worst}."
    if report.outcome == "not executed":
        return (
            f"**NOT EXECUTED**: the graph passes (graph parity), the engine was not run: {_reason(engine)}. "
            "Run `gptoss-export validate <folder>` on a host with an NVIDIA GPU. "
            f"The graph of {_text(report.target)} keeps its gates, {extent} {worst}."
        )
    first = failures[0]
    graph_only = (
        f" Only the graph was run, by {_text(engine.ran_instead or '')}; the engine was not: {_reason(engine)}."
        if engine.execution == "graph only"
        else ""
    )
    return (
        f"**FAIL**: {_text(report.target)} is not shown to be the model, over {positions} positions: "
        f"{len(failures)} gates not kept in {len({f.scenario for f in failures})} scenarios, first "
        f"{_text(first.gate)} in {_text(first.scenario)} ({_number(first.measured)}, limit {_number(first.limit)})."
        f"{graph_only}"
    )


def _reason(engine: Engine) -> str:
    return _text(engine.not_executed_reason or "", REASON).rstrip(".")


def _failures(report: ParityReport) -> str:
    if report.verdict.passed:
        return ""
    rows = [(f.scenario, f.gate, _number(f.measured), _number(f.limit)) for f in report.verdict.failures]
    return "## Gates not kept\n\n" + _table(("scenario", "gate", "measured", "limit"), rows)


def _scenarios(scenarios: Sequence[ScenarioResult]) -> str:
    rows = [(s.name, str(s.calls), *_figures(s.metrics)) for s in scenarios]
    return (
        "## Scenarios\n\nTeacher-forced, KL(reference || artifact) in nats. A tie is a position where the "
        "reference itself holds both tokens equal.\n\n"
        + _table(("scenario", "calls", "positions", *FIGURES, *COUNTS), rows)
    )


def _figures(m: Metrics) -> tuple[str, ...]:
    """The cells of positions, FIGURES and COUNTS."""
    figures = (m.kl_mean, m.kl_p99, m.kl_max, m.logit_diff_mean, m.logit_diff_max)
    counts = (m.agreements, m.ties, m.disagreements, m.non_finite)
    return (str(m.positions), *map(_number, figures), *map(str, counts))


def _gates(report: ParityReport) -> str:
    g, a = report.gates, report.policy.absolute
    relative = f"{report.policy.factor:g} x the noise floor"
    spare_kl = f", and {_number(g.spare_kl)} / positions for {g.spare_positions} of them" if g.spare_kl else ""
    spare = f", or all but {g.spare_positions} of a scenario's" if g.spare_positions else ""

    def source(resolved: float, absolute: float) -> str:
        return "absolute" if resolved == absolute else relative

    rows = [
        ("mean KL, at most", f"{_number(g.max_kl_mean)}{spare_kl}", source(g.max_kl_mean, a.max_kl_mean)),
        ("logit difference, at most", _number(g.max_logit_diff), source(g.max_logit_diff, a.max_logit_diff)),
        (
            "top-1 agreement, ties aside, at least",
            f"{100 * g.min_top1_agreement:.4g} %{spare}",
            source(g.min_top1_agreement, a.min_top1_agreement),
        ),
        ("non-finite logits", "0", "absolute"),
        ("scenarios that did not run", "0", "absolute"),
    ]
    return "## Gates\n\nEvery scenario has to keep every one.\n\n" + _table(("gate", "limit", "from"), rows)


def _floor(report: ParityReport) -> str:
    if report.floor is None:
        return ""
    return (
        f"## Noise floor\n\nWhat rounding costs: transformers itself in {_text(report.floor.dtype)} against "
        "transformers in float32, over every position of the probes.\n\n"
        + _table(("positions", *FIGURES, *COUNTS), [_figures(report.floor.metrics)])
    )


def _probes(report: ParityReport) -> str:
    longest = max((p.tokens for p in report.probes), default=0)
    crossed = "is" if longest > report.sliding_window else "**is not**"
    rows = [(p.name, str(p.tokens), p.sha256) for p in report.probes]
    return f"## Probes\n\nThe sliding window of {report.sliding_window} positions {crossed} crossed.\n\n" + _table(
        ("probe", "tokens", "sha256 of the ids"), rows
    )


def _setting(report: ParityReport) -> str:
    engine, machine = report.engine, report.machine
    ran = engine.execution if engine.ran_instead is None else f"{engine.execution}, by {engine.ran_instead}"
    rows = [
        ("reference", report.reference),
        ("engine", f"{engine.name} {engine.version}, {engine.provider}"),
        ("execution", ran),
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


def _text(value: str, most: int = CELL) -> str:
    """Any string as one harmless piece of text in a table or a paragraph, cut to `most` characters."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in value).split())
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", one_line[:most])
