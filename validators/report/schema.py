"""What a parity report holds. `docs/parity.schema.json` is the same for readers in other languages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoss_export.validators.gates import Gates, Verdict
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.scenarios import Effort

SCHEMA_VERSION = "1"


@dataclass(frozen=True)
class Machine:
    """Where the parity was measured: platform and processor, by which the last bits of floats differ; no
    host name."""

    platform: str
    cpu: str
    cores: int


@dataclass(frozen=True)
class Engine:
    """What ran the artifact: `onnxruntime`, its version, and its provider."""

    name: str
    version: str
    provider: str


@dataclass(frozen=True)
class ProbeRecord:
    """A token sequence that was run; sha256 (hex) of its ids as little-endian int64."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class ScenarioResult:
    """One way in which the engine was asked, the calls it took, and what came out."""

    name: str
    calls: int
    metrics: Metrics


@dataclass(frozen=True)
class Binding:
    """Which bytes the report speaks of: sha256 (hex) by file name, of the checkpoint and of the artifact."""

    checkpoint: Mapping[str, str]
    files: Mapping[str, str]


@dataclass(frozen=True)
class ParityReport:
    """A measurement, its limits and its verdict. created_at (ISO 8601, UTC) is the one field that hashes
    leave out."""

    schema_version: str
    created_at: str
    versions: Mapping[str, str]
    machine: Machine
    reference: str
    target: str
    engine: Engine
    effort: Effort
    sliding_window: int
    probes: tuple[ProbeRecord, ...]
    scenarios: tuple[ScenarioResult, ...]
    gates: Gates
    verdict: Verdict
    binding: Binding
