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

from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.progress import Progress
from gptoss_export.validators.compare import compare_rows
from gptoss_export.validators.metrics import Accumulator, Metrics
from gptoss_export.validators.reference import BLOCK_POSITIONS, Reference, run_reference
from gptoss_export.validators.reference_cache import reference_for
from gptoss_export.validators.routing import choose, compare_layers

FloorDtype = Literal["bfloat16", "float16"]


@dataclass(frozen=True)
class FloorRecord:
    """Metrics of transformers in `dtype` against itself in float32, every position of every probe once.

    token_layers: tokens x layers; diverged: those whose experts diverge, see `validators.routing`.
    """

    dtype: FloorDtype
    metrics: Metrics
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
    token_layers, diverged = _routing(reference, rounded)
    return FloorRun(FloorRecord(dtype, accumulator.metrics(), token_layers, diverged), rounded)


def _routing(reference: Reference, rounded: Reference) -> tuple[int, int]:
    """Tokens x layers, and how many of them diverge."""
    probes, layers, top_k = range(len(reference.probes)), range(reference.config.num_layers), reference.config.top_k
    compared, _ = compare_layers(
        [[reference.router_logits(n, probe) for probe in probes] for n in layers],
        [[choose(rounded.router_logits(n, probe), top_k) for probe in probes] for n in layers],
        [None for _ in layers],
    )
    return sum(layer.tokens for layer in compared), sum(layer.diverged for layer in compared)
