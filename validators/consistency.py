"""Whether the engine agrees with itself: the same tokens whole and token by token, in chunks, padded, twice.

    checks = measure_consistency(runner, [probe.ids for probe in probes], config, "quick",
                                 long=None, max_batch=None, max_context=None, live=135)

No reference is needed, so lengths that a reference could not afford are checked too: around the context that YaRN
extends, where a table or a mask of a fixed length would end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import KVCache, Logits, Runner, Step, Tokens
from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.errors import SessionError
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.scenarios import Effort, Side
from gptoss_export.validators.streaming import NO_TEXT, compare

CheckName = Literal["decode", "chunked", "padded", "repeat"]
CHECKS: tuple[CheckName, ...] = ("decode", "chunked", "padded", "repeat")

QUICK_CONTEXT = 1024
"""A quick validation decodes behind no longer texts than this, and no check needs prompts of more than two of it."""

FULL_TEXTS = 3
SIDES: tuple[Side, ...] = ("left", "right")
BATCH: Mapping[Effort, int] = {"quick": 2, "full": 3}
BATCH_STEPS = 2
ALONE_PADDING = 2
"""Columns of padding where a batch of one has no longer row to be padded to."""


@dataclass(frozen=True)
class ConsistencyCheck:
    """One way against another over the same positions.

    length: tokens in the cache before the positions that are compared (of `decode`), or of the whole text. The largest
    |logit difference|, each row's mean difference removed, KL in nats, and distance in float32 ulps; None where a logit
    was not finite. bitwise: every bit the same. diffs: the largest |logit difference| of each position that is not the
    same in every bit and is finite, largest first.
    """

    name: CheckName
    length: int
    positions: int
    logit_diff_max: float | None
    kl_max: float | None
    ulps_max: int | None
    bitwise: bool
    diffs: tuple[float, ...]


def measure_consistency(
    runner: Runner,
    texts: Sequence[Sequence[int]],
    config: ModelConfig,
    effort: Effort,
    *,
    long: Sequence[int] | None,
    max_batch: int | None,
    max_context: int | None,
    live: int,
    progress: Progress | None = None,
) -> tuple[ConsistencyCheck, ...]:
    """Every check that the limits allow, in the order of CHECKS; of `decode` one for each length.

    texts: token ids; the longest is used, with full effort and for batches others too. They are repeated where a length
    needs more, and so is `long` (None: the texts), which is for the original context. max_batch, max_context: rows, and
    columns of a text, that the engine takes. live: rows of logits that are held at a time, though always the few that a
    check cannot do without.

    Raises ValueError without a token, SessionError for logits of a wrong shape, and whatever the runner raises.
    """
    by_length = sorted((text for text in texts if len(text)), key=len, reverse=True)
    if not by_length:
        raise ValueError("no text to run")
    longest = min(config.max_positions, max_context or config.max_positions)
    chosen = by_length[: 1 if effort == "quick" else FULL_TEXTS]
    near, far = decode_lengths(config, effort, longest)
    jobs = [(run, chosen) for run in near]
    jobs += [(run, [long or list(chain.from_iterable(by_length))]) for run in far]
    window = min(config.sliding_window, QUICK_CONTEXT)
    checks = []
    with (progress or SilentProgress()).task("engine against itself", total=len(jobs) + 2) as task:
        for pasts, sources in jobs:
            checks += _decode(runner, pasts, sources)
            task.advance(1)
        checks += _chunked_and_repeat(runner, chosen[0], window, longest, live)
        task.advance(1)
        checks += _padded(runner, by_length, window, longest, live, min(BATCH[effort], max_batch or BATCH[effort]))
        task.advance(1)
    return tuple(sorted(checks, key=lambda check: CHECKS.index(check.name)))


def decode_lengths(config: ModelConfig, effort: Effort, longest: int) -> tuple[list[range], list[range]]:
    """Past lengths after which a token is decoded, as runs of consecutive ones: at the window, at YaRN's context.

    longest: columns of a text that model and engine take. A quick validation leaves out what is beyond QUICK_CONTEXT.
    """
    most = longest if effort == "full" else min(longest, QUICK_CONTEXT + 2)
    w = config.sliding_window if "sliding_attention" in config.layer_types else 1
    near = {1, w - 1, w, w + 1}
    context = config.yarn.original_context if config.yarn else 1
    far = {context - 1, context, context + 1} - near
    return _runs(near, most), _runs(far, most) if context > 1 else []


def _runs(pasts: set[int], longest: int) -> list[range]:
    runs: list[range] = []
    for past in sorted(past for past in pasts if 1 <= past < longest):
        if runs and past == runs[-1].stop:
            runs[-1] = range(runs[-1].start, past + 1)
        else:
            runs.append(range(past, past + 1))
    return runs


def _decode(runner: Runner, pasts: range, texts: Sequence[Sequence[int]]) -> list[ConsistencyCheck]:
    """The tokens after each of those pasts out of one prefill, and in steps behind a prefill of the first."""
    differences = [_Difference() for _ in pasts]
    for text in texts:
        ids = _take(text, pasts.stop)
        whole = np.concatenate([*_tail(runner, ids, (pasts.stop,), len(pasts))])
        steps = _tail(runner, ids, (pasts.start, *[1] * len(pasts)), len(pasts))
        for i, (difference, step) in enumerate(zip(differences, steps, strict=True)):
            difference.add(whole[i : i + 1], step)
    return [difference.check("decode", past) for past, difference in zip(pasts, differences, strict=True)]


def _chunked_and_repeat(
    runner: Runner, text: Sequence[int], window: int, longest: int, live: int
) -> list[ConsistencyCheck]:
    """A prompt and then one token, against the prompt in uneven chunks, and against the same again."""
    n = min(2 * window + 9, longest)
    ids, prompt, kept = _take(text, n), n - 1, min(n, max(live // 2, 1))
    # Where not all positions are compared, some chunks still begin among those that are.
    edges = {edge for edge in (1, 8, 8 + window, n - kept // 2, n - 3) if 0 < edge < prompt}
    bounds = (0, *sorted(edges), prompt, n) if prompt else (0, n)
    chunks = tuple(end - begin for begin, end in pairwise(bounds))
    calls = (prompt, 1) if prompt else (1,)
    whole = np.concatenate([*_tail(runner, ids, calls, kept)])
    ways: tuple[tuple[CheckName, tuple[int, ...]], ...] = (("chunked", chunks), ("repeat", calls))
    checks = []
    for name, lengths in ways:
        difference, at = _Difference(), 0
        for part in _tail(runner, ids, lengths, kept):
            difference.add(whole[at : at + len(part)], part)
            at += len(part)
        checks.append(difference.check(name, n))
    return checks


def _padded(
    runner: Runner, texts: Sequence[Sequence[int]], window: int, longest: int, live: int, batch: int
) -> list[ConsistencyCheck]:
    """Rows of different lengths in a batch that is padded on the left, and on the right, against each row alone.

    A padded prompt, then a chunk across the window and single steps with the padding in the cache. Rows that are alone
    take the same calls, so that nothing but padding and company differs.
    """
    alone = 0 if batch > 1 else ALONE_PADDING
    room = longest - alone - BATCH_STEPS
    share = live // (len(SIDES) * batch + 1) - alone - BATCH_STEPS
    first = max(min(share // 2, window // 2 + 3, room - 1), 1)
    chunk = min(window + 3, room - first)
    if chunk < 1:
        return []
    kept = max(min(share - first, chunk), 1)
    firsts = (first, max(first // 2, 1), 1)[:batch]
    rest = (chunk, *[1] * BATCH_STEPS)
    rows = [_take(texts[i % len(texts)], n + sum(rest), skip=i) for i, n in enumerate(firsts)]
    keeps = (kept, *[1] * BATCH_STEPS)
    sides = [_batch(runner, rows, firsts, rest, keeps, side, alone) for side in SIDES]
    difference = _Difference()
    for row, (ids, n) in enumerate(zip(rows, firsts, strict=True)):
        singles = _calls(runner, ids, (n, *rest), (n, *keeps))
        for i, single in enumerate(singles):
            for side in sides:
                difference.add(single, side[row][i])
    return [difference.check("padded", first + alone + sum(rest))]


def _batch(
    runner: Runner,
    rows: Sequence[Tokens],
    firsts: Sequence[int],
    rest: Sequence[int],
    keeps: Sequence[int],
    side: Side,
    padding: int,
) -> list[list[Logits]]:
    """Logits of each row and call: of all its tokens in the first, and of the last `keeps` in the unpadded others."""
    width = max(firsts) + padding
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    columns = [slice(width - n, width) if side == "left" else slice(n) for n in firsts]
    for row, (text, n, where) in enumerate(zip(rows, firsts, columns, strict=True)):
        ids[row, where], mask[row, where] = text[:n], 1
    step = _forward(runner, ids, mask, None, width)
    parts = [[logits[where]] for logits, where in zip(step.logits, columns, strict=True)]
    past = np.array(firsts)
    for length, keep in zip(rest, keeps, strict=True):
        ids = np.stack([text[n : n + length] for text, n in zip(rows, past, strict=True)])
        step = _forward(runner, ids, None, step.cache, keep)
        for of_row, logits in zip(parts, step.logits, strict=True):
            of_row.append(logits)
        past += length
    return parts


def _take(text: Sequence[int], n: int, skip: int = 0) -> Tokens:
    """The text from `skip` on, repeated as often as n tokens need: [n]."""
    return np.fromiter(islice(cycle(text), skip, skip + n), np.int64, n)


def _tail(runner: Runner, ids: Tokens, lengths: Sequence[int], kept: int) -> Iterator[Logits]:
    """The logits of the last `kept` positions of ids [n], which is run in calls of those lengths; [*, V] a call."""
    ends = np.cumsum(lengths)
    first = int(ends[-1]) - kept
    keeps = [min(length, max(int(end) - first, 0)) for length, end in zip(lengths, ends, strict=True)]
    return _calls(runner, ids, lengths, keeps)


def _calls(runner: Runner, ids: Tokens, lengths: Sequence[int], keeps: Sequence[int]) -> Iterator[Logits]:
    """Runs ids [n] alone; of each call the logits [keep, V] of its last positions, nothing of those without any."""
    cache: KVCache | None = None
    at = 0
    for length, keep in zip(lengths, keeps, strict=True):
        step = _forward(runner, ids[None, at : at + length], None, cache, max(keep, 1))
        cache, at = step.cache, at + length
        if keep:
            yield step.logits[0]


def _forward(runner: Runner, ids: Tokens, mask: Tokens | None, cache: KVCache | None, keep: int) -> Step:
    step = runner.forward(ids, mask, cache, keep)
    expected = (len(ids), keep, runner.vocab_size)
    if step.logits.shape != expected or step.logits.dtype != np.float32:
        raise SessionError(
            f"the engine returned logits {step.logits.dtype} {list(step.logits.shape)} where float32 {list(expected)} "
            "were asked for",
            "Report this as a bug: the engine's runner breaks its protocol.",
        )
    return step


class _Difference:
    """Takes pairs of logits of the same positions and holds none."""

    def __init__(self) -> None:
        self._positions = self._ulps = 0
        self._diffs: list[float] = []
        self._kl = 0.0
        self._finite = self._bitwise = True

    def add(self, one: Logits, other: Logits) -> None:
        """Of [n, V] each."""
        self._positions += len(one)
        for a, b in zip(one, other, strict=True):
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                self._finite = False
                self._bitwise &= np.array_equal(a.view(np.int32), b.view(np.int32))
            elif not np.array_equal(a.view(np.int32), b.view(np.int32)):
                self._bitwise = False
                figures = compare(a[None], b[None], np.array([NO_TEXT]))[0]
                self._diffs.append(float(figures["diff_max"]))
                self._kl = max(self._kl, float(figures["kl"]))
                self._ulps = max(self._ulps, int(np.abs(_places(a) - _places(b)).max()))

    def check(self, name: CheckName, length: int) -> ConsistencyCheck:
        ok = self._finite and self._positions > 0
        return ConsistencyCheck(
            name=name,
            length=length,
            positions=self._positions,
            logit_diff_max=max(self._diffs, default=0.0) if ok else None,
            kl_max=self._kl if ok else None,
            ulps_max=self._ulps if ok else None,
            bitwise=self._bitwise,
            diffs=tuple(sorted(self._diffs, reverse=True)),
        )


def _places(values: Logits) -> NDArray[np.int64]:
    """The place of each finite float32 among all of them in order, both zeros in one: neighbours differ by 1."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
