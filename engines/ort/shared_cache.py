"""Runs models whose cache has fixed capacity and is updated in place: the memory of input and output is the same.

A layer that sees everything has a slot for every position, and its capacity doubles when it is full. A layer with a
window stops growing at window + CHUNK - 1 slots and is a ring from then on, so its memory does not grow with the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.ort.session import Session, as_int64, check_call, foreign_cache
from gptoss_export.engines.runner import KVCache, Step, Tokens
from gptoss_export.exporter.errors import PromptError

WINDOWS_KEY = "gptoss_export.windows"
"""Metadata of such a model: the window of each layer, 0 for none, separated by commas."""

CHUNK = 512
"""New positions in one call of the session; longer prompts are taken in several, which bounds rings and memory."""

FIRST_CAPACITY = 256


@dataclass
class SharedCache:
    """The slots of every layer and who is padding.

    values: key and value of each layer in turn, OrtValues [B, kv_heads, capacity, D]. mask: [B, P]. It is continued in
    place, so it can be continued once: `spent` then says that its slots belong to its successor.
    """

    values: list[Any]
    mask: Tokens
    spent: bool = field(default=False, compare=False)

    @property
    def length(self) -> int:
        return int(self.mask.shape[1])


class SharedCacheRunner:
    """A runner on a session whose model has WINDOWS_KEY."""

    def __init__(self, session: Session) -> None:
        import onnxruntime as ort

        self._session = session
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._windows = [int(window) for window in session.metadata[WINDOWS_KEY].split(",")]

    @property
    def vocab_size(self) -> int:
        return self._session.vocab_size

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tokens | None = None,
        cache: KVCache | None = None,
        keep: int = 1,
    ) -> Step:
        """See `engines.runner.Runner`. Raises PromptError for ids, masks or caches that do not fit."""
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        check_call(input_ids, mask, keep, self.vocab_size)
        rows, new = input_ids.shape
        past = self._empty(rows) if cache is None else cache
        if not isinstance(past, SharedCache) or past.spent or len(past.mask) != rows:
            raise foreign_cache()
        past.spent = True
        now = SharedCache(past.values, past.mask)
        wanted = keep or new
        parts = []
        for begin in range(0, new, CHUNK):
            end = min(begin + CHUNK, new)
            # Zero would mean all: a chunk that nobody reads gives one row, which is dropped.
            rows_wanted = max(0, end - max(begin, new - wanted))
            logits = self._run(input_ids[:, begin:end], mask[:, begin:end], now, max(rows_wanted, 1))
            if rows_wanted:
                parts.append(logits)
        return Step(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1), now)

    def _run(self, input_ids: Tokens, mask: Tokens, cache: SharedCache, keep: int) -> NDArray[np.float32]:
        self._make_room(cache, mask)
        cache.mask = np.concatenate([cache.mask, mask], axis=1)
        session = self._session.session
        binding = session.io_binding()
        feeds = {
            "input_ids": as_int64(input_ids),
            "attention_mask": as_int64(cache.mask),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, self._value(array))
        for name, value in zip(self._session.cache_inputs, cache.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(self._session.outputs[0])
        for name, value in zip(self._session.outputs[1:], cache.values, strict=True):
            binding.bind_ortvalue_output(name, value)
        session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return logits

    def _make_room(self, cache: SharedCache, mask: Tokens) -> None:
        """Grows what has to grow before the new positions of `mask` come in."""
        past, total = cache.length, cache.length + mask.shape[1]
        needs = dict.fromkeys(self._windows, total)
        for window in needs:
            if window:
                needs[window] = min(total, _span(cache.mask, mask, window))
        for layer, window in enumerate(self._windows):
            capacity = cache.values[2 * layer].shape()[2]
            limit = max(window + CHUNK - 1, needs[window]) if window else total
            if capacity >= min(total, limit):
                continue
            if past > capacity:
                raise PromptError(
                    f"padding inside of a text of {past} positions reaches beyond what a window of {window} has kept",
                    "Pad on the left, or give the whole batch in one call.",
                )
            grown = max(min(2 * max(capacity, FIRST_CAPACITY // 2), limit), min(total, limit))
            for i in (2 * layer, 2 * layer + 1):
                cache.values[i] = self._grow(cache.values[i], past, grown)

    def _grow(self, value: Any, past: int, capacity: int) -> Any:
        rows, heads, _, dim = value.shape()
        # Zeros: a slot that was never written is masked, and a masked NaN would still be one.
        slots = np.zeros((rows, heads, capacity, dim), np.float32)
        slots[:, :, :past] = value.numpy()[:, :, :past]
        return self._value(slots)

    def _empty(self, rows: int) -> SharedCache:
        nothing = np.zeros((rows, self._session.kv_heads, 0, self._session.head_dim), np.float32)
        value = self._value(nothing)
        return SharedCache([value] * len(self._session.cache_inputs), np.zeros((rows, 0), np.int64))


def _span(past_mask: Tokens, mask: Tokens, window: int) -> int:
    """How many of the last places of the text the new queries may see through a window, padding among them included."""
    if past_mask.all() and mask.all():
        return int(mask.shape[1]) + window - 1
    return max(_row_span(row, mask.shape[1], window) for row in np.concatenate([past_mask, mask], axis=1))


def _row_span(row: NDArray[np.int64], new: int, window: int) -> int:
    positions = row.cumsum() - 1
    queries = positions[-new:][row[-new:] != 0]
    if not len(queries):
        return new
    return len(row) - int(np.searchsorted(positions, max(queries[0] - window + 1, 0)))
