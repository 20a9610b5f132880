"""Which experts the probes visit: layers down, experts across."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gptoss_export.validators.report.charts import Chart
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.report.svg import label, svg
from gptoss_export.validators.report.table import Table
from gptoss_export.validators.routing import RoutingLayer

LEVELS = 5
LEFT, TOP, BOTTOM = 46, 10, 46
ROW = 15
WIDE = 1000
"""Pixels that all experts together take at the most."""


def heat_map(report: ParityReport) -> Chart | None:
    """The reference's visits to every expert of every layer; those without any are hatched."""
    routing = report.evidence.routing
    if routing is None or not routing.layers:
        return None
    layers = routing.layers
    experts = max(len(row.visits) for row in layers)
    column = min(max(WIDE // experts, 2), 30)
    most = max(max(row.visits) for row in layers)
    cells: dict[int, list[str]] = {}
    for k, row in enumerate(layers):
        for expert, visits in enumerate(row.visits):
            box = f"M{LEFT + expert * column} {TOP + k * ROW}h{column - 1}v{ROW - 1}h{1 - column}z"
            cells.setdefault(level(visits, most), []).append(box)
    # One path a level: thousands of rectangles would be most of the file.
    parts = [_HATCHING, *(f'<path class="h{step}" d="{"".join(boxes)}"/>' for step, boxes in sorted(cells.items()))]
    width, height = LEFT + experts * column + 8, TOP + len(layers) * ROW + BOTTOM
    if 0 in cells:
        parts.append(f'<path class="hatch" d="{"".join(cells[0])}"/>')
    parts += _axes(layers, experts, column)
    untested = len(routing.untested)
    legend = [(f"h{step}", text) for step, text in _legend(most)]
    legend.append(("h0", f"untested: {untested:,} of {sum(len(r.visits) for r in layers):,}"))
    note = "Tokens that the reference sends to each expert. Of a hatched one this report says nothing."
    drawing = svg("heat-map", "Visits of experts", f"{note} {untested} untested.", parts, (width, height))
    head = ("layer", *map(str, range(experts)))
    table = Table("visits by layer and expert", head, [(str(r.layer), *map(str, r.visits)) for r in layers])
    return Chart("heat-map", "Experts that were tested", note, drawing, legend, table, natural=width)


def level(visits: int, most: int) -> int:
    """0 for none, else 1 to LEVELS by the logarithm."""
    if visits == 0:
        return 0
    return 1 + min(int(LEVELS * math.log(visits) / math.log(most + 1)), LEVELS - 1)


def _legend(most: int) -> list[tuple[int, str]]:
    found: dict[int, list[int]] = {}
    # The edges of the levels, without walking through every count.
    edges = {1, most, *(round((most + 1) ** (step / LEVELS)) + d for step in range(LEVELS + 1) for d in (-1, 0, 1))}
    for visits in sorted(v for v in edges if 1 <= v <= most):
        found.setdefault(level(visits, most), []).append(visits)
    return [(step, f"{v[0]:,}" if v[0] == v[-1] else f"{v[0]:,} to {v[-1]:,}") for step, v in sorted(found.items())]


def _axes(layers: Sequence[RoutingLayer], experts: int, column: int) -> list[str]:
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n * column >= 24 or n >= experts)
    bottom = TOP + len(layers) * ROW
    parts = [label(LEFT + (e + 0.5) * column, bottom + 15, str(e), "middle") for e in range(0, experts, every)]
    parts.append(label(LEFT, bottom + 36, "expert →", "start", "name"))
    parts += [label(LEFT - 6, TOP + k * ROW + 11, str(row.layer), "end") for k, row in enumerate(layers) if k % 2 == 0]
    parts.append(f'<text class="name" transform="translate(11 {bottom}) rotate(-90)">layer</text>')
    return parts


_HATCHING = (
    '<defs><pattern id="hatching" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<path class="hatch-line" d="M0 0V5"/></pattern></defs>'
)
