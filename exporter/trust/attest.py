"""The records that a finished artifact gets before its manifest: provenance and bill of materials.

    manifest = attest(manifest, report, folder)
    write_manifest(manifest, folder)

Both follow from manifest and report alone, so that a reader can make them again and compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.artifact import PROVENANCE_NAME, SBOM_NAME, Manifest
from gptoss_export.exporter.trust.provenance import make_provenance
from gptoss_export.exporter.trust.sbom import make_sbom
from gptoss_export.exporter.weights import disk_errors, hash_files

if TYPE_CHECKING:
    from gptoss_export.validators.report import ParityReport


def attest(manifest: Manifest, report: ParityReport | None, folder: Path) -> Manifest:
    """Writes both records of a manifest that has its verdict, and gives the manifest that names them."""
    paths = {}
    for name, data in attestations(manifest, report).items():
        partial, paths[name] = folder / f".{name}.partial", folder / name
        with disk_errors(name):
            partial.write_bytes(data)
        partial.replace(paths[name])
    return manifest.with_records(hash_files(paths))


def attestations(manifest: Manifest, report: ParityReport | None) -> dict[str, bytes]:
    """The bytes of both records by name; whether the manifest names them already makes no difference."""
    return {PROVENANCE_NAME: make_provenance(manifest), SBOM_NAME: make_sbom(manifest, report)}
