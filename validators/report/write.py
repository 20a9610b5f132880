"""The report's files in a folder: parity.json and its views."""

from __future__ import annotations

from pathlib import Path

from gptoss_export.exporter.checkpoint.files import open_regular, read_capped
from gptoss_export.exporter.errors import CheckpointError, NotValidatedError
from gptoss_export.validators.report.html import to_html
from gptoss_export.validators.report.json_writer import to_json
from gptoss_export.validators.report.junit import to_junit
from gptoss_export.validators.report.markdown import to_markdown
from gptoss_export.validators.report.reader import from_json
from gptoss_export.validators.report.schema import ParityReport

JSON_NAME = "parity.json"
MARKDOWN_NAME = "parity.md"
HTML_NAME = "parity.html"
JUNIT_NAME = "junit.xml"
NAMES = (JSON_NAME, MARKDOWN_NAME, HTML_NAME, JUNIT_NAME)
LARGEST_REPORT = 64 << 20


def write_report(report: ParityReport, folder: Path) -> tuple[Path, ...]:
    """Writes the files of NAMES into an existing folder and returns their paths in that order.

    All are made and written beside their places before the first is renamed; that they appear together is up to the
    caller.
    """
    made = (to_json(report), to_markdown(report).encode(), to_html(report).encode(), to_junit(report))
    partials = [folder / f".{name}.partial" for name in NAMES]
    try:
        for partial, data in zip(partials, made, strict=True):
            partial.write_bytes(data)
        for partial, name in zip(partials, NAMES, strict=True):
            partial.replace(folder / name)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return tuple(folder / name for name in NAMES)


def read_report(place: Path) -> ParityReport:
    """The report at `place`, a folder with a parity.json or that file.

    Raises NotValidatedError when there is none, or none that can be vouched for.
    """
    path = place / JSON_NAME if place.is_dir() else place
    next_step = f"Run `gptoss-export validate {path.parent}`."
    try:
        with open_regular(path) as file:
            data = read_capped(file, LARGEST_REPORT)
    except (CheckpointError, OSError) as error:
        what = error.what if isinstance(error, CheckpointError) else f"{path}: {error.strerror}"
        raise NotValidatedError(f"no parity report: {what}", next_step) from error
    if len(data) > LARGEST_REPORT:
        raise NotValidatedError(f"{path} is too large for a parity report", next_step)
    return from_json(data)
