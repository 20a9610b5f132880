"""Release against release: worse is found, noise is not, and what cannot be compared is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_export.exporter.errors import NotComparableError
from gptoss_export.validators.diff import ChangeKind, Comparison, compare
from gptoss_export.validators.diff_text import lines
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.figures import JUDGED, figures_of
from gptoss_export.validators.gates import GatePolicy
from gptoss_export.validators.report import to_json
from gptoss_export.validators.report.again import judged_again
from gptoss_export.validators.report.schema import Binding, ParityReport, ProbeRecord
from gptoss_export.validators.verdict import cases


@pytest.fixture(scope="module")
def passing(samples: Any) -> ParityReport:
    """The passing sample with its narrow limits in every scenario, though its tokens are tied for their experts."""
    return judged_again(samples.passing, {"max_logit_diff": 1e-4})


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


def with_routing(report: ParityReport, **changes: Any) -> ParityReport:
    """The routing of layer 0 with other counts."""
    routing = report.evidence.routing
    assert routing is not None
    first, *others = routing.layers
    return with_evidence(report, routing=replace(routing, layers=(replace(first, **changes), *others)))


def only(changes: list[Any]) -> Any:
    assert len(changes) == 1
    return changes[0]


EVERY_SAMPLE = (
    "passing",
    "failing",
    "not_executed",
    "failing_graph",
    "loosened",
    "executed_in_16_bits",
    "not_finite",
    "not_measured",
    "largest",
)


@pytest.mark.parametrize("kind", EVERY_SAMPLE)
def test_a_report_is_as_good_as_itself(kind: str, samples: Any) -> None:
    report = getattr(samples, kind)
    found = compare(report, report)
    assert found.verdict == "the same"
    assert {change.kind for change in found.changes} <= {"same"}
    assert (found.regressions, found.improvements, found.not_kept, found.kept_again) == ((), (), (), ())
    assert len(lines(found, everything=False)) == 2
    assert len(lines(found, everything=True)) == len(found.changes) + 4


def test_every_figure_of_the_report_is_compared(samples: Any) -> None:
    names = {name for _, name in figures_of(samples.passing)}
    assert names == set(JUDGED), "a figure that nothing judges, or a rule for none"
    m = set(json.loads(to_json(samples.passing))["evidence"]["scenarios"][0]["metrics"])
    left_out = {"positions", "agreements", "ties", "disagreements", "text_positions", "kl_histogram"}
    left_out |= {"perplexity_reference", "perplexity_candidate", "perplexity_ratio_se"}
    assert m - left_out - names == {"top5_overlap", "top10_overlap"}, "they are counted: top5_misses, top10_misses"


def test_figures_are_held_to_the_cases_of_the_verdict(samples: Any) -> None:
    for report in (samples.passing, samples.largest, samples.executed_in_16_bits):
        figures = figures_of(report)
        held = {(where, figure.gate) for (where, _), figure in figures.items() if figure.held}
        assert held == {(case.where, case.gate) for case in cases(report.evidence, report.gates)}
        beyond = {
            (where, f.gate) for (where, _), f in figures.items() if f.held and f.share is not None and f.share > 1
        }
        assert beyond <= {(failure.where, failure.gate) for failure in report.verdict.failures}


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        (lambda r: with_metrics(r, kl_mean=3e-11), "kl_mean"),
        (lambda r: with_metrics(r, kl_p999=3e-11), "kl_p999"),
        (lambda r: with_metrics(r, logit_diff_max=6e-5), "logit_diff_max"),
        (lambda r: with_metrics(r, agreements=56, disagreements=12), "top1_disagreements"),
        (lambda r: with_metrics(r, top10_overlap=0.95), "top10_misses"),
        (lambda r: with_metrics(r, cosine_min=0.999), "cosine_min"),
        (lambda r: with_metrics(r, rank_max=40.0), "rank_max"),
        (lambda r: with_metrics(r, perplexity_ratio=0.99), "perplexity_ratio"),
        (lambda r: with_metrics(r, perplexity_ratio=1.01), "perplexity_ratio"),
        (lambda r: with_metrics(r, perplexity_ratio=0.0), "perplexity_ratio"),
        (lambda r: with_metrics(r, text_prob_diff_mean=-1e-3), "text_prob_diff_mean"),
        (lambda r: with_metrics(r, non_finite=1), "non_finite"),
        (lambda r: with_first(r, "layers", attention=5e-6), "layer_error"),
        (lambda r: with_first(r, "layers", router=5e-4), "router_error"),
        (lambda r: with_first(r, "ranges", headroom_bits=3.0), "headroom_bits"),
        (lambda r: with_first(r, "ranges", headroom_bits=-5000.0), "headroom_bits"),
        (lambda r: with_first(r, "ranges", subnormal=5000), "subnormal"),
        (lambda r: with_first(r, "consistency", logit_diff_max=9e-5), "self_diff"),
        (lambda r: with_routing(r, same_set=30, near_ties=39), "flipped"),
    ],
)
def test_a_figure_that_got_worse_is_a_regression(
    worse: Callable[[ParityReport], ParityReport], name: str, passing: ParityReport
) -> None:
    found = compare(passing, worse(passing))
    assert found.verdict == "worse"
    assert only(found.of_kind("regression")).name == name
    back = compare(worse(passing), passing)
    assert back.verdict == "better"
    assert only(back.of_kind("improvement")).name == name


@pytest.mark.parametrize(
    "as_good",
    [
        lambda r: with_metrics(r, kl_mean=1e-12),
        lambda r: with_metrics(r, kl_mean=0.0),
        lambda r: with_metrics(r, logit_diff_max=9e-6),
        lambda r: with_metrics(r, agreements=67, ties=2),
        lambda r: with_metrics(r, top10_overlap=0.99),
        lambda r: with_metrics(r, cosine_mean=1.0000001),
        lambda r: with_metrics(r, rank_max=4.0),
        lambda r: with_metrics(r, perplexity_ratio=1.01, perplexity_ratio_se=0.005),
        lambda r: with_metrics(r, perplexity_ratio=1.01, perplexity_ratio_se=None),
        lambda r: with_metrics(r, perplexity_ratio=1.0000003),
        lambda r: with_first(r, "layers", attention=9e-7),
        lambda r: with_first(r, "ranges", headroom_bits=100.0),
        lambda r: with_first(r, "consistency", ulps_max=90_000),
        lambda r: with_routing(r, same_set=68, near_ties=1),
    ],
)
def test_noise_is_none(as_good: Callable[[ParityReport], ParityReport], passing: ParityReport) -> None:
    for pair in ((passing, as_good(passing)), (as_good(passing), passing)):
        found = compare(*pair)
        assert found.verdict == "the same"
        assert len(lines(found, everything=False)) == 2


@pytest.mark.parametrize(("kl", "gate"), [((1e-13, 5e-6), 1e-3), ((1e-13, 1e-12), 1e-9), ((0.0, 9e-12), 1e-9)])
def test_a_share_of_the_gate_that_decides_nothing_is_noise(
    kl: tuple[float, float], gate: float, passing: ParityReport
) -> None:
    policy = GatePolicy(replace(passing.table_gates, max_kl_median=gate))
    report = judged_again(replace(passing, policy=policy, table_gates=policy.absolute), {})
    old, new = (with_metrics(report, kl_median_low=value) for value in kl)
    assert compare(old, new).verdict == compare(new, old).verdict == "the same"


def test_the_worst_that_can_be_is_no_worse_than_itself(passing: ParityReport) -> None:
    """Cosines that are shown as 1 were 5.69e+07 times as bad as each other."""
    old = with_metrics(passing, cosine_min=1 - 1e-15, cosine_mean=1.0)
    new = with_metrics(passing, cosine_min=1 - 5e-11, cosine_mean=1 - 4e-11)
    assert compare(old, new).verdict == "the same"
    worst = with_metrics(passing, agreements=0, ties=0, disagreements=69, top5_overlap=0.0, kl_max=1e308)
    assert compare(worst, worst).verdict == "the same"


def test_the_tolerance_is_a_factor_and_squared_for_a_maximum(passing: ParityReport) -> None:
    old, new = with_metrics(passing, kl_median_low=2e-10), with_metrics(passing, kl_median_low=3.8e-10)
    change = only(compare(old, new).of_kind("regression"))
    assert (change.where, change.old, change.new, change.gate) == ("decode", 2e-10, 3.8e-10, "max_kl_median")
    assert (change.old_share, change.new_share) == (pytest.approx(0.2), pytest.approx(0.38))
    assert change.times == pytest.approx(1.9)
    assert not compare(old, new, tolerance=2.0).regressed
    assert not compare(new, old).regressed
    old, new = with_metrics(passing, kl_max=2e-10), with_metrics(passing, kl_max=3.8e-10)
    assert not compare(old, new).regressed
    assert compare(old, new, tolerance=1.3).regressed


def test_from_noise_there_is_no_ratio(passing: ParityReport) -> None:
    found = compare(passing, with_metrics(passing, kl_mean=8e-10))
    assert only(found.of_kind("regression")).times is None
    assert any(line.endswith("from noise") for line in lines(found, everything=False))
    assert any(
        line.endswith("into noise")
        for line in lines(compare(with_metrics(passing, kl_mean=8e-10), passing), everything=False)
    )


@pytest.mark.parametrize(
    ("before", "now", "counts"), [(0, 1, False), (0, 9, False), (0, 10, True), (0, 12, True), (12, 24, False)]
)
def test_a_count_is_judged_by_the_exact_test(before: int, now: int, counts: bool, passing: ParityReport) -> None:
    old, new = (with_metrics(passing, agreements=68 - n, disagreements=n) for n in (before, now))
    found = compare(old, new)
    assert bool(found.of_kind("regression")) == counts
    change = next(c for c in found.changes if (c.where, c.name) == ("decode", "top1_disagreements"))
    assert (change.old, change.new, change.old_of, change.new_of) == (before, now, 69, 69)
    k = before + now
    assert change.p == pytest.approx(min(1.0, sum(math.comb(k, i) for i in range(now, k + 1)) / 2**k))


def test_positions_that_a_batch_repeats_are_no_more_evidence(passing: ParityReport) -> None:
    def repeated(disagreements: int) -> ParityReport:
        return with_metrics(passing, positions=207, agreements=207 - disagreements, ties=0, disagreements=disagreements)

    assert not compare(repeated(0), repeated(12)).of_kind("regression", "improvement")
    assert compare(repeated(0), repeated(36)).of_kind("regression")


def test_layers_share_the_level_of_a_count(passing: ParityReport) -> None:
    """0 against 10 is one in 1024: of one count it is beyond the level, of one in two layers it is not."""
    ten, twelve = (with_routing(passing, same_set=69 - n, near_ties=n) for n in (10, 12))
    assert not compare(passing, ten).of_kind("regression")
    assert compare(passing, twelve).of_kind("regression")


def test_a_gate_that_is_not_kept_any_more(samples: Any) -> None:
    found = compare(samples.passing, samples.failing)
    assert found.regressions == ("the verdict was pass, now fail",)
    assert [(f.where, f.gate) for f in found.not_kept] == [
        ("settled positions of decode", "max_logit_diff"),
        ("layer 1 attention", "max_layer_error"),
        ("layer 1 attention with cache", "max_layer_error"),
    ]
    assert lines(found, everything=False)[0] == (
        "WORSE: pass -> fail; max_logit_diff is 5, limit 0.0001 (2 more), settled positions of decode"
    )
    back = compare(samples.failing, samples.passing)
    assert back.verdict == "better"
    assert back.improvements == ("the verdict was fail, now pass",)
    assert back.kept_again == found.not_kept
    assert lines(back, everything=False)[0].startswith("BETTER: fail -> pass; max_logit_diff is kept again, ")


def test_an_engine_that_is_not_run_any_more(samples: Any) -> None:
    found = compare(samples.executed_in_16_bits, samples.not_executed)
    assert found.regressions == (
        "the verdict was pass, now not executed",
        "what was run was the engine, now its graph alone",
    )
    assert found.not_kept == ()
    back = compare(samples.not_executed, samples.executed_in_16_bits)
    assert back.verdict == "better"
    assert back.improvements == (
        "the verdict was not executed, now pass",
        "what was run was its graph alone, now the engine",
    )


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
    assert any("not measured any more: " in line for line in lines(found, everything=False))
    back = compare(fewer, samples.passing)
    assert not back.of_kind("lost", "regression")
    assert {(c.where, c.name) for c in back.of_kind("new")} == {(c.where, c.name) for c in lost}
    assert back.verdict == "better"


def test_fewer_positions_and_fewer_experts_are_less(samples: Any) -> None:
    report = samples.passing
    shorter = with_metrics(report, positions=60, agreements=59)
    assert compare(report, shorter).regressions == ("positions of 'decode' were 69, now 60",)
    routing = report.evidence.routing
    rows = [replace(row, visits=(69, 69, 0, 0)) for row in routing.layers]
    fewer = with_evidence(report, routing=replace(routing, layers=tuple(rows)))
    assert compare(report, fewer).regressions == ("untested experts x layers were 2, now 4",)
    assert compare(fewer, report).regressions == ()
    assert compare(fewer, report).improvements == ("untested experts x layers were 4, now 2",)


def test_checks_of_one_name_and_length_are_told_apart(samples: Any) -> None:
    check = samples.passing.evidence.consistency[2]
    both = with_evidence(samples.passing, consistency=(*samples.passing.evidence.consistency, check))
    worse = replace(check, logit_diff_max=9e-5)
    changed = with_evidence(samples.passing, consistency=(*samples.passing.evidence.consistency, worse))
    assert only(compare(both, changed).of_kind("regression")).where == "engine against itself: padded at 16 (2)"


def test_loosened_gates_are_a_regression(samples: Any) -> None:
    looser = judged_again(samples.passing, {"max_kl_mean": 1e-3})
    found = compare(samples.passing, looser)
    assert found.regressions == ("the limit of max_kl_mean was 1e-09, now 0.001",)
    back = compare(looser, samples.passing)
    assert (back.verdict, back.improvements) == ("better", ("the limit of max_kl_mean was 0.001, now 1e-09",))


def test_gates_that_follow_from_a_floor_may_move_with_it(samples: Any) -> None:
    old = samples.executed_in_16_bits
    floor = old.floors[0]

    def moved(factor: float) -> ParityReport:
        floors = (replace(floor, bulk_kl_mean=floor.bulk_kl_mean * factor),)
        gates = old.policy.resolve(floors[0])
        return judged_again(replace(old, floors=floors, table_gates=gates), {})

    assert not compare(old, moved(1.2)).regressed
    assert compare(old, moved(2.0)).regressions == (
        "the limit of max_kl_mean was 0.0006, now 0.0012",
        "the limit of max_kl_position was 0.006, now 0.012",
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


def other_target(report: ParityReport, target: str, **limits: float) -> ParityReport:
    """The same measurement by the gates of another target."""
    policy = GatePolicy(replace(report.table_gates, **limits))
    return judged_again(replace(report, target=target, policy=policy, table_gates=policy.absolute), {})


def test_two_targets_are_each_held_to_their_own_gates(passing: ParityReport) -> None:
    old = with_metrics(passing, kl_median_low=2e-10)
    wider = other_target(passing, "ort-cpu-int8", max_kl_median=1e-3)
    # A thousand times as far, and less of what its target allows.
    found = compare(old, with_metrics(wider, kl_median_low=2e-7), allow_other_target=True)
    assert (found.verdict, found.other_target) == ("the same", True)
    assert lines(found, everything=False)[0].startswith("THE SAME: ort-cpu pass -> ort-cpu-int8 pass; nearest gate ")
    found = compare(old, with_metrics(wider, kl_median_low=9e-4), allow_other_target=True)
    change = only(found.of_kind("regression"))
    assert (change.old_share, change.new_share) == (pytest.approx(0.2), pytest.approx(0.9))
    found = compare(old, with_metrics(wider, kl_median_low=2e-3), allow_other_target=True)
    assert only(list(found.not_kept)).gate == "max_kl_median"
    narrower = other_target(passing, "onnx", max_kl_median=1e-11)
    assert compare(old, with_metrics(narrower, kl_median_low=9e-12), allow_other_target=True).verdict == "the same"
    assert compare(old, with_metrics(narrower, kl_median_low=2e-11), allow_other_target=True).verdict == "worse"


def test_a_count_of_another_target_is_a_share_of_its_limit(passing: ParityReport) -> None:
    def flips(report: ParityReport, n: int) -> ParityReport:
        return with_routing(report, same_set=69 - n, diverged=n)

    wide = other_target(passing, "ort-cpu-int8", max_diverged=0.5)
    narrow = other_target(passing, "onnx", max_diverged=0.1)
    found = compare(flips(narrow, 2), flips(wide, 20), allow_other_target=True)
    assert "routing" not in {change.where for change in found.of_kind("regression")}
    assert "routing" in {
        c.where for c in compare(flips(wide, 2), flips(narrow, 20), allow_other_target=True).of_kind("regression")
    }


def test_another_target_has_types_and_lengths_of_its_own(passing: ParityReport) -> None:
    old = passing
    ranges = tuple(replace(r, type="bfloat16") for r in old.evidence.ranges if r.type == "float16")
    other = other_target(with_evidence(old, ranges=ranges), "trt-bf16")
    found = compare(old, other, allow_other_target=True)
    assert found.of_kind("lost")
    assert found.of_kind("new")
    assert found.verdict == "the same"
    none = other_target(with_evidence(old, ranges=()), "trt-bf16")
    assert compare(old, none, allow_other_target=True).verdict == "worse", "that there are ranges is a gate"


def test_gates_loosened_by_hand_are_no_measure(passing: ParityReport) -> None:
    looser = judged_again(replace(passing, target="onnx"), {"max_kl_median": 1.0})
    found = compare(passing, looser, allow_other_target=True)
    assert found.regressions == ("the limit of max_kl_median was 1e-09, now 1",)
    change = only(
        compare(passing, with_metrics(looser, kl_median_low=0.5), allow_other_target=True).of_kind("regression")
    )
    assert change.new_share == pytest.approx(5e8)
    assert compare(passing, replace(passing, target="onnx"), allow_other_target=True).verdict == ("the same")


@pytest.mark.parametrize("old", ["passing", "failing", "not_measured", "largest"])
@pytest.mark.parametrize("new", EVERY_SAMPLE)
def test_lines_fit_and_tell_the_verdict_first(old: str, new: str, samples: Any) -> None:
    first, second = (replace(getattr(samples, kind), probes=(), binding=Binding({}, {})) for kind in (old, new))
    found = compare(first, second, allow_other_target=True)
    for everything in (False, True):
        told = lines(found, everything=everything)
        assert max(map(len, told)) <= 100
        assert told[0].startswith(f"{found.verdict.upper()}: ")
    assert len(lines(found, everything=False)) < 60


def test_names_that_somebody_else_chose_are_harmless(samples: Any) -> None:
    evil = "\x1b[2J\u202e\n" * 50
    scenario = replace(samples.passing.evidence.scenarios[0], name=evil)
    new = with_evidence(samples.passing, scenarios=(*samples.passing.evidence.scenarios, scenario))
    for found in (compare(samples.passing, new), compare(new, samples.passing)):
        told = lines(found, everything=True)
        assert all(line.isprintable() for line in told)
        assert max(map(len, told)) <= 100


_FIGURES = st.one_of(st.just(0.0), st.floats(0, 1e308), st.floats(-16, 3).map(lambda power: 10.0**power))
_METRICS = st.fixed_dictionaries(
    {},
    optional={
        "kl_mean": st.none() | _FIGURES,
        "kl_max": _FIGURES,
        "logit_diff_max": _FIGURES,
        "top5_overlap": st.floats(0, 1),
        "cosine_min": st.floats(-1.000001, 1.000001),
        "rank_max": st.floats(1, 2.0**62),
        "perplexity_ratio": st.none() | _FIGURES,
        "perplexity_ratio_se": st.none() | _FIGURES,
        "non_finite": st.integers(0, 2**63 - 1),
        "disagreements": st.integers(0, 2**63 - 1),
        "positions": st.integers(0, 2**63 - 1),
    },
)
_OVERRIDES = st.dictionaries(st.sampled_from(("max_kl_mean", "max_logit_diff", "max_diverged")), _FIGURES, max_size=2)


class Report:
    """A report that no failing example prints."""

    def __init__(self, report: ParityReport) -> None:
        self.report = report


@pytest.fixture(scope="module")
def unprinted(passing: ParityReport) -> Report:
    return Report(passing)


@settings(max_examples=40, deadline=None)
@example({"perplexity_ratio": 0.0, "perplexity_ratio_se": 0.0}, {"perplexity_ratio": 2.0}, {}, {}, False)
@example({"kl_mean": 1e308}, {"kl_mean": 0.0}, {"max_kl_mean": 0.0, "max_logit_diff": 7e-150}, {}, False)
@given(_METRICS, _METRICS, _OVERRIDES, _OVERRIDES, st.booleans())
def test_whatever_is_worse_is_better_the_other_way_round(
    unprinted: Report,
    a: dict[str, Any],
    b: dict[str, Any],
    gates_a: dict[str, float],
    gates_b: dict[str, float],
    other: bool,
) -> None:
    old = judged_again(with_metrics(unprinted.report, **a), gates_a)
    new = judged_again(with_metrics(unprinted.report, **b), gates_b)
    if other:
        new = replace(new, target="onnx")
    found, back = (compare(*pair, allow_other_target=True) for pair in ((old, new), (new, old)))

    def places(of: Comparison, kind: ChangeKind) -> set[tuple[str, str]]:
        return {(change.where, change.name) for change in of.of_kind(kind)}

    assert places(found, "regression") == places(back, "improvement")
    assert places(found, "improvement") == places(back, "regression")
    assert places(found, "lost") == places(back, "new")
    assert {(f.where, f.gate) for f in found.not_kept} == {(f.where, f.gate) for f in back.kept_again}
    assert len(found.regressions) == len(back.improvements)
    assert found.regressed == back.improved
    assert max(map(len, lines(found, everything=True))) <= 100
    for report in (old, new):
        same = compare(report, report)
        assert same.verdict == "the same"
        assert len(lines(same, everything=False)) <= 4
