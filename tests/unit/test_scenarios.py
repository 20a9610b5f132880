"""The plan of scenarios: within bounds whatever the lengths, and at the window where it matters."""

from __future__ import annotations

from itertools import chain, product

import pytest

from gptoss_export.validators.scenarios import SCENARIOS, Case, plan

WINDOW = 128
LENGTHS = (1, 54, 265)
REAL_LIVE = 135


def compared(case: Case) -> list[tuple[int, int]]:
    """(probe, position) of every logit row that the case asks for and that belongs to a token."""
    past = [0] * len(case.rows)
    found = []
    for call in case.calls:
        kept = call.keep or call.width
        for row, n in enumerate(call.lengths):
            first = call.width - n if case.side == "left" else 0
            columns = range(max(first, call.width - kept), first + n)
            found += [(case.rows[row], past[row] + column - first) for column in columns]
            past[row] += n
    return found


@pytest.mark.parametrize("effort", ["quick", "full"])
@pytest.mark.parametrize("live", [1, 2, 9, REAL_LIVE, 100_000])
@pytest.mark.parametrize("window", [1, 2, 16, 128, 5000])
@pytest.mark.parametrize("lengths", [(1,), (2,), (3, 2), (20,), (41, 27, 1), LENGTHS, (1, 127, 128, 129, 265, 407)])
def test_no_case_leaves_its_probes_or_its_bounds(lengths: tuple[int, ...], window: int, live: int, effort: str) -> None:
    for cases in plan(lengths, window, live, effort).values():
        for case in cases:
            for row, probe in enumerate(case.rows):
                assert sum(call.lengths[row] for call in case.calls) <= lengths[probe]
            for call in case.calls:
                assert min(call.lengths) >= 1
                assert 0 <= call.keep <= call.width
                # One row of logits a row of the batch is the least that can be asked for.
                assert len(case.rows) * (call.keep or call.width) <= max(live, len(case.rows))
                if case.side == "right" and len(set(call.lengths)) > 1:
                    assert call.keep == 0
            assert compared(case)


@pytest.mark.parametrize("live", [9, REAL_LIVE, 100_000])
def test_prefill_compares_every_position_exactly_once(live: int) -> None:
    found = [pair for case in plan(LENGTHS, WINDOW, live, "quick")["prefill"] for pair in compared(case)]
    assert sorted(found) == [(i, p) for i, n in enumerate(LENGTHS) for p in range(n)]


def test_prefill_is_never_in_chunks() -> None:
    assert all(len(case.calls) == 1 for case in plan(LENGTHS, WINDOW, 9, "quick")["prefill"])


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_decode_crosses_the_window_with_the_cache(effort: str) -> None:
    one_by_one = set()
    for case in plan(LENGTHS, WINDOW, REAL_LIVE, effort)["decode"]:
        assert all(call.lengths == (1,) for call in case.calls[1:])
        one_by_one |= set(compared(case)[1:])
    assert {(2, p) for p in (1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 264)} <= one_by_one


def test_chunks_are_uneven_and_reach_the_end() -> None:
    (case,) = plan(LENGTHS, WINDOW, 100_000, "quick")["chunked"]
    assert [call.lengths[0] for call in case.calls] == [1, 7, 128, 129]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("live", [REAL_LIVE, 100_000])
def test_padded_batches_pad_cross_the_window_and_decode(side: str, live: int) -> None:
    cases = plan(LENGTHS, WINDOW, live, "quick")[f"padded-{side}"]
    assert all(case.side == side and len(case.rows) == 3 for case in cases)
    assert all(len(set(case.calls[0].lengths)) > 1 for case in cases), "the first call is padded"
    assert all(case.calls[-1].lengths == (1, 1, 1) for case in cases), "the last decodes"
    ragged = [call for case in cases for call in case.calls[1:] if len(set(call.lengths)) > 1]
    assert ragged, "a later call is padded too"
    past_window = {p for case in cases for _, p in compared(case) if p > WINDOW}
    assert past_window


def test_every_scenario_runs_on_ordinary_probes() -> None:
    for effort in ("quick", "full"):
        assert tuple(plan(LENGTHS, WINDOW, REAL_LIVE, effort)) == SCENARIOS


def test_what_cannot_run_is_left_out() -> None:
    assert set(plan((1,), WINDOW, REAL_LIVE, "quick")) == {"prefill", "last-only"}


BATCHES = [1, 2, 3, 4, None]


@pytest.mark.parametrize("effort", ["quick", "full"])
@pytest.mark.parametrize("max_batch", BATCHES)
@pytest.mark.parametrize("lengths", [(1,), (20,), (41, 27, 1), LENGTHS, (1, 127, 128, 129, 265, 407)])
def test_no_case_leaves_the_batch_its_probes_or_its_bounds(
    lengths: tuple[int, ...], max_batch: int | None, effort: str
) -> None:
    for window, live in product([1, 2, 16, 128, 5000], [2, 9, REAL_LIVE, 100_000]):
        for case in chain(*plan(lengths, window, live, effort, max_batch).values()):
            assert len(case.rows) <= (max_batch or 3)
            for row, probe in enumerate(case.rows):
                assert sum(call.lengths[row] for call in case.calls) <= lengths[probe]
            for call in case.calls:
                assert len(call.lengths) == len(case.rows)
                assert min(call.lengths) >= 1
                assert call.padding >= 0
                assert 0 <= call.keep <= call.width
                assert len(case.rows) * (call.keep or call.width) <= max(live, len(case.rows))
                if case.side == "right" and call.width > min(call.lengths):
                    assert call.keep == 0
            assert compared(case)


@pytest.mark.parametrize("effort", ["quick", "full"])
@pytest.mark.parametrize("max_batch", BATCHES)
@pytest.mark.parametrize("lengths", [LENGTHS, (41, 27, 1)])
def test_every_scenario_runs_in_every_batch(lengths: tuple[int, ...], max_batch: int | None, effort: str) -> None:
    for live in (REAL_LIVE, 100_000):
        window = 16 if lengths != LENGTHS else WINDOW
        assert tuple(plan(lengths, window, live, effort, max_batch)) == SCENARIOS


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_batch", BATCHES)
@pytest.mark.parametrize("live", [REAL_LIVE, 100_000])
def test_padding_is_there_in_every_batch(side: str, max_batch: int | None, live: int) -> None:
    cases = plan(LENGTHS, WINDOW, live, "quick", max_batch)[f"padded-{side}"]
    rows = min(max_batch or 3, 3)
    for case in cases:
        assert (case.side, len(case.rows)) == (side, rows)
        assert case.calls[0].width > min(case.calls[0].lengths), "the first call is padded"
        assert case.calls[-1].lengths == (1,) * rows, "the last decodes"
        assert case.calls[-1].padding == 0
    later = [call for case in cases for call in case.calls[1:] if call.width > min(call.lengths)]
    assert later, "padding comes to lie inside of the cache, too"
    assert any(p > WINDOW for case in cases for _, p in compared(case))


def test_a_batch_of_one_is_padded_by_columns_that_no_row_fills() -> None:
    calls = [call for case in plan(LENGTHS, WINDOW, REAL_LIVE, "quick", 1)["padded-left"] for call in case.calls]
    assert {call.padding for call in calls} == {0, 2}
    assert all(call.width == call.lengths[0] + call.padding for call in calls)


@pytest.mark.parametrize("max_batch", [3, 4, 1000])
def test_more_rows_than_needed_change_nothing(max_batch: int) -> None:
    assert plan(LENGTHS, WINDOW, REAL_LIVE, "full", max_batch) == plan(LENGTHS, WINDOW, REAL_LIVE, "full")
