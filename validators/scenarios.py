"""In which ways an engine is asked for the same positions: whole, step by step, in chunks, padded.

A scenario is a list of cases; a case is a batch of probes that goes on call by call with one cache. `plan`
is a pure function of lengths, so what a report claims to have tested can be read (and tested) without
running anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["left", "right"]
Effort = Literal["quick", "full"]

SCENARIOS = ("prefill", "decode", "chunked", "padded-left", "padded-right", "last-only")
"""What every verdict needs; one that did not run is a failure."""

DECODE_STEPS: Mapping[Effort, int] = {"quick": 8, "full": 24}
BATCH = 3
BATCH_STEPS = 4
RAGGED = (3, 1, 2)
"""New tokens a row in a later, padded call of a batch."""


ALONE_PADDING = 2
"""Columns of padding where a batch of one has no longer row to be padded to."""


@dataclass(frozen=True)
class Call:
    """One call of the engine: how many tokens each row goes on by, and of how many last columns logits are
    asked (0: all). padding: columns beside those of the longest row."""

    lengths: tuple[int, ...]
    keep: int
    padding: int = 0

    @property
    def width(self) -> int:
        return max(self.lengths) + self.padding


@dataclass(frozen=True)
class Case:
    """Probes by index, one a row, from their first token on; rows shorter than a call is wide are padded on
    `side`."""

    rows: tuple[int, ...]
    calls: tuple[Call, ...]
    side: Side = "right"


def plan(
    lengths: Sequence[int], window: int, live: int, effort: Effort, max_batch: int | None = None
) -> dict[str, tuple[Case, ...]]:
    """The cases of every scenario that probes of these lengths allow.

    live: rows of logits that one call may return at most (at least one a row is always asked for). max_batch:
    rows that the engine takes; a row that is alone is padded all the same.
    A scenario for which the probes are too short is left out, which a verdict counts as failed.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    steps = DECODE_STEPS[effort]
    batch = min(BATCH, max_batch or BATCH)
    chosen = by_length[: 1 if effort == "quick" else 2]
    cases = {
        "prefill": [case for i, n in enumerate(lengths) for case in _prefill(i, n, live)],
        "decode": [case for i in chosen for case in _decode(i, lengths[i], window, steps)],
        "chunked": [
            case
            for i, sizes in zip(chosen, ((1, 7, window), (max(window - 1, 1), 2, 3)), strict=False)
            for case in _chunked(i, lengths[i], sizes, live)
        ],
        "padded-left": _padded(lengths, by_length, window, live, "left", batch),
        "padded-right": _padded(lengths, by_length, window, live, "right", batch),
        "last-only": [Case((i,), (Call((n,), 1),)) for i, n in enumerate(lengths)],
    }
    return {name: tuple(cases[name]) for name in SCENARIOS if cases[name]}


def _prefill(probe: int, n: int, live: int) -> list[Case]:
    """Every position out of a prefill from the start; where logits would be too many, out of several, ever
    shorter."""
    return [Case((probe,), (Call((end,), live if live < end else 0),)) for end in range(n, 0, -live)]


def _decode(probe: int, n: int, window: int, steps: int) -> list[Case]:
    """Token by token from the first, across the window's edge, and at the end.

    The second starts with token number window - 2, so that the last query that sees everything, the first
    that does not, and those after come out of the cache.
    """
    starts = sorted({start for start in (1, window - 2, n - steps) if 1 <= start < n} or ({1} if n > 1 else set()))
    return [Case((probe,), (Call((start,), 1), *[Call((1,), 1)] * min(steps, n - start))) for start in starts]


def _chunked(probe: int, n: int, sizes: Sequence[int], live: int) -> list[Case]:
    """Prefill in chunks of uneven sizes, then the rest."""
    calls, left = [], n
    for size in (*sizes, n):
        take = min(size, left)
        if take:
            calls.append(Call((take,), live if live < take else 0))
            left -= take
    return [Case((probe,), tuple(calls))] if len(calls) > 1 else []


def _padded(
    lengths: Sequence[int], by_length: Sequence[int], window: int, live: int, side: Side, batch: int
) -> list[Case]:
    """Batches of rows of different lengths, continued with the cache.

    The first case pads a short prompt, goes on with an unpadded chunk across the window, with a ragged
    call, and then token by token: padding lies inside the cache. The second pads long prompts, then
    decodes. Logits at the columns of a row that is padded on the right are only known with keep = 0, hence
    the limits by `live`.
    """
    ample = [i for i in by_length if lengths[i] > window + BATCH_STEPS + max(RAGGED)] or list(by_length[:1])
    rows = tuple(ample[k % len(ample)] for k in range(batch))
    room = [lengths[i] - BATCH_STEPS for i in rows]
    decode = [Call((1,) * batch, 1)] * BATCH_STEPS
    share = max(live // batch, 1)
    ragged, alone = RAGGED[:batch], 0 if batch > 1 else ALONE_PADDING
    cases = []

    first = min(share - alone, window // 2 + 3)
    firsts = (first, max(first // 2, 1), 1)[:batch]
    chunk = min(r - n - g for r, n, g in zip(room, firsts, ragged, strict=True))
    if first > 1 and chunk > 0 and share >= max(ragged) + alone:
        going_on = Call((chunk,) * batch, min(chunk, share))
        cases.append(Case(rows, (Call(firsts, 0, alone), going_on, Call(ragged, 0, alone), *decode), side))

    longs = tuple(r - 5 * k for k, r in enumerate(room))
    width = max(longs) + alone
    if min(longs) > 0 and (len(set(longs)) > 1 or alone) and (side == "left" or width <= share):
        cases.append(Case(rows, (Call(longs, 0 if width <= share else share, alone), *decode), side))
    return cases
