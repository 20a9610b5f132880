"""The bounds against the definition, in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_export.validators.binomial import LEVEL, at_least, median_below, most_beside, most_by_chance


def exact_tail(trials: int, count: int, rate: Fraction) -> Fraction:
    """P(X >= count) of a binomial X."""
    return sum(
        (comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(max(count, 0), trials + 1)), Fraction(0)
    )


@given(st.integers(0, 300), st.integers(0, 50).map(lambda n: Fraction(n, 50)), st.sampled_from([0.9, 0.99, LEVEL]))
def test_more_than_by_chance_is_as_rare_as_said_and_no_rarer(positions: int, rate: Fraction, level: float) -> None:
    most = most_by_chance(positions, float(rate), level)
    rare = Fraction(1 - level)
    assert 0 <= most <= positions
    assert exact_tail(positions, most + 1, rate) <= rare * (1 + Fraction(1, 10**6))
    assert most == 0 or exact_tail(positions, most, rate) >= rare * (1 - Fraction(1, 10**6))


@given(st.integers(1, 120), st.integers(0, 120), st.integers(0, 120))
def test_beside_a_sample(of: int, known: int, positions: int) -> None:
    known = min(known, of)
    most = most_beside(known, of, positions)
    share, rare = Fraction(positions, positions + of), Fraction(1 - LEVEL)
    assert 0 <= most <= positions
    assert most == 0 or exact_tail(known + most, most, share) > rare * (1 - Fraction(1, 10**6))
    assert most == positions or exact_tail(known + most + 1, most + 1, share) <= rare * (1 + Fraction(1, 10**6))


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (most_by_chance(69, 0.0), 0),
        (most_by_chance(69, 1.0), 69),
        (most_by_chance(0, 0.5), 0),
        (most_by_chance(69, 0.01), 4),
        (most_by_chance(320, 0.01), 10),
        (most_by_chance(700, 0.01), 16),
        (most_beside(0, 69, 69), 9),
        (most_beside(1, 69, 69), 12),
        (most_beside(5, 700, 320), 12),
        (most_beside(0, 1_000_000, 69), 0),
        (most_beside(3, 5, 0), 0),
    ],
)
def test_values(bound: int, expected: int) -> None:
    assert bound == expected


def test_large_counts_are_no_work() -> None:
    assert most_by_chance(40_000, 0.01) == pytest.approx(400 + 3.09 * 400**0.5, rel=0.02)
    assert most_beside(400, 40_000, 40_000) == pytest.approx(400 + 3.09 * 800**0.5, rel=0.05)


def test_the_sign_test_of_a_median() -> None:
    assert [median_below(n) for n in (0, 3, 9)] == [None, None, None]
    assert [median_below(n) for n in (10, 11, 27, 41, 69)] == [0, 0, 5, 10, 21]
    for n in (10, 27, 69, 320):
        rank = median_below(n)
        assert rank is not None
        # The value of that rank is above the median only where n - rank values are.
        assert exact_tail(n, n - rank, Fraction(1, 2)) <= Fraction(1 - LEVEL)


@pytest.mark.parametrize("wrong", [(-1, 0.5), (3, -0.1), (3, 1.1), (3, float("nan"))])
def test_rates_that_are_none(wrong: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="a rate of"):
        most_by_chance(*wrong)


@pytest.mark.parametrize("wrong", [(1, 0, 3), (2, 1, 3), (-1, 1, 3), (0, 1, -1)])
def test_samples_that_are_none(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no sample"):
        most_beside(*wrong)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.731])
@pytest.mark.parametrize(("events", "others"), [(1, 0), (12, 0), (9, 3), (40, 20), (3, 9), (700, 500)])
def test_the_tail_of_the_binomial(events: int, others: int, share: float) -> None:
    k, part = events + others, Fraction(share).limit_denominator(1000)
    exact = sum(math.comb(k, i) * part**i * (1 - part) ** (k - i) for i in range(events, k + 1))
    expected = 1.0 if events <= k * share else float(exact)
    assert at_least(events, others, share) == pytest.approx(expected, rel=1e-9)


def test_the_tail_of_numbers_that_nobody_counted() -> None:
    assert at_least(2**62, 0, 0.5) == 0.0
    assert at_least(2**62, 2**62, 0.5) == 1.0
    exact, bound = at_least(500_600, 499_400, 0.5), at_least(500_601, 499_400, 0.5)
    assert exact < bound < 5 * exact


def test_numbers_that_nobody_counted_take_no_time() -> None:
    assert most_by_chance(2**62, 0.01) == pytest.approx(2**62 / 100, rel=1e-6)
    assert most_beside(2**61, 2**62, 2**62) == pytest.approx(2**61, rel=1e-6)
