"""What a call of the runner means for an engine whose cache has slots: pure host logic, no device.

    state = SlotState.empty(rows)
    calls = plan_call(state, input_ids, attention_mask, keep, limits)
    logits = run_calls(calls, lambda call: engine(call.input_ids, call.query_positions, ...))
    state = calls[-1].state

Slot 0 of every row is the attention sink: position SINK, key and value zero, never written. The columns of the text so
far lie in the slots 1 to P, padding included, and the S new ones go to the slots from write_index = 1 + P on, which is
the same in all rows. Who sees whom is decided on positions in the text, -1 for padding and for what was never written
(`exporter.ops.sink_attention.position_bias`), so padding may lie anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptoss_export.engines.runner import Logits, Tokens
from gptoss_export.exporter.errors import PromptError

SINK = -2
EMPTY = -1
SMALLEST_CAPACITY = 128


@dataclass(frozen=True)
class Limits:
    """What the engine's profiles allow: rows, columns of one engine call, columns of a text, logit rows of one call."""

    max_batch: int
    max_prompt: int
    max_context: int
    max_logits: int


@dataclass(frozen=True)
class SlotState:
    """The columns that a cache holds. positions [B, P] int64: place of each in its text, EMPTY for padding."""

    positions: Tokens

    @classmethod
    def empty(cls, rows: int) -> SlotState:
        return cls(np.empty((rows, 0), np.int64))

    @property
    def rows(self) -> int:
        return int(self.positions.shape[0])

    @property
    def length(self) -> int:
        """P, padding included."""
        return int(self.positions.shape[1])

    def place(self, mask: Tokens) -> Tokens:
        """Positions [B, S] of new columns: cumsum(mask) - 1 over the whole text, EMPTY where mask [B, S] is 0."""
        before = self.positions.max(axis=1, keepdims=True, initial=EMPTY) + 1
        seen = mask != 0
        return np.where(seen, before + seen.cumsum(axis=1) - 1, EMPTY)

    def after(self, query_positions: Tokens) -> SlotState:
        """The state once columns with those positions [B, S] were written."""
        return SlotState(np.concatenate([self.positions, query_positions], axis=1))

    def key_positions(self, capacity: int) -> Tokens:
        """What lies in each slot, [B, capacity] int64. capacity: at least P + 1."""
        slots = np.full((self.rows, capacity), EMPTY, np.int64)
        slots[:, 0] = SINK
        slots[:, 1 : 1 + self.length] = self.positions
        return slots


@dataclass(frozen=True)
class EngineCall:
    """One execution of the engine.

    input_ids, query_positions [B, S], logit_rows [R] int64: as the engine's inputs of these names; R is at least 1.
    write_slot: the slot of the first new column. capacity: how many slots the engine reads.
    kept: how many of the last columns the logits belong to; 0: one row was computed that nobody asked for.
    state: after the call.
    """

    input_ids: Tokens
    query_positions: Tokens
    logit_rows: Tokens
    write_slot: int
    capacity: int
    kept: int
    state: SlotState

    @property
    def key_positions(self) -> Tokens:
        """[B, C] int64, the new columns included."""
        return self.state.key_positions(self.capacity)

    @property
    def write_index(self) -> Tokens:
        """[B] int64."""
        return np.full(len(self.input_ids), self.write_slot, np.int64)


def plan_call(
    state: SlotState, input_ids: Tokens, attention_mask: Tokens | None, keep: int, limits: Limits
) -> tuple[EngineCall, ...]:
    """The executions that run input_ids [B, S] with attention_mask [B, S] after `state`, in order.

    keep: columns at the end whose logits are wanted, 0: all. Ids, mask and keep are those that
    `engines.ort.session.check_call` lets pass, and B is state.rows. Raises PromptError for more than the limits allow.
    """
    rows, new = input_ids.shape
    _check(rows, state.length + new, limits)
    ids = np.ascontiguousarray(input_ids, np.int64)
    mask = np.ones_like(ids) if attention_mask is None else attention_mask
    query_positions = state.place(mask)
    capacity = capacity_for(state.length + new, limits.max_context)
    first_wanted = new - (keep or new)
    calls: list[EngineCall] = []
    begin = 0
    while begin < new:
        end = min(begin + limits.max_prompt, new, max(begin, first_wanted) + limits.max_logits // rows)
        kept = max(0, end - max(begin, first_wanted))
        positions = np.ascontiguousarray(query_positions[:, begin:end])
        call = EngineCall(
            input_ids=np.ascontiguousarray(ids[:, begin:end]),
            query_positions=positions,
            logit_rows=_logit_rows(rows, end - begin, kept),
            write_slot=1 + state.length,
            capacity=capacity,
            kept=kept,
            state=state.after(positions),
        )
        calls.append(call)
        state, begin = call.state, end
    return tuple(calls)


def run_calls(calls: tuple[EngineCall, ...], execute: Callable[[EngineCall], Logits]) -> Logits:
    """Runs what was planned; `execute` gives logits [R, V] float32. Returns [B, wanted columns, V] float32."""
    parts = []
    for call in calls:
        logits = execute(call)
        if call.kept:
            parts.append(logits.reshape(len(call.input_ids), call.kept, -1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def capacity_for(columns: int, max_context: int) -> int:
    """Slots to be read for that many columns and the sink: few sizes, so few CUDA graphs serve a text that grows."""
    capacity = SMALLEST_CAPACITY
    while capacity < columns + 1:
        capacity *= 2
    return min(capacity, slots_for(max_context))


def slots_for(max_context: int) -> int:
    """C, the slots of a cache: the sink, a text of that length, and what makes it a multiple of SMALLEST_CAPACITY."""
    return -(-(max_context + 1) // SMALLEST_CAPACITY) * SMALLEST_CAPACITY


def _logit_rows(rows: int, new: int, kept: int) -> Tokens:
    """Rows of the flattened [B * S] columns: the last `kept` of each row of the batch; row 0 if there are none."""
    if not kept:
        return np.zeros(1, np.int64)
    last = np.arange(new - kept, new, dtype=np.int64)
    return (np.arange(rows, dtype=np.int64)[:, None] * new + last).ravel()


def _check(rows: int, columns: int, limits: Limits) -> None:
    if rows > limits.max_batch:
        raise PromptError(
            f"a batch of {rows} rows, and the engine was built for at most {limits.max_batch}",
            f"give fewer rows, or export again with --max-batch {rows}",
        )
    if columns > limits.max_context:
        raise PromptError(
            f"a text of {columns} positions, and the engine was built for at most {limits.max_context}",
            f"give a shorter text, or export again with --max-context {columns} or more",
        )
