"""Flips of experts: which are ties, which the rounding explains, and which are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptoss_export.validators.routing import (
    NOISE_FACTOR,
    RoutingRecord,
    bfloat16_ulp,
    choose,
    compare_layer,
    compare_layers,
    log_weight_error,
    same_experts,
)

LOGITS = np.array([[4.0, 3.0, 2.0, 1.0, 0.5]], np.float32)


def flip_of(logits: list[float], taken: list[int], noise: float | None = None):
    layer, flips = compare_layer(3, [np.array([logits], np.float32)], [np.array([taken])], 0.5, noise)
    return layer, flips


def test_the_same_experts_are_no_flip() -> None:
    layer, flips = flip_of([4.0, 3.0, 2.0], [0, 1])
    assert (layer.same_order, layer.same_set, flips) == (1, 1, [])
    layer, flips = flip_of([4.0, 3.0, 2.0], [1, 0])
    assert (layer.same_order, layer.same_set, flips) == (0, 1, [])
    assert layer.visits == (1, 1, 0)
    assert (layer.margin_max, layer.mass_mean) == (None, None)


@pytest.mark.parametrize(
    ("third", "noise", "kind"),
    [
        (2.0, None, "tie"),
        (np.nextafter(np.float32(2), np.float32(0)), None, "tie"),
        (2.0 - 2 * 2.0**-6, None, "near-tie"),  # bfloat16 has 2 ** -6 between 2 and 4
        (2.0 - 3 * 2.0**-6, None, "divergence"),
        (1.9, 0.11 / NOISE_FACTOR, "near-tie"),
        (1.9, 0.09 / NOISE_FACTOR, "divergence"),
    ],
)
def test_a_flip_is_classed_by_its_margin(third: float, noise: float | None, kind: str) -> None:
    layer, (flip,) = flip_of([4.0, 2.0, float(third), 0.0], [0, 2], noise)
    assert (flip.kind, flip.left, flip.taken, flip.layer, flip.probe, flip.position) == (kind, 1, 2, 3, 0, 0)
    assert flip.margin == pytest.approx(2.0 - float(third), abs=1e-6)
    # The reference gives expert 1 the share e^2 / (e^4 + e^2).
    assert flip.mass == pytest.approx(1 / (1 + np.exp(2.0)))
    assert (layer.ties, layer.near_ties, layer.diverged) == tuple(
        int(kind == k) for k in ("tie", "near-tie", "divergence")
    )
    assert layer.margin_max == flip.margin and layer.mass_mean == flip.mass


def test_the_farthest_exchange_is_named() -> None:
    _, (flip,) = flip_of([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [2, 4, 5])
    assert (flip.left, flip.taken, flip.margin) == (0, 5, 5.0)
    assert flip.mass == pytest.approx((np.exp(2) + np.exp(1)) / (np.exp(2) + np.exp(1) + 1))


def test_an_expert_taken_twice_is_a_divergence() -> None:
    layer, (flip,) = flip_of([4.0, 3.0, 2.0], [0, 0])
    assert (flip.kind, layer.diverged) == ("divergence", 1)


def test_untested_experts_and_shares() -> None:
    first, _ = compare_layer(0, [LOGITS, LOGITS], [np.array([[0, 1]]), np.array([[0, 4]])], None, None)
    assert first.visits == (2, 2, 0, 0, 0)
    record = RoutingRecord((first,), (), None)  # type: ignore[arg-type]
    assert (record.token_layers, record.diverged, record.diverged_share) == (2, 1, 0.5)
    assert record.untested == ((0, 2), (0, 3), (0, 4))
    assert RoutingRecord((), (), None).diverged_share is None  # type: ignore[arg-type]


def test_positions_count_within_their_probe() -> None:
    logits = [np.tile(LOGITS, (2, 1)), np.tile(LOGITS, (3, 1))]
    taken = [np.tile([0, 1], (2, 1)), np.array([[0, 1], [0, 1], [3, 1]])]
    layer, (flip,) = compare_layer(0, logits, taken, None, None)
    assert (layer.tokens, flip.probe, flip.position) == (5, 1, 2)


def test_what_is_not_of_the_same_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="not of the same tokens"):
        compare_layer(0, [LOGITS], [np.zeros((2, 2), np.int64)], None, None)


def test_bfloat16_ulp() -> None:
    import ml_dtypes

    for value in (1.0, 1.5, 2.0, 3.9, 100.0, 0.01):
        rounded = np.array(value, ml_dtypes.bfloat16)
        neighbour = (rounded.view(np.uint16) + np.uint16(1)).view(ml_dtypes.bfloat16)
        assert bfloat16_ulp(float(rounded)) == float(neighbour) - float(rounded)
    assert bfloat16_ulp(0.0) > 0


def test_ties_go_to_the_lower_expert() -> None:
    assert choose(np.array([[1.0, 2.0, 2.0, 2.0]], np.float32), 2).tolist() == [[1, 2]]


def test_the_error_of_the_router_is_that_of_its_log_weights() -> None:
    weights = np.exp(LOGITS[:, :2]) / np.exp(LOGITS[:, :2]).sum()
    experts = np.array([[0, 1]])
    assert log_weight_error(LOGITS, weights, experts) == pytest.approx(0.0, abs=1e-6)
    assert log_weight_error(LOGITS, weights[:, ::-1], experts[:, ::-1]) == pytest.approx(0.0, abs=1e-6)
    off = (weights * np.float32(np.exp([[0.01, -0.02]]))).astype(np.float32)
    assert log_weight_error(LOGITS, off, experts) == pytest.approx(0.02, rel=1e-3)
    assert log_weight_error(LOGITS, weights, np.array([[0, 3]])) is None


@given(arrays(np.float32, (4, 8), elements=st.floats(-50, 50, width=32)), st.integers(1, 7))
def test_the_reference_against_itself_never_flips(logits: np.ndarray, k: int) -> None:
    chosen = choose(logits, k)
    layer, flips = compare_layer(0, [logits], [chosen], None, None)
    assert (layer.same_order, flips, sum(layer.visits)) == (4, [], 4 * k)
    assert same_experts(logits, chosen[:, ::-1]).all()


@given(arrays(np.float32, (4, 8), elements=st.floats(-50, 50, width=32)), st.permutations(range(8)), st.integers(1, 7))
def test_every_token_is_counted_once(logits: np.ndarray, order: list[int], k: int) -> None:
    layer, flips = compare_layer(0, [logits], [np.tile(order[:k], (4, 1))], None, None)
    assert (
        layer.same_set + layer.ties + layer.near_ties + layer.diverged == layer.tokens == 4 and not layer.consequences
    )
    assert layer.same_order <= layer.same_set
    assert all(flip.margin >= 0 and 0 <= flip.mass <= 1 for flip in flips)


def layers_of(*taken: list[list[int]]):
    """One probe of three positions through layers that took these experts; the reference takes 0 and 1 everywhere."""
    logits = np.tile(LOGITS, (3, 1))
    return compare_layers([[logits]] * len(taken), [[np.array(layer)] for layer in taken], *[[None] * len(taken)] * 2)


RIGHT, WRONG = [0, 1], [0, 4]


def test_what_follows_a_flip_is_its_consequence() -> None:
    layers, worst = layers_of([RIGHT, WRONG, RIGHT], [RIGHT, WRONG, WRONG], [WRONG, RIGHT, WRONG])
    assert [(row.diverged, row.consequences) for row in layers] == [(1, 0), (0, 2), (1, 1)]
    kinds = {(flip.layer, flip.position): flip.kind for flip in worst}
    assert kinds == {
        (0, 1): "divergence",
        (1, 1): "consequence",
        (1, 2): "consequence",  # of a position before it, by attention
        (2, 0): "divergence",  # nothing before it flipped
        (2, 2): "consequence",
    }


def test_a_flip_in_another_text_reaches_nothing() -> None:
    logits = [[np.tile(LOGITS, (2, 1))] * 2] * 2
    taken = [[np.array([WRONG, RIGHT]), np.array([RIGHT, RIGHT])], [np.array([RIGHT, RIGHT]), np.array([WRONG, RIGHT])]]
    layers, _ = compare_layers(logits, taken, *[[None, None]] * 2)
    assert [(row.diverged, row.consequences) for row in layers] == [(1, 0), (1, 0)]


def test_a_near_tie_stays_one_after_a_flip() -> None:
    near = np.array([[4.0, 2.0, 2.0 - 2.0**-6, 0.0]], np.float32)
    layers, _ = compare_layers([[near], [near]], [[np.array([[0, 3]])], [np.array([[0, 2]])]], *[[None, None]] * 2)
    assert [(row.near_ties, row.consequences, row.diverged) for row in layers] == [(0, 0, 1), (1, 0, 0)]
