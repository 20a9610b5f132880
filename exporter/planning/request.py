"""What was asked for: of an export, and of a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.origin import ModelName
from gptoss_export.exporter.weights import WeightsMode

Effort = Literal["quick", "full"]
Parity = Literal["off", "quick", "full"]


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure, beside how much.

    prompts: a file of probes that come after the default ones. overrides: gates set to other limits than the table's.
    bisection: whether to look for the operation in layers that are beyond their gates.
    """

    prompts: Path | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)
    bisection: bool = False

    def command(self, effort: Effort) -> tuple[str, ...]:
        """What takes the same measurement again; without paths, so that it is the same wherever it was taken."""
        given = [part for name, value in self.overrides.items() for part in ("--gate", f"{name}={value!r}")]
        if self.prompts is not None:
            given += ["--prompts", self.prompts.name]
        if self.bisection:
            given.append("--bisect")
        return ("gptoss-export", "validate", "OUT", "--parity", effort, *given)


@dataclass(frozen=True)
class ExportRequest:
    """What was asked for. model: a folder or a Hub id. threads: of the engine, None for one a core.

    bundle_kernels: whether the artifacts carry the library with the kernels that they run on. ignore_preflight:
    whether to begin although something does not seem to be enough. engine: of the TensorRT targets. measure: how
    parity is measured, beside how much of it. called: the name and the labels that the user gives the checkpoint.
    """

    model: str
    output: Path
    targets: tuple[str, ...]
    revision: str | None = None
    weights: WeightsMode = WeightsMode.COPY
    parity: Parity = "quick"
    force: bool = False
    threads: int | None = None
    bundle_kernels: bool = False
    ignore_preflight: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    called: ModelName = field(default_factory=ModelName)
