"""How many of n positions may be off by chance: exact bounds of binomial counts at a stated level.

    most_by_chance(320, 0.01)        # 10: more are seen once in a thousand runs, or less, where one in 100 is off
    most_beside(5, 700, 320)         # 12: the same where the rate is only known from 5 off in 700 others

Both are exact tests, no approximations: the tail of the binomial distribution, and the conditional test of two rates
(Przyborowski and Wilenski, Biometrika 31, 1940), which needs no estimate of the rate.
"""

from __future__ import annotations

import math

LEVEL = 0.999
"""So surely a count above a bound is no chance: a correct artifact is above it once in a thousand runs at most."""

MOST_EVENTS = 10**6
"""Beyond so many, Chernoff's bound takes the place of the sum, which it is never below."""


def most_by_chance(positions: int, rate: float, level: float = LEVEL) -> int:
    """The smallest count that at least `level` of all draws do not exceed, where each of the positions is off with
    probability `rate`, 0 to 1. Raises ValueError for a rate that is none, or fewer than 0 positions."""
    if positions < 0 or not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate} over {positions} positions")
    low, high = 0, positions
    while low < high:  # the tail falls with the count
        middle = (low + high) // 2
        if at_least(middle + 1, positions - middle - 1, rate) <= 1 - level:
            high = middle
        else:
            low = middle + 1
    return low


def most_beside(known: int, of: int, positions: int, level: float = LEVEL) -> int:
    """The largest count among `positions` that is still no evidence, at this level, of a higher rate than that of a
    sample in which `known` of `of` were off.

    Given all known + count that are off, count of them are binomial with the positions' share where both rates are the
    same. Raises ValueError for a sample that is none.
    """
    if of < 1 or not 0 <= known <= of or positions < 0:
        raise ValueError(f"{known} of {of} positions are no sample for {positions} others")
    share = positions / (positions + of)
    low, high = 0, positions
    while low < high:
        middle = (low + high + 1) // 2
        if at_least(middle, known, share) > 1 - level:
            low = middle
        else:
            high = middle - 1
    return low


def median_below(positions: int, level: float = LEVEL) -> int | None:
    """Which of so many values in rising order, counted from 0, the median of all that they are drawn from is at least,
    by the sign test at this level; None for so few that even the smallest is no such bound."""
    beyond = most_by_chance(positions, 0.5, level)
    return positions - 1 - beyond if beyond < positions else None


def at_least(events: int, others: int, share: float) -> float:
    """P(X >= events) of X binomial over events + others with this share, 0 to 1; 1 where X is not above its mean."""
    total = events + others
    if events <= total * share:
        return 1.0
    if not share:
        return 0.0
    if total > MOST_EVENTS:
        part = events / total
        gap = part * math.log(part / share) + ((1 - part) * math.log((1 - part) / (1 - share)) if others else 0.0)
        return math.exp(-total * gap)
    odds = share / (1 - share)
    first = math.lgamma(total + 1) - math.lgamma(events + 1) - math.lgamma(others + 1)
    first += events * math.log(share) + others * math.log1p(-share)
    sum_of, term = 1.0, 1.0
    for k in range(events, total):
        term *= (total - k) / (k + 1) * odds
        sum_of += term
        if term < 1e-17 * sum_of:
            break
    return min(1.0, math.exp(first) * sum_of)
