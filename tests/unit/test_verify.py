"""`verify`: one wrong bit anywhere, one file too many or too few, and papers that speak of something else."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss_export.engines.tensorrt.metadata import SCHEMA_VERSION, EngineInput, EngineMetadata
from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import (
    MANIFEST_NAME,
    PROVENANCE_NAME,
    RECORD_NAMES,
    REPORT_NAMES,
    SBOM_NAME,
    Manifest,
    ParityRecord,
    read_manifest,
    write_manifest,
)
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.clock import now
from gptoss_export.exporter.errors import IntegrityError, ManifestError, TimeStampError
from gptoss_export.exporter.measure import record
from gptoss_export.exporter.origin import ModelName, Origin, origin_from
from gptoss_export.exporter.planning.request import ExportRequest
from gptoss_export.exporter.trust.attest import attest
from gptoss_export.exporter.trust.origin_of import origin_of
from gptoss_export.exporter.trust.verify import verify_artifact
from gptoss_export.exporter.weights import FileRecord, WeightsMode, hash_files

REFUSED = (IntegrityError, ManifestError)


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def rewritten(delivered: Any, change: Callable[[Manifest], Manifest]) -> Path:
    """The artifact with another manifest that is right by its own hash, as a forger would write it."""
    write_manifest(change(read_manifest(delivered.folder)), delivered.folder)
    return delivered.folder


def test_what_was_delivered_is_verified(delivered: Any, unvalidated: Any) -> None:
    result = verify_artifact(delivered.folder)
    assert result.manifest == delivered.manifest
    names = ["manifest", "names", "hashes", "checkpoint", "parity", "provenance", "sbom"]
    assert [check.name for check in result.checks] == names
    assert "pass (quick)" in result.checks[4].found
    assert set(RECORD_NAMES) <= set(result.manifest.files)
    assert "NOT VALIDATED" in verify_artifact(unvalidated.folder).checks[4].found
    assert not set(REPORT_NAMES) & set(unvalidated.manifest.files)


def test_one_bit_in_any_file_is_refused_and_named(delivered: Any) -> None:
    folder = delivered.folder
    names = files_of(folder)
    assert len(names) == 7 + 1 + len(RECORD_NAMES) + 1
    for name in names:
        path = folder / name
        size = path.stat().st_size
        for position in (0, size // 2, size - 1):
            flip(path, position)
            with pytest.raises(REFUSED, match=name.replace(".", r"\.") if name != MANIFEST_NAME else "manifest"):
                verify_artifact(folder)
            flip(path, position)
    verify_artifact(folder)


def test_no_bit_of_the_manifest_is_free(delivered: Any) -> None:
    path = delivered.folder / MANIFEST_NAME
    for position in range(0, path.stat().st_size, 37):
        flip(path, position)
        with pytest.raises(REFUSED):
            verify_artifact(delivered.folder)
        flip(path, position)


def test_a_missing_file_is_refused(delivered: Any) -> None:
    for name in delivered.manifest.files:
        path = delivered.folder / name
        kept = path.rename(delivered.folder.parent / "kept")
        with pytest.raises(IntegrityError, match="missing"):
            verify_artifact(delivered.folder)
        kept.rename(path)


@pytest.mark.parametrize("name", ["extra.bin", "weights/extra.safetensors", ".hidden", "weights/.git", "parity.xml"])
def test_a_file_beside_the_listed_ones_is_refused(name: str, delivered: Any) -> None:
    (delivered.folder / name).touch()
    with pytest.raises(IntegrityError, match="not in the manifest"):
        verify_artifact(delivered.folder)


@pytest.mark.parametrize("name", ["other", "weights/other", "other/deeper"])
def test_a_folder_beside_the_listed_ones_is_refused(name: str, delivered: Any) -> None:
    (delivered.folder / name).mkdir(parents=True)
    with pytest.raises(IntegrityError, match="not in the manifest"):
        verify_artifact(delivered.folder)


def test_links_and_pipes_are_refused(delivered: Any) -> None:
    path, kept = delivered.folder / "model.onnx", delivered.folder.parent / "kept"
    path.rename(kept)
    path.symlink_to(kept)
    with pytest.raises(IntegrityError, match="symbolic link"):
        verify_artifact(delivered.folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(IntegrityError, match="no regular file"):
        verify_artifact(delivered.folder)
    path.unlink()
    kept.rename(path)
    (delivered.folder / "weights").rename(kept)
    (delivered.folder / "weights").symlink_to(kept)
    with pytest.raises(IntegrityError):
        verify_artifact(delivered.folder)


def test_a_manifest_with_more_than_its_hash_holds_is_refused(delivered: Any) -> None:
    path = delivered.folder / MANIFEST_NAME
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | {"approved_by": "nobody"}, indent=2, sort_keys=True) + "\n")
    assert read_manifest(delivered.folder) == delivered.manifest
    with pytest.raises(IntegrityError, match="holds more"):
        verify_artifact(delivered.folder)
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="not written as"):
        verify_artifact(delivered.folder)


def other_record(manifest: Manifest) -> Manifest:
    return replace(manifest, checkpoint=dict(manifest.checkpoint) | {"config.json": FileRecord(1, "0" * 64)})


def called(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, origin=replace(manifest.origin, model=replace(manifest.origin.model, **changes)))


FORGERIES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "another time": (lambda m: replace(m, created_at="2025-01-02T03:04:06+00:00"), "provenance"),
    "another commit": (lambda m: called(m, revision="0" * 40), "calls the model"),
    "another name": (lambda m: called(m, name="gpt-oss-20b"), "calls the model"),
    "another label": (lambda m: called(m, labels={"stage": "production"}), "calls the model"),
    "another licence": (lambda m: replace(m, origin=replace(m.origin, license="MIT")), "provenance"),
    "another option": (lambda m: replace(m, origin=replace(m.origin, options={"parity": "full"})), "provenance"),
    "another version": (lambda m: replace(m, versions={"gptoss-export": "9"}), "provenance"),
    "another note": (lambda m: replace(m, notes=("fast",)), "sbom"),
    "another target": (lambda m: replace(m, target="onnx"), "something else"),
    "another verdict": (lambda m: replace(m, parity=replace(m.parity, verdict="not executed")), "something else"),
    "another effort": (lambda m: replace(m, parity=replace(m.parity, effort="full")), "something else"),
    "another gate": (lambda m: replace(m, parity=replace(m.parity, loosened=("max_kl_mean",))), "something else"),
    "another report": (lambda m: replace(m, parity=replace(m.parity, report_sha256="1" * 64)), "not the one"),
    "no report": (lambda m: replace(m, parity=ParityRecord("not validated")), "names parity.json"),
    "another network": (lambda m: replace(m, model=replace(m.model, top_k=2)), "another network"),
    "another checkpoint": (other_record, "two minds"),
    "the signature named": (lambda m: m.with_records({"model.sig": FileRecord(0, "0" * 64)}), "signs it"),
    "an engine that is none": (lambda m: replace(m, target="trt-fp16"), r"names no engine\.plan"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_manifest_disagrees_with_its_records(case: str, delivered: Any) -> None:
    change, message = FORGERIES[case]
    with pytest.raises(IntegrityError, match=message):
        verify_artifact(rewritten(delivered, change))


@pytest.mark.parametrize("name", [PROVENANCE_NAME, SBOM_NAME, *REPORT_NAMES])
def test_a_record_that_is_not_listed_is_missed(name: str, delivered: Any) -> None:
    (delivered.folder / name).unlink()
    folder = rewritten(delivered, lambda m: replace(m, files={k: v for k, v in m.files.items() if k != name}))
    with pytest.raises(IntegrityError, match=r"names no|lacks a file"):
        verify_artifact(folder)


@pytest.mark.parametrize("name", [PROVENANCE_NAME, SBOM_NAME])
def test_a_record_that_was_edited_and_hashed_again_is_refused(name: str, delivered: Any) -> None:
    path = delivered.folder / name
    path.write_text(path.read_text().replace("Apache-2.0", "MIT"))
    with pytest.raises(IntegrityError, match="is not what follows"):
        verify_artifact(rewritten(delivered, lambda m: m.with_records(hash_files({name: path}))))


def test_a_report_about_another_artifact_is_refused(delivered: Any) -> None:
    (delivered.folder / "model.onnx").write_bytes(b"another graph")
    files = hash_files({"model.onnx": delivered.folder / "model.onnx"})
    manifest = attest(delivered.manifest.with_records(files), delivered.report, delivered.folder)
    with pytest.raises(IntegrityError, match="about another artifact"):
        verify_artifact(rewritten(delivered, lambda _: manifest))


def test_a_report_about_another_checkpoint_is_refused(delivered: Any) -> None:
    binding = replace(delivered.report.binding, checkpoint={"config.json": "0" * 64})
    report = replace(delivered.report, binding=binding)
    manifest = attest(record(report, delivered.manifest, delivered.folder), report, delivered.folder)
    with pytest.raises(IntegrityError, match="about another checkpoint"):
        verify_artifact(rewritten(delivered, lambda _: manifest))


def engine_json(**changes: Any) -> str:
    tensor = EngineInput("weights/model-00000-of-00002.safetensors", "U8", (16,), 0, 16)
    metadata = EngineMetadata(
        flavor="rtx",
        version="1.7.1.116",
        compute_capabilities=("8.6",),
        dtype="fp16",
        engine_weights="external",
        max_batch=4,
        max_prompt=64,
        max_context=128,
        max_logits=64,
        plugin=True,
        engine_sha256=hashlib.sha256(b"an engine").hexdigest(),
        inputs={"blocks": replace(tensor, **changes)},
    )
    return json.dumps({"schema_version": SCHEMA_VERSION} | asdict(metadata))


def test_an_engine_and_what_it_reads(with_engine: Callable[[str, bytes], Any]) -> None:
    result = verify_artifact(with_engine(engine_json(), b"an engine").folder)
    assert [check.found for check in result.checks if check.name == "engine"] == [
        "rtx 1.7.1.116, 1 inputs from these files"
    ]
    assert any("not executed" in check.found for check in result.checks)


def test_another_engine_is_refused(with_engine: Callable[[str, bytes], Any]) -> None:
    with pytest.raises(IntegrityError, match="about another engine"):
        verify_artifact(with_engine(engine_json(), b"another engine").folder)


@pytest.mark.parametrize("change", [{"file": "weights/other.safetensors"}, {"offset": 4_001_840}], ids=str)
def test_an_engine_that_reads_elsewhere_is_refused(
    change: dict[str, Any], with_engine: Callable[[str, bytes], Any]
) -> None:
    with pytest.raises(IntegrityError, match="not in the manifest, or beyond"):
        verify_artifact(with_engine(engine_json(**change), b"an engine").folder)


def test_an_artifact_around_its_checkpoint_shares_the_folder(delivered: Any) -> None:
    (delivered.folder / "README.md").write_text("of the checkpoint")
    (delivered.folder / "original").mkdir()
    manifest = replace(delivered.manifest, weights_mode=WeightsMode.IN_PLACE)
    rewritten(delivered, lambda _: attest(manifest, delivered.report, delivered.folder))
    assert "was not looked at" in verify_artifact(delivered.folder).checks[1].found


def test_the_command_prints_a_table_and_json(
    delivered: Any, capsys: pytest.CaptureFixture[str], read_document: Any
) -> None:
    assert cli.main(["verify", str(delivered.folder)]) == 0
    out = capsys.readouterr().out
    assert "sha256 of 14 files" in out
    assert out.splitlines()[-1].startswith("signature   none")
    assert cli.main(["verify", str(delivered.folder), "--json"]) == 0
    shown = read_document("verify", capsys.readouterr().out)
    assert (shown["verdict"], shown["signature_checked"]) == ("pass", False)
    assert shown["content_sha256"] == delivered.manifest.content_sha256
    flip(delivered.folder / "weights/config.json", 5)
    assert cli.main(["verify", str(delivered.folder), "--json"]) == IntegrityError.exit_code
    captured = capsys.readouterr()
    error = read_document("verify", captured.out)["error"]
    assert error["kind"] == "integrity"
    assert "config.json" in error["what"] and error["what"] in captured.err
    assert cli.main(["verify", str(delivered.folder), "--require-signature"]) == 2


def test_verifying_loads_no_torch(delivered: Any) -> None:
    code = (
        "import sys; from pathlib import Path; from gptoss_export.exporter.trust.verify import verify_artifact; "
        f"verify_artifact(Path({str(delivered.folder)!r})); "
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_clock_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert now() == "2023-11-14T22:13:20+00:00"
    for text in ("", "x", "-1", "1.5", " 1", "9" * 12, "1\n", "\u0661"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        with pytest.raises(TimeStampError):
            now()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert now() > "2026"


def test_origins_come_back_as_they_were_written(delivered: Any) -> None:
    options = {"a": 1, "b": 0.5, "c": True, "d": None, "e": "x", "f": ("8.6", "8.9"), "g": ()}
    origin = replace(delivered.manifest.origin, options=options)
    assert origin_from(json.loads(json.dumps(asdict(origin)))) == origin
    assert origin_from(asdict(Origin())) == Origin()


@pytest.mark.parametrize(
    "change",
    [
        {"license": "a\nb"},
        {"license": ""},
        {"license": 1},
        {"model": None},
        {"model": {"name": "x"}},
        {"more": 1},
        {"options": []},
        {"options": {"a": {}}},
        {"options": {"a": [1]}},
        {"options": {"a\n": 1}},
        {"options": {"a": "x" * 5000}},
        {"options": {str(k): k for k in range(300)}},
    ],
    ids=str,
)
def test_origins_that_none_wrote_are_refused(change: dict[str, object], delivered: Any) -> None:
    path = delivered.folder / MANIFEST_NAME
    raw = json.loads(path.read_bytes())
    raw["origin"] |= change
    path.write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match="origin"):
        read_manifest(delivered.folder)


def test_an_origin_names_no_folder(tiny: Checkpoint, tmp_path: Path) -> None:
    measure = SimpleNamespace(overrides={"max_kl_mean": 1}, prompts=tmp_path / "ours.txt")
    (tmp_path / "ours.txt").write_text("text")
    request = ExportRequest(str(tiny.root), tmp_path / "out", ("onnx", "ort-cpu"), measure=measure)  # type: ignore[arg-type]
    origin = origin_of(request, "onnx", tiny)
    assert (origin.model, origin.license) == (ModelName(), None)
    assert origin.options["gate.max_kl_mean"] == 1.0
    assert origin.options["prompts"] == "ours.txt"
    assert str(tmp_path) not in str(origin) and str(tiny.root) not in str(origin)
    assert "engine.max_batch" in origin_of(request, "trt-fp16", tiny).options


def test_the_licence_is_what_the_checkpoint_says(tiny: Checkpoint, tmp_path: Path) -> None:
    snapshot = tmp_path / "model"
    snapshot.mkdir()
    (snapshot / "LICENSE").write_text("  Apache License\n   Version 2.0, January 2004\n")
    request = ExportRequest("openai/gpt-oss-20b", tmp_path / "out", ("onnx",), parity="off")
    assert origin_of(request, "onnx", replace(tiny, root=snapshot)).license == "Apache-2.0"
    said = replace(tiny, root=snapshot, raw_config={"license": "cc-by-4.0"})
    assert origin_of(request, "onnx", said).license == "cc-by-4.0"
