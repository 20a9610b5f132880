"""Who is to blame inside of an operation, by the positions and the experts at which it is wrong.

A wrong sink shows at the first position, which sees nothing but itself and the sink. A wrong rotation does not show
there and does at the next. A wrong window shows from its edge on. A wrong expert shows where a token visits it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SHARP = 20.0
"""An error that begins somewhere is so many times what lies before."""

SMALL_SHARE = 0.05
"""Of the largest error: what counts as none beside it."""


def blame_attention(pairs: Sequence[tuple[Array, Array]], window: int) -> str:
    """pairs: the artifact's and the reference's [n, width] a probe. window: 0 where the layer sees everything."""
    errors = _by_position(pairs)
    largest = float(errors.max())
    if errors[0] > SMALL_SHARE * largest:
        return "the sinks, or the scale of the scores: wrong where a token sees itself and the sink alone"
    first = _sharp_edge(errors)
    if first is not None and first >= 2:
        if window and abs(first - window) <= 1:
            return f"the window: wrong from position {first} on, the window is {window}"
        return f"who sees whom: wrong from position {first} on"
    return "the rotation (RoPE, YaRN): right at position 0, where it does nothing, and wrong after it"


def blame_cache(errors: Sequence[float | None], first: int, window: int, limit: float) -> str:
    """errors: a position from `first` on, those that came out of the cache."""
    beyond = [first + i for i, error in enumerate(errors) if error is None or not error <= limit]
    start = beyond[0] if beyond else first
    edge = f", the window is {window}" if window else ""
    return f"its cache: one call is right, the same through the cache is wrong from position {start} on{edge}"


def blame_experts(tokens: Sequence[tuple[float, NDArray[np.int64]]], limit: float) -> str:
    """tokens: the error and the experts of each. Names experts that every wrong token visits, if few do not."""
    wrong = [set(experts.tolist()) for error, experts in tokens if not error <= limit]
    if not wrong:
        return ""
    common = set.intersection(*wrong)
    if common and len(wrong) < len(tokens):
        # A right token speaks for all experts that it visits, unless it hardly weighs one: the most often seen win.
        cleared = [sum(e in experts for error, experts in tokens if error <= limit) for e in sorted(common)]
        suspects = [e for e, count in zip(sorted(common), cleared, strict=True) if count == min(cleared)]
        return f"expert {', '.join(map(str, suspects))}: wrong for {len(wrong)} of {len(tokens)} tokens, all visit it"
    return f"all experts: wrong for {len(wrong)} of {len(tokens)} tokens"


def _by_position(pairs: Sequence[tuple[Array, Array]]) -> NDArray[np.float64]:
    """Relative error at each position, the largest of all probes."""
    errors = np.zeros(max(len(found) for found, _ in pairs))
    for found, expected in pairs:
        difference = np.square(found.astype(np.float64) - expected).sum(-1)
        size = np.maximum(np.square(expected.astype(np.float64)).sum(-1), 1e-300)
        row = np.sqrt(difference / size)
        errors[: len(row)] = np.fmax(errors[: len(row)], row)
    return errors


def _sharp_edge(errors: NDArray[np.float64]) -> int | None:
    """The first position whose error is far above all before it, where that is the rule from there on."""
    largest = errors.max()
    wrong = np.flatnonzero(errors > SMALL_SHARE * largest)
    first = int(wrong[0])
    before = errors[:first].max() if first else 0.0
    return first if errors[first] > SHARP * before else None
