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
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.config_record import config_from_record
from gptoss_export.exporter.checkpoint.files import one_line, read_capped, shown
from gptoss_export.exporter.checkpoint.json_reader import parse_json_object
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.clock import now
from gptoss_export.exporter.errors import ArtifactNotFoundError, IntegrityError, ManifestError
from gptoss_export.exporter.inside import AGAIN, is_plain_path, open_inside
from gptoss_export.exporter.origin import Origin, origin_from
from gptoss_export.exporter.progress import Progress
from gptoss_export.exporter.weights import FileRecord, WeightsMode, disk_errors, hash_files

MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
REPORT_NAMES = ("parity.json", "parity.md", "parity.html", "junit.xml")
PROVENANCE_NAME = "provenance.intoto.json"
SBOM_NAME = "sbom.cdx.json"
# Made of the artifact when it was finished: no report speaks of them, and no hash of its content holds them.
RECORD_NAMES = (*REPORT_NAMES, PROVENANCE_NAME, SBOM_NAME)
SIGNATURE_NAME = "model.sig"
SCHEMA_VERSION = 4
MAX_MANIFEST_BYTES = 4 << 20

Verdict = Literal["pass", "fail", "not executed", "not validated"]
_VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "not executed", "not validated")
_LONGEST_LINE = 4096
_MOST_FILES = 512  # all are open at once while they are hashed; gpt-oss-120b has some thirty
_NEXT_STEP = "export again; the manifest is not as it was written"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNKNOWN = Origin()
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
    8601, UTC. origin: what was asked for, what the checkpoint is called and where it came from.
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
    origin: Origin = _UNKNOWN

    @property
    def content_sha256(self) -> str:
        """Hash of everything but time: without created_at and the records, of which the report is in it by a
        hash of its own and the others follow from the manifest.
        """
        content = _to_dict(self)
        del content["created_at"]
        content["files"] = {k: v for k, v in _records(self.files).items() if k not in RECORD_NAMES}
        return hashlib.sha256(_canonical(content)).hexdigest()

    def with_parity(self, parity: ParityRecord, report_files: Mapping[str, FileRecord]) -> Manifest:
        """The same artifact after a validation, dated now."""
        others = {name: record for name, record in self.files.items() if name not in RECORD_NAMES}
        return replace(self, files=others | dict(report_files), parity=parity, created_at=now())

    def with_records(self, files: Mapping[str, FileRecord]) -> Manifest:
        """The same artifact with these records beside it, or in place of those of that name."""
        return replace(self, files=dict(self.files) | dict(files))


def manifest_as_json(manifest: Manifest) -> dict[str, object]:
    """What manifest.json holds."""
    return _to_dict(manifest) | {"content_sha256": manifest.content_sha256}


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one way in which this manifest is written."""
    return _canonical(manifest_as_json(manifest))


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes manifest.json beside its place, flushes it to the disk and renames it: the last write of an
    artifact.
    """
    partial = folder / f".{MANIFEST_NAME}.partial"
    with disk_errors(MANIFEST_NAME), partial.open("wb") as f:
        f.write(manifest_bytes(manifest))
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
        with open_inside(folder, MANIFEST_NAME) as f:
            data = read_capped(f, MAX_MANIFEST_BYTES)
    except IntegrityError as error:
        raise _malformed(error.what) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise _malformed(f"{path} has more than {MAX_MANIFEST_BYTES} bytes")
    raw = parse_json_object(data, str(path), ManifestError, next_step=_NEXT_STEP)
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

    Sizes are compared before anything is hashed, and no path may lead through a symbolic link.
    """
    root = folder.resolve()
    paths = {name: root / name for name in manifest.files if name not in skip}
    for name in paths:
        with open_inside(folder, name) as file:
            nbytes = os.fstat(file.fileno()).st_size
        if nbytes != manifest.files[name].nbytes:
            expected = manifest.files[name].nbytes
            raise IntegrityError(f"{folder / name} has {nbytes} bytes, the manifest says {expected}", AGAIN)
    for name, record in hash_files(paths, progress, "verify").items():
        if record != manifest.files[name]:
            raise IntegrityError(
                f"{folder / name} is not the file that was delivered: its sha256 is {record.sha256}, "
                f"the manifest says {manifest.files[name].sha256}",
                AGAIN,
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
        "origin": asdict(manifest.origin),
    }


def _malformed(problem: str) -> ManifestError:
    return ManifestError(problem, _NEXT_STEP)


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
        target=_line(raw.get("target")),
        engine=_line(raw.get("engine")),
        provider=_line(raw.get("provider")),
        notes=tuple(_line(note) for note in notes),
        layout=_checked("layout", lambda: Layout(raw.get("layout"))),
        model=_checked("model", lambda: config_from_record(_get(raw, "model", dict))),
        checkpoint=_file_records(_get(raw, "checkpoint", dict)),
        weights_mode=_checked("weights.mode", lambda: WeightsMode(weights.get("mode"))),
        weights_dir=_inside(_get(weights, "dir", str), allow_folder_itself=True),
        files=_file_records(_get(raw, "files", dict)),
        parity=ParityRecord(
            verdict,
            None if effort is None else _line(effort),
            None if report is None else _digest(_get(parity, "report_sha256", str)),
            tuple(_line(gate) for gate in _get(parity, "loosened", list)),
        ),
        created_at=_checked("created_at", lambda: datetime.fromisoformat(_get(raw, "created_at", str)).isoformat()),
        origin=_checked("origin", lambda: origin_from(_get(raw, "origin", dict))),
    )


def _get(raw: Mapping[str, object], name: str, kind: type[_T]) -> _T:
    value = raw.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _malformed(f"{one_line(name)} in the manifest is {shown(value)}, which is no {kind.__name__}")
    return value


def _checked(name: str, make: Callable[[], _T]) -> _T:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise _malformed(f"{name} in the manifest: {one_line(error)}") from error


def _text_map(raw: Mapping[str, object]) -> dict[str, str]:
    return {_line(name): _line(_get(raw, name, str)) for name in raw}


def _file_records(raw: Mapping[str, object]) -> dict[str, FileRecord]:
    records = {}
    if len(raw) > _MOST_FILES:
        raise _malformed(f"the manifest names {len(raw)} files, more than {_MOST_FILES}")
    for name in raw:
        entry = _get(raw, name, dict)
        nbytes = _get(entry, "nbytes", int)
        if nbytes < 0:
            raise _malformed(f"{shown(name)} has {nbytes} bytes in the manifest")
        records[_inside(name)] = FileRecord(nbytes, _digest(_get(entry, "sha256", str)))
    return records


def _line(text: object) -> str:
    """Text that is shown on terminals: one line, without escapes."""
    if not isinstance(text, str) or not text.isprintable() or len(text) > _LONGEST_LINE:
        raise _malformed(f"{shown(text)} in the manifest is no line of text")
    return text


def _digest(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise _malformed(f"{shown(text)} in the manifest is no sha256")
    return text


def _inside(name: str, allow_folder_itself: bool = False) -> str:
    """A path as it is written in a manifest: relative, normal, and naming nothing above its folder."""
    if not is_plain_path(name) and not (name == "." and allow_folder_itself):
        raise _malformed(f"the manifest names {shown(name)}, which is no path inside of the artifact")
    if name == MANIFEST_NAME:
        raise _malformed("the manifest names itself among its files")
    return name
