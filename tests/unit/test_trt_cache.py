"""The slots of an engine's cache: a small attention over slots against the same attention over the bare text."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_export.engines.runner import Step
from gptoss_export.engines.tensorrt.cache import (
    EMPTY,
    SINK,
    EngineCall,
    Limits,
    SlotState,
    capacity_for,
    plan_call,
    run_calls,
    slots_for,
)
from gptoss_export.exporter.errors import PromptError
from gptoss_export.validators.scenario_run import run_scenarios
from gptoss_export.validators.scenarios import SCENARIOS

VOCAB, WIDTH, WINDOW = 23, 8, 16
LIMITS = Limits(max_batch=4, max_prompt=7, max_context=300, max_logits=5)
WIDE = Limits(max_batch=4, max_prompt=512, max_context=4096, max_logits=4096)
_TABLE = np.random.default_rng(0)
EMBED, QUERY, KEY, VALUE = (_TABLE.standard_normal((VOCAB, WIDTH)) for _ in range(4))
TURN = _TABLE.standard_normal((512, WIDTH))


def attend(query, keys, values, seen):
    """softmax over what is seen and the sink, whose score and value are 0."""
    scores = np.where(seen, keys @ query, -1e30)
    weights = np.exp(scores - max(scores.max(initial=0.0), 0.0))
    return (weights / (weights.sum() + np.exp(-max(scores.max(initial=0.0), 0.0)))) @ values


def text_logits(ids):
    """The model on a text without padding or cache: a layer with a window and one without, positions told apart."""
    at = TURN[: len(ids)]
    x = EMBED[ids] * at
    for window in (WINDOW, 10**9):
        keys, values = KEY[ids] * at, VALUE[ids] * at
        places = np.arange(len(ids))
        x = np.stack(
            [
                x[i] + attend(QUERY[ids[i]] * at[i], keys, values, (places <= i) & (i - places < window))
                for i in range(len(ids))
            ]
        )
    return (x @ EMBED.T).astype(np.float32)


class SlotEngine:
    """The same model as an engine executes it: keys and values in slots, of which the first call.capacity are read."""

    def __init__(self, rows: int, slots: int) -> None:
        self.keys = np.zeros((rows, slots, WIDTH))
        self.values = np.zeros((rows, slots, WIDTH))

    def __call__(self, call: EngineCall) -> np.ndarray:
        rows, new = call.input_ids.shape
        positions = call.key_positions
        assert positions.shape == (rows, call.capacity)
        assert call.capacity <= self.keys.shape[1]
        assert (call.write_index == call.write_index[0]).all()
        assert call.write_index[0] >= 1
        x = np.empty((rows, new, WIDTH))
        for row in range(rows):
            ids, at = call.input_ids[row], call.query_positions[row]
            turn = TURN[np.maximum(at, 0)]
            slots = slice(call.write_index[row], call.write_index[row] + new)
            self.keys[row, slots], self.values[row, slots] = KEY[ids] * turn, VALUE[ids] * turn
            assert not self.keys[row, 0].any()
            x[row] = EMBED[ids] * turn
            for window in (WINDOW, 10**9):
                for s in range(new):
                    k = positions[row]
                    seen = (k >= 0) & (k <= at[s]) & (at[s] - k < window)
                    x[row, s] += attend(
                        QUERY[ids[s]] * turn[s], self.keys[row, : len(k)], self.values[row, : len(k)], seen
                    )
        return (x.reshape(-1, WIDTH)[call.logit_rows] @ EMBED.T).astype(np.float32)


@dataclass
class Cache:
    engine: SlotEngine
    state: SlotState

    @property
    def length(self) -> int:
        return self.state.length


class SlotRunner:
    vocab_size = VOCAB

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
        rows = len(input_ids)
        cache = cache or Cache(SlotEngine(rows, slots_for(self.limits.max_context)), SlotState.empty(rows))
        calls = plan_call(cache.state, input_ids, attention_mask, keep, self.limits)
        return Step(run_calls(calls, cache.engine), Cache(cache.engine, calls[-1].state))


class TextReference:
    """What `validators.parity.measure` asks of a reference."""

    vocab_size = VOCAB
    config = SimpleNamespace(sliding_window=WINDOW)

    def __init__(self, lengths) -> None:
        rng = np.random.default_rng(1)
        self.probes = [SimpleNamespace(ids=rng.integers(0, VOCAB, n)) for n in lengths]
        self._logits = [text_logits(probe.ids) for probe in self.probes]

    def logits(self, probe, start, stop):
        return self._logits[probe][start:stop]


@pytest.mark.parametrize("limits", [LIMITS, WIDE, Limits(3, 1, 100, 3)], ids=["chunks", "whole", "one-by-one"])
def test_every_scenario_of_parity_over_slots_is_the_text(limits: Limits) -> None:
    results = run_scenarios(SlotRunner(limits), TextReference((61, 40, 52, 1)), effort="full").accumulators
    assert list(results) == list(SCENARIOS)
    for result in results.values():
        assert result.metrics().non_finite == 0
        assert result.metrics().logit_diff_max < 1e-4, result


@st.composite
def conversations(draw):
    """Calls of up to 3 rows with any mask at all, every row with at least one token at the end."""
    rows = draw(st.integers(1, 3))
    calls = []
    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.integers(1, 9))
        mask = np.array(draw(st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width),
                                      min_size=rows, max_size=rows)))  # fmt: skip
        calls.append((mask, draw(st.integers(0, width))))
    return calls


@given(conversations(), st.integers(1, 9), st.integers(3, 12), st.integers(0, 2**32 - 1))
def test_padding_anywhere_is_as_if_it_were_not_there(calls, max_prompt, max_logits, seed) -> None:
    runner = SlotRunner(Limits(3, max_prompt, 100, max_logits))
    rng, cache, rows = np.random.default_rng(seed), None, len(calls[0][0])
    texts: list[list[int]] = [[] for _ in range(rows)]
    for mask, keep in calls:
        ids = rng.integers(0, VOCAB, mask.shape)
        step = runner.forward(ids, mask, cache, keep)
        cache = step.cache
        kept = keep or mask.shape[1]
        assert step.logits.shape == (rows, kept, VOCAB)
        for row in range(rows):
            before = len(texts[row])
            texts[row] += ids[row][mask[row] != 0].tolist()
            columns = np.flatnonzero(mask[row])
            if len(columns):
                expected = text_logits(np.array(texts[row]))[before:]
                wanted = columns >= mask.shape[1] - kept
                actual = step.logits[row, columns[wanted] - (mask.shape[1] - kept)]
                np.testing.assert_allclose(actual, expected[wanted], atol=1e-4)
    assert cache.length == sum(mask.shape[1] for mask, _ in calls)


def test_positions_are_those_of_the_text_and_slot_zero_is_the_sink() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 0, 1, 0]])
    (call,) = plan_call(SlotState.empty(2), np.zeros((2, 4), np.int64), mask, 1, WIDE)
    assert call.query_positions.tolist() == [[-1, -1, 0, 1], [0, -1, 1, -1]]
    assert call.key_positions[:, :6].tolist() == [[SINK, -1, -1, 0, 1, EMPTY], [SINK, 0, -1, 1, -1, EMPTY]]
    assert (call.key_positions[:, 5:] == EMPTY).all()
    assert call.write_index.tolist() == [1, 1]
    (call,) = plan_call(call.state, np.zeros((2, 1), np.int64), None, 1, WIDE)
    assert call.query_positions.tolist() == [[2], [2]]
    assert call.key_positions[:, 3:7].tolist() == [[0, 1, 2, EMPTY], [1, -1, 2, EMPTY]]
    assert call.write_index.tolist() == [5, 5]


def test_a_row_of_padding_alone_begins_its_text_later() -> None:
    (call,) = plan_call(SlotState.empty(1), np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64), 1, WIDE)
    assert call.query_positions.tolist() == [[-1, -1]]
    (call,) = plan_call(call.state, np.zeros((1, 2), np.int64), None, 1, WIDE)
    assert call.query_positions.tolist() == [[0, 1]]


def test_calls_are_split_by_columns_and_by_rows_of_logits() -> None:
    limits = Limits(max_batch=2, max_prompt=4, max_context=100, max_logits=6)
    ids = np.arange(2 * 11).reshape(2, 11)
    sizes = {
        keep: [(c.input_ids.shape[1], c.kept, len(c.logit_rows))
               for c in plan_call(SlotState.empty(2), ids, None, keep, limits)]
        for keep in (1, 5, 0)
    }  # fmt: skip
    assert sizes[1] == [(4, 0, 1), (4, 0, 1), (3, 1, 2)]
    assert sizes[5] == [(4, 0, 1), (4, 2, 4), (3, 3, 6)]
    assert sizes[0] == [(3, 3, 6), (3, 3, 6), (3, 3, 6), (2, 2, 4)]
    calls = plan_call(SlotState.empty(2), ids, None, 5, limits)
    assert np.concatenate([c.input_ids for c in calls], axis=1).tolist() == ids.tolist()
    assert [c.write_slot for c in calls] == [1, 5, 9]
    assert calls[1].logit_rows.tolist() == [2, 3, 6, 7]
    assert calls[0].logit_rows.tolist() == [0]


@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(0, 40), st.integers(0, 200),
    st.integers(1, 50), st.integers(4, 60),
)  # fmt: skip
def test_no_call_leaves_the_profiles(rows, new, keep, past, max_prompt, max_logits) -> None:
    limits = Limits(4, max_prompt, 300, max_logits)
    state = SlotState.empty(rows).after(np.tile(np.arange(past), (rows, 1)))
    calls = plan_call(state, np.zeros((rows, new), np.int64), None, min(keep, new), limits)
    for call in calls:
        width = call.input_ids.shape[1]
        assert 1 <= width <= max_prompt
        assert 1 <= len(call.logit_rows) <= (4 if width == 1 else max_logits)
        assert 0 <= call.logit_rows.min() <= call.logit_rows.max() < rows * width
        assert call.write_slot + width <= call.capacity <= 384
    assert sum(call.kept for call in calls) == (min(keep, new) or new)
    assert calls[-1].state.length == past + new
    assert state.length == past, "the state that was given is unchanged"


def test_capacities_are_few_and_end_at_the_engine_s() -> None:
    assert [capacity_for(n, 4096) for n in (1, 127, 128, 255, 256, 2047, 2048, 4095, 4096)] == [
        128, 128, 256, 256, 512, 2048, 4096, 4096, 4224,
    ]  # fmt: skip
    assert [slots_for(n) for n in (1, 127, 128, 300, 4096)] == [128, 128, 256, 384, 4224]
    assert capacity_for(3, 16) == slots_for(16) == 128
    assert len({capacity_for(n, 131072) for n in range(1, 131073)}) == 12


def test_what_the_engine_was_not_built_for_is_refused() -> None:
    ids = np.zeros((5, 1), np.int64)
    with pytest.raises(PromptError, match="batch of 5 rows") as caught:
        plan_call(SlotState.empty(5), ids, None, 1, LIMITS)
    assert "--max-batch 5" in caught.value.next_step
    full = SlotState.empty(1).after(np.arange(300)[None])
    with pytest.raises(PromptError, match="301 positions") as caught:
        plan_call(full, ids[:1], None, 1, LIMITS)
    assert "--max-context 301" in caught.value.next_step
    (last,) = plan_call(SlotState.empty(1).after(np.arange(299)[None]), ids[:1], None, 1, LIMITS)
    assert (last.write_slot, last.capacity) == (300, 384)
