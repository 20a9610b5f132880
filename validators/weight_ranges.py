"""The ranges of a checkpoint's weights, layer by layer, in every type that an artifact may hold them in.

MXFP4 is not decoded: values of a group have one scale, so only groups whose scale lets them hold a largest value, or
one outside of a type's normal numbers, have their codes looked at. Of all others the scale is read, one byte in 17.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptoss_export.exporter.checkpoint.mxfp4 import FP4_VALUES
from gptoss_export.exporter.checkpoint.read import NAN_SCALE, read_rows
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.exporter.progress import Progress, SilentProgress, Task
from gptoss_export.validators.extent import LIMITS, SMALLEST_NORMAL, Extent

Bytes = NDArray[np.uint8]

_MAPPED_BYTES = 8 << 20
"""Of a tensor that are mapped at a time, a row at least."""

_BF16_AT_ONCE = 1 << 20
_GROUPS_AT_ONCE = 1 << 16

_MAGNITUDE, _INFINITY = 0x7FFF, 0x7F80
"""Bits of a bfloat16; without the sign, larger numbers have larger bits, infinity and NaN the largest."""

_MAGNITUDES, _EVERY_NIBBLE = np.uint64(0x7777777777777777), np.uint64(0x1111111111111111)
_CODES = FP4_VALUES[:8].astype(np.float64)
_SCALES = np.ldexp(1.0, np.arange(NAN_SCALE) - 127)


@dataclass(frozen=True)
class WeightRange:
    """One tensor of a layer as it is decoded. name: canonical, without the `_blocks` of MXFP4.

    extents: by type, what the values are where they are held in it.
    """

    name: str
    extents: Mapping[str, Extent]


def weight_ranges(checkpoint: Checkpoint, progress: Progress | None = None) -> tuple[tuple[WeightRange, ...], ...]:
    """Of each layer, each of its tensors, in the checkpoint's order.

    Reads every byte of the layers' bfloat16 and every scale once. Raises what `read_rows` raises.
    """
    layers: list[list[WeightRange]] = [[] for _ in range(checkpoint.config.num_layers)]
    refs = {name: ref for name, ref in checkpoint.tensors.items() if name.startswith("model.layers.")}
    with (progress or SilentProgress()).task(
        "ranges of weights", total=sum(ref.nbytes for ref in refs.values()), unit="bytes"
    ) as task:
        for name, ref in refs.items():
            layer = layers[int(name.split(".")[2])]
            if ref.dtype == "BF16":
                layer.append(WeightRange(name, _scan_bf16(ref, task)))
            elif name.endswith("_blocks"):
                name = name.removesuffix("_blocks")
                layer.append(WeightRange(name, _scan_mxfp4(ref, refs[f"{name}_scales"], task)))
    return tuple(map(tuple, layers))


def _scan_bf16(ref: TensorRef, task: Task) -> dict[str, Extent]:
    largest, bounds = 0, _bf16_bounds()
    counts = {held: [0, 0] for held in LIMITS}
    for start, stop in _windows(ref):
        rows = read_rows(ref, start, stop).view(np.uint16).reshape(-1)
        for at in range(0, len(rows), _BF16_AT_ONCE):
            bits = rows[at : at + _BF16_AT_ONCE] & _MAGNITUDE
            most = int(bits.max())
            if most >= _INFINITY:
                most = int(bits.max(initial=0, where=bits < _INFINITY))
            largest = max(largest, most)
            nonzero = np.count_nonzero(bits)
            for held, (first_normal, at_limit) in bounds.items():
                counts[held][0] += int(np.count_nonzero(bits >= at_limit))
                counts[held][1] += int(nonzero - np.count_nonzero(bits >= first_normal))
        task.advance(rows.nbytes)
    value = float(np.array(largest, np.uint16).view(ml_dtypes.bfloat16))
    return {held: Extent(value, saturated, subnormal) for held, (saturated, subnormal) in counts.items()}


@lru_cache(maxsize=1)
def _bf16_bounds() -> dict[str, tuple[int, int]]:
    """By type, the bits of the first bfloat16 that is normal in it, and of the first at its limit."""
    values = np.arange(_INFINITY, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    return {
        held: (int(np.searchsorted(values, SMALLEST_NORMAL[held])), int(np.searchsorted(values, limit)))
        for held, limit in LIMITS.items()
    }


def _scan_mxfp4(blocks: TensorRef, scales: TensorRef, task: Task) -> dict[str, Extent]:
    """blocks [E, rows, G, 16], scales [E, rows, G]."""
    largest, bounds = 0.0, _bounds()
    counts = {held: [0, 0] for held in LIMITS}
    for start, stop in _windows(blocks):
        codes, of_groups = read_rows(blocks, start, stop).reshape(-1, 16), read_rows(scales, start, stop).reshape(-1)
        for at in range(0, len(of_groups), _GROUPS_AT_ONCE):
            part = slice(at, at + _GROUPS_AT_ONCE)
            largest = _largest(codes[part], of_groups[part], largest)
            for held, bound in bounds.items():
                special = np.flatnonzero(bound.special[of_groups[part]])
                if len(special):
                    words, own = codes[part][special].view(np.uint64) & _MAGNITUDES, of_groups[part][special]
                    counts[held][0] += _count(words, bound.at_limit[own])
                    counts[held][1] += _count(words, np.ones_like(own)) - _count(words, bound.normal[own])
        task.advance(codes.nbytes + of_groups.nbytes)
    return {held: Extent(largest, saturated, subnormal) for held, (saturated, subnormal) in counts.items()}


def _largest(codes: Bytes, scales: Bytes, so_far: float) -> float:
    """The largest |value| of groups codes [n, 16], scales [n], or `so_far` where that is larger."""
    present = np.flatnonzero(np.bincount(scales, minlength=256)[:NAN_SCALE])
    for scale in present[::-1]:
        if _CODES[-1] * _SCALES[scale] <= so_far:
            break
        held = codes[scales == scale]
        code = max(int((held & 7).max()), int((held >> 4 & 7).max()))
        so_far = max(so_far, float(_CODES[code] * _SCALES[scale]))
    return so_far


def _count(words: NDArray[np.uint64], least: Bytes) -> int:
    """How many magnitudes are `least` [n], 0 to 8, or more; words [n, 2] hold 16 of them each, in nibbles of which the
    highest bit is free: it is set by adding what is missing to 8."""
    if least.min() == 8:
        return 0
    missing = (8 - least).astype(np.uint64)[:, None] * _EVERY_NIBBLE
    return int(np.bitwise_count((words + missing) & ~_MAGNITUDES).sum())


@dataclass(frozen=True)
class _Bounds:
    """By scale [256]: normal, at_limit: the first magnitude, 1 to 7, that is; 8 where none is, and 0 at_limit where all
    are no number. special: whether any but 0 is not normal, or any at the limit."""

    normal: Bytes
    at_limit: Bytes

    @property
    def special(self) -> NDArray[np.bool_]:
        return (self.normal > 1) | (self.at_limit < 8)


@lru_cache(maxsize=1)
def _bounds() -> dict[str, _Bounds]:
    """By type."""
    bounds = {}
    for held, limit in LIMITS.items():
        values = np.full((256, 8), np.inf)
        values[:NAN_SCALE] = _SCALES[:, None] * _CODES
        normal, at_limit = ((values < least).sum(axis=1) for least in (SMALLEST_NORMAL[held], limit))
        bounds[held] = _Bounds(np.maximum(normal, 1).astype(np.uint8), at_limit.astype(np.uint8))
    return bounds


def _windows(ref: TensorRef) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a tensor's first dimension."""
    step = max(1, _MAPPED_BYTES * ref.shape[0] // ref.nbytes)
    for start in range(0, ref.shape[0], step):
        yield start, min(start + step, ref.shape[0])
