"""Runs an artifact in ONNX Runtime.

The cache stays in ONNX Runtime's own values: what one call gives the next one takes, nothing is copied through numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_export.engines.ort.session import Session, as_int64, check_call, foreign_cache, open_session
from gptoss_export.engines.ort.shared_cache import WINDOWS_KEY, SharedCacheRunner
from gptoss_export.engines.runner import KVCache, Runner, Step, Tokens

BATCHED_CHUNKS_KEY = "gptoss_export.batched_chunks"
"""Metadata of a model: whether several rows may be continued by more than one position in one call."""


def open_ort_runner(folder: Path, provider: str, threads: int | None = None, *, kernels: bool = True) -> Runner:
    """The runner that fits the model in `folder`. kernels: whether the kernel library may be used.

    Raises what `open_session` raises.
    """
    return runner_on(open_session(folder, provider, threads, kernels=kernels))


def runner_on(session: Session) -> Runner:
    """The runner that fits the model of the session."""
    return SharedCacheRunner(session) if WINDOWS_KEY in session.metadata else GrowingCacheRunner(session)


@dataclass(frozen=True)
class GrowingCache:
    """values: key and value of each layer in turn, OrtValues [B, kv_heads, P, D]; mask: who is padding, [B, P]."""

    values: tuple[Any, ...]
    mask: Tokens

    @property
    def length(self) -> int:
        return int(self.mask.shape[1])


class GrowingCacheRunner:
    """For models that give the whole cache back at every call, longer by what was new."""

    def __init__(self, session: Session) -> None:
        import onnxruntime as ort

        self._session = session
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._batched_chunks = session.metadata.get(BATCHED_CHUNKS_KEY) != "false"

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
        past = self._empty(len(input_ids)) if cache is None else cache
        if not isinstance(past, GrowingCache) or len(past.mask) != len(input_ids):
            raise foreign_cache()
        rows, new = input_ids.shape
        if rows > 1 and new > 1 and past.length and not self._batched_chunks:
            return self._row_by_row(input_ids, mask, past, keep)
        logits, cache = self._run(input_ids, mask, past, keep)
        return Step(logits, cache)

    def _run(self, input_ids: Tokens, mask: Tokens, past: GrowingCache, keep: int) -> tuple[Any, GrowingCache]:
        total = np.concatenate([past.mask, mask], axis=1)
        feeds = dict(zip(self._session.cache_inputs, past.values, strict=True))
        feeds["input_ids"] = self._value(as_int64(input_ids))
        feeds["attention_mask"] = self._value(as_int64(total))
        feeds["num_logits_to_keep"] = self._value(np.array(keep, np.int64))
        logits, *presents = self._session.session.run_with_ort_values(self._session.outputs, feeds)
        return logits.numpy(), GrowingCache(tuple(presents), total)

    def _row_by_row(self, input_ids: Tokens, mask: Tokens, past: GrowingCache, keep: int) -> Step:
        """The same, for an attention operator that continues several rows by one position at a time only."""
        pasts = [v.numpy() for v in past.values]
        logits, caches = [], []
        for b in range(len(input_ids)):
            row = slice(b, b + 1)
            mine = GrowingCache(tuple(self._value(p[row]) for p in pasts), past.mask[row])
            row_logits, row_cache = self._run(input_ids[row], mask[row], mine, keep)
            logits.append(row_logits)
            caches.append([value.numpy() for value in row_cache.values])
        values = tuple(self._value(np.concatenate(rows)) for rows in zip(*caches, strict=True))
        total = np.concatenate([past.mask, mask], axis=1)
        return Step(np.concatenate(logits), GrowingCache(values, total))

    def _empty(self, rows: int) -> GrowingCache:
        nothing = np.zeros((rows, self._session.kv_heads, 0, self._session.head_dim), np.float32)
        value = self._value(nothing)
        return GrowingCache((value,) * len(self._session.cache_inputs), np.zeros((rows, 0), np.int64))
