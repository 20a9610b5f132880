"""The verdict: passes only when everything was measured and keeps every gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gptoss_export.validators.consistency import CHECKS
from gptoss_export.validators.evidence import Evidence, ScenarioResult
from gptoss_export.validators.gates import EXACT, FloorCounts, Gates, override
from gptoss_export.validators.positions import SettledFigures, TextsRecord
from gptoss_export.validators.scenarios import SCENARIOS
from gptoss_export.validators.verdict import Failure, Verdict, cases, judge, judge_top1

EMPTY = Evidence(2, (), None, None, (), None, (), (), "")


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


def with_settled(name: str, **changes: Any) -> Callable[[Evidence], Evidence]:
    """Changes the settled positions of one scenario."""

    def change(evidence: Evidence) -> Evidence:
        scenarios = [
            replace(s, settled=replace(s.settled, **changes)) if s.name == name else s for s in evidence.scenarios
        ]
        return replace(evidence, scenarios=tuple(scenarios))

    return change


def with_texts(**changes: Any) -> Callable[[Evidence], Evidence]:
    def change(evidence: Evidence) -> Evidence:
        assert evidence.texts is not None
        return replace(evidence, texts=replace(evidence.texts, **changes))

    return change


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
    assert judge(with_metrics(evidence, kl_median_low=1e-9), EXACT).passed
    assert judge(with_settled("decode", kl_max=1e-8, logit_diff_max=1e-4)(evidence), EXACT).passed
    assert judge(with_replay(kl_mean=1e-9, logit_diff_max=1e-4)(evidence), EXACT).passed
    assert judge(with_texts(kl_mean=1e-2)(evidence), EXACT).passed
    assert judge(with_first("layers", attention=1e-5, router=1e-3)(evidence), EXACT).passed
    assert judge(with_first("ranges", headroom_bits=1.0)(evidence), EXACT).passed


SETTLED = "settled positions of decode"


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"kl_median_low": 1.1e-9}, Failure("decode", "max_kl_median", 1.1e-9, 1e-9)),
        ({"kl_median_low": None}, Failure("decode", "max_kl_median", None, 1e-9)),
        ({"non_finite": 1}, Failure("decode", "non_finite", 1, 0)),
        ({"positions": 0}, Failure("decode", "measured", 0, 1)),
        (with_settled("decode", kl_max=1.1e-8), Failure(SETTLED, "max_kl_position", 1.1e-8, 1e-8)),
        (with_settled("decode", logit_diff_max=2e-4), Failure(SETTLED, "max_logit_diff", 2e-4, 1e-4)),
        (with_settled("decode", kl_max=None), Failure(SETTLED, "max_kl_position", None, 1e-8)),
        (with_texts(kl_mean=2e-2), Failure("texts", "max_text_kl_mean", 2e-2, 1e-2)),
        (with_texts(kl_mean=None), Failure("texts", "max_text_kl_mean", None, 1e-2)),
        (with_texts(positions=0), Failure("texts", "measured", 0, 1)),
        (lambda evidence: replace(evidence, texts=None), Failure("texts", "measured", 0, 1)),
    ],
)
def test_each_gate_of_the_texts_fails_alone(change: Any, failure: Failure, evidence: Evidence) -> None:
    changed = with_metrics(evidence, **change) if isinstance(change, dict) else change(evidence)
    assert judge(changed, EXACT) == Verdict(False, (failure,))


def test_what_is_not_settled_is_judged_by_its_median_and_with_all_texts(evidence: Evidence) -> None:
    exchanged = with_metrics(evidence, kl_mean=0.01, kl_max=0.5, logit_diff_max=3.0, disagreements=1, agreements=67)
    assert judge(exchanged, EXACT).passed
    assert not judge(with_settled("decode", kl_max=0.5)(exchanged), EXACT).passed


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
            with_first("consistency", logit_diff_max=1.0, diffs=(1.0, 1e-6)),
            Failure(f"{AGAINST_ITSELF}: decode at 16", "max_self_diff", 1.0, 1e-4),
        ),
        (
            with_first("consistency", name="repeat", logit_diff_max=1e-9, diffs=(1e-9,)),
            Failure(f"{AGAINST_ITSELF}: repeat at 16", "max_repeat_diff", 1e-9, 0.0),
        ),
        (with_first("consistency", positions=0), Failure(f"{AGAINST_ITSELF}: decode", "measured", 0, 1)),
    ],
)
def test_each_other_gate_fails(change: Callable[[Evidence], Evidence], failure: Failure, evidence: Evidence) -> None:
    assert failure in judge(change(evidence), EXACT).failures


@pytest.mark.parametrize(
    "change",
    [
        lambda evidence: with_metrics(evidence, kl_median_low=math.nan),
        with_settled("decode", kl_max=math.nan),
        with_settled("decode", logit_diff_max=math.nan),
        with_texts(kl_mean=math.nan),
    ],
)
def test_nan_fails(change: Callable[[Evidence], Evidence], evidence: Evidence) -> None:
    assert not judge(change(evidence), EXACT).passed


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
    assert len(failures) == len(SCENARIOS) + 1 + 1 + 2 + 1 + 2 + len(CHECKS)


def test_a_scenario_of_a_later_version_is_held_to_the_same_gates(evidence: Evidence) -> None:
    settled = SettledFigures(0, None, None)
    later = ScenarioResult("long", 1, replace(evidence.scenarios[0].metrics, kl_median_low=1.0), settled)
    failures = judge(replace(evidence, scenarios=(*evidence.scenarios, later)), EXACT).failures
    assert failures == (Failure("long", "max_kl_median", 1.0, 1e-9),)


def test_all_failures_are_named_not_only_the_first(evidence: Evidence) -> None:
    bad = everywhere(evidence, kl_median_low=1.0, non_finite=3)
    for name in SCENARIOS:
        bad = with_settled(name, kl_max=1.0, logit_diff_max=9.0)(bad)
    assert len(judge(bad, EXACT).failures) == 4 * len(SCENARIOS)


BESIDE = FloorCounts(69, (), 276, 0)


def top1_passes(evidence: Evidence, margins: tuple[float, ...], gates: Gates, settled: int = 0) -> bool:
    texts = TextsRecord(69, settled, 1e-4, 1e-3, margins)
    failed = {failure.gate for failure in judge(replace(evidence, texts=texts), gates).failures}
    assert failed <= {"min_top1_agreement"}
    return not failed


def test_best_tokens_are_counted_once_and_judged_by_an_exact_bound(evidence: Evidence) -> None:
    assert top1_passes(evidence, (1.0,) * 4, EXACT)
    assert not top1_passes(evidence, (1.0,) * 5, EXACT)
    assert top1_passes(evidence, (1.0,) * 9, replace(EXACT, beside=BESIDE))
    assert not top1_passes(evidence, (1.0,) * 10, replace(EXACT, beside=BESIDE))
    floor = replace(BESIDE, margins=(2.0, 1.0, 1e-9))
    assert top1_passes(evidence, (1.0,) * 15, replace(EXACT, beside=floor))
    assert not top1_passes(evidence, (1.0,) * 16, replace(EXACT, beside=floor))


def test_what_the_replays_noise_can_turn_is_rounding(evidence: Evidence) -> None:
    noise = 2 * 7.6e-6  # of the replay in this evidence
    assert top1_passes(evidence, (noise,) * 69, EXACT)
    top1 = judge_top1(with_texts(margins=(1.0, noise))(evidence), EXACT)
    assert top1 is not None
    assert (top1.positions, top1.flips, top1.near_ties, top1.diverged) == (69, 2, 1, 1)
    assert top1.noise == pytest.approx(noise) and top1.level == 0.999


def test_a_settled_position_has_the_references_best_token(evidence: Evidence) -> None:
    assert not top1_passes(evidence, (1.0,), EXACT, settled=69)
    assert top1_passes(evidence, (1.0,), EXACT, settled=64)  # a rate of 1 in 100 over the other five
    assert not top1_passes(evidence, (1.0,) * 2, EXACT, settled=66)


def test_an_agreement_set_by_hand_is_a_share_of_all_positions(evidence: Evidence) -> None:
    gates = override(EXACT, {"min_top1_agreement": 1.0})
    assert not top1_passes(evidence, (1e-9,), gates)
    some = override(replace(EXACT, beside=BESIDE), {"min_top1_agreement": 68 / 69})
    assert top1_passes(evidence, (1.0,), some)
    assert not top1_passes(evidence, (1.0,) * 2, some)


def test_divergences_of_routing_are_counted_beside_the_floors(evidence: Evidence) -> None:
    def passes(diverged: int, gates: Gates) -> bool:
        return judge(with_routing(diverged=diverged)(evidence), gates).passed

    assert not passes(1, EXACT)
    assert passes(5, replace(EXACT, max_diverged=0.01)) and not passes(7, replace(EXACT, max_diverged=0.01))
    beside = replace(EXACT, beside=replace(BESIDE, token_layers=138, diverged=1))
    assert passes(12, beside) and not passes(13, beside)
    assert not passes(2, override(beside, {"max_diverged": 1 / 138}))
    assert passes(1, override(beside, {"max_diverged": 1 / 138}))


def against_itself(evidence: Evidence, **diffs: tuple[float, ...]) -> Evidence:
    checks = [
        replace(c, positions=100, diffs=diffs[c.name], logit_diff_max=max(diffs[c.name])) if c.name in diffs else c
        for c in evidence.consistency
    ]
    return replace(evidence, consistency=tuple(checks))


def test_an_engine_in_16_bits_may_exchange_experts_by_another_way_now_and_then(evidence: Evidence) -> None:
    rounding = replace(EXACT, max_repeat_diff=1e-4, beside=BESIDE)
    few, many = (1.0,) * 5 + (1e-6,), (1.0,) * 6
    for name in CHECKS:
        assert judge(against_itself(evidence, **{name: few}), rounding).passed
        assert not judge(against_itself(evidence, **{name: few}), EXACT).passed
        (failure,) = judge(against_itself(evidence, **{name: many}), rounding).failures
        assert failure.where == f"{AGAINST_ITSELF}: {name} at 16" and failure.measured == 1.0
    by_hand = override(rounding, {"max_self_diff": 1e-4})
    assert not judge(against_itself(evidence, padded=few), by_hand).passed
    exact_repeat = replace(rounding, max_repeat_diff=0.0)
    assert not judge(against_itself(evidence, repeat=(1e-9,)), exact_repeat).passed


def test_all_checks_of_a_name_share_what_is_set_aside(evidence: Evidence) -> None:
    rounding = replace(EXACT, beside=BESIDE)
    one = replace(evidence.consistency[0], positions=2, diffs=(1.0,), logit_diff_max=1.0)
    three = tuple(replace(one, length=n) for n in (15, 16, 17))
    others = evidence.consistency[1:]
    failures = judge(replace(evidence, consistency=(*three, *others)), rounding).failures
    assert len(failures) == 3
    calm = replace(one, diffs=(1e-6,), logit_diff_max=1e-6)
    assert judge(replace(evidence, consistency=(one, calm, calm, *others)), rounding).passed


def test_what_was_measured_can_be_judged_by_other_limits(evidence: Evidence) -> None:
    assert judge(evidence, EXACT).passed
    assert not judge(evidence, replace(EXACT, max_kl_mean=1e-14)).passed


def test_a_median_set_by_hand_is_the_median_itself(evidence: Evidence) -> None:
    off = with_metrics(evidence, kl_median=2e-9, kl_median_low=1e-10)
    assert judge(off, EXACT).passed
    (failure,) = judge(off, override(EXACT, {"max_kl_median": 1e-9})).failures
    assert (failure.where, failure.gate, failure.measured) == ("decode", "max_kl_median", 2e-9)


@pytest.mark.parametrize("gate", ["max_kl_mean", "max_logit_diff"])
def test_a_gate_set_by_hand_is_of_whole_scenarios(gate: str, evidence: Evidence) -> None:
    gates = override(EXACT, {gate: getattr(EXACT, gate)})
    off = with_metrics(evidence, kl_mean=9e-4, kl_max=0.1, logit_diff_max=3.0)
    assert judge(off, EXACT).passed
    assert judge(evidence, gates).passed
    (failure,) = judge(off, gates).failures
    assert (failure.where, failure.gate) == ("decode", gate)
