"""Metrics against their definitions, and the cases that a naive implementation gets wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_export.validators.metrics import (
    BUCKETS,
    HISTOGRAM_EDGES,
    Accumulator,
    Metrics,
    PositionBucket,
    Where,
    WorstPosition,
)
from gptoss_export.validators.streaming import FOLDS, ROWS_AT_ONCE, SLICE


def measure(
    reference: np.ndarray, candidate: np.ndarray, chunk: int = 64, following: Sequence[int | None] | None = None
) -> Metrics:
    accumulator = Accumulator()
    for row in range(0, len(reference), chunk):
        part = slice(row, row + chunk)
        text = None if following is None else following[part]
        accumulator.add(reference[part], candidate[part], following=text)
    return accumulator.metrics()


TEXT = [row % 50 for row in range(100)]


def long_softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.longdouble) - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def decimal_kl(reference: np.ndarray, candidate: np.ndarray) -> float:
    """KL of one row, with forty digits."""
    with localcontext(prec=40):
        p, q = ([Decimal(float(x)).exp() for x in side] for side in (reference, candidate))
        sum_p, sum_q = sum(p), sum(q)
        return float(sum(a / sum_p * ((a / sum_p).ln() - (b / sum_q).ln()) for a, b in zip(p, q, strict=True)))


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = (3 * rng.standard_normal((100, 50))).astype(np.float32)
    return reference, (reference + 0.1 * rng.standard_normal((100, 50))).astype(np.float32)


def test_divergences_follow_their_definitions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, candidate = pair
    p, q = long_softmax(reference), long_softmax(candidate)
    kl = np.sort((p * np.log(p / q)).sum(-1)).astype(float)
    reverse = (q * np.log(q / p)).sum(-1).astype(float)
    same = int((reference.argmax(-1) == candidate.argmax(-1)).sum())

    m = measure(reference, candidate)
    assert m.kl_mean == pytest.approx(kl.mean(), rel=1e-12)
    assert m.kl_max == pytest.approx(kl[-1], rel=1e-12)
    assert (m.kl_median, m.kl_p99, m.kl_p999) == pytest.approx((kl[49], kl[98], kl[99]), rel=1e-12)
    assert (m.reverse_kl_mean, m.reverse_kl_max) == pytest.approx((reverse.mean(), reverse.max()), rel=1e-12)
    assert m.reverse_kl_mean != pytest.approx(m.kl_mean, rel=1e-3)
    assert (m.positions, m.agreements, m.ties, m.disagreements) == (100, same, 0, 100 - same)
    assert 0 < m.disagreements < 100
    assert m.top1_agreement == same / 100
    assert m.non_finite == 0


@pytest.mark.parametrize("vocab", [1, 2, 7, 50, 10 * FOLDS - 1, 10 * FOLDS + 3, SLICE, 2 * SLICE + 5])
def test_order_and_logits_follow_their_definitions_at_any_width(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    reference = (3 * rng.standard_normal((ROWS_AT_ONCE + 3, vocab))).astype(np.float32)
    candidate = (reference + 3 * rng.standard_normal(reference.shape)).astype(np.float32)
    m = measure(reference, candidate, chunk=ROWS_AT_ONCE + 1)

    best_r, best_c = (np.argsort(-side, axis=-1) for side in (reference, candidate))
    for k, found in ((5, m.top5_overlap), (10, m.top10_overlap)):
        k = min(k, vocab)
        shares = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(best_r, best_c, strict=True)]
        assert found == pytest.approx(np.mean(shares), rel=1e-12)
    ranks = [1 + int(np.flatnonzero(c == r[0])[0]) for r, c in zip(best_r, best_c, strict=True)]
    assert (m.rank_mean, m.rank_max) == (pytest.approx(np.mean(ranks)), max(ranks))
    if vocab > 40:
        assert m.rank_max > 10  # beyond the ten best, where ranks are counted another way

    r, c = (side.astype(np.longdouble) for side in (reference, candidate))
    r, c = r - r.mean(-1, keepdims=True), c - c.mean(-1, keepdims=True)
    diff = np.abs(c - r)
    assert m.logit_diff_mean == pytest.approx(float(diff.mean()), rel=1e-12)
    assert m.logit_diff_max == pytest.approx(float(diff.max()), rel=1e-12)
    if vocab > 1:
        cosine = (r * c).sum(-1) / np.sqrt((r * r).sum(-1) * (c * c).sum(-1))
        assert (m.cosine_mean, m.cosine_min) == pytest.approx((float(cosine.mean()), float(cosine.min())), rel=1e-12)
    p, q = long_softmax(reference), long_softmax(candidate)
    assert m.kl_mean == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-11, abs=1e-18)


def test_the_text_s_own_tokens(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, candidate = pair
    following = [None if row % 10 == 9 else (7 * row) % 50 for row in range(100)]
    rows = [row for row in range(100) if following[row] is not None]
    tokens = [following[row] for row in rows]
    p, q = (long_softmax(side)[rows, tokens].astype(float) for side in pair)
    ratio = np.log(p) - np.log(q)

    m = measure(reference, candidate, 33, following)
    assert m.text_positions == 90
    assert m.text_prob_diff_mean == pytest.approx((q - p).mean(), rel=1e-10)
    assert m.text_prob_diff_max == pytest.approx(np.abs(q - p).max(), rel=1e-12)
    assert m.perplexity_reference == pytest.approx(np.exp(-np.log(p).mean()), rel=1e-12)
    assert m.perplexity_candidate == pytest.approx(np.exp(-np.log(q).mean()), rel=1e-12)
    assert m.perplexity_ratio == pytest.approx(m.perplexity_candidate / m.perplexity_reference, rel=1e-12)
    # Delta method: Var(exp(m)) = exp(m)^2 Var(m), and m is a mean of 90.
    assert m.perplexity_ratio_se == pytest.approx(m.perplexity_ratio * np.std(ratio, ddof=1) / 90**0.5, rel=1e-9)


def test_one_token_of_text_has_no_standard_error_and_none_has_no_perplexity(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    one = measure(*pair, following=[3] + [None] * 99, chunk=100)
    assert one.text_positions == 1
    assert one.perplexity_ratio is not None
    assert one.perplexity_ratio_se is None
    none = measure(*pair)
    assert none.text_positions == 0
    text = [getattr(none, f.name) for f in fields(none) if f.name.startswith(("text_prob", "perplexity"))]
    assert text == [None] * 6


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunks_do_not_matter(pair: tuple[np.ndarray, np.ndarray], chunk: int) -> None:
    whole, parts = measure(*pair, following=TEXT), measure(*pair, chunk=chunk, following=TEXT)
    assert vars(parts) == {name: pytest.approx(value, rel=1e-12) for name, value in vars(whole).items()}


def test_the_same_logits_have_no_divergence_at_all(pair: tuple[np.ndarray, np.ndarray]) -> None:
    m = measure(pair[0], pair[0].copy(), following=[1] * 100)
    assert (m.kl_mean, m.kl_p99, m.kl_max, m.reverse_kl_max, m.logit_diff_mean, m.logit_diff_max) == (0,) * 6
    assert (m.agreements, m.top5_overlap, m.top10_overlap, m.rank_mean, m.rank_max) == (100, 1, 1, 1, 1)
    assert (m.text_prob_diff_max, m.perplexity_ratio, m.perplexity_ratio_se) == (0, 1, 0)
    assert m.cosine_min == pytest.approx(1, abs=1e-15)
    assert m.kl_histogram[0] == sum(m.kl_histogram) == 100


def test_a_shift_of_all_logits_of_a_row_changes_nothing() -> None:
    """Halves, so that float32 holds the shifted logits exactly."""
    reference = np.random.default_rng(0).integers(-20, 20, (9, 60)).astype(np.float32) / 2
    shift = np.arange(-400, 500, 100, dtype=np.float32)[:, None]
    m = measure(reference, reference + shift, following=[5] * 9)
    assert max(m.kl_max, m.reverse_kl_max, m.logit_diff_max, m.text_prob_diff_max) < 1e-12
    assert m.perplexity_ratio == pytest.approx(1, rel=1e-13)
    assert m.cosine_min == pytest.approx(1, abs=1e-12)


def test_kl_is_not_symmetric_and_is_of_the_reference() -> None:
    peaked, flat = np.array([[5.0, 0.0, 0.0]], np.float32), np.zeros((1, 3), np.float32)
    log_sum = math.log(math.exp(5) + 2)
    entropy = log_sum - 5 * math.exp(5 - log_sum)
    assert measure(peaked, flat).kl_mean == pytest.approx(math.log(3) - entropy, rel=1e-12)
    assert measure(flat, peaked).kl_mean == pytest.approx(log_sum - 5 / 3 - math.log(3), rel=1e-12)


@pytest.mark.parametrize("step", [3e-2, 3e-4, 4e-6, 1.2e-6])
def test_tiny_divergences_are_not_lost(step: float) -> None:
    """The last is about 1e-13; a difference of float64 log-softmaxes is off by 1e-3 of that."""
    rng = np.random.default_rng(1)
    reference = rng.uniform(-2, 2, (1, 300)).astype(np.float32)
    candidate = (reference + step * rng.standard_normal(reference.shape) * (np.abs(reference) > 0.5)).astype(np.float32)
    m = measure(reference, candidate)
    assert 0 < m.kl_mean < step**2
    assert m.kl_mean == pytest.approx(decimal_kl(reference[0], candidate[0]), rel=1e-8)
    assert m.reverse_kl_mean == pytest.approx(decimal_kl(candidate[0], reference[0]), rel=1e-8)


def test_a_tiny_change_of_one_token_s_probability_is_not_lost() -> None:
    reference = np.linspace(-8, 8, 1000, dtype=np.float32)[None]
    candidate = reference.copy()
    candidate[0, 500] = np.nextafter(candidate[0, 500], np.float32(9))
    step = float(candidate[0, 500]) - float(reference[0, 500])
    p = float(long_softmax(reference)[0, 500])
    m = measure(reference, candidate, following=[500])
    assert m.text_prob_diff_mean == pytest.approx(p * (1 - p) * step, rel=1e-6)
    assert m.kl_mean == pytest.approx(p * (1 - p) * step**2 / 2, rel=1e-3)


@pytest.mark.parametrize("distance", [30.0, 300.0, 650.0, 708.0, 712.0, 750.0, 2000.0, 1e6])
def test_far_apart_is_as_exact_as_near(distance: float) -> None:
    """Around 709 the exponential leaves float64, and around 745 its reciprocal."""
    reference = np.array([[0, -1, -distance, -2.5]], np.float32)
    candidate = np.array([[-distance, 0.5, 1, -distance]], np.float32)
    p = np.exp([0, -1, -distance, -2.5])
    log_p = reference[0].astype(float) - np.log(p.sum())
    q = np.exp([-distance, 0.5, 1, -distance])
    log_q = candidate[0].astype(float) - np.log(q.sum())
    m = measure(reference, candidate, following=[2])
    exact = 1e-12 + 1e-15 * distance
    assert m.kl_mean == pytest.approx(p / p.sum() @ (log_p - log_q), rel=exact)
    assert m.reverse_kl_mean == pytest.approx(q / q.sum() @ (log_q - log_p), rel=exact)
    assert m.text_prob_diff_mean == pytest.approx(np.exp(log_q[2]) - np.exp(log_p[2]), rel=exact)
    assert m.perplexity_candidate == pytest.approx(np.exp(-log_q[2]), rel=exact)
    assert (m.perplexity_reference is None) == (distance > 709)


def test_huge_logits_do_not_overflow() -> None:
    big = np.array([[3e38, -3e38, 0.0]], np.float32)
    m = measure(big, big[:, ::-1].copy(), following=[2])
    assert m.non_finite == 0
    finite = (m.kl_mean, m.kl_max, m.reverse_kl_max, m.logit_diff_max, m.cosine_min, m.text_prob_diff_max)
    assert np.isfinite(finite).all()
    assert (m.perplexity_reference, m.perplexity_candidate, m.perplexity_ratio) == (None, 1, 0)
    assert m.kl_histogram[-1] == 1


def test_of_the_huge_only_the_rows_concerned_are_done_again(pair: tuple[np.ndarray, np.ndarray]) -> None:
    clean = measure(*pair)
    spoilt = pair[1].copy()
    spoilt[5, :10] += 1e5
    m = measure(pair[0], spoilt)
    assert m.kl_max > 1e4
    assert m.kl_median == pytest.approx(clean.kl_median, rel=0.2)


def test_an_exact_tie_is_no_disagreement() -> None:
    reference = np.array([[7.0, 7.0, 1.0]], np.float32)
    candidate = np.array([[7.0, 7.00001, 1.0]], np.float32)
    m = measure(reference, candidate)
    assert (m.agreements, m.ties, m.disagreements, m.top1_agreement) == (0, 1, 0, 1.0)


@pytest.mark.parametrize(("ulps", "tied"), [(1, True), (2, True), (3, False)])
def test_a_tie_is_two_ulps_wide(ulps: int, tied: bool) -> None:
    top = np.float32(7.0)
    second = top
    for _ in range(ulps):
        second = np.nextafter(second, np.float32(0))
    candidate = np.array([[second, top]], np.float32)
    m = measure(np.array([[top, second]], np.float32), candidate)
    assert (m.ties, m.disagreements) == ((1, 0) if tied else (0, 1))


def test_a_tie_is_the_reference_s_own_not_the_candidate_s() -> None:
    """A candidate that holds everything equal has not found a tie."""
    m = measure(np.array([[1.0, 2.0]], np.float32), np.array([[5.0, 5.0]], np.float32))
    assert (m.ties, m.disagreements) == (0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_counted_and_kept_out(pair: tuple[np.ndarray, np.ndarray], bad: float, side: int) -> None:
    clean = measure(*pair, following=TEXT)
    spoilt = [np.vstack([x, x[:1]]) for x in pair]
    spoilt[side][100, :2] = bad
    m = measure(*spoilt, following=[*TEXT, 4])
    counts = {"non_finite": 2, "positions": 101, "disagreements": clean.disagreements + 1}
    assert vars(m) == {name: pytest.approx(value, rel=1e-12) for name, value in vars(clean).items()} | counts


def test_nothing_finite_or_nothing_at_all_gives_no_figures() -> None:
    nan = np.full((3, 4), np.nan, np.float32)
    m = measure(np.zeros((3, 4), np.float32), nan)
    assert (m.positions, m.disagreements, m.non_finite) == (3, 3, 12)
    assert m.text_positions == sum(m.kl_histogram) == 0
    floats = [f.name for f in fields(Metrics) if f.type == "float | None"]
    assert len(floats) == 22
    assert [getattr(m, name) for name in floats] == [None] * 22
    empty = Accumulator().metrics()
    assert [getattr(empty, name) for name in floats] == [None] * 22
    assert (empty.positions, empty.top1_agreement) == (0, None)


def test_what_does_not_fit_together_is_refused() -> None:
    two = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="shapes"):
        Accumulator().add(two, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="2 positions"):
        Accumulator().add(two, two, where=[Where(0, 0)])
    with pytest.raises(ValueError, match="2 positions"):
        Accumulator().add(two, two, following=[1])
    for token in (3, -1):
        with pytest.raises(ValueError, match="vocabulary of 3"):
            Accumulator().add(two, two, following=[None, token])


def test_ties_at_the_last_place_of_the_best_are_no_difference() -> None:
    reference = np.array([[9, 8, 7, 6, 1, 1, 1, 0, 0, 0, 0, 0]], np.float32)
    other_one = reference.copy()
    other_one[0, 6] = 2  # any of the three may be the fifth
    m = measure(reference, other_one)
    assert (m.top5_overlap, m.top10_overlap) == (1, 1)
    # The candidate holds ten equal, five of which are the reference's.
    assert measure(reference, np.zeros_like(reference)).top5_overlap == 1
    wrong = np.array([[9, 8, 7, 0, 0, 0, 0, 6, 5, 0, 0, 0]], np.float32)
    assert measure(reference, wrong).top5_overlap == pytest.approx(3 / 5)


def test_ranks_leave_equals_to_the_candidate() -> None:
    reference = np.array([[5, 1, 2, 5, 0]], np.float32)
    assert measure(reference, np.array([[1, 2, 2, 1, 1]], np.float32)).rank_max == 3
    assert measure(reference, np.array([[1, 2, 3, 4, 1]], np.float32)).rank_max == 1  # token 3 is best as well
    assert measure(reference, np.zeros_like(reference)).rank_max == 1


def test_the_rank_of_what_the_candidate_likes_least() -> None:
    reference = np.linspace(1, 0, 5000, dtype=np.float32)[None]
    assert measure(reference, -reference).rank_max == 5000


def test_rows_without_spread_have_a_cosine_all_the_same() -> None:
    flat, not_flat = np.ones((1, 4), np.float32), np.array([[1, 2, 3, 4]], np.float32)
    assert measure(flat, 3 * flat).cosine_min == 1
    assert measure(flat, not_flat).cosine_min == 0
    assert measure(not_flat, -not_flat).cosine_min == pytest.approx(-1, abs=1e-15)


def test_histogram_counts_every_position_once(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert len(HISTOGRAM_EDGES) == 73
    assert (HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[4], HISTOGRAM_EDGES[-1]) == (1e-16, 1e-15, 100)
    reference, candidate = pair
    p, q = long_softmax(reference), long_softmax(candidate)
    kl = (p * np.log(p / q)).sum(-1).astype(float)
    m = measure(reference, candidate)
    assert len(m.kl_histogram) == 74
    assert m.kl_histogram[1:-1] == tuple(np.histogram(kl, HISTOGRAM_EDGES)[0].tolist())
    assert (m.kl_histogram[0], m.kl_histogram[-1], sum(m.kl_histogram)) == (0, 0, 100)


def test_the_worst_positions_are_named_once_each(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, candidate = (side[:8] for side in pair)
    candidate = candidate.copy()
    candidate[3, 7] += 20
    candidate[6, 9] += 10
    where = [Where(row // 4, 10 + row % 4) for row in range(8)]
    accumulator = Accumulator()
    accumulator.add(reference, candidate, where=where, following=[1, 2, 3, None, 5, 6, 7, 8])
    first = accumulator.worst(2)
    best = reference.argmax(-1)
    kl = [measure(reference[row : row + 1], candidate[row : row + 1]).kl_max for row in (3, 6)]
    assert first == (
        WorstPosition(0, 13, kl[0], best[3], 7, None),
        WorstPosition(1, 12, kl[1], best[6], 9, 7),
    )
    assert all(type(value) in (int, float, type(None)) for w in first for value in vars(w).values())

    accumulator.add(reference[3:4], reference[3:4], where=[Where(0, 13)])  # the same position, right this time
    accumulator.add(reference, candidate)  # nobody says where
    assert accumulator.worst(2) == first
    places = [(w.probe, w.position) for w in accumulator.worst(100)]
    assert len(places) == len(set(places)) == 8
    assert accumulator.worst(0) == ()


def test_buckets_follow_the_positions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    accumulator = Accumulator()
    accumulator.add(pair[0][:2], pair[1][:2], where=[Where(4, 0), Where(4, 2)])
    accumulator.add(pair[0][2:3], pair[0][2:3], where=[Where(4, 2)])
    one, two, _ = (measure(r[None], c[None]).kl_max for r, c in zip(pair[0][:3], pair[1][:3], strict=True))
    assert accumulator.by_position() == {4: (PositionBucket(0, 1, one, one), PositionBucket(2, 3, two / 2, two))}


def test_a_long_probe_has_no_more_buckets_than_others() -> None:
    accumulator = Accumulator()
    n = 2 * BUCKETS + 88
    reference = np.random.default_rng(0).standard_normal((n, 5)).astype(np.float32)
    accumulator.add(reference, reference + np.arange(5, dtype=np.float32), where=[Where(0, k) for k in range(n)])
    (buckets,) = accumulator.by_position().values()
    assert len(buckets) == n / 3
    assert [b.start for b in buckets] == list(range(0, n, 3))
    assert buckets[-1].stop == n
    assert sum(b.kl_mean for b in buckets) / len(buckets) == pytest.approx(accumulator.metrics().kl_mean)


@given(
    st.integers(1, 12).flatmap(
        lambda width: st.tuples(
            *(st.lists(st.floats(width=32), min_size=width, max_size=width) for _ in range(2)),
            st.integers(0, width - 1),
        )
    )
)
def test_whatever_an_engine_answers_gives_figures_that_can_be(case: tuple[list[float], list[float], int]) -> None:
    reference, candidate, token = case
    m = measure(np.array([reference], np.float32), np.array([candidate], np.float32), following=[token])
    given = [getattr(m, f.name) for f in fields(m) if f.type == "float | None"]
    assert all(value is None or math.isfinite(value) for value in given)
    assert m.positions == m.agreements + m.ties + m.disagreements == 1
    if m.non_finite == 0:
        assert min(m.kl_max, m.reverse_kl_max, m.logit_diff_max) >= 0
        assert 0 <= m.top5_overlap <= 1
        assert -1 <= m.cosine_min <= 1
        assert 1 <= m.rank_max <= len(reference)
        assert -1 <= m.text_prob_diff_mean <= 1
        assert sum(m.kl_histogram) == 1
