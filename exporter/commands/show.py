"""How plans, results and artifacts look to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gptoss_export.exporter.progress import format_bytes, format_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_export.exporter.artifact import Manifest
    from gptoss_export.exporter.origin import ModelName
    from gptoss_export.exporter.pipeline import ExportResult
    from gptoss_export.exporter.planning.plan import Plan


def echo_plan(plan: Plan) -> None:
    """The plan for people."""
    for number, step in enumerate(plan.steps, 1):
        click.echo(f"{number}. {step}")
    click.echo("files:")
    for name, path in plan.checkpoint_files.items():
        click.echo(f"  {plan.weights_dir}/{name}  {format_bytes(path.stat().st_size)}")
    for target, folder in plan.folders.items():
        click.echo(f"artifact: {folder} ({target})")
    for line in plan.preflight.lines():
        click.echo(line)


def echo_result(result: ExportResult) -> None:
    """One artifact and its verdict for people."""
    click.echo(f"{result.summary}, {format_bytes(artifact_bytes(result.manifest))}, {format_seconds(result.seconds)}")
    if result.report is not None and result.report.bisection is not None:
        click.echo(result.report.bisection.sentence)
    if result.report_folder is not None:
        click.echo(f"report in {result.report_folder}; the artifact was not changed")


def warn_unless_clean(folder: Path, manifest: Manifest) -> None:
    """One line on stderr about an artifact whose verdict is no clean pass; nothing about another."""
    from gptoss_export.exporter.trust.policy import in_words

    if words := in_words(manifest.parity):
        click.echo(f"warning: {folder}: {words}", err=True)


def echo_manifest(manifest: Manifest) -> None:
    """What `inspect` shows."""
    model, parity = manifest.model, manifest.parity
    rows = [
        ("target", f"{manifest.target} ({manifest.engine}, {manifest.provider})"),
        ("verdict", parity.verdict if parity.effort is None else f"{parity.verdict} ({parity.effort})"),
        *([("gates", f"loosened: {', '.join(parity.loosened)}")] if parity.loosened else ()),
        (
            "model",
            f"{model.num_layers} layers, {model.num_experts} experts (top {model.top_k}), hidden {model.hidden_size}, "
            f"vocabulary {model.vocab_size}, context {model.max_positions}",
        ),
        *_called(manifest.origin.model),
        ("layout", manifest.layout.value),
        ("weights", f"{manifest.weights_mode.value}, in {manifest.weights_dir}/"),
        ("size", f"{len(manifest.files)} files, {format_bytes(artifact_bytes(manifest))}"),
        ("content", manifest.content_sha256),
        ("made", f"{manifest.created_at} by gptoss-export {manifest.versions.get('gptoss-export', 'unknown')}"),
        *(("note", note) for note in manifest.notes),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")


def _called(model: ModelName) -> list[tuple[str, str]]:
    texts = (("name", model.name), ("from", model.source))
    return [
        *((what, text) for what, text in texts if text is not None),
        *(("label", f"{key}={value}") for key, value in sorted(model.labels.items())),
    ]


def artifact_bytes(manifest: Manifest) -> int:
    """Bytes of all files that the manifest names."""
    return sum(record.nbytes for record in manifest.files.values())
