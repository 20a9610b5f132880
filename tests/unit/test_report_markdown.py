"""parity.md: the verdict first, everything that matters, and short enough for a ticket."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptoss_export.validators.layers import Bisection
from gptoss_export.validators.report import content_sha256, to_markdown
from gptoss_export.validators.report.again import judged_again
from gptoss_export.validators.report.schema import Binding, ParityReport, ProbeRecord
from gptoss_export.validators.scenarios import SCENARIOS

OVER = "over 69 distinct positions, 414 in 6 scenarios"


def first_line(report: ParityReport) -> str:
    return to_markdown(report).splitlines()[0]


def test_the_verdict_comes_first(samples: Any) -> None:
    first = first_line(samples.passing)
    assert first.startswith(
        "**PASS**: ort-cpu is the model within its gates, over 69 distinct positions, 414 in 6 scenarios"
    )
    assert "worst mean KL 1.3e-13" in first
    first = first_line(samples.failing)
    assert first.startswith(f"**FAIL**: ort-cpu is not shown to be the model, {OVER}: 3 gates not kept")
    assert first.endswith("first max\\_logit\\_diff in settled positions of decode (5, limit 0.0001).")
    assert "first prefill: nothing was measured." in first_line(samples.not_measured)
    assert "1 gate not kept in 1 place, " in first_line(judged_again(samples.failing, {"max_layer_error": 1.0}))


def test_loosened_gates_are_in_the_verdict_line(samples: Any) -> None:
    assert first_line(samples.loosened).endswith(
        " With loosened gates: max\\_logit\\_diff 6 (table 0.0001), max\\_layer\\_error 0.5 (table 1e-05)."
    )
    tightened = judged_again(samples.passing, {"max_kl_mean": 1e-12})
    assert "oosened" not in first_line(tightened)
    assert "| --gate, tightened (table 1e-09) |" in to_markdown(tightened)


def test_an_engine_that_was_not_run_is_never_called_the_model(samples: Any) -> None:
    assert first_line(samples.not_executed) == (
        "**NOT EXECUTED**: the graph passes (graph parity), the engine was not run: no NVIDIA driver on this host. "
        "Run gptoss-export validate \\<folder\\> on a host with an NVIDIA GPU. The graph of trt-fp16 keeps its gates, "
        "over 69 distinct positions, 414 in 6 scenarios (worst mean KL 1.3e-13, worst logit difference 7.6e-06)."
    )
    assert "PASS" not in to_markdown(samples.not_executed)
    assert "is the model" not in to_markdown(samples.not_executed)
    assert first_line(samples.failing_graph).endswith(
        "Only the graph was run, by onnxruntime 1.31.1, CPUExecutionProvider; the engine was not: no NVIDIA driver on "
        "this host."
    )
    for report in (samples.not_executed, samples.failing_graph):
        assert "| execution | graph only, by onnxruntime 1.31.1, CPUExecutionProvider |" in to_markdown(report)
    assert "| execution | executed |" in to_markdown(samples.passing)


def test_a_reason_cannot_break_the_verdict_line(samples: Any) -> None:
    reason = "no GPU.\n\n**PASS**: `x` | " + "y" * 9000
    report = samples.not_executed
    first = first_line(replace(report, engine=replace(report.engine, not_executed_reason=reason)))
    assert first.startswith("**NOT EXECUTED**: ")
    assert "**PASS**" not in first.replace("\\*", "")
    assert len(first) < 900


def test_every_limit_says_where_it_comes_from(samples: Any) -> None:
    text = to_markdown(samples.not_executed)
    gates = samples.not_executed.gates
    floor, shown = "3 x the noise floor", text.replace("\\<", "<")
    for row in (
        f"| max\\_kl\\_mean | yes | 1.3e-13 | {gates.max_kl_mean:.3g} | < 0.1 % | routing replay | {floor} |",
        f"| max\\_logit\\_diff | yes | 7.6e-06 | 0.15 | < 0.1 % | routing replay | {floor} |",
        "| min\\_top1\\_agreement | yes | 1 | 0.826 | - | texts | by chance, or beside the noise floor |",
        "| max\\_layer\\_error | yes |",
    ):
        assert row in shown
    assert (
        "what is seen by chance once in 1,000 runs, or are no evidence of a higher rate than the noise floor's" in text
    )
    assert "At 0 positions the best token is another; 0 of them are rounding" in text
    assert "0 are not: at most 12 may be, at a level of 99.9 %." in text
    assert "the probes, on A CPU, avx2." in text
    assert "## Noise floors\n\nWhat rounding costs: transformers itself in 16 bits against" in text
    assert "| float16 | 138 | 1 | 0.7246 % | 1 | 0.0002 | 0.05 |" in text
    text = to_markdown(samples.passing)
    assert "| max\\_layer\\_error | yes | 7.53e-07 | 1e-05 | 7.5 % | layer 1 experts | absolute |" in text
    assert "oise floor" not in text


def test_what_failed_and_where_it_starts(samples: Any) -> None:
    text = to_markdown(samples.failing)
    assert text.index("## Gates not kept") < text.index("## Where it starts") < text.index("## Scenarios")
    assert "| layer 1 attention | max\\_layer\\_error | 0.21 | 1e-05 |" in text
    assert "## Where it starts\n\nLayer 1, attention: the window: 0.21 where 1e-05 passes." in text
    assert "| 1 | attention | attention: the window | 0.21 | 1e-05 | right with a window of 17 |" in text
    assert "Where it starts" not in to_markdown(samples.passing)


def test_every_section_is_there(samples: Any) -> None:
    text = to_markdown(samples.failing)
    for piece in (*SCENARIOS, "1e-09", "c" * 64, "d" * 64, "1" * 64, "5.23.0", "gptoss-export validate ./release"):
        assert piece in text
    for title in ("Worst positions", "Routing", "Layer by layer", "Range of numbers", "The engine against itself"):
        assert f"\n## {title}\n" in text
    assert content_sha256(samples.failing) in text
    assert "The sliding window of 16 positions is crossed." in text
    assert "Untested: 2 of 8 experts x layers, that no probe visits (layer 0 expert 3, layer 1 expert 3)." in text
    assert "| chat-41, 40 | 1.25e-12 | ' 9' (17) | '9' (18) | end | decode | a train leaves at |" in text
    assert "| 1 | 1, 3 | tie | 0 | 1 | 1e-07 | 1 % |" in text
    assert "| repeat | 16 | 8 | 0 | 0 | 0 | yes |" in text
    assert "| none | none | none | none | none |" in to_markdown(samples.not_finite)


def test_untested_experts_are_counted_and_only_the_first_are_named(samples: Any) -> None:
    text = to_markdown(samples.largest)
    assert "of 4,608 experts x layers, that no probe visits (layer 0 expert 127, " in text
    assert " more)." in text


def test_a_window_that_was_not_crossed(samples: Any) -> None:
    assert "IS NOT crossed" in to_markdown(replace(samples.passing, sliding_window=41))


def test_the_largest_model_fits_a_ticket_uncut(samples: Any) -> None:
    text = to_markdown(samples.largest)
    assert len(text) < 65_000
    assert "Cut here" not in text
    assert "| 35 | full\\_attention | 375 |" in text


@pytest.mark.parametrize("count", [300, 2000])
def test_it_stays_a_ticket_however_much_there_is(count: int, samples: Any) -> None:
    many = {f"{i:05}-{'x' * 200}.safetensors": "e" * 64 for i in range(count)}
    probes = tuple(ProbeRecord("p" * 300, 1, "f" * 64) for _ in range(count))
    scenarios = tuple(replace(samples.passing.evidence.scenarios[0], name=f"s{i}" * 40) for i in range(count))
    evidence = replace(samples.failing.evidence, scenarios=scenarios)
    report = judged_again(replace(samples.failing, evidence=evidence, probes=probes, binding=Binding(many, many)), {})
    text = to_markdown(report)
    assert len(text) < 65_000
    assert text.startswith("**FAIL**")
    assert "more in parity.json" in text
    assert len(text.encode()) < 70_000


def test_names_cannot_break_out(samples: Any) -> None:
    evil = "a|b`c\n\n# PASS <img src=x> [l](http://x) \u202e\x1b[31m\ud800"
    report = replace(
        samples.passing,
        target=evil,
        binding=Binding({evil: "e" * 64}, {}),
        bisection=Bisection((), f"# PASS\n\n- {evil}"),
        worst=(replace(samples.passing.worst[0], context=evil, text_reference=evil),),
    )
    text = to_markdown(report)
    text.encode()
    assert "\n# PASS" not in text
    assert "\n\\# PASS - a" in text
    for character in ("\x1b", "\u202e", "\ud800"):
        assert character not in text
    assert "<img" not in text.replace("\\<img", "")
    row = next(line for line in text.splitlines() if "e" * 64 in line)
    assert row.replace("\\|", "").count("|") == 3


@pytest.mark.parametrize("start", ["- x", "+ x", "= x", "> x", "# x", "~~~", "```"])
def test_a_sentence_stays_a_sentence(start: str, samples: Any) -> None:
    text = to_markdown(replace(samples.passing, bisection=Bisection((), start)))
    assert f"## Where it starts\n\n\\{start[0]}" in text
