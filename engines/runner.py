"""The protocol that every engine answers, so that parity, generation and benchmarks know only this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tokens: TypeAlias = NDArray[np.int64]
Logits: TypeAlias = NDArray[np.float32]


class KVCache(Protocol):
    """Keys and values of the tokens seen so far; opaque to callers, owned by the runner that made it."""

    @property
    def length(self) -> int:
        """Positions held per row, padding included."""
        ...


@dataclass(frozen=True)
class Step:
    """What one call of an engine gives: logits [batch, kept positions, vocab] float32 and the cache to go on with."""

    logits: Logits
    cache: KVCache


class Runner(Protocol):
    """Runs one artifact. Prefill, chunked prefill and decode are the same call with different lengths."""

    @property
    def vocab_size(self) -> int: ...

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tokens | None = None,
        cache: KVCache | None = None,
        keep: int = 1,
    ) -> Step:
        """Runs input_ids [batch, sequence] after whatever the cache holds.

        attention_mask [batch, sequence]: 1 for tokens, 0 for padding, on the left or on the right, of this call's
        positions only (the cache remembers its own); None means no padding.
        keep: logits of the last `keep` positions are computed; 0 means all of them.
        A cache that was passed in must not be used again.
        """
        ...
