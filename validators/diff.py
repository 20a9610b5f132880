"""Release against release: what got worse between two reports of the same checkpoint and probes.

    comparison = compare(old, new)
    comparison.regressed

Worse is a figure that is beyond noise and more than `tolerance` times as bad as before; and, whatever the figures are,
a gate that is not kept any more, a verdict that is lower, something that is not measured any more, a looser gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from gptoss_export.exporter.errors import NotComparableError
from gptoss_export.validators.figures import Figure, Key, figures_of
from gptoss_export.validators.gates import loosened
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.report.text import failure_text, number, plural

TOLERANCE = 1.5
"""Times. Figures of one machine and version repeat to the bit; another thread count moves a maximum by some tenths."""

ChangeKind = Literal["regression", "improvement", "same", "lost", "new"]
_RANK = {"pass": 0, "not executed": 1, "fail": 2}


@dataclass(frozen=True)
class Change:
    """One figure before and after. ratio: how many times as bad, None where it was not bad at all or is not there.

    lost: it was measured and is not any more, or could be and cannot; new: the other way round.
    """

    where: str
    name: str
    old: float | None
    new: float | None
    ratio: float | None
    kind: ChangeKind


@dataclass(frozen=True)
class Comparison:
    """changes: of every figure. regressions, improvements: what is no figure, in words."""

    changes: tuple[Change, ...]
    regressions: tuple[str, ...]
    improvements: tuple[str, ...]

    def of_kind(self, *kinds: ChangeKind) -> list[Change]:
        return [change for change in self.changes if change.kind in kinds]

    @property
    def regressed(self) -> bool:
        return bool(self.regressions or self.of_kind("regression", "lost"))


def compare(
    old: ParityReport, new: ParityReport, *, tolerance: float = TOLERANCE, allow_other_target: bool = False
) -> Comparison:
    """Raises NotComparableError, naming what differs, for reports that are not about the same measurement."""
    _require_comparable(old, new, allow_other_target)
    before, after = figures_of(old), figures_of(new)
    # Every target has limits of its own: another target's are no looser ones.
    looser = _looser(old, new, tolerance) if old.target == new.target else ()
    return Comparison(
        changes=tuple(_change(key, before, after, tolerance) for key in {**before, **after}),
        regressions=(*_worse(old, new), *looser),
        improvements=tuple(_better(old, new)),
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
    was, now = (None if figure is None else figure.badness for figure in (old, new))
    values = (old.value if old is not None else None, new.value if new is not None else None)
    ratio = now / was if was and now is not None else None
    return Change(*key, *values, ratio, _kind(was, now, max(f.noise for f in (old, new) if f is not None), tolerance))


def _kind(was: float | None, now: float | None, noise: float, tolerance: float) -> ChangeKind:
    if was is None or now is None:
        return "same" if was == now else "lost" if now is None else "new"
    if now > noise and now > tolerance * was:
        return "regression"
    return "improvement" if was > noise and was > tolerance * now else "same"


def _worse(old: ParityReport, new: ParityReport) -> Iterator[str]:
    if _RANK[new.outcome] > _RANK[old.outcome]:
        yield f"the verdict was {old.outcome}, and is {new.outcome}"
    if old.engine.execution == "executed" and new.engine.execution != "executed":
        yield "the engine was executed before, and only its graph was now"
    known = {(failure.where, failure.gate) for failure in old.verdict.failures}
    for failure in new.verdict.failures:
        if (failure.where, failure.gate) not in known:
            yield f"a gate that was kept is not any more: {failure_text(failure)}"
    positions = {scenario.name: scenario.metrics.positions for scenario in new.evidence.scenarios}
    for scenario in old.evidence.scenarios:
        found = positions.get(scenario.name, 0)
        if found < scenario.metrics.positions:
            yield f"{scenario.name!a:.80} is over {found} positions, and was over {scenario.metrics.positions}"
    before, after = _untested(old), _untested(new)
    if before is not None and (after is None or after > before):
        yield f"{'all' if after is None else after} experts x layers are untested, and {before} were"


def _better(old: ParityReport, new: ParityReport) -> Iterator[str]:
    if _RANK[new.outcome] < _RANK[old.outcome]:
        yield f"the verdict was {old.outcome}, and is {new.outcome}"
    still = {(failure.where, failure.gate) for failure in new.verdict.failures}
    for failure in old.verdict.failures:
        if (failure.where, failure.gate) not in still:
            yield f"a gate is kept again: {failure.gate} in {failure.where!a:.80}"


def _untested(report: ParityReport) -> int | None:
    return None if report.evidence.routing is None else len(report.evidence.routing.untested)


def _looser(old: ParityReport, new: ParityReport, tolerance: float) -> Iterator[str]:
    """Limits that follow from a noise floor were measured as well, and may move as much as a figure."""
    for name in loosened(old.gates, new.gates):
        before, after = getattr(old.gates, name), getattr(new.gates, name)
        measured = name not in new.overrides and after != getattr(new.policy.absolute, name)
        slack = (1 - before, 1 - after) if name.startswith("min_") else (before, after)
        if not measured or slack[1] > tolerance * slack[0]:
            yield f"the gate {name} was loosened: {number(after)}, and was {number(before)}"
