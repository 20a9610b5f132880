"""`report` and `diff`: what they print, what they write, how they end, and that they change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import MANIFEST_NAME, REPORT_NAMES
from gptoss_export.validators.report import NAMES, read_report, to_json, write_report


@pytest.fixture(autouse=True)
def somewhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stored(samples: Any, tmp_path: Path) -> Any:
    """Writes a sample into a folder of its name."""

    def write(kind: str) -> Path:
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        write_report(getattr(samples, kind), folder)
        return folder

    return write


def test_the_files_of_a_report_are_those_that_the_manifest_leaves_out() -> None:
    assert REPORT_NAMES == NAMES


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("passing", 0, "PASS: ort-cpu is the model"),
        ("failing", 50, "FAIL: ort-cpu is not shown to be the model"),
        ("not_executed", 52, "NOT EXECUTED: the graph passes"),
        ("failing_graph", 50, "FAIL: trt-fp16"),
        ("loosened", 0, "With loosened gates: max_logit_diff 6 (table 0.0001)"),
        ("largest", 50, "FAIL: trt-fp16"),
    ],
)
def test_the_verdict_is_printed_and_is_the_exit_code(
    kind: str, code: int, said: str, stored: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(stored(kind))]) == code
    captured = capsys.readouterr()
    assert said in captured.out.splitlines()[0]
    assert captured.err.startswith("error: ") == (code != 0)


def test_an_engine_that_was_not_executed_can_be_accepted(stored: Any) -> None:
    assert cli.main(["report", str(stored("not_executed") / "parity.json"), "--allow-unexecuted"]) == 0


def test_the_verdict_by_other_gates(stored: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failing, passing = stored("failing"), stored("passing")
    given = ["--gate", "max-logit-diff=6", "--gate", "max_layer_error=0.5"]
    assert cli.main(["report", str(failing), *given]) == 0
    out = capsys.readouterr().out
    assert "With loosened gates: max_logit_diff 6 (table 0.0001), max_layer_error 0.5 (table 1e-05)." in out
    assert "Layer 1, attention" not in out, "a bisection goes by the gates that it was made with"
    assert cli.main(["report", str(passing), "--gate", "max-kl-mean=1e-14"]) == 50
    assert "max_kl_mean in prefill (1.3e-13, limit 1e-14)" in capsys.readouterr().err


def test_as_json(stored: Any, capsys: pytest.CaptureFixture[str], read_document: Any) -> None:
    assert cli.main(["report", str(stored("failing")), "--json"]) == 50
    found = read_document("report", capsys.readouterr().out)
    assert (found["verdict"], found["error"]["kind"]) == ("fail", "parity-failed")
    assert [failure["where"] for failure in found["failures"]] == [
        "settled positions of decode",
        "layer 1 attention",
        "layer 1 attention with cache",
    ]
    gates = {gate["gate"]: gate for gate in found["gates"]}
    assert gates["max_logit_diff"]["measured"] == 5.0
    assert gates["max_logit_diff"]["limit_from"] == "absolute"


def test_views_are_written_elsewhere_and_the_artifact_is_left_alone(stored: Any, tmp_path: Path) -> None:
    folder = stored("failing")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    output = tmp_path / "a" / "b"
    given = ["report", str(folder), "--gate", "max-logit-diff=1", "--output", str(output)]
    assert cli.main(given) == 50
    assert sorted(path.name for path in output.iterdir()) == sorted(NAMES)
    assert read_report(output).overrides == {"max_logit_diff": 1.0}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert cli.main(given) == 40
    assert cli.main(["report", str(output), "--output", str(folder)]) == 40
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_artifact_is_never_written_into(stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "artifact"
    other.mkdir()
    (other / MANIFEST_NAME).write_text("{}")
    assert cli.main(["report", str(stored("passing")), "--output", str(other)]) == 40
    assert MANIFEST_NAME in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == [MANIFEST_NAME]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gate", "max-kl=1"], "names no gate; there are max-kl-mean, max-logit-diff, max-kl-median"),
        (["--gate", "max-kl-mean"], "is no limit: it takes a number of at least 0"),
        (["--gate", "max-kl-mean="], "is no limit"),
        (["--gate", "max-kl-mean=x"], "is no limit"),
        (["--gate", "max-kl-mean=nan"], "is no limit"),
        (["--gate", "max-kl-mean=-1"], "is no limit"),
        (["--gate", "max-kl-mean=inf"], "is no limit"),
        (["--gate", "min-top1-agreement=2"], "a share of 0 to 1"),
        (["--gate", "max-kl-mean=1", "--gate", "max_kl_mean=2"], "max-kl-mean is given twice"),
        (["--gate", "x" * 10_000], "names no gate"),
        (["--gate", "\x1b[31m=1"], "names no gate"),
    ],
)
def test_gates_that_are_none(given: list[str], said: str, stored: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(stored("passing")), *given]) == 2
    err = capsys.readouterr().err
    assert said in " ".join(err.split())
    assert len(err) < 1000
    assert "\x1b" not in err


def test_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 42
    (tmp_path / "parity.json").write_text("{")
    assert cli.main(["report", str(tmp_path)]) == 51
    assert "the parity report cannot be read" in capsys.readouterr().err


def test_diff_of_the_same_is_two_lines(stored: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(stored("passing"))
    assert cli.main(["diff", folder, f"{folder}/parity.json"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("THE SAME: pass -> pass; nearest gate ")
    assert last == "205 figures compared: 205 same within noise (--all shows them)"
    assert cli.main(["diff", folder, folder, "--all"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 205 + 4
    assert any(line.split()[:5] == ["same", "kl_mean", "decode", "1.3e-13", "1.3e-13"] for line in out.splitlines())


def test_diff_fails_on_a_regression_and_says_which(stored: Any, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = str(stored("passing")), str(stored("failing"))
    assert cli.main(["diff", old, new]) == 53
    captured = capsys.readouterr()
    verdict = "pass -> fail; max_logit_diff is 5, limit 0.0001 (2 more), settled positions of decode"
    told = captured.out.splitlines()
    assert told[0] == f"WORSE: {verdict}"
    assert "not kept any more: max_logit_diff in settled positions of decode (5, limit 0.0001)" in told
    assert told[told.index("worse:") + 2].split()[:4] == ["logit_diff_max", "settled", "positions", "of"]
    assert told[-1].startswith("205 figures compared: 4 worse, 201 same within noise")
    assert max(map(len, told)) <= 100
    assert len(told) < 15
    assert captured.err.splitlines()[0] == f"error: {new} is worse than {old}: {verdict}"
    assert cli.main(["diff", new, old]) == 0
    out = capsys.readouterr().out
    assert out.startswith("BETTER: fail -> pass; ")
    assert "kept now, not before: max_logit_diff in settled positions of decode (5, limit 0.0001)" in out
    assert cli.main(["diff", old, new, "--tolerance", "1e6"]) == 53  # gates that are not kept are no matter of degree


def test_diff_as_json(stored: Any, capsys: pytest.CaptureFixture[str], read_document: Any) -> None:
    assert cli.main(["diff", str(stored("passing")), str(stored("failing")), "--json"]) == 53
    found = read_document("diff", capsys.readouterr().out)
    assert found["error"]["kind"] == "regression"
    assert (found["verdict"], found["old_verdict"], found["new_verdict"]) == ("worse", "pass", "fail")
    assert (found["regressed"], found["level"], found["matters"], found["tolerance"]) == (True, 1e-3, 0.01, 1.5)
    assert len(found["changes"]) == 205, "all of them, whatever is printed"
    worse = {(c["where"], c["name"]): c for c in found["changes"] if c["kind"] == "regression"}
    assert set(worse) == {
        ("decode", "logit_diff_max"),
        ("settled positions of decode", "logit_diff_max"),
        ("layer 1 attention", "layer_error"),
        ("layer 1 attention with cache", "layer_error"),
    }
    change = worse["layer 1 attention", "layer_error"]
    assert (change["gate"], change["rule"], change["p"], change["times"]) == ("max_layer_error", "size", None, None)
    assert (change["new"], change["new_share"]) == (0.21, pytest.approx(21000))
    assert found["not_kept"][0] == {
        "where": "settled positions of decode",
        "gate": "max_logit_diff",
        "measured": 5.0,
        "limit": 1e-4,
    }


def test_diff_of_what_cannot_be_compared(stored: Any, samples: Any, tmp_path: Path) -> None:
    old = stored("passing")
    other = tmp_path / "other.json"
    other.write_bytes(to_json(replace(samples.passing, target="onnx")))
    assert cli.main(["diff", str(old), str(other)]) == 54
    assert cli.main(["diff", str(old), str(other), "--allow-other-target"]) == 0
    assert cli.main(["diff", str(old), str(stored("largest"))]) == 54


def test_a_tolerance_below_one_is_none(stored: Any) -> None:
    folder = str(stored("passing"))
    assert cli.main(["diff", folder, folder, "--tolerance", "0.5"]) == 2
