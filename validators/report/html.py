"""parity.html: the report in one file for a browser, with charts; it loads nothing and runs nothing.

A content security policy in the page itself forbids scripts, requests and forms, and everything that is not ours is
escaped, so that a file name or a probe's text can at the most be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

from gptoss_export.validators.report.charts import (
    Chart,
    flips_by_layer,
    kl_by_position,
    kl_histogram,
    layer_errors,
)
from gptoss_export.validators.report.heat_map import heat_map
from gptoss_export.validators.report.html_style import STYLE
from gptoss_export.validators.report.json_writer import content_sha256
from gptoss_export.validators.report.schema import Outcome, ParityReport
from gptoss_export.validators.report.sections import sections
from gptoss_export.validators.report.table import CELL, Section, Table
from gptoss_export.validators.report.text import (
    loosened_sentence,
    model_sentence,
    one_line,
    verdict_finding,
    verdict_word,
)

ROWS_OPEN = 14
"""Longer tables wait for a click."""

WORST_OPEN = 8
ROWS_SHOWN = 2000
LONG = 44
FIRST = ("failures", "bisection", "gates")

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_CHARTS: Mapping[str, Sequence[Callable[[ParityReport], Chart | None]]] = {
    "scenarios": (kl_histogram, kl_by_position),
    "layers": (layer_errors,),
    "routing": (flips_by_layer, heat_map),
}
_TONES: Mapping[Outcome, tuple[str, str]] = {
    "pass": ("pass", "M14 23l6 6 11-13"),
    "fail": ("fail", "M15 15l14 14m0-14L15 29"),
    "not executed": ("wait", "M22 13v12m0 6v.1"),
}
_NUMBER = re.compile(r"[-+]?[0-9][0-9,]*(\.[0-9]+)?(e[-+]?[0-9]+)?( %)?|none|-|1 [-+] [0-9.e-]+|inf")
_EXPONENT = re.compile(r"(?<=[0-9]e-)(?=[0-9])")
_HASH = re.compile(r"[0-9a-f]{64}")


def to_html(report: ParityReport) -> str:
    """The page: less than 1 MB for the largest gpt-oss."""
    parts = sorted(sections(report), key=lambda s: FIRST.index(s.name) if s.name in FIRST else len(FIRST))
    title = f"{verdict_word(report)}: parity of {one_line(report.target, CELL)}"
    if report.binding.model.title is not None:
        title += f", {report.binding.model.title}"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>",
            _banner(report),
            _contents(parts),
            *(_section(section, report) for section in parts),
            _footer(report),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _banner(report: ParityReport) -> str:
    tone, sign = _TONES[report.outcome]
    loosened, model = loosened_sentence(report), model_sentence(report)
    return (
        f'<header class="verdict {tone}">'
        f'<svg viewBox="0 0 44 44" aria-hidden="true"><circle class="ring" cx="22" cy="22" r="21"/>'
        f'<path class="sign" d="{sign}"/></svg>'
        f'<h1><span class="word">{verdict_word(report)}</span> '
        f'<span class="target">{escape(one_line(report.target, CELL))}</span></h1>'
        f"<p>{_prose(_sentence(verdict_finding(report)))}</p>"
        + (f"<p>{escape(model)}</p>" if model else "")
        + (f'<p class="loosened">{_prose(loosened)}</p>' if loosened else "")
        + "</header>"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith("the graph") else text


def _prose(text: str) -> str:
    """Escaped, and no line ends within a number: a word joiner follows the hyphen of an exponent."""
    return _EXPONENT.sub("&#8288;", escape(text))


def _contents(parts: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in parts)
    return f'<nav aria-label="Sections">{links}</nav>'


def _section(section: Section, report: ParityReport) -> str:
    charts = [chart for make in _CHARTS.get(section.name, ()) if (chart := make(report)) is not None]
    drawn = f'<div class="charts">{"".join(map(_figure, charts))}</div>' if charts else ""
    lead = f'<p class="lead">{_prose(section.lead)}</p>' if section.lead else ""
    tables = "\n".join(_titled(section, table) for table in section.tables)
    return (
        f'<section id="{section.name}" aria-labelledby="{section.name}-h">'
        f'<h2 id="{section.name}-h">{escape(section.title)}</h2>{lead}{drawn}\n{tables}</section>'
    )


def _figure(chart: Chart) -> str:
    wide = ' class="wide"' if chart.natural is not None else ""
    drawing = f'<div class="drawing fits">{chart.drawing}</div>'
    if chart.natural is not None:
        size = f"width:100%;max-width:{chart.natural}px;min-width:{min(chart.natural, 640)}px"
        sized = chart.drawing.replace("<svg ", f'<svg style="{size}" ', 1)
        drawing = f'<div class="drawing" tabindex="0" role="region" aria-label="{escape(chart.title)}">{sized}</div>'
    legend = "".join(f"<li>{_key(kind)}{escape(text)}</li>" for kind, text in chart.legend)
    figures = "" if chart.table is None else _folded(chart.table, chart.title)
    return (
        f"<figure{wide}><figcaption>{escape(chart.title)}</figcaption><p>{_prose(chart.note)}</p>{drawing}"
        f'<ul class="legend">{legend}</ul>{figures}</figure>'
    )


def _key(kind: str) -> str:
    """The sample of a colour in a legend."""
    if kind == "h0":
        inner = '<path class="hatch" d="M1 1h16v10h-16z"/>'
    elif kind in ("gate", "window"):
        inner = f'<path class="mark {kind}" d="M0 6h18"/>'
    elif kind.startswith("h"):
        inner = f'<path class="{kind}" d="M1 1h16v10h-16z"/>'
    else:
        inner = f'<path class="key {kind}" d="M1 2h16v8h-16z"/>'
    return f'<svg viewBox="0 0 18 12" aria-hidden="true">{inner}</svg>'


def _titled(section: Section, table: Table) -> str:
    if len(table.rows) > ROWS_OPEN and section.name == "worst":
        return _table(Table("", table.head, table.rows[:WORST_OPEN]), section.title) + _folded(table, section.title)
    if len(table.rows) > ROWS_OPEN and section.name not in FIRST:
        return _folded(table, section.title)
    heading = f"<h3>{escape(table.caption)}</h3>" if table.caption else ""
    return heading + _table(table, section.title)


def _folded(table: Table, title: str) -> str:
    name = table.caption or f"{title[0].lower()}{title[1:]}"
    return f"<details><summary>{len(table.rows)} rows: {escape(name)}</summary>{_table(table, title)}</details>"


def _table(table: Table, title: str) -> str:
    if not table.rows:
        return "<p>Nothing.</p>"
    name = escape(f"{title}: {table.caption}" if table.caption else title)
    numeric = [all(_NUMBER.fullmatch(row[k]) or not row[k] for row in table.rows) for k in range(len(table.head))]
    head = "".join(
        f'<th scope="col"{_css("n" if numeric[k] else "")}>{escape(cell)}</th>' for k, cell in enumerate(table.head)
    )
    rows = "\n".join(
        f"<tr>{''.join(_cell(cell, numeric[k]) for k, cell in enumerate(row))}</tr>" for row in table.rows[:ROWS_SHOWN]
    )
    more = len(table.rows) - ROWS_SHOWN
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
        + (f"<p>and {more:,} more in parity.json</p>" if more > 0 else "")
    )


def _cell(cell: str, numeric: bool) -> str:
    kind = "n" if numeric else "hash" if _HASH.fullmatch(cell) else "long" if len(cell) > LONG else ""
    mark = {"NO": "bad", "yes": "good"}.get(cell, "")
    return f"<td{_css(f'{kind} {mark}'.strip())}>{escape(cell)}</td>"


def _css(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _footer(report: ParityReport) -> str:
    return (
        f"<footer>Made by gptoss-export {escape(one_line(report.versions.get('gptoss-export', ''), 40))} on "
        f"{escape(one_line(report.created_at, 40))}. The truth is parity.json, sha256 of its content "
        f'<span class="hash">{content_sha256(report)}</span>.</footer>'
    )
