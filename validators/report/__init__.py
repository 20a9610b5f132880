"""The parity report: JSON is the truth; Markdown, HTML and JUnit are views of it."""

from gptoss_export.validators.report.html import to_html
from gptoss_export.validators.report.json_writer import content_sha256, to_json
from gptoss_export.validators.report.junit import to_junit
from gptoss_export.validators.report.markdown import to_markdown
from gptoss_export.validators.report.reader import from_json
from gptoss_export.validators.report.schema import Outcome, ParityReport
from gptoss_export.validators.report.write import (
    HTML_NAME,
    JSON_NAME,
    JUNIT_NAME,
    MARKDOWN_NAME,
    NAMES,
    read_report,
    write_report,
)

__all__ = [
    "HTML_NAME",
    "JSON_NAME",
    "JUNIT_NAME",
    "MARKDOWN_NAME",
    "NAMES",
    "Outcome",
    "ParityReport",
    "content_sha256",
    "from_json",
    "read_report",
    "to_html",
    "to_json",
    "to_junit",
    "to_markdown",
    "write_report",
]
