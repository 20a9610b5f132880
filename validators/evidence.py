"""All that was measured of an artifact and that a verdict is about."""

from __future__ import annotations

from dataclasses import dataclass

from gptoss_export.validators.consistency import ConsistencyCheck
from gptoss_export.validators.ends import EndsRecord
from gptoss_export.validators.layers import LayerRecord
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.positions import SettledFigures, TextsRecord
from gptoss_export.validators.ranges import RangeRecord
from gptoss_export.validators.routing import RoutingRecord


@dataclass(frozen=True)
class ScenarioResult:
    """One way in which the engine was asked, the calls it took, and what came out; settled: of the positions that
    rounding cannot send to other experts."""

    name: str
    calls: int
    metrics: Metrics
    settled: SettledFigures


@dataclass(frozen=True)
class Evidence:
    """num_layers: of the model, so that a layer that nobody looked at is missed. texts: of all scenarios together.

    looked_into: what ran for routing, layers and ranges, where that is not the engine itself but its graph
    (`onnxruntime 1.31.1, CPUExecutionProvider`).
    """

    num_layers: int
    scenarios: tuple[ScenarioResult, ...]
    texts: TextsRecord | None
    routing: RoutingRecord | None
    layers: tuple[LayerRecord, ...]
    ends: EndsRecord | None
    ranges: tuple[RangeRecord, ...]
    consistency: tuple[ConsistencyCheck, ...]
    looked_into: str
