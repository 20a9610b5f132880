"""Parity reports that were made up: consistent, so that they can be read back, and of any size."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_export.exporter.artifact import RECORD_NAMES, Manifest, ParityRecord, write_manifest
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.measure import record
from gptoss_export.exporter.origin import ModelName, Origin
from gptoss_export.exporter.trust.attest import attest
from gptoss_export.exporter.weights import WeightsMode, hash_files
from gptoss_export.validators.binomial import median_below
from gptoss_export.validators.consistency import CHECKS, ConsistencyCheck
from gptoss_export.validators.ends import EndsRecord
from gptoss_export.validators.evidence import Evidence, ScenarioResult
from gptoss_export.validators.floor import FloorRecord
from gptoss_export.validators.gates import GATES, override
from gptoss_export.validators.layers import Bisection, Finding, LayerRecord
from gptoss_export.validators.metrics import HISTOGRAM_EDGES, Metrics
from gptoss_export.validators.positions import SettledFigures, TextsRecord
from gptoss_export.validators.ranges import LIMITS, RangeRecord
from gptoss_export.validators.report.schema import (
    SCHEMA_VERSION,
    Binding,
    Engine,
    KLByPosition,
    Machine,
    ParityReport,
    ProbeRecord,
    WorstText,
)
from gptoss_export.validators.routing import Flip, RoutingLayer, RoutingRecord
from gptoss_export.validators.scenarios import SCENARIOS
from gptoss_export.validators.verdict import judge

SNAPSHOT = ModelName(repository="openai/gpt-oss-20b", revision="6cee5e81ee83917806bbde320786a8fb61efebee")
PROBES = (("plain-1", 1), ("code-27", 27), ("chat-41", 41))
GRAPH_ONLY = Engine(
    "tensorrt_rtx",
    "1.7.1.116",
    "NVIDIA GPU",
    execution="graph only",
    not_executed_reason="no NVIDIA driver on this host",
    ran_instead="onnxruntime 1.31.1, CPUExecutionProvider",
)


def metrics(kl: Sequence[float], **changes: Any) -> Metrics:
    """Figures of positions with these KLs; whatever does not follow from them is that of a good artifact."""
    bins = np.bincount(np.searchsorted(HISTOGRAM_EDGES, kl, side="right"), minlength=len(HISTOGRAM_EDGES) + 1)
    n = len(kl)
    quantile = {q: float(np.quantile(kl, q, method="inverted_cdf")) for q in (0.5, 0.99, 0.999)}
    figures = Metrics(
        positions=n,
        agreements=n - 1,
        ties=1,
        disagreements=0,
        non_finite=0,
        kl_mean=float(np.mean(kl)),
        kl_median=quantile[0.5],
        kl_median_low=0.0 if (rank := median_below(n)) is None else float(sorted(kl)[rank]),
        kl_p99=quantile[0.99],
        kl_p999=quantile[0.999],
        kl_max=float(max(kl)),
        reverse_kl_mean=float(np.mean(kl)),
        reverse_kl_max=float(max(kl)),
        top5_overlap=1.0,
        top10_overlap=0.999,
        rank_mean=1.0,
        rank_max=1.0,
        logit_diff_mean=1e-6,
        logit_diff_max=7.6e-6,
        cosine_mean=1.0,
        cosine_min=1 - 1e-13,
        text_positions=n - 1,
        text_prob_diff_mean=-1e-9,
        text_prob_diff_max=2e-7,
        perplexity_reference=12.5,
        perplexity_candidate=12.5000001,
        perplexity_ratio=1.000000008,
        perplexity_ratio_se=1e-9,
        kl_histogram=tuple(bins.tolist()),
    )
    return replace(figures, **changes)


def nothing_finite(positions: int) -> Metrics:
    """Metrics of an engine that answers NaN."""
    figures = {name: None for name, kind in Metrics.__annotations__.items() if "None" in kind}
    counts = {"positions": positions, "disagreements": positions, "non_finite": 9 * positions, "text_positions": 0}
    empty = {"agreements": 0, "ties": 0, "kl_histogram": (0,) * (len(HISTOGRAM_EDGES) + 1)}
    return Metrics(**figures, **counts, **empty)


def made_evidence(layers: int = 2, experts: int = 4, tokens: int = 69, seed: int = 0) -> Evidence:
    """All that a good artifact shows; a few ties, and an expert a layer that nobody visits."""
    draw = random.Random(seed)
    kl = [10 ** draw.gauss(-13, 0.3) for _ in range(tokens)]
    routing = []
    for layer in range(layers):
        visits = [0] * experts
        for _ in range(tokens):
            for expert in draw.sample(range(experts - 1), 2):
                visits[expert] += 1
        ties = layer % 2
        same = tokens - ties
        flipped = (1e-7, 0.01) if ties else (None, None)
        errors = (2e-6, 3e-6)
        routing.append(RoutingLayer(layer, tokens, same - 1, same, ties, 0, 0, 0, *flipped, *errors, tuple(visits)))
    flips = tuple(Flip(r.layer, 1, 3, "tie", 0, 1, 1e-7, 0.01) for r in routing if r.ties)[:20]
    spans = []
    for layer in range(layers):
        for kind in ("float32", "float16"):
            largest = 100.0 + layer
            bits = math.log2(LIMITS[kind]) - math.log2(largest)
            spans.append(RangeRecord(layer, kind, largest, "q_proj", 2.5, "self_attn.q_proj.weight", bits, 0, 3))
    return Evidence(
        num_layers=layers,
        scenarios=tuple(
            ScenarioResult(name, 3, metrics(kl), SettledFigures(tokens - 2, max(kl), 7e-6)) for name in SCENARIOS
        ),
        texts=TextsRecord(tokens, tokens - 2, float(np.mean(kl)), max(kl), ()),
        routing=RoutingRecord(tuple(routing), flips, metrics(kl)),
        layers=tuple(
            LayerRecord(
                layer,
                ("sliding_attention", "full_attention")[layer % 2],
                tokens,
                *(10 ** draw.gauss(-6.3, 0.1) for _ in range(3)),
                0,
                1e-6,
                0,
            )
            for layer in range(layers)
        ),
        ends=EndsRecord(tokens, 0.0, 10 ** draw.gauss(-6.3, 0.1), 10 ** draw.gauss(-6.3, 0.1), 0),
        ranges=tuple(spans),
        consistency=tuple(
            ConsistencyCheck(name, 16, 8, 0.0, 0.0, 0, True, ())
            if name == "repeat"
            else ConsistencyCheck(name, 16, 8, 3e-6, 1e-13, 40, False, (3e-6, 1e-6))
            for name in CHECKS
        ),
        looked_into="",
    )


def made_report(evidence: Evidence | None = None, **changes: Any) -> ParityReport:
    """A report on this evidence whose gates and verdict follow from it."""
    evidence = evidence or made_evidence()
    policy = changes.pop("policy", GATES["onnx"])
    floors = changes.pop("floors", ())
    overrides = changes.pop("overrides", {})
    table = policy.resolve(next((floor for floor in floors if floor.dtype == policy.floor_dtype), None))
    gates = override(table, overrides)
    last, length = changes.get("probes", (None,))[-1], PROBES[-1][1]
    name = PROBES[-1][0]
    if last is not None:
        name, length = last.name, last.tokens
    report = ParityReport(
        schema_version=SCHEMA_VERSION,
        created_at="2025-01-02T03:04:05+00:00",
        command=("gptoss-export", "validate", "./release"),
        versions={"gptoss-export": "0.1.0", "python": "3.11.9", "transformers": "5.23.0"},
        machine=Machine("Linux-6.1-x86_64", "A CPU @ 2.5 GHz", 2),
        reference="transformers 5.23.0 GptOss, float32, eager, one layer at a time",
        target="ort-cpu",
        engine=Engine("onnxruntime", "1.31.1", "CPUExecutionProvider"),
        effort="quick",
        sliding_window=16,
        probes=tuple(ProbeRecord(probe, tokens, f"{k}" * 64) for k, (probe, tokens) in enumerate(PROBES)),
        evidence=evidence,
        worst=(WorstText("decode", name, length - 1, 1.25e-12, 17, 18, None, "a train leaves at", " 9", "9"),),
        kl_by_position=(KLByPosition(name, (0, 1), (1, length), (1e-13, 2e-13), (1e-13, 4e-13)),),
        bisection=None,
        policy=policy,
        floors=floors,
        overrides=overrides,
        table_gates=table,
        gates=gates,
        verdict=judge(evidence, gates),
        binding=Binding({"model.safetensors": "c" * 64}, {"model.onnx": "d" * 64}),
    )
    return replace(report, **changes)


def with_scenario(evidence: Evidence, name: str, **changes: Any) -> Evidence:
    """The evidence with some metrics of one scenario changed; its settled positions differ as much in their logits."""
    scenarios = []
    for s in evidence.scenarios:
        diff = changes.get("logit_diff_max", s.settled.logit_diff_max)
        settled = replace(s.settled, logit_diff_max=diff)
        changed = replace(s, metrics=replace(s.metrics, **changes), settled=settled)
        scenarios.append(changed if s.name == name else s)
    return replace(evidence, scenarios=tuple(scenarios))


def wrong_layer(evidence: Evidence, layer: int) -> Evidence:
    """The evidence with attention of one layer far beyond its gate."""
    layers = [replace(r, attention=0.21, cached=0.2) if r.layer == layer else r for r in evidence.layers]
    return replace(evidence, layers=tuple(layers))


def made_floor(dtype: str = "float16", layers: int = 2) -> FloorRecord:
    kl = [2e-4] * 68 + [1e-2]
    floor = metrics(kl, agreements=67, ties=1, disagreements=1, logit_diff_mean=6e-3, logit_diff_max=0.25)
    texts = TextsRecord(69, 0, floor.kl_mean, floor.kl_max, (0.05,))
    return FloorRecord(dtype, "A CPU, avx2", floor, texts, 2e-4, 0.05, 69 * layers, 1)  # type: ignore[arg-type]


FOUND = Bisection(
    (Finding(1, "attention", "attention: the window", 0.21, 1e-5, "right with a window of 17"),),
    "Layer 1, attention: the window: 0.21 where 1e-05 passes.",
)


def made_120b() -> ParityReport:
    """As large as a report of gpt-oss-120b gets, and with everything wrong that can be."""
    draw = random.Random(7)
    tokens, layers, experts = 320 + 54 + 1, 36, 128
    evidence = wrong_layer(made_evidence(layers, experts, tokens, 7), 11)
    worst = tuple(
        WorstText(s.name, "prose-320", 19 * k, 1e-3 / (k + 1), 199_000 + k, 5, 17, "word " * 60, " the", " a")
        for s in evidence.scenarios
        for k in range(16)
    )
    assert evidence.routing is not None
    rows = [
        replace(
            r,
            same_set=r.same_set - 12 - r.layer,
            same_order=r.same_order - 12 - r.layer,
            consequences=3,
            near_ties=5 + r.layer // 2,
            diverged=4 + r.layer - r.layer // 2,
            margin_max=0.4,
            mass_mean=0.05,
        )
        for r in evidence.routing.layers
    ]
    evidence = replace(evidence, routing=replace(evidence.routing, layers=tuple(rows)))
    evidence = with_scenario(evidence, "decode", logit_diff_max=3.0)
    probes = (ProbeRecord("one-1", 1, "1" * 64), ProbeRecord("code-54", 54, "2" * 64))
    probes += (ProbeRecord("prose-320", 320, "3" * 64),)
    courses = []
    for probe in probes[1:]:
        n = min(probe.tokens, 256)
        edges = [probe.tokens * k // n for k in range(n + 1)]
        mean = tuple(10 ** (draw.gauss(-12, 0.4) + (2 if edge > 128 else 0)) for edge in edges[:-1])
        peak = tuple(2 * value for value in mean)
        courses.append(KLByPosition(probe.name, tuple(edges[:-1]), tuple(edges[1:]), mean, peak))
    floored = metrics([10 ** draw.gauss(-5, 0.6) for _ in range(tokens)], logit_diff_max=0.05, logit_diff_mean=1e-3)
    texts = TextsRecord(tokens, 0, floored.kl_mean, floored.kl_max, ())
    floor = FloorRecord("float16", "A CPU", floored, texts, 2e-5, 0.04, tokens * layers, 40)
    shards = {f"model-{k:05}-of-00014.safetensors": "e" * 64 for k in range(14)}
    return made_report(
        evidence,
        probes=probes,
        worst=worst,
        kl_by_position=tuple(courses),
        bisection=Bisection(
            (Finding(11, "attention", "attention: the window", 0.21, 5e-3, "right with a window of 129"),),
            "Layer 11, attention: the window: 0.21 where 0.005 passes.",
        ),
        policy=GATES["trt-fp16"],
        floors=(floor,),
        target="trt-fp16",
        sliding_window=128,
        engine=GRAPH_ONLY,
        binding=Binding(shards, {f"weights/{name}": digest for name, digest in shards.items()}),
    )


@dataclass(frozen=True)
class Samples:
    """Reports by what they are."""

    passing: ParityReport
    failing: ParityReport
    not_executed: ParityReport
    failing_graph: ParityReport
    loosened: ParityReport
    executed_in_16_bits: ParityReport
    not_finite: ParityReport
    not_measured: ParityReport
    largest: ParityReport


@pytest.fixture(scope="session")
def samples() -> Samples:
    good = made_evidence()
    bad = wrong_layer(with_scenario(good, "decode", logit_diff_max=5.0), 1)
    fp16: dict[str, Any] = {"policy": GATES["trt-fp16"], "floors": (made_floor(),), "target": "trt-fp16"}
    settled, texts = SettledFigures(0, None, None), TextsRecord(0, 0, None, None, ())
    scenarios = tuple(ScenarioResult(s.name, 3, nothing_finite(69), settled) for s in good.scenarios)
    broken = replace(good, scenarios=scenarios, texts=texts)
    return Samples(
        passing=made_report(good),
        failing=made_report(bad, bisection=FOUND),
        not_executed=made_report(good, engine=GRAPH_ONLY, **fp16),
        failing_graph=made_report(bad, engine=GRAPH_ONLY, **fp16),
        loosened=made_report(bad, overrides={"max_logit_diff": 6.0, "max_layer_error": 0.5}),
        executed_in_16_bits=made_report(good, **fp16),
        not_finite=made_report(broken),
        not_measured=made_report(
            replace(good, scenarios=(), texts=None, routing=None, layers=(), ranges=(), consistency=()),
            worst=(),
            kl_by_position=(),
        ),
        largest=made_120b(),
    )


@pytest.fixture(scope="session")
def evidence() -> Evidence:
    """Two layers of which everything is good."""
    return made_evidence()


@dataclass(frozen=True)
class Delivered:
    """A finished artifact, its manifest and its report."""

    folder: Path
    manifest: Manifest
    report: ParityReport | None


def deliver(
    folder: Path, checkpoint: Checkpoint, report: ParityReport | None, extra: Mapping[str, bytes], **changes: Any
) -> Delivered:
    """The small checkpoint as an artifact whose graph is none, with every record that an export writes."""
    (folder / "weights").mkdir(parents=True)
    names = sorted(path.name for path in checkpoint.root.iterdir() if path.suffix != ".txt")
    for name in names:
        shutil.copyfile(checkpoint.root / name, folder / "weights" / name)
    for name, data in ({"model.onnx": b"a graph"} | dict(extra)).items():
        (folder / name).write_bytes(data)
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = hash_files(paths)
    fields: dict[str, Any] = {
        "versions": {"gptoss-export": "0.1.0", "onnxruntime": "1.31.1", "torch": "2.13.0+cpu"},
        "target": "ort-cpu",
        "engine": "onnxruntime 1.31.1",
        "provider": "CPUExecutionProvider",
        "notes": ("kernels: bundled",),
        "layout": checkpoint.layout,
        "model": checkpoint.config,
        "checkpoint": {name: files[f"weights/{name}"] for name in names},
        "weights_mode": WeightsMode.COPY,
        "weights_dir": "weights",
        "files": files,
        "parity": ParityRecord("not validated"),
        "created_at": "2025-01-02T03:04:05+00:00",
        "origin": Origin(SNAPSHOT, "Apache-2.0", {"parity": "quick"}),
    }
    manifest = Manifest(**(fields | changes))
    if report is not None:
        binding = Binding(
            {name: entry.sha256 for name, entry in manifest.checkpoint.items()},
            {name: entry.sha256 for name, entry in manifest.files.items() if name not in RECORD_NAMES},
            manifest.origin.model,
        )
        report = replace(report, binding=binding)
        manifest = record(report, manifest, folder)
    manifest = attest(manifest, report, folder)
    write_manifest(manifest, folder)
    return Delivered(folder, manifest, report)


@pytest.fixture
def delivered(tmp_path: Path, tiny: Checkpoint, samples: Samples) -> Delivered:
    """An artifact that passed."""
    return deliver(tmp_path / "release", tiny, samples.passing, {})


@pytest.fixture
def delivered_with(tmp_path: Path, tiny: Checkpoint) -> Callable[[str, ParityReport | None], Delivered]:
    """Artifacts by their name and report, None for one that nothing was compared with."""
    return lambda name, report: deliver(tmp_path / name, tiny, report, {})


@pytest.fixture
def unvalidated(tmp_path: Path, tiny: Checkpoint) -> Delivered:
    """An artifact that nothing was compared with."""
    return deliver(tmp_path / "unvalidated", tiny, None, {})


@pytest.fixture
def with_engine(tmp_path: Path, tiny: Checkpoint, samples: Samples) -> Callable[[str, bytes], Delivered]:
    """Artifacts for TensorRT by their engine.json and engine.plan."""

    def make(metadata: str, plan: bytes) -> Delivered:
        extra = {"engine.json": metadata.encode(), "engine.plan": plan}
        changes = {"target": "trt-fp16", "engine": "tensorrt_rtx 1.7.1.116"}
        return deliver(tmp_path / "engine", tiny, samples.not_executed, extra, **changes)

    return make


@pytest.fixture
def delivered_as(tmp_path: Path, tiny: Checkpoint, samples: Samples) -> Callable[[ModelName], Delivered]:
    """Artifacts that passed, by what their model is called."""
    return lambda model: deliver(tmp_path / "named", tiny, samples.passing, {}, origin=Origin(model))
