"""What is to blame, by where it shows."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_export.validators.deviation import Deviation
from gptoss_export.validators.layers import cached_calls
from gptoss_export.validators.whose import blame_attention, blame_cache, blame_experts

RIGHT = np.ones((40, 8), np.float32)
NOISE = np.float32(1e-7)


def off(errors: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """One probe in which each position is off by so much."""
    return [(RIGHT * (1 + np.maximum(errors, NOISE).astype(np.float32)[:, None]), RIGHT)]


def test_the_sinks_show_at_the_first_position() -> None:
    assert blame_attention(off(np.full(40, 0.1)), 16).startswith("the sinks")
    assert blame_attention(off(0.1 / np.arange(1, 41)), 0).startswith("the sinks")


def test_the_rotation_shows_after_the_first_position() -> None:
    assert blame_attention(off(0.01 * np.arange(40)), 16).startswith("the rotation")
    assert blame_attention(off(np.where(np.arange(40) > 0, 0.1, 0)), 16).startswith("the rotation")


@pytest.mark.parametrize("first", [15, 16, 17])
def test_the_window_shows_from_its_edge_on(first: int) -> None:
    pairs = off(np.where(np.arange(40) >= first, 0.1, 0))
    assert blame_attention(pairs, 16).startswith(f"the window: wrong from position {first} on, the window is 16")
    assert blame_attention(pairs, 0).startswith(f"who sees whom: wrong from position {first} on")


def test_a_short_probe_hides_nothing_of_a_long_one() -> None:
    pairs = [(RIGHT[:3], RIGHT[:3]), *off(np.where(np.arange(40) >= 16, 0.1, 0))]
    assert blame_attention(pairs, 16).startswith("the window")


def test_the_cache() -> None:
    said = blame_cache([1e-9, 0.2, None], 14, 16, 1e-5)
    assert "from position 15 on, the window is 16" in said
    assert "window" not in blame_cache([0.2], 14, 0, 1e-5)


def visits(*sets: tuple[float, tuple[int, ...]]) -> list[tuple[float, np.ndarray]]:
    return [(error, np.array(experts)) for error, experts in sets]


def test_an_expert_that_every_wrong_token_visits() -> None:
    tokens = visits((0.2, (1, 5)), (0.3, (5, 2)), (0.0, (1, 2)), (0.0, (3, 4)))
    assert blame_experts(tokens, 1e-5) == "expert 5: wrong for 2 of 4 tokens, all visit it"


def test_of_several_the_one_that_no_right_token_visits() -> None:
    tokens = visits((0.2, (1, 5)), (0.3, (5, 1)), (0.0, (1, 2)))
    assert blame_experts(tokens, 1e-5).startswith("expert 5:")


def test_all_experts() -> None:
    assert blame_experts(visits((0.2, (1, 5)), (0.2, (2, 3))), 1e-5).startswith("all experts")
    assert blame_experts(visits((0.2, (1, 5)), (0.2, (1, 5))), 1e-5).startswith("all experts")
    assert blame_experts(visits((float("nan"), (1, 5)), (0.2, (2, 3))), 1e-5).startswith("all experts")
    assert blame_experts(visits((0.0, (1, 5))), 1e-5) == ""


def test_a_deviation_is_relative_to_what_was_added() -> None:
    deviation = Deviation()
    deviation.add(RIGHT * 11 + 0.5, RIGHT * 11, RIGHT * 10)
    assert deviation.relative == pytest.approx(0.5)
    whole = Deviation()
    whole.add(RIGHT * 11 + 0.5, RIGHT * 11)
    assert whole.relative == pytest.approx(0.5 / 11)


def test_a_deviation_of_what_is_not_finite_or_nothing_is_none() -> None:
    deviation = Deviation()
    assert deviation.relative is None
    deviation.add(RIGHT, RIGHT)
    assert deviation.relative == 0.0
    deviation.add(np.full((1, 2), np.nan, np.float32), np.ones((1, 2), np.float32))
    assert (deviation.relative, deviation.non_finite) == (None, 2)


def test_a_deviation_from_nothing_is_none() -> None:
    deviation = Deviation()
    deviation.add(RIGHT, RIGHT * 0)
    assert deviation.relative is None


@pytest.mark.parametrize(
    ("length", "calls"), [(2, (1, 1)), (5, (1, 1, 1, 1, 1)), (41, (14, 1, 1, 1, 1, 1, 1)), (16, (10, *[1] * 6))]
)
def test_calls_across_the_edge_of_the_window(length: int, calls: tuple[int, ...]) -> None:
    assert cached_calls(length, 16) == calls
    assert sum(calls) <= length
