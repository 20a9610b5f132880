"""What a view is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CELL = 160
"""Characters of a foreign string in a cell."""


@dataclass(frozen=True)
class Table:
    """caption: what distinguishes it from the section's other tables, or nothing. Every row is as long as head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """name: an identifier that does not change with the report. lead: one paragraph."""

    name: str
    title: str
    lead: str
    tables: Sequence[Table]
