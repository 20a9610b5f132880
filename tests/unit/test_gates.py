"""The verdict: passes only when every scenario was measured and keeps every gate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.floor import FloorRecord
from gptoss_export.validators.gates import EXACT, GATES, Failure, GatePolicy, Gates, Verdict, judge
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.scenarios import SCENARIOS

GOOD = Metrics(
    positions=10,
    agreements=9,
    ties=1,
    disagreements=0,
    kl_mean=1e-12,
    kl_p99=1e-11,
    kl_max=1e-11,
    logit_diff_mean=1e-6,
    logit_diff_max=1e-5,
    non_finite=0,
)
LIMITS = EXACT

FLOOR = Metrics(
    positions=400,
    agreements=386,
    ties=4,
    disagreements=10,
    kl_mean=1e-4,
    kl_p99=5e-3,
    kl_max=1e-2,
    logit_diff_mean=6e-3,
    logit_diff_max=0.5,
    non_finite=0,
)
FP16 = GATES["trt-fp16"]


def verdict(**changes: object) -> Verdict:
    """All scenarios good but `decode`, which is changed."""
    metrics = dict.fromkeys(SCENARIOS, GOOD)
    return judge({**metrics, "decode": replace(GOOD, **changes)}, LIMITS)


def test_the_gates_of_the_targets() -> None:
    exact = {
        "onnx": Gates(max_kl_mean=1e-9, max_logit_diff=1e-4, min_top1_agreement=1.0),
        "ort-cpu": Gates(max_kl_mean=2e-8, max_logit_diff=2e-3, min_top1_agreement=1.0),
        "ort-cpu-int8": Gates(max_kl_mean=1e-3, max_logit_diff=2.0, min_top1_agreement=0.99),
        "trt-fp32": Gates(max_kl_mean=1e-8, max_logit_diff=1e-3, min_top1_agreement=1.0),
    }
    for target, gates in exact.items():
        assert GATES[target].resolve(None) == gates
        assert gates.spare_positions == 0
    rounded = Gates(max_kl_mean=2e-8, max_logit_diff=2e-3, min_top1_agreement=0.99, spare_positions=1)
    assert GATES["trt-fp16"] == GatePolicy(rounded, "float16", 3.0)
    assert GATES["trt-bf16"] == GatePolicy(rounded, "bfloat16", 3.0)
    assert len(GATES) == 6


def test_gates_follow_from_the_floor() -> None:
    gates = FP16.resolve(FloorRecord("float16", FLOOR))
    assert (gates.max_kl_mean, gates.max_logit_diff) == pytest.approx((3e-4, 1.5), rel=1e-12)
    assert gates.min_top1_agreement == pytest.approx(1 - 3 * 11 / 402, rel=1e-12)
    assert (gates.spare_positions, gates.spare_kl) == (1, pytest.approx(3e-2, rel=1e-12))
    assert gates.kl_limit(27) == pytest.approx(3e-4 + 3e-2 / 27, rel=1e-12)


def test_one_position_of_a_short_scenario_may_be_as_bad_as_the_floors_worst() -> None:
    limits = replace(LIMITS, max_kl_mean=3e-4, spare_positions=1, spare_kl=3e-2)

    def passes(positions: int, kl_sum: float, gates: Gates = limits) -> bool:
        m = replace(GOOD, positions=positions, agreements=positions - 1, kl_mean=kl_sum / positions, kl_max=kl_sum)
        return judge(dict.fromkeys(SCENARIOS, m), gates).passed

    assert passes(27, 2.9e-2)
    assert not passes(27, 2.9e-2, replace(limits, spare_kl=0.0))
    assert not passes(27, 2.9e-2, replace(limits, spare_positions=0))
    assert not passes(27, 2 * 2.9e-2)
    assert not passes(270, 270 * 5e-4)


def test_a_small_floor_leaves_the_absolute_gates() -> None:
    small = replace(FLOOR, agreements=400, ties=0, disagreements=0, kl_mean=0.0, kl_max=0.0, logit_diff_max=0.0)
    assert FP16.resolve(FloorRecord("float16", small)) == FP16.absolute


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"non_finite": 1}, "not finite"),
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
def test_a_floor_that_is_none_is_an_error_and_no_loose_gate(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(NotValidatedError, match=reason) as error:
        FP16.resolve(FloorRecord("float16", replace(FLOOR, **changes)))
    assert error.value.next_step


@pytest.mark.parametrize(
    ("target", "floor", "reason"),
    [
        ("trt-fp16", None, "need one of float16, and none was"),
        ("trt-bf16", None, "need one of bfloat16, and none was"),
        ("trt-bf16", FloorRecord("float16", FLOOR), "need one of bfloat16, and one of float16 was"),
        ("onnx", FloorRecord("float16", FLOOR), "need none, and one of float16 was"),
    ],
)
def test_a_floor_of_another_type_or_none(target: str, floor: FloorRecord | None, reason: str) -> None:
    with pytest.raises(NotValidatedError, match=reason):
        GATES[target].resolve(floor)


@pytest.mark.parametrize("factor", [0.0, -3.0, 0.99, math.nan, math.inf])
def test_a_factor_that_gates_nothing_or_everything(factor: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        GatePolicy(EXACT, "float16", factor)


def test_spare_positions_are_for_scenarios_too_short_for_a_share() -> None:
    limits = replace(LIMITS, min_top1_agreement=0.99, spare_positions=1)

    def passes(positions: int, disagreements: int, gates: Gates) -> bool:
        m = replace(GOOD, positions=positions, ties=0, agreements=positions - disagreements)
        return judge(dict.fromkeys(SCENARIOS, replace(m, disagreements=disagreements)), gates).passed

    assert passes(3, 1, limits)
    assert not passes(3, 2, limits)
    assert passes(200, 2, limits)
    assert not passes(199, 2, limits)
    assert not passes(3, 1, replace(limits, spare_positions=0))
    assert passes(100, 1, replace(limits, spare_positions=0))


def test_good_everywhere_passes() -> None:
    assert verdict() == Verdict(True, ())


def test_limits_themselves_pass() -> None:
    assert verdict(kl_mean=1e-9, logit_diff_max=1e-4).passed


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"kl_mean": 1.1e-9}, Failure("decode", "max_kl_mean", 1.1e-9, 1e-9)),
        ({"logit_diff_max": 2e-4}, Failure("decode", "max_logit_diff", 2e-4, 1e-4)),
        ({"agreements": 8, "disagreements": 1}, Failure("decode", "min_top1_agreement", 0.9, 1.0)),
        ({"non_finite": 1}, Failure("decode", "non_finite", 1, 0)),
        ({"kl_mean": None}, Failure("decode", "max_kl_mean", None, 1e-9)),
        ({"logit_diff_max": None}, Failure("decode", "max_logit_diff", None, 1e-4)),
        ({"positions": 0}, Failure("decode", "positions", 0, 1)),
    ],
)
def test_each_gate_fails_alone(changes: dict[str, object], failure: Failure) -> None:
    assert verdict(**changes) == Verdict(False, (failure,))


@pytest.mark.parametrize("field", ["kl_mean", "logit_diff_max"])
def test_nan_fails(field: str) -> None:
    assert not verdict(**{field: math.nan}).passed


@pytest.mark.parametrize("missing", SCENARIOS)
def test_a_scenario_that_did_not_run_fails(missing: str) -> None:
    metrics = {name: GOOD for name in SCENARIOS if name != missing}
    assert judge(metrics, LIMITS) == Verdict(False, (Failure(missing, "positions", 0, 1),))


def test_nothing_measured_fails_for_every_scenario() -> None:
    assert {f.scenario for f in judge({}, LIMITS).failures} == set(SCENARIOS)


def test_a_scenario_of_a_later_version_is_held_to_the_same_gates() -> None:
    metrics = {**dict.fromkeys(SCENARIOS, GOOD), "long": replace(GOOD, kl_mean=1.0)}
    assert judge(metrics, LIMITS).failures == (Failure("long", "max_kl_mean", 1.0, 1e-9),)


def test_all_failures_are_named_not_only_the_first() -> None:
    bad = replace(GOOD, kl_mean=1.0, logit_diff_max=9.0, agreements=0, disagreements=9, non_finite=3)
    failures = judge(dict.fromkeys(SCENARIOS, bad), LIMITS).failures
    assert len(failures) == 4 * len(SCENARIOS)


def test_stored_metrics_can_be_judged_by_other_limits() -> None:
    metrics = dict.fromkeys(SCENARIOS, GOOD)
    assert judge(metrics, LIMITS).passed
    assert not judge(metrics, replace(LIMITS, max_kl_mean=1e-13)).passed
