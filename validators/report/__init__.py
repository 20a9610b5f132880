"""The parity report: JSON is the truth, Markdown a view of it."""

from gptoss_export.validators.report.json_writer import content_sha256, to_json
from gptoss_export.validators.report.markdown import to_markdown
from gptoss_export.validators.report.reader import from_json
from gptoss_export.validators.report.schema import Outcome, ParityReport
from gptoss_export.validators.report.write import JSON_NAME, MARKDOWN_NAME, read_report, write_report

__all__ = [
    "JSON_NAME",
    "MARKDOWN_NAME",
    "Outcome",
    "ParityReport",
    "content_sha256",
    "from_json",
    "read_report",
    "to_json",
    "to_markdown",
    "write_report",
]
