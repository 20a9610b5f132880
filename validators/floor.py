"""The noise floor: what it costs to round transformers itself to a type of 16 bits.

    floor = measure_floor(checkpoint, reference, "float16")
    floor.metrics.kl_mean       # nats, against the float32 reference over the same positions

An engine in that type cannot be asked to be nearer to the model than this by an order of magnitude, and has
no business being much farther. See `GatePolicy.resolve` for the gates that follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gptoss_export.engines.machine import floating_point
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.progress import Progress
from gptoss_export.validators.compare import compare_rows
from gptoss_export.validators.metrics import Accumulator, Metrics
from gptoss_export.validators.positions import Texts, TextsRecord, lookup
from gptoss_export.validators.reference import BLOCK_POSITIONS, Reference, run_reference
from gptoss_export.validators.reference_cache import reference_for
from gptoss_export.validators.routing import choose, compare_layers, same_experts

FloorDtype = Literal["bfloat16", "float16"]


@dataclass(frozen=True)
class FloorRecord:
    """Metrics of transformers in `dtype` against itself in float32, every position of every probe once.

    cpu: on which processor, and with which of its instructions, since oneDNN rounds by them. texts: of the distinct
    positions, as of an artifact; none of them is settled. bulk_*: of the positions at which no layer chose other
    experts, of all where there are no such. token_layers: tokens x layers; diverged: those whose experts diverge, see
    `validators.routing`.
    """

    dtype: FloorDtype
    cpu: str
    metrics: Metrics
    texts: TextsRecord
    bulk_kl_mean: float | None
    bulk_logit_diff_max: float | None
    token_layers: int
    diverged: int


@dataclass(frozen=True)
class FloorRun:
    """The record, and the rounded run that it is of, whose logits and router logits can still be asked for."""

    record: FloorRecord
    rounded: Reference


def measure_floor(
    checkpoint: Checkpoint,
    reference: Reference,
    dtype: FloorDtype,
    *,
    files: Mapping[str, str] | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> FloorRecord:
    """The record of `run_floor`."""
    return run_floor(checkpoint, reference, dtype, files=files, cache=cache, progress=progress).record


def run_floor(
    checkpoint: Checkpoint,
    reference: Reference,
    dtype: FloorDtype,
    *,
    files: Mapping[str, str] | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> FloorRun:
    """Runs the reference's probes through transformers in `dtype` and compares, teacher-forced.

    files, cache: as for `reference_for`; without files nothing is cached. Parameters and activations are what
    `from_pretrained(dtype=...)` gives on a CPU; logits are computed in dtype, then held in float32. Overflow is
    no error here: it is counted in the metrics. Memory is that of `run_reference`; on a CPU without
    instructions for these types a run takes three to ten times as long as in float32. Raises what
    `run_reference` raises.
    """
    if files is None:
        rounded = run_reference(checkpoint, reference.probes, dtype=dtype, progress=progress)
    else:
        rounded = reference_for(checkpoint, files, reference.probes, dtype, cache=cache, progress=progress)
    accumulator = Accumulator()
    for index, probe in enumerate(reference.probes):
        for start in range(0, len(probe.ids), BLOCK_POSITIONS):
            stop = min(start + BLOCK_POSITIONS, len(probe.ids))
            compare_rows(reference, index, start, rounded.logits(index, start, stop), accumulator)
    return FloorRun(_record(reference, rounded, dtype, accumulator), rounded)


def _record(reference: Reference, rounded: Reference, dtype: FloorDtype, accumulator: Accumulator) -> FloorRecord:
    probes, layers, top_k = range(len(reference.probes)), range(reference.config.num_layers), reference.config.top_k
    logits = [[reference.router_logits(n, probe) for probe in probes] for n in layers]
    taken = [[choose(rounded.router_logits(n, probe), top_k) for probe in probes] for n in layers]
    nothing = [None for _ in layers]
    compared, _ = compare_layers(logits, taken, nothing, nothing)
    kept = [
        np.logical_and.reduce([same_experts(logits[n][probe], taken[n][probe]) for n in layers]) for probe in probes
    ]
    texts, rows = Texts(reference, nothing), accumulator.placed()
    bulk = rows[lookup(rows, kept)]
    bulk = bulk if len(bulk) else rows
    return FloorRecord(
        dtype=dtype,
        cpu=floating_point(),
        metrics=accumulator.metrics(),
        texts=texts.pool([rows]),
        bulk_kl_mean=float(bulk["kl"].mean()) if len(bulk) else None,
        bulk_logit_diff_max=float(bulk["diff_max"].max()) if len(bulk) else None,
        token_layers=sum(layer.tokens for layer in compared),
        diverged=sum(layer.diverged for layer in compared),
    )
