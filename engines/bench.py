"""How fast an artifact is, whatever engine runs it.

    result = run_bench(lambda: target.open_runner(folder, threads), BenchPlan(), HostMeter(threads))
    result.decode[0].tokens_per_second.median

Order: load; a first token; prompts, every length once a round; memory bandwidth; decoding, one past length and
batch after the other; memory bandwidth again. Prompts and decoded tokens are pseudo-random and the same in every
run, so that routing spreads over the experts and runs compare; the logits are still read for the most likely token,
because a user has to wait for that too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gptoss_export.engines.bandwidth import Bandwidth, Spread
from gptoss_export.engines.generate import PREFILL_CHUNK, sample
from gptoss_export.engines.machine import Memory, Reading
from gptoss_export.engines.runner import KVCache, Logits, Runner, Step, Tokens
from gptoss_export.exporter.errors import PromptError

WARMUP_STEPS = 4

_UNUSED_RNG = np.random.default_rng(0)  # greedy sampling draws nothing


class Meter(Protocol):
    """The instruments; `engines.machine.HostMeter` has this machine's."""

    def clock(self) -> float: ...

    def read(self) -> Reading: ...

    def memory(self) -> Memory | None: ...

    def bandwidth(self) -> Bandwidth | None: ...


@dataclass(frozen=True)
class BenchPlan:
    """What to measure.

    prompt_lengths: tokens of the prompts, one row each. past: positions in the cache when the first measured token
    is decoded. batch: rows decoded at a time; each past with each batch. decode_tokens: tokens a row and repetition.
    """

    prompt_lengths: tuple[int, ...] = (32, 128, 512)
    past: tuple[int, ...] = (128,)
    batch: tuple[int, ...] = (1,)
    decode_tokens: int = 64
    repetitions: int = 3

    @property
    def decode_positions(self) -> int:
        """Tokens that are decoded after each past, one repetition going on where the last one ended."""
        return self.repetitions * self.decode_tokens

    def check(self, max_positions: int) -> None:
        """Raises PromptError when the model has too few positions for the plan."""
        if (longest := max(self.prompt_lengths)) > max_positions:
            raise PromptError(
                f"a prompt of {longest} tokens is more than the model's {max_positions} positions",
                "lower --prompt-lengths",
            )
        if (past := max(self.past)) + self.decode_positions > max_positions:
            raise PromptError(
                f"{self.decode_positions} tokens decoded after {past} are more than the model's {max_positions} "
                "positions",
                "lower --past, --decode-tokens or --repetitions",
            )


@dataclass(frozen=True)
class Load:
    """ready: seconds until the engine takes tokens, its import included. first_token: of the first call then, with
    one token: it meets weights that nobody has touched yet.
    """

    ready_seconds: float
    first_token_seconds: float


@dataclass(frozen=True)
class MemoryUse:
    """The process before the engine was imported, when it was ready, and after everything was measured."""

    before_load: Memory | None
    after_load: Memory | None
    end: Memory | None


@dataclass(frozen=True)
class Latency:
    """Percentiles of seconds a step, over the steps of all repetitions."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class PrefillSpeed:
    """One prompt length. first_token_seconds: from the prompt to the most likely next token.

    cores_used, joules_per_token: means over all repetitions; the joules are the whole machine's.
    """

    prompt_length: int
    tokens_per_second: Spread
    first_token_seconds: Spread
    cores_used: float
    joules_per_token: float | None


@dataclass(frozen=True)
class DecodeSpeed:
    """One past length and batch; tokens are counted over all rows, latency is that of a step of all rows.

    past: positions before the first measured step, of which the last few were decoded as a warm-up; last_past:
    before the last step.
    """

    past: int
    last_past: int
    batch: int
    tokens_per_second: Spread
    latency_seconds: Latency
    cores_used: float
    joules_per_token: float | None


@dataclass(frozen=True)
class BenchResult:
    """Everything that `run_bench` measured."""

    load: Load
    memory: MemoryUse
    bandwidth_before: Bandwidth | None
    bandwidth_after: Bandwidth | None
    prefill: tuple[PrefillSpeed, ...]
    decode: tuple[DecodeSpeed, ...]

    def bandwidth_fraction(self, decode: DecodeSpeed, token_bytes: int | None) -> float | None:
        """Share of the memory bandwidth that decoding reached: weights read a second over what plain reads reach.

        Of the readings before and after the faster counts, so that a moment of bad luck flatters nobody. None for
        more than one row, since how many experts they share is not known, and where either figure is missing.
        """
        readings = [b.bytes_per_second.median for b in (self.bandwidth_before, self.bandwidth_after) if b is not None]
        if decode.batch > 1 or token_bytes is None or not readings:
            return None
        return decode.tokens_per_second.median * token_bytes / max(readings)


def run_bench(
    open_runner: Callable[[], Runner], plan: BenchPlan, meter: Meter, say: Callable[[str], None] = lambda line: None
) -> BenchResult:
    """Opens a runner and measures it; `say` is told what begins, never while something is timed.

    The plan has to fit into the model (`BenchPlan.check`). Raises what the runner raises, and SessionError for
    logits that are not finite.
    """
    before_load = meter.memory()
    say("load")
    started = meter.clock()
    runner = open_runner()
    ready = meter.clock() - started
    after_load = meter.memory()
    started = meter.clock()
    _most_likely(runner.forward(random_ids(runner.vocab_size, 1, 1)).logits)
    load = Load(ready, meter.clock() - started)

    prefill = _measure_prefill(runner, plan, meter, say)
    say("memory bandwidth")
    bandwidth_before = meter.bandwidth()
    decode = []
    for past in plan.past:
        for batch in plan.batch:
            say(f"decode after {past} tokens, batch {batch}")
            decode.append(_measure_decode(runner, plan, past, batch, meter))
    end = meter.memory()
    say("memory bandwidth")
    bandwidth_after = meter.bandwidth()
    memory = MemoryUse(before_load, after_load, end)
    return BenchResult(load, memory, bandwidth_before, bandwidth_after, prefill, tuple(decode))


def random_ids(vocab_size: int, rows: int, length: int) -> Tokens:
    """Token ids [rows, length], the same for the same arguments on every machine."""
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length), np.int64)


class _Interval:
    """Sums over the repetitions of one measurement."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.joules: float | None = 0.0

    def add(self, before: Reading, after: Reading) -> None:
        self.wall += after.wall - before.wall
        self.cpu += after.cpu - before.cpu
        if self.joules is None or before.joules is None or after.joules is None:
            self.joules = None
        else:
            self.joules += after.joules - before.joules

    @property
    def cores_used(self) -> float:
        return self.cpu / self.wall

    def joules_per_token(self, tokens: int) -> float | None:
        return None if self.joules is None else self.joules / tokens


