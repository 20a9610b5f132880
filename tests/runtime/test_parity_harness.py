"""The parity harness with transformers as the engine: the model passes, every small fault fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from gptoss_export.engines.runner import Step
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import NotValidatedError, SessionError
from gptoss_export.exporter.planning.request import Effort
from gptoss_export.validators.floor import FloorDtype, FloorRecord
from gptoss_export.validators.gates import GATES
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.parity import Subject, Yardstick, validate
from gptoss_export.validators.probes import default_probes
from gptoss_export.validators.reference import Reference, run_reference
from gptoss_export.validators.report.schema import Binding, Engine
from gptoss_export.validators.scenario_run import ScenarioRun, run_scenarios
from gptoss_export.validators.scenarios import SCENARIOS
from gptoss_export.validators.verdict import Case


@dataclass
class RowCaches:
    """One cache a row, which holds no padding."""

    rows: list[DynamicCache]
    length: int


class TransformersRunner:
    """Answers the engines' protocol with transformers, row by row: padding never reaches the model."""

    def __init__(self, model: GptOssForCausalLM) -> None:
        self.model = model
        self.vocab_size = int(model.config.vocab_size)

    def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
        batch, width = input_ids.shape
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = cache or RowCaches([DynamicCache(config=self.model.config) for _ in range(batch)], 0)
        logits = np.full((batch, width, self.vocab_size), np.nan, np.float32)
        for row in range(batch):
            seen = mask[row] == 1
            with torch.inference_mode():
                out = self.model(
                    torch.from_numpy(input_ids[row][seen][None]),
                    past_key_values=cache.rows[row],
                    use_cache=True,
                )
            logits[row, seen] = out.logits[0].float().numpy()
        return Step(logits[:, -keep:] if keep else logits, RowCaches(cache.rows, cache.length + width))


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path) -> Checkpoint:
    return open_checkpoint(tiny_dir)


@pytest.fixture(scope="module")
def reference(run_of: Callable[[Effort], Reference]) -> Reference:
    return run_of("quick")


@pytest.fixture(scope="module")
def floor(floor_of: Callable[[FloorDtype], FloorRecord]) -> FloorRecord:
    return floor_of("bfloat16")


@pytest.fixture
def model(load_plain: Callable[[torch.dtype], GptOssForCausalLM]) -> GptOssForCausalLM:
    """A model of its own for every test, because the tests spoil it."""
    return load_plain(torch.float32)


def run(runner: object, reference: Reference, effort: str = "quick") -> ScenarioRun:
    return run_scenarios(runner, reference, effort=effort)


Failures = Callable[..., list[Case]]


@pytest.fixture
def failures(failing_texts: Callable[..., list[Case]], reference: Reference) -> Failures:
    """The gates of `onnx` that a run did not keep; with a floor in bfloat16 those of `trt-bf16`, nothing settled."""

    def failing(found: ScenarioRun, floor: FloorRecord | None = None, reference: Reference = reference) -> list[Case]:
        gates = GATES["onnx" if floor is None else "trt-bf16"].resolve(floor)
        return failing_texts(found, reference, gates, 0.0 if floor is None else None)

    return failing


def failing(cases: Sequence[Case]) -> set[str]:
    """The scenarios among the places."""
    return {case.where.removeprefix("settled positions of ") for case in cases} - {"texts"}


def metrics(found: ScenarioRun) -> dict[str, Metrics]:
    return {name: accumulator.metrics() for name, accumulator in found.accumulators.items()}


def test_the_model_itself_passes_every_scenario(
    model: GptOssForCausalLM, reference: Reference, failures: Failures
) -> None:
    found = run(TransformersRunner(model), reference)
    assert not failures(found)
    assert list(metrics(found)) == list(SCENARIOS)
    for name, m in metrics(found).items():
        assert m.positions > 0
        assert m.logit_diff_max < 5e-5
        assert m.kl_mean < 1e-11
        if name != "last-only":  # whose positions are where texts end
            assert m.perplexity_ratio == pytest.approx(1.0, abs=1e-6)


def test_the_model_itself_passes_at_full_effort(
    model: GptOssForCausalLM, run_of: Callable[[Effort], Reference], failures: Failures
) -> None:
    full = run_of("full")
    assert not failures(run(TransformersRunner(model), full, "full"), reference=full)
    assert sum(len(probe.ids) for probe in full.probes) > 400


