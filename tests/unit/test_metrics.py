"""Metrics against their definitions, and the cases that a naive implementation gets wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptoss_export.validators.metrics import Accumulator, Metrics


def measure(reference: np.ndarray, candidate: np.ndarray, chunk: int = 64) -> Metrics:
    accumulator = Accumulator()
    for row in range(0, len(reference), chunk):
        accumulator.add(reference[row : row + chunk], candidate[row : row + chunk])
    return accumulator.metrics()


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = (3 * rng.standard_normal((100, 50))).astype(np.float32)
    return reference, (reference + 0.1 * rng.standard_normal((100, 50))).astype(np.float32)


def test_all_figures_follow_their_definitions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, candidate = pair
    p = np.exp(reference.astype(np.longdouble))
    q = np.exp(candidate.astype(np.longdouble))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    kl = np.sort((p * np.log(p / q)).sum(-1)).astype(float)
    same = int((reference.argmax(-1) == candidate.argmax(-1)).sum())
    diff = np.abs(candidate.astype(np.float64) - reference)

    m = measure(reference, candidate)
    assert m.kl_mean == pytest.approx(kl.mean(), rel=1e-12)
    assert m.kl_max == pytest.approx(kl[-1], rel=1e-12)
    assert m.kl_p99 == pytest.approx(kl[98], rel=1e-12)
    assert m.logit_diff_max == diff.max()
    assert m.logit_diff_mean == pytest.approx(diff.mean(), rel=1e-12)
    assert (m.positions, m.agreements, m.ties, m.disagreements) == (100, same, 0, 100 - same)
    assert 0 < m.disagreements < 100
    assert m.top1_agreement == same / 100
    assert m.non_finite == 0


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunks_do_not_matter(pair: tuple[np.ndarray, np.ndarray], chunk: int) -> None:
    whole, parts = measure(*pair), measure(*pair, chunk=chunk)
    assert parts.kl_mean == pytest.approx(whole.kl_mean, rel=1e-13)
    assert parts.logit_diff_mean == pytest.approx(whole.logit_diff_mean, rel=1e-13)
    assert (parts.kl_max, parts.logit_diff_max) == (whole.kl_max, whole.logit_diff_max)
    assert (parts.agreements, parts.disagreements) == (whole.agreements, whole.disagreements)


def test_the_same_logits_have_no_divergence_at_all(pair: tuple[np.ndarray, np.ndarray]) -> None:
    m = measure(pair[0], pair[0].copy())
    assert (m.kl_mean, m.kl_p99, m.kl_max, m.logit_diff_mean, m.logit_diff_max) == (0, 0, 0, 0, 0)
    assert m.agreements == 100


def test_a_shift_of_all_logits_is_no_divergence_but_a_difference(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    m = measure(pair[0], pair[0] + np.float32(2))
    assert 0 <= m.kl_mean < 1e-12  # float32 rounds the shifted logits
    assert m.logit_diff_max == pytest.approx(2, abs=1e-6)


def test_kl_is_not_symmetric_and_is_of_the_reference() -> None:
    peaked, flat = np.array([[5.0, 0.0, 0.0]], np.float32), np.zeros((1, 3), np.float32)
    log_sum = math.log(math.exp(5) + 2)
    entropy = log_sum - 5 * math.exp(5 - log_sum)
    assert measure(peaked, flat).kl_mean == pytest.approx(math.log(3) - entropy, rel=1e-12)
    assert measure(flat, peaked).kl_mean == pytest.approx(log_sum - 5 / 3 - math.log(3), rel=1e-12)


def test_tiny_divergences_are_not_lost() -> None:
    """Float32 log-softmax would give 0 or 1e-7 here; the gate is at 1e-9."""
    reference = np.linspace(-8, 8, 1000, dtype=np.float32)[None]
    candidate = reference.copy()
    candidate[0, -1] += 3e-5
    p = np.exp(reference[0].astype(np.float64) - 8)
    p_last = p[-1] / p.sum()
    step = float(candidate[0, -1]) - float(reference[0, -1])
    assert measure(reference, candidate).kl_mean == pytest.approx(p_last * (1 - p_last) * step**2 / 2, rel=1e-4)


def test_huge_logits_do_not_overflow() -> None:
    big = np.array([[3e38, -3e38, 0.0]], np.float32)
    m = measure(big, big[:, ::-1].copy())
    assert m.non_finite == 0
    assert np.isfinite([m.kl_mean, m.kl_max, m.logit_diff_max]).all()


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
    clean = measure(*pair)
    spoilt = [np.vstack([x, x[:1]]) for x in pair]
    spoilt[side][100, :2] = bad
    m = measure(*spoilt)
    assert m.non_finite == 2
    assert m.positions == 101
    assert m.disagreements == clean.disagreements + 1
    assert m.kl_mean == pytest.approx(clean.kl_mean, rel=1e-13)


def test_nothing_finite_or_nothing_at_all_gives_no_figures() -> None:
    nan = np.full((3, 4), np.nan, np.float32)
    m = measure(np.zeros((3, 4), np.float32), nan)
    assert (m.positions, m.disagreements, m.non_finite) == (3, 3, 12)
    assert (m.kl_mean, m.kl_p99, m.kl_max, m.logit_diff_mean, m.logit_diff_max) == (None,) * 5
    empty = Accumulator().metrics()
    assert (empty.positions, empty.kl_mean, empty.top1_agreement) == (0, None, None)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes"):
        Accumulator().add(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))
