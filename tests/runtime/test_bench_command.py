"""`gptoss-export bench` on a real artifact: the shape of what it prints, never how fast the machine is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.engines import machine
from gptoss_export.engines.bandwidth import Bandwidth, Spread
from gptoss_export.engines.bench import DecodeSpeed
from gptoss_export.engines.machine import HostMeter
from gptoss_export.engines.token_bytes import token_bytes
from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import read_manifest
from gptoss_export.exporter.commands import bench

SMALL = ["--prompt-lengths", "3,20", "--past", "0,12", "--batch", "1,2", "--decode-tokens", "4", "--repetitions", "2"]
WARNING = "warning: {}: NOT VALIDATED, nothing was compared with the model"
SPEED = Bandwidth(Spread(1e9, 9e8, 2e9), 2, 128, 5, 2.0)


@pytest.fixture(scope="module")
def release(tiny_dir: Path, known_graph: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "release"
    export = ["--quiet", "--target", "ort-cpu", "--model", str(tiny_dir), "--output", str(out), "--parity", "off"]
    assert cli.main(export) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["bench", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def run_json(
    capsys: pytest.CaptureFixture[str], read_document: Callable[[str, str], dict[str, Any]]
) -> Callable[..., dict[str, Any]]:
    """Runs the command and reads its document by docs/bench.schema.json."""

    def measured(*args: object) -> dict[str, Any]:
        code, out, err = run(capsys, *args, "--json")
        assert code == 0, err
        return read_document("bench", out)

    return measured


def test_json_has_every_measurement_and_keeps_to_its_schema(
    release: Path, run_json: Callable[..., dict[str, Any]]
) -> None:
    found = run_json(release, *SMALL, "--threads", 1)
    manifest = read_manifest(release)
    assert found["artifact"]["content_sha256"] == manifest.content_sha256
    assert found["settings"] == {
        "prompt_lengths": [3, 20],
        "past": [0, 12],
        "batch": [1, 2],
        "decode_tokens": 4,
        "repetitions": 2,
        "threads": 1,
    }
    assert [row["prompt_length"] for row in found["prefill"]] == [3, 20]
    places = [(row["past"], row["last_past"], row["batch"]) for row in found["decode"]]
    assert places == [(0, 7, 1), (0, 7, 2), (12, 19, 1), (12, 19, 2)]
    assert {"gptoss-export", "numpy", "onnxruntime", "python"} == found["versions"].keys()
    for measured in (found["bandwidth"]["before"], found["bandwidth"]["after"]):
        assert measured["threads"] == 1
        assert measured["passes"] >= 5
    weights = token_bytes(manifest.model, manifest.layout)
    assert found["token_bytes"]["total"] == weights.total
    limit = max(found["bandwidth"][when]["bytes_per_second"]["median"] for when in ("before", "after"))
    for row in found["decode"]:
        expected = row["tokens_per_second"]["median"] * weights.total / limit
        assert row["bandwidth_fraction"] == (pytest.approx(expected) if row["batch"] == 1 else None)
        latency = row["latency_seconds"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    if found["memory"]["end"] is not None:
        assert found["memory"]["end"]["peak_resident"] >= found["memory"]["after_load"]["peak_resident"]


def test_what_a_platform_does_not_report_is_null(
    release: Path,
    run_json: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HostMeter, "bandwidth", lambda self: None)
    monkeypatch.setattr(machine, "process_memory", lambda: None)
    monkeypatch.setattr(bench, "_STORED_TARGETS", ())
    found = run_json(release, *SMALL)
    assert found["bandwidth"] == {"before": None, "after": None}
    assert found["memory"] == {"before_load": None, "after_load": None, "end": None}
    assert found["token_bytes"] is None
    assert found["settings"]["threads"] is None
    assert {row["bandwidth_fraction"] for row in found["decode"]} == {None}
    code, out, _ = run(capsys, release, *SMALL)
    assert code == 0
    assert "unknown" in out


def test_text_is_a_row_a_measurement_and_stderr_says_what_goes_on(
    release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostMeter, "bandwidth", lambda self: SPEED)
    code, out, err = run(capsys, release, *SMALL)
    assert code == 0
    facts, prompts, decode = out.split("\n\n")
    assert f"ort-cpu {read_manifest(release).content_sha256[:12]}" in facts
    assert "1.0 GB/s (2.0 cores) before decoding, 1.0 GB/s (2.0 cores) after it" in facts
    assert [line.split()[0] for line in prompts.splitlines()] == ["prompt", "3", "20"]
    heads = [line.split()[:2] for line in decode.splitlines()]
    assert heads == [["past", "batch"], ["0", "1"], ["0", "2"], ["12", "1"], ["12", "2"]]
    assert err.splitlines()[:2] == [WARNING.format(release), "load"]
    assert "decode after 12 tokens, batch 2" in err


def test_quiet_says_nothing_on_stderr_but_that_nothing_was_validated(
    release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostMeter, "bandwidth", lambda self: SPEED)
    code, out, err = run(capsys, release, *SMALL, "--quiet")
    assert (code, err) == (0, WARNING.format(release) + "\n")
    assert out


def test_energy_is_a_column_where_there_is_a_counter(
    release: Path, run_json: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostMeter, "bandwidth", lambda self: SPEED)

    class Counter:
        source = "RAPL: package-0"
        asked = 0.0

        def joules(self) -> float:
            self.asked += 8.0
            return self.asked

    monkeypatch.setattr(machine, "EnergyCounter", Counter)
    found = run_json(release, *SMALL)
    assert found["energy_source"] == "RAPL: package-0"
    # One reading before and one after each repetition: 8 J, over 4 tokens of 1 or 2 rows.
    assert [row["joules_per_token"] for row in found["decode"]] == [2.0, 1.0, 2.0, 1.0]
    assert found["prefill"][1]["joules_per_token"] == pytest.approx(8.0 / 20)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt-lengths", "0"], 2, "--prompt-lengths"),
        (["--prompt-lengths", "8,x"], 2, "no integers between commas"),
        (["--batch", "0"], 2, "--batch"),
        (["--decode-tokens", "0"], 2, "--decode-tokens"),
        (["--repetitions", "0"], 2, "--repetitions"),
        (["--prompt-lengths", "99999999"], 60, "more than the model's"),
        (["--past", "99999999"], 60, "more than the model's"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused_before_anything_is_loaded(
    options: list[str],
    code: int,
    message: str,
    release: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> DecodeSpeed:
        raise AssertionError("the bench began")

    monkeypatch.setattr("gptoss_export.engines.bench.run_bench", never)
    found, out, err = run(capsys, release, *options)
    assert (found, out) == (code, "")
    assert message in err


def test_a_folder_without_an_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], read_document: Callable[[str, str], dict[str, Any]]
) -> None:
    code, out, err = run(capsys, tmp_path)
    assert (code, out) == (42, "")
    assert "no complete artifact" in err
    code, out, _ = run(capsys, tmp_path, "--json")
    assert (code, read_document("bench", out)["error"]["kind"]) == (42, "artifact-not-found")
