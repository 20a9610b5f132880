"""junit.xml: valid whatever names there are, one case a gate and place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree as ET

from gptoss_export.validators.report import content_sha256, to_junit
from gptoss_export.validators.report.again import judged_again
from gptoss_export.validators.report.schema import Binding, ParityReport
from gptoss_export.validators.verdict import cases


def suite(report: ParityReport) -> ET.Element:
    return ET.fromstring(to_junit(report))


def failures(report: ParityReport) -> dict[str, ET.Element]:
    found = ((case.get("name") or "", case.find("failure")) for case in suite(report).iter("testcase"))
    return {name: failure for name, failure in found if failure is not None}


def test_a_case_for_every_gate_at_every_place(samples: Any) -> None:
    found = suite(samples.passing)
    expected = cases(samples.passing.evidence, samples.passing.gates)
    names = [case.get("name") for case in found.iter("testcase")]
    assert names == [f"{case.where}: {case.gate}" for case in expected]
    assert len(set(names)) == len(names) > 40
    assert {case.get("classname") for case in found.iter("testcase")} == {"ort-cpu"}
    counts = [found.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == [str(len(names)), "0", "0", "0"]
    assert not failures(samples.passing)


def test_failures_have_what_was_measured_and_the_limit(samples: Any) -> None:
    assert suite(samples.failing).get("failures") == "3"
    found = failures(samples.failing)
    assert found["settled positions of decode: max_logit_diff"].get("message") == "measured 5, limit at most 0.0001"
    assert found["layer 1 attention: max_layer_error"].text == (
        "layer 1 attention: max_layer_error: measured 0.21, limit 1e-05"
    )
    assert failures(samples.not_measured)["routing: measured"].get("message") == "nothing was measured"
    assert failures(samples.not_finite)["prefill: max_kl_median"].get("message") == (
        "measured none, limit at most 1e-09"
    )
    worse = judged_again(samples.passing, {"min_headroom_bits": 999.0})
    assert failures(worse)["range of layer 0 in float16: min_headroom_bits"].get("message") == (
        "measured 9.36, limit at least 999"
    )


def test_an_engine_that_was_not_executed_is_skipped(samples: Any) -> None:
    found = suite(samples.not_executed)
    skipped = [case for case in found.iter("testcase") if case.find("skipped") is not None]
    assert [case.get("name") for case in skipped] == ["engine"]
    assert skipped[0].find("skipped").get("message") == "no NVIDIA driver on this host"  # type: ignore[union-attr]
    assert found.get("skipped") == "1"
    assert int(found.get("tests") or 0) == len(list(found.iter("testcase")))


def test_hashes_and_versions_are_properties(samples: Any) -> None:
    found = {p.get("name"): p.get("value") for p in suite(samples.passing).iter("property")}
    assert found["report sha256"] == content_sha256(samples.passing)
    assert found["sha256 of model.onnx"] == "d" * 64
    assert found["sha256 of checkpoint model.safetensors"] == "c" * 64
    assert found["version of transformers"] == "5.23.0"
    assert found["command"] == "gptoss-export validate ./release"
    assert (found["verdict"] or "").startswith("PASS: ort-cpu is the model")


def test_hostile_names_leave_it_valid(samples: Any) -> None:
    evil = "</testcase>\"'&]]>\x00\x0b\x1b\ud800\ufffe\u202e<!--"
    report = replace(
        samples.not_executed,
        target=evil,
        command=(evil,),
        engine=replace(samples.not_executed.engine, not_executed_reason=evil),
        binding=Binding({evil: "e" * 64}, {}),
    )
    found = suite(report)
    assert len(list(found.iter("testcase"))) == int(found.get("tests") or 0)
    assert {case.get("classname") for case in found.iter("testcase")} == {
        "</testcase>\"'&]]>" + "\ufffd" * 5 + "\u202e<!--"
    }
