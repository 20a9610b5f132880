"""Is this folder the artifact that was delivered? Offline, without running anything of it.

    result = verify_artifact(folder)
    result.checks        # what was looked at, in order; anything wrong is an IntegrityError or a ManifestError

Whoever can write the folder can also write another manifest: that these files are the ones that somebody trusted
delivered, only a signature says (`signing`), or a content hash that came by another way.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.artifact import (
    MANIFEST_NAME,
    RECORD_NAMES,
    REPORT_NAMES,
    SIGNATURE_NAME,
    Manifest,
    manifest_bytes,
    read_manifest,
    verify_files,
)
from gptoss_export.exporter.checkpoint.files import shown
from gptoss_export.exporter.errors import CheckpointError, IntegrityError, NotValidatedError
from gptoss_export.exporter.inside import AGAIN, open_inside
from gptoss_export.exporter.progress import Progress, format_bytes
from gptoss_export.exporter.trust.attest import attestations
from gptoss_export.exporter.weights import WeightsMode

if TYPE_CHECKING:
    from gptoss_export.validators.report import ParityReport

_MOST_ENTRIES = 100_000


@dataclass(frozen=True)
class Check:
    """One thing that was looked at and found right; found: it in a few words."""

    name: str
    found: str


@dataclass(frozen=True)
class Verification:
    """An artifact that is what its manifest says. checks: in the order in which they were made.

    report: None where nothing was validated.
    """

    manifest: Manifest
    report: ParityReport | None
    checks: tuple[Check, ...]


def verify_artifact(folder: Path, progress: Progress | None = None) -> Verification:
    """Checks every hash, the manifest, and that report, provenance and bill of materials speak of these files.

    Raises ArtifactNotFoundError, ManifestError or IntegrityError for the first thing that is not as it was delivered.
    A verdict of `fail` is no error here: it is what was measured, and `policy.require_pass` says who may go on with it.
    """
    manifest = read_manifest(folder)
    checks = [
        _check_manifest(folder, manifest),
        _check_names(folder, manifest),
        _check_hashes(folder, manifest, progress),
        _check_checkpoint(folder, manifest),
    ]
    if (engine := _check_engine(folder, manifest)) is not None:
        checks.append(engine)
    report = _read_report(folder, manifest)
    checks += [_check_report(report, manifest), *_check_records(folder, manifest, report)]
    return Verification(manifest, report, tuple(checks))


def _wrong(what: str) -> IntegrityError:
    return IntegrityError(what, AGAIN)


def _check_manifest(folder: Path, manifest: Manifest) -> Check:
    """Read back and written again it is the same bytes: nothing is in it that its own hash leaves out."""
    expected = manifest_bytes(manifest)
    with open_inside(folder, MANIFEST_NAME) as file:
        same = file.read(len(expected) + 1) == expected
    if not same:
        raise _wrong(f"{folder / MANIFEST_NAME} is not written as this tool writes it, or holds more than it may")
    return Check("manifest", f"its own sha256 {manifest.content_sha256}")


def _check_names(folder: Path, manifest: Manifest) -> Check:
    """Plain files only, and none beside those of the manifest.

    An artifact that was written around a checkpoint shares its folder with whatever else lies there; that is passed
    over.
    """
    if SIGNATURE_NAME in manifest.files:
        raise _wrong(f"the manifest names {SIGNATURE_NAME}, which signs it")
    around = manifest.weights_mode is WeightsMode.IN_PLACE
    ours = {MANIFEST_NAME, SIGNATURE_NAME, *manifest.files}
    folders = {parent.as_posix() for name in manifest.files for parent in Path(name).parents}
    for name, mode in _tree(folder, folders):
        expected = folders if stat.S_ISDIR(mode) else ours
        if around and name not in ours | folders:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
            raise _wrong(f"{folder}: {shown(name)} is {kind}")
        if name not in expected:
            raise _wrong(f"{folder}: {shown(name)} is not in the manifest")
    beside = "what else lies beside them was not looked at" if around else "none beside them"
    return Check("names", f"{len(manifest.files)} files, {beside}, no links, no devices")


def _tree(folder: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """Name and mode of everything in the folder and in the known folders below; links are not followed."""
    waiting, count = [""], 0
    while waiting:
        prefix = waiting.pop()
        with os.scandir(folder / prefix) as entries:
            found = sorted((entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in entries)
        for name, mode in found:
            count += 1
            if count > _MOST_ENTRIES:
                raise _wrong(f"{folder} holds more than {_MOST_ENTRIES} files")
            yield f"{prefix}{name}", mode
            if stat.S_ISDIR(mode) and f"{prefix}{name}" in known:
                waiting.append(f"{prefix}{name}/")


def _check_hashes(folder: Path, manifest: Manifest, progress: Progress | None) -> Check:
    verify_files(folder, manifest, progress)
    total = sum(record.nbytes for record in manifest.files.values())
    return Check("hashes", f"sha256 of {len(manifest.files)} files, {format_bytes(total)}")


def _check_checkpoint(folder: Path, manifest: Manifest) -> Check:
    """The weights are the checkpoint's files, and describe the network of the manifest."""
    from gptoss_export.exporter.checkpoint.open import open_checkpoint

    prefix = "" if manifest.weights_dir == "." else f"{manifest.weights_dir}/"
    for name, record in manifest.checkpoint.items():
        if manifest.files.get(f"{prefix}{name}") != record:
            raise _wrong(f"the manifest has two minds about {shown(name)} of the checkpoint")
    try:
        checkpoint = open_checkpoint(folder / manifest.weights_dir)
    except CheckpointError as error:
        raise _wrong(f"the weights are no checkpoint any more: {error.what}") from error
    if (checkpoint.config, checkpoint.layout) != (manifest.model, manifest.layout):
        raise _wrong(f"{folder / manifest.weights_dir} describes another network than the manifest")
    unnamed = [path.name for path in checkpoint.weight_files if path.name not in manifest.checkpoint]
    if unnamed:
        raise _wrong(f"{shown(unnamed[0])} holds weights and is not in the manifest")
    return Check("checkpoint", f"{len(manifest.checkpoint)} files, {manifest.layout.value}, headers agree with config")


