"""Where a new report goes: into the artifact, or into a folder elsewhere.

    check_place(folder, None, drop_signature=False)     # a report may go into the artifact
    check_place(folder, output, drop_signature=False)   # or elsewhere, which changes nothing in the artifact
    write_elsewhere(report, output, folder)

Measuring takes minutes or hours: what can be refused is refused before it.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.artifact import MANIFEST_NAME, REPORT_NAMES, SIGNATURE_NAME
from gptoss_export.exporter.errors import AccessError, OutputExistsError, SignedError
from gptoss_export.exporter.output.journal import sync
from gptoss_export.exporter.output.swap import make_parents
from gptoss_export.exporter.weights import disk_errors

if TYPE_CHECKING:
    from gptoss_export.validators.report import ParityReport

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def check_place(folder: Path, output: Path | None, *, drop_signature: bool) -> None:
    """Raises what `check_elsewhere` raises; without an output, SignedError for an artifact whose signature would end,
    unless it may, and AccessError for one that cannot be written.
    """
    if output is not None:
        check_elsewhere(output, folder)
        return
    if not drop_signature and os.path.lexists(folder / SIGNATURE_NAME):
        raise SignedError(
            f"{folder} is signed, and a new verdict in it would make {SIGNATURE_NAME} a signature of other bytes",
            "have the report elsewhere with --output REPORT_DIR, or give the signature up with --drop-signature",
        )
    check_writable(folder, "have the report elsewhere with --output REPORT_DIR, which changes nothing in the artifact")


def check_elsewhere(output: Path, artifact: Path) -> None:
    """Raises OutputExistsError for a folder in the artifact, or with a report or an artifact in it; AccessError for one
    that cannot be written or made. artifact: where the report is about, whether or not it holds one.
    """
    place = _real(output)
    if (artifact / MANIFEST_NAME).exists() and place.is_relative_to(_real(artifact)):
        raise OutputExistsError(
            f"{output} is in the artifact, whose manifest names every file that may be there",
            "give an --output outside of it",
        )
    there = next((name for name in (MANIFEST_NAME, *REPORT_NAMES) if os.path.lexists(place / name)), None)
    if there is not None:
        raise OutputExistsError(f"{output / there} exists", "choose another --output, or remove what is there")
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    if not nearest.is_dir():
        raise OutputExistsError(f"{nearest} is a file", "choose another --output")
    check_writable(nearest, "choose another --output")


def write_elsewhere(report: ParityReport, output: Path, artifact: Path) -> None:
    """Writes the files of a report into `output`, which is made if need be; after an error nothing is left of them.

    A folder that was not there appears with all of them by one rename; into another each is renamed, complete.
    Raises what `check_elsewhere` raises.
    """
    from gptoss_export.validators.report import write_report

    check_elsewhere(output, artifact)
    place = _real(output)
    with disk_errors("the parity report"):
        if place.is_dir():
            try:
                write_report(report, place)
            except BaseException:
                for name in REPORT_NAMES:
                    (place / name).unlink(missing_ok=True)
                raise
            return
        made = make_parents(place.parent)
        beside = place.with_name(f".{place.name}.{secrets.token_hex(8)}.partial")
        try:
            beside.mkdir()
            write_report(report, beside)
            beside.rename(place)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            for parent in reversed(made):
                with suppress(OSError):
                    parent.rmdir()
            raise


def remove_signature(folder: Path) -> None:
    """On the disk before anything that the signature is of changes."""
    (folder / SIGNATURE_NAME).unlink(missing_ok=True)
    sync(folder)


def check_writable(folder: Path, next_step: str) -> None:
    """Raises AccessError where no file can be made in a folder; it is tried, since modes bind no root and say nothing
    of file systems.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        raise AccessError(f"{folder} cannot be written: {error.strerror}", next_step) from error


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
