"""A comparison in lines of at most 100 columns: the verdict, then what changed, worst first.

    lines(comparison, everything=False)

A figure that changed in several places is one line, of its worst place.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from gptoss_export.validators.diff import Change, ChangeKind, Comparison
from gptoss_export.validators.report.text import failure_text, number, of_limit, one_line, plural
from gptoss_export.validators.verdict import Failure

COLUMNS = 100
PLACES = 6
"""So many places are named where figures are lost or new."""

MOST_TIMES = 1000.0
_HEAD = ("figure", "worst place", "before", "now", "limit used", "change")
_NARROW = 12
_WORDS: Mapping[ChangeKind, str] = {
    "regression": "worse",
    "lost": "lost",
    "improvement": "better",
    "new": "new",
    "same": "same",
}


def lines(found: Comparison, *, everything: bool) -> list[str]:
    """What is to be printed; everything: every figure at every place as well."""
    told = [verdict_line(found)]
    told += _sentences("not kept any more", map(_gate_text, _by_gate(found.not_kept)))
    told += _sentences("worse", found.regressions)
    told += _sentences("not measured any more", _places(found.of_kind("lost")))
    told += _section("worse", found.of_kind("regression"))
    told += _sentences("kept now, not before", map(_gate_text, _by_gate(found.kept_again)))
    told += _sentences("better", found.improvements)
    told += _sentences("measured now", _places(found.of_kind("new")))
    told += _section("better", found.of_kind("improvement"))
    if len(told) > 1:
        told.append("")
    told.append(_count(found, everything))
    if everything:
        rows = [(_WORDS[change.kind], *_row(change, "")) for change in found.changes]
        told += ["", *_table([("", "figure", "place", *_HEAD[2:]), *rows], 2)]
    return told


def verdict_line(found: Comparison) -> str:
    """`WORSE: pass -> fail; max_logit_diff is 5, limit 0.0001, decode`: what is to be known if nothing else is read."""
    before, after = str(found.old_verdict), str(found.new_verdict)
    if found.other_target:
        before = f"{one_line(found.old_target, 16)} {before}"
        after = f"{one_line(found.new_target, 16)} {after}"
    start = f"{found.verdict.upper()}: {before} -> {after}"
    reason, where = _decider(found)
    line = one_line(f"{start}; {reason}" if reason else start, COLUMNS)
    left = COLUMNS - len(line) - len(", ")
    return f"{line}, {_middle(one_line(where, COLUMNS), left)}" if where and left >= _NARROW else line


def _decider(found: Comparison) -> tuple[str, str]:
    """What the verdict hangs on, and where."""
    worse = sorted(found.of_kind("regression"), key=_severity, reverse=True)
    if found.not_kept:
        return _not_kept(found.not_kept)
    if worse and worse[0].gate is not None:
        return _of_gate(worse[0]), worse[0].where
    if worse:
        values = " -> ".join((_value(worse[0].old, worse[0].old_of), _value(worse[0].new, worse[0].new_of)))
        return f"{worse[0].name} {values}", worse[0].where
    if found.regressions:
        return found.regressions[0], ""
    if found.regressed:
        return f"{plural(len(found.of_kind('lost')), 'figure')} not measured any more", ""
    if found.failing:
        return _not_kept(found.failing)
    if found.kept_again:
        return f"{found.kept_again[0].gate} is kept again", found.kept_again[0].where
    if found.nearest is None:
        return "", ""
    return f"nearest gate {_of_gate(found.nearest)}", found.nearest.where


def _of_gate(change: Change) -> str:
    before, after = _share(change.old_share), _share(change.new_share)
    return f"{change.gate} {after if before == after else f'{before} -> {after}'} of limit"


def _not_kept(failures: Sequence[Failure]) -> tuple[str, str]:
    worst = max(failures, key=_beyond)
    more = f" ({len(failures) - 1} more)" if len(failures) > 1 else ""
    if worst.gate == "measured":
        return f"nothing was measured{more}", worst.where
    return f"{worst.gate} is {number(worst.measured)}, limit {number(worst.limit)}{more}", worst.where


def _beyond(failure: Failure) -> float:
    """How far; what could not be measured is farthest."""
    if failure.measured is None or failure.gate == "measured":
        return math.inf
    if failure.gate.startswith("min_"):
        return failure.limit - failure.measured
    return failure.measured / failure.limit if failure.limit else math.inf


def _by_gate(failures: Sequence[Failure]) -> list[list[Failure]]:
    found: dict[str, list[Failure]] = {}
    for failure in failures:
        found.setdefault(failure.gate, []).append(failure)
    return list(found.values())


def _gate_text(failures: Sequence[Failure]) -> str:
    worst = failure_text(max(failures, key=_beyond))
    return worst if len(failures) == 1 else f"{worst} and {plural(len(failures) - 1, 'place')} more"


def _places(changes: Sequence[Change]) -> list[str]:
    """One sentence of the places that figures are lost or new in; none without."""
    found: dict[str, int] = {}
    for change in changes:
        found[change.where] = found.get(change.where, 0) + 1
    named = [f"{one_line(where, 60)} ({plural(n, 'figure')})" for where, n in list(found.items())[:PLACES]]
    more = len(found) - len(named)
    return [", ".join(named) + (f" and {plural(more, 'place')} more" if more else "")] if named else []


def _sentences(title: str, texts: Iterator[str] | Sequence[str]) -> list[str]:
    return [
        line
        for text in texts
        for line in textwrap.wrap(f"{title}: {text}", COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
    ]


def _section(title: str, changes: Sequence[Change]) -> list[str]:
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(change.name, []).append(change)
    worst = [(max(group, key=_severity), len(group)) for group in groups.values()]
    worst.sort(key=lambda pair: _severity(pair[0]), reverse=True)
    if not worst:
        return []
    rows = [_row(change, f" (+{n - 1})" if n > 1 else "") for change, n in worst]
    return ["", f"{title}:", *(f"  {line}" for line in _table([_HEAD, *rows], 1, COLUMNS - 2))]


def _severity(change: Change) -> tuple[float, float, float]:
    """Held figures first, by what they use of their limit on the worse side; others by how much they changed."""
    share, value = (change.old_share, change.old) if change.kind == "improvement" else (change.new_share, change.new)
    if share is None:
        share = math.inf if change.gate is not None and value else -1.0
    times = change.times or math.inf
    return share, 1 - (change.p or 0.0), 1 / times if change.kind == "improvement" else times


def _row(change: Change, more: str) -> tuple[str, ...]:
    shares = (change.old_share, change.new_share)
    used = "-" if shares == (None, None) else " -> ".join(map(_share, shares))
    before, after = _value(change.old, change.old_of), _value(change.new, change.new_of)
    return change.name, one_line(change.where, COLUMNS) + more, before, after, used, _how(change)


def _value(value: float | None, of: int | None) -> str:
    if value is None:
        return "none"
    if of is not None:
        return f"{value:.0f} of {of}"
    if 0 < abs(value - 1) < 0.01:
        return f"1 {'-' if value < 1 else '+'} {abs(value - 1):.2g}"
    return number(value)


def _share(share: float | None) -> str:
    return "none" if share is None else of_limit(share, 1.0)


def _how(change: Change) -> str:
    """What makes it count."""
    if change.kind not in ("regression", "improvement"):
        return ""
    if change.rule == "count":
        return f"p {change.p:.1g}"
    better = change.kind == "improvement"
    if change.times is None:
        return "into noise" if better else "from noise"
    times = 1 / change.times if better else change.times
    much = f"> {MOST_TIMES:g}" if times > MOST_TIMES else number(times)
    return f"{much} x {'less' if better else 'more'}"


def _count(found: Comparison, everything: bool) -> str:
    parts = [f"{len(found.of_kind(kind))} {word}" for kind, word in _WORDS.items() if found.of_kind(kind)]
    if found.of_kind("same"):
        parts[-1] += f" within noise{'' if everything else ' (--all shows them)'}"
    return f"{plural(len(found.changes), 'figure')} compared: {', '.join(parts)}"


def _table(rows: Sequence[Sequence[str]], place: int, columns: int = COLUMNS) -> list[str]:
    """In columns, the first row the head; the cells of column `place` are cut so that lines fit."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    others = sum(widths) - widths[place] + 2 * (len(widths) - 1)
    widths[place] = min(widths[place], max(columns - others, _NARROW))

    def line(row: Sequence[str]) -> str:
        cells = (
            _middle(cell, width) if k == place else cell
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        # Numbers of hundreds of digits are nobody's, yet a file may hold them.
        return "  ".join(map(str.ljust, cells, widths))[:columns].rstrip()

    return [line(row) for row in rows]


def _middle(text: str, most: int) -> str:
    """Cut in its middle: places differ at their ends."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"
