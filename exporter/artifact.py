"""The manifest of a delivered folder: what lies in it, what it was made from, and whether it was shown to be
the model.

    write_manifest(manifest, folder)
    manifest = read_manifest(folder)          # checked; the folder may come from anybody
    verify_files(folder, manifest)            # every byte is the one that was delivered

`manifest.json` is written last, so its presence means that the folder is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from gptoss_export.exporter.checkpoint.config import ModelConfig, YarnConfig
from gptoss_export.exporter.checkpoint.files import open_regular, shown
from gptoss_export.exporter.checkpoint.json_reader import parse_json_object
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.errors import (
    ArtifactNotFoundError,
    CheckpointError,
    IntegrityError,
    ManifestError,
)
from gptoss_export.exporter.progress import Progress
from gptoss_export.exporter.weights import FileRecord, WeightsMode, hash_files

MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
REPORT_NAMES = ("parity.json", "parity.md", "parity.html", "junit.xml")
SCHEMA_VERSION = 2
MAX_MANIFEST_BYTES = 4 << 20

Verdict = Literal["pass", "fail", "not executed", "not validated"]
_VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "not executed", "not validated")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class ParityRecord:
    """The verdict and what it rests on.

    not executed: the graph keeps its gates, and the engine that was built from it was never run. effort:
    `quick` or `full`; report_sha256: the report's hash without its time stamp. Both are None exactly when
    nothing was validated. loosened: gates that were set to let more pass than the target's own.
    """

    verdict: Verdict
    effort: str | None = None
    report_sha256: str | None = None
    loosened: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """One artifact, described.

    versions: of this tool and of the libraries that made the artifact. checkpoint: the files of the
    checkpoint by name, config.json among them. weights_dir: the checkpoint folder inside the artifact, `.`
    for the artifact's own.
    files: every file of the artifact by its path, the weights and the parity report included. created_at: ISO
    8601, UTC.
    """

    versions: Mapping[str, str]
    target: str
    engine: str
    provider: str
    notes: tuple[str, ...]
    layout: Layout
    model: ModelConfig
    checkpoint: Mapping[str, FileRecord]
    weights_mode: WeightsMode
    weights_dir: str
    files: Mapping[str, FileRecord]
    parity: ParityRecord
    created_at: str

    @property
    def content_sha256(self) -> str:
        """Hash of everything but time: without created_at, and with the report's own hash in place of its
        files'.
        """
        content = _to_dict(self)
        del content["created_at"]
        content["files"] = {k: v for k, v in _records(self.files).items() if k not in REPORT_NAMES}
        return hashlib.sha256(_canonical(content)).hexdigest()

    def with_parity(self, parity: ParityRecord, report_files: Mapping[str, FileRecord]) -> Manifest:
        """The same artifact after a validation, dated now."""
        others = {name: record for name, record in self.files.items() if name not in REPORT_NAMES}
        return replace(self, files=others | dict(report_files), parity=parity, created_at=now())


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest_as_json(manifest: Manifest) -> dict[str, object]:
    """What manifest.json holds."""
    return _to_dict(manifest) | {"content_sha256": manifest.content_sha256}


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes manifest.json beside its place, flushes it to the disk and renames it: the last write of an
    artifact.
    """
    partial = folder / f".{MANIFEST_NAME}.partial"
    with partial.open("wb") as f:
        f.write(_canonical(manifest_as_json(manifest)))
        f.flush()
        os.fsync(f.fileno())
    partial.replace(folder / MANIFEST_NAME)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`, every field checked.

    Raises ArtifactNotFoundError when there is none, ManifestError for one that is malformed, of another
    version or naming files outside of the folder, IntegrityError for one that was edited.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise _no_artifact(folder)
    try:
        with open_regular(path) as f:
            data = f.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise _malformed(f"{path} has more than {MAX_MANIFEST_BYTES} bytes")
        raw = parse_json_object(data, str(path), CheckpointError)
    except CheckpointError as error:
        raise _malformed(error.what) from error
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema version {shown(raw.get('schema_version'))}; this tool reads {SCHEMA_VERSION}",
            "use the version of gptoss-export that made the artifact, or export again",
        )
    manifest = _from_dict(raw)
    if raw.get("content_sha256") != manifest.content_sha256:
        raise IntegrityError(
            f"{path} was edited: its content is not what content_sha256 says",
            "export again, or restore the file",
        )
    return manifest


def verify_files(
    folder: Path, manifest: Manifest, progress: Progress | None = None, skip: tuple[str, ...] = ()
) -> None:
    """Hashes every file that the manifest names, but those in `skip`; raises IntegrityError for the first
    that differs.

    Sizes are compared before anything is hashed, and no path may lead out of the folder by a symbolic link.
    """
    root = folder.resolve()
    paths = {name: root / name for name in manifest.files if name not in skip}
    again = "export again, or copy the artifact again from where it was made"
    for name, path in paths.items():
        if not path.is_file():
            raise IntegrityError(f"{folder / name} is missing", again)
        if not path.resolve().is_relative_to(root):
            raise IntegrityError(f"{folder / name} is a link that leads out of the artifact", again)
        if path.stat().st_size != manifest.files[name].nbytes:
            expected = manifest.files[name].nbytes
            raise IntegrityError(
                f"{folder / name} has {path.stat().st_size} bytes, the manifest says {expected}", again
            )
    for name, record in hash_files(paths, progress, "verify").items():
        if record != manifest.files[name]:
            raise IntegrityError(
                f"{folder / name} is not the file that was delivered: its sha256 is {record.sha256}, "
                f"the manifest says {manifest.files[name].sha256}",
                again,
            )


def artifact_folders(output: Path) -> list[Path]:
    """The artifacts in a folder that an export wrote: itself, or one folder a target."""
    if (output / MANIFEST_NAME).is_file():
        return [output]
    if not output.is_dir():
        return []
    return sorted(child for child in output.iterdir() if (child / MANIFEST_NAME).is_file())


def _no_artifact(folder: Path) -> ArtifactNotFoundError:
    if children := artifact_folders(folder):
        names = ", ".join(child.name for child in children)
        return ArtifactNotFoundError(
            f"{folder} holds an artifact for each of: {names}", f"name one of them: {children[0]}"
        )
    what = f"{folder} is no complete artifact: it has no {MANIFEST_NAME}"
    return ArtifactNotFoundError(what, "give the --output folder of an export that ended well")


def _canonical(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def _records(records: Mapping[str, FileRecord]) -> dict[str, object]:
    return {name: asdict(record) for name, record in records.items()}


def _to_dict(manifest: Manifest) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": dict(manifest.versions),
        "target": manifest.target,
        "engine": manifest.engine,
        "provider": manifest.provider,
        "notes": list(manifest.notes),
        "layout": manifest.layout.value,
        "model": asdict(manifest.model),
        "checkpoint": _records(manifest.checkpoint),
        "weights": {"mode": manifest.weights_mode.value, "dir": manifest.weights_dir},
        "files": _records(manifest.files),
        "parity": asdict(manifest.parity),
        "created_at": manifest.created_at,
    }


def _malformed(problem: str) -> ManifestError:
    return ManifestError(problem, "export again; the manifest is not as it was written")


def _from_dict(raw: Mapping[str, object]) -> Manifest:
    weights = _get(raw, "weights", dict)
    parity = _get(raw, "parity", dict)
    notes = _get(raw, "notes", list)
    verdict = next((v for v in _VERDICTS if v == parity.get("verdict")), None)
    if verdict is None:
        raise _malformed(f"the verdict {shown(parity.get('verdict'))} is none of {', '.join(_VERDICTS)}")
    effort, report = parity.get("effort"), parity.get("report_sha256")
    if (verdict == "not validated") != (effort is None) or (effort is None) != (report is None):
        raise _malformed(f"the verdict {verdict!r} does not agree with the report that it names")
    return Manifest(
        versions=_text_map(_get(raw, "versions", dict)),
        target=_get(raw, "target", str),
        engine=_get(raw, "engine", str),
        provider=_get(raw, "provider", str),
        notes=tuple(str(note) for note in notes),
        layout=_checked("layout", lambda: Layout(raw.get("layout"))),
        model=_model_config(_get(raw, "model", dict)),
        checkpoint=_file_records(_get(raw, "checkpoint", dict)),
        weights_mode=_checked("weights.mode", lambda: WeightsMode(weights.get("mode"))),
        weights_dir=_inside(_get(weights, "dir", str), allow_folder_itself=True),
        files=_file_records(_get(raw, "files", dict)),
        parity=ParityRecord(
            verdict,
            None if effort is None else _get(parity, "effort", str),
            None if report is None else _digest(_get(parity, "report_sha256", str)),
            tuple(str(gate) for gate in _get(parity, "loosened", list)),
        ),
        created_at=_checked("created_at", lambda: datetime.fromisoformat(_get(raw, "created_at", str)).isoformat()),
    )


def _get(raw: Mapping[str, object], name: str, kind: type[_T]) -> _T:
    value = raw.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _malformed(f"{name} in the manifest is {shown(value)}, which is no {kind.__name__}")
    return value


def _checked(name: str, make: Callable[[], _T]) -> _T:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise _malformed(f"{name} in the manifest: {error}") from error


def _text_map(raw: Mapping[str, object]) -> dict[str, str]:
    return {name: _get(raw, name, str) for name in raw}


def _file_records(raw: Mapping[str, object]) -> dict[str, FileRecord]:
    records = {}
    for name in raw:
        entry = _get(raw, name, dict)
        nbytes = _get(entry, "nbytes", int)
        if nbytes < 0:
            raise _malformed(f"{shown(name)} has {nbytes} bytes in the manifest")
        records[_inside(name)] = FileRecord(nbytes, _digest(_get(entry, "sha256", str)))
    return records


def _digest(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise _malformed(f"{shown(text)} in the manifest is no sha256")
    return text


def _inside(name: str, allow_folder_itself: bool = False) -> str:
    """A path as it is written in a manifest: relative, normal, and naming nothing above its folder."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and len(name) < 4096 and str(path) == name
    if not plain or path.is_absolute() or ".." in path.parts or (name == "." and not allow_folder_itself):
        raise _malformed(f"the manifest names {shown(name)}, which is no path inside of the artifact")
    if name == MANIFEST_NAME:
        raise _malformed("the manifest names itself among its files")
    return name


def _model_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig as `asdict` wrote it; types are checked, and values only as far as a runner relies on
    them.
    """
    yarn_raw = raw.get("yarn")
    yarn = YarnConfig(**_typed_fields(YarnConfig, _get(raw, "yarn", dict))) if yarn_raw is not None else None
    return ModelConfig(**_typed_fields(ModelConfig, raw), yarn=yarn)


def _typed_fields(kind: type, raw: Mapping[str, object]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(kind):
        name, hint = field.name, field.type
        if name == "yarn":
            continue
        if hint == "float":
            value = raw.get(name)
            values[name] = float(_get(raw, name, int)) if isinstance(value, int) else _get(raw, name, float)
        elif hint == "int | None" and raw.get(name) is None:
            values[name] = None
        elif hint == "bool":
            values[name] = _get(raw, name, bool)
        elif hint.startswith("tuple"):
            item = str if name == "layer_types" else int
            values[name] = tuple(_get({name: entry}, name, item) for entry in _get(raw, name, list))
        else:
            values[name] = _get(raw, name, int)
    return values
