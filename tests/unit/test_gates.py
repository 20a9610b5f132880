"""The limits: by target, from the noise floor, and by hand."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.floor import FloorRecord
from gptoss_export.validators.gates import (
    EXACT,
    GATE_NAMES,
    GATES,
    POSITION,
    FloorCounts,
    GatePolicy,
    Gates,
    loosened,
    override,
)
from gptoss_export.validators.positions import TextsRecord

FP16 = GATES["trt-fp16"]


@pytest.fixture
def floor(evidence: Evidence) -> FloorRecord:
    figures = replace(
        evidence.scenarios[0].metrics,
        positions=400,
        agreements=386,
        ties=4,
        disagreements=10,
        kl_mean=1e-4,
        kl_median=2e-5,
        kl_max=1e-2,
        logit_diff_mean=6e-3,
        logit_diff_max=0.5,
    )
    texts = TextsRecord(390, 0, 2e-2, 5e-2, (0.3, 0.1))
    return FloorRecord("float16", "A CPU", figures, texts, 4e-5, 0.2, token_layers=1600, diverged=7)


def test_the_gates_of_the_targets() -> None:
    assert set(GATES) == {"onnx", "ort-cpu", "ort-cpu-int8", "trt-fp32", "trt-fp16", "trt-bf16"}
    for target, policy in GATES.items():
        assert policy.floor_dtype == {"trt-fp16": "float16", "trt-bf16": "bfloat16"}.get(target)
        assert policy.factor == 3.0
        assert policy.absolute.beside is None and policy.absolute.by_hand == ()
        if policy.floor_dtype is None:
            assert policy.resolve(None) == policy.absolute
    assert GATES["onnx"].absolute == EXACT
    assert (EXACT.max_kl_mean, EXACT.max_kl_median, EXACT.max_kl_position) == (1e-9, 1e-9, 1e-8)
    int8 = GATES["ort-cpu-int8"].absolute
    assert (int8.max_kl_mean, int8.max_kl_median, int8.max_self_diff) == (1e-3, 5e-3, 1e-3)
    assert (EXACT.max_logit_diff, EXACT.max_diverged) == (1e-4, 0.0)


def test_no_target_passes_what_saturates_or_is_no_model() -> None:
    for policy in GATES.values():
        gates = policy.absolute
        assert gates.min_headroom_bits >= 1.0
        assert gates.min_top1_agreement >= 0.99
        assert gates.max_kl_mean <= 1e-3
        assert gates.max_text_kl_mean <= 1e-2
        assert gates.max_layer_error <= 4e-2
        assert gates.max_diverged <= 0.01


def test_gates_follow_from_the_floor(floor: FloorRecord) -> None:
    gates = FP16.resolve(floor)
    # What is judged where no expert is exchanged follows from the floor's positions of that kind, not from all.
    assert (gates.max_kl_mean, gates.max_logit_diff) == pytest.approx((1.2e-4, 0.6), rel=1e-12)
    assert gates.max_kl_position == pytest.approx(POSITION * 1.2e-4, rel=1e-12)
    assert (gates.max_self_diff, gates.max_repeat_diff) == pytest.approx((0.6, 0.6), rel=1e-12)
    assert gates.max_kl_median == pytest.approx(6e-5, rel=1e-12)
    assert gates.max_text_kl_mean == pytest.approx(6e-2, rel=1e-12)
    assert gates.beside == FloorCounts(390, (0.3, 0.1), 1600, 7)
    for name in ("max_layer_error", "max_router_error", "min_headroom_bits", "min_top1_agreement", "max_diverged"):
        assert getattr(gates, name) == getattr(FP16.absolute, name)


def test_an_engine_that_has_to_repeat_itself_to_the_bit_does_so_whatever_the_floor(floor: FloorRecord) -> None:
    policy = replace(FP16, absolute=replace(FP16.absolute, max_repeat_diff=0.0))
    assert policy.resolve(floor).max_repeat_diff == 0.0


def test_a_small_floor_leaves_the_absolute_gates(floor: FloorRecord) -> None:
    m = replace(floor.metrics, agreements=400, ties=0, disagreements=0, kl_mean=0.0, kl_median=0.0, kl_max=0.0)
    texts = TextsRecord(390, 0, 0.0, 0.0, ())
    none = replace(floor, metrics=m, texts=texts, bulk_kl_mean=0.0, bulk_logit_diff_max=0.0, diverged=0)
    assert replace(FP16.resolve(none), beside=None) == FP16.absolute


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": 0, "agreements": 0, "ties": 0, "disagreements": 0}, "no position"),
        ({"kl_mean": None}, "no position"),
        ({"kl_median": None}, "no position"),
        ({"kl_median": math.inf}, "cannot be"),
        ({"kl_mean": math.nan}, "cannot be"),
        ({"kl_mean": math.inf}, "cannot be"),
        ({"kl_mean": -1e-9}, "cannot be"),
        ({"agreements": 500}, "cannot be"),
        ({"agreements": -9}, "cannot be"),
        ({"kl_mean": 0.5}, "too far"),
        ({"agreements": 120, "disagreements": 276}, "too far"),
    ],
)
def test_a_floor_that_is_none_is_an_error_and_no_loose_gate(
    changes: dict[str, Any], reason: str, floor: FloorRecord
) -> None:
    with pytest.raises(NotValidatedError, match=reason) as error:
        FP16.resolve(replace(floor, metrics=replace(floor.metrics, **changes)))
    assert error.value.next_step


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bulk_kl_mean": None}, "no position"),
        ({"bulk_logit_diff_max": math.nan}, "cannot be"),
        ({"texts": TextsRecord(0, 0, None, None, ())}, "no position"),
        ({"texts": TextsRecord(401, 0, 1e-4, 1e-3, ())}, "cannot be so many"),
        ({"texts": TextsRecord(1, 0, 1e-4, 1e-3, (0.2, 0.1))}, "cannot be so many"),
        ({"token_layers": 399}, "cannot have changed experts"),
        ({"token_layers": 0, "diverged": 0}, "cannot have changed experts"),
        ({"diverged": 1601}, "cannot have changed experts"),
        ({"diverged": -1}, "cannot have changed experts"),
    ],
)
def test_a_floor_whose_parts_cannot_be(changes: dict[str, Any], reason: str, floor: FloorRecord) -> None:
    with pytest.raises(NotValidatedError, match=reason):
        FP16.resolve(replace(floor, **changes))


def test_a_floor_that_leaves_the_types_range_excuses_nothing(floor: FloorRecord) -> None:
    beyond = replace(floor, metrics=replace(floor.metrics, non_finite=1, kl_mean=None))
    assert FP16.resolve(beyond) == FP16.absolute


@pytest.mark.parametrize(
    ("target", "dtype", "reason"),
    [
        ("trt-fp16", None, "need one of float16, and none was"),
        ("trt-bf16", None, "need one of bfloat16, and none was"),
        ("trt-bf16", "float16", "need one of bfloat16, and one of float16 was"),
        ("onnx", "float16", "need none, and one of float16 was"),
    ],
)
def test_a_floor_of_another_type_or_none(target: str, dtype: str | None, reason: str, floor: FloorRecord) -> None:
    with pytest.raises(NotValidatedError, match=reason):
        GATES[target].resolve(floor if dtype is not None else None)


@pytest.mark.parametrize("factor", [0.0, -3.0, 0.99, math.nan, math.inf])
def test_a_factor_that_gates_nothing_or_everything(factor: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        GatePolicy(EXACT, "float16", factor)


def test_every_limit_can_be_set_by_hand() -> None:
    assert {*GATE_NAMES, "beside", "by_hand"} == {field.name for field in fields(Gates)}
    for name in GATE_NAMES:
        changed = override(EXACT, {name: 0.5})
        assert getattr(changed, name) == 0.5
        assert changed.by_hand == (name,)
    assert override(EXACT, {}) == EXACT
    both = override(override(EXACT, {"max_kl_mean": 1.0}), {"max_diverged": 0.1, "max_kl_mean": 2.0})
    assert both.by_hand == ("max_diverged", "max_kl_mean")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"max_kl": 1.0}, "there is no gate 'max_kl'; there are max_kl_mean"),
        ({"beside": 1}, "there is no gate"),
        ({"max_kl_mean": -1e-9}, "no limit"),
        ({"max_kl_mean": math.nan}, "no limit"),
        ({"max_kl_mean": math.inf}, "no limit"),
        ({"min_top1_agreement": 1.01}, "more than all"),
    ],
)
def test_limits_that_are_none(values: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        override(EXACT, values)


def test_what_is_looser_depends_on_the_side() -> None:
    for name in GATE_NAMES:
        looser = 0.25 if name.startswith("min_") else 0.75
        used = replace(EXACT, **{name: looser})
        assert loosened(replace(EXACT, **{name: 0.5}), used) == (name,)
        assert loosened(used, replace(EXACT, **{name: 0.5})) == ()
    assert loosened(EXACT, EXACT) == ()
