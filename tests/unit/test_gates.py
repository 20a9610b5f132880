"""The limits: by target, from the noise floor, and by hand."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.floor import FloorRecord
from gptoss_export.validators.gates import EXACT, GATE_NAMES, GATES, GatePolicy, Gates, loosened, override

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
        kl_max=1e-2,
        logit_diff_mean=6e-3,
        logit_diff_max=0.5,
    )
    return FloorRecord("float16", figures, token_layers=1600, diverged=7)


def test_the_gates_of_the_targets() -> None:
    assert set(GATES) == {"onnx", "ort-cpu", "ort-cpu-int8", "trt-fp32", "trt-fp16", "trt-bf16"}
    for target, policy in GATES.items():
        assert policy.floor_dtype == {"trt-fp16": "float16", "trt-bf16": "bfloat16"}.get(target)
        assert policy.factor == 3.0
        if policy.floor_dtype is None:
            assert policy.resolve(None) == policy.absolute
        exact = policy.absolute.min_top1_agreement == 1.0
        assert policy.absolute.spare_positions == (0 if exact else 1)
        assert policy.absolute.spare_kl == 0.0
    assert GATES["onnx"].absolute == EXACT
    assert (EXACT.max_kl_mean, EXACT.max_logit_diff, EXACT.min_top1_agreement) == (1e-9, 1e-4, 1.0)


def test_no_target_passes_what_saturates_or_is_no_model() -> None:
    for policy in GATES.values():
        gates = policy.absolute
        assert gates.min_headroom_bits >= 1.0
        assert gates.min_top1_agreement >= 0.99
        assert gates.max_kl_mean <= 1e-3
        assert gates.max_layer_error <= 4e-2
        assert gates.max_diverged <= 0.05


def test_gates_follow_from_the_floor(floor: FloorRecord) -> None:
    gates = FP16.resolve(floor)
    assert (gates.max_kl_mean, gates.max_logit_diff) == pytest.approx((3e-4, 1.5), rel=1e-12)
    assert gates.min_top1_agreement == pytest.approx(1 - 3 * 11 / 402, rel=1e-12)
    assert (gates.spare_positions, gates.spare_kl) == (1, pytest.approx(3e-2, rel=1e-12))
    assert gates.kl_limit(27) == pytest.approx(3e-4 + 3e-2 / 27, rel=1e-12)
    assert (gates.max_self_diff, gates.max_repeat_diff) == pytest.approx((1.5, 1.5), rel=1e-12)
    assert gates.max_diverged == pytest.approx(3 * 8 / 1602, rel=1e-12)
    for name in ("max_layer_error", "max_router_error", "min_headroom_bits"):
        assert getattr(gates, name) == getattr(FP16.absolute, name)


def test_an_engine_that_has_to_repeat_itself_to_the_bit_does_so_whatever_the_floor(floor: FloorRecord) -> None:
    policy = replace(FP16, absolute=replace(FP16.absolute, max_repeat_diff=0.0))
    assert policy.resolve(floor).max_repeat_diff == 0.0


def test_a_small_floor_leaves_the_absolute_gates(floor: FloorRecord) -> None:
    m = replace(floor.metrics, agreements=400, ties=0, disagreements=0, kl_mean=0.0, kl_max=0.0, logit_diff_max=0.0)
    gates = FP16.resolve(replace(floor, metrics=m, diverged=0))
    assert replace(gates, max_diverged=0.0) == FP16.absolute
    assert gates.max_diverged == pytest.approx(3 / 1602)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": 0, "agreements": 0, "ties": 0, "disagreements": 0}, "no position"),
        ({"kl_mean": None}, "no position"),
        ({"kl_max": None}, "no position"),
        ({"kl_max": math.inf}, "cannot be"),
        ({"kl_max": math.nan}, "cannot be"),
        ({"logit_diff_max": None}, "no position"),
        ({"kl_mean": math.nan}, "cannot be"),
        ({"kl_mean": math.inf}, "cannot be"),
        ({"kl_mean": -1e-9}, "cannot be"),
        ({"logit_diff_max": math.nan}, "cannot be"),
        ({"logit_diff_max": math.inf}, "cannot be"),
        ({"agreements": 500}, "cannot be"),
        ({"agreements": -9}, "cannot be"),
        ({"kl_mean": 0.5}, "too far"),
        ({"agreements": 320, "disagreements": 76}, "too far"),
    ],
)
def test_a_floor_that_is_none_is_an_error_and_no_loose_gate(
    changes: dict[str, Any], reason: str, floor: FloorRecord
) -> None:
    with pytest.raises(NotValidatedError, match=reason) as error:
        FP16.resolve(replace(floor, metrics=replace(floor.metrics, **changes)))
    assert error.value.next_step


def test_a_floor_that_leaves_the_types_range_excuses_nothing(floor: FloorRecord) -> None:
    beyond = replace(floor, metrics=replace(floor.metrics, non_finite=1, kl_mean=None))
    assert FP16.resolve(beyond) == FP16.absolute


@pytest.mark.parametrize(
    "routing",
    [
        {"token_layers": 399},
        {"token_layers": 0, "diverged": 0},
        {"diverged": 1601},
        {"diverged": -1},
    ],
)
def test_a_floor_whose_routing_cannot_be(routing: dict[str, int], floor: FloorRecord) -> None:
    with pytest.raises(NotValidatedError, match="cannot have changed experts"):
        FP16.resolve(replace(floor, **routing))


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
    others = {"spare_positions", "spare_kl", "flip_kl_mean", "flip_logit_diff", "flip_top1"}
    assert {*GATE_NAMES, *others} == {field.name for field in fields(Gates)}
    for name in GATE_NAMES:
        assert getattr(override(EXACT, {name: 0.5}), name) == 0.5
    assert override(EXACT, {}) == EXACT


def test_a_limit_set_by_hand_spares_nothing() -> None:
    spared = replace(EXACT, spare_positions=1, spare_kl=0.1)
    assert override(spared, {"max_kl_mean": 1.0}).spare_kl == 0.0
    assert override(spared, {"max_kl_mean": 1.0}).spare_positions == 1
    assert override(spared, {"min_top1_agreement": 0.5}).spare_positions == 0
    assert override(spared, {"max_diverged": 0.5}).spare_kl == 0.1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"max_kl": 1.0}, "there is no gate 'max_kl'; there are max_kl_mean"),
        ({"spare_positions": 1}, "there is no gate"),
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