def _check_engine(folder: Path, manifest: Manifest) -> Check | None:
    """Only TensorRT's targets have one: engine.json is about this engine and reads files of this artifact."""
    if not manifest.target.startswith("trt-"):
        return None
    from gptoss_export.engines.tensorrt.metadata import ENGINE_NAME, METADATA_NAME, read_metadata

    for name in (ENGINE_NAME, METADATA_NAME):
        if name not in manifest.files:
            raise _wrong(f"the manifest of {manifest.target} names no {name}")
    metadata = read_metadata(folder)
    if metadata.engine_sha256 != manifest.files[ENGINE_NAME].sha256:
        raise _wrong(f"{folder / METADATA_NAME} is about another {ENGINE_NAME}")
    for entry in metadata.inputs.values():
        if entry.file not in manifest.files or entry.offset + entry.nbytes > manifest.files[entry.file].nbytes:
            raise _wrong(f"the engine reads {shown(entry.file)}, which is not in the manifest, or beyond its end")
    return Check("engine", f"{metadata.flavor} {metadata.version}, {len(metadata.inputs)} inputs from these files")


def _read_report(folder: Path, manifest: Manifest) -> ParityReport | None:
    from gptoss_export.validators.report import JSON_NAME, read_report

    there = [name for name in REPORT_NAMES if name in manifest.files]
    if manifest.parity.verdict == "not validated":
        if there:
            raise _wrong(f"the manifest says `not validated` and names {there[0]}")
        return None
    if len(there) != len(REPORT_NAMES):
        raise _wrong(f"the manifest says {manifest.parity.verdict!r} and lacks a file of the report")
    try:
        return read_report(folder / JSON_NAME)
    except NotValidatedError as error:
        raise _wrong(error.what) from error


def _check_report(report: ParityReport | None, manifest: Manifest) -> Check:
    """The report is the manifest's, about these bytes, and its verdict is the manifest's."""
    from gptoss_export.validators.report import content_sha256

    if report is None:
        return Check("parity", "NOT VALIDATED: nothing was compared with the model")
    parity = manifest.parity
    if content_sha256(report) != parity.report_sha256:
        raise _wrong("the parity report is not the one that the manifest names")
    said = (report.outcome, report.effort, report.loosened, report.target)
    if said != (parity.verdict, parity.effort, parity.loosened, manifest.target):
        raise _wrong("the parity report says something else than the manifest")
    if report.binding.checkpoint != {name: record.sha256 for name, record in manifest.checkpoint.items()}:
        raise _wrong("the parity report is about another checkpoint")
    artifact = {name: record.sha256 for name, record in manifest.files.items() if name not in RECORD_NAMES}
    if report.binding.files != artifact:
        raise _wrong("the parity report is about another artifact")
    if report.binding.model != manifest.origin.model:
        raise _wrong("the parity report calls the model something else than the manifest")
    loosened = f", gates LOOSENED: {', '.join(parity.loosened)}" if parity.loosened else ""
    return Check("parity", f"{parity.verdict} ({parity.effort}{loosened}), the report is about these bytes")


def _check_records(folder: Path, manifest: Manifest, report: ParityReport | None) -> list[Check]:
    """Provenance and bill of materials are made again and compared byte for byte."""
    checks = []
    for name, expected in attestations(manifest, report).items():
        if name not in manifest.files:
            raise _wrong(f"the manifest names no {name}")
        with open_inside(folder, name) as file:
            if file.read(len(expected) + 1) != expected:
                raise _wrong(f"{folder / name} is not what follows from manifest and report")
        checks.append(Check(name.split(".")[0], "follows from manifest and report, byte for byte"))
    return checks
