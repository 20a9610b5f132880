"""Release against release: worse is found, noise is not, and what cannot be compared is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gptoss_export.exporter.errors import NotComparableError
from gptoss_export.validators.diff import Change, compare
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.figures import figures_of
from gptoss_export.validators.report import to_json
from gptoss_export.validators.report.again import judged_again
from gptoss_export.validators.report.schema import Binding, ParityReport, ProbeRecord


def with_evidence(report: ParityReport, **changes: Any) -> ParityReport:
    return judged_again(replace(report, evidence=replace(report.evidence, **changes)), {})


def with_metrics(report: ParityReport, name: str = "decode", **changes: Any) -> ParityReport:
    scenarios = [
        replace(s, metrics=replace(s.metrics, **changes)) if s.name == name else s for s in report.evidence.scenarios
    ]
    return with_evidence(report, scenarios=tuple(scenarios))


def with_first(report: ParityReport, field: str, **changes: Any) -> ParityReport:
    first, *others = getattr(report.evidence, field)
    return with_evidence(report, **{field: (replace(first, **changes), *others)})


def only(changes: list[Change]) -> Change:
    assert len(changes) == 1
    return changes[0]


def test_a_report_is_as_good_as_itself(samples: Any) -> None:
    for report in (samples.passing, samples.failing, samples.not_finite, samples.not_measured, samples.largest):
        found = compare(report, report)
        assert not found.regressed
        assert {change.kind for change in found.changes} <= {"same"}
        assert (found.regressions, found.improvements) == ((), ())


def test_every_figure_of_the_report_is_compared(samples: Any) -> None:
    names = {name for _, name in figures_of(samples.passing)}
    m = set(json.loads(to_json(samples.passing))["evidence"]["scenarios"][0]["metrics"])
    left_out = {"positions", "agreements", "ties", "disagreements", "text_positions", "kl_histogram"}
    left_out |= {"perplexity_reference", "perplexity_candidate", "perplexity_ratio_se"}
    assert m - left_out <= names
    assert names - m == {
        "top1_agreement",
        "diverged_share",
        "same_set",
        "diverged",
        "attention",
        "cached",
        "experts",
        "router",
        "headroom_bits",
        "saturated",
        "subnormal",
        "ulps_max",
        "bitwise",
        "embedding",
        "norm",
        "lm_head",
    }


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        (lambda r: with_metrics(r, kl_mean=3e-12), "kl_mean"),
        (lambda r: with_metrics(r, kl_p999=3e-12), "kl_p999"),
        (lambda r: with_metrics(r, logit_diff_max=3e-5), "logit_diff_max"),
        (lambda r: with_metrics(r, agreements=66, disagreements=2), "top1_agreement"),
        (lambda r: with_metrics(r, top10_overlap=0.99), "top10_overlap"),
        (lambda r: with_metrics(r, cosine_min=0.999), "cosine_min"),
        (lambda r: with_metrics(r, rank_max=4.0), "rank_max"),
        (lambda r: with_metrics(r, perplexity_ratio=0.99), "perplexity_ratio"),
        (lambda r: with_metrics(r, perplexity_ratio=1.01), "perplexity_ratio"),
        (lambda r: with_metrics(r, text_prob_diff_mean=-1e-3), "text_prob_diff_mean"),
        (lambda r: with_metrics(r, non_finite=1), "non_finite"),
        (lambda r: with_first(r, "layers", attention=5e-6), "attention"),
        (lambda r: with_first(r, "layers", router=5e-4), "router"),
        (lambda r: with_first(r, "ranges", headroom_bits=3.0), "headroom_bits"),
        (lambda r: with_first(r, "ranges", subnormal=5000), "subnormal"),
        (lambda r: with_first(r, "consistency", ulps_max=900), "ulps_max"),
    ],
)
def test_a_figure_that_got_worse_is_a_regression(
    worse: Callable[[ParityReport], ParityReport], name: str, samples: Any
) -> None:
    found = compare(samples.passing, worse(samples.passing))
    assert found.regressed
    assert only(found.of_kind("regression")).name == name
    back = compare(worse(samples.passing), samples.passing)
    assert not back.regressed
    assert only(back.of_kind("improvement")).name == name


@pytest.mark.parametrize(
    "as_good",
    [
        lambda r: with_metrics(r, kl_mean=5e-13),
        lambda r: with_metrics(r, logit_diff_max=9e-6),
        lambda r: with_metrics(r, agreements=67, ties=2),
        lambda r: with_metrics(r, cosine_mean=1.0000001),
        lambda r: with_first(r, "layers", attention=9e-7),
        lambda r: with_first(r, "ranges", headroom_bits=100.0),
    ],
)
def test_noise_is_none(as_good: Callable[[ParityReport], ParityReport], samples: Any) -> None:
    changed = as_good(samples.passing)
    found = compare(replace(samples.passing, verdict=changed.verdict), changed)
    assert found.of_kind("regression") == []


def test_a_headroom_that_no_float_can_hold_is_a_regression(samples: Any) -> None:
    found = compare(samples.passing, with_first(samples.passing, "ranges", headroom_bits=-5000.0))
    assert only(found.of_kind("regression")).name == "headroom_bits"


def test_the_tolerance_is_a_factor(samples: Any) -> None:
    old, new = with_metrics(samples.passing, kl_mean=1e-11), with_metrics(samples.passing, kl_mean=1.9e-11)
    change = only(compare(old, new).of_kind("regression"))
    assert (change.where, change.old, change.new) == ("decode", 1e-11, 1.9e-11)
    assert change.ratio == pytest.approx(1.9)
    assert not compare(old, new, tolerance=2.0).regressed
    assert not compare(new, old).regressed


def test_a_gate_that_is_not_kept_any_more(samples: Any) -> None:
    found = compare(samples.passing, samples.failing)
    assert found.regressions[0] == "the verdict was pass, and is fail"
    assert "a gate that was kept is not any more: max_logit_diff in decode (5, limit 4)" in found.regressions
    back = compare(samples.failing, samples.passing)
    assert not back.regressed
    assert back.improvements[0] == "the verdict was fail, and is pass"
    assert len(back.improvements) == 4


def test_an_engine_that_is_not_run_any_more(samples: Any) -> None:
    found = compare(samples.executed_in_16_bits, samples.not_executed)
    assert found.regressions == (
        "the verdict was pass, and is not executed",
        "the engine was executed before, and only its graph was now",
    )
    assert not compare(samples.not_executed, samples.executed_in_16_bits).regressed


@pytest.mark.parametrize(
    ("less", "where"),
    [
        (lambda e: {"routing": None}, "routing"),
        (lambda e: {"layers": e.layers[:1]}, "layer 1"),
        (lambda e: {"ranges": e.ranges[:-1]}, "range of layer 1"),
        (lambda e: {"consistency": e.consistency[1:]}, "engine against itself: decode at 16"),
        (lambda e: {"scenarios": e.scenarios[1:]}, "prefill"),
        (lambda e: {"layers": tuple(replace(record, cached=None) for record in e.layers)}, "layer 0"),
    ],
)
def test_what_is_not_measured_any_more_is_lost(
    less: Callable[[Evidence], dict[str, Any]], where: str, samples: Any
) -> None:
    fewer = with_evidence(samples.passing, **less(samples.passing.evidence))
    found = compare(samples.passing, fewer)
    assert found.regressed
    lost = found.of_kind("lost")
    assert lost
    assert any(change.where.startswith(where) for change in lost)
    back = compare(fewer, samples.passing)
    assert not back.of_kind("lost", "regression")
    assert back.of_kind("new")


def test_fewer_positions_and_fewer_experts_are_less(samples: Any) -> None:
    report = samples.passing
    shorter = with_metrics(report, positions=60, agreements=59)
    assert compare(report, shorter).regressions == ("'decode' is over 60 positions, and was over 69",)
    routing = report.evidence.routing
    rows = [replace(row, visits=(69, 69, 0, 0)) for row in routing.layers]
    fewer = with_evidence(report, routing=replace(routing, layers=tuple(rows)))
    assert compare(report, fewer).regressions == ("4 experts x layers are untested, and 2 were",)
    assert compare(fewer, report).regressions == ()


def test_checks_of_one_name_and_length_are_told_apart(samples: Any) -> None:
    check = samples.passing.evidence.consistency[2]
    both = with_evidence(samples.passing, consistency=(*samples.passing.evidence.consistency, check))
    worse = replace(check, logit_diff_max=9e-5)
    changed = with_evidence(samples.passing, consistency=(*samples.passing.evidence.consistency, worse))
    assert only(compare(both, changed).of_kind("regression")).where == "engine against itself: padded at 16 (2)"


def test_loosened_gates_are_a_regression(samples: Any) -> None:
    looser = judged_again(samples.passing, {"max_kl_mean": 1e-3})
    found = compare(samples.passing, looser)
    assert found.regressions == ("the gate max_kl_mean was loosened: 0.001, and was 1e-09",)
    assert not compare(looser, samples.passing).regressed


def test_gates_that_follow_from_a_floor_may_move_with_it(samples: Any) -> None:
    old = samples.executed_in_16_bits
    floor = old.floors[0]

    def moved(factor: float) -> ParityReport:
        m = replace(floor.metrics, kl_mean=floor.metrics.kl_mean * factor)
        floors = (replace(floor, metrics=m),)
        gates = old.policy.resolve(floors[0])
        return judged_again(replace(old, floors=floors, table_gates=gates), {})

    assert not compare(old, moved(1.2)).regressed
    assert compare(old, moved(2.0)).regressions == (
        f"the gate max_kl_mean was loosened: {6 * floor.metrics.kl_mean:.3g}, and was {3 * floor.metrics.kl_mean:.3g}",
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"probes": (ProbeRecord("plain-1", 1, "9" * 64),)},
            r"other probes: 3 probes of 69 tokens \(quick\), and 1 of",
        ),
        ({"binding": Binding({"model.safetensors": "0" * 64}, {})}, "two checkpoints: 1 of the files"),
        (
            {"binding": Binding({"\ud800\n": "0" * 64}, {})},
            r"two checkpoints: 2 of the files are not alike, first 'model",
        ),
        ({"target": "onnx"}, "two targets, 'ort-cpu' and 'onnx'"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], reason: str, samples: Any) -> None:
    with pytest.raises(NotComparableError, match=reason) as error:
        compare(samples.passing, replace(samples.passing, **change))
    assert error.value.next_step
    assert error.value.what.isascii()


def test_two_targets_on_demand(samples: Any) -> None:
    other = replace(samples.passing, target="onnx")
    assert not compare(samples.passing, other, allow_other_target=True).regressed
    looser = judged_again(other, {"max_kl_mean": 1.0})
    assert not compare(samples.passing, looser, allow_other_target=True).regressed
    worse = with_metrics(other, kl_mean=1e-11)
    assert compare(samples.passing, worse, allow_other_target=True).regressed
