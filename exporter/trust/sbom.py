"""sbom.cdx.json: the artifact as a bill of materials, with a model card whose figures are the parity report's.

    make_sbom(manifest, report)      # bytes; the same manifest and report give the same

CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/), a machine-learning bill of materials.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING
from urllib.parse import quote

from gptoss_export.engines.tensorrt.flavor import distributions_of
from gptoss_export.exporter.artifact import PROVENANCE_NAME, SBOM_NAME, Manifest
from gptoss_export.exporter.trust.provenance import hub_purl
from gptoss_export.exporter.weights import FileRecord

if TYPE_CHECKING:
    from gptoss_export.validators.metrics import Metrics
    from gptoss_export.validators.report import ParityReport

SPEC_VERSION = "1.6"
_NAMESPACE = uuid.UUID("6f1c1c9e-5b0e-5f0c-9d6d-0b7b4f6f2a31")
_MODEL_REF = "model"
_UNKNOWN_LICENSE = "NOASSERTION"
_SPDX_IDS = ("Apache-2.0", "MIT")


def make_sbom(manifest: Manifest, report: ParityReport | None) -> bytes:
    """The bill of a manifest that has its verdict and its report's files; report: None for a verdict that is none.

    Its serial number follows from the content, its one time stamp is the manifest's. The licence is the one that the
    checkpoint names, or NOASSERTION.
    """
    libraries = [_library(manifest, name, version) for name, version in sorted(manifest.versions.items())]
    others = {name: record for name, record in manifest.files.items() if name not in (PROVENANCE_NAME, SBOM_NAME)}
    files = [_file(name, record) for name, record in sorted(others.items())]
    needed = [entry["bom-ref"] for entry in (*libraries, *files) if entry.get("scope") != "excluded"]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, manifest.content_sha256)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created_at,
            "tools": {
                "components": [_tool(manifest.versions.get("gptoss-export", "unknown"))],
            },
            "component": _model(manifest, report),
        },
        "components": [*libraries, *files],
        "dependencies": [{"ref": _MODEL_REF, "dependsOn": needed}],
    }
    return (json.dumps(bill, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def _tool(version: str) -> dict[str, object]:
    return {"type": "application", "name": "gptoss-export", "version": version}


def _library(manifest: Manifest, name: str, version: str) -> dict[str, object]:
    """scope: the engine is needed to run the artifact, everything else only made it."""
    needed = name in distributions_of(manifest.engine.split(" ")[0])
    return {
        "type": "library",
        "bom-ref": f"library:{name}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version, safe='')}",
        "scope": "required" if needed else "excluded",
    }


def _file(name: str, record: FileRecord) -> dict[str, object]:
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": record.sha256}],
    }


def _model(manifest: Manifest, report: ParityReport | None) -> dict[str, object]:
    labels = manifest.origin.model.labels
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL_REF,
        "name": f"{manifest.origin.model.title or 'gpt-oss'} ({manifest.target})",
        "version": manifest.content_sha256,
        "licenses": _licenses(manifest),
        "pedigree": {
            "ancestors": [_checkpoint(manifest)],
            "notes": f"exported for {manifest.engine}, {manifest.provider}; its weights are {manifest.layout.value}",
        },
        "modelCard": _card(manifest, report),
        "properties": [{"name": f"gptoss-export:label:{key}", "value": labels[key]} for key in sorted(labels)],
    }


def _licenses(manifest: Manifest) -> list[object]:
    found = manifest.origin.license
    return [{"license": {"id": found} if found in _SPDX_IDS else {"name": found or _UNKNOWN_LICENSE}}]


def _checkpoint(manifest: Manifest) -> dict[str, object]:
    model = manifest.origin.model
    known: dict[str, object] = {}
    if model.repository is not None and model.revision is not None:
        file = model.subfolder or ""
        known = {"version": model.revision, "purl": hub_purl(model.repository, model.revision, file)}
    return {
        "type": "machine-learning-model",
        "bom-ref": "checkpoint",
        "name": model.repository or model.name or "gpt-oss checkpoint",
        "licenses": _licenses(manifest),
        "components": [
            _file(name, record) | {"bom-ref": f"checkpoint:{name}"}
            for name, record in sorted(manifest.checkpoint.items())
        ],
        **known,
    }


def _card(manifest: Manifest, report: ParityReport | None) -> dict[str, object]:
    model, parity = manifest.model, manifest.parity
    gates = {"parity.loosened": ", ".join(parity.loosened)} if parity.loosened else {}
    facts = {
        "parity.verdict": parity.verdict,
        "parity.effort": parity.effort,
        "parity.report_sha256": parity.report_sha256,
        **gates,
    }
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "transformer, mixture of experts",
            "modelArchitecture": (
                f"gpt-oss: {model.num_layers} layers, {model.num_experts} experts of which {model.top_k} a token, "
                f"hidden size {model.hidden_size}, vocabulary {model.vocab_size}"
            ),
            "inputs": [{"format": "token ids, int64"}],
            "outputs": [{"format": "logits, float32"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": [] if report is None else _figures(report)},
        "properties": [{"name": f"gptoss-export:{k}", "value": v} for k, v in facts.items() if v is not None],
    }


def _figures(report: ParityReport) -> list[dict[str, str]]:
    """Against the reference, one slice a way of asking the engine; a figure that was not finite is left out."""
    return [
        {"type": name, "value": repr(value), "slice": f"{scenario.name}, against {report.reference}"}
        for scenario in report.evidence.scenarios
        for name, value in _of(scenario.metrics)
        if value is not None
    ]


def _of(metrics: Metrics) -> tuple[tuple[str, float | None], ...]:
    return (
        ("KL divergence, mean, nats", metrics.kl_mean),
        ("KL divergence, 99th percentile, nats", metrics.kl_p99),
        ("KL divergence, largest, nats", metrics.kl_max),
        ("top-1 agreement", metrics.top1_agreement),
        ("perplexity ratio", metrics.perplexity_ratio),
        ("positions", metrics.positions),
    )
