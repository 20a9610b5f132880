"""What a parity report holds. `docs/parity.schema.json` is the same for readers in other languages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gptoss_export.exporter.origin import ModelName
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.floor import FloorRecord
from gptoss_export.validators.gates import GatePolicy, Gates, loosened
from gptoss_export.validators.layers import Bisection
from gptoss_export.validators.scenarios import Effort
from gptoss_export.validators.verdict import Verdict

SCHEMA_VERSION = "5"

Execution = Literal["executed", "graph only"]
Outcome = Literal["pass", "fail", "not executed"]


@dataclass(frozen=True)
class Machine:
    """Where the parity was measured: platform and processor, by which the last bits of floats differ; no
    host name."""

    platform: str
    cpu: str
    cores: int


@dataclass(frozen=True)
class Engine:
    """The engine of the artifact (`onnxruntime`, its version, and its provider) and whether it ran.

    graph only: the engine was built and not run; the metrics are of the graph that it was built from, which
    ran_instead (such as `onnxruntime 1.31.1, CPUExecutionProvider`) ran, for not_executed_reason. Both are
    None exactly when the engine itself ran; ValueError otherwise.
    """

    name: str
    version: str
    provider: str
    execution: Execution = "executed"
    not_executed_reason: str | None = None
    ran_instead: str | None = None

    def __post_init__(self) -> None:
        reasons = (self.not_executed_reason, self.ran_instead)
        if self.execution == "executed" and any(reason is not None for reason in reasons):
            raise ValueError("an engine that was executed has a reason why not, or another in its place")
        if self.execution == "graph only" and not all(reason and reason.strip() for reason in reasons):
            raise ValueError("an engine that was not executed lacks the reason, or what ran in its place")


@dataclass(frozen=True)
class ProbeRecord:
    """A token sequence that was run; sha256 (hex) of its ids as little-endian int64."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class WorstText:
    """A position at which the artifact is farthest from the reference.

    reference, candidate: the best token of either. following: the text's own, None at its end. context: the text up to
    there, cut to its end; text_*: these tokens in words; all of them None without a tokenizer.
    """

    scenario: str
    probe: str
    position: int
    kl: float
    reference: int
    candidate: int
    following: int | None
    context: str | None
    text_reference: str | None
    text_candidate: str | None


@dataclass(frozen=True)
class KLByPosition:
    """KL of one probe in scenario `prefill`, in buckets of positions start (included) to stop (not)."""

    probe: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    mean: tuple[float, ...]
    max: tuple[float, ...]


@dataclass(frozen=True)
class Binding:
    """Which bytes the report speaks of: sha256 (hex) by file name, of the checkpoint and of the artifact; and what the
    checkpoint is called."""

    checkpoint: Mapping[str, str]
    files: Mapping[str, str]
    model: ModelName = field(default_factory=ModelName)


@dataclass(frozen=True)
class ParityReport:
    """A measurement, its limits and its verdict.

    table_gates are policy.resolve(the floor in policy.floor_dtype), gates those with overrides, and verdict follows
    from evidence and gates: whether what was run keeps its gates. parity.json has its failures, and beside them as
    `verdict` the word for what they mean for the artifact. floors: each type at most once. bisection: None where none
    was asked for. command: the command line. created_at (ISO 8601, UTC) is the one field that hashes leave out.
    """

    schema_version: str
    created_at: str
    command: tuple[str, ...]
    versions: Mapping[str, str]
    machine: Machine
    reference: str
    target: str
    engine: Engine
    effort: Effort
    sliding_window: int
    probes: tuple[ProbeRecord, ...]
    evidence: Evidence
    worst: tuple[WorstText, ...]
    kl_by_position: tuple[KLByPosition, ...]
    bisection: Bisection | None
    policy: GatePolicy
    floors: tuple[FloorRecord, ...]
    overrides: Mapping[str, float]
    table_gates: Gates
    gates: Gates
    verdict: Verdict
    binding: Binding

    @property
    def outcome(self) -> Outcome:
        """`pass` only for an engine that was run; a graph that passes alone is `not executed`, one that fails
        `fail`."""
        if not self.verdict.passed:
            return "fail"
        return "pass" if self.engine.execution == "executed" else "not executed"

    @property
    def floor(self) -> FloorRecord | None:
        """The floor that the gates follow from."""
        return next((floor for floor in self.floors if floor.dtype == self.policy.floor_dtype), None)

    @property
    def loosened(self) -> tuple[str, ...]:
        """Gates that overrides let more pass than the table does: the verdict has to say so."""
        return loosened(self.table_gates, self.gates)
