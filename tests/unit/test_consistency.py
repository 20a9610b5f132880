"""An engine against itself: what is asked of it, within which bounds, and which faults that shows."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest

from gptoss_export.engines.runner import KVCache, Step, Tokens
from gptoss_export.exporter.checkpoint.config import ModelConfig, YarnConfig
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import SessionError
from gptoss_export.validators.consistency import CHECKS, ConsistencyCheck, decode_lengths, measure_consistency

WINDOW, CONTEXT, VOCAB = 8, 40, 23
LIVE = 1000
PLENTY = 1 << 20
TEXTS = (tuple(range(20)), tuple(range(22, 5, -1)), (7,))
TABLE = np.random.default_rng(0).integers(-64, 64, (WINDOW + 2, VOCAB, VOCAB)).astype(np.float32)
"""What a token brings to the logits so many positions later: small integers, so that sums are exact."""


@dataclass
class Cache:
    ids: Tokens
    mask: Tokens
    spent: bool = False

    @property
    def length(self) -> int:
        return self.ids.shape[1]


class Windowed:
    """A model that sums what each token of the window brings; `fault` is what it does wrong."""

    vocab_size = VOCAB

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.calls: list[tuple[int, int, int]] = []
        self.alive = self.most_alive = 0

    def forward(
        self, input_ids: Tokens, attention_mask: Tokens | None = None, cache: KVCache | None = None, keep: int = 1
    ) -> Step:
        rows, new = input_ids.shape
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        past = cache.length if cache else 0
        if isinstance(cache, Cache):
            assert not cache.spent
            cache.spent = True
            input_ids = np.concatenate([cache.ids, input_ids], axis=1)
            mask = np.concatenate([cache.mask, mask], axis=1)
        assert input_ids.min() >= 0
        assert 0 < keep <= new
        self.calls.append((rows, past + new, rows * keep))
        logits = np.stack([self._row(ids, m, past, keep) for ids, m in zip(input_ids, mask, strict=True)])
        if self.fault == "neighbour":
            logits[1:] += logits[:1]
        if self.fault == "shape":
            logits = logits[:, :-1]
        if self.fault == "twice":
            logits[..., 3] += len(self.calls)
        self.alive += rows * keep
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(logits, self._dropped, rows * keep)
        return Step(logits, Cache(input_ids, mask))

    def _dropped(self, rows: int) -> None:
        self.alive -= rows

    def _row(self, ids: Tokens, mask: Tokens, past: int, keep: int) -> np.ndarray:
        decode = past > 0 and len(ids) == past + 1
        if self.fault == "padding":
            mask = np.ones_like(mask)
        logits = np.full((keep, VOCAB), 1e4, np.float32)  # of padding: nobody may look
        for i, column in enumerate(range(len(ids) - keep, len(ids))):
            if not mask[column]:
                continue
            seen = ids[: column + 1][mask[: column + 1] != 0][::-1]
            window = WINDOW + (self.fault == "window" and decode)
            if self.fault == "chunk" and past and not decode:
                seen = seen[: column + 1 - past]
            parts = [TABLE[age, token] for age, token in enumerate(seen[:window])]
            logits[i] = np.sum(parts, axis=0)
            if self.fault == "context" and decode and len(seen) > CONTEXT:
                logits[i, 0] += 1
            if self.fault == "level" and decode:
                logits[i] += 4
            if self.fault == "nan" and decode and len(seen) == WINDOW + 1:
                logits[i, 5] = np.nan
        return logits


@pytest.fixture
def config(tiny: Checkpoint) -> ModelConfig:
    yarn = YarnConfig(32.0, 32.0, 1.0, CONTEXT, False)
    return replace(tiny.config, vocab_size=VOCAB, sliding_window=WINDOW, yarn=yarn, max_positions=1000)


def measure(
    runner: Windowed,
    config: ModelConfig,
    effort: str = "quick",
    *,
    max_batch: int | None = None,
    max_context: int | None = None,
    live: int = LIVE,
) -> tuple[ConsistencyCheck, ...]:
    return measure_consistency(
        runner, TEXTS, config, effort, long=None, max_batch=max_batch, max_context=max_context, live=live
    )


LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, CONTEXT - 1, CONTEXT, CONTEXT + 1]


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_an_engine_that_agrees_with_itself(config: ModelConfig, effort: str) -> None:
    checks = measure(Windowed(), config, effort)
    assert [check.length for check in checks if check.name == "decode"] == LENGTHS
    assert tuple(dict.fromkeys(check.name for check in checks)) == CHECKS
    for check in checks:
        assert check.positions > 0
        assert (check.logit_diff_max, check.kl_max, check.ulps_max, check.bitwise) == (0.0, 0.0, 0, True)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        # Of a prompt and a token, and of rows alone and in a batch, both ways end in steps that are wrong alike.
        ("window", {("decode", WINDOW), ("decode", WINDOW + 1), *(("decode", n) for n in LENGTHS[4:])}),
        ("context", {("decode", CONTEXT), ("decode", CONTEXT + 1)}),
        ("chunk", {("chunked", 2 * WINDOW + 9)}),
        ("padding", {("padded", 20)}),
        ("neighbour", {("padded", 20)}),
        ("twice", {*(("decode", n) for n in LENGTHS), ("chunked", 25), ("repeat", 25), ("padded", 20)}),
    ],
)
def test_a_fault_shows_in_the_checks_that_are_about_it(
    config: ModelConfig, fault: str, found: set[tuple[str, int]]
) -> None:
    checks = measure(Windowed(fault), config)
    assert {(check.name, check.length) for check in checks if not check.bitwise} == found
    for check in checks:
        assert (check.logit_diff_max > 0) is (check.kl_max > 0) is (check.ulps_max > 0) is (not check.bitwise)


def test_a_level_that_no_softmax_sees_is_no_difference(config: ModelConfig) -> None:
    checks = [check for check in measure(Windowed("level"), config) if check.name == "decode"]
    assert [check.bitwise for check in checks] == [False] * 7
    assert max(check.logit_diff_max for check in checks) < 1e-9
    assert min(check.ulps_max for check in checks) > 1000


def test_what_is_not_finite_has_no_figures(config: ModelConfig) -> None:
    checks = {(check.name, check.length): check for check in measure(Windowed("nan"), config)}
    bad = checks["decode", WINDOW]
    assert (bad.logit_diff_max, bad.kl_max, bad.ulps_max, bad.bitwise, bad.positions) == (None, None, None, False, 1)
    assert checks["decode", WINDOW + 1].bitwise


def test_the_same_nan_twice_is_bitwise_equal_and_no_agreement(config: ModelConfig) -> None:
    class Broken(Windowed):
        def _row(self, ids: Tokens, mask: Tokens, past: int, keep: int) -> np.ndarray:
            return np.full((keep, VOCAB), np.nan, np.float32)

    for check in measure(Broken(), config):
        assert (check.logit_diff_max, check.bitwise) == (None, True)


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_ulps_are_steps_from_one_float_to_the_next(config: ModelConfig, steps: int) -> None:
    """Across zero too: half of the steps lie below it."""

    class Stepping(Windowed):
        def forward(self, *args: object, **kwargs: object) -> Step:
            step = super().forward(*args, **kwargs)
            place = -(steps // 2) if len(self.calls) % 2 else steps - steps // 2
            value = np.array(abs(place), np.int32).view(np.float32)
            step.logits[..., 2] = -value if place < 0 else value
            return step

    checks = measure(Stepping(), config)
    assert max(check.ulps_max for check in checks) == steps


def test_both_zeros_are_one_number_and_two_patterns(config: ModelConfig) -> None:
    class Zeros(Windowed):
        def _row(self, ids: Tokens, mask: Tokens, past: int, keep: int) -> np.ndarray:
            return np.full((keep, VOCAB), -0.0 if past else 0.0, np.float32)

    check = measure(Zeros(), config)[0]
    assert (check.logit_diff_max, check.ulps_max, check.bitwise) == (0.0, 0, False)


@pytest.mark.parametrize("live", [1, 20, 135, 5000])
@pytest.mark.parametrize("max_batch", [None, 1, 2, 8])
@pytest.mark.parametrize("max_context", [6, 17, None])
def test_the_bounds_are_kept(config: ModelConfig, live: int, max_batch: int | None, max_context: int | None) -> None:
    runner = Windowed()
    checks = measure(runner, config, "full", max_batch=max_batch, max_context=max_context, live=live)
    assert {check.name for check in checks} == set(CHECKS)
    assert all(check.bitwise and check.positions for check in checks)
    assert max(rows for rows, _, _ in runner.calls) == min(3, max_batch or 3)
    assert max(columns for _, columns, _ in runner.calls) <= (max_context or config.max_positions)
    lengths = [check.length for check in checks if check.name == "decode"]
    assert lengths == [n for n in LENGTHS if n < (max_context or PLENTY)]
    # Of the smallest, a check keeps what it cannot do without: a few rows of a batch, on both sides.
    assert runner.most_alive <= max(live, 40)


def test_enough_rows_are_compared_where_there_is_room(config: ModelConfig) -> None:
    positions = {check.name: check.positions for check in measure(Windowed(), config)}
    assert positions["chunked"] == positions["repeat"] == 2 * WINDOW + 9
    # Rows of 7 and 3 tokens, a chunk of 11 and two steps each, padded on either side.
    assert positions["padded"] == 2 * (7 + 3 + 2 * (11 + 2))
    positions = {check.name: check.positions for check in measure(Windowed(), config, "full")}
    assert positions["padded"] == 2 * (7 + 3 + 1 + 3 * (11 + 2))


def test_padding_of_a_row_that_may_have_no_company(config: ModelConfig) -> None:
    checks = {check.name: check for check in measure(Windowed("padding"), config, max_batch=1)}
    assert not checks["padded"].bitwise
    assert checks["chunked"].bitwise


def test_the_long_text_is_for_the_original_context_only(config: ModelConfig) -> None:
    seen: list[tuple[int, int]] = []

    class Watched(Windowed):
        def forward(self, input_ids: Tokens, *args: object, **kwargs: object) -> Step:
            seen.extend((int(token), input_ids.shape[1]) for token in np.unique(input_ids))
            return super().forward(input_ids, *args, **kwargs)

    long = [21, 22] * 30
    measure_consistency(Watched(), [[1, 2, 3]], config, "quick", long=long, max_batch=None, max_context=None, live=LIVE)
    assert {length for token, length in seen if token > 20} == {CONTEXT + 2, CONTEXT - 1, 1}
    assert max(length for token, length in seen if token <= 20) == 2 * WINDOW + 8


@pytest.mark.parametrize(
    ("changes", "effort", "longest", "near", "far"),
    [
        ({}, "quick", PLENTY, [1, 7, 8, 9], [39, 40, 41]),
        ({}, "quick", 40, [1, 7, 8, 9], [39]),
        ({}, "quick", 8, [1, 7], []),
        ({"sliding_window": 1}, "quick", PLENTY, [1, 2], [39, 40, 41]),
        ({"sliding_window": 2}, "quick", PLENTY, [1, 2, 3], [39, 40, 41]),
        ({"sliding_window": 40}, "quick", PLENTY, [1, 39, 40, 41], []),
        ({"sliding_window": 131072}, "quick", PLENTY, [1], [39, 40, 41]),
        ({"yarn": None}, "full", PLENTY, [1, 7, 8, 9], []),
        ({"yarn": YarnConfig(32.0, 32.0, 1.0, 1024, False)}, "quick", PLENTY, [1, 7, 8, 9], [1023, 1024, 1025]),
        ({"yarn": YarnConfig(32.0, 32.0, 1.0, 4096, False)}, "quick", PLENTY, [1, 7, 8, 9], []),
        ({"yarn": YarnConfig(32.0, 32.0, 1.0, 4096, False)}, "full", PLENTY, [1, 7, 8, 9], [4095, 4096, 4097]),
        ({"yarn": YarnConfig(32.0, 32.0, 1.0, 4096, False)}, "full", 4096, [1, 7, 8, 9], [4095]),
        ({"layer_types": ("full_attention",) * 4}, "full", PLENTY, [1, 2], [39, 40, 41]),
    ],
)
def test_the_lengths_to_decode_after(
    config: ModelConfig, changes: dict[str, object], effort: str, longest: int, near: list[int], far: list[int]
) -> None:
    found = decode_lengths(replace(config, **changes), effort, longest)
    assert [[past for run in runs for past in run] for runs in found] == [near, far]
    for run in (run for runs in found for run in runs):
        assert len(run) > 0


def test_few_long_prefills(config: ModelConfig) -> None:
    """Two for three lengths around the context: one whole, and one that three single steps follow."""
    runner = Windowed()
    measure(runner, config)
    long = [columns for _, columns, _ in runner.calls if columns > 2 * WINDOW + 9]
    assert long == [CONTEXT + 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, CONTEXT + 2]


def test_logits_of_another_shape(config: ModelConfig) -> None:
    with pytest.raises(SessionError, match=r"float32 \[1, 0, 23\] where float32 \[1, 1, 23\] were asked for"):
        measure(Windowed("shape"), config)


def test_without_a_token_there_is_nothing_to_run(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="no text"):
        measure_consistency(Windowed(), [()], config, "quick", long=None, max_batch=None, max_context=None, live=1)
