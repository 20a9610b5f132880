"""The charts of the report: what each shows, its legend, and the same figures as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptoss_export.validators.metrics import HISTOGRAM_EDGES, Metrics
from gptoss_export.validators.report.schema import KLByPosition, ParityReport
from gptoss_export.validators.report.svg import Area, Linear, Log, svg
from gptoss_export.validators.report.table import Table
from gptoss_export.validators.report.text import number, one_line, percent

PROBES_DRAWN = 6
"""Lines of a chart that can still be told apart: the longest probes."""


@dataclass(frozen=True)
class Chart:
    """title and note are plain text, drawing is SVG. legend: pairs of a class of the style sheet and plain text.
    table: the same figures, None where the section's own table has them. natural: pixels that the drawing is wide at
    its own size, None where it takes the width that there is."""

    name: str
    title: str
    note: str
    drawing: str
    legend: Sequence[tuple[str, str]]
    table: Table | None
    natural: int | None = None


def kl_histogram(report: ParityReport) -> Chart | None:
    """How many positions have which KL, beside those of the noise floor."""
    scenario = next((s for s in report.evidence.scenarios if s.name == "prefill"), None)
    if scenario is None or not any(scenario.metrics.kl_histogram):
        return None
    floor = report.floor
    shares = _shares(scenario.metrics)
    others = _shares(floor.metrics) if floor is not None and any(floor.metrics.kl_histogram) else None
    gate = report.gates.max_kl_mean
    used = [i for row in (shares, others or []) for i, share in enumerate(row) if share]
    # The bin below the first edge is drawn as one decade at the left end.
    edges = [HISTOGRAM_EDGES[0] / 10, *HISTOGRAM_EDGES, HISTOGRAM_EDGES[-1] * 10]
    x = Log.around([edges[min(used)] * 1.01, edges[max(used) + 1], *([gate] if gate else [])])
    area = Area(x, Linear(0, 1.05 * max([*shares, *(others or [])]), share=True))
    parts = area.axes("KL in nats", "share of positions")
    parts += [area.bar(edges[i], edges[i + 1], 0, share, "s1") for i, share in enumerate(shares) if share]
    legend = [("s1", f"this artifact, prefill, mean {number(scenario.metrics.kl_mean)}")]
    if others is not None and floor is not None:
        steps = [point for i in range(min(used), max(used) + 1) for point in _step(edges, others, i)]
        parts.append(area.line(steps, "s2"))
        legend.append(("s2", f"noise floor, {floor.dtype}, mean {number(floor.metrics.kl_mean)}"))
    if gate:
        parts.append(area.upright(gate, "gate"))
        legend.append(("gate", f"gate of the mean, {number(gate)}"))
    rows = [
        (_bin(i), str(scenario.metrics.kl_histogram[i]), "" if floor is None else str(floor.metrics.kl_histogram[i]))
        for i in range(min(used), max(used) + 1)
    ]
    note = "A narrow hill far left of the gate is rounding; a second hill is another model."
    drawing = svg("histogram", "Histogram of KL", f"{note} {'; '.join(text for _, text in legend)}.", parts)
    table = Table("positions by KL", ("KL", "prefill", "noise floor"), rows)
    return Chart("histogram", "How far positions are off", note, drawing, legend, table)


def _shares(m: Metrics) -> list[float]:
    total = sum(m.kl_histogram)
    return [count / total for count in m.kl_histogram]


def _step(edges: Sequence[float], shares: Sequence[float], i: int) -> tuple[tuple[float, float], tuple[float, float]]:
    return (edges[i], shares[i]), (edges[i + 1], shares[i])


def _bin(i: int) -> str:
    if i == 0:
        return f"below {HISTOGRAM_EDGES[0]:.2g}"
    if i == len(HISTOGRAM_EDGES):
        return f"{HISTOGRAM_EDGES[-1]:.2g} and more"
    return f"{HISTOGRAM_EDGES[i - 1]:.2g} to {HISTOGRAM_EDGES[i]:.2g}"


def kl_by_position(report: ParityReport) -> Chart | None:
    """KL along the text, where a window, a cache or a rotation that is wrong begins to show."""
    courses = sorted((c for c in report.kl_by_position if c.start), key=lambda c: -c.stop[-1])[:PROBES_DRAWN]
    if not courses:
        return None
    area = Area(
        Linear(0, max(c.stop[-1] for c in courses), whole=True),
        Log.around(value for c in courses for value in (*c.mean, *c.max)),
    )
    parts = area.axes("position", "KL in nats")
    legend = []
    for k, course in enumerate(courses, 1):
        parts += _course(area, course, f"s{k}")
        legend.append((f"s{k}", one_line(course.probe, 40)))
    window = report.sliding_window
    if window < max(c.stop[-1] for c in courses):
        parts.append(area.upright(window, "window"))
        legend.append(("window", f"the sliding window of {window} is full"))
    left_out = len(report.kl_by_position) - len(courses)
    note = "Level is right; a step at the window or a slope is not. Mean of each span, its largest value fainter."
    note += f" The longest {len(courses)} of {len(report.kl_by_position)} probes." if left_out > 0 else ""
    rows = [
        (one_line(c.probe, 40), str(start), str(stop - 1), number(mean), number(most))
        for c in courses
        for start, stop, mean, most in zip(c.start, c.stop, c.mean, c.max, strict=True)
    ]
    drawing = svg("positions", "KL by position", f"{note} {'; '.join(text for _, text in legend)}.", parts)
    table = Table("KL by position", ("probe", "from", "to", "mean", "max"), rows)
    return Chart("positions", "Where in the text", note, drawing, legend, table)


def _course(area: Area, course: KLByPosition, kind: str) -> list[str]:
    middle = [(start + stop - 1) / 2 for start, stop in zip(course.start, course.stop, strict=True)]
    lines = [area.line(list(zip(middle, course.mean, strict=True)), kind)]
    if course.mean != course.max:
        lines.insert(0, area.line(list(zip(middle, course.max, strict=True)), f"{kind} faint"))
    return lines


def layer_errors(report: ParityReport) -> Chart | None:
    """Relative error of both halves of every layer, and the gate."""
    layers = report.evidence.layers
    if not layers:
        return None
    series = {
        "attention": [(r.layer, r.attention) for r in layers],
        "attention with cache": [(r.layer, r.cached) for r in layers],
        "experts": [(r.layer, r.experts) for r in layers],
    }
    gate = report.gates.max_layer_error
    values = [value for points in series.values() for _, value in points if value is not None]
    last = max(report.evidence.num_layers - 1, 1)
    area = Area(Linear(-0.5, last + 0.5, whole=True), Log.around([*values, gate]))
    parts = area.axes("layer", "relative error")
    legend = []
    if gate:
        parts.append(area.across(gate, "gate"))
    for k, (name, points) in enumerate(series.items(), 1):
        known = [(float(layer), value) for layer, value in points if value is not None]
        if known:
            parts += [area.line(known, f"s{k}"), area.dots(known, f"s{k}")]
            legend.append((f"s{k}", f"{name}, largest {number(max(value for _, value in known))}"))
    if broken := [record.layer for record in layers if record.non_finite]:
        parts += [area.cross(layer, "divergence") for layer in broken]
        legend.append(("divergence", f"not finite in {len(broken)} layers"))
    legend.append(("gate", f"gate, {number(gate)}"))
    note = "Each layer was given the reference's input, so the first one above the gate is where an error starts."
    drawing = svg("layers-chart", "Error by layer", f"{note} {'; '.join(text for _, text in legend)}.", parts)
    return Chart("layers-chart", "Error by layer", note, drawing, legend, None)


def flips_by_layer(report: ParityReport) -> Chart | None:
    """Share of tokens that went to other experts, by what kind of flip."""
    routing = report.evidence.routing
    if routing is None or not any(r.tokens > r.same_set for r in routing.layers):
        return None
    rows = [r for r in routing.layers if r.tokens]
    most = max((r.tokens - r.same_set) / r.tokens for r in rows)
    last = max(report.evidence.num_layers - 1, 1)
    area = Area(Linear(-0.5, last + 0.5, whole=True), Linear(0, 1.05 * most, share=True))
    parts = area.axes("layer", "share of tokens")
    for r in rows:
        base = 0.0
        counts = (r.ties, r.near_ties, r.consequences, r.diverged)
        for kind, count in zip(("tie", "near-tie", "consequence", "divergence"), counts, strict=True):
            if count:
                parts.append(area.bar(r.layer - 0.38, r.layer + 0.38, base, base + count / r.tokens, kind))
            base += count / r.tokens
    legend = [
        (kind, f"{text}, {percent(sum(numbers) / routing.token_layers)} of all")
        for kind, text, numbers in (
            ("tie", "ties", [r.ties for r in rows]),
            ("near-tie", "near-ties", [r.near_ties for r in rows]),
            ("consequence", "consequences of a flip below", [r.consequences for r in rows]),
            ("divergence", "divergences", [r.diverged for r in rows]),
        )
    ]
    note = "Tokens that went to other experts than the reference's. Only divergences count against the artifact."
    drawing = svg("flips", "Flips by layer", f"{note} {'; '.join(text for _, text in legend)}.", parts)
    return Chart("flips", "Flips by layer", note, drawing, legend, None)
