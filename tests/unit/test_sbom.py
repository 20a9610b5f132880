"""The bill of materials, by CycloneDX's own strict schema and by what it has to say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gptoss_export.exporter.artifact import PROVENANCE_NAME, SBOM_NAME
from gptoss_export.exporter.origin import Origin
from gptoss_export.exporter.trust.sbom import make_sbom

pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed")


def problems(bill: bytes) -> object:
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from cyclonedx.validation import make_schemabased_validator
    from cyclonedx.validation.json import JsonStrictValidator

    make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6)
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.decode())


def bill_of(delivered: Any) -> dict[str, Any]:
    return json.loads((delivered.folder / SBOM_NAME).read_bytes())


def test_it_keeps_the_schema_of_cyclonedx(delivered: Any, unvalidated: Any) -> None:
    for artifact in (delivered, unvalidated):
        assert problems((artifact.folder / SBOM_NAME).read_bytes()) is None
    bill = bill_of(delivered)
    assert problems(json.dumps(bill | {"serialNumber": "urn:uuid:none"}).encode()) is not None
    bill["components"][0]["kind"] = "other"
    assert problems(json.dumps(bill).encode()) is not None


@pytest.mark.parametrize("said", ["MIT", "Apache-2.0", "cc-by-4.0", None])
def test_any_licence_and_a_folder_keep_the_schema(said: str | None, delivered: Any) -> None:
    manifest = replace(delivered.manifest, origin=Origin(license=said))
    bill = make_sbom(manifest, delivered.report)
    assert problems(bill) is None
    (found,) = json.loads(bill)["metadata"]["component"]["licenses"]
    assert set(found["license"].values()) == {said or "NOASSERTION"}
    ancestor = json.loads(bill)["metadata"]["component"]["pedigree"]["ancestors"][0]
    assert "purl" not in ancestor


def test_every_report_that_can_be_gives_a_valid_card(delivered: Any, samples: Any) -> None:
    for report in vars(samples).values():
        assert problems(make_sbom(delivered.manifest, report)) is None


def test_files_libraries_and_ancestors(delivered: Any) -> None:
    bill, manifest = bill_of(delivered), delivered.manifest
    parts = {part["bom-ref"]: part for part in bill["components"]}
    files = {part["name"]: part["hashes"][0]["content"] for part in parts.values() if part["type"] == "file"}
    assert files == {k: v.sha256 for k, v in manifest.files.items() if k not in (SBOM_NAME, PROVENANCE_NAME)}
    assert parts["library:onnxruntime"]["scope"] == "required"
    assert parts["library:torch"]["scope"] == "excluded"
    assert parts["library:torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    model = bill["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "openai/gpt-oss-20b (ort-cpu)")
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    (ancestor,) = model["pedigree"]["ancestors"]
    assert ancestor["purl"] == f"pkg:huggingface/openai/gpt-oss-20b@{manifest.origin.model.revision}"
    shards = {part["name"]: part["hashes"][0]["content"] for part in ancestor["components"]}
    assert shards == {name: record.sha256 for name, record in manifest.checkpoint.items()}
    needs = bill["dependencies"][0]["dependsOn"]
    assert "library:onnxruntime" in needs and "file:model.onnx" in needs and "library:torch" not in needs


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("cuda", ["cu12", "cu13"])
def test_what_runs_an_engine_is_required(engine: str, cuda: str, delivered: Any) -> None:
    package = f"{engine.replace('_', '-')}-{cuda}"
    versions = dict.fromkeys(("onnxruntime", "torch", "triton", package, "cuda-bindings"), "1")
    manifest = replace(delivered.manifest, engine=f"{engine} 1", versions=versions)
    parts = json.loads(make_sbom(manifest, delivered.report))["components"]
    assert {part["name"] for part in parts if part.get("scope") == "required"} == {package, "cuda-bindings"}


def test_the_card_has_the_figures_of_the_report(delivered: Any, unvalidated: Any) -> None:
    card = bill_of(delivered)["metadata"]["component"]["modelCard"]
    figures = card["quantitativeAnalysis"]["performanceMetrics"]
    first = delivered.report.evidence.scenarios[0]
    shown = {f["type"]: f["value"] for f in figures if f["slice"].startswith(f"{first.name},")}
    assert float(shown["KL divergence, mean, nats"]) == first.metrics.kl_mean
    assert float(shown["top-1 agreement"]) == first.metrics.top1_agreement
    assert float(shown["perplexity ratio"]) == first.metrics.perplexity_ratio
    assert {"name": "gptoss-export:parity.verdict", "value": "pass"} in card["properties"]
    none = bill_of(unvalidated)["metadata"]["component"]["modelCard"]
    assert none["quantitativeAnalysis"]["performanceMetrics"] == []
    assert {"name": "gptoss-export:parity.verdict", "value": "not validated"} in none["properties"]


def test_the_serial_number_follows_from_the_content(delivered: Any) -> None:
    manifest, report = delivered.manifest, delivered.report
    once = json.loads(make_sbom(manifest, report))
    later = json.loads(make_sbom(replace(manifest, created_at="2030-01-01T00:00:00+00:00"), report))
    other = json.loads(make_sbom(replace(manifest, notes=("other",)), report))
    assert once["serialNumber"] == later["serialNumber"] != other["serialNumber"]
    assert {key for key in once if once[key] != later[key]} == {"metadata"}
    assert later["metadata"]["timestamp"] == "2030-01-01T00:00:00+00:00"
