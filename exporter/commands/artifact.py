"""Commands on what was delivered, and on what can be: `targets`, `inspect`, `validate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from gptoss_export.exporter.commands.engine import allow_unexecuted_option
from gptoss_export.exporter.commands.gates import gate_option
from gptoss_export.exporter.commands.settings import (
    Settings,
    common_options,
    json_option,
    prompts_option,
    threads_option,
)

ARTIFACT = click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))


@click.command("targets")
@json_option
@common_options
@click.pass_obj
def targets(settings: Settings) -> None:
    """List what this version can export for, and whether this host can."""
    from gptoss_export.engines.targets import TARGETS
    from gptoss_export.exporter.commands.documents import Targets, TargetState, document
    from gptoss_export.exporter.errors import TargetUnavailableError

    rows = []
    for target in TARGETS.values():
        missing = None
        try:
            target.check_available()
        except TargetUnavailableError as error:
            missing = f"{error.what}; {error.next_step}"
        rows.append(TargetState(target.name, target.engine, target.summary, missing))
    if settings.as_json:
        settings.document = document(Targets(tuple(rows)))
        return
    for row in rows:
        state = "" if row.missing is None else f" [not here: {row.missing}]"
        click.echo(f"{row.name:<14} {row.summary}{state}")


@click.command("inspect")
@ARTIFACT
@json_option
@common_options
@click.pass_obj
def inspect(settings: Settings, folder: Path) -> None:
    """Show what the artifact in OUT is, from its manifest alone."""
    from gptoss_export.exporter.artifact import manifest_as_json, read_manifest
    from gptoss_export.exporter.commands.show import echo_manifest
    from gptoss_export.exporter.output.staging import recover

    recover(folder)
    manifest = read_manifest(folder)
    if settings.as_json:
        settings.document = manifest_as_json(manifest)
    else:
        echo_manifest(manifest)


@click.command("validate")
@ARTIFACT
@click.option(
    "--parity", type=click.Choice(["quick", "full"]), default="quick", show_default=True, help="How many positions."
)
@click.option("--bisect", "bisection", is_flag=True, help="Name the operation in layers that are beyond their gate.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write the report into, instead of the artifact, which then stays as it is.",
)
@click.option("--drop-signature", is_flag=True, help="Remove model.sig: a new verdict ends what it signs.")
@prompts_option
@gate_option
@allow_unexecuted_option
@threads_option
@json_option
@common_options
@click.pass_obj
def validate(
    settings: Settings,
    folder: Path,
    parity: str,
    bisection: bool,
    output: Path | None,
    drop_signature: bool,
    prompts: Path | None,
    gates: Mapping[str, float],
    allow_unexecuted: bool,
    threads: int | None,
) -> None:
    """Check every hash of the artifact in OUT and measure its parity anew.

    Rewrites its parity report and the verdict in its manifest, which a signature does not survive: a signed artifact
    is refused, exit code 49, without --output or --drop-signature. Exits 50 when the artifact is not the model, 52
    when its engine could not be run here.

    \b
    Examples:
      gptoss-export validate ./release --parity full
      gptoss-export validate ./release --bisect
      gptoss-export validate ./release --output ./report
      gptoss-export validate ./release --prompts ours.jsonl --gate max-kl-mean=1e-9
    """
    from gptoss_export.exporter.commands import documents
    from gptoss_export.exporter.commands.show import echo_result
    from gptoss_export.exporter.pipeline import MeasureOptions, require_pass, validate_artifact

    if output is not None and drop_signature:
        raise click.UsageError("--output changes nothing in the artifact, and --drop-signature would")
    options = MeasureOptions(prompts=prompts, overrides=gates, bisection=bisection)
    with settings.working() as progress:
        result = validate_artifact(
            folder,
            "full" if parity == "full" else "quick",
            options=options,
            output=output,
            drop_signature=drop_signature,
            threads=threads,
            progress=progress,
        )
    if settings.as_json:
        settings.document = documents.delivered([result])
    else:
        echo_result(result)
    require_pass([result], allow_unexecuted=allow_unexecuted)
