"""What a report was measured with, and which bytes it speaks of."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from gptoss_export.validators.report.json_writer import content_sha256
from gptoss_export.validators.report.schema import ParityReport
from gptoss_export.validators.report.table import CELL, Section, Table
from gptoss_export.validators.report.text import one_line


def probes_section(report: ParityReport) -> Section:
    """The token sequences, and whether they are long enough to leave the window."""
    longest = max((probe.tokens for probe in report.probes), default=0)
    crossed = "is" if longest > report.sliding_window else "IS NOT"
    rows = [(one_line(probe.name, CELL), str(probe.tokens), probe.sha256) for probe in report.probes]
    lead = f"The sliding window of {report.sliding_window} positions {crossed} crossed."
    return Section("probes", "Probes", lead, (Table("", ("probe", "tokens", "sha256 of the ids"), rows),))


def setting_section(report: ParityReport) -> Section:
    """Engine, machine, versions and command line."""
    engine, machine = report.engine, report.machine
    ran = engine.execution if engine.ran_instead is None else f"{engine.execution}, by {engine.ran_instead}"
    rows = [
        ("reference", report.reference),
        ("engine", f"{engine.name} {engine.version}, {engine.provider}"),
        ("execution", ran),
        ("looked into with", report.evidence.looked_into or "the engine itself"),
        ("effort", report.effort),
        ("machine", f"{machine.platform}, {machine.cpu}, {machine.cores} cores"),
        *((name, value) for name, value in sorted(report.versions.items())),
        ("measured at", report.created_at),
    ]
    table = Table("", ("what", "which"), [(one_line(name, CELL), one_line(value, CELL)) for name, value in rows])
    command = ("command", one_line(shlex.join(report.command), 4 * CELL))
    return Section("setting", "Setting", "", (Table("", table.head, [*table.rows, command]),))


def binding_section(report: ParityReport) -> Section:
    """Hashes of the checkpoint, of the artifact and of the report itself."""
    lead = (
        f"Schema {report.schema_version}; sha256 of this report without its time stamp: {content_sha256(report)}. It "
        "speaks of these bytes and no others."
    )
    tables = [_hashes("checkpoint", report.binding.checkpoint), _hashes("artifact", report.binding.files)]
    if facts := report.binding.model.facts:
        rows = [(one_line(what, CELL), one_line(text, CELL)) for what, text in facts]
        tables.insert(0, Table("model", ("what", "which"), rows))
    return Section("binding", "Bound to", lead, tables)


def _hashes(caption: str, files: Mapping[str, str]) -> Table:
    rows = [(one_line(name, CELL), digest) for name, digest in sorted(files.items())]
    return Table(caption, ("file", "sha256"), rows)
