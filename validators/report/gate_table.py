"""Every gate once: its limit, where that comes from, and what came nearest to it."""

from __future__ import annotations

import math
from dataclasses import fields

from gptoss_export.validators.binomial import LEVEL
from gptoss_export.validators.gates import GATE_NAMES, Gates
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.report.table import CELL, Section, Table
from gptoss_export.validators.report.text import number, of_limit, one_line
from gptoss_export.validators.verdict import Case, cases

COUNTED = ("min_top1_agreement", "max_diverged")
"""Gates of counts, whose limit follows from how many positions there are."""

CONDITIONS = ("non_finite", "saturated", "measured")
"""Gates that have no limit to set."""


def worst_cases(report: ParityReport) -> list[Case]:
    """One case a gate, in the order of the gates: the one that is farthest beyond its limit, or nearest to it."""
    found: dict[str, Case] = {}
    for case in cases(report.evidence, report.gates):
        if case.gate not in found or _severity(case) > _severity(found[case.gate]):
            found[case.gate] = case
    order = (*GATE_NAMES, *CONDITIONS)
    return sorted(found.values(), key=lambda case: order.index(case.gate))


def _severity(case: Case) -> tuple[bool, float]:
    if case.measured is None:
        return not case.kept, math.inf
    if case.gate.startswith("min_"):
        return not case.kept, -case.measured
    # Limits of one gate differ by the number of positions.
    return not case.kept, case.measured / case.limit if case.limit else case.measured


def gates_section(report: ParityReport) -> Section:
    """The gates as a table."""
    rows = [
        (
            case.gate,
            "yes" if case.kept else "NO",
            number(case.measured),
            number(case.limit),
            "-" if case.gate.startswith("min_") else of_limit(case.measured, case.limit),
            one_line(case.where, CELL),
            origin(report, case.gate),
        )
        for case in worst_cases(report)
    ]
    by_chance = "" if set(COUNTED) <= set(report.gates.by_hand) else f" {_by_chance(report)}"
    lead = (
        "Every gate holds at every place; here is the place of each that comes nearest to the limit, or is farthest "
        f"beyond it.{by_chance}"
    )
    head = ("gate", "kept", "worst measured", "limit", "of the limit", "where", "limit from")
    return Section("gates", "Gates", lead, (Table("", head, rows),))


def _by_chance(report: ParityReport) -> str:
    beside = "" if report.gates.beside is None else ", or are no evidence of a higher rate than the noise floor's"
    return (
        f"Counts ({', '.join(COUNTED)}) have as limit what is seen by chance once in {round(1 / (1 - LEVEL)):,} runs"
        f"{beside}: exact binomial bounds over the positions that were judged."
    )


def origin(report: ParityReport, gate: str) -> str:
    """Where the limit of a gate comes from: a condition, the table, the noise floor, or --gate."""
    if gate not in {field.name for field in fields(Gates)}:
        return "condition"
    table, used = getattr(report.table_gates, gate), getattr(report.gates, gate)
    if gate in report.overrides:
        how = "loosened" if gate in report.loosened else "the same" if table == used else "tightened"
        return f"--gate, {how} (table {number(table)})"
    if gate in COUNTED:
        return "by chance" if report.gates.beside is None else "by chance, or beside the noise floor"
    if table == getattr(report.policy.absolute, gate):
        return "absolute"
    return f"{report.policy.factor:g} x the noise floor"