def test_logits_in_small_pieces_measure_the_same(
    model: GptOssForCausalLM, reference: Reference, failures: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary of 201088 only some hundred rows of logits may be alive; here as few as nine."""
    kept = []

    class Counting(TransformersRunner):
        def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
            step = super().forward(input_ids, attention_mask, cache, keep)
            kept.append(step.logits.shape[0] * step.logits.shape[1])
            return step

    monkeypatch.setattr("gptoss_export.validators.scenario_run.LIVE_BYTES", 9 * 4 * reference.vocab_size)
    found = run(Counting(model), reference)
    assert not failures(found)
    assert max(kept) <= 9
    assert metrics(found)["prefill"].positions == sum(len(p.ids) for p in reference.probes)


def set_alpha(model: GptOssForCausalLM) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.alpha = 1.703125


def set_limit(model: GptOssForCausalLM) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.limit = 6.5


def widen_window(model: GptOssForCausalLM) -> None:
    model.config.sliding_window += 1


def narrow_window(model: GptOssForCausalLM) -> None:
    model.config.sliding_window -= 1


def scale_sinks(model: GptOssForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.sinks.data *= 1.01


def truncate_yarn(model: GptOssForCausalLM) -> None:
    model.config.rope_parameters["truncate"] = True
    model.model.rotary_emb = GptOssRotaryEmbedding(model.config)


def swap_gate_and_up(model: GptOssForCausalLM) -> None:
    for layer in model.model.layers:
        w = layer.mlp.experts.gate_up_proj
        w.data = w.data.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def swap_nibbles(model: GptOssForCausalLM) -> None:
    for layer in model.model.layers:
        w = layer.mlp.experts.down_proj
        w.data = w.data.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def drop_a_bias(model: GptOssForCausalLM) -> None:
    model.model.layers[2].self_attn.v_proj.bias.data.zero_()


def one_scale_off(model: GptOssForCausalLM) -> None:
    """In every expert of one layer, one scale byte of 36 too high by one: 32 weights doubled."""
    model.model.layers[1].mlp.experts.down_proj.data[:, :32, 7] *= 2


def one_layer_in_bf16(model: GptOssForCausalLM) -> None:
    layer = model.model.layers[3].mlp.router
    layer.register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16).to(torch.float32),))


@pytest.mark.parametrize(
    "fault",
    [
        set_alpha,
        set_limit,
        widen_window,
        narrow_window,
        scale_sinks,
        truncate_yarn,
        swap_gate_and_up,
        swap_nibbles,
        drop_a_bias,
        one_scale_off,
        one_layer_in_bf16,
    ],
)
def test_a_model_that_is_slightly_another_fails(
    model: GptOssForCausalLM,
    reference: Reference,
    failures: Failures,
    fault: Callable[[GptOssForCausalLM], None],
) -> None:
    fault(model)
    # Wrong in the weights or the mathematics: wrong however it is asked.
    found = run(TransformersRunner(model), reference)
    assert {"prefill", "decode", "chunked", "padded-left", "padded-right"} <= failing(failures(found))


def test_transformers_in_bf16_keeps_the_gates_of_its_own_noise_floor_and_no_others(
    load_plain: Callable[[torch.dtype], GptOssForCausalLM], reference: Reference, floor: FloorRecord, failures: Failures
) -> None:
    found = run(TransformersRunner(load_plain(torch.bfloat16)), reference)
    assert not failures(found, floor)
    assert failing(failures(found)) == set(SCENARIOS)


def test_a_wrong_window_fails_by_the_noise_floor_too(
    load_plain: Callable[[torch.dtype], GptOssForCausalLM], reference: Reference, floor: FloorRecord, failures: Failures
) -> None:
    model = load_plain(torch.bfloat16)
    widen_window(model)
    assert failures(run(TransformersRunner(model), reference), floor)


class NeverRun:
    vocab_size = 2048

    def forward(self, *_):
        pytest.fail("without a noise floor nothing is worth running")


def test_without_a_noise_floor_of_these_probes_nothing_is_run(
    checkpoint: Checkpoint, reference: Reference, floor: FloorRecord
) -> None:
    subject = Subject("trt", NeverRun(), NeverRun(), checkpoint, Engine("", "", ""), Binding({}, {}))

    def judge(gates: str, floors: dict[str, FloorRecord]) -> None:
        validate(subject, Yardstick(reference, "quick", floors), policy=GATES[gates])

    with pytest.raises(NotValidatedError, match="no noise floor"):
        judge("trt-bf16", {})
    with pytest.raises(NotValidatedError, match="no noise floor"):
        judge("trt-fp16", {"bfloat16": floor})
    one_less = replace(floor.metrics, positions=68, agreements=floor.metrics.agreements - 1)
    with pytest.raises(NotValidatedError, match="over 68 positions, the probes are 69 tokens"):
        judge("trt-bf16", {"bfloat16": replace(floor, metrics=one_less, texts=replace(floor.texts, positions=68))})


class StalePosition(TransformersRunner):
    """Decoding repeats the last position instead of going on."""

    def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
        if cache is not None and input_ids.shape == (1, 1):
            past = cache.rows[0].get_seq_length()
            with torch.inference_mode():
                out = self.model(
                    torch.from_numpy(input_ids),
                    past_key_values=cache.rows[0],
                    position_ids=torch.tensor([[past - 1]]),
                    use_cache=True,
                )
            return Step(out.logits.numpy(), cache)
        return super().forward(input_ids, attention_mask, cache, keep)


class ForgetsOnLongChunks(TransformersRunner):
    """A chunk of several tokens is taken for a new prompt."""

    def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
        fresh = cache is not None and len(input_ids) == 1 and input_ids.shape[1] > 1
        return super().forward(input_ids, attention_mask, None if fresh else cache, keep)


class SeesPadding(TransformersRunner):
    """Ignores the mask on one side."""

    side = "left"

    def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
        if attention_mask is not None:
            padded_left = (attention_mask[:, 0] == 0).any()
            if padded_left == (self.side == "left"):
                attention_mask = None
        return super().forward(input_ids, attention_mask, cache, keep)


class SeesPaddingOnTheRight(SeesPadding):
    side = "right"


class LastButOne(TransformersRunner):
    """Asked for the last position of a single long prompt only, gives the one before."""

    def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
        step = super().forward(input_ids, attention_mask, cache, 0)
        if keep == 1 and cache is None and len(input_ids) == 1 and input_ids.shape[1] > 20:
            return replace(step, logits=step.logits[:, -2:-1])
        return replace(step, logits=step.logits[:, -keep:] if keep else step.logits)


@pytest.mark.parametrize(
    ("runner", "scenarios"),
    [
        (StalePosition, {"decode"}),
        (ForgetsOnLongChunks, {"chunked"}),
        (SeesPadding, {"padded-left"}),
        (SeesPaddingOnTheRight, {"padded-right"}),
        (LastButOne, {"last-only", "decode"}),
    ],
)
def test_an_engine_that_handles_its_cache_wrong_fails_where_it_is_wrong(
    model: GptOssForCausalLM,
    reference: Reference,
    floor: FloorRecord,
    failures: Failures,
    runner: type[TransformersRunner],
    scenarios: set[str],
) -> None:
    found = run(runner(model), reference)
    assert failing(failures(found)) == scenarios
    # And where rounding to bfloat16 may send any token to other experts, which settles no position.
    assert failures(found, floor)


class OneNan(TransformersRunner):
    def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
        step = super().forward(input_ids, attention_mask, cache, keep)
        if input_ids.shape == (1, 1) and cache is not None:
            step.logits[0, 0, 5] = np.nan
        return step


def test_one_nan_fails(model: GptOssForCausalLM, reference: Reference, failures: Failures) -> None:
    found = run(OneNan(model), reference)
    assert metrics(found)["decode"].non_finite > 0
    assert ("decode", "non_finite") in {(case.where, case.gate) for case in failures(found)}


def test_a_wrong_shape_is_an_error_and_no_verdict(model: GptOssForCausalLM, reference: Reference) -> None:
    class TooMany(TransformersRunner):
        def forward(self, input_ids, attention_mask=None, cache=None, keep=1):
            return super().forward(input_ids, attention_mask, cache, 0)

    with pytest.raises(SessionError, match="logits"):
        run(TooMany(model), reference)


def test_another_vocabulary_is_an_error(model: GptOssForCausalLM, reference: Reference) -> None:
    runner = TransformersRunner(model)
    runner.vocab_size += 1
    with pytest.raises(SessionError, match="vocabulary"):
        run(runner, reference)


def test_probes_too_short_for_a_scenario_never_pass(
    model: GptOssForCausalLM, checkpoint: Checkpoint, failures: Failures
) -> None:
    one_token = run_reference(checkpoint, default_probes(checkpoint, "quick")[:1])
    found = run(TransformersRunner(model), one_token)
    assert failing(failures(found, reference=one_token)) == {"decode", "chunked", "padded-left", "padded-right"}
