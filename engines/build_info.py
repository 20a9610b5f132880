"""What passes between the pipeline and a target: settings in, what was built and what can run it out."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.progress import Progress, SilentProgress


@dataclass(frozen=True)
class BuildSettings:
    """engine: of TensorRT engines, which the other targets do not read."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    progress: Progress = field(default_factory=SilentProgress)


@dataclass(frozen=True)
class BuildInfo:
    """engine: name and version of what runs the artifact. provider: the execution provider. notes: choices made."""

    engine: str
    provider: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Execution:
    """What runs an artifact on this host.

    name, version, provider: of the engine. not_executed_reason: why it cannot run here, and ran_instead: what runs the
    graph in its place; both None where it can. max_batch: rows of one call; max_context: positions of a row; None for
    any number.
    """

    name: str
    version: str
    provider: str
    not_executed_reason: str | None = None
    ran_instead: str | None = None
    max_batch: int | None = None
    max_context: int | None = None
