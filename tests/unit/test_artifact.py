"""The manifest: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.exporter.artifact import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    ParityRecord,
    artifact_folders,
    read_manifest,
    verify_files,
    write_manifest,
)
from gptoss_export.exporter.checkpoint.config import ModelConfig, YarnConfig
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.errors import ArtifactNotFoundError, IntegrityError, ManifestError
from gptoss_export.exporter.weights import FileRecord, WeightsMode, hash_files

MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=192,
    num_layers=2,
    num_experts=16,
    top_k=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    sliding_window=16,
    layer_types=("sliding_attention", "full_attention"),
    rms_norm_eps=1e-5,
    rope_theta=150000.0,
    yarn=YarnConfig(32.0, 32.0, 1.0, 4096, False),
    max_positions=4096,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
    eos_token_ids=(2041, 2040),
    pad_token_id=2040,
    bos_token_id=None,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A delivered folder with a manifest that is right."""
    out = tmp_path / "release"
    (out / "weights").mkdir(parents=True)
    for name in ("model.onnx", "weights/config.json", "weights/model.safetensors", "parity.json", "parity.md"):
        (out / name).write_text(f"content of {name}")
    write_manifest(manifest_of(out), out)
    return out


def manifest_of(out: Path) -> Manifest:
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    files = hash_files({name: out / name for name in names})
    return Manifest(
        versions={"gptoss-export": "0.1.0"},
        target="ort-cpu",
        engine="onnxruntime 1.31.1",
        provider="CPUExecutionProvider",
        notes=("a note",),
        layout=Layout.HF_MXFP4,
        model=MODEL,
        checkpoint={name.removeprefix("weights/"): r for name, r in files.items() if name.startswith("weights/")},
        weights_mode=WeightsMode.COPY,
        weights_dir="weights",
        files=files,
        parity=ParityRecord("pass", "quick", "0" * 64),
        created_at="2026-01-02T03:04:05+00:00",
    )


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    change(raw)
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))


def test_round_trip(folder: Path) -> None:
    assert read_manifest(folder) == manifest_of(folder)
    assert read_manifest(folder).model.layer_types == ("sliding_attention", "full_attention")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": replace(MODEL, yarn=None)},
        {"parity": ParityRecord("not validated")},
        {"parity": ParityRecord("not executed", "full", "2" * 64)},
        {"weights_dir": ".", "weights_mode": WeightsMode.IN_PLACE},
    ],
)
def test_round_trip_of_the_rarer_values(changes: dict[str, Any], folder: Path) -> None:
    manifest = replace(manifest_of(folder), **changes)
    write_manifest(manifest, folder)
    assert read_manifest(folder) == manifest


def test_same_content_same_bytes_whenever_it_was_made(folder: Path) -> None:
    manifest = manifest_of(folder)
    assert replace(manifest, created_at="2027-01-01T00:00:00+00:00").content_sha256 == manifest.content_sha256
    write_manifest(manifest, folder)
    once = (folder / MANIFEST_NAME).read_bytes()
    write_manifest(manifest, folder)
    assert (folder / MANIFEST_NAME).read_bytes() == once


def test_the_content_hash_covers_verdict_files_and_checkpoint(folder: Path) -> None:
    manifest, other = manifest_of(folder), FileRecord(1, "1" * 64)
    variants = [
        replace(manifest, parity=ParityRecord("fail", "quick", "0" * 64)),
        replace(manifest, parity=ParityRecord("pass", "quick", "1" * 64)),
        replace(manifest, files={**manifest.files, "model.onnx": other}),
        replace(manifest, checkpoint={**manifest.checkpoint, "config.json": other}),
        replace(manifest, target="onnx"),
    ]
    assert len({m.content_sha256 for m in (manifest, *variants)}) == len(variants) + 1


def test_a_report_that_says_the_same_later_has_the_same_hash(folder: Path) -> None:
    manifest = manifest_of(folder)
    again = manifest.with_parity(manifest.parity, {"parity.json": FileRecord(7, "7" * 64)})
    assert again.files["parity.json"] == FileRecord(7, "7" * 64)
    assert "parity.md" not in again.files
    assert again.content_sha256 == manifest.content_sha256


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError):
        read_manifest(tmp_path)
    with pytest.raises(ArtifactNotFoundError):
        read_manifest(tmp_path / "nothing")


def test_several_targets_are_named(folder: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match="release") as caught:
        read_manifest(folder.parent)
    assert str(folder) in caught.value.next_step
    assert artifact_folders(folder.parent) == [folder]
    assert artifact_folders(folder) == [folder]


