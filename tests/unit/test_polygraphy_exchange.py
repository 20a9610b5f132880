"""Files for Polygraphy that it reads, and files of Polygraphy that are never taken at their word."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gptoss_export.exporter import cli
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.errors import PromptError
from gptoss_export.validators.polygraphy_exchange import (
    feeds,
    measure_results,
    write_accuracy,
    write_inputs,
    write_reference,
)
from gptoss_export.validators.polygraphy_json import CLASS, decode_array, encode_array, read_logits
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference import BLOCK_POSITIONS

VOCAB = 32
PROBES = (Probe("one", (3,)), Probe("long", tuple(k % VOCAB for k in range(BLOCK_POSITIONS + 7))))


class MadeUp:
    """A reference with logits out of a generator."""

    def __init__(self) -> None:
        self.probes, self.vocab_size = PROBES, VOCAB
        draw = np.random.default_rng(5)
        self.all = [draw.normal(0, 3, (len(p.ids), VOCAB)).astype(np.float32) for p in PROBES]

    def logits(self, probe: int, start: int, stop: int) -> NDArray[np.float32]:
        assert 0 <= start < stop <= len(self.all[probe])
        assert stop - start <= BLOCK_POSITIONS
        return self.all[probe][start:stop]


@pytest.fixture
def reference() -> Any:
    return MadeUp()


def test_polygraphy_reads_our_inputs(tiny_dir: Path, tmp_path: Path) -> None:
    from polygraphy.comparator import StreamingDataLoader

    config = open_checkpoint(tiny_dir).config
    write_inputs(PROBES, config, tmp_path / "inputs")
    loaded = list(StreamingDataLoader(str(tmp_path / "inputs")))
    assert len(loaded) == len(PROBES)
    for probe, found in zip(PROBES, loaded, strict=True):
        expected = feeds(probe, config)
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
        assert found["past_key_values.0.key"].shape == (1, config.num_kv_heads, 0, config.head_dim)


def test_polygraphy_reads_our_reference(reference: Any, tmp_path: Path) -> None:
    from polygraphy.comparator import RunResults

    write_reference(reference, tmp_path / "reference")
    runs = list(RunResults.load_streaming(str(tmp_path / "reference")))
    assert len(runs) == len(PROBES)
    for run, logits in zip(runs, reference.all, strict=True):
        assert list(run.keys()) == ["transformers"]
        np.testing.assert_array_equal(run["transformers"][0]["logits"], logits[None])


def test_polygraphy_reads_our_verdict(samples: Any, tmp_path: Path) -> None:
    from polygraphy.comparator import AccuracyResults

    for kind, good in (("passing", True), ("failing", False), ("not_finite", False)):
        report = getattr(samples, kind)
        write_accuracy(report, tmp_path / f"{kind}.json")
        (found,) = AccuracyResults.load(str(tmp_path / f"{kind}.json"))
        assert bool(found) is good
        assert found.stats() == (int(good), int(not good), 1)
    (found,) = AccuracyResults.load(str(tmp_path / "failing.json"))
    decode = found[("transformers", "onnxruntime 1.31.1")][0]["logits (decode)"]
    assert (decode.max_absdiff, decode.thresholds.atol, bool(decode)) == (5.0, 1e-4, False)


def saved_by_polygraphy(reference: Any, path: Path, noise: float = 0.0) -> None:
    from polygraphy.comparator import RunResults

    results = RunResults()
    caches = {"present.0.key": np.zeros((1, 2, 3), np.float16)}
    results.add([{"logits": logits[None] + np.float32(noise)} | caches for logits in reference.all], 0.1, "onnxrt")
    results.save(str(path))


def test_results_that_polygraphy_saved_are_measured(reference: Any, tmp_path: Path) -> None:
    saved_by_polygraphy(reference, tmp_path / "results.json")
    (found,) = measure_results(read_logits(tmp_path / "results.json"), reference).items()
    assert found[0] == "onnxrt"
    m = found[1]
    assert (m.positions, m.agreements, m.kl_max) == (BLOCK_POSITIONS + 8, BLOCK_POSITIONS + 8, 0.0)
    assert m.text_positions == BLOCK_POSITIONS + 6
    assert m.perplexity_ratio == 1.0


def test_what_we_write_we_read(reference: Any, tmp_path: Path) -> None:
    write_reference(reference, tmp_path / "results")
    found = measure_results(read_logits(tmp_path / "results"), reference)
    assert found["transformers"].kl_max == 0.0
    reference.all[1] = reference.all[1][::-1]
    assert measure_results(read_logits(tmp_path / "results"), reference)["transformers"].kl_mean > 1.0


def results(*iterations: NDArray[np.float32], runner: str = "x") -> Iterator[tuple[str, NDArray[np.float32]]]:
    for logits in iterations:
        yield runner, logits


def test_results_of_something_else_are_refused(reference: Any) -> None:
    first, second = (logits[None] for logits in reference.all)
    with pytest.raises(PromptError, match="more iterations than the 2 probes"):
        measure_results(results(first, second, first), reference)
    with pytest.raises(PromptError, match="have 1 iterations, and there are 2 probes"):
        measure_results(results(first, runner="x\n\ud800"), reference)
    with pytest.raises(PromptError, match=r"iteration 0 are \[1, 71, 32\], those of probe 'one' \[1, 1, 32\]"):
        measure_results(results(second, first), reference)
    with pytest.raises(PromptError, match="of no runner"):
        measure_results(results(), reference)


@pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 0, 4), (3, 1, 2, 2)])
def test_an_array_goes_there_and_back(shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(decode_array(encode_array(array)), array)


def npy(array: NDArray[Any], *, allow_pickle: bool = False) -> bytes:
    held = io.BytesIO()
    np.save(held, array, allow_pickle=allow_pickle)
    return held.getvalue()


class Trap:
    """Something that a pickle would run."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo trapped > trapped",)


