"""Release against release: what changed between two reports of the same checkpoint and probes, and whether it is worse.

    comparison = compare(old, new)
    comparison.verdict              # "better", "worse" or "the same"

Worse is a figure that `significance.grew`; and, whatever the figures are, a gate that is not kept any more, a verdict
that is lower, something that is not measured any more, a looser gate. Everything has its opposite, which is better, so
what is worse between two reports is better between them the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from gptoss_export.exporter.errors import NotComparableError
from gptoss_export.validators.figures import Figure, Key, Rule, figures_of
from gptoss_export.validators.gates import loosened
from gptoss_export.validators.report.schema import Outcome, ParityReport
from gptoss_export.validators.report.text import number, plural
from gptoss_export.validators.significance import TOLERANCE, chance, grew, times
from gptoss_export.validators.verdict import Failure

ChangeKind = Literal["regression", "improvement", "same", "lost", "new"]
ComparisonVerdict = Literal["better", "worse", "the same"]
_RANK = {"pass": 0, "not executed": 1, "fail": 2}


@dataclass(frozen=True)
class Change:
    """One figure before and after.

    old, new: values, of a count its events, and old_of, new_of what they are out of; None where it was not measured.
    gate: what it is held to, None for a figure that no gate is about; old_share, new_share: of its limit that it uses
    up, None beyond a limit of 0. p: of a count or a figure with a standard error, the chance of at least such a
    difference where none is. times: how many times as bad; None where either side is noise.
    lost: it was measured and is not any more, or could be and cannot; new: the other way round.
    """

    where: str
    name: str
    kind: ChangeKind
    rule: Rule
    gate: str | None
    old: float | None
    new: float | None
    old_of: int | None
    new_of: int | None
    old_share: float | None
    new_share: float | None
    p: float | None
    times: float | None


@dataclass(frozen=True)
class Comparison:
    """old_*, new_*: of the reports. changes: of every figure. not_kept: gates that were kept and are not; kept_again:
    the other way round; failing: all that the new report does not keep. regressions, improvements: what is neither
    figure nor gate, in words. tolerance: times, see `significance`."""

    old_target: str
    new_target: str
    old_verdict: Outcome
    new_verdict: Outcome
    changes: tuple[Change, ...]
    not_kept: tuple[Failure, ...]
    kept_again: tuple[Failure, ...]
    failing: tuple[Failure, ...]
    regressions: tuple[str, ...]
    improvements: tuple[str, ...]
    tolerance: float

    def of_kind(self, *kinds: ChangeKind) -> list[Change]:
        return [change for change in self.changes if change.kind in kinds]

    @property
    def other_target(self) -> bool:
        """Whether the reports are of two targets. Those are measured in types and lengths of their own, so a figure
        that only one has is no regression: what every target has to be measured in is a gate."""
        return self.old_target != self.new_target

    @property
    def regressed(self) -> bool:
        lost = not self.other_target and self.of_kind("lost")
        return bool(self.regressions or self.not_kept or lost or self.of_kind("regression"))

    @property
    def improved(self) -> bool:
        """Whether anything is better, worse as other things may be."""
        new = not self.other_target and self.of_kind("new")
        return bool(self.improvements or self.kept_again or new or self.of_kind("improvement"))

    @property
    def verdict(self) -> ComparisonVerdict:
        return "worse" if self.regressed else "better" if self.improved else "the same"

    @property
    def nearest(self) -> Change | None:
        """The figure that uses up most of the limit that it is held to, in the new report."""
        held = [change for change in self.changes if change.new_share is not None]
        return max(held, key=lambda change: change.new_share or 0.0, default=None)


def compare(
    old: ParityReport, new: ParityReport, *, tolerance: float = TOLERANCE, allow_other_target: bool = False
) -> Comparison:
    """Each report by its own gates. Raises NotComparableError, naming what differs, for reports that are not about the
    same measurement."""
    _require_comparable(old, new, allow_other_target)
    before, after = figures_of(old), figures_of(new)
    return Comparison(
        old_target=old.target,
        new_target=new.target,
        old_verdict=old.outcome,
        new_verdict=new.outcome,
        changes=tuple(_change(key, before, after, tolerance) for key in {**before, **after}),
        not_kept=_first_not_kept(old, new),
        kept_again=_first_not_kept(new, old),
        failing=new.verdict.failures,
        regressions=tuple(_worse(old, new, tolerance)),
        improvements=tuple(_worse(new, old, tolerance, backwards=True)),
        tolerance=tolerance,
    )


def _require_comparable(old: ParityReport, new: ParityReport, allow_other_target: bool) -> None:
    again = "Compare reports of the same checkpoint and probes; `gptoss-export validate` makes a new one."
    if old.binding.checkpoint != new.binding.checkpoint:
        names = {**old.binding.checkpoint, **new.binding.checkpoint}
        differ = [n for n in names if old.binding.checkpoint.get(n) != new.binding.checkpoint.get(n)]
        raise NotComparableError(
            f"the reports are of two checkpoints: {len(differ)} of the files are not alike, first {differ[0]!a:.160}",
            again,
        )
    if [probe.sha256 for probe in old.probes] != [probe.sha256 for probe in new.probes]:
        raise NotComparableError(
            f"the reports are over other probes: {plural(len(old.probes), 'probe')} of "
            f"{sum(p.tokens for p in old.probes)} tokens ({old.effort}), and {len(new.probes)} of "
            f"{sum(p.tokens for p in new.probes)} ({new.effort})",
            again,
        )
    if old.target != new.target and not allow_other_target:
        raise NotComparableError(
            f"the reports are of two targets, {old.target!a:.80} and {new.target!a:.80}",
            "Compare reports of one target, or pass --allow-other-target.",
        )


def _change(key: Key, before: Mapping[Key, Figure], after: Mapping[Key, Figure], tolerance: float) -> Change:
    old, new = before.get(key), after.get(key)
    was, now = old or new, new or old
    assert was is not None and now is not None
    both = old is not None and new is not None and old.badness is not None and new.badness is not None
    kind: ChangeKind = "same"
    if both and grew(was, now, tolerance):
        kind = "regression"
    elif both and grew(now, was, tolerance):
        kind = "improvement"
    elif old is not None and old.badness is not None and not both:
        kind = "lost"
    elif new is not None and new.badness is not None and not both:
        kind = "new"
    return Change(
        where=key[0],
        name=key[1],
        kind=kind,
        rule=now.rule,
        gate=now.gate if now.held or was.held else None,
        old=None if old is None else old.value,
        new=None if new is None else new.value,
        old_of=None if old is None else old.of,
        new_of=None if new is None else new.of,
        old_share=_held_share(old),
        new_share=_held_share(new),
        p=min(chance(was, now), chance(now, was)) if both and now.rule in ("count", "standard error") else None,
        times=times(was, now) if both else None,
    )


def _held_share(figure: Figure | None) -> float | None:
    share = figure.share if figure is not None and figure.held else None
    return share if share is not None and math.isfinite(share) else None


def _first_not_kept(old: ParityReport, new: ParityReport) -> tuple[Failure, ...]:
    known = {(failure.where, failure.gate) for failure in old.verdict.failures}
    return tuple(f for f in new.verdict.failures if (f.where, f.gate) not in known)


def _worse(old: ParityReport, new: ParityReport, tolerance: float, backwards: bool = False) -> Iterator[str]:
    """What is worse in `new` and is neither a figure nor a gate. Backwards it is told as an improvement, with `new` as
    what was before."""

    def told(what: str, before: object, after: object) -> str:
        return f"{what} {after}, now {before}" if backwards else f"{what} {before}, now {after}"

    if _RANK[new.outcome] > _RANK[old.outcome]:
        yield told("the verdict was", old.outcome, new.outcome)
    if old.engine.execution == "executed" and new.engine.execution != "executed":
        yield told("what was run was", "the engine", "its graph alone")
    positions = {scenario.name: scenario.metrics.positions for scenario in new.evidence.scenarios}
    for scenario in old.evidence.scenarios:
        found = positions.get(scenario.name, 0)
        if found < scenario.metrics.positions:
            yield told(f"positions of {scenario.name!a:.60} were", scenario.metrics.positions, found)
    before, after = _untested(old), _untested(new)
    if before is not None and (after is None or after > before):
        yield told("untested experts x layers were", before, "all" if after is None else after)
    for name in _looser(old, new, tolerance):
        yield told(f"the limit of {name} was", number(getattr(old.gates, name)), number(getattr(new.gates, name)))


def _untested(report: ParityReport) -> int | None:
    return None if report.evidence.routing is None else len(report.evidence.routing.untested)


def _looser(old: ParityReport, new: ParityReport, tolerance: float) -> Iterator[str]:
    """Gates that let more pass in `new`. Limits that follow from a noise floor were measured as well, and may move as
    much as a figure; every target has limits of its own, so that of another one counts what was loosened by hand."""
    if old.target != new.target:
        yield from (name for name in new.loosened if name not in old.loosened)
        return
    for name in loosened(old.gates, new.gates):
        before, after = getattr(old.gates, name), getattr(new.gates, name)
        measured = name not in new.overrides and after != getattr(new.policy.absolute, name)
        slack = (1 - before, 1 - after) if name.startswith("min_") else (before, after)
        if not measured or slack[1] > tolerance * slack[0]:
            yield name
