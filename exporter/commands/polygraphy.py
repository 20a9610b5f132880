"""`polygraphy`: probes, the reference's logits and verdicts in the files of NVIDIA's Polygraphy, and its results in
ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from gptoss_export.exporter.commands.artifact import ARTIFACT
from gptoss_export.exporter.commands.report import echo_table, open_report
from gptoss_export.exporter.commands.settings import Settings, common_options, json_option

if TYPE_CHECKING:
    from gptoss_export.exporter.progress import Progress
    from gptoss_export.validators.metrics import Metrics
    from gptoss_export.validators.reference import Reference
    from gptoss_export.validators.report import ParityReport
    from gptoss_export.validators.verdict import Case

Effort = Literal["quick", "full"]

_EFFORT = click.option(
    "--parity",
    "effort",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="How many positions.",
)


@click.group("polygraphy")
def polygraphy() -> None:
    """Exchange inputs, logits and results with NVIDIA's Polygraphy."""


@polygraphy.command("export")
@ARTIFACT
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to make; must not exist."
)
@_EFFORT
@json_option
@common_options
@click.pass_obj
def export_files(settings: Settings, folder: Path, output: Path, effort: Effort) -> None:
    """Write probes, the reference's logits and our verdict on OUT for Polygraphy.

    \b
    Example:
      gptoss-export polygraphy export ./release --output ./exchange
      polygraphy run ./release/model.onnx --onnxrt --onnx-outputs logits \\
          --load-inputs ./exchange/inputs --load-outputs ./exchange/reference --atol 1e-4 --rtol 0
    """
    from gptoss_export.exporter.artifact import read_manifest
    from gptoss_export.exporter.commands.documents import Exchanged, document
    from gptoss_export.exporter.errors import TargetUnavailableError
    from gptoss_export.exporter.output.staging import staging
    from gptoss_export.validators.polygraphy_exchange import write_accuracy, write_inputs, write_reference

    manifest = read_manifest(folder)
    if manifest.target != "onnx":
        raise TargetUnavailableError(
            f"Polygraphy cannot feed the graph of {manifest.target}, whose cache and operators are its engine's own",
            "export the target onnx, which is the same model in standard operators, and name its folder",
        )
    report = _report_or_none(folder)
    with settings.working() as progress, staging(output) as made:
        reference = _reference(folder, effort, progress)
        write_inputs(reference.probes, manifest.model, made / "inputs")
        write_reference(reference, made / "reference")
        if report is not None:
            write_accuracy(report, made / "accuracy.json")
    following = (
        f"polygraphy run {folder / 'model.onnx'} --onnxrt --onnx-outputs logits "
        f"--load-inputs {output / 'inputs'} --load-outputs {output / 'reference'}"
    )
    if settings.as_json:
        settings.document = document(Exchanged(output, len(reference.probes), following))
        return
    click.echo(f"{output}: inputs and reference of {len(reference.probes)} probes")
    click.echo(f"next: {following}")


@polygraphy.command("import")
@ARTIFACT
@click.argument("results", metavar="RESULTS", type=click.Path(path_type=Path))
@_EFFORT
@json_option
@common_options
@click.pass_obj
def import_results(settings: Settings, folder: Path, results: Path, effort: Effort) -> None:
    """Hold the logits in RESULTS to the gates of the artifact in OUT.

    RESULTS is what `polygraphy run --save-outputs` wrote, a file or a folder, with the inputs of `polygraphy export`.
    Exits 50 when a gate is not kept. Nothing is written.
    """
    from gptoss_export.exporter.commands.documents import imported
    from gptoss_export.exporter.errors import ParityFailedError
    from gptoss_export.validators.polygraphy_exchange import measure_results
    from gptoss_export.validators.polygraphy_json import read_logits
    from gptoss_export.validators.report.text import number, one_line

    report = open_report(folder)
    with settings.working() as progress:
        metrics = measure_results(read_logits(results), _reference(folder, effort, progress))
    found = {f"polygraphy: {one_line(runner, 80)}": m for runner, m in metrics.items()}
    judged = [case for name, m in found.items() for case in _cases(name, m, report)]
    if settings.as_json:
        settings.document = imported(found, judged)
    else:
        rows = [(c.where, c.gate, number(c.measured), number(c.limit), "yes" if c.kept else "NO") for c in judged]
        echo_table([("where", "gate", "measured", "limit", "kept"), *rows])
    failed = next((case for case in judged if not case.kept), None)
    if failed is not None:
        raise ParityFailedError(
            f"{failed.gate} in {failed.where} is {number(failed.measured)}, limit {number(failed.limit)}",
            "read `polygraphy run` again for how the results were made; `gptoss-export validate` says where it starts",
        )


def _cases(name: str, m: Metrics, report: ParityReport) -> list[Case]:
    """The narrow gates, since nothing is known of where tokens went in this run."""
    from gptoss_export.validators.verdict import Case, distribution_cases

    agreement, least = m.top1_agreement, report.gates.min_top1_agreement
    kept = agreement is not None and agreement >= least
    top1 = Case(name, "min_top1_agreement", agreement, least, kept)
    return [*distribution_cases(name, m, report.gates), top1]


def _report_or_none(folder: Path) -> ParityReport | None:
    from gptoss_export.exporter.artifact import read_manifest

    return None if read_manifest(folder).parity.report_sha256 is None else open_report(folder)


def _reference(folder: Path, effort: Effort, progress: Progress) -> Reference:
    """The reference over the default probes, out of the cache where it is."""
    from gptoss_export.exporter.artifact import read_manifest
    from gptoss_export.exporter.checkpoint.open import check_scales, open_checkpoint
    from gptoss_export.validators.probes import default_probes
    from gptoss_export.validators.reference_cache import default_cache, reference_for

    manifest = read_manifest(folder)
    checkpoint = open_checkpoint(folder / manifest.weights_dir)
    check_scales(checkpoint)
    hashes = {name: record.sha256 for name, record in manifest.checkpoint.items()}
    probes = default_probes(checkpoint, effort)
    return reference_for(checkpoint, hashes, probes, "float32", cache=default_cache(), progress=progress)