GOOD = npy(np.zeros((1, 2, 3), np.float32))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        GOOD[:-1],
        GOOD + b"\x00",
        GOOD.replace(b"(1, 2, 3)", b"(1, 2, 4)"),
        GOOD.replace(b"(1, 2, 3)", b"(-1,2,3)"),
        GOOD.replace(b"(1, 2, 3)", b"(9**9**9)"),
        GOOD.replace(b"(1, 2, 3)", b"(((((((("),
        GOOD.replace(b"(1, 2, 3), }", b"(999999999999, 999999999999, 999999999999), }"),
        GOOD.replace(b"NUMPY\x01", b"NUMPY\x03"),
        GOOD.replace(b"<f4", b"|O4"),
        npy(np.zeros((1, 2, 3), np.float64)),
        npy(np.asfortranarray(np.zeros((2, 3), np.float32))),
        npy(np.array([Trap()], object), allow_pickle=True),
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_an_array_that_is_none(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="its logits"):
        decode_array({"array": base64.b64encode(data).decode(), CLASS: "ndarray"})
    assert not list(tmp_path.iterdir())


def of_outputs(outputs: object) -> dict[str, object]:
    return {"lst": [["x", [{"outputs": outputs, CLASS: "IterationResult"}]]], CLASS: "RunResults"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b'{"lst": []}',
        json.dumps({"lst": {}, CLASS: "RunResults"}).encode(),
        json.dumps({"lst": [3], CLASS: "RunResults"}).encode(),
        json.dumps({"lst": [["x", {}]], CLASS: "RunResults"}).encode(),
        json.dumps({"lst": [["x", [1]]], CLASS: "RunResults"}).encode(),
        json.dumps(of_outputs({})).encode(),
        json.dumps(of_outputs({"logits": []})).encode(),
        json.dumps(of_outputs({"logits": {"values": {"tensor": "AAAA", CLASS: "Tensor"}}})).encode(),
        json.dumps(of_outputs({"logits": {"values": {"array": "!", CLASS: "ndarray"}}})).encode(),
        json.dumps(of_outputs({"logits": {"values": {"array": "\ud800", CLASS: "ndarray"}}})).encode(),
    ],
)
def test_a_file_that_holds_no_results(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=r"results\.json holds no results of Polygraphy") as error:
        list(read_logits(path))
    assert "\n" not in error.value.what
    assert error.value.what.isascii()


def test_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="a folder without"):
        list(read_logits(tmp_path))
    with pytest.raises(PromptError, match="no results of Polygraphy"):
        list(read_logits(tmp_path / "nowhere.json"))
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(PromptError, match="FIFO"):
        list(read_logits(tmp_path / "fifo.json"))


