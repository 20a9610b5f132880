"""The artifact's routing over all probes: as it chooses, and with the reference's choice put in its place.

record = measure_routing(inspector, reference, router_errors, rows)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.inspector import Inspector
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.compare import compare_rows
from gptoss_export.validators.metrics import Accumulator
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.routing import RoutingRecord, choose, compare_layers, log_weight_error


def measure_routing(
    inspector: Inspector,
    reference: Reference,
    router_errors: Sequence[float | None],
    rows: int,
    *,
    progress: Progress | None = None,
) -> RoutingRecord:
    """Every layer's choice against the reference's, and the replay.

    router_errors: a layer, see RoutingLayer. rows: logits that one call may return. Raises what the inspector raises.
    """
    with (progress or SilentProgress()).task("routing", total=2 * len(reference.probes)) as task:
        taken = []
        for probe in reference.probes:
            taken.append(_experts(inspector, probe, rows))
            task.advance(1)
        accumulator = Accumulator()
        noise: list[float | None] = [None] * inspector.num_layers
        for index in range(len(reference.probes)):
            _replay(inspector, reference, index, rows, accumulator, noise)
            task.advance(1)
        replay = accumulator.metrics()
    probes = range(len(taken))
    layers, worst = compare_layers(
        [[reference.trace.router_logits(n, probe) for probe in probes] for n in range(inspector.num_layers)],
        [[experts[:, n] for experts in taken] for n in range(inspector.num_layers)],
        router_errors,
        noise,
    )
    return RoutingRecord(layers, worst, replay)


def _experts(inspector: Inspector, probe: Probe, rows: int) -> NDArray[np.int64]:
    """The artifact's choice for each token of the probe: [n, L, K]."""
    ids = np.array(probe.ids, np.int64)
    return np.concatenate([chunk.experts for chunk in inspector.route(ids, rows=rows)])


def _replay(
    inspector: Inspector,
    reference: Reference,
    probe: int,
    rows: int,
    accumulator: Accumulator,
    noise: list[float | None],
) -> None:
    """Adds the logits to the accumulator, and raises each layer's noise to what this probe shows of it."""
    ids = np.array(reference.probes[probe].ids, np.int64)
    layers = range(inspector.num_layers)
    chosen = [choose(reference.trace.router_logits(n, probe), reference.config.top_k) for n in layers]
    for chunk in inspector.route(ids, experts=np.stack(chosen, axis=1), rows=rows):
        compare_rows(reference, probe, chunk.start, chunk.logits, accumulator)
        here = slice(chunk.start, chunk.start + len(chunk.logits))
        for n in layers:
            error = log_weight_error(reference.router_logits(n, probe)[here], chunk.weights[:, n], chosen[n][here])
            noise[n] = max((e for e in (noise[n], error) if e is not None), default=None)
