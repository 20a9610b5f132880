"""Positions as events: which are the same, which are settled, and what all ways of asking say of them together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_export.validators.metrics import Accumulator, Where
from gptoss_export.validators.positions import SettledFigures, Texts, distinct, router_margins, settled
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.routing import NOISE_FACTOR

PROBES = (Probe("one", (5,)), Probe("short", (5, 6, 7)), Probe("long", (5, 6, 8, 9)))


def reference(margins: list[list[list[float]]], probes: tuple[Probe, ...] = PROBES) -> Any:
    """margins: layer by layer, probe by probe, position by position, of a router that takes 1 of 3 experts."""

    def router_logits(layer: int, probe: int) -> np.ndarray:
        rows = margins[layer][probe]
        return np.array([[0.0, 1.0 - margin, 1.0] for margin in rows], np.float32)

    return SimpleNamespace(probes=probes, config=SimpleNamespace(top_k=1), router_logits=router_logits)


WIDE = [[[0.5], [0.5] * 3, [0.5] * 4]]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_positions_are_the_same_where_the_text_up_to_there_is(texts: list[list[int]]) -> None:
    numbers = distinct([Probe(str(i), tuple(ids)) for i, ids in enumerate(texts)])
    places = [(i, n) for i, ids in enumerate(texts) for n in range(len(ids))]
    for i, n in places:
        for j, m in places:
            assert (numbers[i][n] == numbers[j][m]) == (texts[i][: n + 1] == texts[j][: m + 1])


def test_a_near_tie_unsettles_its_position_and_those_behind_it_in_its_text_alone() -> None:
    margins = [[[0.5], [0.5, 0.01, 0.5], [0.5] * 4], [[0.5], [0.5] * 3, [0.5, 0.5, 0.5, 0.01]]]
    ref = reference(margins)
    assert settled(ref, 1, [0.1, 0.1]).tolist() == [True, False, False]
    assert settled(ref, 2, [0.1, 0.1]).tolist() == [True, True, True, False]
    assert settled(ref, 2, [0.1, 0.0]).tolist() == [True] * 4
    assert settled(ref, 2, [0.1, None]).tolist() == [False] * 4
    assert settled(ref, 2, [0.5 / NOISE_FACTOR * 1.001, 0.0]).tolist() == [False] * 4


def test_margins_of_a_router() -> None:
    logits = np.array([[3.0, 1.0, 2.5, -1.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    assert router_margins(logits, 1).tolist() == [0.5, 0.0]
    assert router_margins(logits, 2).tolist() == [1.5, 0.0]
    assert router_margins(logits, 4).tolist() == [np.inf, np.inf]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_a_margin_is_what_exchanges_an_expert(seed: int, k: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(5, 7)).astype(np.float32)
    in_order = -np.sort(-logits.astype(np.float64), axis=1)
    np.testing.assert_array_equal(router_margins(logits, k), in_order[:, k - 1] - in_order[:, k])


def rows(*found: tuple[int, int, float]) -> np.ndarray:
    """Compared at (probe, position), the candidate's logit of token 1 raised by so much above the reference's best."""
    accumulator = Accumulator()
    for probe, position, more in found:
        logits = np.array([[1.0, 0.5, 0.0, -1.0]], np.float32)
        candidate = logits.copy()
        candidate[0, 1] += more
        accumulator.add(logits, candidate, where=[Where(probe, position)])
    return accumulator.placed()


def test_the_worst_way_of_asking_counts_and_counts_once() -> None:
    texts = Texts(reference(WIDE), [0.1])
    # Three probes begin with the same token: one position, asked for in three ways, two of which flip it.
    found = texts.pool([rows((0, 0, 0.0), (1, 0, 0.9)), rows((2, 0, 2.0)), rows((2, 3, 0.2))])
    assert (found.positions, found.settled) == (2, 2)
    assert found.margins == (0.5,)
    alone = [texts.pool([rows(one)]) for one in ((2, 0, 2.0), (2, 3, 0.2))]
    assert found.kl_max == alone[0].kl_max
    assert found.kl_mean == pytest.approx((alone[0].kl_mean + alone[1].kl_mean) / 2)


def test_nothing_compared_is_nothing() -> None:
    texts = Texts(reference(WIDE), [0.1])
    found = texts.pool([Accumulator().placed()])
    assert (found.positions, found.settled, found.kl_mean, found.kl_max, found.margins) == (0, 0, None, None, ())
    assert texts.settled_figures(Accumulator().placed()) == SettledFigures(0, None, None)


def test_figures_of_settled_positions_are_of_no_others() -> None:
    margins = [[[0.5], [0.5, 0.0, 0.5], [0.5] * 4]]
    texts = Texts(reference(margins), [0.01])
    calm, far = rows((1, 0, 0.1)), rows((1, 0, 0.1), (1, 1, 5.0), (1, 2, 5.0))
    assert texts.settled_figures(far) == texts.settled_figures(calm)
    assert texts.settled_figures(far).positions == 1
    assert texts.settled_figures(rows((1, 2, 5.0))) == SettledFigures(0, None, None)
    pooled = texts.pool([far])
    assert (pooled.positions, pooled.settled) == (3, 1)
