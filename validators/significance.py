"""Whether one figure is worse than another: beyond noise, and by so much that it matters to its gate.

    grew(was, now)

size            a mean, or an error over all positions: more than tolerance times as much as before, where anything
                below MATTERS of the limit, or below the figure's noise, is taken for that much
maximum         of one position, so the tolerance is squared
count           events out of positions: more than sampling explains at LEVEL by the exact conditional test of two rates
                (Przyborowski and Wilenski, 1940): given all events of both, how they fall on either is binomial
standard error  a size, and the difference is beyond what both standard errors explain at LEVEL
condition       a size whose limit is 0: one is bad, and more are worse by the tolerance
none            shown, never judged

A figure is worse only if it is so in two ways: in value, and in the share that it uses up of its own limit. So a limit
that moved makes no figure worse, and another target is held to its own gates.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from gptoss_export.validators.binomial import at_least
from gptoss_export.validators.figures import Figure

TOLERANCE = 1.5
"""Times. Figures of one machine and version repeat to the bit; another thread count moves a maximum by some tenths."""

MATTERS = 0.01
"""Of the limit: a figure that uses up less of it decides nothing."""

LEVEL = 1e-3
"""One-sided, of each kind of count; scenarios repeat the same positions and are one, layers divide it among them."""


def grew(was: Figure, now: Figure, tolerance: float = TOLERANCE) -> bool:
    """Whether `now` is worse than `was`, two figures of one name and place."""
    if was.badness is None or now.badness is None or now.rule == "none":
        return False
    before, after = _shares(was, now)
    if now.rule == "count":
        return after > before and chance(was, now) < LEVEL / max(was.family, now.family)
    if now.rule == "standard error" and not chance(was, now) < LEVEL:
        return False
    factor = tolerance**2 if now.rule == "maximum" else tolerance
    return after > factor * max(before, floor(was, now)) and now.badness > factor * was.badness


def chance(was: Figure, now: Figure) -> float:
    """Of a count, or of a figure with a standard error, to get worse by at least so much where nothing is. Else 1."""
    if was.badness is None or now.badness is None:
        return 1.0
    if now.rule == "count":
        return max(_chance_of_count(was, now, 1.0, 1.0), _chance_of_count(was, now, was.limit, now.limit))
    if now.rule == "standard error" and was.error is not None and now.error is not None:
        error = math.hypot(was.error, now.error)
        more = now.badness - was.badness
        if not more > 0:
            return 1.0
        return 1 - NormalDist().cdf(more / error) if error else 0.0
    return 1.0


def _chance_of_count(was: Figure, now: Figure, old_limit: float | None, new_limit: float | None) -> float:
    """Under the hypothesis that both have the same rate, or the same share of their limits; 0 where a limit is none."""
    if not old_limit or not new_limit:
        return 0.0
    # No limit allows more than every event.
    before = (was.of or 0) / was.repeats * min(old_limit, 1.0)
    after = (now.of or 0) / now.repeats * min(new_limit, 1.0)
    if not before or not after:
        return 1.0
    events, others = (int((side.badness or 0) / side.repeats) for side in (now, was))
    return at_least(events, others, after / (before + after))


def floor(was: Figure, now: Figure) -> float:
    """The share of the limit below which a figure is noise; without a gate, or under a limit of 0, the badness."""
    if not was.limit and not now.limit:
        return max(was.noise, now.noise)
    return max(MATTERS, *(side.noise / side.limit for side in (was, now) if side.limit))


def times(was: Figure, now: Figure) -> float | None:
    """How many times as much of its limit, or as bad where there is none; None where either is noise, or no size."""
    if was.badness is None or now.badness is None or now.rule in ("count", "none"):
        return None
    before, after = _shares(was, now)
    if not min(before, after) > floor(was, now):
        return None
    ratio = after / before
    return ratio if 0 < ratio < math.inf else None


def _shares(was: Figure, now: Figure) -> tuple[float, float]:
    """Of each one's own limit; the rates where neither has one that is not 0."""
    if was.limit or now.limit:
        return was.share or 0.0, now.share or 0.0
    return was.rate or 0.0, now.rate or 0.0