@pytest.fixture
def artifact(monkeypatch: pytest.MonkeyPatch, reference: Any, samples: Any, tiny_dir: Path) -> Any:
    """Commands that find a manifest, a report and a reference without an artifact."""
    from gptoss_export.exporter import artifact as artifacts
    from gptoss_export.exporter.commands import polygraphy

    parity = SimpleNamespace(report_sha256="0" * 64)
    manifest = SimpleNamespace(target="onnx", model=open_checkpoint(tiny_dir).config, parity=parity)
    monkeypatch.setattr(artifacts, "read_manifest", lambda folder: manifest)
    monkeypatch.setattr(polygraphy, "open_report", lambda folder: samples.passing)
    monkeypatch.setattr(polygraphy, "_reference", lambda *_: reference)
    return manifest


def test_export_writes_a_folder_and_never_into_one(
    artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_document: Any
) -> None:
    given = ["polygraphy", "export", "out", "--output", str(tmp_path / "exchange"), "-q"]
    assert cli.main(given) == 0
    assert sorted(p.name for p in (tmp_path / "exchange").iterdir()) == ["accuracy.json", "inputs", "reference"]
    assert "polygraphy run out/model.onnx --onnxrt --onnx-outputs logits" in capsys.readouterr().out
    assert cli.main(given) == 40
    assert cli.main([*given, "--json"]) == 40
    assert read_document("polygraphy-export", capsys.readouterr().out)["error"]["kind"] == "output-exists"
    assert cli.main([*given[:4], str(tmp_path / "again"), "-q", "--json"]) == 0
    found = read_document("polygraphy-export", capsys.readouterr().out)
    assert found["folder"] == str(tmp_path / "again") and found["probes"] > 0
    assert found["next"].startswith("polygraphy run out/model.onnx --onnxrt --onnx-outputs logits")


def test_only_a_graph_that_polygraphy_can_feed_is_exported(
    artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact.target = "ort-cpu"
    assert cli.main(["polygraphy", "export", "out", "--output", str(tmp_path / "exchange")]) == 30
    assert "export the target onnx" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_import_holds_results_to_the_gates(
    artifact: Any, reference: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_document: Any
) -> None:
    saved_by_polygraphy(reference, tmp_path / "results.json")
    given = ["polygraphy", "import", "out", str(tmp_path / "results.json"), "-q"]
    assert cli.main(given) == 0
    out = capsys.readouterr().out
    assert ["polygraphy:", "onnxrt", "max_kl_mean", "0", "1e-09", "yes"] in [line.split() for line in out.splitlines()]
    assert cli.main([*given, "--json"]) == 0
    found = read_document("polygraphy-import", capsys.readouterr().out)
    assert (found["verdict"], "error" in found) == ("pass", False)
    reference.all[0] = -reference.all[0]
    assert cli.main([*given, "--json"]) == 50
    captured = capsys.readouterr()
    found = read_document("polygraphy-import", captured.out)
    assert (found["verdict"], found["error"]["kind"]) == ("fail", "parity-failed")
    (scenario,) = found["scenarios"]
    assert scenario["name"] == "polygraphy: onnxrt"
    assert scenario["metrics"]["positions"] == BLOCK_POSITIONS + 8
    assert "max_kl_mean in polygraphy: onnxrt is" in captured.err
    assert cli.main(["polygraphy", "import", "out", str(tmp_path / "nothing.json")]) == 60


def test_a_report_with_other_limits_judges_by_those(
    artifact: Any, reference: Any, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptoss_export.exporter.commands import polygraphy
    from gptoss_export.validators.report.again import judged_again

    saved_by_polygraphy(reference, tmp_path / "results.json")
    reference.all[1] = reference.all[1] + np.float32(1e-3) * np.arange(VOCAB, dtype=np.float32)
    given = ["polygraphy", "import", "out", str(tmp_path / "results.json"), "-q"]
    assert cli.main(given) == 50
    loose = judged_again(samples.passing, {"max_kl_mean": 1.0, "max_logit_diff": 1.0, "min_top1_agreement": 0.5})
    monkeypatch.setattr(polygraphy, "open_report", lambda folder: replace(loose))
    assert cli.main(given) == 0
