"""How large values are, in the terms of the type that they are held in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIMITS = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
"""The largest finite number of each type."""

SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}


@dataclass(frozen=True)
class Extent:
    """largest: the largest finite |value|, 0 where there is none. saturated: how many values are at the type's limit or
    beyond, infinite or NaN. subnormal: how many are not 0 and below its smallest normal number."""

    largest: float = 0.0
    saturated: int = 0
    subnormal: int = 0

    def merge(self, other: Extent) -> Extent:
        return Extent(
            max(self.largest, other.largest), self.saturated + other.saturated, self.subnormal + other.subnormal
        )


def extent(values: NDArray[np.float32], held: str) -> Extent:
    """Of values that are, or would be, held in that type, a key of LIMITS."""
    size = np.abs(values)
    saturated = int(np.count_nonzero(~(size < LIMITS[held])))  # so that NaN counts
    largest = size.max(initial=0.0, where=np.isfinite(size)) if saturated else size.max(initial=0.0)
    return Extent(float(largest), saturated, int(np.count_nonzero((size > 0) & (size < SMALLEST_NORMAL[held]))))
