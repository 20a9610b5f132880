"""What was compared of the distribution: scenarios, distinct positions, and the tables of figures of both."""

from __future__ import annotations

from collections.abc import Sequence

from gptoss_export.validators.evidence import ScenarioResult
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.report.table import CELL, Section, Table
from gptoss_export.validators.report.text import number, one_line, percent, plural
from gptoss_export.validators.verdict import judge_top1


def scenarios_section(report: ParityReport) -> Section:
    scenarios = report.evidence.scenarios
    lead = (
        f"{plural(len(scenarios), 'way')} of asking the engine for the same tokens, teacher-forced. KL(reference || "
        "artifact) in nats; a tie is a position where the reference itself holds both tokens equal. The median of all "
        "such positions is at least what stands beside it, by the sign test at 99.9 %: 0 where they are too few to say."
    )
    rows = [(one_line(s.name, CELL), s.metrics) for s in scenarios]
    if not rows:
        return Section("scenarios", "Scenarios", lead, ())
    first, *others = metrics_tables("scenario", rows)
    counted = [(*row, str(s.calls), *_settled(s)) for row, s in zip(first.rows, scenarios, strict=True)]
    head = (*first.head, "calls", "settled", "settled: KL max", "settled: logit diff")
    distribution = Table(first.caption, head, counted)
    return Section("scenarios", "Scenarios", lead, (distribution, *others))


def _settled(scenario: ScenarioResult) -> tuple[str, ...]:
    settled = scenario.settled
    return (str(settled.positions), *map(number, (settled.kl_max, settled.logit_diff_max)))


def texts_section(report: ParityReport) -> Section | None:
    texts, top1 = report.evidence.texts, judge_top1(report.evidence, report.gates)
    if texts is None or top1 is None:
        return None
    bound = f"at most {top1.most} may be, at a level of {100 * top1.level:g} %"
    if top1.level == 1:
        bound = f"at most {top1.most} may be, by hand"
    elif texts.settled == texts.positions and not top1.most:
        bound = "none may be, since every position is settled"
    lead = (
        f"{plural(texts.positions, 'position')}, each once, by the worst of all ways in which it was asked for. "
        f"{texts.settled:,} are settled: no near-tie of a router, there or before, lets rounding send the token to "
        f"other experts. At {plural(top1.flips, 'position')} the best token is another; {top1.near_ties:,} of them are "
        f"rounding (the reference prefers its own by no more than {number(top1.noise)}), {top1.diverged:,} are not: "
        f"{bound}."
    )
    row = (
        *map(str, (texts.positions, texts.settled)),
        *map(number, (texts.kl_mean, texts.kl_max)),
        *map(str, (top1.flips, top1.near_ties, top1.diverged, top1.most)),
        number(texts.margins[0] if texts.margins else None),
    )
    counted = ("other top-1", "rounding", "beyond rounding", "at most so many", "largest margin")
    head = ("positions", "settled", "KL mean", "KL max", *counted)
    return Section("texts", "Distinct positions", lead, (Table("", head, [row]),))


def metrics_tables(what: str, rows: Sequence[tuple[str, Metrics]]) -> tuple[Table, ...]:
    """All figures of several metrics, in three tables: a table of 27 columns is none."""
    kl = ("positions", "KL mean", "KL median", "at least", "KL p99", "KL p99.9", "KL max")
    reverse = ("reverse KL mean", "reverse KL max")
    tokens = ("same top-1", "ties", "other top-1", "top-5", "top-10", "rank mean", "rank max", "non-finite")
    logits = ("logit diff mean", "logit diff max", "cosine mean", "cosine min")
    probabilities = ("positions with a text", "Δp mean", "Δp max")
    perplexities = ("perplexity of the reference", "of the artifact", "ratio", "standard error")

    def of_kl(m: Metrics) -> tuple[str, ...]:
        figures = (m.kl_mean, m.kl_median, m.kl_median_low, m.kl_p99, m.kl_p999, m.kl_max)
        return (str(m.positions), *map(number, (*figures, m.reverse_kl_mean, m.reverse_kl_max)))

    def of_tokens(m: Metrics) -> tuple[str, ...]:
        counts = (m.agreements, m.ties, m.disagreements)
        overlaps = (percent(m.top5_overlap), percent(m.top10_overlap), number(m.rank_mean), number(m.rank_max))
        of_logits = map(number, (m.logit_diff_mean, m.logit_diff_max))
        return (*map(str, counts), *overlaps, str(m.non_finite), *of_logits, _near(m.cosine_mean), _near(m.cosine_min))

    def of_text(m: Metrics) -> tuple[str, ...]:
        figures = (m.text_prob_diff_mean, m.text_prob_diff_max)
        both = map(number, (m.perplexity_reference, m.perplexity_candidate))
        last = (_ratio(m.perplexity_ratio), number(m.perplexity_ratio_se))
        return (str(m.text_positions), *map(number, figures), *both, *last)

    texts = [(name, *of_text(m)) for name, m in rows if m.text_positions]
    tables = (
        Table("the distribution", (what, *kl, *reverse), [(name, *of_kl(m)) for name, m in rows]),
        Table("tokens and logits", (what, *tokens, *logits), [(name, *of_tokens(m)) for name, m in rows]),
        Table("the text's own tokens", (what, *probabilities, *perplexities), texts),
    )
    return tuple(table for table in tables if table.rows)


def _near(value: float | None) -> str:
    """A figure that is interesting by what it lacks to 1."""
    return "none" if value is None else f"1 - {1 - value:.2g}" if value < 1 else "1"


def _ratio(value: float | None) -> str:
    return "none" if value is None else f"1 {'-' if value < 1 else '+'} {abs(value - 1):.2g}"
