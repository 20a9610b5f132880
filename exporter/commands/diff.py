"""The command `diff`, which runs nothing: what changed between two reports."""

from __future__ import annotations

from pathlib import Path

import click

from gptoss_export.exporter.commands.report import open_report
from gptoss_export.exporter.commands.settings import Settings, common_options, json_option

_PLACE = click.Path(path_type=Path)


@click.command("diff")
@click.argument("old", metavar="OLD", type=_PLACE)
@click.argument("new", metavar="NEW", type=_PLACE)
@click.option("--all", "everything", is_flag=True, help="Every figure at every place, not only what changed.")
@click.option(
    "--tolerance",
    type=click.FloatRange(1, 1e6),
    default=1.5,
    show_default=True,
    metavar="F",
    help="Times that a figure may be as bad as before.",
)
@click.option("--allow-other-target", is_flag=True, help="Compare artifacts of two targets, each by its own gates.")
@json_option
@common_options
@click.pass_obj
def diff(
    settings: Settings, old: Path, new: Path, everything: bool, tolerance: float, allow_other_target: bool
) -> None:
    """Compare two artifacts, or two parity.json, of the same checkpoint and probes.

    Prints whether NEW is better, worse or the same, and what changed, worst first. A figure counts when more than 1 %
    of its limit is used and it is worse by more than --tolerance (squared for a maximum), a count when it is more
    than sampling explains (one in a thousand). Exits 53 when one is worse, when a gate is not kept any more or was
    loosened, or when something is not measured any more; 54 when they cannot be compared.

    \b
    Examples:
      gptoss-export diff ./release-1.0 ./release-1.1
      gptoss-export diff old/parity.json new/parity.json --tolerance 2 --json
      gptoss-export diff ./ort-cpu ./ort-cpu-int8 --allow-other-target --all
    """
    from gptoss_export.exporter.errors import RegressionError
    from gptoss_export.validators.diff import compare
    from gptoss_export.validators.diff_text import lines, verdict_line

    found = compare(open_report(old), open_report(new), tolerance=tolerance, allow_other_target=allow_other_target)
    if settings.as_json:
        from gptoss_export.exporter.commands.documents import compared

        settings.document = compared(found)
    else:
        for line in lines(found, everything=everything):
            click.echo(line)
    if found.regressed:
        # Gates, verdicts and what is missing are no matter of degree.
        only_figures = not (found.regressions or found.not_kept or found.of_kind("lost"))
        noise = ", or raise --tolerance if this is noise" if only_figures else ""
        raise RegressionError(
            f"{new} is worse than {old}: {verdict_line(found).partition(': ')[2]}",
            f"do not ship it; read {new} beside {old}{noise}",
        )
