"""How plans, results and artifacts look on stdout."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from gptoss_export.exporter.progress import format_bytes, format_seconds

if TYPE_CHECKING:
    from gptoss_export.exporter.artifact import Manifest
    from gptoss_export.exporter.origin import ModelName
    from gptoss_export.exporter.pipeline import ExportResult
    from gptoss_export.exporter.planning.plan import Plan
    from gptoss_export.validators.layers import Bisection


def plan_as_json(plan: Plan) -> dict[str, object]:
    """The plan for machines; sizes in bytes."""
    return {
        "model": str(plan.checkpoint.root),
        "layout": plan.checkpoint.layout.value,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_files": {name: path.stat().st_size for name, path in plan.checkpoint_files.items()},
        "artifacts": {target: str(folder) for target, folder in plan.folders.items()},
        "weights": {"mode": plan.request.weights.value, "dir": plan.weights_dir},
        "parity": plan.request.parity,
        "disk": {"needed_bytes": plan.copied_bytes, "free_bytes": plan.preflight.disks[0].free},
        "preflight": plan.preflight.as_json(),
        "steps": list(plan.steps),
    }


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


def result_as_json(result: ExportResult) -> dict[str, object]:
    """One artifact and its verdict for machines."""
    return {
        "target": result.manifest.target,
        "folder": str(result.folder),
        "verdict": result.manifest.parity.verdict,
        "effort": result.manifest.parity.effort,
        "report_sha256": result.manifest.parity.report_sha256,
        "content_sha256": result.manifest.content_sha256,
        "engine": result.manifest.engine,
        "provider": result.manifest.provider,
        "notes": list(result.manifest.notes),
        "artifact_bytes": artifact_bytes(result.manifest),
        "seconds": round(result.seconds, 3),
        "bisection": None if (bisection := _bisection(result)) is None else asdict(bisection),
    }


def echo_result(result: ExportResult) -> None:
    """One artifact and its verdict for people."""
    click.echo(f"{result.summary}, {format_bytes(artifact_bytes(result.manifest))}, {format_seconds(result.seconds)}")
    if (bisection := _bisection(result)) is not None:
        click.echo(bisection.sentence)


def _bisection(result: ExportResult) -> Bisection | None:
    return None if result.report is None else result.report.bisection


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
