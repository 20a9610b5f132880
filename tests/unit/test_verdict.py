"""The verdict: passes only when everything was measured and keeps every gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gptoss_export.validators.consistency import CHECKS
from gptoss_export.validators.evidence import Evidence, ScenarioResult
from gptoss_export.validators.gates import EXACT, GATES, Gates, override
from gptoss_export.validators.scenarios import SCENARIOS
from gptoss_export.validators.verdict import Failure, Verdict, cases, judge

EMPTY = Evidence(2, (), None, (), None, (), (), "")


def with_metrics(evidence: Evidence, names: tuple[str, ...] = ("decode",), **changes: Any) -> Evidence:
    scenarios = [
        replace(s, metrics=replace(s.metrics, **changes)) if s.name in names else s for s in evidence.scenarios
    ]
    return replace(evidence, scenarios=tuple(scenarios))


def everywhere(evidence: Evidence, **changes: Any) -> Evidence:
    return with_metrics(evidence, SCENARIOS, **changes)


def with_first(field: str, **changes: Any) -> Callable[[Evidence], Evidence]:
    """Changes the first record of a field of the evidence."""

    def change(evidence: Evidence) -> Evidence:
        first, *others = getattr(evidence, field)
        return replace(evidence, **{field: (replace(first, **changes), *others)})

    return change


@pytest.fixture
def evidence(evidence: Evidence) -> Evidence:
    """The good one without a flip, after which wider limits would hold."""
    assert evidence.routing is not None
    layers = [
        replace(row, same_order=row.tokens, same_set=row.tokens, ties=0, margin_max=None, mass_mean=None)
        for row in evidence.routing.layers
    ]
    return replace(evidence, routing=replace(evidence.routing, layers=tuple(layers), worst=()))


def with_routing(**changes: Any) -> Callable[[Evidence], Evidence]:
    def change(evidence: Evidence) -> Evidence:
        assert evidence.routing is not None
        layers = (replace(evidence.routing.layers[0], **changes), *evidence.routing.layers[1:])
        return replace(evidence, routing=replace(evidence.routing, layers=layers))

    return change


def with_replay(**changes: Any) -> Callable[[Evidence], Evidence]:
    def change(evidence: Evidence) -> Evidence:
        assert evidence.routing is not None
        replay = replace(evidence.routing.replay, **changes)
        return replace(evidence, routing=replace(evidence.routing, replay=replay))

    return change


def with_ends(**changes: Any) -> Callable[[Evidence], Evidence]:
    def change(evidence: Evidence) -> Evidence:
        assert evidence.ends is not None
        return replace(evidence, ends=replace(evidence.ends, **changes))

    return change


def test_good_everywhere_passes(evidence: Evidence) -> None:
    assert judge(evidence, EXACT) == Verdict(True, ())
    assert all(case.kept for case in cases(evidence, EXACT))


def test_limits_themselves_pass(evidence: Evidence) -> None:
    assert judge(with_metrics(evidence, kl_mean=1e-9, logit_diff_max=1e-4), EXACT).passed
    assert judge(with_first("layers", attention=1e-5, router=1e-3)(evidence), EXACT).passed
    assert judge(with_first("ranges", headroom_bits=1.0)(evidence), EXACT).passed


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"kl_mean": 1.1e-9}, Failure("decode", "max_kl_mean", 1.1e-9, 1e-9)),
        ({"logit_diff_max": 2e-4}, Failure("decode", "max_logit_diff", 2e-4, 1e-4)),
        ({"agreements": 67, "disagreements": 1}, Failure("decode", "min_top1_agreement", 68 / 69, 1.0)),
        ({"non_finite": 1}, Failure("decode", "non_finite", 1, 0)),
        ({"kl_mean": None}, Failure("decode", "max_kl_mean", None, 1e-9)),
        ({"logit_diff_max": None}, Failure("decode", "max_logit_diff", None, 1e-4)),
        ({"positions": 0}, Failure("decode", "measured", 0, 1)),
    ],
)
def test_each_gate_of_a_scenario_fails_alone(changes: dict[str, Any], failure: Failure, evidence: Evidence) -> None:
    assert judge(with_metrics(evidence, **changes), EXACT) == Verdict(False, (failure,))


RANGE = "range of layer 0 in float32"
AGAINST_ITSELF = "engine against itself"


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (with_routing(diverged=1), Failure("routing", "max_diverged", 1 / 138, 0)),
        (with_replay(kl_mean=1.0), Failure("routing replay", "max_kl_mean", 1.0, 1e-9)),
        (with_replay(logit_diff_max=1.0), Failure("routing replay", "max_logit_diff", 1.0, 1e-4)),
        (with_replay(non_finite=1), Failure("routing replay", "non_finite", 1, 0)),
        (with_replay(positions=0), Failure("routing replay", "measured", 0, 1)),
        (with_routing(tokens=0), Failure("routing of layer 0", "measured", 0, 1)),
        (with_first("layers", attention=1e-4), Failure("layer 0 attention", "max_layer_error", 1e-4, 1e-5)),
        (with_first("layers", attention=None), Failure("layer 0 attention", "max_layer_error", None, 1e-5)),
        (with_first("layers", cached=1e-4), Failure("layer 0 attention with cache", "max_layer_error", 1e-4, 1e-5)),
        (with_first("layers", router=1.0), Failure("layer 0 router", "max_router_error", 1.0, 1e-3)),
        (with_first("layers", experts=math.nan), Failure("layer 0 experts", "max_layer_error", math.nan, 1e-5)),
        (with_first("layers", non_finite=2), Failure("layer 0", "non_finite", 2, 0)),
        (with_first("layers", tokens=0), Failure("layer 0", "measured", 0, 1)),
        (with_ends(embedding=1e-4), Failure("embedding", "max_layer_error", 1e-4, 1e-5)),
        (with_ends(norm=None), Failure("final norm", "max_layer_error", None, 1e-5)),
        (with_ends(lm_head=math.nan), Failure("lm_head", "max_layer_error", math.nan, 1e-5)),
        (with_ends(non_finite=1), Failure("ends", "non_finite", 1, 0)),
        (with_ends(tokens=0), Failure("ends", "measured", 0, 1)),
        (with_first("ranges", headroom_bits=0.5), Failure(RANGE, "min_headroom_bits", 0.5, 1.0)),
        (with_first("ranges", headroom_bits=None), Failure(RANGE, "min_headroom_bits", None, 1.0)),
        (with_first("ranges", saturated=1), Failure(RANGE, "saturated", 1, 0)),
        (
            with_first("consistency", logit_diff_max=1.0),
            Failure(f"{AGAINST_ITSELF}: decode at 16", "max_self_diff", 1.0, 1e-4),
        ),
        (
            with_first("consistency", name="repeat", logit_diff_max=1e-9),
            Failure(f"{AGAINST_ITSELF}: repeat at 16", "max_repeat_diff", 1e-9, 0.0),
        ),
        (with_first("consistency", positions=0), Failure(f"{AGAINST_ITSELF}: decode", "measured", 0, 1)),
    ],
)
def test_each_other_gate_fails(change: Callable[[Evidence], Evidence], failure: Failure, evidence: Evidence) -> None:
    assert failure in judge(change(evidence), EXACT).failures


@pytest.mark.parametrize("field", ["kl_mean", "logit_diff_max"])
def test_nan_fails(field: str, evidence: Evidence) -> None:
    assert not judge(with_metrics(evidence, **{field: math.nan}), EXACT).passed


@pytest.mark.parametrize("missing", SCENARIOS)
def test_a_scenario_that_did_not_run_fails(missing: str, evidence: Evidence) -> None:
    others = tuple(s for s in evidence.scenarios if s.name != missing)
    assert judge(replace(evidence, scenarios=others), EXACT) == Verdict(False, (Failure(missing, "measured", 0, 1),))


@pytest.mark.parametrize("missing", CHECKS)
def test_a_check_that_did_not_run_fails(missing: str, evidence: Evidence) -> None:
    others = tuple(check for check in evidence.consistency if check.name != missing)
    failure = Failure(f"{AGAINST_ITSELF}: {missing}", "measured", 0, 1)
    assert judge(replace(evidence, consistency=others), EXACT).failures == (failure,)


def test_a_layer_that_nobody_looked_at_fails(evidence: Evidence) -> None:
    failures = judge(replace(evidence, num_layers=3), EXACT).failures
    assert {failure.where for failure in failures} == {"routing of layer 2", "layer 2", "range of layer 2"}
    assert {failure.gate for failure in failures} == {"measured"}


def test_nothing_measured_fails_everywhere() -> None:
    failures = judge(EMPTY, EXACT).failures
    assert {failure.gate for failure in failures} == {"measured"}
    assert len(failures) == len(SCENARIOS) + 1 + 2 + 1 + 2 + len(CHECKS)


def test_a_scenario_of_a_later_version_is_held_to_the_same_gates(evidence: Evidence) -> None:
    later = ScenarioResult("long", 1, replace(evidence.scenarios[0].metrics, kl_mean=1.0))
    failures = judge(replace(evidence, scenarios=(*evidence.scenarios, later)), EXACT).failures
    assert failures == (Failure("long", "max_kl_mean", 1.0, 1e-9),)


def test_all_failures_are_named_not_only_the_first(evidence: Evidence) -> None:
    bad = everywhere(evidence, kl_mean=1.0, logit_diff_max=9.0, agreements=0, ties=0, disagreements=69, non_finite=3)
    assert len(judge(bad, EXACT).failures) == 4 * len(SCENARIOS)


def test_one_position_of_a_short_scenario_may_be_as_bad_as_the_floors_worst(evidence: Evidence) -> None:
    limits = replace(EXACT, max_kl_mean=3e-4, spare_positions=1, spare_kl=3e-2)

    def passes(positions: int, kl_sum: float, gates: Gates = limits) -> bool:
        changes = {"positions": positions, "agreements": positions - 1, "kl_mean": kl_sum / positions}
        return judge(everywhere(evidence, kl_max=kl_sum, **changes), gates).passed

    assert passes(27, 2.9e-2)
    assert not passes(27, 2.9e-2, replace(limits, spare_kl=0.0))
    assert not passes(27, 2.9e-2, replace(limits, spare_positions=0))
    assert not passes(27, 2 * 2.9e-2)
    assert not passes(270, 270 * 5e-4)


def test_spare_positions_are_for_scenarios_too_short_for_a_share(evidence: Evidence) -> None:
    limits = replace(EXACT, min_top1_agreement=0.99, spare_positions=1)

    def passes(positions: int, disagreements: int, gates: Gates) -> bool:
        changes = {"positions": positions, "ties": 0, "agreements": positions - disagreements}
        return judge(everywhere(evidence, disagreements=disagreements, **changes), gates).passed

    assert passes(3, 1, limits)
    assert not passes(3, 2, limits)
    assert passes(200, 2, limits)
    assert not passes(199, 2, limits)
    assert not passes(3, 1, replace(limits, spare_positions=0))
    assert passes(100, 1, replace(limits, spare_positions=0))


def test_what_was_measured_can_be_judged_by_other_limits(evidence: Evidence) -> None:
    assert judge(evidence, EXACT).passed
    assert not judge(evidence, replace(EXACT, max_kl_mean=1e-14)).passed


def flipped(evidence: Evidence, **changes: int) -> Evidence:
    """A token of layer 0 went to other experts."""
    return with_routing(same_order=68, same_set=68, margin_max=1e-6, mass_mean=0.1, **changes)(evidence)


def test_near_ties_widen_the_limits_of_scenarios_alone(evidence: Evidence) -> None:
    off = with_metrics(evidence, kl_mean=9e-4, logit_diff_max=3.9, agreements=65, disagreements=3)
    assert not judge(off, EXACT).passed
    assert judge(flipped(off, near_ties=1), EXACT).passed
    assert judge(flipped(off, ties=1), EXACT).passed
    replayed = with_replay(kl_mean=1.1e-9)(flipped(evidence, near_ties=1))
    assert {failure.where for failure in judge(replayed, EXACT).failures} == {"routing replay"}
    assert not judge(flipped(with_metrics(evidence, kl_mean=1.1e-3), near_ties=1), EXACT).passed
    assert not judge(flipped(with_metrics(evidence, logit_diff_max=4.1), near_ties=1), EXACT).passed


def test_a_divergence_widens_nothing(evidence: Evidence) -> None:
    off = flipped(with_metrics(evidence, kl_mean=9e-4), diverged=1)
    assert {failure.gate for failure in judge(off, EXACT).failures} == {"max_diverged", "max_kl_mean"}


@pytest.mark.parametrize("gate", ["max_kl_mean", "max_logit_diff", "min_top1_agreement"])
def test_a_gate_set_by_hand_holds_for_flips_too(gate: str, evidence: Evidence) -> None:
    gates = override(EXACT, {gate: getattr(EXACT, gate)})
    off = flipped(with_metrics(evidence, kl_mean=9e-4), near_ties=1)
    assert judge(off, EXACT).passed
    assert not judge(off, gates).passed


def test_a_floor_has_flips_in_it_already() -> None:
    assert GATES["trt-fp16"].absolute.with_flips() == GATES["trt-fp16"].absolute