def _measure_prefill(
    runner: Runner, plan: BenchPlan, meter: Meter, say: Callable[[str], None]
) -> tuple[PrefillSpeed, ...]:
    """Round after round, so that a slow minute of the machine spoils no single length; the first is a warm-up."""
    speeds: dict[int, list[float]] = {length: [] for length in plan.prompt_lengths}
    delays: dict[int, list[float]] = {length: [] for length in plan.prompt_lengths}
    intervals = {length: _Interval() for length in plan.prompt_lengths}
    for round_number in range(plan.repetitions + 1):
        for length in plan.prompt_lengths:
            say(f"prompt of {length} tokens, " + (f"repetition {round_number}" if round_number else "warm-up"))
            ids = random_ids(runner.vocab_size, 1, length)
            before = meter.read()
            step = _prefill(runner, ids)
            answered = meter.clock()
            _most_likely(step.logits)
            after = meter.read()
            if round_number:
                speeds[length].append(length / (answered - before.wall))
                delays[length].append(after.wall - before.wall)
                intervals[length].add(before, after)
    return tuple(
        PrefillSpeed(
            length,
            Spread.of(speeds[length]),
            Spread.of(delays[length]),
            intervals[length].cores_used,
            intervals[length].joules_per_token(length * plan.repetitions),
        )
        for length in plan.prompt_lengths
    )


def _measure_decode(runner: Runner, plan: BenchPlan, past: int, batch: int, meter: Meter) -> DecodeSpeed:
    """Repetitions follow each other in one cache: to fill it anew for each would take far longer than they do."""
    warm = min(WARMUP_STEPS, past)
    ids = random_ids(runner.vocab_size, batch, past + plan.decode_positions)
    cache = _prefill(runner, ids[:, : past - warm]).cache if past > warm else None
    for at in range(past - warm, past):
        cache = _decode(runner, ids, at, cache)
    at, speeds, latencies, interval = past, [], [], _Interval()
    for _ in range(plan.repetitions):
        before = meter.read()
        ended = before.wall
        for _ in range(plan.decode_tokens):
            started = ended
            cache = _decode(runner, ids, at, cache)
            ended = meter.clock()
            latencies.append(ended - started)
            at += 1
        after = meter.read()
        speeds.append(batch * plan.decode_tokens / (ended - before.wall))
        interval.add(before, after)
    return DecodeSpeed(
        past=past,
        last_past=at - 1,
        batch=batch,
        tokens_per_second=Spread.of(speeds),
        latency_seconds=_percentiles(latencies),
        cores_used=interval.cores_used,
        joules_per_token=interval.joules_per_token(batch * plan.decode_positions),
    )


def _prefill(runner: Runner, ids: Tokens) -> Step:
    """In the chunks that `generate` uses."""
    step = runner.forward(ids[:, :PREFILL_CHUNK], keep=1)
    for start in range(PREFILL_CHUNK, ids.shape[1], PREFILL_CHUNK):
        step = runner.forward(ids[:, start : start + PREFILL_CHUNK], cache=step.cache, keep=1)
    return step


def _decode(runner: Runner, ids: Tokens, at: int, cache: KVCache | None) -> KVCache:
    step = runner.forward(ids[:, at : at + 1], cache=cache, keep=1)
    _most_likely(step.logits)
    return step.cache


def _most_likely(logits: Logits) -> list[int]:
    return [sample(row, 0.0, 0, 1.0, _UNUSED_RNG) for row in logits[:, -1]]


def _percentiles(seconds: Sequence[float]) -> Latency:
    p50, p90, p99 = (float(p) for p in np.percentile(seconds, (50, 90, 99)))
    return Latency(p50, p90, p99)
