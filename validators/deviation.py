"""How far values are from what they should be, relative to the size of that, a block at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Deviation:
    """Sums of squares of a difference and of what it is relative to, over finite values."""

    def __init__(self) -> None:
        self._difference = self._size = 0.0
        self.values = self.non_finite = 0

    def add(self, found: Array, expected: Array, before: Array | None = None) -> None:
        """before: what was there already, so that the size is that of what was added to it."""
        difference = found.astype(np.float64) - expected
        bad = int((~np.isfinite(difference)).sum())
        self.non_finite += bad
        self.values += difference.size
        if bad:
            return
        self._difference += float(np.square(difference).sum())
        added = expected.astype(np.float64) if before is None else expected.astype(np.float64) - before
        self._size += float(np.square(added).sum())

    @property
    def relative(self) -> float | None:
        """Root mean square of the difference over that of the size; None where nothing finite was compared."""
        if self.non_finite or not self.values:
            return None
        if self._size == 0.0:
            return 0.0 if self._difference == 0.0 else None
        return float(np.sqrt(self._difference / self._size))
