"""The dense weights in the target's type: an audit of their range, and the one file of the artifact that holds them.

bfloat16 targets read them from the checkpoint, where they are audited all the same. float32 holds every bfloat16;
float16 has three bits more of mantissa, so a weight is kept exactly where it is large enough (2^-14 with all its bits,
2^-24 at all) and not above 65504.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.tensor_file import TensorFile, plan_tensor_file, write_tensor_file
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.exporter.checkpoint.read import read_rows
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.exporter.errors import WeightRangeError

DENSE_DIR = "dense"

_CHUNK_WEIGHTS = 1 << 20
_FLOAT16_HALF_STEP_ABOVE = np.float32(65520)
"""What rounds to infinity, to nearest even."""


@dataclass(frozen=True)
class Range:
    """What the audit saw: the largest magnitude and whose it is, and weights that are rounded, of how many."""

    largest: float
    largest_name: str
    rounded: int
    weights: int

    def __str__(self) -> str:
        share = self.rounded / max(self.weights, 1)
        return f"largest weight {self.largest:.3g} ({self.largest_name}), {share:.2%} of the dense weights rounded"


def dense_tensors(checkpoint: Checkpoint) -> tuple[TensorRef, ...]:
    """Matrices and biases of attention and lm_head, in the order of their names."""
    names = sorted(name for name in checkpoint.tensors if is_dense(name))
    return tuple(checkpoint.tensors[name] for name in names)


def is_dense(name: str) -> bool:
    """Whether a weight is multiplied in the target's type."""
    return name == "lm_head.weight" or (".self_attn." in name and "_proj." in name)


def plan_dense(checkpoint: Checkpoint, precision: Precision, folder: Path) -> TensorFile | None:
    """The file that `write_dense` will write into the artifact, nothing read; None where no weight changes its type."""
    if precision is Precision.BF16:
        return None
    stored = ((ref.name, precision.stored_type, ref.shape) for ref in dense_tensors(checkpoint))
    return plan_tensor_file(stored, folder / DENSE_DIR / f"{precision.value}.safetensors")


def write_dense(checkpoint: Checkpoint, precision: Precision, file: TensorFile) -> Range:
    """Converts a few rows at a time; sinks, which the graph converts itself, are audited too.

    Raises WeightRangeError for the first weight that the type cannot hold, and what `write_tensor_file` raises.
    """
    audit = _Audit(precision)
    write_tensor_file(file, _pieces(checkpoint, file, audit))
    for name in sorted(checkpoint.tensors):
        if name.endswith(".sinks"):
            ref = checkpoint.tensors[name]
            audit.convert(ref, 0, read_rows(ref, 0, ref.shape[0]))
    return audit.range


def audit_dense(checkpoint: Checkpoint) -> None:
    """For bfloat16, in which nothing is converted: raises WeightRangeError for a weight that is no number."""
    audit = _Audit(Precision.BF16)
    for ref in dense_tensors(checkpoint):
        for start, rows in _rows(ref):
            audit.convert(ref, start, rows)


def _rows(ref: TensorRef) -> Iterator[tuple[int, NDArray[Any]]]:
    """The first row of a piece, and the piece, a few megabytes at a time."""
    step = max(1, _CHUNK_WEIGHTS // (ref.shape[1] if len(ref.shape) > 1 else 1))
    for start in range(0, ref.shape[0], step):
        yield start, read_rows(ref, start, min(start + step, ref.shape[0]))


def _pieces(checkpoint: Checkpoint, file: TensorFile, audit: _Audit) -> Iterator[tuple[int, NDArray[Any]]]:
    for ref in dense_tensors(checkpoint):
        at = file.tensors[ref.name].offset
        for start, rows in _rows(ref):
            converted = audit.convert(ref, start, rows)
            yield at, converted
            at += converted.nbytes


class _Audit:
    def __init__(self, precision: Precision) -> None:
        self._dtype = np.dtype(np.float16 if precision is Precision.FP16 else np.float32)
        self.range = Range(0.0, "none", 0, 0)

    def convert(self, ref: TensorRef, start: int, rows: NDArray[Any]) -> NDArray[Any]:
        """bfloat16 [N, K] or [N] -> the target's type."""
        values = rows.astype(np.float32)
        magnitudes = np.abs(values)
        largest = float(magnitudes.max(initial=0.0))
        # Written so that NaN is refused, for which every comparison is false.
        limit = _FLOAT16_HALF_STEP_ABOVE if self._dtype == np.float16 else np.float32(np.inf)
        if not largest < limit:
            self._refuse(ref, start, values, magnitudes, limit)
        converted = values.astype(self._dtype)
        rounded = int((converted.astype(np.float32) != values).sum())
        seen = self.range
        name = ref.name if largest > seen.largest else seen.largest_name
        self.range = Range(max(largest, seen.largest), name, seen.rounded + rounded, seen.weights + values.size)
        return converted

    def _refuse(
        self, ref: TensorRef, start: int, values: NDArray[Any], magnitudes: NDArray[Any], limit: np.float32
    ) -> None:
        index = tuple(int(i) for i in np.argwhere(~(magnitudes < limit))[0])
        where = f"row {start + index[0]}" + (f", column {index[1]}" if len(index) > 1 else "")
        if not np.isfinite(values[index]):
            raise WeightRangeError(
                f"{ref.name}: the weight in {where} is {values[index]:g}",
                f"Download {ref.file.name} again; no number format has room for such a weight.",
            )
        raise WeightRangeError(
            f"{ref.name}: the weight in {where} is {values[index]:g}, which float16 cannot hold (largest 65504)",
            "Export for trt-bf16, which has the range of the checkpoint's own type.",
        )
