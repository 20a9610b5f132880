"""provenance.intoto.json: what an artifact was made of, by what, how, and how close it came.

    make_provenance(manifest)      # bytes; the same manifest gives the same

An in-toto statement, version 1 (https://github.com/in-toto/attestation/tree/main/spec/v1), with the predicate of
SLSA provenance, version 1 (https://slsa.dev/provenance/v1). It is not signed by itself: `gptoss-export sign` signs
it with everything else in the folder.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from urllib.parse import quote

from gptoss_export.exporter.artifact import RECORD_NAMES, REPORT_NAMES, Manifest
from gptoss_export.exporter.checkpoint.open import SIDE_FILES
from gptoss_export.exporter.origin import ModelName
from gptoss_export.exporter.weights import FileRecord

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:gptoss-export:build:v2"
"""externalParameters are `model` (its name, repository and revision of the Hub, and labels, as far as there are any)
and `options`, as the command line names them; internalParameters are the versions of the libraries that made this
artifact, the engine, the checkpoint's layout and licence.
"""
BUILDER_ID = "urn:gptoss-export:builder:v1"
"""The machine that ran the command, whoever owns it: this says nothing of how well it was isolated (SLSA level 1)."""


def make_provenance(manifest: Manifest) -> bytes:
    """The statement for a manifest that has its verdict and its report's files.

    Subjects are the artifact's files without the records that are made of them; the report's files are by-products,
    together with the verdict. finishedOn is the manifest's created_at: an export ends with a measurement, and one that
    is taken again later dates it anew.
    """
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [_named(name, record) for name, record in _sorted(manifest.files) if name not in RECORD_NAMES],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "model": asdict(manifest.origin.model),
                    "options": dict(manifest.origin.options),
                },
                "internalParameters": {
                    "versions": dict(manifest.versions),
                    "engine": manifest.engine,
                    "provider": manifest.provider,
                    "layout": manifest.layout.value,
                    "license": manifest.origin.license,
                },
                "resolvedDependencies": [_dependency(manifest, *item) for item in _sorted(manifest.checkpoint)],
            },
            "runDetails": {
                "builder": {"id": BUILDER_ID, "version": {"gptoss-export": _own_version(manifest)}},
                "metadata": {"finishedOn": manifest.created_at.replace("+00:00", "Z")},
                "byproducts": [
                    _verdict(manifest),
                    *(_named(name, manifest.files[name]) for name in REPORT_NAMES if name in manifest.files),
                ],
            },
        },
    }
    return (json.dumps(statement, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def hub_purl(repository: str, revision: str, file: str = "") -> str:
    """A package URL (https://github.com/package-url/purl-spec) of a repository on the Hub, or of a file in it."""
    return f"pkg:huggingface/{repository}@{revision}" + (f"#{quote(file)}" if file else "")


def _sorted(files: Mapping[str, FileRecord]) -> list[tuple[str, FileRecord]]:
    return sorted(files.items())


def _named(name: str, record: FileRecord) -> dict[str, object]:
    return {"name": name, "digest": {"sha256": record.sha256}}


def _dependency(manifest: Manifest, name: str, record: FileRecord) -> dict[str, object]:
    model, found = manifest.origin.model, _named(name, record)
    if model.repository is not None and model.revision is not None:
        found["uri"] = hub_purl(model.repository, model.revision, _in_repository(model, name))
    return found


def _in_repository(model: ModelName, name: str) -> str:
    """The path of a checkpoint's file; empty for a tokenizer's, which lies in original/ or beside it."""
    if model.subfolder is None:
        return name
    return "" if name in SIDE_FILES else f"{model.subfolder}/{name}"


def _own_version(manifest: Manifest) -> str:
    return manifest.versions.get("gptoss-export", "unknown")


def _verdict(manifest: Manifest) -> dict[str, object]:
    """The verdict as a resource of its own: its content is the manifest's parity record, and so are its annotations."""
    record = asdict(manifest.parity)
    content = json.dumps(record, sort_keys=True).encode("ascii")
    return {
        "name": "parity verdict",
        "mediaType": "application/json",
        "content": base64.b64encode(content).decode("ascii"),
        "annotations": record,
    }