@pytest.mark.parametrize("missing", ["effort", "report_sha256"])
def test_an_engine_that_was_not_executed_still_has_a_report(missing: str, folder: Path) -> None:
    write_manifest(replace(manifest_of(folder), parity=ParityRecord("not executed", "quick", "2" * 64)), folder)
    rewrite(folder, lambda raw: raw["parity"].update({missing: None}))
    with pytest.raises(ManifestError, match="does not agree with the report"):
        read_manifest(folder)


def test_an_edited_verdict_is_noticed(folder: Path) -> None:
    rewrite(folder, lambda raw: raw["parity"].update(verdict="fail"))
    with pytest.raises(IntegrityError, match="was edited"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "weights/../../secret",
        "./model.onnx",
        "weights//x",
        "",
        ".",
        "..",
        "a\\b",
        "a\nb",
        "manifest.json",
        "x" * 5000,
    ],
)
def test_names_that_are_no_path_inside(name: str, folder: Path) -> None:
    record = {"nbytes": 1, "sha256": "0" * 64}
    rewrite(folder, lambda raw: raw["files"].update({name: record}))
    with pytest.raises(ManifestError):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 1),
        (("schema_version",), "1"),
        (("schema_version",), None),
        (("target",), 7),
        (("notes",), "text"),
        (("layout",), "gguf"),
        (("layout",), []),
        (("weights",), []),
        (("weights", "mode"), "move"),
        (("weights", "dir"), "../weights"),
        (("weights", "dir"), "/weights"),
        (("files",), []),
        (("files", "model.onnx"), 1),
        (("files", "model.onnx", "nbytes"), -1),
        (("files", "model.onnx", "nbytes"), True),
        (("files", "model.onnx", "nbytes"), 1.5),
        (("files", "model.onnx", "sha256"), "0" * 63),
        (("files", "model.onnx", "sha256"), "G" * 64),
        (("checkpoint", "config.json", "sha256"), None),
        (("versions",), {"torch": 2}),
        (("model",), None),
        (("model", "vocab_size"), "2048"),
        (("model", "vocab_size"), True),
        (("model", "eos_token_ids"), ["x"]),
        (("model", "layer_types"), "full_attention"),
        (("model", "yarn"), {"factor": 1}),
        (("model", "rope_theta"), "big"),
        (("parity",), None),
        (("parity", "verdict"), "PASS"),
        (("parity", "verdict"), "not validated"),
        (("parity", "verdict"), "graph only"),
        (("parity", "effort"), None),
        (("parity", "report_sha256"), "abc"),
        (("parity", "loosened"), "max_kl_mean"),
        (("created_at",), "yesterday"),
        (("created_at",), 5),
    ],
)
def test_wrong_values(path: tuple[str, ...], value: object, folder: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    rewrite(folder, change)
    with pytest.raises(ManifestError):
        read_manifest(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"schema_version": 2, "schema_version": 2}',
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a": "' + b"x" * MAX_MANIFEST_BYTES + b'"}',
    ],
    ids=["empty", "list", "cut", "no-utf8", "twice", "nan", "deep", "large"],
)
def test_what_is_no_manifest(data: bytes, folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(ManifestError):
        read_manifest(folder)


def test_a_manifest_that_is_a_fifo_does_not_hang(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    os.mkfifo(folder / MANIFEST_NAME)
    with pytest.raises(ManifestError):
        read_manifest(folder)


def test_verify_accepts_what_was_delivered(folder: Path) -> None:
    verify_files(folder, read_manifest(folder))


def test_verify_notices_one_bit(folder: Path) -> None:
    path = folder / "weights" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="not the file that was delivered"):
        verify_files(folder, read_manifest(folder))
    verify_files(folder, read_manifest(folder), skip=("weights/model.safetensors",))


def test_verify_notices_sizes_and_absence(folder: Path) -> None:
    manifest = read_manifest(folder)
    with (folder / "model.onnx").open("ab") as f:
        f.write(b"!")
    with pytest.raises(IntegrityError, match="bytes"):
        verify_files(folder, manifest)
    (folder / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        verify_files(folder, manifest)


def test_verify_follows_no_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (folder / "model.onnx").rename(outside)
    (folder / "model.onnx").symlink_to(outside)
    with pytest.raises(IntegrityError, match="symbolic link"):
        verify_files(folder, read_manifest(folder))
