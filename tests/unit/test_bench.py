"""The bench: what is fed, what is counted and what is divided by what, on instruments that do not depend on time."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import pytest

from gptoss_export.engines import bandwidth as bandwidth_module
from gptoss_export.engines.bandwidth import Bandwidth, Spread, measure_read_bandwidth, read_memory, slice_bytes
from gptoss_export.engines.bench import (
    PREFILL_CHUNK,
    WARMUP_STEPS,
    BenchPlan,
    BenchResult,
    DecodeSpeed,
    Latency,
    random_ids,
    run_bench,
)
from gptoss_export.engines.machine import (
    EnergyCounter,
    HostMeter,
    Memory,
    Reading,
    describe_machine,
    process_memory,
    usable_cores,
)
from gptoss_export.engines.runner import KVCache, Step, Tokens
from gptoss_export.engines.token_bytes import token_bytes
from gptoss_export.exporter.checkpoint.config import ModelConfig, alternating
from gptoss_export.exporter.checkpoint.layouts import stored_tensors
from gptoss_export.exporter.checkpoint.synth import PRESETS
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout
from gptoss_export.exporter.commands.bench import Sizes
from gptoss_export.exporter.errors import PromptError, SessionError

VOCAB = 50
OPEN_SECONDS = 2.0
CORES = 1.5
WATTS = 40.0


@dataclass
class FakeMeter:
    """Time passes only when a runner says so; bandwidth rises by a byte per second each time it is measured."""

    events: list[str]
    now: float = 100.0
    has_energy: bool = True
    measured: int = 0

    def clock(self) -> float:
        return self.now

    def read(self) -> Reading:
        return Reading(self.now, self.now * CORES, self.now * WATTS if self.has_energy else None)

    def memory(self) -> Memory | None:
        self.events.append("memory")
        return Memory(len(self.events), 1, 10 * len(self.events))

    def bandwidth(self) -> Bandwidth | None:
        self.events.append("bandwidth")
        self.measured += 1
        return Bandwidth(Spread(999.0 + self.measured, 1.0, 2000.0), 2, 64, 5, 2.0)


@dataclass
class FakeCache:
    length: int
    used: bool = False


class FakeRunner:
    """Takes a second for a call and a tenth more for each token of each row; remembers all calls."""

    vocab_size = VOCAB

    def __init__(self, meter: FakeMeter, logit: float = 0.0) -> None:
        self.meter, self.logit = meter, logit
        self.calls: list[tuple[int, int, int]] = []
        self.ids: list[Tokens] = []
        meter.now += OPEN_SECONDS
        meter.events.append("open")

    def forward(
        self, input_ids: Tokens, attention_mask: Tokens | None = None, cache: KVCache | None = None, keep: int = 1
    ) -> Step:
        assert attention_mask is None
        assert keep == 1
        past = 0
        if cache is not None:
            assert isinstance(cache, FakeCache)
            assert not cache.used, "a cache was used twice"
            cache.used, past = True, cache.length
        rows, new = input_ids.shape
        self.calls.append((rows, new, past))
        self.ids.append(input_ids)
        self.meter.events.append("forward")
        self.meter.now += 1.0 + 0.1 * rows * new
        return Step(np.full((rows, 1, VOCAB), self.logit, np.float32), FakeCache(past + new))


@dataclass(frozen=True)
class Run:
    result: BenchResult
    runner: FakeRunner
    meter: FakeMeter
    said: list[str]


def run(plan: BenchPlan, **meter_fields: bool) -> Run:
    meter = FakeMeter([], **meter_fields)
    runners: list[FakeRunner] = []
    said: list[str] = []

    def open_runner() -> FakeRunner:
        runners.append(FakeRunner(meter))
        return runners[-1]

    result = run_bench(open_runner, plan, meter, said.append)
    (runner,) = runners
    return Run(result, runner, meter, said)


PLAN = BenchPlan(prompt_lengths=(10, 40), past=(20,), batch=(1,), decode_tokens=5, repetitions=2)


def test_speeds_are_tokens_over_seconds() -> None:
    result = run(PLAN).result
    assert result.load.ready_seconds == pytest.approx(OPEN_SECONDS)
    assert result.load.first_token_seconds == pytest.approx(1.1)
    short, long = result.prefill
    assert (short.prompt_length, long.prompt_length) == (10, 40)
    assert short.first_token_seconds.median == pytest.approx(2.0)
    assert short.tokens_per_second.median == pytest.approx(10 / 2.0)
    assert long.tokens_per_second.min == pytest.approx(40 / 5.0)
    (decode,) = result.decode
    assert decode.tokens_per_second.max == pytest.approx(1 / 1.1)
    assert decode.latency_seconds.p50 == pytest.approx(1.1)
    assert decode.latency_seconds.p99 == pytest.approx(1.1)


def test_cores_and_energy_are_means_over_the_repetitions() -> None:
    result = run(PLAN).result
    (decode,) = result.decode
    assert decode.cores_used == pytest.approx(CORES)
    assert decode.joules_per_token == pytest.approx(1.1 * WATTS)
    assert result.prefill[1].cores_used == pytest.approx(CORES)
    assert result.prefill[1].joules_per_token == pytest.approx(5.0 * WATTS / 40)


def test_energy_that_is_not_reported_is_not_made_up() -> None:
    result = run(PLAN, has_energy=False).result
    assert [speed.joules_per_token for speed in (*result.prefill, *result.decode)] == [None, None, None]


def test_prompts_are_measured_round_after_round_then_decoding_at_its_past() -> None:
    calls = run(PLAN).runner.calls
    warm = WARMUP_STEPS
    first_token = [(1, 1, 0)]
    rounds = [(1, 10, 0), (1, 40, 0)] * (1 + PLAN.repetitions)
    decode = [(1, 20 - warm, 0)] + [(1, 1, past) for past in range(20 - warm, 20 + 2 * 5)]
    assert calls == first_token + rounds + decode


def test_decode_says_which_positions_it_measured() -> None:
    (decode,) = run(PLAN).result.decode
    assert (decode.past, decode.last_past) == (20, 29)


def test_every_past_is_decoded_with_every_batch() -> None:
    plan = replace(PLAN, past=(0, 2, 20), batch=(1, 3))
    run_ = run(plan)
    assert [(d.past, d.batch) for d in run_.result.decode] == [(0, 1), (0, 3), (2, 1), (2, 3), (20, 1), (20, 3)]
    three = run_.result.decode[-1]
    assert three.tokens_per_second.median == pytest.approx(3 / 1.3)
    assert three.latency_seconds.p90 == pytest.approx(1.3)
    assert three.joules_per_token == pytest.approx(1.3 * WATTS / 3)
    # A short past is decoded from its first token on, an empty one begins without a cache.
    begin = 1 + 2 * (1 + plan.repetitions)
    assert run_.runner.calls[begin : begin + 10] == [(1, 1, past) for past in range(10)]


def test_long_prompts_go_in_the_chunks_of_generate() -> None:
    plan = replace(PLAN, prompt_lengths=(PREFILL_CHUNK + 3,), past=(2 * PREFILL_CHUNK + WARMUP_STEPS,), batch=(2,))
    calls = run(plan).runner.calls
    assert calls[1:3] == [(1, PREFILL_CHUNK, 0), (1, 3, PREFILL_CHUNK)]
    assert calls[7:9] == [(2, PREFILL_CHUNK, 0), (2, PREFILL_CHUNK, PREFILL_CHUNK)]
    assert calls[9] == (2, 1, 2 * PREFILL_CHUNK)


def test_ids_are_in_the_vocabulary_spread_and_the_same_every_time() -> None:
    plan = replace(PLAN, prompt_lengths=(400,), batch=(4,))
    first, again = run(plan).runner.ids, run(plan).runner.ids
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    everything = np.concatenate([ids.ravel() for ids in first])
    assert set(everything.tolist()) == set(range(VOCAB))
    rows = random_ids(VOCAB, 4, 30)
    assert len({row.tobytes() for row in rows}) == 4


def test_bandwidth_brackets_decoding_and_memory_is_read_at_load_and_end() -> None:
    run_ = run(PLAN)
    events = run_.meter.events
    assert events[:4] == ["memory", "open", "memory", "forward"]
    assert events[-2:] == ["memory", "bandwidth"]
    decode_calls = WARMUP_STEPS + 1 + PLAN.decode_positions
    assert events[-3 - decode_calls : -2] == ["bandwidth", *["forward"] * decode_calls]
    result = run_.result
    assert result.bandwidth_before is not None
    assert result.bandwidth_after is not None
    assert result.bandwidth_before.bytes_per_second.median == 1000.0
    assert result.bandwidth_after.bytes_per_second.median == 1001.0
    assert result.memory.before_load == Memory(1, 1, 10)
    assert result.memory.after_load == Memory(3, 1, 30)
    assert result.memory.end == Memory(len(events) - 1, 1, 10 * (len(events) - 1))


def test_what_begins_is_said() -> None:
    said = run(PLAN).said
    assert said[0] == "load"
    assert said.count("memory bandwidth") == 2
    assert "prompt of 40 tokens, warm-up" in said
    assert "prompt of 10 tokens, repetition 2" in said
    assert "decode after 20 tokens, batch 1" in said


def test_logits_that_are_not_finite_end_the_bench() -> None:
    meter = FakeMeter([])
    with pytest.raises(SessionError, match="not finite"):
        run_bench(lambda: FakeRunner(meter, logit=float("nan")), PLAN, meter)


@pytest.mark.parametrize(
    ("positions", "message"), [(39, "a prompt of 40 tokens"), (44, "15 tokens decoded after 30"), (45, None)]
)
def test_a_plan_that_the_model_has_no_positions_for(positions: int, message: str | None) -> None:
    plan = replace(PLAN, past=(3, 30), decode_tokens=5, repetitions=3)
    if message is None:
        plan.check(positions)
    else:
        with pytest.raises(PromptError, match=message):
            plan.check(positions)


def decode_speed(tokens_per_second: float, batch: int = 1) -> DecodeSpeed:
    spread = Spread(tokens_per_second, 0.0, 1e9)
    return DecodeSpeed(128, 319, batch, spread, Latency(0.1, 0.1, 0.1), 2.0, None)


def test_the_fraction_is_weights_read_over_the_faster_bandwidth() -> None:
    result = run(PLAN).result
    assert result.bandwidth_fraction(decode_speed(4.0), 200) == pytest.approx(4.0 * 200 / 1001.0)
    slower_after = replace(result, bandwidth_after=None)
    assert slower_after.bandwidth_fraction(decode_speed(4.0), 200) == pytest.approx(4.0 * 200 / 1000.0)


def test_the_fraction_is_unknown_where_a_figure_is_missing_or_rows_share_experts() -> None:
    result = run(PLAN).result
    assert result.bandwidth_fraction(decode_speed(4.0, batch=2), 200) is None
    assert result.bandwidth_fraction(decode_speed(4.0), None) is None
    unmeasured = replace(result, bandwidth_before=None, bandwidth_after=None)
    assert unmeasured.bandwidth_fraction(decode_speed(4.0), 200) is None


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


def released_20b() -> ModelConfig:
    shape = PRESETS["20b"]
    return ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        sliding_window=shape.sliding_window,
        layer_types=alternating(shape.num_layers),
        rms_norm_eps=1e-5,
        rope_theta=shape.rope_theta,
        yarn=None,
        max_positions=131072,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        eos_token_ids=(),
        pad_token_id=None,
        bos_token_id=None,
    )


def test_bytes_a_token_of_20b_by_hand() -> None:
    """H 2880, I 2880, 64 and 8 heads of 64, 32 experts of which 4, 24 layers, a vocabulary of 201088."""
    counted = token_bytes(released_20b(), Layout.HF_MXFP4)
    blocks_and_scales = 17 * 2880 // 32
    expert = 5760 * blocks_and_scales + 5760 * 2 + 2880 * blocks_and_scales + 2880 * 2
    assert counted.experts == 24 * 4 * expert
    assert counted.router == 24 * 2 * (32 * 2880 + 32)
    assert counted.attention == 24 * 2 * (2880 * (4096 + 512 + 512) + 5120 + 4096 * 2880 + 2880 + 64)
    assert counted.norms == 2 * 2880 * (2 * 24 + 1)
    assert counted.lm_head == 2 * 2880 * 201088
    assert counted.embedding == 2 * 2880
    assert counted.total == pytest.approx(3.70e9, rel=0.005)


@pytest.mark.parametrize("layout", Layout)
def test_a_token_that_visits_every_expert_and_embedding_row_reads_the_checkpoint(layout: Layout) -> None:
    config = replace(released_20b(), top_k=32)
    counted = token_bytes(config, layout)
    everything = sum(tensor.nbytes for tensor in stored_tensors(config, layout))
    assert counted.total + counted.embedding * (config.vocab_size - 1) == everything


def test_one_layout_reads_like_the_other_and_bf16_experts_read_more() -> None:
    config = released_20b()
    assert token_bytes(config, Layout.ORIGINAL) == token_bytes(config, Layout.HF_MXFP4)
    bf16, mxfp4 = token_bytes(config, Layout.HF_BF16), token_bytes(config, Layout.HF_MXFP4)
    assert replace(bf16, experts=mxfp4.experts) == mxfp4
    assert bf16.experts == 24 * 4 * 2 * (3 * 2880 * 2880 + 3 * 2880)


@pytest.mark.parametrize("layout", Layout)
def test_int8_changes_the_five_matrices_of_its_layers_alone(layout: Layout) -> None:
    config = released_20b()
    stored, narrow = token_bytes(config, layout), token_bytes(config, layout, int8_from=8)
    matrices = 16 * 2880 * (4096 + 512 + 512 + 4096)
    assert stored.attention - narrow.attention == round(matrices * (2 - 1.0625))
    assert narrow.lm_head == round(2880 * 201088 * 1.0625)
    assert replace(narrow, attention=stored.attention, lm_head=stored.lm_head) == stored


def test_the_small_checkpoint_is_counted_too(tiny: Checkpoint) -> None:
    assert 0 < token_bytes(tiny.config, tiny.layout).total < sum(t.nbytes for t in tiny.tensors.values())


def zone(root: Path, path: str, name: str, microjoules: object, wrap: int = 1000) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")


def test_energy_sums_packages_and_memory_and_survives_a_wrap(tmp_path: Path) -> None:
    zones = [("intel-rapl:0", "package-0", 900), ("intel-rapl:0:0", "core", 5), ("intel-rapl:0:1", "dram", 10)]
    zones += [("intel-rapl:1", "package-1", 0), ("intel-rapl:2", "psys", 7), ("intel-rapl-mmio:0", "package-0", 900)]
    for path, name, value in zones:
        zone(tmp_path, path, name, value)
    counter = EnergyCounter(tmp_path)
    assert counter.source == "RAPL: package-0, dram, package-1"
    assert counter.joules() == 0.0
    for path, name, _ in zones:
        zone(tmp_path, path, name, {"package-0": 100, "dram": 30, "package-1": 1}.get(name, 999))
    assert counter.joules() == pytest.approx((200 + 20 + 1) / 1e6)
    zone(tmp_path, "intel-rapl:1", "package-1", 4)
    assert counter.joules() == pytest.approx((200 + 20 + 4) / 1e6)


def test_energy_is_none_without_counters_and_where_one_cannot_be_read(tmp_path: Path) -> None:
    assert EnergyCounter(tmp_path / "absent").joules() is None
    zone(tmp_path / "memory-only", "intel-rapl:0:1", "dram", 5)
    assert EnergyCounter(tmp_path / "memory-only").source is None
    zone(tmp_path / "root", "intel-rapl:0", "package-0", 1)
    zone(tmp_path / "root", "intel-rapl:1", "package-1", 1)
    counter = EnergyCounter(tmp_path / "root")
    assert counter.joules() == 0.0
    (tmp_path / "root" / "intel-rapl:1" / "energy_uj").unlink()
    assert counter.joules() is None
    assert EnergyCounter(tmp_path / "root").source is None
    zone(tmp_path / "root", "intel-rapl:1", "package-1", 9)
    assert counter.joules() is None, "what was missed in between is not known"


def test_memory_comes_from_the_status_of_the_process(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t    900 kB\nVmRSS:\t    1000 kB\nRssAnon:\t     300 kB\nThreads:\t2\n")
    assert process_memory(status) == Memory(1000 * 1024, 300 * 1024, 1000 * 1024)
    status.write_text("Name:\tx\n")
    assert process_memory(status) is None
    assert process_memory(tmp_path / "absent") is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux reports it")
def test_memory_that_this_process_touches_is_counted() -> None:
    before = process_memory()
    held = np.full(64 << 20, 1, np.uint8)
    after = process_memory()
    assert before is not None
    assert after is not None
    assert after.anonymous - before.anonymous > 0.9 * held.nbytes
    assert after.peak_resident >= after.resident >= after.anonymous


def test_the_host_s_clocks_only_go_forward_and_count_this_process() -> None:
    meter = HostMeter()
    before = meter.read()
    assert sum(range(200_000)) > 0
    after = meter.read()
    assert after.wall > before.wall
    assert after.cpu > before.cpu
    assert (after.joules is None) == (meter.energy_source is None)
    machine = describe_machine()
    assert 1 <= usable_cores() == machine.usable_cores <= machine.cores
    assert machine.cpu
    assert machine.platform


def test_slices_outgrow_the_cache_and_leave_memory_alone(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "36608K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  99999999 kB\nMemAvailable:   16777216 kB\n")
    assert slice_bytes(2, tmp_path, meminfo) == 8 * 36608 * 1024 // 2
    assert slice_bytes(32, tmp_path, meminfo) == 64 << 20
    meminfo.write_text("MemAvailable:   262144 kB\n")
    assert slice_bytes(2, tmp_path, meminfo) == (64 << 20) // 2
    assert slice_bytes(2, tmp_path / "absent", tmp_path / "absent") == 64 << 20


def test_reading_memory_counts_all_threads() -> None:
    found = read_memory(2, 1 << 20, seconds=0.0)
    assert (found.threads, found.array_bytes, found.passes) == (2, 2 << 20, 5)
    speed = found.bytes_per_second
    assert 0 < speed.min <= speed.median <= speed.max
    assert found.cores_used >= 0


def test_bandwidth_is_measured_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_module, "_SECONDS", 0.0)
    monkeypatch.setattr(bandwidth_module, "slice_bytes", lambda threads: 1 << 20)
    found = measure_read_bandwidth(3)
    assert found is not None
    assert (found.threads, found.array_bytes, found.passes) == (3, 3 << 20, 5)
    assert found.bytes_per_second.median > 0


@pytest.mark.parametrize("python", ["", "/nonexistent/python", "/bin/false", "/bin/echo"])
def test_bandwidth_is_none_where_no_process_answers(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    assert measure_read_bandwidth(1) is None


def test_sizes_are_positive_integers_between_commas() -> None:
    assert Sizes(1).convert("32,128,32,7", None, None) == (32, 128, 7)
    assert Sizes(0).convert("0", None, None) == (0,)
    for text in ("", ",", "1,", "1,,2", "-1", "1.5", "1 2", "x", "1_0", "٣", "9" * 5000, "0", "2147483648"):
        with pytest.raises(click.BadParameter):
            Sizes(1).convert(text, None, None)
