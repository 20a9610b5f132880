"""The whole way with everything real: a checkpoint in, an artifact out that says what it is and runs anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import RECORD_NAMES, read_manifest, verify_files
from gptoss_export.exporter.checkpoint.synth import SynthShape, synthesize
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.validators.report import content_sha256, read_report

PROMPT = "The import statement"


@dataclass(frozen=True)
class Outcome:
    """What a command gave."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *args: object) -> Outcome:
    code = cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


@pytest.fixture(scope="module")
def release(
    tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory, read_document: Callable[[str, str], dict[str, Any]]
) -> Path:
    """Both targets, exported by the command as a user types it."""
    out = tmp_path_factory.mktemp("export") / "release"
    command = [sys.executable, "-m", "gptoss_export.exporter", "--target", "onnx", "--target", "ort-cpu"]
    command += ["--model", str(tiny_dir), "--output", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = read_document("export", done.stdout)
    results, run_seconds = document["results"], document["run_seconds"]
    assert "error" not in document
    assert [(r["target"], r["verdict"], r["effort"]) for r in results] == [
        ("onnx", "pass", "quick"),
        ("ort-cpu", "pass", "quick"),
    ]
    assert run_seconds["hashes"] is None
    assert all(run_seconds[stage] > 0 for stage in ("weights", "graph", "reference"))
    assert all(r["seconds"] > 0 and r["failures"] == [] for r in results)
    # Weights are placed while the graph is made; nothing else overlaps.
    one_after_the_other = run_seconds["graph"] + run_seconds["reference"] + sum(r["seconds"] for r in results)
    assert one_after_the_other <= run_seconds["total"]
    assert "Traceback" not in done.stderr
    return out


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_manifest_report_and_files_agree(target: str, release: Path, tiny_dir: Path) -> None:
    folder = release / target
    manifest, report = read_manifest(folder), read_report(folder)
    verify_files(folder, manifest)
    assert manifest.parity.report_sha256 == content_sha256(report)
    assert report.verdict.passed
    assert report.target == manifest.target == target
    others = {name: r.sha256 for name, r in manifest.files.items() if name not in RECORD_NAMES}
    assert report.binding.files == others
    assert report.binding.checkpoint == {name: r.sha256 for name, r in manifest.checkpoint.items()}
    for name in manifest.checkpoint:
        assert (folder / "weights" / name).read_bytes() == (tiny_dir / name).read_bytes()


def test_the_same_inputs_give_the_same_bytes(
    release: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    assert run(capsys, "-q", "--target", "ort-cpu", "--model", tiny_dir, "--output", out).code == 0
    once, again = read_manifest(release / "ort-cpu"), read_manifest(out)
    different = {name for name in once.files if once.files[name] != again.files[name]}
    assert different <= set(RECORD_NAMES)
    assert once.content_sha256 == again.content_sha256


def test_an_artifact_that_was_moved_validates(
    release: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    read_document: Callable[[str, str], dict[str, Any]],
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(release / "ort-cpu", folder)
    done = run(capsys, "validate", folder, "--json")
    assert done.code == 0, done.err
    document = read_document("validate", done.out)
    (result,), run_seconds = document["results"], document["run_seconds"]
    assert result["verdict"] == "pass"
    assert run_seconds["hashes"] > 0 and run_seconds["graph"] is None and run_seconds["weights"] is None
    assert run_seconds["hashes"] + run_seconds["reference"] + result["seconds"] <= run_seconds["total"]
    assert read_manifest(folder).content_sha256 == read_manifest(release / "ort-cpu").content_sha256


def test_one_wrong_byte_of_a_weight_is_found(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(release / "ort-cpu", folder)
    shard = folder / "weights" / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 0x10
    shard.write_bytes(data)
    done = run(capsys, "-q", "validate", folder)
    assert done.code == 44
    assert shard.name in done.err


def test_inspect(
    release: Path, capsys: pytest.CaptureFixture[str], read_document: Callable[[str, str], dict[str, Any]]
) -> None:
    done = run(capsys, "inspect", release / "onnx", "--json")
    found = read_document("inspect", done.out)
    assert found == json.loads((release / "onnx" / "manifest.json").read_text())
    assert found["parity"]["verdict"] == "pass"
    assert "verdict  pass (quick)" in run(capsys, "inspect", release / "onnx").out
    assert run(capsys, "inspect", release).code == 42


def test_both_targets_go_on_with_the_same_words(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [run(capsys, "-q", "generate", release / t, "--prompt", PROMPT).out for t in ("onnx", "ort-cpu")]
    assert texts[0] == texts[1]
    assert len(texts[0].split()) > 10


def test_generate_with_ids_and_without_a_tokenizer(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(release / "ort-cpu", folder)
    (folder / "tokenizer.json").unlink()
    ids = ["generate", folder, "--token-ids", "5,6,7", "--max-new-tokens", "5"]
    done = run(capsys, *ids)
    assert done.code == 0
    assert 1 <= len([int(token) for token in done.out.split()]) <= 5
    sampled = [run(capsys, *ids, "--temperature", "1.5", "--seed", seed).out for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert run(capsys, "generate", folder, "--prompt", "text").code == 46
    for wrong in ("5,x", "2048", "-1", ""):
        assert run(capsys, "generate", folder, "--token-ids", wrong).code == 60
    assert run(capsys, *ids[:4], "--max-new-tokens", "5000").code == 60


@pytest.mark.usefixtures("known_graph")
@pytest.mark.parametrize("mode", ["hardlink", "in-place"])
def test_the_other_ways_to_place_weights(
    mode: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_dir, source)
    out = source if mode == "in-place" else tmp_path / "release"
    args = ["--target", "ort-cpu", "--model", source, "--output", out, "--weights", mode, "--parity", "off"]
    done = run(capsys, *args)
    assert done.code == 0, done.err
    assert "NOT VALIDATED" in done.err
    shard = "model-00000-of-00002.safetensors"
    assert (out / read_manifest(out).weights_dir / shard).samefile(source / shard)
    text = run(capsys, "-q", "generate", out, "--prompt", PROMPT, "--max-new-tokens", "8").out
    assert len(text.split()) > 3
    assert run(capsys, *args).code == 40
    assert run(capsys, *args, "--force").code == 0


@pytest.mark.usefixtures("known_graph")
def test_force_replaces_only_when_the_new_artifact_is_complete(
    release: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "release"
    shutil.copytree(release / "ort-cpu", out)
    before = read_manifest(out)
    from gptoss_export.exporter import pipeline

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipeline, "make_yardstick", fail)
    args = ["--target", "ort-cpu", "--model", tiny_dir, "--output", out, "--force"]
    stopped = run(capsys, *args)
    assert stopped.code == 61
    assert "  kept: " in stopped.err
    assert read_manifest(out) == before
    verify_files(out, before)
    monkeypatch.undo()
    assert run(capsys, *args).code == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("layout", [Layout.ORIGINAL, Layout.HF_BF16])
def test_the_other_layouts(layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = SynthShape(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_experts=8,
        top_k=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        sliding_window=8,
        initial_context=64,
        rope_factor=4.0,
    )
    synthesize(tmp_path / "model", shape, layout=layout)
    args = ["--target", "ort-cpu", "--model", tmp_path / "model", "--output", tmp_path / "release"]
    done = run(capsys, *args)
    assert done.code == 0, done.err
    manifest = read_manifest(tmp_path / "release")
    assert (manifest.layout, manifest.parity.verdict) == (layout, "pass")
