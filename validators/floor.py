"""The noise floor: what it costs to round transformers itself to a type of 16 bits.

    floor = measure_floor(checkpoint, reference, "float16")
    floor.metrics.kl_mean       # nats, against the float32 reference over the same positions

An engine in that type cannot be asked to be nearer to the model than this by an order of magnitude, and has
no business being much farther. See `GatePolicy.resolve` for the gates that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.progress import Progress
from gptoss_export.validators.metrics import Accumulator, Metrics
from gptoss_export.validators.reference import BLOCK_POSITIONS, Reference, run_reference

FloorDtype = Literal["bfloat16", "float16"]


@dataclass(frozen=True)
class FloorRecord:
    """Metrics of transformers in `dtype` against itself in float32, every position of every probe once."""

    dtype: FloorDtype
    metrics: Metrics


def measure_floor(
    checkpoint: Checkpoint, reference: Reference, dtype: FloorDtype, *, progress: Progress | None = None
) -> FloorRecord:
    """Runs the reference's probes through transformers in `dtype` and compares, teacher-forced.

    Parameters and activations are what `from_pretrained(dtype=...)` gives on a CPU; logits are computed in
    dtype, then held in float32. Overflow is no error here: it is counted in the metrics. Memory is that of
    `run_reference`; on a CPU without instructions for these types a run takes three to ten times as long as
    in float32. Raises what `run_reference` raises.
    """
    rounded = run_reference(checkpoint, reference.probes, dtype=dtype, progress=progress)
    accumulator = Accumulator()
    for index, probe in enumerate(reference.probes):
        for start in range(0, len(probe.ids), BLOCK_POSITIONS):
            stop = min(start + BLOCK_POSITIONS, len(probe.ids))
            accumulator.add(reference.logits(index, start, stop), rounded.logits(index, start, stop))
    return FloorRecord(dtype, accumulator.metrics())
