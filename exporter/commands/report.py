"""The command `report`, which runs nothing: another verdict on what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptoss_export.exporter.commands.engine import allow_unexecuted_option
from gptoss_export.exporter.commands.gates import gate_option
from gptoss_export.exporter.commands.settings import Settings, common_options, json_option

if TYPE_CHECKING:
    from gptoss_export.validators.report import ParityReport

_PLACE = click.Path(path_type=Path)


@click.command("report")
@click.argument("place", metavar="OUT", type=_PLACE)
@gate_option
@click.option(
    "--output", type=_PLACE, metavar="DIR", help="Folder to write parity.json, parity.md, parity.html, junit.xml into."
)
@allow_unexecuted_option
@json_option
@common_options
@click.pass_obj
def report(
    settings: Settings, place: Path, gates: Mapping[str, float], output: Path | None, allow_unexecuted: bool
) -> None:
    """Take the verdict on the artifact in OUT, or on a parity.json, again from what was measured.

    Runs nothing and never changes the artifact. Exits 50 when a gate is not kept, 52 when only the graph was run.

    \b
    Examples:
      gptoss-export report ./release
      gptoss-export report ./release --gate max-kl-mean=1e-9
      gptoss-export report ./release/parity.json --gate max-kl-mean=1e-3 --output ./views
    """
    from gptoss_export.exporter.output.report_place import write_elsewhere
    from gptoss_export.validators.report.again import judged_again

    found = judged_again(open_report(place), gates)
    if output is not None:
        write_elsewhere(found, output, place if place.is_dir() else place.parent)
    if settings.as_json:
        from gptoss_export.exporter.commands.documents import judged

        settings.document = judged(found)
    else:
        _echo_report(found)
    _require_pass(found, place, allow_unexecuted)


def open_report(place: Path) -> ParityReport:
    """The report at `place`, an artifact's folder, any folder with a parity.json, or that file.

    Raises ArtifactNotFoundError where nothing is, NotValidatedError when there is none that can be vouched for,
    IntegrityError for one that is not the artifact's.
    """
    from gptoss_export.exporter.artifact import MANIFEST_NAME, read_manifest
    from gptoss_export.exporter.errors import ArtifactNotFoundError, IntegrityError, NotValidatedError
    from gptoss_export.validators.report import content_sha256, read_report

    if not place.exists():
        raise ArtifactNotFoundError(f"{place} is not there", "give the folder of an artifact, or a parity.json")
    if not (place / MANIFEST_NAME).is_file():
        return read_report(place)
    recorded = read_manifest(place).parity.report_sha256
    if recorded is None:
        raise NotValidatedError(f"{place} was never validated", f"run `gptoss-export validate {place}`")
    found = read_report(place)
    if content_sha256(found) != recorded:
        raise IntegrityError(
            f"the parity report in {place} is not the one that the manifest names",
            f"run `gptoss-export validate {place}`",
        )
    return found


def _require_pass(found: ParityReport, place: Path, allow_unexecuted: bool) -> None:
    from gptoss_export.exporter.errors import NotExecutedError, ParityFailedError
    from gptoss_export.validators.report.text import failure_text, one_line

    target = one_line(found.target, 80)
    if found.outcome == "fail":
        raise ParityFailedError(
            f"{target} is not the model by these gates: {failure_text(found.verdict.failures[0])}",
            "do not ship it; the report's other sections say where it starts",
        )
    if found.outcome == "not executed" and not allow_unexecuted:
        raise NotExecutedError(
            f"{target} was built and not executed; its graph keeps the gates",
            f"run `gptoss-export validate {place}` on a host that can run it, or accept it with --allow-unexecuted",
        )


def _echo_report(found: ParityReport) -> None:
    from gptoss_export.validators.report.gate_table import gates_section
    from gptoss_export.validators.report.text import verdict_sentence, verdict_word

    click.echo(f"{verdict_word(found)}: {verdict_sentence(found)}")
    if found.bisection is not None:
        from gptoss_export.validators.report.text import one_line

        click.echo(one_line(found.bisection.sentence, 400))
    table = gates_section(found).tables[0]
    click.echo()
    echo_table([table.head, *table.rows])


def echo_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells in columns; the first is the head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
