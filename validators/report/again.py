"""The verdict taken again: the same evidence, other limits, nothing run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptoss_export.validators.gates import override
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.verdict import judge


def judged_again(report: ParityReport, overrides: Mapping[str, float]) -> ParityReport:
    """The report with these limits in place of the table's, on top of those that it was measured with.

    Names are those of GATE_NAMES; raises ValueError for others, and for values that are no limit. A bisection goes by
    the gates that it was made with, so it is dropped where these are others.
    """
    both = {**report.overrides, **overrides}
    gates = override(report.table_gates, both)
    return replace(
        report,
        overrides=both,
        gates=gates,
        verdict=judge(report.evidence, gates),
        bisection=report.bisection if gates == report.gates else None,
    )
