"""How many of n positions may be off by chance: exact bounds of binomial counts at a stated level.

    most_by_chance(320, 0.01)        # 10: more are seen once in a thousand runs, or less, where one in 100 is off
    most_beside(5, 700, 320)         # 12: the same where the rate is only known from 5 off in 700 others

Both are exact tests, no approximations: the tail of the binomial distribution, and the conditional test of two rates
(Przyborowski and Wilenski, Biometrika 31, 1940), which needs no estimate of the rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, fsum, lgamma, log, log1p

LEVEL = 0.999
"""So surely a count above a bound is no chance: a correct artifact is above it once in a thousand runs at most."""


def most_by_chance(positions: int, rate: float, level: float = LEVEL) -> int:
    """The smallest count that at least `level` of all draws do not exceed, where each of the positions is off with
    probability `rate`, 0 to 1. Raises ValueError for a rate that is none, or fewer than 0 positions."""
    if positions < 0 or not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate} over {positions} positions")
    if rate in (0.0, 1.0):
        return round(rate * positions)
    below = 0.0
    for count in range(positions):
        below += _probability(positions, count, rate)
        if below >= level:
            return count
    return positions


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
    while low < high:  # the tail falls with the count
        middle = (low + high + 1) // 2
        if _tail(known + middle, middle, share) > 1 - level:
            low = middle
        else:
            high = middle - 1
    return low


def median_below(positions: int, level: float = LEVEL) -> int | None:
    """Which of so many values in rising order, counted from 0, the median of all that they are drawn from is at least,
    by the sign test at this level; None for so few that even the smallest is no such bound."""
    beyond = most_by_chance(positions, 0.5, level)
    return positions - 1 - beyond if beyond < positions else None


def _tail(trials: int, least: int, rate: float) -> float:
    """The probability of at least so many."""
    return fsum(_terms(trials, range(least, trials + 1), rate))


def _terms(trials: int, counts: Iterable[int], rate: float) -> Iterable[float]:
    return (_probability(trials, count, rate) for count in counts)


def _probability(trials: int, count: int, rate: float) -> float:
    if rate == 0:
        return float(count == 0)
    ways = lgamma(trials + 1) - lgamma(count + 1) - lgamma(trials - count + 1)
    return exp(ways + count * log(rate) + (trials - count) * log1p(-rate))
