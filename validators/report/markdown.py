"""parity.md: the report for a release ticket. Its first line is the verdict; under 65,000 characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.report.sections import sections
from gptoss_export.validators.report.table import Section, Table
from gptoss_export.validators.report.text import model_sentence, verdict_sentence, verdict_word

LARGEST = 65_000
ROWS_SHOWN = (200, 60, 30, 12, 4)
"""Rows a table, fewer until the whole is small enough."""

END = "\n\nCut here: the whole report is parity.json.\n"


def to_markdown(report: ParityReport) -> str:
    """The report as GitHub-flavoured Markdown."""
    verdict = f"**{verdict_word(report)}**: {_text(verdict_sentence(report))}"
    head = [verdict, *([_text(model)] if (model := model_sentence(report)) else [])]
    parts = sections(report)
    for rows in ROWS_SHOWN:
        text = "\n\n".join([*head, *(_section(section, rows) for section in parts)]) + "\n"
        if len(text) < LARGEST:
            return text
    return text[: LARGEST - len(END) - 1] + END


def _section(section: Section, rows: int) -> str:
    pieces = [f"## {section.title}", _text(section.lead)]
    for table in section.tables:
        pieces += [f"### {table.caption[0].upper()}{table.caption[1:]}"] if table.caption else []
        pieces.append(_table(table, rows))
    return "\n\n".join(piece for piece in pieces if piece)


def _table(table: Table, most: int) -> str:
    if not table.rows:
        return "Nothing."
    lines = [_row(table.head), "|" + " --- |" * len(table.head), *map(_row, table.rows[:most])]
    more = len(table.rows) - most
    return "\n".join(lines) + (f"\n\nand {more} more in parity.json" if more > 0 else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _text(text: str) -> str:
    """Plain text of one line as a paragraph that shows the same, and is no list, heading or rule."""
    return re.sub(r"^([-+~=])", r"\\\1", _escaped(text))


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_\[\]<>|`#&~])", r"\\\1", text)
