"""The verdict: passes only when every scenario was measured and keeps every gate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gptoss_export.validators.gates import GATES, Failure, Gates, Verdict, judge
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
LIMITS = GATES["onnx"]


def verdict(**changes: object) -> Verdict:
    """All scenarios good but `decode`, which is changed."""
    metrics = dict.fromkeys(SCENARIOS, GOOD)
    return judge({**metrics, "decode": replace(GOOD, **changes)}, LIMITS)


def test_the_gates_of_the_targets() -> None:
    assert GATES["onnx"] == Gates(max_kl_mean=1e-9, max_logit_diff=1e-4, min_top1_agreement=1.0)
    assert GATES["ort-cpu"] == Gates(max_kl_mean=2e-8, max_logit_diff=2e-3, min_top1_agreement=1.0)
    assert GATES["ort-cpu-int8"] == Gates(max_kl_mean=1e-3, max_logit_diff=2.0, min_top1_agreement=0.99)


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
