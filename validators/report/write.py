"""The report's files in the artifact's folder."""

from __future__ import annotations

from pathlib import Path

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.report.json_writer import to_json
from gptoss_export.validators.report.markdown import to_markdown
from gptoss_export.validators.report.reader import from_json
from gptoss_export.validators.report.schema import ParityReport

JSON_NAME = "parity.json"
MARKDOWN_NAME = "parity.md"
LARGEST_REPORT = 64 << 20


def write_report(report: ParityReport, folder: Path) -> tuple[Path, Path]:
    """Writes parity.json and parity.md into an existing folder and returns their paths.

    Each file is written beside its place and renamed; that both appear together is up to the caller.
    """
    written = []
    for name, data in ((JSON_NAME, to_json(report)), (MARKDOWN_NAME, to_markdown(report).encode())):
        path = folder / name
        partial = folder / f".{name}.partial"
        partial.write_bytes(data)
        partial.replace(path)
        written.append(path)
    return written[0], written[1]


def read_report(folder: Path) -> ParityReport:
    """The report in the folder. Raises NotValidatedError when there is none, or none that can be vouched
    for."""
    path = folder / JSON_NAME
    next_step = f"Run `gptoss-export validate {folder}`."
    try:
        if path.stat().st_size > LARGEST_REPORT:
            raise NotValidatedError(f"{path} is too large for a parity report", next_step)
        data = path.read_bytes()
    except OSError as error:
        raise NotValidatedError(f"no parity report at {path}: {error.strerror}", next_step) from error
    return from_json(data)
